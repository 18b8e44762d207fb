//! Memory that another process owns and lends by a descriptor: a VM's RAM, its dirty log, the
//! table of what is in flight.
//!
//! The owner may lie about its size and may shrink it at any time (see [`crate::sigbus`]), so
//! nothing is mapped that does not exist when it is mapped, and every mapping is guarded.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::mapping::Mapping;
use crate::sigbus::Guard;
use crate::{Error, PAGE_SHIFT, PAGE_SIZE, Result, backing};

/// Most bytes of others' files that are mapped at a time in the whole process. A sparse file can be
/// of any size, and this process needs addresses for itself: x86 has 128 TiB.
pub const MAX_FOREIGN: u64 = 96 << 40;

/// What is mapped of it.
static MAPPED: AtomicU64 = AtomicU64::new(0);

/// A share of [`MAX_FOREIGN`], given back when dropped.
#[derive(Debug)]
struct Share(u64);

impl Share {
    fn take(bytes: u64) -> Result<Self> {
        let add = |now: u64| now.checked_add(bytes).filter(|sum| *sum <= MAX_FOREIGN);
        match MAPPED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add) {
            Ok(_) => Ok(Self(bytes)),
            Err(now) => Err(Error::Layout(format!(
                "{bytes:#x} bytes cannot be mapped beside {now:#x} bytes of other files: at most \
                 {MAX_FOREIGN:#x} are mapped in all"
            ))),
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        MAPPED.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// A piece of another process's file, mapped shared, readable and writable. Unmapped when dropped.
#[derive(Debug)]
pub struct ForeignMapping {
    /// First: dropped before the memory goes.
    guard: Guard,
    /// Address of the first byte asked for; the mapping may begin before it.
    host: usize,
    size: u64,
    file: Arc<File>,
    offset: u64,
    page_size: u64,
    _mapping: Mapping,
    _share: Share,
}

impl ForeignMapping {
    /// Maps `size` bytes of `file` from byte `offset` on. Neither needs to be aligned.
    ///
    /// # Errors
    /// [`Error::Layout`] if the descriptor is not a regular file or memfd in memory or on a local
    /// file system, or is shorter than `offset + size`; [`Error::Host`] if the kernel refuses.
    pub fn map(file: File, offset: u64, size: u64) -> Result<Arc<Self>> {
        let host = |what: &str| {
            let what = format!("{what} {size:#x} bytes of another process's memory");
            Error::Host { what, source: std::io::Error::last_os_error() }
        };
        check(&file, offset, size)?;
        let page_size = backing::page_size(&file);
        let start = offset - offset % page_size;
        let end = (offset + size).checked_next_multiple_of(page_size);
        let len = end.and_then(|end| usize::try_from(end - start).ok());
        let len = len.ok_or_else(|| Error::Layout(format!("{size:#x} bytes cannot be mapped")))?;
        let share = Share::take(len as u64)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let at = unsafe {
            let at = start as libc::off_t;
            libc::mmap(std::ptr::null_mut(), len, prot, flags, file.as_raw_fd(), at)
        };
        if at == libc::MAP_FAILED {
            return Err(host("cannot map"));
        }
        let mapping = Mapping::adopt(at as usize, len);
        // SAFETY: advice on our own mapping. A core dump must not hold the guest's RAM.
        unsafe { libc::madvise(at, len, libc::MADV_DONTDUMP) };
        let guard = Guard::new(at as usize, len)?;
        Ok(Arc::new(Self {
            guard,
            host: at as usize + (offset - start) as usize,
            size,
            file: Arc::new(file),
            offset,
            page_size,
            _mapping: mapping,
            _share: share,
        }))
    }

    /// Address of the first byte. Valid while the mapping lives; its owner may change the bytes at
    /// any time, so they are only to be copied, or reached by atomics.
    pub fn as_ptr(&self) -> *mut u8 {
        self.host as *mut u8
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file and the offset in it.
    pub fn file(&self) -> (&Arc<File>, u64) {
        (&self.file, self.offset)
    }

    /// Page size of the file, in bytes.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Whether the file shrank under the mapping. It reads as zeroes since, nothing written gets
    /// anywhere, and it never recovers: give it up.
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.guard.is_broken()
    }

    /// Takes the bits of `mask` at byte `at`: returns those that were set, and clears them, in one
    /// step. 0 past the end.
    pub fn take_bits(&self, at: u64, mask: u8) -> u8 {
        if at >= self.size {
            return 0;
        }
        // SAFETY: inside the mapping (checked); atomics allow its owner to race.
        let byte = unsafe { AtomicU8::from_ptr(self.as_ptr().add(at as usize)) };
        if byte.load(Ordering::Relaxed) & mask == 0 {
            return 0;
        }
        byte.fetch_and(!mask, Ordering::SeqCst) & mask
    }

    /// Whether both map the same bytes of the same file.
    pub fn is_same(&self, file: &File, offset: u64, size: u64) -> bool {
        let id = |f: &File| f.metadata().map(|m| (m.dev(), m.ino())).ok();
        let same = self.offset == offset && self.size == size && !self.is_broken();
        same && id(file).is_some_and(|other| Some(other) == id(&self.file))
    }
}

/// Checks that there are `size` bytes at `offset`, of a kind that can be mapped without trust.
fn check(file: &File, offset: u64, size: u64) -> Result<()> {
    const FUSE_MAGIC: i64 = 0x65735546;
    let wrong = |why: String| Err(Error::Layout(why));
    let Some(end) = offset.checked_add(size).filter(|_| size > 0) else {
        return wrong(format!("{size:#x} bytes at offset {offset:#x}: not a range of a file"));
    };
    let meta = file.metadata();
    let meta = meta.map_err(|source| Error::Host { what: "memory descriptor".into(), source })?;
    let kind = meta.file_type();
    if !kind.is_file() {
        let what = match () {
            () if kind.is_socket() => "a socket",
            () if kind.is_fifo() => "a pipe",
            () if kind.is_char_device() => "a character device",
            () if kind.is_block_device() => "a block device",
            () if kind.is_dir() => "a directory",
            () => "of an unknown kind",
        };
        return wrong(format!("the descriptor is {what}; expected a memfd or a file"));
    }
    // SAFETY: statfs is plain data, for which all zeroes is valid; the call writes only into it.
    let fs = unsafe {
        let mut fs: libc::statfs = std::mem::zeroed();
        if libc::fstatfs(file.as_raw_fd(), &mut fs) == 0 { fs.f_type } else { 0 }
    };
    if fs == FUSE_MAGIC {
        return wrong("the file is on FUSE, where its owner could stop every access".into());
    }
    if meta.len() < end {
        let len = meta.len();
        return wrong(format!(
            "the file has {len:#x} bytes, shorter than offset {offset:#x} and size {size:#x}"
        ));
    }
    Ok(())
}

/// A region of another process's RAM, to make a [`GuestMemory`](crate::GuestMemory) of.
#[derive(Debug, Clone)]
pub struct ForeignRegion {
    /// First guest-physical address; a multiple of 4 KiB, as the size is.
    pub gpa: u64,
    /// Its bytes.
    pub mapping: Arc<ForeignMapping>,
}

/// A bitmap, one bit a 4 KiB page of guest-physical memory from address 0, that lies in another
/// process's memory and is drained there: vhost-user's dirty log.
///
/// Set bit by bit with atomic operations, after the page was written. Pages beyond the end of the
/// log are of no interest to its owner and ignored.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: Arc<ForeignMapping>,
    aliases: Vec<DirtyAlias>,
}

/// Writes to `[gpa, gpa + len)` are also recorded at `log`, byte for byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyAlias {
    pub gpa: u64,
    pub len: u64,
    pub log: u64,
}

