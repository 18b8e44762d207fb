//! A whole switch with its control socket, and whether a peer for it is installed.
#![allow(dead_code)] // every test binary uses a part of it

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;

use serde_json::{Value, json};
use vswitch::{Config, PortSpec, Server};

/// A switch on a thread of this process.
pub struct Switch {
    control: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Switch {
    /// Starts it, in the network namespace of the calling thread, with its control socket in `dir`.
    pub fn start(dir: &Path, ports: &[String]) -> Self {
        let control = dir.join("control");
        let port = ports.iter().map(|p| PortSpec::parse(p).unwrap()).collect();
        let mut server = Server::new(&Config { port, ..Config::default() }, &control).unwrap();
        let thread = Some(std::thread::spawn(move || server.run()));
        Self { control, thread }
    }

    /// What it answers to a command, which has to succeed.
    pub fn ask(&self, command: &str) -> Value {
        self.try_ask(command, json!({})).unwrap()
    }

    /// What it answers to a command: an error is a sentence.
    pub fn try_ask(&self, command: &str, arguments: Value) -> Result<Value, String> {
        let mut s = UnixStream::connect(&self.control).unwrap();
        writeln!(s, "{}", json!({ "command": command, "arguments": arguments })).unwrap();
        let mut line = String::new();
        BufReader::new(s).read_line(&mut line).unwrap();
        let mut answer: Value = serde_json::from_str(&line).unwrap();
        match answer["error"].as_str() {
            Some(e) => Err(e.into()),
            None => Ok(answer["return"].take()),
        }
    }

    /// Whether both ports have `queues` queues that take frames and give some.
    pub fn has_rings(&self, queues: usize) -> bool {
        let shown = self.ask("show");
        let enough = |v: &Value| v.as_u64().is_some_and(|n| n as usize >= queues);
        let ports = shown["ports"].as_array().unwrap();
        ports.iter().all(|p| enough(&p["rings"]["receive"]) && enough(&p["rings"]["transmit"]))
    }

    /// Frames that port `i` was sent.
    pub fn sent_to(&self, i: usize) -> usize {
        self.ask("stats")["ports"][i]["tx-frames"].as_u64().unwrap() as usize
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.ask("quit");
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().unwrap();
        }
    }
}

/// Whether `program` can be run; says if it cannot.
pub fn has_program(test: &str, program: &str, package: &str) -> bool {
    let there = Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok();
    if !there {
        eprintln!("{test}: skipped: {program} is not installed (Debian package {package})");
    }
    there
}
