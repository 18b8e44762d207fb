//! Monitors on real sockets: replies, events, several clients, clients that stall, HMP.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use chardev::Chardev;
use qapi::{ClientFds, Commands, Error, EventBus, Monitor};
use serde_json::{Value, json};

/// A machine of which only what monitors need is there.
struct Machine {
    events: EventBus,
    polls: AtomicU32,
    /// Slow commands that have been run.
    slow: AtomicU32,
}

/// How long `query-name` takes here.
const SLOW: Duration = Duration::from_millis(5);

impl Commands for Machine {
    fn execute(&self, name: &str, arguments: Value, fds: &ClientFds) -> Result<Value, Error> {
        match name {
            "stop" => self.events.emit("STOP", None),
            "query-status" => {
                return Ok(json!({"running": true, "singlestep": false, "status": "running"}));
            }
            "set_link" => {
                return Err(Error::device_not_found(arguments["name"].as_str().unwrap()));
            }
            "migrate" => {
                let uri = arguments["uri"].as_str().unwrap();
                if let Some(fd) = uri.strip_prefix("fd:") {
                    let fd = fds.0.lock().remove(fd);
                    return fd.map(|_| json!({})).ok_or_else(|| Error::generic("no such fd"));
                }
            }
            "query-cpus-fast" => return Ok(json!([{"cpu-index": 0}])),
            "query-name" => {
                std::thread::sleep(SLOW);
                self.slow.fetch_add(1, Ordering::SeqCst);
                return Ok(json!({"name": "vm"}));
            }
            "query-migrate" => {
                let n = self.polls.fetch_add(1, Ordering::SeqCst);
                let status = if n < 3 { "active" } else { "completed" };
                return Ok(json!({"status": status, "ram": {"total": 100, "remaining": 60}}));
            }
            _ => {}
        }
        Ok(json!({}))
    }
}

struct World {
    machine: Arc<Machine>,
    events: EventBus,
    _dir: tempfile::TempDir,
    path: std::path::PathBuf,
    monitor: Option<Monitor>,
}

fn world(hmp: bool) -> World {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let config = spec::Chardev {
        id: "m".into(),
        kind: spec::ChardevKind::Socket {
            address: spec::SocketAddress::Unix { path: path.clone() },
            server: true,
            wait: false,
            reconnect: 0,
        },
        mux: false,
        logfile: None,
        log_append: false,
        written: String::new(),
    };
    let chardev: Arc<dyn Chardev> = chardev::open(&config, chardev::Options::monitor()).unwrap();
    let events = EventBus::new();
    let machine = Arc::new(Machine {
        events: events.clone(),
        polls: AtomicU32::new(0),
        slow: AtomicU32::new(0),
    });
    let monitor = if hmp {
        Monitor::hmp(chardev, machine.clone())
    } else {
        Monitor::qmp(chardev, machine.clone(), &events, false)
    };
    World { machine, events, _dir: dir, path, monitor: Some(monitor.unwrap()) }
}

struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    fn new(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Self { reader: BufReader::new(stream) }
    }
    fn ready(path: &Path) -> Self {
        let mut client = Self::new(path);
        assert!(client.line().contains("QMP"));
        client.send(r#"{"execute":"qmp_capabilities"}"#);
        assert_eq!(client.line(), r#"{"return": {}}"#);
        client
    }
    fn send(&mut self, text: &str) {
        self.reader.get_mut().write_all(text.as_bytes()).unwrap();
    }
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        assert!(line.ends_with("\r\n"), "{line:?}");
        line.trim_end().to_string()
    }
    fn until(&mut self, end: &str) -> String {
        let mut text = Vec::new();
        let mut byte = [0];
        while !String::from_utf8_lossy(&text).ends_with(end) {
            self.reader.read_exact(&mut byte).unwrap();
            text.push(byte[0]);
        }
        String::from_utf8(text).unwrap()
    }
}

