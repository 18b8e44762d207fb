//! The runtime directory: how the `tern` commands find the VMs that run, with no daemon.
//!
//! ```text
//! $XDG_RUNTIME_DIR/tern/NAME/   (as root: /run/tern/NAME/)
//!   pid           the VMM's process id; locked as long as the VM lives
//!   qmp.sock      a QMP socket for the tern commands
//!   console.sock  the guest's serial console, when it is nowhere else
//!   spec.json     the machine, as spec::Machine
//! ```
//!
//! Invariants: a VM lives as long as somebody holds the lock on `pid` (an open-file-description
//! lock: it outlives a fork, as `-daemonize` needs, and goes with the process however that dies;
//! a reused process id fools nobody). Directories are made and removed only under the lock on
//! `.lock` beside them, which is held for no longer than that takes; so a directory whose `pid` is
//! not locked, seen under that lock, is a dead VM's and is removed by whoever sees it.
#![allow(unsafe_code)]

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Most bytes of a VM's name.
pub const MAX_NAME: usize = 64;
/// Most bytes read of a spec.json.
const MAX_SPEC: u64 = 16 << 20;
/// How long to wait for the lock under which directories are made: others hold it for moments.
const PATIENCE: Duration = Duration::from_secs(5);
/// What a VM may have in its directory.
const FILES: [&str; 5] = ["pid", "qmp.sock", "console.sock", "spec.json", "spec.json.new"];

/// Why a runtime directory could not be made or found.
#[derive(Debug)]
pub enum Error {
    BadName(String),
    InUse { name: String, pid: Option<i32> },
    Unknown { name: String, running: Vec<String> },
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::BadName(name) => write!(
                f,
                "'{}' cannot be a VM's name: expected 1 to {MAX_NAME} bytes without '/' and \
                 control characters, beginning with neither '.' nor '-'",
                name.escape_debug()
            ),
            Self::InUse { name, pid: Some(pid) } => {
                write!(f, "a VM called {name} runs already (pid {pid})")
            }
            Self::InUse { name, pid: None } => write!(f, "a VM called {name} runs already"),
            Self::Unknown { name, running } if running.is_empty() => {
                write!(f, "no VM called {name} runs here, nor any other")
            }
            Self::Unknown { name, running } => {
                write!(f, "no VM called {name} runs here; these do: {}", running.join(", "))
            }
            Self::Io { what, path, source } => {
                write!(f, "cannot {what} {}: {source}", path.display())
            }
        }
    }
}

impl std::error::Error for Error {}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { what, path, source }
}

/// A running VM's own directory; removed when it is dropped. Make it after `-daemonize` has
/// forked, or let the parent leave by `_exit`.
#[derive(Debug)]
pub struct RuntimeDir {
    path: PathBuf,
    /// Held for its lock.
    pid: File,
}

