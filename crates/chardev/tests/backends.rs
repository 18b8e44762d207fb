//! Each back end against real sockets, pseudo-terminals and files.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use chardev::{Chardev, Options};
use common::{Recorder, eventually};
use spec::{ChardevKind, SocketAddress};

fn config(kind: ChardevKind) -> spec::Chardev {
    spec::Chardev {
        id: "c0".into(),
        kind,
        mux: false,
        logfile: None,
        log_append: false,
        written: String::new(),
    }
}

fn unix(path: &Path, server: bool, reconnect: u32) -> spec::Chardev {
    let address = SocketAddress::Unix { path: path.into() };
    config(ChardevKind::Socket { address, server, wait: false, reconnect })
}

fn open(config: &spec::Chardev) -> Arc<dyn Chardev> {
    chardev::open(config, Options::serial()).unwrap()
}

fn refusal(config: &spec::Chardev) -> String {
    chardev::open(config, Options::serial()).err().expect("it was opened").to_string()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

#[test]
fn null_takes_everything() {
    let null = open(&config(ChardevKind::Null));
    let front = Recorder::new(100);
    null.connect(front.clone());
    eventually("opened", || front.opened() == 1);
    for _ in 0..1000 {
        assert_eq!(null.write(&[0; 4096]), 4096);
        null.drain(soon());
    }
    assert_eq!((null.label(), null.filename().as_str()), ("c0", "null"));
    assert!(null.frontend_open());
}

#[test]
fn file_keeps_what_was_written_and_the_log_a_copy() {
    let dir = tempfile::tempdir().unwrap();
    let (path, log) = (dir.path().join("out"), dir.path().join("log"));
    std::fs::write(&path, "old ").unwrap();
    let mut config = config(ChardevKind::File { path: path.clone(), append: true });
    config.logfile = Some(log.clone());
    config.log_append = true;
    std::fs::write(&log, "before ").unwrap();
    let file = open(&config);
    assert_eq!(file.write(b"new"), 3);
    file.drain(soon());
    assert_eq!(std::fs::read(&path).unwrap(), b"old new");
    assert_eq!(std::fs::read(&log).unwrap(), b"before new");
    file.write(b" end");
    drop(file); // Dropping writes out what is queued.
    assert_eq!(std::fs::read(&path).unwrap(), b"old new end");
    config.kind = ChardevKind::File { path: path.clone(), append: false };
    drop(open(&config));
    assert_eq!(std::fs::read(&path).unwrap(), b"");
    config.kind = ChardevKind::File { path: dir.path().join("no/such"), append: false };
    let error = refusal(&config);
    assert!(error.contains("c0") && error.contains("no/such"), "{error}");
}

#[test]
fn a_file_stays_open_whatever_overflows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let kind = ChardevKind::File { path: path.clone(), append: false };
    let options = Options { queue_limit: 10, ..Options::monitor() };
    let file = chardev::open(&config(kind), options).unwrap();
    assert_eq!(file.write(&[b'x'; 11]), 10);
    file.disconnect();
    eventually("it takes more", || file.write(b"fits") == 4);
    drop(file);
    assert_eq!(std::fs::read(&path).unwrap(), b"xxxxxxxxxxfits");
}

#[test]
fn a_server_takes_one_client_after_another() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let server = open(&unix(&path, true, 0));
    let front = Recorder::new(1000);
    server.connect(front.clone());
    let name = format!("unix:{},server=on", path.display());
    assert_eq!(server.filename(), format!("disconnected:{name}"));
    assert_eq!(server.write(b"nobody hears"), 0);
    for round in 1..=3 {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"hello").unwrap();
        front.expect(b"hello");
        assert_eq!(server.filename(), name);
        assert_eq!(server.write(b"answer"), 6);
        let mut answer = [0; 6];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
        drop(client);
        eventually("closed", || front.closed() == round);
        assert_eq!(front.opened(), round);
    }
    // The last bytes of a client that is gone already still arrive.
    UnixStream::connect(&path).unwrap().write_all(b"last words").unwrap();
    front.expect(b"last words");
    drop(server);
    assert!(!path.exists());
}

#[test]
fn disconnect_ends_the_client_and_the_server_listens_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let server = open(&unix(&path, true, 0));
    let front = Recorder::new(1000);
    server.connect(front.clone());
    let mut client = UnixStream::connect(&path).unwrap();
    eventually("opened", || front.opened() == 1);
    server.write(b"bye");
    server.disconnect();
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"bye");
    let _again = UnixStream::connect(&path).unwrap();
    eventually("opened again", || front.opened() == 2);
}

