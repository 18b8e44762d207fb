//! The stdio back end in a process of its own, on a real terminal and on pipes.
#![allow(unsafe_code)]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chardev::{Chardev, Frontend, Options};
use common::eventually;

const ROLE: &str = "CHARDEV_TEST_ROLE";

/// Not a test: what the tests below start in another process. It answers bytes in brackets; `q`
/// ends it by exit, `p` by a panic.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let signal = role == "signal";
    let config = spec::Chardev {
        id: "stdio0".into(),
        kind: spec::ChardevKind::Stdio { signal },
        mux: false,
        logfile: None,
        log_append: false,
        written: String::new(),
    };
    let stdio = chardev::open(&config, Options::serial()).unwrap();
    let again = chardev::open(&config, Options::serial()).err().unwrap().to_string();
    assert!(again.contains("in use by another chardev"), "{again}");
    let (send, receive) = std::sync::mpsc::channel();
    stdio.connect(Arc::new(Echo { stdio: stdio.clone(), keys: send.into() }));
    stdio.write(b"<ready>");
    if role == "flood" {
        (0..1000).for_each(|_| {
            stdio.write(&[b'x'; 4096]);
        });
        stdio.write(b"<end>");
        stdio.drain(Instant::now() + Duration::from_millis(100));
        stdio.close();
        std::process::exit(0);
    }
    for key in receive {
        match key {
            b'q' => {
                stdio.drain(Instant::now() + Duration::from_secs(1));
                std::process::exit(0)
            }
            b'p' => panic!("as asked"),
            _ => {}
        }
    }
}

struct Echo {
    stdio: Arc<dyn Chardev>,
    keys: std::sync::Mutex<std::sync::mpsc::Sender<u8>>,
}

impl Frontend for Echo {
    fn can_receive(&self) -> usize {
        100
    }
    fn receive(&self, data: &[u8], _: Vec<OwnedFd>) {
        self.stdio.write(&[b"[", data, b"]"].concat());
        data.iter().for_each(|key| self.keys.lock().unwrap().send(*key).unwrap());
    }
    fn opened(&self) {}
    fn closed(&self) {}
}

/// A new terminal: our end and the other.
fn terminal() -> (File, File) {
    let (mut master, mut slave) = (-1, -1);
    let null = std::ptr::null_mut();
    // SAFETY: the two fds are out parameters, the others may be null; both are ours afterwards.
    unsafe {
        let made = libc::openpty(&raw mut master, &raw mut slave, null, null.cast(), null.cast());
        assert_eq!(made, 0);
        (File::from_raw_fd(master), File::from_raw_fd(slave))
    }
}

fn local_flags(terminal: &File) -> libc::tcflag_t {
    // SAFETY: a live termios.
    unsafe {
        let mut mode: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), &raw mut mode), 0);
        mode.c_lflag
    }
}

fn start(role: &str, input: impl Into<Stdio>, output: impl Into<Stdio>) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .stdin(input)
        .stdout(output)
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn read_until(from: &mut File, end: &str) {
    let mut text = Vec::new();
    while !text.ends_with(end.as_bytes()) {
        let mut byte = [0];
        from.read_exact(&mut byte).unwrap();
        text.push(byte[0]);
    }
}

#[test]
fn the_terminal_is_raw_and_given_back_however_it_ends() {
    for (key, signal) in [("q", 0), ("p", 0), ("", libc::SIGTERM), ("", libc::SIGHUP)] {
        let (mut master, slave) = terminal();
        let before = local_flags(&slave);
        assert_ne!(before & libc::ECHO, 0);
        let mut child = start("plain", slave.try_clone().unwrap(), slave.try_clone().unwrap());
        read_until(&mut master, "<ready>");
        let raw = local_flags(&slave);
        assert_eq!(raw & (libc::ECHO | libc::ICANON | libc::ISIG), 0);
        master.write_all(b"\x03").unwrap(); // Ctrl-C is a key like others.
        read_until(&mut master, "[\x03]");
        master.write_all(key.as_bytes()).unwrap();
        if signal != 0 {
            // SAFETY: a signal to our own child.
            unsafe { libc::kill(child.id() as i32, signal) };
        }
        let status = child.wait().unwrap();
        assert_eq!(status.signal().unwrap_or(0), signal);
        assert_eq!(local_flags(&slave), before, "{key} {signal}");
    }
}

#[test]
fn with_signal_the_terminal_still_makes_signals() {
    let (mut master, slave) = terminal();
    let mut child = start("signal", slave.try_clone().unwrap(), slave.try_clone().unwrap());
    read_until(&mut master, "<ready>");
    assert_ne!(local_flags(&slave) & libc::ISIG, 0);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_terminal_that_nobody_reads_does_not_hang_the_process() {
    let (_master, slave) = terminal();
    let mut child = start("flood", slave.try_clone().unwrap(), slave);
    eventually("it ended", || child.try_wait().unwrap().is_some());
}

#[test]
fn a_pipe_that_nobody_reads_does_not_hang_the_process() {
    let mut child = start("flood", Stdio::null(), Stdio::piped());
    let _unread = child.stdout.take();
    eventually("it ended", || child.try_wait().unwrap().is_some());
}

#[test]
fn pipes_work_and_the_end_of_input_leaves_the_output() {
    let mut child = start("plain", Stdio::piped(), Stdio::piped());
    child.stdin.take().unwrap().write_all(b"abc").unwrap();
    let mut output = File::from(OwnedFd::from(child.stdout.take().unwrap()));
    read_until(&mut output, "[abc]");
    std::thread::sleep(Duration::from_millis(50));
    assert!(child.try_wait().unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();
}
