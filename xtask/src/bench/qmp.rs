//! A small QMP client: one command at a time, and waiting for events.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Result;

/// A connection to a VMM's monitor.
pub struct Qmp {
    stream: BufReader<UnixStream>,
    /// Events that came while a reply was awaited, with the time at which they were read.
    events: Vec<(Instant, Value)>,
}

impl Qmp {
    /// Connects as soon as the socket is there, and takes the capabilities.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let until = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() >= until => {
                    return Err(format!("no monitor at {}: {e}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let mut qmp = Self { stream: BufReader::new(stream), events: Vec::new() };
        qmp.read(until)?;
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn read(&mut self, until: Instant) -> Result<Value> {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.get_ref().set_read_timeout(Some(left)).map_err(|e| e.to_string())?;
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => Err("the VMM closed its monitor".into()),
            Ok(_) => serde_json::from_str(&line).map_err(|e| format!("QMP: {e}: {line}")),
            Err(e) => Err(format!("the VMM's monitor says nothing: {e}")),
        }
    }

    /// Executes a command; its return value.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let mut line = json!({"execute": name, "arguments": arguments}).to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).map_err(|e| format!("QMP: {e}"))?;
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            let mut answer = self.read(until)?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                return Err(format!("{name}: {}", error["desc"].as_str().unwrap_or_default()));
            }
            self.events.push((Instant::now(), answer));
        }
    }

    /// Waits for an event `name` that `wanted` takes; when it was read, and its data.
    pub fn wait(
        &mut self,
        name: &str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<(Instant, Value)> {
        let until = Instant::now() + limit;
        let fits = |e: &Value| e["event"] == name && wanted(&e["data"]);
        loop {
            if let Some(at) = self.events.iter().position(|(_, e)| fits(e)) {
                let (when, mut event) = self.events.remove(at);
                return Ok((when, event["data"].take()));
            }
            let event = self.read(until).map_err(|e| format!("waiting for {name}: {e}"))?;
            self.events.push((Instant::now(), event));
        }
    }
}