#[test]
fn what_a_client_does_not_read_is_bounded_and_it_can_be_sent_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let server = chardev::open(&unix(&path, true, 0), Options::monitor()).unwrap();
    let front = Recorder::new(1000);
    server.connect(front.clone());
    let mut client = UnixStream::connect(&path).unwrap();
    eventually("opened", || front.opened() == 1);
    let started = Instant::now();
    let mut taken = 0;
    loop {
        match server.write(&[b'x'; 10_000]) {
            0 => break,
            n => taken += n,
        }
        assert!(taken < 16 << 20, "the queue has no bound");
    }
    assert!(started.elapsed() < Duration::from_secs(5));
    server.disconnect();
    eventually("closed", || front.closed() == 1);
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    assert!(got.len() <= taken);
    let _next = UnixStream::connect(&path).unwrap();
    eventually("the next client", || front.opened() == 2);
    assert!(server.write(b"fine") == 4);
}

#[test]
fn what_overflows_is_not_taken_and_the_client_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let options = Options { queue_limit: 64 << 10, ..Options::serial() };
    let server = chardev::open(&unix(&path, true, 0), options).unwrap();
    let front = Recorder::new(1000);
    server.connect(front.clone());
    let mut client = UnixStream::connect(&path).unwrap();
    eventually("opened", || front.opened() == 1);
    let mut taken = 0;
    for _ in 0..1000 {
        taken += server.write(&[b'x'; 10_000]);
    }
    assert!(taken < 10_000_000);
    let mut got = vec![0; taken];
    client.read_exact(&mut got).unwrap();
    // The queue has room again only when the chardev's thread has come back from its write.
    eventually("room", || server.write(b"still here") == 10);
    let mut end = [0; 10];
    client.read_exact(&mut end).unwrap();
    assert_eq!((&end, front.closed()), (b"still here", 0));
}

#[test]
fn a_front_end_that_takes_nothing_holds_the_client_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let server = open(&unix(&path, true, 0));
    let front = Recorder::new(3);
    server.connect(front.clone());
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"abcdef").unwrap();
    eventually("three bytes", || front.seen() == 3);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(front.seen(), 3);
    drop(client); // The rest is read although the client is gone.
    front.expect(b"abc");
    server.resume_input();
    front.expect(b"def");
    eventually("closed", || front.closed() == 1);
}

#[test]
fn a_dead_client_whose_bytes_nobody_takes_makes_way() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let server = open(&unix(&path, true, 0));
    let front = Recorder::new(0);
    server.connect(front.clone());
    UnixStream::connect(&path).unwrap().write_all(b"abc").unwrap();
    let _next = UnixStream::connect(&path).unwrap();
    eventually("the next client", || front.opened() == 2);
    assert_eq!(front.seen(), 0);
}

#[test]
fn fds_come_along_and_their_number_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let server = open(&unix(&path, true, 0));
    let front = Recorder::new(1000);
    server.connect(front.clone());
    let client = UnixStream::connect(&path).unwrap();
    let (mut end, passed) = UnixStream::pair().unwrap();
    common::send_fds(&client, b"take it", &[passed.as_raw_fd()]);
    drop(passed);
    eventually("the fd", || front.seen() == 7);
    let fds = front.take_fds();
    assert_eq!(fds.len(), 1);
    let mut theirs = UnixStream::from(fds.into_iter().next().unwrap());
    theirs.write_all(b"x").unwrap();
    end.read_exact(&mut [0]).unwrap();
    let many = vec![end.as_raw_fd(); 40];
    common::send_fds(&client, b"many", &many);
    eventually("the bytes", || front.seen() == 11);
    assert!(front.take_fds().len() <= chardev::MAX_FDS);
    assert_eq!(front.closed(), 0);
}

