//! `quit`: whoever is connected reads the reply and the event before the end, each time.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

/// How often each way of quitting is tried: a lost line was a matter of microseconds.
const TIMES: usize = 20;

struct Vmm(Child);

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A VMM without a machine, with two QMP monitors and an HMP one.
fn start(dir: &Path) -> Vmm {
    let at = |name: &str| format!("unix:{},server=on,wait=off", dir.join(name).display());
    let child = Command::new(env!("CARGO_BIN_EXE_tern"))
        .args(["qemu", "-machine", "none", "-nodefaults", "-display", "none"])
        .args(["-qmp", &at("a"), "-qmp", &at("b"), "-monitor", &at("hmp")])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    Vmm(child)
}

fn connect(path: &Path) -> UnixStream {
    for _ in 0..1000 {
        if let Ok(stream) = UnixStream::connect(path) {
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            return stream;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("nobody listens on {}", path.display());
}

/// A QMP client past its negotiation, so that it gets events.
fn client(path: &Path) -> UnixStream {
    let mut stream = connect(path);
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\r\n").unwrap();
    let mut seen = Vec::new();
    while seen.iter().filter(|b| **b == b'\n').count() < 2 {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        seen.push(byte[0]);
    }
    stream
}

/// Everything until the VMM closes the connection.
fn rest(mut stream: UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn assert_shutdown(line: &str) {
    let event: Value = serde_json::from_str(line).unwrap();
    assert_eq!(event["event"], "SHUTDOWN", "{line}");
    assert_eq!(event["data"]["guest"], false, "{line}");
    assert_eq!(event["data"]["reason"], "host-qmp-quit", "{line}");
}

/// `quit` is said by `say` on the connection that it is given; what `a` and `b` read from then on.
fn quit(say: impl Fn(&Path, &mut UnixStream)) -> Vec<(String, String)> {
    (0..TIMES)
        .map(|_| {
            let dir = tempfile::tempdir().unwrap();
            let mut vmm = start(dir.path());
            let mut a = client(&dir.path().join("a"));
            let b = client(&dir.path().join("b"));
            say(dir.path(), &mut a);
            let seen = (rest(a), rest(b));
            assert!(vmm.0.wait().unwrap().success());
            seen
        })
        .collect()
}

#[test]
fn the_reply_then_the_event_reach_every_client() {
    for (a, b) in quit(|_, a| a.write_all(b"{\"execute\":\"quit\"}\r\n").unwrap()) {
        let (reply, event) = a.split_once("\r\n").unwrap_or((&a, ""));
        assert_eq!(reply, r#"{"return": {}}"#, "{a:?}");
        assert!(event.ends_with("\r\n") && b.ends_with("\r\n"), "{a:?} {b:?}");
        assert_shutdown(event);
        assert_shutdown(&b);
    }
}

#[test]
fn quit_by_hmp_is_answered_as_well() {
    let line = b"{\"execute\":\"human-monitor-command\",\
        \"arguments\":{\"command-line\":\"quit\"},\"id\":7}\r\n";
    for (a, b) in quit(|_, a| a.write_all(line).unwrap()) {
        let (reply, event) = a.split_once("\r\n").unwrap_or((&a, ""));
        let reply: Value = serde_json::from_str(reply).unwrap_or_else(|e| panic!("{e}: {a:?}"));
        assert_eq!((&reply["return"], &reply["id"]), (&"".into(), &7.into()));
        assert_shutdown(event);
        assert_shutdown(&b);
    }
    for (a, b) in quit(|dir, _| {
        let mut hmp = connect(&dir.join("hmp"));
        hmp.write_all(b"quit\n").unwrap();
        assert!(rest(hmp).contains("(qemu) quit"), "the terminal's echo is lost");
    }) {
        assert_shutdown(&a);
        assert_shutdown(&b);
    }
}
