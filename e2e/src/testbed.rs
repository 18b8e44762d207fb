//! What the end-to-end tests stand on: where the VMM and the guest are, and a directory and a
//! network for each test.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::Context;
use crate::network::{self, Network, Tap};
use crate::vmm::{Config, Vmm};
use crate::{Result, failure};

/// A guest boots in this time, also on the lab host with something else running.
pub const BOOT: Duration = Duration::from_secs(90);

/// One test's files and network. To be dropped after the test's VMMs: when the test has failed, it
/// tells how they stood.
pub struct Bed {
    /// Its directory.
    pub dir: PathBuf,
    /// Its network; the thread that made the bed is in it.
    pub network: Network,
    name: String,
    started: u32,
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from)
}

/// The VMM under test.
pub fn vmm() -> PathBuf {
    variable("TERN_VMM").unwrap_or_else(|| "tern".into())
}

/// Whether that is Tern, not another VMM that judges the tests.
pub fn is_tern() -> bool {
    vmm().file_name().is_some_and(|n| n == "tern")
}

impl Bed {
    /// Prepares a test, or says why it does not run here.
    ///
    /// # Panics
    /// When tests are to run but this host has not what they need.
    pub fn new(name: &str) -> Option<Self> {
        if std::env::var_os("TERN_E2E").is_none_or(|v| v != "1") {
            println!(
                "skipped: {name} needs guests; `cargo xtask test` runs it (TERN_E2E is not set)"
            );
            return None;
        }
        let dir = std::env::temp_dir().join(format!("tern-e2e-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).expect("the test's directory");
        let network = Network::new().expect("the test's network");
        Some(Self { dir, network, name: name.to_owned(), started: 0 })
    }

    /// A VM of 256 MiB and one CPU with nothing but a serial line; to be changed as a test needs it.
    pub fn config(&mut self) -> Config {
        self.started += 1;
        Config {
            program: vmm(),
            name: format!("vm{}", self.started),
            kvm: true,
            memory_mib: 256,
            cpus: 1,
            kernel: variable("TERN_GUEST_KERNEL").unwrap_or_default(),
            initrd: variable("TERN_GUEST_INITRD").unwrap_or_default(),
            append: String::new(),
            disk: None,
            incoming: None,
            extra: Vec::new(),
        }
    }

    /// The same with network, disk and work.
    pub fn working(&mut self) -> Result<Config> {
        let disk = self.disk("disk.raw", 64 << 20)?;
        let mut config = self.config();
        config.append = format!(
            "tern.ip={}/{} tern.mem=64 tern.rate=500 tern.disk=2048 tern.tcp=512",
            network::GUEST,
            network::PREFIX
        );
        config.disk = Some(disk);
        Ok(config)
    }

    /// A raw image of so many bytes; the same each time for a name.
    pub fn disk(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.dir.join(name);
        if !path.exists() {
            fs::File::create(&path)
                .and_then(|f| f.set_len(bytes))
                .context(|| format!("{}", path.display()))?;
        }
        Ok(path)
    }

    /// Starts a VM without a network.
    pub fn start(&self, config: &Config) -> Result<Vmm> {
        config.start(&self.dir, None)
    }

    /// Starts a VM on the network.
    pub fn start_on_network(&mut self, config: &Config) -> Result<(Vmm, Tap)> {
        let tap = self.network.tap()?;
        Ok((config.start(&self.dir, Some(&tap))?, tap))
    }

    /// An address for a migration to listen at.
    pub fn uri(&self) -> String {
        format!("unix:{}", self.dir.join(format!("migration{}", self.started)).display())
    }
}

/// Copies logs, not disks.
fn keep_logs(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    let _ = fs::create_dir_all(to);
    for entry in fs::read_dir(from).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
        let into = to.join(entry.file_name());
        if fs::create_dir_all(&into).is_ok() {
            for log in ["serial.log", "stderr.log", failure::STATE] {
                let _ = fs::copy(entry.path().join(log), into.join(log));
            }
        }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let told = failure::tell(&self.dir);
            eprintln!("{} failed. Its VMMs:\n{told}", self.name);
            if let Some(logs) = variable("TERN_E2E_LOGS") {
                let logs = logs.join(&self.name);
                keep_logs(&self.dir, &logs);
                let _ = fs::write(logs.join("told.txt"), told);
                eprintln!("whole logs of {} are in {}", self.name, logs.display());
            }
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}