#[test]
fn stale_socket_files_are_replaced_and_live_ones_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let server = open(&unix(&path, true, 0));
    let error = refusal(&unix(&path, true, 0));
    assert!(error.contains("c0") && error.contains("another process listens"), "{error}");
    drop(server);
    std::fs::write(&path, "precious").unwrap();
    let error = refusal(&unix(&path, true, 0));
    assert!(error.contains("not a socket"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    let error = refusal(&unix(&dir.path().join("x".repeat(120)), true, 0));
    assert!(error.contains("c0"), "{error}");
}

#[test]
fn tcp_serves_and_is_dialled() {
    let address = SocketAddress::Inet { host: "127.0.0.1".into(), port: 0 };
    let server =
        open(&config(ChardevKind::Socket { address, server: true, wait: true, reconnect: 0 }));
    let name = server.filename();
    let port: u16 = name
        .strip_prefix("disconnected:tcp:127.0.0.1:")
        .and_then(|rest| rest.strip_suffix(",server=on"))
        .unwrap_or_else(|| panic!("{name}"))
        .parse()
        .unwrap();
    let front = Recorder::new(1000);
    server.connect(front.clone());
    let dial = move || {
        std::thread::sleep(Duration::from_millis(50));
        TcpStream::connect(("127.0.0.1", port)).unwrap()
    };
    let dialler = std::thread::spawn(dial);
    server.wait_connected();
    assert!(
        server.filename().starts_with(&format!("tcp:127.0.0.1:{port},server=on <-> 127.0.0.1:"))
    );
    drop(dialler.join().unwrap());
    eventually("closed", || front.closed() == 1);
    let address = SocketAddress::Inet { host: "127.0.0.1".into(), port };
    let client = config(ChardevKind::Socket { address, server: false, wait: false, reconnect: 0 });
    let client = open(&client);
    let other = Recorder::new(1000);
    client.connect(other.clone());
    client.write(b"ping");
    front.expect(b"ping");
    server.write(b"pong");
    other.expect(b"pong");
    let used = SocketAddress::Inet { host: "127.0.0.1".into(), port };
    let error = refusal(&config(ChardevKind::Socket {
        address: used,
        server: true,
        wait: false,
        reconnect: 0,
    }));
    assert!(error.contains(&format!("tcp:127.0.0.1:{port}")), "{error}");
}

#[test]
fn a_client_connects_again_when_its_server_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let error = refusal(&unix(&path, false, 0));
    assert!(error.contains("cannot connect to unix:"), "{error}");
    let client = open(&unix(&path, false, 1));
    let front = Recorder::new(1000);
    client.connect(front.clone());
    for round in 1..=2 {
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        peer.write_all(b"hi").unwrap();
        front.expect(b"hi");
        drop((peer, listener));
        eventually("closed", || front.closed() == round);
    }
}

#[test]
fn inherited_fds_are_checked_and_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let queued = UnixStream::connect(&path).unwrap(); // Before anybody accepts.
    let by_fd = |fd, server| {
        let address = SocketAddress::Fd { fd };
        config(ChardevKind::Socket { address, server, wait: false, reconnect: 0 })
    };
    let server = open(&by_fd(common::leak(listener), true));
    let front = Recorder::new(1000);
    server.connect(front.clone());
    (&queued).write_all(b"early").unwrap();
    front.expect(b"early");
    assert_eq!(server.filename(), format!("unix:{},server=on", path.display()));
    drop(queued);
    let _next = UnixStream::connect(&path).unwrap();
    eventually("the next client", || front.opened() == 2);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let client = open(&by_fd(common::leak(theirs), false));
    client.write(b"x");
    ours.read_exact(&mut [0]).unwrap();
    let (_, wrong) = UnixStream::pair().unwrap();
    let error = refusal(&by_fd(common::leak(wrong), true));
    assert!(error.contains("listening"), "{error}");
    assert!(refusal(&by_fd(9999, true)).contains("9999"));
}

#[test]
fn a_ptys_clients_come_and_go() {
    let pty = open(&config(ChardevKind::Pty));
    let name = pty.filename();
    let path = name.strip_prefix("pty:").unwrap().to_owned();
    let front = Recorder::new(1000);
    pty.connect(front.clone());
    assert_eq!(pty.write(b"nobody"), 0);
    for round in 1..=3 {
        let mut client = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        eventually("opened", || front.opened() == round);
        client.write_all(b"\x03key\r").unwrap();
        front.expect(b"\x03key\r");
        assert_eq!(pty.write(b"out\n"), 4);
        let mut out = [0; 4];
        client.read_exact(&mut out).unwrap();
        assert_eq!(&out, b"out\n");
        drop(client);
        eventually("closed", || front.closed() == round);
        assert_eq!(pty.filename(), name);
    }
    for _ in 0..20 {
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().write_all(b"x").unwrap();
        front.expect(b"x");
    }
}

