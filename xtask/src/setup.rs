//! Debian packages: which a task needs, which are missing, and getting them.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use crate::Result;

/// What the lab host and the guests are made from.
pub const LAB: &[&str] = &[
    "qemu-system-x86",
    "busybox-static",
    "kmod",
    "iproute2",
    "apt",
    "gcc",
    "libc6-dev",
    "lz4",
    "xz-utils",
    "zstd",
];
/// What the demo runs beside that.
pub const DEMO: &[&str] = &["iputils-ping"];
/// The switch's peer and its load, for `bench switch`.
pub const SWITCH: &[&str] = &["openvswitch-switch-dpdk", "dpdk", "dpdk-dev"];
/// What the tests use as independent peers beside that.
pub const TEST: &[&str] = &["iputils-ping", "iperf3", "ethtool", "python3-venv", "dpdk-dev"];

/// Package lists older than this are fetched again before anything is installed.
const LISTS_ARE_STALE: Duration = Duration::from_secs(24 * 3600);

fn installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Abbrev}", package])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|out| out.stdout.starts_with(b"ii"))
}

/// Whether this process may do everything.
pub fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|out| out.stdout.trim_ascii() == b"0")
}

fn sudo_works() -> bool {
    Command::new("sudo")
        .args(["-n", "true"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

fn apt_get(args: &[&str]) -> Result<()> {
    let mut command = if is_root() {
        Command::new("apt-get")
    } else {
        let mut c = Command::new("sudo");
        c.args(["-n", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        c
    };
    let status = command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-q", "-o", "DPkg::Lock::Timeout=300"])
        .args(args)
        .stdin(Stdio::null())
        .status()
        .map_err(|e| format!("apt-get does not start: {e}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("apt-get {} failed ({status})", args.join(" ")))
    }
}

/// Whether apt knows packages at all and heard of them lately.
fn lists_are_fresh() -> bool {
    let lists = Path::new("/var/lib/apt/lists");
    let Ok(entries) = std::fs::read_dir(lists) else { return false };
    let has_packages =
        entries.flatten().any(|e| e.file_name().to_string_lossy().contains("_Packages"));
    let age = std::fs::metadata(lists)
        .and_then(|m| m.modified())
        .ok()
        .and_then(|t| SystemTime::now().duration_since(t).ok());
    has_packages && age.is_some_and(|a| a < LISTS_ARE_STALE)
}

/// Fetches apt's package lists when they are missing or old.
///
/// # Errors
/// Without the rights for it, the line to run; otherwise that apt-get failed.
pub fn refresh_lists() -> Result<()> {
    if lists_are_fresh() {
        return Ok(());
    }
    if !is_root() && !sudo_works() {
        return Err("apt's package lists are missing or old; run this, then try again:\n  sudo apt-get update".into());
    }
    apt_get(&["update"])
}

/// Makes sure that the Debian packages `wanted` are there.
///
/// # Errors
/// When something is missing and this user may not install it: the one line to run.
pub fn ensure(wanted: &[&str]) -> Result<()> {
    let missing: Vec<&str> = wanted.iter().copied().filter(|p| !installed(p)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !is_root() && !sudo_works() {
        return Err(format!(
            "Debian packages are missing; run this, then try again:\n  \
             sudo apt-get update && sudo apt-get install --no-install-recommends -y {}",
            missing.join(" ")
        ));
    }
    eprintln!("xtask: installing {}", missing.join(" "));
    refresh_lists()?;
    let mut args = vec!["install", "--no-install-recommends", "-y"];
    args.extend(missing);
    apt_get(&args)
}
