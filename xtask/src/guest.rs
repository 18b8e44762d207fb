//! The guest that tests, demo and benchmarks boot: Debian's cloud kernel, and an initramfs with
//! `tern-guest` as its init, the modules that it needs, and busybox for the curious.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cpio::Archive;
use crate::kernel::{self, Flavour, Kernel};
use crate::{Result, lab, paths};

/// In loading order; what one needs comes before it.
const MODULES: &[&str] =
    &["virtio_pci", "virtio_net", "virtio_blk", "virtio_rng", "virtio_balloon", "button", "evdev"];

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// What a VMM boots.
pub struct Guest {
    /// Debian's cloud kernel, a bzImage.
    pub kernel: PathBuf,
    /// The same kernel as the ELF image that is packed in it, with a PVH entry.
    pub elf: PathBuf,
    /// Its initramfs, with `tern-guest` as init.
    pub initramfs: PathBuf,
}

/// Builds the static `binary` of the package e2e.
pub fn build_init(binary: &str) -> Result<PathBuf> {
    let target = paths::target().join("guest");
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "--release", "-p", "e2e", "--bin", binary, "--target", TRIPLE])
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
    Ok(target.join(TRIPLE).join("release").join(binary))
}

/// A number that changes with the bytes (FNV-1a): tells whether something has to be built anew.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

/// An archive with an init, busybox, and kernel modules; more can be added.
pub fn archive(init: &Path, kernel: &Kernel, modules: &[&str]) -> Result<Archive> {
    let mut archive = Archive::new();
    for dir in ["bin", "dev", "proc", "sys", "tmp", "modules"] {
        archive.dir(dir);
    }
    archive.char_device("dev/console", 5, 1);
    archive.copy("init", 0o755, init)?;
    archive.copy("bin/busybox", 0o755, "/bin/busybox".as_ref())?;
    archive.link("bin/sh", "busybox");
    let mut order = String::new();
    for path in kernel.module_files(modules)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        archive.copy(&format!("modules/{name}"), 0o644, &path)?;
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    Ok(archive)
}

/// Writes a file.
pub fn write(path: &Path, data: impl AsRef<[u8]>) -> Result<()> {
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

/// Where a bzImage's payload is in its file, and its bytes. Source: Linux, "The Linux/x86 Boot
/// Protocol", setup_sects, payload_offset and payload_length.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let u32_at = |at: usize| {
        image.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize)
    };
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        n => usize::from(n),
    };
    let start = (sectors + 1) * 512 + u32_at(0x248)?;
    // The last four bytes are the unpacked size, and no part of the packed stream.
    image.get(start..start.checked_add(u32_at(0x24c)?)?.checked_sub(4)?)
}

/// Unpacks the ELF kernel that is in a bzImage.
fn unpack_elf(image: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(image).map_err(|e| format!("cannot read {}: {e}", image.display()))?;
    let what = || format!("{} has no payload that can be unpacked", image.display());
    let packed = payload(&bytes).ok_or_else(what)?;
    let program = match packed.get(..4).ok_or_else(what)? {
        [0x02, 0x21, 0x4c, 0x18] => "lz4",
        [0xfd, b'7', b'z', b'X'] => "xz",
        [0x28, 0xb5, 0x2f, 0xfd] => "zstd",
        [0x1f, 0x8b, ..] => "gzip",
        _ => return Err(what()),
    };
    let (raw, part) = (to.with_extension("packed"), to.with_extension("part"));
    write(&raw, packed)?;
    let file = |path: &Path, opened: std::io::Result<File>| {
        opened.map_err(|e| format!("{}: {e}", path.display()))
    };
    let status = Command::new(program)
        .arg("-dc")
        .stdin(file(&raw, File::open(&raw))?)
        .stdout(file(&part, File::create(&part))?)
        .status()
        .map_err(|e| format!("{program} does not start: {e}"))?;
    let _ = fs::remove_file(&raw);
    if !status.success() {
        return Err(format!("{}: {program} failed ({status})", what()));
    }
    fs::rename(&part, to).map_err(|e| format!("cannot write {}: {e}", to.display()))
}

/// Builds the guest when that has not been done for the present sources:
/// target/lab/guest/{vmlinuz,initramfs.cpio,initramfs.cpio.gz}.
pub fn ensure() -> Result<Guest> {
    let dir = paths::lab().join("guest");
    fs::create_dir_all(&dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
    let init = build_init("tern-guest")?;
    let _lock = lab::lock::hold(&paths::lab().join(".lock"))?;
    let kernel = kernel::ensure(Flavour::Cloud)?;
    let guest = Guest {
        kernel: dir.join("vmlinuz"),
        elf: dir.join("vmlinux"),
        initramfs: dir.join("initramfs.cpio.gz"),
    };
    let plain = dir.join("initramfs.cpio");
    let bytes = archive(&init, &kernel, MODULES)?.finish();
    let stamp = format!("{} {:016x}", kernel.version, fingerprint(&bytes));
    let stamp_file = dir.join("stamp");
    if guest.elf.exists() && fs::read_to_string(&stamp_file).is_ok_and(|s| s == stamp) {
        return Ok(guest);
    }
    let _ = fs::remove_file(&stamp_file);
    fs::copy(kernel.image(), &guest.kernel)
        .map_err(|e| format!("cannot copy the guest's kernel: {e}"))?;
    unpack_elf(&guest.kernel, &guest.elf)?;
    write(&plain, bytes)?;
    compress(&plain, &guest.initramfs)?;
    write(&stamp_file, stamp)?;
    Ok(guest)
}
