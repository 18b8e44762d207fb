//! A lock between several runs of this program.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::Result;

/// Waits until no other process holds the lock at `path`; it is released with the value.
pub fn hold(path: &Path) -> Result<File> {
    let file = File::create(path).map_err(|e| format!("cannot make {}: {e}", path.display()))?;
    // SAFETY: flock takes a descriptor, which `file` keeps open, and no memory.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
        return Err(format!("cannot lock {}: {}", path.display(), std::io::Error::last_os_error()));
    }
    Ok(file)
}
