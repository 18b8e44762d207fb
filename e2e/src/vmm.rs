//! Starting and driving a VMM: Tern, or QEMU in its place.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::Context;
use crate::network::Tap;
use crate::qmp::Client;
use crate::{Error, Result, failure};

/// The guest's network card.
pub const MAC: &str = "52:54:00:7e:41:02";
/// The same as it is in frames.
pub const MAC_BYTES: [u8; 6] = [0x52, 0x54, 0x00, 0x7e, 0x41, 0x02];

/// How long a VMM may take to say how it stands when a test has failed.
const STATE_PATIENCE: Duration = Duration::from_secs(3);
/// For how long its threads are watched then.
const STATE_WATCH: Duration = Duration::from_millis(500);

/// What to start.
#[derive(Clone, Debug)]
pub struct Config {
    /// The program; when its name is `tern` it gets the word `qemu` first.
    pub program: PathBuf,
    /// The VM's name.
    pub name: String,
    /// On KVM, or (QEMU's) on a software CPU.
    pub kvm: bool,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initramfs.
    pub initrd: PathBuf,
    /// Words for the kernel's command line after `console=ttyS0 quiet`.
    pub append: String,
    /// A raw image for a virtio disk.
    pub disk: Option<PathBuf>,
    /// `-incoming` with that.
    pub incoming: Option<String>,
    /// More arguments.
    pub extra: Vec<String>,
}

/// A VMM that runs. Dropping it kills it.
pub struct Vmm {
    /// The VM's name.
    pub name: String,
    /// Its monitor.
    pub qmp: Client,
    /// Where its serial log (serial.log), standard error (stderr.log) and monitor (qmp) are.
    pub dir: PathBuf,
    /// When the process was started.
    pub started: Instant,
    child: Child,
}

impl Config {
    fn arguments(&self, dir: &Path, tap: Option<&OwnedFd>) -> Vec<String> {
        let mut args: Vec<String> = Vec::new();
        let mut add = |words: &[&str]| args.extend(words.iter().map(|w| (*w).to_owned()));
        if self.program.file_name().is_some_and(|n| n == "tern") {
            add(&["qemu"]);
        }
        add(&["-name", &self.name, "-nodefaults", "-no-user-config", "-display", "none"]);
        let (accel, cpu) = if self.kvm { ("kvm", "host") } else { ("tcg,thread=multi", "max") };
        add(&["-machine", "q35", "-accel", accel, "-cpu", cpu]);
        add(&["-smp", &self.cpus.to_string(), "-m", &self.memory_mib.to_string()]);
        add(&[
            "-kernel",
            &self.kernel.to_string_lossy(),
            "-initrd",
            &self.initrd.to_string_lossy(),
        ]);
        add(&["-append", &format!("console=ttyS0 quiet panic=-1 {}", self.append)]);
        add(&["-serial", &format!("file:{}", dir.join("serial.log").display())]);
        add(&["-qmp", &format!("unix:{},server=on,wait=off", dir.join("qmp").display())]);
        if let Some(disk) = &self.disk {
            add(&["-drive", &format!("if=none,id=disk0,file={},format=raw", disk.display())]);
            add(&["-device", "virtio-blk-pci,drive=disk0,id=vblk0"]);
        }
        if let Some(tap) = tap {
            add(&["-netdev", &format!("tap,id=net0,fd={}", tap.as_raw_fd())]);
            add(&["-device", &format!("virtio-net-pci,netdev=net0,mac={MAC},id=vnet0")]);
        }
        if let Some(incoming) = &self.incoming {
            add(&["-incoming", incoming]);
        }
        args.extend(self.extra.iter().cloned());
        args
    }

    /// Starts it with its files in `dir`, and waits for its monitor.
    ///
    /// # Errors
    /// [`Error::Ended`] when it refuses to start.
    pub fn start(&self, dir: &Path, tap: Option<&Tap>) -> Result<Vmm> {
        let dir = dir.join(&self.name);
        fs::create_dir_all(&dir).context(|| format!("{}", dir.display()))?;
        let tap = tap.map(Tap::descriptor).transpose()?;
        let stderr_path = dir.join("stderr.log");
        let stderr = File::create(&stderr_path).context(|| format!("{}", stderr_path.display()))?;
        let mut command = Command::new(&self.program);
        command
            .args(self.arguments(&dir, tap.as_ref()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        prepare_child(&mut command, tap.as_ref().map(AsRawFd::as_raw_fd));
        let started = Instant::now();
        let mut child =
            command.spawn().context(|| format!("cannot start {}", self.program.display()))?;
        let until = started + Duration::from_secs(30);
        while !dir.join("qmp").exists() {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(ended(&self.name, &status.to_string(), &dir));
            }
            if Instant::now() > until {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Error::Timeout {
                    what: format!("{}'s monitor", self.name),
                    seconds: 30,
                });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let qmp = match Client::connect(&dir.join("qmp"), Duration::from_secs(10)) {
            Ok(qmp) => qmp,
            Err(e) => {
                // A VMM that refuses its options closes its monitor before it ends.
                let until = Instant::now() + Duration::from_secs(5);
                while matches!(child.try_wait(), Ok(None)) && Instant::now() < until {
                    std::thread::sleep(Duration::from_millis(10));
                }
                let _ = child.kill();
                let status = child.wait().map(|s| s.to_string()).unwrap_or_default();
                eprintln!("{e}");
                return Err(ended(&self.name, &status, &dir));
            }
        };
        Ok(Vmm { name: self.name.clone(), qmp, dir, started, child })
    }
}

/// The child dies with this process, and inherits the descriptor.
#[allow(unsafe_code)]
pub(crate) fn prepare_child(command: &mut Command, inherit: Option<i32>) {
    // SAFETY: prctl and fcntl are async-signal-safe and take no memory of this process.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if let Some(fd) = inherit {
                libc::fcntl(fd, libc::F_SETFD, 0);
            }
            Ok(())
        });
    }
}

