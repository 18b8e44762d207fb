//! The lab host: an emulated machine (QEMU's software CPU, AMD SVM) with a complete `/dev/kvm`, in
//! which a command of this machine runs, on this machine's files.
//!
//! This machine's file system is the lab's root, read-only with an overlay in memory: the lab can
//! write everywhere, and nothing of it lasts, except what is below target/, which is shared.

pub mod agent;
pub mod image;
pub mod lock;
mod wire;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::cpio::Archive;
use crate::{Result, paths, setup};

/// `cargo xtask lab`'s arguments.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  cargo xtask lab -- ls -l /dev/kvm\n  cargo xtask lab       (a shell)\n\nA command's standard input is empty. It gets the environment, without LD_LIBRARY_PATH: that is \
    cargo's; to set it, run `env LD_LIBRARY_PATH=... COMMAND`."
)]
pub struct LabArgs {
    /// Kill the command after that many seconds (exit status 124)
    #[arg(long, value_name = "SECS")]
    pub timeout: Option<u64>,
    /// The lab host's memory
    #[arg(long, value_name = "MIB", default_value_t = 3072)]
    pub memory: u32,
    /// CPUs for the command; the lab host has one more, on which no guest may run
    #[arg(long, default_value_t = 2)]
    pub cpus: u32,
    /// More arguments for the QEMU that is the lab host (repeatable)
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub qemu_arg: Vec<String>,
    /// More words for the lab host's kernel command line
    #[arg(long, value_name = "WORDS", default_value = "")]
    pub append: String,
    /// Print the lab host's kernel messages
    #[arg(long, short)]
    pub verbose: bool,
    /// The command and its arguments; a shell without
    #[arg(last = true)]
    pub command: Vec<OsString>,
}

/// How a lab host is made and for how long it may run.
pub struct Options {
    /// From the command's start; then it is killed and the status is 124.
    pub timeout: Option<Duration>,
    /// Memory of the lab host, MiB.
    pub memory_mib: u32,
    /// CPUs for the command. The lab host has one more (see [`agent`]).
    pub cpus: u32,
    /// More arguments for its QEMU.
    pub qemu_args: Vec<String>,
    /// More words for its kernel command line.
    pub append: String,
    /// Variables set for the command beside this process's own.
    pub env: Vec<(String, String)>,
    /// Kernel messages go to standard error.
    pub verbose: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            timeout: None,
            memory_mib: 3072,
            cpus: 2,
            qemu_args: Vec::new(),
            append: String::new(),
            env: Vec::new(),
            verbose: false,
        }
    }
}

/// The lab host has to say hello to QEMU's end in this time; then the command's own time starts.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// A directory for one run of a lab host, removed at the end.
struct RunDir(PathBuf);

impl RunDir {
    fn new() -> Result<Self> {
        let runs = paths::lab().join("run");
        // What runs that were killed left behind.
        for old in fs::read_dir(&runs).into_iter().flatten().flatten() {
            if !Path::new("/proc").join(old.file_name()).exists() {
                let _ = fs::remove_dir_all(old.path());
            }
        }
        let dir = runs.join(std::process::id().to_string());
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn list<'a>(items: impl IntoIterator<Item = &'a OsStr>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for item in items {
        bytes.extend_from_slice(item.as_bytes());
        bytes.push(0);
    }
    bytes
}

/// The second part of the initramfs: what to run, and the agent (this program).
fn job(image: &image::Image, argv: &[OsString], opts: &Options, shell: bool) -> Result<Vec<u8>> {
    let cwd = std::env::current_dir().map_err(|e| format!("no working directory: {e}"))?;
    // Cargo's own directories of libraries are no concern of the command: it would look for every
    // library in each of them first, and every miss is a round trip to the outer host.
    let mut env: Vec<OsString> = std::env::vars_os()
        .filter(|(name, _)| name != "LD_LIBRARY_PATH")
        .map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat())
        .map(OsString::from_vec)
        .collect();
    env.push("TERN_LAB=1".into());
    env.extend(opts.env.iter().map(|(name, value)| format!("{name}={value}").into()));
    let settings = format!(
        "KERNEL='{}'\nMODULES='{}'\nTARGET='{}'\n",
        image.kernel.version,
        image.kernel.modules_dir().display(),
        paths::target().display()
    );
    let mut archive = Archive::new();
    archive.dir("job");
    archive.file("job/settings", 0o644, settings.as_bytes());
    archive.file("job/argv", 0o644, &list(argv.iter().map(OsString::as_os_str)));
    archive.file("job/env", 0o644, &list(env.iter().map(OsString::as_os_str)));
    archive.file("job/cwd", 0o644, &list([cwd.as_os_str()]));
    archive.file("job/mode", 0o644, if shell { b"shell" } else { b"run" });
    archive.copy("job/agent", 0o755, Path::new("/proc/self/exe"))?;
    Ok(archive.finish())
}

