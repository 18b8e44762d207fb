//! `tern run`, `ps`, `info`, `console`, `monitor`, `migrate`, `stop` and `kill` with a real VM.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use e2e::testbed::{BOOT, Bed, is_tern, vmm};
use serde_json::Value;

fn tern(words: &[&str]) -> Command {
    let mut command = Command::new(vmm());
    command.args(words).stdin(Stdio::null());
    command
}

/// Runs it to its end.
fn run(words: &[&str]) -> Output {
    tern(words).output().unwrap()
}

/// Runs it; it must succeed. Its standard output.
fn good(words: &[&str]) -> String {
    let out = run(words);
    let (said, complaint) = (text(&out.stdout), text(&out.stderr));
    assert!(out.status.success(), "tern {words:?}: {}\n{said}{complaint}", out.status);
    said
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Kills the VM when a test fails.
struct Named(String);

impl Drop for Named {
    fn drop(&mut self) {
        let _ = run(&["kill", &self.0]);
    }
}

/// `tern console`: waits for the guest to be up, asks it how it is, leaves with Ctrl-].
fn talk_on_the_console(name: &str) {
    let mut child =
        tern(&["console", name]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut typed = child.stdin.take().unwrap();
    let shown = BufReader::new(child.stdout.take().unwrap());
    let (tx, rx) = mpsc::channel();
    std::thread::spawn(move || shown.lines().map_while(Result::ok).try_for_each(|l| tx.send(l)));
    let wait = |what: &str| loop {
        let line = rx.recv_timeout(BOOT).unwrap_or_else(|_| panic!("no {what} on the console"));
        if line.contains(what) {
            return line;
        }
    };
    wait("TERN-GUEST READY");
    let second = tern(&["console", name]).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(!second.status.success() && said.contains("is taken"), "{said}");
    typed.write_all(b"{\"op\":\"status\"}\n").unwrap();
    let reply = wait("TERN-GUEST REPLY");
    assert!(reply.contains("uptime_ms"), "{reply}");
    typed.write_all(&[0x1d]).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_vm_is_run_looked_at_moved_and_stopped() {
    let Some(mut bed) = Bed::new("commands") else { return };
    if !is_tern() {
        println!("skipped: only Tern has these commands");
        return;
    }
    let name = format!("e2e-{}", std::process::id());
    let mut config = bed.config();
    let disk = bed.disk("disk.raw", 16 << 20).unwrap();
    let (kernel, initrd) = (config.kernel.to_string_lossy(), config.initrd.to_string_lossy());
    let run_it = |extra: &[&str]| {
        let mut words = vec!["run", "--detach", "--name", &name, "--memory", "192M"];
        let append = "console=ttyS0 quiet panic=-1 tern.mem=16";
        words.extend(["--kernel", &*kernel, "--initrd", &*initrd, "--append", append]);
        words.extend(extra);
        good(&words)
    };
    let _named = Named(name.clone());
    let path = disk.to_string_lossy();
    run_it(&["--disk", &*path, "--cpus", "2"]);
    talk_on_the_console(&name);

    let all: Value = serde_json::from_str(&good(&["ps", "--json"])).unwrap();
    let mine = all.as_array().unwrap().iter().find(|vm| vm["name"] == *name).unwrap();
    assert_eq!((&mine["state"], &mine["vcpus"]), (&"running".into(), &2.into()), "{mine}");
    assert_eq!(mine["memory-bytes"], 192u64 << 20);
    assert!(good(&["ps"]).contains(&name));
    let info: Value = serde_json::from_str(&good(&["info", &name, "--json"])).unwrap();
    assert_eq!((&info["name"], &info["state"]), (&(*name).into(), &"running".into()), "{info}");
    assert!(good(&["info", &name]).contains("disk.raw"));
    assert!(good(&["monitor", &name, "info", "status"]).contains("running"));
    good(&["monitor", &name, "stop"]);
    assert!(good(&["monitor", &name, "info", "status"]).contains("paused"));
    assert!(!run(&["stop", &name]).status.success(), "a stopped guest cannot shut down");
    good(&["monitor", &name, "cont"]);
    let again = run(&["run", "--detach", "--name", &name, "--kernel", &kernel]);
    assert!(!again.status.success(), "two VMs of one name");

    // To a VMM that was started with QEMU's command line.
    let uri = bed.uri();
    (config.memory_mib, config.cpus) = (192, 2);
    config.incoming = Some(uri.clone());
    let drive = format!("if=none,id=disk0,file={path},format=raw,discard=unmap");
    let devices = ["virtio-blk-pci,id=vd0,drive=disk0", "virtio-rng-pci,id=rng0"];
    config.extra = ["-drive", &drive, "-device", devices[0], "-device", devices[1]]
        .map(str::to_owned)
        .to_vec();
    let mut to = bed.start(&config).unwrap();
    let summary = good(&["migrate", &name, &uri]);
    assert!(summary.contains("downtime") && summary.contains("blackout"), "{summary}");
    assert_eq!(to.status().unwrap(), "running");
    assert!(good(&["info", &name]).contains("postmigrate"));
    good(&["kill", &name]);
    assert!(!good(&["ps"]).contains(&name));
    // The guest's power button, by the name of the VM that it is in now.
    good(&["stop", &to.name]);
    assert_eq!(to.wait_end(Duration::from_secs(60)).unwrap(), 0);
}
