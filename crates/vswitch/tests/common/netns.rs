//! Network namespaces for tests that need interfaces of the host.
#![allow(dead_code, unsafe_code)] // every test binary uses a part of it; unshare

use std::process::{Child, Command, Stdio};

/// Whether namespaces and interfaces can be made here; says why not.
pub fn is_possible(test: &str) -> bool {
    // SAFETY: no arguments.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        eprintln!("{test}: skipped: network namespaces and XDP need root");
    }
    root
}

/// Runs `test` on a thread in a network namespace of its own: what it starts is in it too. Where
/// that is not possible it says so.
pub fn run(name: &str, test: impl FnOnce() + Send + 'static) {
    if !is_possible(name) {
        return;
    }
    let inside = move || {
        // SAFETY: only a number is passed; the namespace is this thread's alone.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "unshare: {}", std::io::Error::last_os_error());
        sh("ip link set lo up");
        test();
    };
    if let Err(panic) = std::thread::spawn(inside).join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a command line; its output.
pub fn sh(line: &str) -> String {
    let out = try_sh(line);
    assert!(out.0, "{line}: {}", out.1);
    out.1
}

/// Runs a command line: whether it went well, and its output.
pub fn try_sh(line: &str) -> (bool, String) {
    let mut words = line.split_whitespace();
    let out = Command::new(words.next().unwrap()).args(words).output().unwrap();
    let text = [out.stdout, out.stderr].concat();
    (out.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// A veth pair, both up, without the host's own chatter on it.
pub fn veth(a: &str, b: &str, mtu: u16) {
    sh(&format!("ip link add {a} mtu {mtu} type veth peer name {b} mtu {mtu}"));
    for name in [a, b] {
        sh(&format!("ip link set {name} addrgenmode none arp off up"));
    }
}

/// A network namespace beside the test's, kept by a process.
pub struct Neighbour(Child);

impl Neighbour {
    /// An empty one.
    pub fn new() -> Self {
        let child = Command::new("unshare").args(["-n", "sleep", "600"]).spawn().unwrap();
        let n = Self(child);
        let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let theirs = format!("/proc/{}/ns/net", n.0.id());
        // unshare(1) has to get there.
        while std::fs::read_link(&theirs).unwrap() == own
            || !std::fs::read_to_string(format!("/proc/{}/comm", n.0.id()))
                .unwrap()
                .starts_with("sleep")
        {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        n.sh("ip link set lo up");
        n
    }

    /// Moves interface `name` into it, with an IPv4 address, and a MAC address that follows from it.
    pub fn take(&self, name: &str, address: &str) {
        sh(&format!("ip link set {name} netns {}", self.0.id()));
        let host: u8 = address.split(['.', '/']).nth(3).unwrap().parse().unwrap();
        self.sh(&format!("ip link set {name} address 02:00:00:00:09:{host:02x}"));
        self.sh(&format!("ip addr add {address} dev {name}"));
        self.sh(&format!("ip link set {name} arp on up"));
    }

    fn line(&self, line: &str) -> String {
        format!("nsenter -t {} -n {line}", self.0.id())
    }

    /// Runs a command line in it.
    pub fn sh(&self, line: &str) -> String {
        sh(&self.line(line))
    }

    /// Runs a command line in it: whether it went well, and its output.
    pub fn try_sh(&self, line: &str) -> (bool, String) {
        try_sh(&self.line(line))
    }

    /// Lets its stack leave segments larger than the MTU to interface `name`, or not.
    pub fn large_segments(&self, name: &str, on: bool) {
        let most = if on { 65_535 } else { 1 };
        self.sh(&format!("ip link set {name} gso_max_segs {most}"));
    }

    /// Starts a command line in it.
    pub fn start(&self, line: &str) -> Started {
        let line = self.line(line);
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().unwrap());
        Started(command.args(words).stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process that ends with this.
pub struct Started(pub Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
