//! From a description to a VM process: log, pid file, daemon, and the VMM itself.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::runtime_dir;

/// Runs `machine` until it ends; returns the exit status. With `-daemonize` the process that
/// called returns once the VM's monitors listen, and the VM lives on in another.
pub fn launch(machine: spec::Machine) -> i32 {
    match try_launch(machine) {
        Ok(status) => status,
        Err(e) => {
            vmm::tell!("tern: {e}");
            1
        }
    }
}

fn try_launch(mut machine: spec::Machine) -> Result<i32, String> {
    let process = machine.process.clone();
    let mut parent = None;
    if process.daemonize {
        match daemonize()? {
            Daemon::Parent(status) => return Ok(status),
            Daemon::Child(pipe) => parent = Some(pipe),
        }
    }
    let log = start_log(&process)?;
    let _locked = process.pidfile.as_deref().map(write_pidfile).transpose()?;
    // Without its directory the VM runs all the same; only the friendly commands do not find it.
    let _directory = runtime_dir::publish(&mut machine)
        .inspect_err(|e| tracing::warn!("the tern commands will not find this VM: {e}"))
        .ok();
    vmm::prepare_process();
    let ready = move || {
        if let Some(pipe) = parent {
            detach(pipe, log.as_ref());
        }
    };
    Ok(vmm::run(machine, ready))
}

/// `-D FILE`, `-d ITEMS`: where the log goes and what is in it; TERN_LOG overrides what. Returns
/// the file.
fn start_log(process: &spec::Process) -> Result<Option<File>, String> {
    let default = if process.log_items.is_empty() { "warn" } else { "debug" };
    let filter = tracing_subscriber::EnvFilter::try_from_env("TERN_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        // A log that cannot be written is no reason to stop: telling of it would panic.
        .log_internal_errors(false);
    let Some(path) = &process.logfile else {
        builder.with_writer(std::io::stderr).try_init().map_err(|e| format!("log: {e}"))?;
        return Ok(None);
    };
    let wrong = |e: std::io::Error| format!("-D {}: {e}", path.display());
    let file = File::options().create(true).append(true).open(path).map_err(wrong)?;
    let writer = std::sync::Mutex::new(file.try_clone().map_err(wrong)?);
    builder.with_writer(writer).try_init().map_err(|e| format!("log: {e}"))?;
    Ok(Some(file))
}

/// Where the pid file is that [`write_pidfile`] wrote.
static PIDFILE: OnceLock<PathBuf> = OnceLock::new();

/// Writes the pid file; it goes away with the process, by whichever way that ends in order. Locked
/// as long as the file returned is open, so that a second VM is refused.
#[allow(unsafe_code)]
fn write_pidfile(path: &Path) -> Result<File, String> {
    let wrong = |e: std::io::Error| format!("-pidfile {}: {e}", path.display());
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o644);
    let mut file = options.open(path).map_err(wrong)?;
    // SAFETY: flock is plain data; all zeroes is a lock of the whole file.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as _;
    lock.l_whence = libc::SEEK_SET as _;
    // SAFETY: the fd is open and the lock outlives the call, which only reads it.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } < 0 {
        let e = std::io::Error::last_os_error();
        return Err(match e.kind() {
            std::io::ErrorKind::WouldBlock => {
                format!("-pidfile {}: another running process has it", path.display())
            }
            _ => wrong(e),
        });
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(wrong)?;
    // A daemon leaves the directory that a relative name is in.
    if PIDFILE.set(std::path::absolute(path).map_err(wrong)?).is_ok() {
        // SAFETY: the handler only removes a file.
        unsafe { libc::atexit(remove_pidfile) };
    }
    Ok(file)
}

extern "C" fn remove_pidfile() {
    if let Some(path) = PIDFILE.get() {
        let _ = std::fs::remove_file(path);
    }
}

enum Daemon {
    /// The calling process, with its exit status.
    Parent(i32),
    /// The VM's process; a byte through the pipe lets the parent go.
    Child(OwnedFd),
}

/// Forks. The parent waits until the child is ready (status 0) or has ended (its status).
#[allow(unsafe_code)]
fn daemonize() -> Result<Daemon, String> {
    let failed = |what: &str| format!("-daemonize: {what}: {}", std::io::Error::last_os_error());
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for two fds.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(failed("pipe"));
    }
    // SAFETY: both fds are new and ours alone.
    let (read, write) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    // SAFETY: no thread has been started yet, so the child is a whole copy.
    match unsafe { libc::fork() } {
        -1 => Err(failed("fork")),
        0 => {
            drop(read);
            // SAFETY: setsid has no memory effects; a fresh child is no group leader.
            unsafe { libc::setsid() };
            Ok(Daemon::Child(write))
        }
        child => {
            drop(write);
            let mut byte = [0];
            if matches!(File::from(read).read(&mut byte), Ok(1)) {
                return Ok(Daemon::Parent(0));
            }
            let mut status = 0;
            // SAFETY: waits for our own child; status is valid.
            unsafe { libc::waitpid(child, &mut status, 0) };
            let exited = libc::WIFEXITED(status);
            Ok(Daemon::Parent(if exited { libc::WEXITSTATUS(status).max(1) } else { 1 }))
        }
    }
}

/// The child is ready: nothing of the caller's terminal is kept, and the parent may go. What is
/// said on standard error from now on, as why a migration was refused, is in the `log`.
#[allow(unsafe_code)]
fn detach(pipe: OwnedFd, log: Option<&File>) {
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        for (fd, file) in [(0, &null), (1, &null), (2, log.unwrap_or(&null))] {
            // SAFETY: replaces our own standard fds by one that is open.
            unsafe { libc::dup2(file.as_raw_fd(), fd) };
        }
    }
    let _ = std::env::set_current_dir("/");
    let _ = File::from(pipe).write_all(b"r");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_has_one_owner() {
        let path = std::env::temp_dir().join(format!("tern-pid-{}", std::process::id()));
        std::fs::write(&path, "1234567890 and more\n").unwrap();
        let held = write_pidfile(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, format!("{}\n", std::process::id()));
        assert!(write_pidfile(&path).unwrap_err().contains("another running process"));
        drop(held);
        write_pidfile(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
