//! [`QmpSession`]: one QMP client's conversation, bytes and fds in, bytes out; no socket, clock or
//! thread inside.
//!
//! ```text
//! negotiating --qmp_capabilities--> commands    reset() returns to negotiating
//! ```
//!
//! Invariants: commands are answered in the order in which they came, one reply each; events are
//! sent only in command mode; every line ends in CR LF, which libvirt insists on.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::scanner::{Scanned, Scanner};
use super::spaced::spaced;
use crate::command::{ClientFds, Error, ErrorClass};
use crate::schema;

/// Fds that a client passed and has not named yet.
const MAX_LOOSE_FDS: usize = 64;
/// Fds that a client may hold by name.
const MAX_NAMED_FDS: usize = 1024;

/// The version that the greeting and `query-version` give. libvirt wants at least 6.2 and derives
/// what it uses from the schema, not from this.
pub fn version() -> Value {
    json!({
        "qemu": { "micro": 0, "minor": 2, "major": 8 },
        "package": concat!("tern-", env!("CARGO_PKG_VERSION")),
    })
}

/// A command for the machine, its arguments checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub name: String,
    /// An object.
    pub arguments: Value,
    /// Comes back in the reply.
    pub id: Option<Value>,
}

/// What the caller does next.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Send these bytes.
    Send(Vec<u8>),
    /// Run this command, then send what [`QmpSession::reply`] makes of the result.
    Execute(Request),
}

/// See the module's header.
pub struct QmpSession {
    scanner: Scanner,
    input: VecDeque<u8>,
    loose_fds: VecDeque<OwnedFd>,
    fds: Arc<ClientFds>,
    negotiated: bool,
    pretty: bool,
}

impl QmpSession {
    /// A session before its greeting. `pretty`: replies are indented over several lines.
    pub fn new(pretty: bool) -> Self {
        Self {
            scanner: Scanner::default(),
            input: VecDeque::new(),
            loose_fds: VecDeque::new(),
            fds: Arc::default(),
            negotiated: false,
            pretty,
        }
    }

    /// The client's named fds.
    pub fn fds(&self) -> &Arc<ClientFds> {
        &self.fds
    }

    /// Whether the client is past `qmp_capabilities`.
    pub fn negotiated(&self) -> bool {
        self.negotiated
    }

    /// What a new client is told first.
    pub fn greeting(&self) -> Vec<u8> {
        self.line(&json!({ "QMP": { "version": version(), "capabilities": [] } }))
    }

    /// The client went away: a half-read command and its fds are dropped.
    pub fn reset(&mut self) {
        *self = Self::new(self.pretty);
    }

    /// Drops what was received and not worked on yet.
    pub fn discard_input(&mut self) {
        self.scanner.reset();
        self.input.clear();
    }

    /// Adds input. Of the fds that no `getfd` has named only the last 64 are kept.
    pub fn receive(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) {
        self.input.extend(bytes);
        self.loose_fds.extend(fds);
        while self.loose_fds.len() > MAX_LOOSE_FDS {
            self.loose_fds.pop_front();
        }
    }

    /// The next thing to do, `None` when more input is needed.
    pub fn step(&mut self) -> Option<Step> {
        loop {
            let (front, _) = self.input.as_slices();
            if front.is_empty() {
                return None;
            }
            let (took, found) = self.scanner.feed(front);
            self.input.drain(..took);
            match found {
                None => {}
                Some(Scanned::Error(desc)) => {
                    return Some(Step::Send(self.reply(None, Err(Error::generic(desc)))));
                }
                Some(Scanned::Value(value)) => return Some(self.dispatch(value)),
            }
        }
    }

    /// The bytes of a command's reply.
    pub fn reply(&self, id: Option<Value>, result: Result<Value, Error>) -> Vec<u8> {
        let mut object = Map::new();
        match result {
            Ok(value) => object.insert("return".into(), value),
            Err(e) => object.insert("error".into(), json!({ "class": e.class, "desc": e.desc })),
        };
        if let Some(id) = id {
            object.insert("id".into(), id);
        }
        self.line(&Value::Object(object))
    }

    /// The bytes of an event; `None` before negotiation.
    pub fn event(&self, event: &Value) -> Option<Vec<u8>> {
        self.negotiated.then(|| self.line(event))
    }

    fn line(&self, value: &Value) -> Vec<u8> {
        let mut text =
            if self.pretty { format!("{value:#}").replace('\n', "\r\n") } else { spaced(value) };
        text.push_str("\r\n");
        text.into_bytes()
    }

    fn dispatch(&mut self, value: Value) -> Step {
        let id = value.get("id").cloned();
        match self.request(value) {
            Err(e) => Step::Send(self.reply(id, Err(e))),
            Ok((name, arguments)) => match self.own_command(&name, &arguments) {
                Some(result) => Step::Send(self.reply(id, result)),
                None => Step::Execute(Request { name, arguments, id }),
            },
        }
    }