impl DirtyLog {
    /// A log in `mapping`; `aliases` for rings whose owner wants them logged elsewhere than at
    /// their guest address.
    pub fn new(mapping: Arc<ForeignMapping>, aliases: Vec<DirtyAlias>) -> Arc<Self> {
        Arc::new(Self { mapping, aliases })
    }

    /// Where the bits are.
    pub fn mapping(&self) -> &Arc<ForeignMapping> {
        &self.mapping
    }

    /// Records that `[gpa, gpa + len)` was written.
    pub fn mark(&self, gpa: u64, len: u64) {
        if len == 0 {
            return;
        }
        self.set(gpa, gpa.saturating_add(len - 1));
        for a in &self.aliases {
            let from = gpa.max(a.gpa);
            let to = gpa.saturating_add(len).min(a.gpa.saturating_add(a.len));
            if from < to {
                let log = a.log.saturating_add(from - a.gpa);
                self.set(log, log.saturating_add(to - from - 1));
            }
        }
    }

    /// Sets the bits of the pages from byte `first` to byte `last`.
    fn set(&self, first: u64, last: u64) {
        let end = self.mapping.size().saturating_mul(8);
        let mut page = first >> PAGE_SHIFT;
        let last = (last >> PAGE_SHIFT).min(end.saturating_sub(1));
        while page <= last && page < end {
            let bit = page % 8;
            let n = (8 - bit).min(last - page + 1);
            let mask = (0xff_u16 >> (8 - n) << bit) as u8;
            // SAFETY: page < 8 * size, so the byte is inside the mapping; atomics allow the owner
            // to race. Unconditional: a bit seen set could be one that the owner is draining.
            unsafe { AtomicU8::from_ptr(self.mapping.as_ptr().add((page / 8) as usize)) }
                .fetch_or(mask, Ordering::SeqCst);
            page += n;
        }
    }
}

/// Bytes of log that cover guest memory up to address `end`.
pub fn log_size(end: u64) -> u64 {
    end.div_ceil(PAGE_SIZE).div_ceil(8)
}
