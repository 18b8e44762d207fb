//! Raw images: regular files and block devices of the host.
#![allow(unsafe_code)] // statx, ioctl

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once};

use crate::locks::{self, Locking, Permissions};
use crate::sync_io::{DirectAlign, Target};
use crate::threads::ThreadEngine;
use crate::uring::UringEngine;
use crate::{Aio, Engine, Error, Image, Result, Topology};

// linux/fs.h: _IO(0x12, 104), 120, 121, 123.
const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKIOMIN: libc::c_ulong = 0x1278;
const BLKIOOPT: libc::c_ulong = 0x1279;
const BLKPBSZGET: libc::c_ulong = 0x127b;

/// How a raw image is opened.
#[derive(Debug, Clone)]
pub struct RawOptions<'a> {
    pub path: &'a Path,
    pub read_only: bool,
    /// Falls back to read-only when it cannot be opened for writing.
    pub auto_read_only: bool,
    /// O_DIRECT.
    pub direct: bool,
    pub no_flush: bool,
    pub locking: Locking,
    pub share_rw: bool,
}

/// See the module.
pub struct RawImage {
    path: String,
    target: Arc<Target>,
    len: AtomicU64,
    read_only: bool,
    topology: Topology,
    /// What to lock, or `None`; and whether it is locked now.
    wanted: Option<Permissions>,
    locked: Mutex<bool>,
}

impl RawImage {
    /// Opens it, without taking locks.
    ///
    /// # Errors
    /// Each names the file and what was wrong with it.
    pub fn open(o: &RawOptions<'_>) -> Result<Self> {
        let path = o.path.display().to_string();
        let (file, read_only) = open_file(o, &path)?;
        let fail = |what| {
            let path = path.clone();
            move |source| Error::File { what, path, source }
        };
        let meta = file.metadata().map_err(fail("cannot look at"))?;
        let kind = meta.file_type();
        let block_device = kind.is_block_device();
        if !kind.is_file() && !block_device {
            let kind = if kind.is_dir() { "a directory" } else { "a special file" };
            return Err(Error::NotAnImage { path, kind });
        }
        let topology = topology(&file, block_device);
        let direct = o.direct.then(|| direct_align(&file, topology.logical as usize));
        let wanted = match o.locking {
            Locking::Off => None,
            _ if locks::supported(&file) => Some(Permissions::disk(read_only, o.share_rw)),
            Locking::Auto => None,
            Locking::On => {
                let reason = "its file system has no locks (locking=on asks for them)".into();
                return Err(Error::Unsupported { path, reason });
            }
        };
        let len = file_len(&file).map_err(fail("cannot find the length of"))?;
        let target = Target {
            file,
            direct,
            block_device,
            no_flush: o.no_flush,
            logical: u64::from(topology.logical),
            rmw: Mutex::new(()),
        };
        Ok(Self {
            path,
            target: Arc::new(target),
            len: AtomicU64::new(len),
            read_only,
            topology,
            wanted,
            locked: Mutex::new(false),
        })
    }

    fn lock_flag(&self) -> std::sync::MutexGuard<'_, bool> {
        self.locked.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn error(&self, what: &'static str, source: io::Error) -> Error {
        Error::File { what, path: self.path.clone(), source }
    }