    /// Checks a command's shape: its members, that it exists and is allowed now, its arguments.
    fn request(&self, value: Value) -> Result<(String, Value), Error> {
        let Value::Object(object) = value else {
            return Err(Error::generic("QMP input must be a JSON object"));
        };
        let mut name = None;
        let mut arguments = Value::Object(Map::new());
        for (key, member) in object {
            match (key.as_str(), member) {
                ("execute", Value::String(s)) => name = Some(s),
                ("execute", _) => {
                    return Err(Error::generic("QMP input member 'execute' must be a string"));
                }
                ("arguments", member @ Value::Object(_)) => arguments = member,
                ("arguments", _) => {
                    return Err(Error::generic("QMP input member 'arguments' must be an object"));
                }
                ("id", _) => {}
                _ => {
                    return Err(Error::generic(format!("QMP input member '{key}' is unexpected")));
                }
            }
        }
        let name = name.ok_or_else(|| Error::generic("QMP input lacks member 'execute'"))?;
        let not_found = |desc: String| Error { class: ErrorClass::CommandNotFound, desc };
        if !self.negotiated && name != "qmp_capabilities" {
            return Err(not_found(
                "Expecting capabilities negotiation with 'qmp_capabilities'".into(),
            ));
        }
        if self.negotiated && name == "qmp_capabilities" {
            return Err(not_found(
                "Capabilities negotiation is already complete, command ignored".into(),
            ));
        }
        schema::command(&name)
            .ok_or_else(|| not_found(format!("The command {name} has not been found")))?
            .check(&arguments)?;
        Ok((name, arguments))
    }

    /// Commands that need no machine.
    fn own_command(&mut self, name: &str, arguments: &Value) -> Option<Result<Value, Error>> {
        let text = |key: &str| arguments.get(key).and_then(Value::as_str).unwrap_or_default();
        Some(match name {
            "qmp_capabilities" => self.negotiate(arguments),
            "query-target" => Ok(json!({ "arch": "x86_64" })),
            "query-version" => Ok(version()),
            "query-commands" => Ok(schema::query_commands()),
            "query-qmp-schema" => Ok(schema::query_qmp_schema()),
            "getfd" => self.getfd(text("fdname")),
            "closefd" => self.closefd(text("fdname")),
            _ => return None,
        })
    }

    fn negotiate(&mut self, arguments: &Value) -> Result<Value, Error> {
        let asked = arguments.get("enable").and_then(Value::as_array);
        if let Some(first) = asked.and_then(|a| a.first()) {
            let name = first.as_str().unwrap_or_default();
            return Err(Error::generic(format!("Capability '{name}' is not available")));
        }
        self.negotiated = true;
        Ok(json!({}))
    }

