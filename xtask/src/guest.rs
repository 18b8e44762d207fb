//! The guest that tests, demo and benchmarks boot.

use std::path::PathBuf;

use crate::{Result, kernel, paths};

/// What a VMM boots.
pub struct Guest {
    /// Debian's cloud kernel, a bzImage.
    pub kernel: PathBuf,
    /// Its initramfs, with `tern-guest` as init.
    pub initramfs: PathBuf,
}

/// Builds the guest when that has not been done for the present sources.
pub fn ensure() -> Result<Guest> {
    let dir = paths::lab().join("guest");
    std::fs::create_dir_all(&dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
    let kernel = kernel::ensure(kernel::Flavour::Cloud)?;
    let vmlinuz = dir.join("vmlinuz");
    std::fs::copy(kernel.image(), &vmlinuz)
        .map_err(|e| format!("cannot copy the guest's kernel: {e}"))?;
    Ok(Guest { kernel: vmlinuz, initramfs: dir.join("initramfs.cpio.gz") })
}
