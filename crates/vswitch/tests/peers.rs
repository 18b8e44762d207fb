//! What peers and clients of a running switch can do to it, and what they cannot.

mod common;
#[path = "common/netns.rs"]
mod netns;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::*;
use mem::{Backing, GuestMemory, RegionSpec};
use serde_json::{Value, json};
use vhost_user::message::{FrontendId, Kind, Message, Payload, encode};
use vhost_user::testing::send_raw;
use vhost_user::{Frontend, protocol};
use virtio::Interrupt;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vswitch::{Config, PortSpec, Server};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A switch with ports a, b and x.
struct Switch {
    dir: tempfile::TempDir,
    metrics: String,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Switch {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Tests run beside each other: each switch has an address of its own.
        static SWITCHES: AtomicU8 = AtomicU8::new(1);
        let nth = SWITCHES.fetch_add(1, Ordering::Relaxed);
        let [.., high, low] = std::process::id().to_be_bytes();
        let metrics = format!("127.{}.{low}.{nth}:9979", high.max(1));
        let mut config = Config { metrics: Some(metrics.clone()), ..Config::default() };
        for name in ["a", "b", "x"] {
            let path = dir.path().join(name);
            let spec = format!("{name},type=vhost-user,path={}", path.display());
            config.port.push(PortSpec::parse(&spec).unwrap());
        }
        let control = dir.path().join("control");
        let stop = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut server = Server::new(&config, &control).unwrap();
        server.stop_on(stop.as_raw_fd()).unwrap();
        let thread = Some(std::thread::spawn(move || server.run()));
        Self { dir, metrics, stop, thread }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn client(&self) -> BufReader<UnixStream> {
        let stream = UnixStream::connect(self.path("control")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        BufReader::new(stream)
    }

    fn ask(&self, command: &str, arguments: Value) -> Value {
        ask(&mut self.client(), command, arguments)
    }

    fn port(&self, name: &str) -> Value {
        self.ask("stats", json!({ "port": name }))["return"]["ports"][0].take()
    }

    /// Waits until the statistics of port `name` are as they should be.
    fn until(&self, name: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let port = self.port(name);
            if is_so(&port) {
                return port;
            }
            assert!(Instant::now() < deadline, "{what}: {port}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until port x has been reset `n` times; why it was the last time.
    fn resets(&self, n: usize) -> String {
        let port = self.until("x", "it is reset", |port| port["resets"] == n);
        port["last-reset"].as_str().unwrap().to_owned()
    }
}

impl std::ops::Drop for Switch {
    fn drop(&mut self) {
        self.stop.write(1).unwrap();
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

fn ask(client: &mut BufReader<UnixStream>, command: &str, arguments: Value) -> Value {
    let request = json!({ "command": command, "arguments": arguments });
    client.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
    answer(client)
}

fn answer(client: &mut BufReader<UnixStream>) -> Value {
    let mut line = String::new();
    client.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}"))
}

/// The driver's interrupt, as an eventfd.
#[derive(Debug)]
struct Call(EventFd);

impl Interrupt for Call {
    fn notify(&self) {}

    fn eventfd(&self) -> Option<EventFd> {
        self.0.try_clone().ok()
    }
}

/// A guest at a port of the switch.
struct Attached {
    guest: Guest,
    front: Frontend,
    tx_call: EventFd,
}

impl Attached {
    fn new(switch: &Switch, port: &str) -> Self {
        let region = RegionSpec { gpa: 0, size: GUEST_BYTES };
        let mem = GuestMemory::new(&[region], &Backing::default()).unwrap();
        let (guest, mut tx, rx) = Guest::with_memory(mem.clone(), PLAIN, 2048);
        let call = EventFd::new(EFD_NONBLOCK).unwrap();
        tx.call = Arc::new(Call(call.try_clone().unwrap()));
        let mut front = Frontend::connect(&switch.path(port), PATIENCE).unwrap();
        front.negotiate(protocol::COMMON).unwrap();
        front.set_features(PLAIN).unwrap();
        front.set_memory(&mem).unwrap();
        for (ring, setup) in [(0, &rx), (1, &tx)] {
            front.start_ring(ring, setup).unwrap();
            front.enable_ring(ring, true).unwrap();
        }
        switch.until(port, "it is up", |port| port["state"] == "up");
        Self { guest, front, tx_call: call }
    }
}

fn request(id: FrontendId, payload: Payload) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(&Message { kind: Kind::Request(id), need_reply: false, payload }, &mut bytes);
    bytes
}

/// Takes O_NONBLOCK off an eventfd and fills it.
fn make_block(fd: &EventFd) {
    // SAFETY: only the flags of an open descriptor are changed.
    #[allow(unsafe_code)]
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    assert_eq!(result, 0);
    let _ = fd.read();
    fd.write(u64::MAX - 1).unwrap();
    // SAFETY: as above.
    #[allow(unsafe_code)]
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, 0) };
    assert_eq!(result, 0);
}

#[test]
fn peers_whose_eventfds_block_hold_the_switch_up_once() {
    let switch = Switch::start();
    let mut a = Attached::new(&switch, "a");
    let mut b = Attached::new(&switch, "b");
    b.guest.send(&frame(0xff, 1, 60, 0));
    for n in 1..=20 {
        let mut x = Attached::new(&switch, "x");
        make_block(&x.tx_call);
        x.guest.send(&frame(1, 2, 60, n));
        // The switch interrupts x after it has sent the frame on, and then takes this one.
        a.guest.send(&frame(1, 0, 100, n));
        while b.guest.receive().1 != frame(1, 0, 100, n) {}
        if n == 1 {
            let why = switch.resets(1);
            assert!(why.contains("call eventfd was made to block"), "{why}");
        }
    }
    assert_eq!(switch.port("x")["resets"], 1, "only the first was waited for");
}

#[test]
fn a_peer_cannot_outlive_itself_by_its_own_end_of_the_socket() {
    let switch = Switch::start();
    let x = UnixStream::connect(switch.path("x")).unwrap();
    let ask_for = protocol::COMMON;
    send_raw(&x, &request(FrontendId::SetProtocolFeatures, Payload::U64(ask_for)), &[]).unwrap();
    send_raw(&x, &request(FrontendId::SetBackendReqFd, Payload::Empty), &[x.as_fd()]).unwrap();
    drop(x);
    switch.resets(1);

    let x = UnixStream::connect(switch.path("x")).unwrap();
    let half = &request(FrontendId::SetFeatures, Payload::U64(0))[..5];
    send_raw(&x, half, &[x.as_fd()]).unwrap();
    drop(x);
    let why = switch.resets(2);
    assert!(why.contains("began a message"), "{why}");
    let mut x = Attached::new(&switch, "x");
    x.front.get_status().unwrap();
}

#[test]
fn memory_that_has_gone_is_the_reason_whatever_the_rings_say() {
    let switch = Switch::start();
    let mut a = Attached::new(&switch, "a");
    for n in 1..=10 {
        let mut x = Attached::new(&switch, "x");
        a.guest.send(&frame(0xff, 0, 60, n));
        x.guest.receive();
        x.guest.mem.regions()[0].file.as_ref().unwrap().0.set_len(0).unwrap();
        // Gone for this process as well, which does not look at it any more.
        a.guest.send(&frame(0xff, 0, 60, n));
        let why = switch.resets(n);
        assert!(why.contains("memory that it lent has gone"), "{n}: {why}");
    }
}

#[test]
fn silent_clients_make_room_and_scrapers_take_no_controllers_place() {
    let switch = Switch::start();
    let mut first = switch.client();
    ask(&mut first, "stats", json!({}));
    let idle: Vec<_> = (0..100).map(|_| TcpStream::connect(&switch.metrics).unwrap()).collect();
    let mut scrape = TcpStream::connect(&switch.metrics).unwrap();
    scrape.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut text = String::new();
    scrape.read_to_string(&mut text).unwrap();
    assert!(text.contains("tern_switch_macs"), "{text}");
    assert!(ask(&mut first, "stats", json!({}))["return"].is_object());
    drop(idle);

    let mut silent: Vec<_> = (0..62).map(|_| switch.client()).collect();
    // The last that there is room for is answered when those before it are in: they have been
    // silent for longer than who talks from now on.
    assert!(switch.ask("show", json!({}))["return"].is_object());
    for _ in 0..10 {
        // A talker among them stays, and newcomers get in.
        assert!(ask(&mut first, "stats", json!({}))["return"].is_object());
        silent.push(switch.client());
        assert!(switch.ask("show", json!({}))["return"].is_object());
    }
}

/// Who drips a request for metrics has no more time than who says nothing.
#[test]
fn a_slow_scraper_is_hung_up_on() {
    let switch = Switch::start();
    let mut slow = TcpStream::connect(&switch.metrics).unwrap();
    let start = Instant::now();
    while slow.write_all(b"G").is_ok() {
        assert!(start.elapsed() < PATIENCE, "it was listened to all the time");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_port_that_cannot_connect_says_why() {
    let switch = Switch::start();
    std::fs::write(switch.path("file"), "").unwrap();
    // More of them than try at a time.
    for n in 0..300 {
        let path = switch.path(&if n == 0 { "file".into() } else { format!("later{n}") });
        let port = format!("c{n},type=vhost-user,mode=client,path={}", path.display());
        assert_eq!(switch.ask("add-port", json!({ "port": port }))["error"], Value::Null);
    }
    let shown = || switch.ask("show", json!({}))["return"]["ports"].take();
    let until = |what: &str, is_so: &dyn Fn(&Value) -> bool| {
        let deadline = Instant::now() + PATIENCE;
        while !shown().as_array().unwrap()[3..].iter().all(is_so) {
            assert!(Instant::now() < deadline, "{what}: {}", shown());
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    until("why not", &|port| {
        let why = port["refused"].as_str().unwrap_or_default();
        why.contains(if port["name"] == "c0" { "refused" } else { "No such file" })
    });
    let bind = |n| std::os::unix::net::UnixListener::bind(switch.path(&format!("later{n}")));
    let _listeners: Vec<_> = (1..300).map(|n| bind(n).unwrap()).collect();
    let is_connected = |port: &Value| port["name"] == "c0" || port["state"] == "connected";
    until("connected", &is_connected);
}

#[test]
fn one_that_asks_for_much_keeps_no_other_waiting() {
    let switch = Switch::start();
    let mut much = switch.client();
    let mut other = switch.client();
    let many = 4000;
    let mut writer = much.get_mut().try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        writer.write_all("{\"command\":\"metrics\"}\n".repeat(many).as_bytes()).unwrap();
    });
    // Its answers do not fit the socket, and are not made before it takes some.
    for _ in 0..50 {
        assert!(ask(&mut other, "stats", json!({}))["return"].is_object());
    }
    for _ in 0..many {
        assert!(answer(&mut much)["return"].is_string());
    }
    writing.join().unwrap();
}

/// CPU time that process `pid` has used, in clock ticks (100 a second).
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // Fields 14 and 15; the second is a name in parentheses.
    let fields = stat.rsplit(") ").next().unwrap().split(' ');
    fields.skip(11).take(2).map(|n| n.parse::<u64>().unwrap()).sum()
}

#[test]
fn out_of_descriptors_it_waits_and_goes_on_later() {
    const INSIDE: &str = "TERN_TEST_FEW_DESCRIPTORS";
    if std::env::var_os(INSIDE).is_some() {
        let _switch = Switch::start();
        // Until the test outside has an end.
        std::io::stdin().read_to_string(&mut String::new()).unwrap();
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let exe = std::env::current_exe().unwrap();
    let line = "ulimit -n 40; exec \"$0\" --exact out_of_descriptors_it_waits_and_goes_on_later";
    let mut child = std::process::Command::new("sh")
        .args(["-c", line])
        .arg(exe)
        .env(INSIDE, "1")
        .env("TMPDIR", dir.path())
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    let connect = || {
        let inside = std::fs::read_dir(dir.path()).unwrap().next()?.unwrap().path();
        UnixStream::connect(inside.join("control")).ok()
    };
    while connect().is_none() {
        assert!(Instant::now() < deadline, "it does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    // More than it can take, and fewer than it would hang up on.
    let clients: Vec<_> = (0..60).map(|_| connect().unwrap()).collect();
    let before = ticks(child.id());
    std::thread::sleep(Duration::from_secs(1));
    let used = ticks(child.id()) - before;
    assert!(used < 50, "{used} ticks in a second of waiting");
    drop(clients);
    let client = connect().unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(ask(&mut BufReader::new(client), "show", json!({}))["return"].is_object());
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_capture_has_a_regular_file_to_itself() {
    let switch = Switch::start();
    let capture = |port: &str, file: PathBuf| {
        let answer = switch.ask("capture", json!({ "port": port, "file": file }));
        answer["error"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!(capture("a", switch.path("f.pcap")), "");
    for (port, again) in [("a", "f.pcap"), ("b", "f.pcap"), ("b", "../f.pcap")] {
        let again = match again.strip_prefix("../") {
            Some(name) => {
                let inside = switch.dir.path().file_name().unwrap();
                switch.path("..").join(inside).join(name)
            }
            None => switch.path(again),
        };
        let why = capture(port, again);
        assert!(why.contains("is being written already, by a capture of port 'a'"), "{why:?}");
    }
    std::os::unix::fs::symlink(switch.path("f.pcap"), switch.path("link")).unwrap();
    std::fs::hard_link(switch.path("f.pcap"), switch.path("hard")).unwrap();
    for other in ["link", "hard"] {
        assert!(capture("b", switch.path(other)).contains("written already"));
    }
    netns::sh(&format!("mkfifo {}", switch.path("pipe").display()));
    for no_file in [switch.path("pipe"), "/dev/full".into(), "/dev/ptmx".into()] {
        assert!(capture("b", no_file).contains("no regular file"));
    }
    let ended = switch.ask("end-capture", json!({ "name": "a" }));
    assert_eq!(ended["return"], json!({ "frames": 0, "left-out": 0, "failed": null }));
    assert_eq!(capture("b", switch.path("f.pcap")), "");
}
