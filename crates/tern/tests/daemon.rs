//! `-daemonize`: the VM in the background finds and says all that one in the foreground does, also
//! when its options have relative names.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use e2e::qmp::Client;
use e2e::vmm::Config;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);

/// A VM in the background; dropping it kills it.
struct Daemon {
    dir: tempfile::TempDir,
    pid: String,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-9", &self.pid]).status();
    }
}

impl Daemon {
    /// `None`, with the reason printed, where there is no KVM. The command returns when the VM runs.
    fn start(more: &[&str]) -> Option<Self> {
        if !e2e::tiny::has_kvm() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        e2e::tiny::config("tern", dir.path()).unwrap();
        let status = Command::new(env!("CARGO_BIN_EXE_tern"))
            .args(["qemu", "-nodefaults", "-display", "none", "-m", "16", "-daemonize"])
            .args(["-pidfile", "pid", "-D", "log", "-qmp", "unix:qmp,server=on,wait=off"])
            .args(["-kernel", "kernel", "-initrd", "initrd"])
            .args(["-device", "loader,file=disk,addr=0x200000,force-raw=on"])
            .args(more)
            .current_dir(dir.path())
            .status()
            .unwrap();
        assert!(status.success(), "{status}");
        let pid = fs::read_to_string(dir.path().join("pid")).unwrap().trim().to_owned();
        Some(Self { dir, pid })
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn qmp(&self) -> Client {
        Client::connect(&self.path("qmp"), PATIENCE).unwrap()
    }

    /// Waits until its process has ended.
    fn wait(&self) {
        let until = Instant::now() + PATIENCE;
        // A zombie is nobody's child here where no init reaps it.
        let stat = || fs::read_to_string(Path::new("/proc").join(&self.pid).join("stat"));
        while stat().is_ok_and(|s| !s.contains(") Z ")) {
            assert!(Instant::now() < until, "it did not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn a_reset_boots_the_files_that_the_machine_was_started_with() {
    let Some(vm) = Daemon::start(&[]) else { return };
    let mut qmp = vm.qmp();
    for turn in 0..3 {
        qmp.forget_events();
        qmp.execute("system_reset", Value::Null).unwrap();
        qmp.wait_event("RESET", PATIENCE).unwrap();
        // The state after a reset that failed would be `internal-error`.
        let status = qmp.execute("query-status", Value::Null).unwrap();
        assert_eq!(status["status"], "running", "reset {turn}");
        for name in ["kernel", "initrd", "disk"] {
            match turn {
                0 => fs::remove_file(vm.path(name)).unwrap(),
                _ => fs::write(vm.path(name), "another").unwrap(),
            }
        }
    }
    qmp.execute("quit", Value::Null).unwrap();
    vm.wait();
    for name in ["pid", "qmp"] {
        assert!(!vm.path(name).exists(), "{name} is left");
    }
}

#[test]
fn why_a_guest_was_not_taken_in_is_in_the_log() {
    let Some(vm) = Daemon::start(&["-incoming", "unix:in"]) else { return };
    let config = e2e::tiny::config(env!("CARGO_BIN_EXE_tern"), vm.dir.path()).unwrap();
    let mut source =
        Config { disk: None, memory_mib: 32, ..config }.start(vm.dir.path(), None).unwrap();
    let uri = format!("unix:{}", vm.path("in").display());
    source.qmp.execute("migrate", json!({ "uri": uri })).unwrap();
    vm.wait();
    let log = fs::read_to_string(vm.path("log")).unwrap();
    let why = "memory: the source has 32 MiB (32768 KiB at 0x0), the destination 16 MiB";
    assert!(log.contains("tern: incoming migration: ") && log.contains(why), "{log}");
    assert!(!vm.path("in").exists());
    assert_eq!(source.status().unwrap(), "running");
}

#[test]
fn a_destination_to_which_nobody_came_leaves_no_socket() {
    let Some(vm) = Daemon::start(&["-incoming", "unix:in"]) else { return };
    assert!(vm.path("in").exists());
    vm.qmp().execute("quit", Value::Null).unwrap();
    vm.wait();
    assert!(!vm.path("in").exists());
}
