//! The guest that tests, demo and benchmarks boot: Debian's cloud kernel, and an initramfs with
//! `tern-guest` as its init, the modules that it needs, and busybox for the curious.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cpio::Archive;
use crate::kernel::{self, Flavour};
use crate::{Result, lab, paths};

/// In loading order; what one needs comes before it.
const MODULES: &[&str] =
    &["virtio_pci", "virtio_net", "virtio_blk", "virtio_rng", "virtio_balloon"];

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// What a VMM boots.
pub struct Guest {
    /// Debian's cloud kernel, a bzImage.
    pub kernel: PathBuf,
    /// Its initramfs, with `tern-guest` as init.
    pub initramfs: PathBuf,
}

/// Builds the static `tern-guest`.
fn build_init() -> Result<PathBuf> {
    let target = paths::target().join("guest");
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([
            "build",
            "--quiet",
            "--release",
            "-p",
            "e2e",
            "--bin",
            "tern-guest",
            "--target",
            TRIPLE,
        ])
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .current_dir(paths::root())
        .stdin(Stdio::null())
        .status()
        .map_err(|e| format!("cargo does not start: {e}"))?;
    if !status.success() {
        return Err("the guest's init does not build".into());
    }
    Ok(target.join(TRIPLE).join("release/tern-guest"))
}

/// A number that changes with the bytes (FNV-1a): tells whether something has to be built anew.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

fn archive(init: &Path, kernel: &kernel::Kernel) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for dir in ["bin", "dev", "proc", "sys", "tmp", "modules"] {
        archive.dir(dir);
    }
    archive.char_device("dev/console", 5, 1);
    archive.copy("init", 0o755, init)?;
    archive.copy("bin/busybox", 0o755, "/bin/busybox".as_ref())?;
    archive.link("bin/sh", "busybox");
    let mut order = String::new();
    for path in kernel.module_files(MODULES)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        archive.copy(&format!("modules/{name}"), 0o644, &path)?;
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    Ok(archive.finish())
}

fn write(path: &Path, data: impl AsRef<[u8]>) -> Result<()> {
    fs::write(path, data).map_err(|e| format!("cannot write {}: {e}", path.display()))
}

fn compress(from: &Path, to: &Path) -> Result<()> {
    let part = to.with_extension("part");
    let out = File::create(&part).map_err(|e| format!("cannot write {}: {e}", part.display()))?;
    let status = Command::new("gzip")
        .args(["-6", "-n", "-c"])
        .arg(from)
        .stdout(out)
        .status()
        .map_err(|e| format!("gzip does not start: {e}"))?;
    if !status.success() {
        return Err(format!("gzip cannot compress {}", from.display()));
    }
    fs::rename(&part, to).map_err(|e| format!("cannot write {}: {e}", to.display()))
}

/// Builds the guest when that has not been done for the present sources:
/// target/lab/guest/{vmlinuz,initramfs.cpio,initramfs.cpio.gz}.
pub fn ensure() -> Result<Guest> {
    let dir = paths::lab().join("guest");
    fs::create_dir_all(&dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
    let init = build_init()?;
    let _lock = lab::lock::hold(&paths::lab().join(".lock"))?;
    let kernel = kernel::ensure(Flavour::Cloud)?;
    let guest = Guest { kernel: dir.join("vmlinuz"), initramfs: dir.join("initramfs.cpio.gz") };
    let plain = dir.join("initramfs.cpio");
    let bytes = archive(&init, &kernel)?;
    let stamp = format!("{} {:016x}", kernel.version, fingerprint(&bytes));
    let stamp_file = dir.join("stamp");
    if fs::read_to_string(&stamp_file).is_ok_and(|s| s == stamp) {
        return Ok(guest);
    }
    let _ = fs::remove_file(&stamp_file);
    fs::copy(kernel.image(), &guest.kernel)
        .map_err(|e| format!("cannot copy the guest's kernel: {e}"))?;
    write(&plain, bytes)?;
    compress(&plain, &guest.initramfs)?;
    write(&stamp_file, stamp)?;
    Ok(guest)
}
