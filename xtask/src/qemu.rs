//! The newest QEMU that Debian has for bookworm, unpacked from the backports suite under
//! target/peers/ and not installed: the peer that Tern is measured against, and what emulates the
//! lab host. Its libraries are those that the stable QEMU needs too.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::{Result, lab, paths, setup};

const SUITE: &str = "bookworm-backports";
const PACKAGES: [&str; 4] =
    ["qemu-system-x86", "qemu-system-data", "qemu-system-common", "seabios"];

/// How long the lab host does without before the backports are asked again.
const ASK_AGAIN: Duration = Duration::from_secs(3600);

/// An unpacked QEMU.
pub struct Qemu {
    root: PathBuf,
    /// For example 10.0.2.
    pub version: String,
}

impl Qemu {
    /// Its program with the options that say where its firmware is.
    pub fn command(&self) -> Command {
        let mut command = Command::new(self.root.join("usr/bin/qemu-system-x86_64"));
        for dir in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(self.root.join(dir));
        }
        command
    }

    /// The same as words of a command line.
    pub fn words(&self) -> Vec<String> {
        let command = self.command();
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words.map(|w| w.to_string_lossy().into_owned()).collect()
    }

    fn at(root: PathBuf) -> Result<Self> {
        let mut qemu = Self { root, version: String::new() };
        let out = qemu.command().arg("--version").output();
        let out = out.map_err(|e| format!("the unpacked QEMU does not start: {e}"))?;
        let text = String::from_utf8_lossy(&out.stdout);
        let version = text.split("version ").nth(1).and_then(|v| v.split_whitespace().next());
        qemu.version = version
            .ok_or_else(|| {
                let why = String::from_utf8_lossy(&out.stderr).into_owned();
                format!("the unpacked QEMU does not say its version: {why}")
            })?
            .to_owned();
        Ok(qemu)
    }
}

fn apt(state: &Path, args: &[&str], at: &Path) -> Result<()> {
    let status = Command::new("apt-get")
        .args(["-q", "-o", "APT::Sandbox::User=root", "-o", "Dir::Etc::SourceParts=/dev/null"])
        .arg("-o")
        .arg(format!("Dir::Etc::SourceList={}", state.join("backports.sources").display()))
        .arg("-o")
        .arg(format!("Dir::State::Lists={}", state.join("lists").display()))
        .args(args)
        .current_dir(at)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .map_err(|e| format!("apt-get does not start: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("apt-get {} failed", args.join(" "))) }
}

/// Fetches with package lists of our own, so that the system's stay as they are.
fn fetch(dir: &Path) -> Result<()> {
    let wrong = |e: std::io::Error| format!("{}: {e}", dir.display());
    let _ = fs::remove_dir_all(dir);
    let (state, root) = (dir.join("apt"), dir.join("root"));
    for d in [&state.join("lists/partial"), &root] {
        fs::create_dir_all(d).map_err(wrong)?;
    }
    let source = format!(
        "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: bookworm {SUITE}\n\
         Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    );
    fs::write(state.join("backports.sources"), source).map_err(wrong)?;
    apt(&state, &["update"], dir)?;
    let wanted: Vec<String> = PACKAGES.iter().map(|p| format!("{p}/{SUITE}")).collect();
    let mut args = vec!["download"];
    args.extend(wanted.iter().map(String::as_str));
    apt(&state, &args, dir)?;
    for entry in fs::read_dir(dir).map_err(wrong)?.flatten() {
        let deb = entry.path();
        if deb.extension().is_none_or(|x| x != "deb") {
            continue;
        }
        let status = Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&root).status();
        if !status.is_ok_and(|s| s.success()) {
            return Err(format!("cannot unpack {}", deb.display()));
        }
        fs::remove_file(&deb).map_err(wrong)?;
    }
    fs::remove_dir_all(&state).map_err(wrong)?;
    fs::write(dir.join(".complete"), "").map_err(wrong)
}

fn home() -> PathBuf {
    paths::target().join("peers").join("qemu")
}

/// The newest QEMU of the backports; once it is there, it is used without asking apt again.
///
/// # Errors
/// When it is not there and cannot be fetched.
pub fn newest() -> Result<Qemu> {
    setup::ensure(setup::LAB)?;
    let dir = home();
    fs::create_dir_all(paths::lab()).map_err(|e| format!("{}: {e}", paths::lab().display()))?;
    let _lock = lab::lock::hold(&paths::lab().join(".qemu.lock"))?;
    if !dir.join(".complete").exists() {
        eprintln!("xtask: fetching QEMU from {SUITE}");
        fetch(&dir)?;
    }
    Qemu::at(dir.join("root"))
}

/// The program that emulates the lab host. The stable release's 7.2 lost guests more often than 10.0
/// did (docs/architecture.md, "The lab"), so it is used only where the other cannot be had, and that
/// is said.
pub fn emulator() -> Command {
    let unavailable = home().with_extension("unavailable");
    let asked_lately = fs::metadata(&unavailable)
        .and_then(|m| m.modified())
        .is_ok_and(|at| at.elapsed().is_ok_and(|age| age < ASK_AGAIN));
    if !asked_lately {
        match newest() {
            Ok(qemu) => return qemu.command(),
            Err(e) => {
                eprintln!(
                    "xtask: {e}: the lab host runs on the installed QEMU, whose emulation of KVM \
                     may now and then lose a guest"
                );
                let _ = fs::write(&unavailable, e);
            }
        }
    }
    Command::new("qemu-system-x86_64")
}