    /// Forgets cached pages, which may be older than what another host wrote meanwhile.
    fn drop_cache(&self) {
        // SAFETY: only numbers are passed. It is advice: failing changes nothing.
        unsafe { libc::posix_fadvise(self.target.fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }
}

impl Image for RawImage {
    fn name(&self) -> &str {
        &self.path
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    fn refresh_len(&self) -> Result<u64> {
        let len =
            file_len(&self.target.file).map_err(|e| self.error("cannot find the length of", e))?;
        self.len.store(len, Ordering::Release);
        Ok(len)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn topology(&self) -> Topology {
        self.topology
    }

    fn allocated(&self) -> Result<u64> {
        let meta = self.target.file.metadata().map_err(|e| self.error("cannot look at", e))?;
        // In units of 512 bytes, whatever the file system's block is (stat(2)).
        Ok(meta.blocks() * 512)
    }

    fn flush(&self) -> Result<()> {
        if self.read_only || self.target.no_flush {
            return Ok(());
        }
        self.target.file.sync_data().map_err(|e| self.error("cannot flush", e))
    }

    fn release_locks(&self) -> Result<()> {
        let mut locked = self.lock_flag();
        if *locked {
            locks::release(&self.target.file, &self.path)?;
            *locked = false;
        }
        Ok(())
    }

    fn acquire_locks(&self) -> Result<()> {
        let mut locked = self.lock_flag();
        let (Some(wanted), false) = (self.wanted, *locked) else { return Ok(()) };
        locks::acquire(&self.target.file, &self.path, wanted)?;
        *locked = true;
        drop(locked);
        self.drop_cache();
        self.refresh_len().map(drop)
    }

    fn has_locks(&self) -> bool {
        self.wanted.is_none() || *self.lock_flag()
    }

    fn engine(&self, aio: Aio, depth: usize) -> Result<Box<dyn Engine>> {
        static SAID: Once = Once::new();
        if aio == Aio::IoUring {
            match UringEngine::new(self.target.clone(), depth) {
                Ok(engine) => return Ok(Box::new(engine)),
                Err(e) => SAID.call_once(|| {
                    tracing::warn!("io_uring is not available ({e}): disks use threads instead");
                }),
            }
        }
        let flags = vmm_sys_util::eventfd::EFD_CLOEXEC | vmm_sys_util::eventfd::EFD_NONBLOCK;
        let event = vmm_sys_util::eventfd::EventFd::new(flags)
            .map_err(|source| Error::Engine { path: self.path.clone(), source })?;
        Ok(Box::new(ThreadEngine::new(self.target.clone(), depth.clamp(1, 4096), event)))
    }
}

impl Drop for RawImage {
    fn drop(&mut self) {
        // Not left to closing the file: a ring that is being torn down in the kernel may keep the
        // open file, and with it the locks, for a moment longer.
        if let Err(e) = self.release_locks() {
            tracing::warn!("{e}");
        }
    }
}

fn open_file(o: &RawOptions<'_>, path: &str) -> Result<(File, bool)> {
    let try_open = |read_only: bool| {
        // O_NONBLOCK: a FIFO must be refused, not waited for.
        let direct = if o.direct { libc::O_DIRECT } else { 0 };
        OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK | direct)
            .open(o.path)
    };
    let mut read_only = o.read_only;
    let mut file = try_open(read_only);
    if let Err(e) = &file
        && !read_only
        && o.auto_read_only
        && matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS))
    {
        read_only = true;
        file = try_open(true);
    }
    match file {
        Ok(f) => Ok((f, read_only)),
        Err(e) if o.direct && e.raw_os_error() == Some(libc::EINVAL) => Err(Error::Unsupported {
            path: path.into(),
            reason: "its file system has no direct I/O; use cache=writeback or writethrough".into(),
        }),
        Err(e) if e.kind() == io::ErrorKind::IsADirectory => {
            Err(Error::NotAnImage { path: path.into(), kind: "a directory" })
        }
        Err(source) => {
            let what = if read_only { "cannot open" } else { "cannot open for writing" };
            Err(Error::File { what, path: path.into(), source })
        }
    }
}

/// Length in bytes, of files and block devices alike.
fn file_len(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Asks a block device for a number of bytes.
fn ask(file: &File, request: libc::c_ulong) -> Option<u32> {
    let mut value: libc::c_uint = 0;
    // SAFETY: these requests write one unsigned int.
    let r = unsafe { libc::ioctl(file.as_raw_fd(), request, &mut value) };
    (r == 0 && value > 0).then_some(value)
}

fn topology(file: &File, block_device: bool) -> Topology {
    if !block_device {
        return Topology { logical: 512, physical: 512, optimal: 0, discard: 512 };
    }
    let sane = |v: u32| v.is_power_of_two() && (512..=2 << 20).contains(&v);
    let logical = ask(file, BLKSSZGET).filter(|v| sane(*v)).unwrap_or(512);
    let physical = ask(file, BLKPBSZGET).filter(|v| sane(*v)).unwrap_or(logical).max(logical);
    let optimal = ask(file, BLKIOOPT).or_else(|| ask(file, BLKIOMIN)).unwrap_or(0);
    Topology { logical, physical, optimal, discard: physical }
}

/// What direct I/O on this file must be aligned to: as the kernel says (statx, Linux 6.1), or
/// the safe guess.
fn direct_align(file: &File, logical: usize) -> DirectAlign {
    let guess = logical.max(4096);
    let fallback = DirectAlign { memory: guess, offset: guess };
    // SAFETY: all zeroes is a valid statx buffer.
    let mut st: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the fd is open, the path is an empty C string, the buffer is valid.
    let r = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &mut st,
        )
    };
    let (memory, offset) = (st.stx_dio_mem_align as usize, st.stx_dio_offset_align as usize);
    let sane = |v: usize| v.is_power_of_two() && v <= 1 << 16;
    if r == 0 && st.stx_mask & libc::STATX_DIOALIGN != 0 && sane(memory) && sane(offset) {
        DirectAlign { memory, offset }
    } else {
        fallback
    }
}