impl RuntimeDir {
    /// Makes the directory of the VM `name`, in place of a dead VM's. Refuses a bad name, and one
    /// that a live VM has.
    fn create_in(base: &Path, name: &str) -> Result<Self, Error> {
        check_name(name)?;
        let path = base.join(name);
        let build = |recursive, path: &Path| {
            DirBuilder::new().recursive(recursive).mode(0o700).create(path)
        };
        build(true, base).map_err(io_error("make the directory", base))?;
        let _making = lock_base(base, PATIENCE)?;
        match build(false, &path) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(io_error("make the directory", &path)(e)),
        }
        let pid_path = path.join("pid");
        let pid = open_pid(&pid_path).map_err(io_error("open", &pid_path))?;
        match lock(&pid) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(Error::InUse { name: name.into(), pid: read_pid(&path) });
            }
            Err(e) => return Err(io_error("lock", &pid_path)(e)),
        }
        let mut directory = Self { path, pid };
        directory.remove_files()?;
        directory.record_pid()?;
        Ok(directory)
    }

    /// Writes this process's id anew: for a caller that forked after [`create`](Self::create).
    pub fn record_pid(&mut self) -> Result<(), Error> {
        let path = self.path.join("pid");
        self.pid
            .set_len(0)
            .and_then(|()| self.pid.rewind())
            .and_then(|()| writeln!(self.pid, "{}", std::process::id()))
            .map_err(io_error("write", &path))
    }

    /// Writes what `tern ps` and `tern info` read.
    pub fn write_spec(&self, machine: &spec::Machine) -> Result<(), Error> {
        let path = self.path.join("spec.json");
        let text = serde_json::to_vec_pretty(machine).map_err(io::Error::from);
        // By way of a rename: a reader sees all of it or nothing.
        let fresh = self.path.join("spec.json.new");
        text.and_then(|text| std::fs::write(&fresh, text))
            .and_then(|()| std::fs::rename(&fresh, &path))
            .map_err(io_error("write", &path))
    }

    /// Where the VMM is to listen for the `tern` commands.
    pub fn qmp_socket(&self) -> PathBuf {
        self.path.join("qmp.sock")
    }

    /// Removes everything but the pid file: what a VM of this name left that died without
    /// cleaning up, or what we leave.
    fn remove_files(&self) -> Result<(), Error> {
        let failed = || io_error("clean up", &self.path);
        for entry in std::fs::read_dir(&self.path).map_err(failed())? {
            let entry = entry.map_err(failed())?;
            if entry.file_name() != "pid" {
                std::fs::remove_file(entry.path()).map_err(io_error("remove", &entry.path()))?;
            }
        }
        Ok(())
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        // What is in it is ours as long as the pid file is locked.
        let _ = self.remove_files();
        // Without the lock it stays behind, for the next who looks.
        if let Some(base) = self.path.parent()
            && let Ok(_removing) = lock_base(base, PATIENCE)
        {
            let _ = std::fs::remove_file(self.path.join("pid"));
            let _ = std::fs::remove_dir(&self.path);
        }
    }
}

/// Makes `machine` a VM that the `tern` commands find: makes its runtime directory, describes it
/// there, and gives it the control socket that they use. To be kept for as long as the
/// VM runs; to be called after `-daemonize` has forked, and before the chardevs are opened.
///
/// A machine without a name gets "vm-PID"; one with a name that is taken, "NAME-2" and so on, as
/// the two sides of a migration may well run on one host under one name.
pub fn publish(machine: &mut spec::Machine) -> Result<RuntimeDir, Error> {
    publish_in(&base(), machine)
}

fn publish_in(base: &Path, machine: &mut spec::Machine) -> Result<RuntimeDir, Error> {
    purge_in(base);
    let wanted = match &machine.name {
        Some(name) if check_name(name).is_ok() => name.clone(),
        _ => format!("vm-{}", std::process::id()),
    };
    let mut directory = RuntimeDir::create_in(base, &wanted);
    for n in 2..100 {
        if !matches!(directory, Err(Error::InUse { .. })) {
            break;
        }
        // Room for the number.
        let stem = &wanted[..wanted.floor_char_boundary(MAX_NAME - 3)];
        directory = RuntimeDir::create_in(base, &format!("{stem}-{n}"));
    }
    let directory = directory?;
    if let (Some(asked), Some(got)) = (&machine.name, directory.path.file_name())
        && got != asked.as_str()
    {
        let why = if wanted == *asked { "is taken" } else { "cannot be a directory's name" };
        tracing::warn!(
            "the VM's name {asked:?} {why}: the tern commands call it {}",
            got.to_string_lossy()
        );
    }
    directory.write_spec(machine)?;
    machine.process.control = Some(directory.qmp_socket());
    Ok(directory)
}

/// A VM that runs.
#[derive(Debug, Clone)]
pub struct Entry {
    pub name: String,
    pub pid: i32,
    pub path: PathBuf,
}

impl Entry {
    pub fn qmp_socket(&self) -> PathBuf {
        self.path.join("qmp.sock")
    }