    fn getfd(&mut self, name: &str) -> Result<Value, Error> {
        let fd = self
            .loose_fds
            .pop_front()
            .ok_or_else(|| Error::generic("No file descriptor supplied via SCM_RIGHTS"))?;
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(Error::generic(
                "Parameter 'fdname' expects a name not starting with a digit",
            ));
        }
        let mut fds = self.fds.0.lock();
        if fds.len() >= MAX_NAMED_FDS && !fds.contains_key(name) {
            return Err(Error::generic("Too many file descriptors are open: use closefd"));
        }
        fds.insert(name.to_string(), fd);
        Ok(json!({}))
    }

    fn closefd(&mut self, name: &str) -> Result<Value, Error> {
        match self.fds.0.lock().remove(name) {
            Some(_) => Ok(json!({})),
            None => Err(Error::generic(format!("File descriptor named '{name}' not found"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(session: &mut QmpSession, input: &str) -> Vec<String> {
        session.receive(input.as_bytes(), Vec::new());
        let mut out = Vec::new();
        while let Some(step) = session.step() {
            let bytes = match step {
                Step::Send(bytes) => bytes,
                Step::Execute(r) => session.reply(r.id, Ok(json!({"ran": r.name}))),
            };
            let text = String::from_utf8(bytes).unwrap();
            assert!(text.ends_with("\r\n"));
            out.push(text.trim_end().to_string());
        }
        out
    }

    fn ready() -> QmpSession {
        let mut session = QmpSession::new(false);
        assert_eq!(run(&mut session, r#"{"execute":"qmp_capabilities"}"#), [r#"{"return": {}}"#]);
        session
    }

    fn desc(session: &mut QmpSession, input: &str) -> String {
        let reply: Value = serde_json::from_str(&run(session, input)[0]).unwrap();
        format!(
            "{}: {}",
            reply["error"]["class"].as_str().unwrap(),
            reply["error"]["desc"].as_str().unwrap()
        )
    }

    #[test]
    fn the_greeting_has_the_version_and_ends_in_cr_lf() {
        let greeting = QmpSession::new(false).greeting();
        assert!(greeting.ends_with(b"}\r\n"));
        let value: Value = serde_json::from_slice(&greeting).unwrap();
        assert_eq!(value["QMP"]["version"]["qemu"]["major"], 8);
    }

    #[test]
    fn commands_before_negotiation_are_refused_and_events_are_not_sent() {
        let mut session = QmpSession::new(false);
        assert_eq!(
            desc(&mut session, r#"{"execute":"query-status"}"#),
            "CommandNotFound: Expecting capabilities negotiation with 'qmp_capabilities'"
        );
        assert!(desc(&mut session, r#"{"execute":"no-such"}"#).contains("negotiation"));
        assert!(session.event(&json!({"event": "STOP"})).is_none());
        let mut session = ready();
        assert!(session.event(&json!({"event": "STOP"})).is_some());
        assert!(desc(&mut session, r#"{"execute":"qmp_capabilities"}"#).contains("already"));
    }

    #[test]
    fn errors_are_in_qemus_words() {
        let mut s = ready();
        for (input, expected) in [
            (r#"{"execute":"x"}"#, "CommandNotFound: The command x has not been found"),
            (r#"{"execute":1}"#, "GenericError: QMP input member 'execute' must be a string"),
            (r#"{"exec-oob":"stop"}"#, "GenericError: QMP input member 'exec-oob' is unexpected"),
            (r#"{}"#, "GenericError: QMP input lacks member 'execute'"),
            (r#"[]"#, "GenericError: QMP input must be a JSON object"),
            (
                r#"{"execute":"stop","arguments":[]}"#,
                "GenericError: QMP input member 'arguments' must be an object",
            ),
            (
                r#"{"execute":"stop","arguments":{"a":1}}"#,
                "GenericError: Parameter 'a' is unexpected",
            ),
            (r#"{"execute":"migrate"}"#, "GenericError: Parameter 'uri' is missing"),
            (
                r#"{"execute":"migrate","arguments":{"uri":3}}"#,
                "GenericError: Invalid parameter type for 'uri', expected: string",
            ),
            (
                r#"{"execute":"getfd","arguments":{"fdname":"m"}}"#,
                "GenericError: No file descriptor supplied via SCM_RIGHTS",
            ),
        ] {
            assert_eq!(desc(&mut s, input), expected, "{input}");
        }
    }

    #[test]
    fn the_id_comes_back_whatever_it_is() {
        let mut session = ready();
        let out =
            run(&mut session, r#"{"execute":"stop","id":{"a":[1]}} {"execute":"nope","id":7}"#);
        assert_eq!(out[0], r#"{"return": {"ran": "stop"}, "id": {"a": [1]}}"#);
        assert!(out[1].ends_with(r#""id": 7}"#));
    }

    #[test]
    fn getfd_names_the_fds_in_order() {
        let mut session = ready();
        let file = tempfile::tempfile().unwrap();
        session.receive(b"{'execute':'getfd','arguments':{'fdname':'migrate'}}", vec![file.into()]);
        assert!(matches!(session.step(), Some(Step::Send(b)) if b == b"{\"return\": {}}\r\n"));
        assert!(session.fds().0.lock().contains_key("migrate"));
        let close = r#"{"execute":"closefd","arguments":{"fdname":"migrate"}}"#;
        assert_eq!(run(&mut session, close), [r#"{"return": {}}"#]);
        assert!(desc(&mut session, close).contains("'migrate' not found"));
    }

    #[test]
    fn pretty_replies_end_every_line_in_cr_lf() {
        let session = QmpSession::new(true);
        let text = String::from_utf8(session.greeting()).unwrap();
        assert!(text.lines().count() > 3);
        assert_eq!(text.matches('\n').count(), text.matches("\r\n").count());
    }

    proptest! {
        #[test]
        fn every_split_of_a_conversation_gives_the_same_replies(at in 0usize..140) {
            let talk = "{\"execute\":\"qmp_capabilities\"}\r\n{\"execute\":\"query-version\",\"id\":1}\r\n\
                        garbage\r\n{\"execute\":\"stop\",\"id\":\"\\u00e9\"}{\"execute\":\"nope\"}\n";
            let whole = run(&mut QmpSession::new(false), talk);
            prop_assert_eq!(whole.len(), 5);
            let mut session = QmpSession::new(false);
            let at = at.min(talk.len());
            let mut parts = run(&mut session, &talk[..at]);
            parts.extend(run(&mut session, &talk[at..]));
            prop_assert_eq!(parts, whole);
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut session = ready();
            session.receive(&bytes, Vec::new());
            while session.step().is_some() {}
        }
    }
}