/// A lab host that is running. Dropping it ends it.
struct Machine {
    qemu: Child,
    control: UnixStream,
    dir: RunDir,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Machine {
    fn start(argv: &[OsString], opts: &Options, shell: bool) -> Result<Self> {
        setup::ensure(setup::LAB)?;
        let image = image::ensure()?;
        let dir = RunDir::new()?;
        let initrd = dir.0.join("initrd");
        let mut bytes = fs::read(&image.initramfs)
            .map_err(|e| format!("cannot read the lab's initramfs: {e}"))?;
        bytes.extend(job(&image, argv, opts, shell)?);
        fs::write(&initrd, bytes).map_err(|e| format!("cannot write {}: {e}", initrd.display()))?;
        let socket = dir.0.join("control");
        let listener = UnixListener::bind(&socket)
            .map_err(|e| format!("cannot listen at {}: {e}", socket.display()))?;

        let mut command = qemu(&image, opts, shell, &dir.0);
        let mut qemu =
            command.spawn().map_err(|e| format!("qemu-system-x86_64 does not start: {e}"))?;
        if let Some(stderr) = qemu.stderr.take() {
            std::thread::spawn(move || relay_messages(stderr));
        }
        listener.set_nonblocking(true).map_err(|e| e.to_string())?;
        let until = Instant::now() + Duration::from_secs(30);
        let control = loop {
            if let Ok((stream, _)) = listener.accept() {
                break stream;
            }
            if let Ok(Some(status)) = qemu.try_wait() {
                return Err(format!("the lab host's QEMU ended at once ({status})"));
            }
            if Instant::now() > until {
                let _ = qemu.kill();
                return Err("the lab host's QEMU does not connect to its control socket".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        control.set_nonblocking(false).map_err(|e| e.to_string())?;
        Ok(Self { qemu, control, dir })
    }

    /// What the lab host's kernel printed last, for when it failed.
    fn last_words(&self) -> String {
        let log = fs::read(self.dir.0.join("console.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

fn qemu(image: &image::Image, opts: &Options, shell: bool, dir: &Path) -> Command {
    let mut command = crate::qemu::emulator();
    let quiet = if opts.verbose { "" } else { "quiet" };
    command.stderr(Stdio::piped());
    let log = if opts.verbose {
        "file,id=log,path=/dev/stderr".to_owned()
    } else {
        format!("file,id=log,path={}", dir.join("console.log").display())
    };
    command
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        .args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "EPYC-Rome,+svm"])
        .args(["-smp", &(opts.cpus + 1).to_string(), "-m", &opts.memory_mib.to_string()])
        .arg("-kernel")
        .arg(image.kernel.image())
        .arg("-initrd")
        .arg(dir.join("initrd"))
        .arg("-append")
        .arg(format!("console=ttyS0 panic=-1 {quiet} tsc=reliable {}", opts.append))
        .args(["-chardev", &log, "-serial", "chardev:log"])
        .args([
            "-virtfs",
            "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
        ])
        .arg("-virtfs")
        .arg(format!(
            "local,path={},mount_tag=target,security_model=none,multidevs=remap",
            paths::target().display()
        ))
        .args(["-device", "virtio-rng-pci"])
        .args(["-device", "virtio-serial-pci"])
        .arg("-chardev")
        .arg(format!("socket,id=control,path={}", dir.join("control").display()))
        .args(["-device", "virtserialport,chardev=control,name=tern.lab"]);
    if shell {
        command.args([
            "-chardev",
            "stdio,id=terminal,signal=off",
            "-device",
            "virtconsole,chardev=terminal",
        ]);
    } else {
        command.stdin(Stdio::null());
    }
    command.args(&opts.qemu_args);
    die_with_parent(&mut command);
    command
}

/// QEMU's messages, without those about CPU features that its software CPU leaves out.
fn relay_messages(from: impl Read) {
    for line in BufReader::new(from).lines().map_while(io::Result::ok) {
        if !line.contains("warning: TCG doesn't support requested feature") {
            eprintln!("{}", line.trim_end());
        }
    }
}

/// The child is killed when this process ends, however it ends.
#[allow(unsafe_code)]
fn die_with_parent(command: &mut Command) {
    // SAFETY: prctl with PR_SET_PDEATHSIG is async-signal-safe and takes no memory.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
}

/// Passes frames on until the command's end, and gives its exit status.
fn follow(machine: &mut Machine, timeout: Option<Duration>) -> Result<u8> {
    let mut control = machine.control.try_clone().map_err(|e| e.to_string())?;
    let mut until = timeout.map(|t| Instant::now() + t + BOOT_LIMIT);
    let mut killed = false;
    let mut started = false;
    loop {
        let wait = until
            .map(|t| t.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
        control.set_read_timeout(wait).map_err(|e| e.to_string())?;
        let mut kind = [0];
        let got = match control.read(&mut kind) {
            Ok(0) => {
                return Err(format!(
                    "the lab host died; its last words:\n{}",
                    machine.last_words()
                ));
            }
            Ok(_) => true,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                false
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(format!("the lab host's control socket: {e}")),
        };
        if !got {
            if killed {
                return Ok(124);
            }
            eprintln!("xtask: the command on the lab host ran into its time limit");
            let _ = wire::send(&mut control, wire::KILL, &[]);
            killed = true;
            until = Some(Instant::now() + Duration::from_secs(10));
            continue;
        }
        control.set_read_timeout(None).map_err(|e| e.to_string())?;
        let (kind, data) = wire::receive(&mut (&kind[..]).chain(&mut control))
            .map_err(|e| format!("the lab host's control socket: {e}"))?;
        match kind {
            wire::HELLO if !started => {
                started = true;
                until = timeout.map(|t| Instant::now() + t);
            }
            wire::STDOUT => print(&mut io::stdout().lock(), &data)?,
            wire::STDERR => print(&mut io::stderr().lock(), &data)?,
            wire::EXIT if killed => return Ok(124),
            wire::EXIT => return Ok(data.first().copied().unwrap_or(255)),
            _ => {}
        }
    }
}

fn print(to: &mut impl Write, data: &[u8]) -> Result<()> {
    to.write_all(data)
        .and_then(|()| to.flush())
        .map_err(|e| format!("cannot pass the output on: {e}"))
}

/// Runs `argv` on a lab host, with its output on this process's, and gives its exit status: the
/// command's own, 128 + signal, 124 when its time ran out, 125 when the lab failed it, 127 when it
/// does not start.
///
/// # Errors
/// When the lab host cannot be built or started, or dies.
pub fn run(argv: &[OsString], opts: &Options) -> Result<u8> {
    let mut machine = Machine::start(argv, opts, false)?;
    follow(&mut machine, opts.timeout)
}

/// A shell on a lab host, on this terminal.
pub fn shell(opts: &Options) -> Result<u8> {
    if !io::stdin().is_terminal() {
        return Err("`cargo xtask lab` without a command is a shell and needs a terminal; give a command after --".into());
    }
    let (rows, columns) = terminal_size();
    let script =
        format!("stty rows {rows} cols {columns} 2>/dev/null; exec ${{SHELL:-/bin/bash}} -i");
    let argv = ["/bin/sh", "-c", &script].map(OsString::from);
    let mut machine = Machine::start(&argv, opts, true)?;
    let code = follow(&mut machine, None);
    // QEMU restores the terminal when it ends by itself.
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until && matches!(machine.qemu.try_wait(), Ok(None)) {
        std::thread::sleep(Duration::from_millis(20));
    }
    code
}

fn terminal_size() -> (u32, u32) {
    let out = Command::new("stty").arg("size").stdin(Stdio::inherit()).output();
    let text = out.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let mut words = text.split_whitespace().filter_map(|w| w.parse().ok());
    (words.next().unwrap_or(24), words.next().unwrap_or(80))
}