    pub fn console_socket(&self) -> PathBuf {
        self.path.join("console.sock")
    }

    /// The machine as it was started; `None` when it cannot be read.
    pub fn spec(&self) -> Option<spec::Machine> {
        let file = File::open(self.path.join("spec.json")).ok()?;
        serde_json::from_reader(io::BufReader::new(file.take(MAX_SPEC))).ok()
    }

    /// Whether it runs still.
    pub fn alive(&self) -> bool {
        live_pid(&self.path) == Some(self.pid)
    }
}

/// All VMs that run, by name.
pub fn list() -> Result<Vec<Entry>, Error> {
    list_in(&base())
}

fn list_in(base: &Path) -> Result<Vec<Entry>, Error> {
    let entries = match std::fs::read_dir(base) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io_error("read", base)(e)),
    };
    check_owner(base)?;
    let mut found = Vec::new();
    let mut dead = false;
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        let path = entry.path();
        match (live_pid(&path), entry.file_name().into_string()) {
            (Some(pid), Ok(name)) => found.push(Entry { name, pid, path }),
            _ => dead = true,
        }
    }
    if dead {
        purge_in(base);
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Removes what VMs left that were killed.
pub fn purge() {
    purge_in(&base());
}

/// A lock that somebody else holds, or a directory that cannot be removed, is left for the next
/// time.
fn purge_in(base: &Path) {
    let Ok(entries) = std::fs::read_dir(base) else { return };
    let Ok(_removing) = lock_base(base, Duration::ZERO) else { return };
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        let path = entry.path();
        // What holds other files is not a VM's, whoever put it there.
        let names = std::fs::read_dir(&path)
            .map(|all| all.flatten().map(|e| e.file_name()).collect::<Vec<_>>())
            .unwrap_or_default();
        let ours = names.iter().all(|n| FILES.iter().any(|f| n == f));
        let dead = File::open(path.join("pid")).is_ok_and(|pid| !locked(&pid));
        if ours && dead {
            for name in names.iter().filter(|n| *n != "pid") {
                let _ = std::fs::remove_file(path.join(name));
            }
            let _ = std::fs::remove_file(path.join("pid"));
            let _ = std::fs::remove_dir(&path);
        }
    }
}

/// The VM called `name`; the error names those that run.
pub fn find(name: &str) -> Result<Entry, Error> {
    find_in(&base(), name)
}

fn find_in(base: &Path, name: &str) -> Result<Entry, Error> {
    let all = list_in(base)?;
    match all.iter().find(|entry| entry.name == name) {
        Some(entry) => Ok(entry.clone()),
        None => Err(Error::Unknown {
            name: name.into(),
            running: all.into_iter().map(|entry| entry.name).collect(),
        }),
    }
}

/// Where the VM `name` has, or would have, its runtime directory.
pub fn directory_of(name: &str) -> PathBuf {
    base().join(name)
}

/// Whether `name` can be a VM's.
pub fn check_name(name: &str) -> Result<(), Error> {
    let good = (1..=MAX_NAME).contains(&name.len())
        && !name.starts_with(['.', '-'])
        && !name.contains(|c: char| c == '/' || c.is_control());
    if good { Ok(()) } else { Err(Error::BadName(name.chars().take(MAX_NAME).collect())) }
}

/// The directory of all runtime directories.
pub fn base() -> PathBuf {
    // SAFETY: no arguments, cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        return "/run/tern".into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| Path::new(dir).is_absolute()) {
        Some(dir) => Path::new(&dir).join("tern"),
        // SAFETY: no arguments, cannot fail.
        None => format!("/tmp/tern-{}", unsafe { libc::geteuid() }).into(),
    }
}

