//! What every contestant needs of the host: huge pages, a mounted hugetlbfs and a directory of its
//! own. All is given back at the end, also after an error or an interrupt from the terminal.
#![allow(unsafe_code)] // signals, prctl

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{Result, host, setup};

/// How many huge pages of 2 MiB the host keeps: 512 MiB for each of two DPDK processes, and what
/// rings of many ports take.
const HUGE_PAGES: u64 = 1024;
const NR_HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

/// The directory with sockets, databases and logs, on a host that has huge pages.
pub struct Stage {
    pub dir: PathBuf,
    given_back: GivenBack,
}

/// What has to be undone.
#[derive(Clone)]
struct GivenBack {
    pages: u64,
    mount: PathBuf,
}

impl GivenBack {
    fn undo(&self) {
        let umount = Command::new("umount").arg("-l").arg(&self.mount).status();
        if !umount.is_ok_and(|s| s.success()) {
            eprintln!("xtask: cannot unmount {}", self.mount.display());
        }
        let _ = std::fs::remove_dir(&self.mount);
        if let Err(e) = std::fs::write(NR_HUGE_PAGES, self.pages.to_string()) {
            eprintln!("xtask: {NR_HUGE_PAGES} cannot be set back to {}: {e}", self.pages);
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.given_back.undo();
    }
}

fn huge_pages() -> Result<u64> {
    let text = std::fs::read_to_string(NR_HUGE_PAGES);
    let text = text.map_err(|e| format!("{NR_HUGE_PAGES}: {e}: this kernel has no huge pages"))?;
    text.trim().parse().map_err(|_| format!("{NR_HUGE_PAGES} is no number"))
}

/// Blocks SIGINT and SIGTERM in this thread and those that it starts; programs that they start have
/// them unblocked again.
fn block_signals() -> libc::sigset_t {
    // SAFETY: the set is made by sigemptyset before it is used, and only read by the last call.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        set
    }
}

impl Stage {
    /// Takes huge pages and mounts hugetlbfs in `dir`, which is made anew.
    ///
    /// # Errors
    /// Without root's rights, or when the host has not so much memory in one piece.
    pub fn new(dir: PathBuf) -> Result<Self> {
        if !setup::is_root() {
            return Err("bench switch sets huge pages and mounts hugetlbfs: run it as root".into());
        }
        let mount = dir.join("huge");
        if mount.exists() {
            // Of a run that was killed.
            let _ = Command::new("umount").args(["-q", "-l"]).arg(&mount).status();
        }
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&mount).map_err(|e| format!("{}: {e}", mount.display()))?;
        let pages = huge_pages()?;
        let signals = block_signals();
        let given_back = GivenBack { pages, mount: mount.clone() };
        let on_signal = given_back.clone();
        std::thread::spawn(move || {
            let mut signal = 0;
            // SAFETY: the set was made above, and both are this thread's own.
            unsafe { libc::sigwait(&signals, &mut signal) };
            on_signal.undo();
            // Programs that were started die with this one.
            std::process::exit(128 + signal);
        });
        let mut mounting = Command::new("mount");
        mounting.args(["-t", "hugetlbfs", "none"]).arg(&mount);
        host::must(&mut mounting, "mounting hugetlbfs")?;
        let stage = Self { dir, given_back };
        std::fs::write(NR_HUGE_PAGES, pages.max(HUGE_PAGES).to_string())
            .map_err(|e| format!("{NR_HUGE_PAGES}: {e}"))?;
        let have = huge_pages()?;
        if have < HUGE_PAGES {
            return Err(format!(
                "{HUGE_PAGES} huge pages of 2 MiB are needed, and the host found only {have}: \
                 free memory, or start again after a reboot"
            ));
        }
        Ok(stage)
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// `program`, whose output goes to the file `log`, and which dies with this process.
    pub fn command(&self, program: impl AsRef<Path>, log: &str) -> Result<Command> {
        let path = self.path(log);
        let failed = |e: std::io::Error| format!("{}: {e}", path.display());
        let file = std::fs::File::create(&path).map_err(failed)?;
        let mut command = Command::new(program.as_ref());
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone().map_err(failed)?)
            .stderr(file)
            .current_dir(&self.dir);
        // SAFETY: system calls with numbers and constant strings only, which are safe between fork and
        // exec.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // A session of its own, which the scheduler prefers: what else runs on the machine
                // takes less of the figures, of all contestants and of the load alike.
                libc::setsid();
                libc::setpriority(libc::PRIO_PROCESS, 0, -20);
                let group = libc::open(c"/proc/self/autogroup".as_ptr(), libc::O_WRONLY);
                if group >= 0 {
                    libc::write(group, c"-20".as_ptr().cast(), 3);
                    libc::close(group);
                }
                Ok(())
            });
        }
        Ok(command)
    }

    /// What `log` says so far.
    pub fn log(&self, log: &str) -> String {
        std::fs::read_to_string(self.path(log)).unwrap_or_default()
    }
}
