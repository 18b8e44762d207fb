//! A small QMP client, independent of the project's own QMP code so that it can judge it.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::Context;
use crate::{Error, Result};

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(60);

/// An event, with the host's time at which it came in.
#[derive(Clone, Debug)]
pub struct Event {
    /// For example `STOP`.
    pub name: String,
    /// Its data, null when it has none.
    pub data: Value,
    /// When the VMM sent it, by its own stamp: seconds since 1970.
    pub stamp: f64,
    /// When it was read here.
    pub at: Instant,
}

/// A connection to a monitor.
pub struct Client {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    partial: Vec<u8>,
    events: VecDeque<Event>,
    /// The greeting.
    pub greeting: Value,
}

impl Client {
    /// Connects to the monitor at `path` and leaves negotiation mode.
    ///
    /// # Errors
    /// When nobody listens there within `patience`, or does not speak QMP.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self> {
        let until = Instant::now() + patience;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
                Err(e) => return Err(e).context(|| format!("no QMP at {}", path.display())),
            }
        };
        let writer = stream.try_clone().context(|| "QMP socket".into())?;
        let mut client = Self {
            reader: BufReader::new(stream),
            writer,
            partial: Vec::new(),
            events: VecDeque::new(),
            greeting: Value::Null,
        };
        let greeting =
            client.read(Instant::now() + ANSWER)?.ok_or_else(|| timeout("QMP greeting", ANSWER))?;
        if greeting.get("QMP").is_none() {
            return Err(Error::Protocol(format!("this is no QMP greeting: {greeting}")));
        }
        client.greeting = greeting;
        client.execute("qmp_capabilities", Value::Null)?;
        Ok(client)
    }

    /// One object, or none when `until` has come.
    fn read(&mut self, until: Instant) -> Result<Option<Value>> {
        loop {
            let wait =
                until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.reader.get_ref().set_read_timeout(Some(wait)).context(|| "QMP socket".into())?;
            match self.reader.read_until(b'\n', &mut self.partial) {
                Ok(0) => return Err(Error::Protocol("the VMM closed its QMP connection".into())),
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.partial);
                    if line.trim_ascii().is_empty() {
                        continue;
                    }
                    return serde_json::from_slice(&line).map(Some).map_err(|e| {
                        Error::Protocol(format!(
                            "not JSON on QMP ({e}): {}",
                            String::from_utf8_lossy(&line)
                        ))
                    });
                }
                Ok(_) => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if Instant::now() >= until {
                        return Ok(None);
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e).context(|| "QMP socket".into()),
            }
        }
    }

    fn keep(&mut self, object: &Value) {
        let Some(name) = object.get("event").and_then(Value::as_str) else { return };
        let stamp = |k| object.pointer(k).and_then(Value::as_f64).unwrap_or(0.0);
        self.events.push_back(Event {
            name: name.to_owned(),
            data: object.get("data").cloned().unwrap_or(Value::Null),
            stamp: stamp("/timestamp/seconds") + stamp("/timestamp/microseconds") / 1e6,
            at: Instant::now(),
        });
    }

    /// Runs a command; `arguments` may be null. The result is its `return`.
    ///
    /// # Errors
    /// [`Error::Qmp`] when the VMM refuses it.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.execute_within(command, arguments, ANSWER)
    }

    /// The same with another limit than a minute for the answer.
    ///
    /// # Errors
    /// As `execute`.
    pub fn execute_within(
        &mut self,
        command: &str,
        arguments: Value,
        patience: Duration,
    ) -> Result<Value> {
        let mut object = json!({ "execute": command });
        if !arguments.is_null() {
            object["arguments"] = arguments;
        }
        self.writer
            .write_all(format!("{object}\r\n").as_bytes())
            .context(|| format!("cannot send {command}"))?;
        let until = Instant::now() + patience;
        loop {
            let answer = self
                .read(until)?
                .ok_or_else(|| timeout(&format!("the answer to {command}"), patience))?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                let text = |k| error.get(k).and_then(Value::as_str).unwrap_or_default().to_owned();
                return Err(Error::Qmp {
                    command: command.to_owned(),
                    class: text("class"),
                    desc: text("desc"),
                });
            }
            self.keep(&answer);
        }
    }

    /// Events that came in so far and were not taken.
    pub fn events(&self) -> impl Iterator<Item = &Event> {
        self.events.iter()
    }

    /// Forgets the events that came in so far.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    /// The next event of that name; it and those before it are taken.
    ///
    /// # Errors
    /// When it does not come within `patience`.
    pub fn wait_event(&mut self, name: &str, patience: Duration) -> Result<Event> {
        let until = Instant::now() + patience;
        loop {
            while let Some(event) = self.events.pop_front() {
                if event.name == name {
                    return Ok(event);
                }
            }
            let object =
                self.read(until)?.ok_or_else(|| timeout(&format!("the event {name}"), patience))?;
            self.keep(&object);
        }
    }
}

fn timeout(what: &str, patience: Duration) -> Error {
    Error::Timeout { what: what.to_owned(), seconds: patience.as_secs() }
}