/// Refuses a directory that others can put things into: in `/tmp` anybody may have made it first.
fn check_owner(base: &Path) -> Result<(), Error> {
    let data = std::fs::symlink_metadata(base).map_err(io_error("look at", base))?;
    // SAFETY: no arguments, cannot fail.
    let ours = data.uid() == unsafe { libc::geteuid() };
    if data.is_dir() && ours && data.mode() & 0o022 == 0 {
        return Ok(());
    }
    let what = "expected a directory of this user's that nobody else may write to; set \
                XDG_RUNTIME_DIR to such a one";
    let source = io::Error::new(io::ErrorKind::PermissionDenied, what);
    Err(io_error("use the directory", base)(source))
}

fn open_pid(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// The lock under which directories in `base` are made and removed; it goes with the file.
fn lock_base(base: &Path, patience: Duration) -> Result<File, Error> {
    check_owner(base)?;
    let path = base.join(".lock");
    let file = open_pid(&path).map_err(io_error("open", &path))?;
    let deadline = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(std::fs::TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(e) => return Err(io_error("lock", &path)(e.into())),
        }
    }
}

fn whole_file() -> libc::flock {
    // SAFETY: flock is plain data for which all zeroes is valid: from 0, to the end.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock
}

fn lock(file: &File) -> io::Result<()> {
    let request = whole_file();
    // SAFETY: request is a live flock.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn locked(file: &File) -> bool {
    let mut request = whole_file();
    // SAFETY: request is a live flock, which the kernel may overwrite.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut request) };
    result == 0 && request.l_type != libc::F_UNLCK as libc::c_short
}

fn read_pid(path: &Path) -> Option<i32> {
    let mut text = String::new();
    File::open(path.join("pid")).ok()?.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok().filter(|pid| *pid > 0)
}