#[test]
fn an_event_goes_out_before_the_reply_of_the_command_that_caused_it() {
    let w = world(false);
    let mut c = Client::ready(&w.path);
    c.send(r#"{"execute":"stop","id":1}"#);
    let event: Value = serde_json::from_str(&c.line()).unwrap();
    assert_eq!(event["event"], "STOP");
    assert_eq!(c.line(), r#"{"return": {}, "id": 1}"#);
}

#[test]
fn one_client_after_another_gets_a_greeting_and_none_of_the_others_state() {
    let w = world(false);
    for _ in 0..5 {
        let mut c = Client::ready(&w.path);
        c.send(r#"{"execute":"query-status"}{"execute":"#);
        assert!(c.line().contains("running"));
    }
}

#[test]
fn a_client_that_sends_no_more_still_gets_every_answer() {
    for hmp in [false, true] {
        let w = world(hmp);
        for _ in 0..20 {
            let mut stream = UnixStream::connect(&w.path).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let asked: &[u8] = match hmp {
                true => b"info status\n",
                false => br#"{"execute":"qmp_capabilities"}{"execute":"query-status"}"#,
            };
            stream.write_all(asked).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answers = String::new();
            // Until the monitor hangs up.
            stream.read_to_string(&mut answers).unwrap();
            assert!(answers.contains("running"), "{answers:?}");
        }
    }
}

#[test]
fn hmp_through_qmp_and_errors() {
    let w = world(false);
    let mut c = Client::ready(&w.path);
    c.send(r#"{"execute":"human-monitor-command","arguments":{"command-line":"info status"}}"#);
    assert_eq!(c.line(), r#"{"return": "VM status: running\r\n"}"#);
    c.send(r#"{"execute":"human-monitor-command","arguments":{"command-line":"nope"}}"#);
    assert_eq!(c.line(), r#"{"return": "unknown command: 'nope'\r\n"}"#);
    for (index, answer) in [(0, "running"), (1, "expects a CPU number"), (-1, "expects a CPU")] {
        let arguments = json!({ "command-line": "info status", "cpu-index": index });
        c.send(&json!({"execute": "human-monitor-command", "arguments": arguments}).to_string());
        let line = c.line();
        assert!(line.contains(answer), "{line}");
    }
    c.send(r#"{"execute":"set_link","arguments":{"name":"n","up":false}}"#);
    assert!(c.line().contains(r#""class": "DeviceNotFound", "desc": "Device 'n' not found""#));
}

#[test]
fn a_reply_larger_than_the_output_queue_comes_whole() {
    let w = world(false);
    let mut c = Client::ready(&w.path);
    let id = "x".repeat(4 << 20);
    c.send(&format!(r#"{{"execute":"query-status","id":"{id}"}}"#));
    let reply = c.line();
    assert!(reply.ends_with("xx\"}") && reply.len() > id.len(), "{} bytes", reply.len());
    c.send(r#"{"execute":"query-status"}"#);
    assert!(c.line().contains("running"));
}

#[test]
fn what_a_client_asked_for_before_it_left_is_done() {
    let w = world(false);
    let mut c = Client::new(&w.path);
    c.send(
        r#"{"execute":"qmp_capabilities"}{"execute":"query-migrate"}{"execute":"query-migrate"}"#,
    );
    drop(c);
    let deadline = Instant::now() + Duration::from_secs(10);
    while w.machine.polls.load(Ordering::SeqCst) < 2 {
        assert!(Instant::now() < deadline, "its commands were dropped");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_a_client_leaves_behind_is_bounded() {
    for hmp in [false, true] {
        let w = world(hmp);
        let mut c = Client::new(&w.path);
        match hmp {
            true => c.send(&"info name\n".repeat(2_000)),
            false => {
                c.send(r#"{"execute":"qmp_capabilities"}"#);
                c.send(&r#"{"execute":"query-name"}"#.repeat(2_000));
            }
        }
        drop(c);
        let mut next = Client::new(&w.path);
        next.until(if hmp { "(qemu) " } else { "\r\n" });
        let run = w.machine.slow.load(Ordering::SeqCst);
        assert!((1..500).contains(&run), "{run} commands, most of them of a client that had gone");
    }
}

#[test]
fn a_client_that_reads_nothing_harms_nobody() {
    let w = world(false);
    let mut stalled = Client::ready(&w.path);
    let flood = r#"{"execute":"query-qmp-schema"}"#.repeat(50);
    // The socket fills in both directions; the client never reads.
    stalled.reader.get_mut().set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    for _ in 0..200 {
        if stalled.reader.get_mut().write_all(flood.as_bytes()).is_err() {
            break;
        }
    }
    let start = Instant::now();
    for n in 0..100_000 {
        w.events.emit("MIGRATION_PASS", Some(json!({"pass": n})));
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    drop(stalled);
    let mut c = Client::ready(&w.path);
    c.send(r#"{"execute":"query-status"}"#);
    assert!(c.line().contains("running"));
}

#[test]
fn a_client_that_stays_and_reads_nothing_loses_its_place() {
    let w = world(false);
    let mut deaf = Client::ready(&w.path);
    deaf.send(&r#"{"execute":"query-qmp-schema"}"#.repeat(400));
    let mut next = Client::new(&w.path);
    let patience = qapi::monitor::WRITE_PATIENCE * 2;
    next.reader.get_mut().set_read_timeout(Some(patience)).unwrap();
    assert!(next.line().contains("QMP"));
}

/// A client that has asked for more than the socket and the monitor's queue hold, sends no more, and
/// reads nothing.
fn half_closed_and_deaf(path: &Path) -> Client {
    let mut c = Client::ready(path);
    c.send(&r#"{"execute":"query-qmp-schema"}"#.repeat(400));
    c.reader.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
    c
}

#[test]
fn a_client_that_half_closed_and_reads_nothing_does_not_hold_up_the_end() {
    let mut w = world(false);
    let _deaf = half_closed_and_deaf(&w.path);
    std::thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    drop(w.monitor.take());
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[test]
fn a_client_that_half_closed_and_then_left_makes_room_for_the_next() {
    let w = world(false);
    let deaf = half_closed_and_deaf(&w.path);
    std::thread::sleep(Duration::from_millis(200));
    drop(deaf);
    let start = Instant::now();
    let mut next = Client::ready(&w.path);
    next.send(r#"{"execute":"query-status"}"#);
    assert!(next.line().contains("running"));
    assert!(start.elapsed() < qapi::monitor::WRITE_PATIENCE / 2, "{:?}", start.elapsed());
}

#[test]
fn dropping_a_monitor_ends_its_thread() {
    let mut w = world(false);
    let _c = Client::ready(&w.path);
    let start = Instant::now();
    drop(w.monitor.take());
    assert!(start.elapsed() < Duration::from_secs(2));
    w.events.emit("STOP", None);
}

#[test]
fn hmp_edits_completes_and_waits_for_a_migration() {
    let w = world(true);
    let mut c = Client::new(&w.path);
    assert!(c.until("(qemu) ").starts_with("QEMU 8.2.0 monitor"));
    c.send("info sta\t\r");
    let text = c.until("(qemu) ");
    assert!(text.contains("info status ") && text.contains("VM status: running\r\n"), "{text:?}");
    c.send("migrate tcp:x:1\ninfo name\n");
    let text = c.until("Completed 100 %\r\n(qemu) ");
    assert!(text.contains("Completed 40 %\r"), "{text:?}");
    assert!(c.until("(qemu) ").contains("info name"));
    assert!(w.machine.polls.load(Ordering::SeqCst) >= 4);
    c.send("migrate -b tcp:x:1\n");
    assert!(c.until("(qemu) ").contains("Error: disks cannot be copied"));
}