#[test]
fn a_pty_whose_client_does_not_read_blocks_nobody() {
    let pty = open(&config(ChardevKind::Pty));
    let path = pty.filename().strip_prefix("pty:").unwrap().to_owned();
    let front = Recorder::new(1000);
    pty.connect(front.clone());
    let _client = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    eventually("opened", || front.opened() == 1);
    let started = Instant::now();
    for _ in 0..1000 {
        pty.write(&[b'x'; 4096]);
    }
    pty.drain(Instant::now() + Duration::from_millis(50));
    drop(pty);
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_mux_gives_the_keys_to_one_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let config = spec::Chardev { mux: true, ..unix(&path, true, 0) };
    let quits = Arc::new(AtomicUsize::new(0));
    let counter = quits.clone();
    let options = Options::serial().with_quit(Arc::new(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    }));
    let mux = chardev::open(&config, options).unwrap();
    let (serial, monitor) = (Recorder::new(1000), Recorder::new(1000));
    mux.connect(serial.clone());
    let mut client = UnixStream::connect(&path).unwrap();
    eventually("serial open", || serial.opened() == 1);
    mux.connect(monitor.clone());
    eventually("monitor open", || monitor.opened() == 1);
    assert_eq!((serial.focused(), monitor.focused()), (true, false));
    client.write_all(b"to serial\x01\x01\x01b").unwrap();
    serial.expect(b"to serial\x01");
    client.write_all(b"before\x01cafter").unwrap();
    serial.expect(b"before");
    monitor.expect(b"after");
    assert_eq!((serial.focused(), monitor.focused()), (false, true));
    client.write_all(b"\x01").unwrap();
    client.write_all(b"cback").unwrap();
    serial.expect(b"back");
    mux.write(b"output");
    client.write_all(b"\x01h").unwrap();
    let mut text = [0; 40];
    client.read_exact(&mut text).unwrap();
    assert!(text.starts_with(b"output\r\nC-a h"), "{}", text.escape_ascii());
    client.write_all(b"\x01x").unwrap();
    eventually("quit", || quits.load(Ordering::Relaxed) == 1);
    drop(client);
    eventually("both closed", || serial.closed() == 1 && monitor.closed() == 1);
    let _next = UnixStream::connect(&path).unwrap();
    eventually("both open", || serial.opened() == 2 && monitor.opened() == 2);
}

#[test]
fn a_muxs_escape_works_while_the_guest_takes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let config = spec::Chardev { mux: true, ..unix(&path, true, 0) };
    let mux = open(&config);
    let (serial, monitor) = (Recorder::new(0), Recorder::new(1000));
    mux.connect(serial.clone());
    mux.connect(monitor.clone());
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"stuck\x01cfree").unwrap();
    monitor.expect(b"free");
    serial.allow(1000);
    client.write_all(b"\x01c!").unwrap();
    serial.expect(b"stuck!");
}

#[test]
fn dropping_lets_go_of_everything() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    for _ in 0..50 {
        let server = open(&unix(&path, true, 0));
        let front = Recorder::new(10);
        server.connect(front.clone());
        let _client = UnixStream::connect(&path).unwrap();
        eventually("opened", || front.opened() == 1);
        drop(server);
        eventually("closed", || front.closed() == 1);
        assert_eq!(Arc::strong_count(&front), 1);
        assert!(!path.exists());
    }
}

#[test]
fn close_lets_go_of_a_front_end_that_holds_its_chardev() {
    let dir = tempfile::tempdir().unwrap();
    let server = open(&unix(&dir.path().join("s"), true, 0));
    let front = Recorder::new(10);
    front.hold(server.clone());
    server.connect(front.clone());
    server.close();
    assert_eq!(Arc::strong_count(&front), 1);
    assert_eq!(server.write(b"x"), 0);
    server.wait_connected();
    server.drain(soon());
    assert!(!server.frontend_open());
}

#[test]
fn a_path_that_no_socket_can_have_is_told_with_its_length() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x".repeat(200));
    for server in [true, false] {
        let config = spec::Chardev { written: "-qmp unix:...".into(), ..unix(&path, server, 0) };
        let told = refusal(&config);
        assert!(told.starts_with("-qmp unix:...: the path '/") && told.contains("107"), "{told}");
    }
}
