//! Who connects to a destination: a crowd that says nothing keeps no migration out, and whoever was
//! greeted by its monitor finds it listening.

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use e2e::vmm::{Config, Vmm};
use serde_json::{Value, json};

const CROWD: usize = 200;

fn threads(vm: &Vmm) -> usize {
    std::fs::read_dir(format!("/proc/{}/task", vm.pid())).unwrap().count()
}

fn through_a_crowd(dir: &Path, config: &Config, turn: usize, uri: &str) {
    let named = |side: &str| Config { name: format!("{side}{turn}"), ..config.clone() };
    let mut source = named("source").start(dir, None).unwrap();
    let incoming = Some("defer".to_owned());
    let mut to = Config { incoming, ..named("destination") }.start(dir, None).unwrap();
    to.qmp.execute("migrate-incoming", json!({"uri": uri})).unwrap();
    let address = to.qmp.execute("query-migrate", Value::Null).unwrap()["socket-address"][0].take();
    let connect = || -> OwnedFd {
        match address["path"].as_str() {
            Some(path) => UnixStream::connect(path).unwrap().into(),
            None => {
                let port = address["port"].as_str().unwrap().parse().unwrap();
                TcpStream::connect(("127.0.0.1", port)).unwrap().into()
            }
        }
    };
    let before = threads(&to);
    let crowd: Vec<_> = (0..CROWD).map(|_| connect()).collect();
    assert!(threads(&to) < before + 10, "a thread for each silent connection");
    let uri = match address["port"].as_str() {
        Some(port) => format!("tcp:127.0.0.1:{port}"),
        None => uri.to_owned(),
    };
    source.qmp.execute("migrate", json!({ "uri": uri })).unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    while to.status().unwrap() != "running" {
        let info = source.qmp.execute("query-migrate", Value::Null).unwrap();
        assert!(info["status"] != "failed" && Instant::now() < until, "{info}");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(threads(&to) < before + 10, "a thread for each silent connection");
    drop(crowd);
}

#[test]
fn a_migration_gets_through_a_crowd_of_silent_connections() {
    if !e2e::tiny::has_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let config = e2e::tiny::config(env!("CARGO_BIN_EXE_tern"), dir.path()).unwrap();
    let unix = format!("unix:{}", dir.path().join("in").display());
    for (turn, uri) in ["tcp:127.0.0.1:0", &unix].into_iter().enumerate() {
        through_a_crowd(dir.path(), &config, turn, uri);
    }
}

/// A script that was greeted by the destination's monitor starts the migration at once.
#[test]
fn a_destination_that_greets_can_be_migrated_to() {
    if !e2e::tiny::has_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let config = e2e::tiny::config(env!("CARGO_BIN_EXE_tern"), dir.path()).unwrap();
    for turn in 0..10 {
        let at = dir.path().join(format!("in{turn}"));
        let incoming = Some(format!("unix:{}", at.display()));
        let config = Config { name: format!("greets{turn}"), incoming, ..config.clone() };
        let mut to = config.start(dir.path(), None).unwrap();
        UnixStream::connect(&at).unwrap();
        assert_eq!(to.status().unwrap(), "inmigrate");
    }
}
