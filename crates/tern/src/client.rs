//! A small synchronous QMP client over a unix socket, for the `tern` commands.
//!
//! The VM's control socket takes several clients at once and lets the longest silent one go when it
//! is full, so each command connects, says what it has to say and leaves.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::runtime_dir::Entry;

/// Most bytes of one reply.
const MAX_REPLY: usize = 16 << 20;
/// How long a VM may take to answer a command.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What a QMP exchange can end in.
#[derive(Debug)]
pub enum Error {
    /// The socket failed.
    Io(io::Error),
    /// No answer in time.
    Late,
    /// Not what QMP says.
    Protocol(String),
    /// The VM refused the command.
    Refused(String),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(e) => write!(f, "cannot talk to the VM: {e}"),
            Self::Late => f.write_str(
                "the VM did not answer in time; look whether its process runs or was stopped \
                 (`tern ps` has its pid); `tern kill NAME` ends it",
            ),
            Self::Protocol(what) => write!(f, "the VM answered what is not QMP: {what}"),
            Self::Refused(desc) => f.write_str(desc),
        }
    }
}

impl std::error::Error for Error {}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Late,
            _ => Self::Io(error),
        }
    }
}

/// A connection that has been greeted.
pub struct Client {
    stream: UnixStream,
    /// What was read and is not a whole line yet.
    rest: Vec<u8>,
    patience: Duration,
    deadline: Instant,
}

impl Client {
    /// Connects to a VM and leaves the capabilities negotiation behind.
    /// `patience`: how long each answer may take.
    pub fn connect(vm: &Entry, patience: Duration) -> Result<Self, Error> {
        Self::new(UnixStream::connect(vm.qmp_socket())?, patience)
    }

    fn new(stream: UnixStream, patience: Duration) -> Result<Self, Error> {
        stream.set_write_timeout(Some(patience))?;
        let deadline = Instant::now() + patience;
        let mut client = Self { stream, rest: Vec::new(), patience, deadline };
        let greeting = client.read_message()?;
        if greeting.get("QMP").is_none() {
            return Err(Error::Protocol("no greeting".into()));
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Executes a command and returns its `return` value; events in between are passed over.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Error> {
        self.deadline = Instant::now() + self.patience;
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push_str("\r\n");
        self.stream.write_all(line.as_bytes())?;
        loop {
            let mut message = self.read_message()?;
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = message.get("error") {
                let desc = error.get("desc").and_then(Value::as_str);
                return Err(Error::Refused(desc.unwrap_or("it does not say why").into()));
            }
            if message.get("event").is_none() {
                return Err(Error::Protocol("a message that is no reply and no event".into()));
            }
        }
    }

    fn read_message(&mut self) -> Result<Value, Error> {
        loop {
            if let Some(end) = self.rest.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return serde_json::from_slice(&line).map_err(|e| Error::Protocol(e.to_string()));
            }
            if self.rest.len() > MAX_REPLY {
                return Err(Error::Protocol("a line without end".into()));
            }
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Late);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut chunk = [0; 16 << 10];
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    let gone = io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up");
                    return Err(Error::Io(gone));
                }
                Ok(n) => self.rest.extend(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// One command on a connection of its own.
pub fn execute(vm: &Entry, command: &str, arguments: Value) -> Result<Value, Error> {
    Client::connect(vm, PATIENCE)?.execute(command, arguments)
}

/// One HMP command; what it printed, with bare newlines.
pub fn hmp(vm: &Entry, line: &str) -> Result<String, Error> {
    let value = execute(vm, "human-monitor-command", json!({"command-line": line}))?;
    match value.as_str() {
        Some(text) => Ok(text.replace("\r\n", "\n")),
        None => Err(Error::Protocol("human-monitor-command returned no string".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};

    /// A peer that greets, and answers each line with the next of `replies`.
    fn peer(replies: &'static [&'static str]) -> UnixStream {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            theirs.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n").unwrap();
            let mut lines = BufReader::new(theirs.try_clone().unwrap()).lines();
            for reply in std::iter::once(&"{\"return\": {}}\r\n").chain(replies) {
                lines.next().unwrap().unwrap();
                theirs.write_all(reply.as_bytes()).unwrap();
            }
        });
        ours
    }

    #[test]
    fn events_are_passed_over_and_errors_told() {
        let mut client = Client::new(
            peer(&[
                "{\"event\": \"STOP\"}\r\n{\"return\": {\"a\": 1}}\r\n",
                "{\"error\": {\"class\": \"GenericError\", \"desc\": \"No.\"}}\r\n",
                "nonsense\r\n",
            ]),
            PATIENCE,
        )
        .unwrap();
        assert_eq!(client.execute("x", json!({})).unwrap(), json!({"a": 1}));
        assert_eq!(client.execute("x", json!({})).unwrap_err().to_string(), "No.");
        assert!(matches!(client.execute("x", json!({})), Err(Error::Protocol(_))));
        assert!(matches!(client.execute("x", json!({})), Err(Error::Io(_))));
    }
}
