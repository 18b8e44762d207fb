//! What guest RAM is made of: memfd, a file, or huge pages of either.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{Error, Result};

/// Where RAM comes from (QEMU's memory-backend-* objects).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackingKind {
    /// Anonymous memory of this process alone.
    Anonymous,
    /// A memfd, which other processes can map; `hugetlb` is the huge page size in bytes.
    Memfd { hugetlb: Option<u64> },
    /// A file, or a fresh unlinked file when the path is a directory (hugetlbfs mounts).
    File { path: PathBuf },
}

/// RAM's backing: what, and whether writes are shared with other mappers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    pub kind: BackingKind,
    /// Map shared (vhost-user needs it) instead of private.
    pub share: bool,
    /// Touch every page at start, so that no later access can fail.
    pub prealloc: bool,
}

impl Default for Backing {
    /// A shareable memfd: what vhost-user and hand-over need, at no cost to anyone else.
    fn default() -> Self {
        Self { kind: BackingKind::Memfd { hugetlb: None }, share: true, prealloc: false }
    }
}

/// Opens the object behind `backing`, `size` bytes long. `None` for anonymous memory.
pub(crate) fn open(backing: &Backing, size: u64) -> Result<Option<Arc<File>>> {
    let file = match &backing.kind {
        BackingKind::Anonymous => return Ok(None),
        BackingKind::Memfd { hugetlb } => memfd(*hugetlb)?,
        BackingKind::File { path } => file(path)?,
    };
    let metadata =
        file.metadata().map_err(|source| Error::Host { what: "RAM's backing".into(), source })?;
    if let BackingKind::File { path } = &backing.kind {
        let wrong = |why: String| Error::Layout(format!("memory file {}: {why}", path.display()));
        if !metadata.is_file() {
            return Err(wrong("neither a regular file nor a directory".into()));
        }
        // Somebody else's file is not made longer, and what is in it not taken for RAM.
        if (1..size).contains(&metadata.len()) {
            return Err(wrong(format!("has {} bytes, {size} are needed", metadata.len())));
        }
    }
    let huge = page_size(&file);
    if !size.is_multiple_of(huge) {
        return Err(Error::Layout(format!(
            "{size} bytes of RAM are not whole huge pages of {huge} bytes"
        )));
    }
    if metadata.len() < size {
        file.set_len(size).map_err(|source| Error::Host {
            what: format!("cannot make the RAM's backing {size} bytes long"),
            source,
        })?;
    }
    Ok(Some(Arc::new(file)))
}

fn memfd(hugetlb: Option<u64>) -> Result<File> {
    let mut flags = libc::MFD_CLOEXEC;
    if let Some(size) = hugetlb {
        if !size.is_power_of_two() {
            return Err(Error::Layout(format!("huge page size {size} is not a power of two")));
        }
        flags |= libc::MFD_HUGETLB | (size.trailing_zeros() << libc::MFD_HUGE_SHIFT);
    }
    // SAFETY: the name is a valid C string; the kernel returns a new fd or -1.
    let fd = unsafe { libc::memfd_create(c"tern-ram".as_ptr(), flags) };
    if fd < 0 {
        let source = std::io::Error::last_os_error();
        return Err(Error::Host { what: "cannot create a memfd for RAM".into(), source });
    }
    // SAFETY: fd is new and owned by nobody else.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn file(path: &std::path::Path) -> Result<File> {
    let host = |source| Error::Host { what: format!("memory file {}", path.display()), source };
    let mut options = File::options();
    options.read(true).write(true);
    if !path.is_dir() {
        // Non-blocking: a FIFO is refused later instead of being waited for.
        options.custom_flags(libc::O_NONBLOCK);
        return options.create(true).truncate(false).open(path).map_err(host);
    }
    let name = path.join(format!("tern-ram-{}", std::process::id()));
    let file = options.create_new(true).open(&name).map_err(host)?;
    std::fs::remove_file(&name).map_err(host)?;
    Ok(file)
}

/// Bytes that the file system of `path` has room for, when they are fewer than `size`: RAM in a file
/// there that is not allocated beforehand would end its process when the guest gets so far.
pub fn lacks_room(path: &Path, size: u64) -> Option<u64> {
    // The file is made when it is not there.
    let place = if path.exists() { path } else { path.parent()? };
    let place = if place.as_os_str().is_empty() { Path::new(".") } else { place };
    let name = CString::new(place.as_os_str().as_bytes()).ok()?;
    // SAFETY: statfs is plain data, for which all zeroes is valid.
    let mut s: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the name ends with a zero; s outlives the call, which writes only into it.
    if unsafe { libc::statfs(name.as_ptr(), &mut s) } != 0 {
        return None;
    }
    let has = match path.metadata() {
        Ok(data) if data.is_file() => data.blocks() * 512,
        _ => 0,
    };
    let room = s.f_bavail.saturating_mul(s.f_bsize as u64).saturating_add(has);
    (room < size).then_some(room)
}

/// Page size in bytes of what lies behind `file`.
pub(crate) fn page_size(file: &File) -> u64 {
    const HUGETLBFS_MAGIC: i64 = 0x958458f6;
    // SAFETY: statfs is plain data, for which all zeroes is valid.
    let mut s: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: s outlives the call, which writes only into it.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &mut s) } == 0 && s.f_type == HUGETLBFS_MAGIC {
        return s.f_bsize as u64;
    }
    crate::PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_on_a_file_system_is_known() {
        let here = std::env::temp_dir();
        assert_eq!(lacks_room(&here, 0), None);
        assert_eq!(lacks_room(Path::new("not-there"), 0), None);
        assert!(lacks_room(Path::new("not-there"), u64::MAX).is_some());
        assert!(lacks_room(&here, u64::MAX).is_some());
        assert!(lacks_room(Path::new("/proc"), 1 << 20).is_some(), "it holds nothing");
    }

    #[test]
    fn only_files_of_the_right_size_become_ram() {
        let path = std::env::temp_dir().join(format!("tern-backing-{}", std::process::id()));
        let kind = BackingKind::File { path: path.clone() };
        let backing = Backing { kind, share: true, prealloc: false };
        std::fs::write(&path, "a letter").unwrap();
        assert!(open(&backing, 8192).unwrap_err().to_string().contains("has 8 bytes"));
        assert_eq!(std::fs::read(&path).unwrap(), b"a letter");
        std::fs::write(&path, "").unwrap();
        assert_eq!(open(&backing, 8192).unwrap().unwrap().metadata().unwrap().len(), 8192);
        assert!(open(&backing, 4096).is_ok());
        std::fs::remove_file(&path).unwrap();
        let device = BackingKind::File { path: "/dev/zero".into() };
        let device = Backing { kind: device, ..backing };
        assert!(open(&device, 4096).unwrap_err().to_string().contains("neither a regular file"));
    }
}
