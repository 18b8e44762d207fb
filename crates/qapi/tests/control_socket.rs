//! The control socket: several clients at once, silent ones, and the end.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use qapi::control_socket::MAX_CLIENTS;
use qapi::{ClientFds, Commands, ControlServer, ControlSocket, Error, EventBus};
use serde_json::{Value, json};

struct Machine;

impl Commands for Machine {
    fn execute(&self, name: &str, _: Value, _: &ClientFds) -> Result<Value, Error> {
        if name == "query-name" {
            std::thread::sleep(Duration::from_secs(3));
        }
        Ok(json!({"did": name}))
    }
}

struct World {
    events: EventBus,
    path: PathBuf,
    server: ControlServer,
    _dir: tempfile::TempDir,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let events = EventBus::new();
    let socket = ControlSocket::bind(&path).unwrap();
    let server = socket.serve(Arc::new(Machine), &events).unwrap();
    World { events, path, server, _dir: dir }
}

struct Client(BufReader<UnixStream>);

impl Client {
    /// Only connects.
    fn new(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Self(BufReader::new(stream))
    }

    fn ready(path: &Path) -> Self {
        let mut client = Self::new(path);
        assert!(client.line().contains("QMP"));
        client.send(r#"{"execute":"qmp_capabilities"}"#);
        client.line();
        client
    }

    fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    /// Empty when it was let go.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line
    }

    fn asks(&mut self) {
        self.send(r#"{"execute":"query-status"}"#);
        assert_eq!(self.line().trim_end(), r#"{"return": {"did": "query-status"}}"#);
    }
}

#[test]
fn all_clients_are_answered_and_hear_events() {
    let w = world();
    let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| Client::ready(&w.path)).collect();
    clients.iter_mut().rev().for_each(Client::asks);
    w.events.emit("STOP", None);
    for client in &mut clients {
        assert!(client.line().contains("STOP"));
    }
}

#[test]
fn clients_that_say_nothing_keep_nobody_out() {
    let w = world();
    let idle: Vec<_> = (0..3 * MAX_CLIENTS).map(|_| Client::new(&w.path)).collect();
    let mut last = Client::ready(&w.path);
    last.asks();
    // Who came first was let go, who came last was not.
    let mut let_go = idle.into_iter().map(|mut client| {
        assert!(client.line().contains("QMP"));
        client.0.get_mut().set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let mut rest = String::new();
        client.0.read_line(&mut rest).is_ok()
    });
    assert!(let_go.next().unwrap());
    assert!(!let_go.next_back().unwrap());
}

#[test]
fn a_client_at_work_holds_up_nobody_and_keeps_its_place() {
    let w = world();
    let mut worker = Client::ready(&w.path);
    worker.send(r#"{"execute":"query-name"}"#);
    let start = Instant::now();
    for _ in 0..2 * MAX_CLIENTS {
        std::mem::forget(Client::new(&w.path));
    }
    Client::ready(&w.path).asks();
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(worker.line().contains("query-name"));
}

#[test]
fn it_ends_with_clients_connected() {
    let w = world();
    let mut silent = Client::ready(&w.path);
    w.events.emit("SHUTDOWN", None);
    let start = Instant::now();
    w.server.close(start + Duration::from_secs(5));
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(silent.line().contains("SHUTDOWN"));
    assert_eq!(silent.line(), "");
    assert!(UnixStream::connect(&w.path).is_err());
    assert!(!w.path.exists());
}
