//! Image locks, compatible with QEMU on the same file.
//!
//! Scheme (QEMU, `docs/devel` and the file driver): each permission has a bit number `i`. Who
//! uses permission `i` holds a shared lock on byte `100 + i`; who does not let others use it holds
//! a shared lock on byte `200 + i`. After locking, each side looks whether anybody holds the
//! opposite byte. The locks belong to the open file description (OFD locks), so they live as long
//! as the image is open in any thread and die with the process.
#![allow(unsafe_code)] // fcntl

use std::fs::File;
use std::os::fd::AsRawFd;

use crate::{Error, Result};

const USED_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;
const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];

/// Read data that is consistent.
pub const CONSISTENT_READ: u8 = 1;
/// Change data.
pub const WRITE: u8 = 2;
/// Write what is there already.
pub const WRITE_UNCHANGED: u8 = 4;
/// Change the length.
pub const RESIZE: u8 = 8;

/// Whether image locks are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Locking {
    /// Never.
    Off,
    /// Where the file system has them.
    #[default]
    Auto,
    /// An error where it has not.
    On,
}

/// What an opener does and what it lets others do, as masks of the constants above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permissions {
    pub used: u8,
    pub shared: u8,
}

impl Permissions {
    /// What a guest's disk needs. `share_rw`: other writers are let in.
    pub fn disk(read_only: bool, share_rw: bool) -> Self {
        let used = if read_only { CONSISTENT_READ } else { CONSISTENT_READ | WRITE };
        let shared = CONSISTENT_READ | WRITE_UNCHANGED | RESIZE;
        Self { used, shared: if share_rw { shared | WRITE } else { shared } }
    }

    fn has(mask: u8, bit: usize) -> bool {
        mask & (1 << bit) != 0
    }
}

fn flock(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

fn fcntl(file: &File, command: i32, lock: &mut libc::flock) -> std::io::Result<()> {
    // SAFETY: the fd is open and `lock` is a valid flock that the kernel reads and writes.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, lock) } {
        -1 => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Whether the file system has OFD locks.
pub(crate) fn supported(file: &File) -> bool {
    fcntl(file, libc::F_OFD_GETLK, &mut flock(libc::F_WRLCK, USED_BASE, 1)).is_ok()
}

/// Takes the locks for `wanted`. On an error none is held.
///
/// # Errors
/// [`Error::Locked`] with QEMU's sentence when somebody is in the way.
pub(crate) fn acquire(file: &File, path: &str, wanted: Permissions) -> Result<()> {
    let taken = take(file, path, wanted).and_then(|()| check(file, path, wanted));
    if taken.is_err() {
        let _ = release(file, path);
    }
    taken
}

/// Gives all locks up.
pub(crate) fn release(file: &File, path: &str) -> Result<()> {
    for base in [USED_BASE, UNSHARED_BASE] {
        let mut lock = flock(libc::F_UNLCK, base, NAMES.len() as i64);
        fcntl(file, libc::F_OFD_SETLK, &mut lock).map_err(|source| Error::File {
            what: "cannot unlock the image",
            path: path.into(),
            source,
        })?;
    }
    Ok(())
}

fn take(file: &File, path: &str, wanted: Permissions) -> Result<()> {
    for (bit, permission) in NAMES.into_iter().enumerate() {
        let bytes = [
            (Permissions::has(wanted.used, bit), USED_BASE, ""),
            (!Permissions::has(wanted.shared, bit), UNSHARED_BASE, "shared "),
        ];
        for (_, base, shared) in bytes.into_iter().filter(|b| b.0) {
            let mut lock = flock(libc::F_RDLCK, base + bit as i64, 1);
            fcntl(file, libc::F_OFD_SETLK, &mut lock).map_err(|e| match e.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => {
                    Error::Locked { shared, permission, path: path.into() }
                }
                _ => Error::File { what: "cannot lock the image", path: path.into(), source: e },
            })?;
        }
    }
    Ok(())
}

fn check(file: &File, path: &str, wanted: Permissions) -> Result<()> {
    for (bit, permission) in NAMES.into_iter().enumerate() {
        let bytes = [
            (Permissions::has(wanted.used, bit), UNSHARED_BASE, ""),
            (!Permissions::has(wanted.shared, bit), USED_BASE, "shared "),
        ];
        for (_, base, shared) in bytes.into_iter().filter(|b| b.0) {
            // Somebody's shared lock shows when we ask for an exclusive one; our own do not.
            let mut lock = flock(libc::F_WRLCK, base + bit as i64, 1);
            fcntl(file, libc::F_OFD_GETLK, &mut lock).map_err(|source| Error::File {
                what: "cannot look at the image's locks",
                path: path.into(),
                source,
            })?;
            if i32::from(lock.l_type) != libc::F_UNLCK {
                return Err(Error::Locked { shared, permission, path: path.into() });
            }
        }
    }
    Ok(())
}