fn ended(name: &str, status: &str, dir: &Path) -> Error {
    let said = fs::read_to_string(dir.join("stderr.log")).unwrap_or_default();
    let lines: Vec<&str> = said.lines().collect();
    Error::Ended {
        name: name.to_owned(),
        status: status.to_owned(),
        said: lines[lines.len().saturating_sub(8)..].join("\n"),
        dir: dir.to_path_buf(),
    }
}

impl Vmm {
    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the guest printed on its serial line so far.
    pub fn serial(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.join("serial.log")).unwrap_or_default())
            .into_owned()
    }

    /// Waits until the guest's serial line shows `text`.
    ///
    /// # Errors
    /// When that does not happen in time, or the VMM ends.
    pub fn wait_serial(&mut self, text: &str, patience: Duration) -> Result<String> {
        let until = Instant::now() + patience;
        loop {
            let serial = self.serial();
            // Only whole lines: the last may still be growing.
            let whole = serial.rfind('\n').map_or("", |end| &serial[..end]);
            if let Some(line) = whole.lines().find(|l| l.contains(text)) {
                return Ok(line.to_owned());
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(ended(&self.name, &status.to_string(), &self.dir));
            }
            if Instant::now() > until {
                let tail: Vec<&str> = serial.lines().rev().take(12).collect();
                let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
                return Err(Error::Timeout {
                    what: format!(
                        "{text:?} on {}'s serial line (it ends in:\n{tail}\n)",
                        self.name
                    ),
                    seconds: patience.as_secs(),
                });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for the guest's work to be up; the JSON that it announces.
    pub fn wait_ready(&mut self, patience: Duration) -> Result<Value> {
        let line = self.wait_serial("TERN-GUEST READY {", patience)?;
        let json = line.split_once("READY ").map_or("", |(_, json)| json);
        serde_json::from_str(json)
            .map_err(|e| Error::Protocol(format!("the guest announces {line:?}: {e}")))
    }

    /// Whether the process is there.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Whether it still does its part: the process is there and says that the guest runs.
    ///
    /// # Errors
    /// [`Error::Ended`] when the process is gone, [`Error::Protocol`] when the guest is stopped.
    pub fn check(&mut self) -> Result<()> {
        if let Ok(Some(status)) = self.child.try_wait() {
            return Err(ended(&self.name, &status.to_string(), &self.dir));
        }
        match self.status()?.as_str() {
            "running" => Ok(()),
            other => Err(Error::Protocol(format!(
                "{} should run its guest but is in status {other}",
                self.name
            ))),
        }
    }

    /// `query-status`'s status.
    pub fn status(&mut self) -> Result<String> {
        let status = self.qmp.execute("query-status", Value::Null)?;
        Ok(status.get("status").and_then(Value::as_str).unwrap_or_default().to_owned())
    }

    /// Waits for the process to end; its exit status.
    pub fn wait_end(&mut self, patience: Duration) -> Result<i32> {
        let until = Instant::now() + patience;
        while Instant::now() < until {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Ok(status.code().unwrap_or(-1));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(Error::Timeout {
            what: format!("the end of {}", self.name),
            seconds: patience.as_secs(),
        })
    }

    /// Ends it by QMP.
    pub fn quit(mut self) -> Result<i32> {
        let _ = self.qmp.execute("quit", Value::Null);
        self.wait_end(Duration::from_secs(20))
    }

    /// Ends it at once, as a crash would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Vmm {
    /// How it stands, in a line, for the output of a test that failed.
    fn state(&mut self) -> String {
        if let Ok(Some(status)) = self.child.try_wait() {
            return format!("it had ended ({status})");
        }
        let answer = self.qmp.execute_within("query-status", Value::Null, STATE_PATIENCE);
        let events: Vec<_> = self.qmp.events().map(|e| e.name.clone()).collect();
        let threads = failure::threads(self.pid(), STATE_WATCH);
        match answer {
            Ok(status) => {
                format!("query-status {status}, events not looked at {events:?}, {threads}")
            }
            Err(e) => format!("it does not say how it stands: {e}"),
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let state = self.state();
            let _ = fs::write(self.dir.join(failure::STATE), state);
        }
        self.kill();
    }
}
