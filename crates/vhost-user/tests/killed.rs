//! A back end in a process of its own, killed again and again in the middle of traffic.

mod common;

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::{Copier, Driver, SIZE, Shared, TIMEOUT, features, memory, until};
use vhost_user::{Connection, Frontend};

/// Tells the copy of this program that it is the back end, and where to connect.
const CHILD: &str = "TERN_TEST_BACK_END";

/// Serves until it is killed.
fn back_end(path: &Path) -> ! {
    let stream = UnixStream::connect(path).expect("the test listens");
    let shared = std::sync::Arc::new(Shared::default());
    let mut connection = Connection::new(stream, Copier::new(&shared)).expect("a connection");
    while connection.process().is_ok() {
        connection.device_mut().step();
    }
    std::process::exit(0);
}

fn spawn(name: &str, path: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(CHILD, path)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn run(name: &str, packed: bool) {
    if let Some(path) = std::env::var_os(CHILD) {
        back_end(Path::new(&path));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut child = spawn(name, &path);
    let mut front = Frontend::new(listener.accept().unwrap().0, TIMEOUT).unwrap();
    let mem = memory();
    front.negotiate(u64::MAX).unwrap();
    front.set_features(features(packed)).unwrap();
    front.track_inflight(4, SIZE).unwrap();
    front.set_memory(&mem).unwrap();
    let mut driver = Driver::new(&mem, 0, features(packed));
    driver.start(&mut front, None);
    let mut total = 0;
    for round in 0..12_usize {
        // The device is at work on what was just sent when it is killed, at another point each time.
        driver.exchange(100 + round);
        while driver.expected.len() < 20 && driver.send() {
            total += 1;
            driver.kick();
        }
        (0..round * 50).for_each(|_| std::hint::spin_loop());
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        total += 100 + round;
        child = spawn(name, &path);
        front.reconnect(listener.accept().unwrap().0).unwrap();
        // Whatever it was, it comes back, once: the driver knows what is outstanding.
        until("what was in flight", || {
            driver.receive();
            driver.expected.is_empty()
        });
    }
    assert!(total > 1200);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_split_ring_loses_nothing_when_its_back_end_is_killed() {
    run("a_split_ring_loses_nothing_when_its_back_end_is_killed", false);
}

#[test]
fn a_packed_ring_loses_nothing_when_its_back_end_is_killed() {
    run("a_packed_ring_loses_nothing_when_its_back_end_is_killed", true);
}
