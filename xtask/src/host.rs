//! Where guests run: on this host's KVM when that can run Linux, otherwise on the lab host.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::{Result, lab, paths, setup};

/// The place for guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// This machine.
    Native,
    /// An emulated machine on it.
    Lab,
}

impl Host {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Host::Native => "native",
            Host::Lab => "lab",
        }
    }

    /// Asks Tern's own probe, which runs a tiny guest.
    pub fn choose(tern: &Path) -> Self {
        let probe = Command::new(tern)
            .args(["doctor", "--probe-kvm"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        let host = if probe.is_ok_and(|s| s.success()) { Host::Native } else { Host::Lab };
        match host {
            Host::Native => println!("Guests run on this host's own KVM."),
            Host::Lab => {
                println!("This host's KVM cannot run Linux: guests run on the lab host (emulated).")
            }
        }
        host
    }

    /// Runs a program there, with these variables beside this process's own; its exit status.
    pub fn run(self, argv: &[OsString], env: &[(String, String)], timeout: Duration) -> Result<u8> {
        match self {
            Host::Lab => {
                let opts = lab::Options {
                    timeout: Some(timeout),
                    env: env.to_vec(),
                    ..lab::Options::default()
                };
                lab::run(argv, &opts)
            }
            Host::Native => native(argv, env, timeout),
        }
    }
}

/// Guests' networks need root's rights, or a user namespace in which one has them.
fn native(argv: &[OsString], env: &[(String, String)], timeout: Duration) -> Result<u8> {
    let mut words: Vec<OsString> = vec![
        "timeout".into(),
        "--foreground".into(),
        "-k".into(),
        "10".into(),
        timeout.as_secs().to_string().into(),
    ];
    if !setup::is_root() {
        words.extend(["unshare", "--user", "--map-root-user", "--net"].map(OsString::from));
    }
    words.extend_from_slice(argv);
    let status = Command::new(&words[0])
        .args(&words[1..])
        .envs(env.iter().map(|(k, v)| (k, v)))
        .stdin(Stdio::null())
        .status()
        .map_err(|e| format!("cannot start {}: {e}", argv[0].to_string_lossy()))?;
    Ok(status.code().map_or(255, |c| c as u8))
}

/// Cargo, in the workspace.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(paths::root()).stdin(Stdio::null());
    command
}

/// Runs a command and complains when it fails.
pub fn must(command: &mut Command, what: &str) -> Result<()> {
    let status = command.status().map_err(|e| format!("{what}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{what} failed ({status})")) }
}

/// Builds binaries of the packages given and gives the directory that they are in.
pub fn build_release(packages: &[&str], binaries: &[&str]) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--release"]);
    for package in packages {
        command.args(["-p", package]);
    }
    for binary in binaries {
        command.args(["--bin", binary]);
    }
    must(&mut command, "the build")?;
    Ok(paths::target().join("release"))
}
