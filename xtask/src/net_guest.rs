//! The guest of the switch's tests: the kernel of the other guests, and a larger initramfs with
//! `tern-net-guest` as its init and Debian's iperf3, ethtool and ping. It is not compressed: a software
//! CPU would take longer to unpack it than to read it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cpio::Archive;
use crate::kernel::{self, Flavour};
use crate::{Result, guest, lab, paths};

const MODULES: &[&str] = &["virtio_pci", "virtio_net", "8021q"];

/// Programs that are taken from this machine, with their libraries.
const PROGRAMS: &[&str] = &["/usr/bin/iperf3", "/usr/sbin/ethtool", "/usr/bin/ping"];

/// The shared libraries that a program loads, and the loader.
fn libraries(program: &str) -> Result<Vec<PathBuf>> {
    let out = Command::new("ldd").arg(program).output();
    let out = out.map_err(|e| format!("ldd does not start: {e}"))?;
    if !out.status.success() {
        let why = String::from_utf8_lossy(&out.stderr).into_owned();
        return Err(format!("{program}: ldd: {why}"));
    }
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let path = |line: &str| line.split_whitespace().find(|w| w.starts_with('/')).map(PathBuf::from);
    Ok(text.lines().filter_map(path).collect())
}

fn add_programs(archive: &mut Archive) -> Result<()> {
    let mut libs = BTreeSet::new();
    archive.dir("usr");
    archive.dir("usr/bin");
    for program in PROGRAMS {
        let name = Path::new(program).file_name().unwrap_or_default().to_string_lossy();
        archive.copy(&format!("usr/bin/{name}"), 0o755, program.as_ref())?;
        libs.extend(libraries(program)?);
    }
    archive.link("usr/bin/flow", "/init");
    let mut dirs = BTreeSet::new();
    for lib in &libs {
        dirs.extend(lib.ancestors().skip(1).filter(|p| p.parent().is_some()).map(Path::to_owned));
    }
    // Sorted, so parents come before children.
    let inside = |path: &Path| path.to_string_lossy().trim_start_matches('/').to_owned();
    for dir in dirs.iter().filter(|d| !matches!(inside(d).as_str(), "usr" | "usr/bin")) {
        archive.dir(&inside(dir));
    }
    libs.iter().try_for_each(|lib| archive.copy(&inside(lib), 0o755, lib))
}

/// Builds the initramfs when that has not been done for the present sources:
/// target/lab/guest/net-initramfs.cpio.
pub fn ensure() -> Result<PathBuf> {
    let dir = paths::lab().join("guest");
    std::fs::create_dir_all(&dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
    let init = guest::build_init("tern-net-guest")?;
    let _lock = lab::lock::hold(&paths::lab().join(".lock"))?;
    let kernel = kernel::ensure(Flavour::Cloud)?;
    let mut archive = guest::archive(&init, &kernel, MODULES)?;
    add_programs(&mut archive)?;
    let path = dir.join("net-initramfs.cpio");
    guest::write(&path, archive.finish())?;
    Ok(path)
}
