//! The side that runs on the lab host: starts the command, passes on what it prints, and reports
//! how it ended.
#![allow(unsafe_code)]

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use super::wire;
use crate::{Result, cpus};

/// How long output is awaited after the command ended, when something that it left behind still
/// holds its output open.
const LINGER: Duration = Duration::from_millis(500);

/// A list of strings as a file: each ends in a zero byte.
pub fn read_list(path: &Path) -> Result<Vec<OsString>> {
    let bytes = fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    let mut items: Vec<OsString> =
        bytes.split(|b| *b == 0).map(|s| OsString::from_vec(s.to_vec())).collect();
    items.pop();
    Ok(items)
}

/// The virtio-serial port of that name.
fn port(name: &str) -> Result<File> {
    let ports = "/sys/class/virtio-ports";
    for entry in fs::read_dir(ports).map_err(|e| format!("no {ports}: {e}"))?.flatten() {
        let found = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if found.trim() == name {
            let dev = Path::new("/dev").join(entry.file_name());
            return fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(&dev)
                .map_err(|e| format!("cannot open {}: {e}", dev.display()));
        }
    }
    Err(format!("there is no virtio-serial port {name}"))
}

fn command(job: &Path) -> Result<Command> {
    let mut argv = read_list(&job.join("argv"))?.into_iter();
    let mut command = Command::new(argv.next().ok_or("the job has no command")?);
    command.args(argv).env_clear();
    for pair in read_list(&job.join("env"))? {
        let pair = pair.into_vec();
        if let Some(at) = pair.iter().position(|b| *b == b'=') {
            let (name, value) = pair.split_at(at);
            command.env(OsString::from_vec(name.to_vec()), OsString::from_vec(value[1..].to_vec()));
        }
    }
    if let Some(cwd) = read_list(&job.join("cwd"))?.pop() {
        command.current_dir(PathBuf::from(cwd));
    }
    Ok(command)
}

fn pass_on(kind: u8, mut from: impl Read + Send + 'static, to: mpsc::SyncSender<(u8, Vec<u8>)>) {
    thread::spawn(move || {
        let mut buf = vec![0; wire::MAX];
        while let Ok(n) = from.read(&mut buf) {
            if n == 0 || to.send((kind, buf[..n].to_vec())).is_err() {
                break;
            }
        }
    });
}

fn code(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128 + signal as u8,
        (None, None) => 255,
    }
}

/// Starts the command with its output in frames on the port, and ends when it ended.
fn supervise(mut command: Command, mut port: File) -> Result<u8> {
    let (out, frames) = mpsc::sync_channel::<(u8, Vec<u8>)>(64);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) => {
            let name = command.get_program().to_string_lossy().into_owned();
            let _ = wire::send(
                &mut port,
                wire::STDERR,
                format!("lab: {name} does not start: {e}\n").as_bytes(),
            );
            return Ok(127);
        }
    };
    if let Some(stdout) = child.stdout.take() {
        pass_on(wire::STDOUT, stdout, out.clone());
    }
    if let Some(stderr) = child.stderr.take() {
        pass_on(wire::STDERR, stderr, out.clone());
    }
    let pid = child.id() as libc::pid_t;
    let mut orders = port.try_clone().map_err(|e| e.to_string())?;
    thread::spawn(move || {
        while let Ok((kind, _)) = wire::receive(&mut orders) {
            if kind == wire::KILL {
                // SAFETY: kill takes no memory; the group is the command's own.
                unsafe { libc::kill(-pid, libc::SIGKILL) };
            }
        }
    });
    let (ended, end) = mpsc::channel();
    thread::spawn(move || {
        let _ = ended.send(child.wait());
    });
    drop(out);
    let mut status = None;
    loop {
        match frames.recv_timeout(LINGER) {
            Ok((kind, data)) => wire::send(&mut port, kind, &data).map_err(|e| e.to_string())?,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if status.is_some() => break,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if status.is_none() {
            status = end.try_recv().ok();
        }
    }
    let status = match status {
        Some(status) => status,
        None => end.recv().map_err(|e| e.to_string())?,
    };
    Ok(code(status.map_err(|e| format!("cannot wait for the command: {e}"))?))
}

/// A shell on the console that is the person's terminal.
fn shell(mut command: Command) -> Result<u8> {
    let open = || {
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/hvc0")
            .map_err(|e| format!("no /dev/hvc0: {e}"))
    };
    command.stdin(open()?).stdout(open()?).stderr(open()?);
    // SAFETY: both calls are async-signal-safe and take no memory of this process.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            libc::ioctl(0, libc::TIOCSCTTY, 0);
            Ok(())
        });
    }
    let status = command.status().map_err(|e| format!("the shell does not start: {e}"))?;
    Ok(code(status))
}

/// Keeps this process, and so the command, off CPU 0.
///
/// No guest may run on the emulated machine's first CPU: whenever any CPU restores its FPU state,
/// QEMU's emulation (10.0 and before, `cpu_clear_ignne`) reads, changes and writes a word of that
/// CPU's state without a lock, in which it also keeps whether nested paging and the global
/// interrupt flag are on. An entry into a guest or an exit from one that happens in between is
/// half undone. On a CPU that never enters a guest this word does not change.
fn leave_the_first_cpu() -> Result<()> {
    let others: Vec<usize> = cpus::allowed()?.into_iter().filter(|cpu| *cpu != 0).collect();
    cpus::keep_to(&others)
}

/// Runs the job in the directory `job` (files argv, env, cwd, and mode).
pub fn run(job: &Path) -> Result<()> {
    leave_the_first_cpu()?;
    let command = command(job)?;
    let mut control = port("tern.lab")?;
    wire::send(&mut control, wire::HELLO, &[])
        .map_err(|e| format!("cannot report the start: {e}"))?;
    let interactive = fs::read_to_string(job.join("mode")).is_ok_and(|m| m.trim() == "shell");
    let result = if interactive {
        shell(command)
    } else {
        supervise(command, control.try_clone().map_err(|e| e.to_string())?)
    };
    let code = match result {
        Ok(code) => code,
        Err(message) => {
            let _ = wire::send(&mut control, wire::STDERR, format!("lab: {message}\n").as_bytes());
            125
        }
    };
    // What the command wrote below target/ goes out before its end is told.
    // SAFETY: sync takes nothing.
    unsafe { libc::sync() };
    wire::send(&mut control, wire::EXIT, &[code]).map_err(|e| format!("cannot report the end: {e}"))
}