/// The process id of the VM whose directory this is, if it lives.
fn live_pid(path: &Path) -> Option<i32> {
    let file = File::open(path.join("pid")).ok()?;
    if locked(&file) { read_pid(path) } else { None }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_name_is_taken_once_and_free_after() {
        let base = tempfile::tempdir().unwrap();
        let first = RuntimeDir::create_in(base.path(), "vm1").unwrap();
        let error = RuntimeDir::create_in(base.path(), "vm1").unwrap_err().to_string();
        let pid = std::process::id();
        assert_eq!(error, format!("a VM called vm1 runs already (pid {pid})"));
        let all = list_in(base.path()).unwrap();
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].name.as_str(), all[0].pid), ("vm1", pid as i32));
        drop(first);
        assert!(list_in(base.path()).unwrap().is_empty());
        assert!(!base.path().join("vm1").exists());
        RuntimeDir::create_in(base.path(), "vm1").unwrap();
    }

    #[test]
    fn a_dead_vms_directory_is_replaced() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("old");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("pid"), "1\n").unwrap();
        std::fs::write(path.join("qmp.sock"), "").unwrap();
        assert!(list_in(base.path()).unwrap().is_empty());
        let vm = RuntimeDir::create_in(base.path(), "old").unwrap();
        assert!(!vm.qmp_socket().exists());
        assert_eq!(find_in(base.path(), "old").unwrap().pid, std::process::id() as i32);
    }

    /// What a VM that was killed leaves.
    fn dead(base: &Path, name: &str) -> PathBuf {
        let path = base.join(name);
        std::fs::create_dir_all(&path).unwrap();
        for (file, text) in [("pid", "1\n"), ("qmp.sock", ""), ("spec.json", "{}")] {
            std::fs::write(path.join(file), text).unwrap();
        }
        path
    }

    #[test]
    fn whoever_looks_removes_dead_vms_directories_and_nothing_else() {
        let base = tempfile::tempdir().unwrap();
        let alive = RuntimeDir::create_in(base.path(), "alive").unwrap();
        let gone = [dead(base.path(), "a"), dead(base.path(), "b")];
        let foreign = dead(base.path(), "foreign");
        std::fs::write(foreign.join("notes"), "mine").unwrap();
        let empty = base.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        std::fs::write(base.path().join("switch.sock"), "").unwrap();
        assert_eq!(list_in(base.path()).unwrap().len(), 1);
        assert!(gone.iter().all(|path| !path.exists()));
        assert!(foreign.join("pid").exists() && empty.exists() && alive.path.join("pid").exists());
        assert!(base.path().join("switch.sock").exists());
        // A VM that starts does so too.
        let gone = dead(base.path(), "c");
        let _vm = publish_in(base.path(), &mut spec::Machine::default()).unwrap();
        assert!(!gone.exists());
    }

    #[test]
    fn vms_start_and_end_while_others_look_and_remove_dead_ones() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path();
        std::thread::scope(|scope| {
            for t in 0..4 {
                scope.spawn(move || {
                    for n in 0..100 {
                        // Every other time in place of a dead VM.
                        let name = format!("vm{t}");
                        if n % 2 == 0 {
                            // Whole before anybody looks, as what a VM leaves is.
                            let _making = lock_base(base, PATIENCE).unwrap();
                            dead(base, &name);
                        }
                        let vm = RuntimeDir::create_in(base, &name).unwrap();
                        assert!(RuntimeDir::create_in(base, &name).is_err());
                        assert_eq!(find_in(base, &name).unwrap().name, name);
                        assert!(vm.path.join("pid").exists());
                    }
                });
            }
            for _ in 0..2 {
                scope.spawn(|| (0..300).for_each(|_| drop(list_in(base).unwrap())));
            }
        });
        assert!(list_in(base).unwrap().is_empty());
    }

    #[test]
    fn the_machine_is_read_back() {
        let base = tempfile::tempdir().unwrap();
        let vm = RuntimeDir::create_in(base.path(), "a").unwrap();
        let machine = spec::Machine { memory: 7 << 20, ..Default::default() };
        vm.write_spec(&machine).unwrap();
        assert_eq!(find_in(base.path(), "a").unwrap().spec(), Some(machine));
    }

    #[test]
    fn two_machines_of_one_name_are_both_found() {
        let base = tempfile::tempdir().unwrap();
        let name = "é".repeat(32);
        let mut kept = Vec::new();
        for _ in 0..3 {
            let mut machine = spec::Machine { name: Some(name.clone()), ..Default::default() };
            let directory = publish_in(base.path(), &mut machine).unwrap();
            assert_eq!(machine.process.control, Some(directory.qmp_socket()));
            kept.push(directory);
        }
        let mut nameless = spec::Machine::default();
        kept.push(publish_in(base.path(), &mut nameless).unwrap());
        let names: Vec<String> =
            list_in(base.path()).unwrap().into_iter().map(|e| e.name).collect();
        assert_eq!(names.len(), 4);
        assert!(names[0].starts_with("vm-") && names.contains(&name), "{names:?}");
    }

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let open = base.path().join("open");
        DirBuilder::new().create(&open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
        let link = base.path().join("link");
        std::os::unix::fs::symlink(base.path(), &link).unwrap();
        for bad in [&open, &link] {
            let error = publish_in(bad, &mut spec::Machine::default()).unwrap_err().to_string();
            assert!(error.contains("XDG_RUNTIME_DIR"), "{error}");
            assert!(list_in(bad).is_err());
            assert!(!bad.join(".lock").exists());
        }
    }

    #[test]
    fn bad_names_are_refused_and_unknown_ones_listed() {
        let base = tempfile::tempdir().unwrap();
        for name in ["", "a/b", "..", ".x", "-x", "a\nb", &"x".repeat(65)] {
            let error = RuntimeDir::create_in(base.path(), name).unwrap_err();
            assert!(matches!(error, Error::BadName(_)), "{name}: {error}");
        }
        let _a = RuntimeDir::create_in(base.path(), "alpha").unwrap();
        let _b = RuntimeDir::create_in(base.path(), &"x".repeat(64)).unwrap();
        let error = find_in(base.path(), "beta").unwrap_err().to_string();
        assert!(error.starts_with("no VM called beta runs here; these do: alpha, xxx"), "{error}");
    }
}
