//! Mapping RAM into this process: aligned for huge pages, and unmapped when the last user is gone.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use crate::{Backing, Error, PAGE_SIZE, RegionSpec, Result};

/// x86's and arm64's (with 4 KiB pages) transparent huge page.
const HUGE: usize = 2 << 20;

/// A piece of this process's address space, given back when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    at: usize,
    len: usize,
}

impl Mapping {
    /// Takes over the mapping of `len` bytes at `at`, which is nobody else's.
    pub(crate) fn adopt(at: usize, len: usize) -> Self {
        Self { at, len }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map` and is nobody else's; whoever held pointers into
        // it held the `GuestMemory` that drops this.
        unsafe { libc::munmap(self.at as *mut libc::c_void, self.len) };
    }
}

/// Maps `spec.size` bytes of `backing` (pages of `page_size` bytes), of `file` from the offset on
/// when there is one. The mapping begins at a multiple of the huge page size, as guest RAM does for
/// the guest, so that host, KVM and guest can use huge pages for the same bytes; the kernel is asked
/// to use them.
pub(crate) fn map(
    spec: &RegionSpec,
    page_size: u64,
    file: Option<(&Arc<File>, u64)>,
    backing: &Backing,
) -> Result<(Mapping, MmapRegion<()>)> {
    if !spec.size.is_multiple_of(page_size) {
        return Err(Error::Layout(format!(
            "{:#x} bytes of RAM at {:#x} are not whole huge pages of {page_size:#x} bytes",
            spec.size, spec.gpa
        )));
    }
    let huge = page_size > PAGE_SIZE;
    let failed = |source| {
        let hint = if huge {
            format!(" in huge pages of {page_size:#x} bytes (see /proc/sys/vm/nr_hugepages)")
        } else {
            String::new()
        };
        let what = format!("cannot map {:#x} bytes of guest RAM{hint}", spec.size);
        Error::Host { what, source }
    };
    let len = usize::try_from(spec.size).map_err(|e| Error::Layout(e.to_string()))?;
    let big = if len >= HUGE { HUGE } else { PAGE_SIZE as usize };
    let mapping = reserve(len, big.max(page_size as usize)).map_err(failed)?;
    // Huge pages are reserved here, where a lack of them is an error; without, the first access to
    // a missing one would kill the process. Anonymous memory is accounted, so that the kernel
    // refuses what this host could never give (its vm.overcommit_memory decides).
    let mut flags = if huge || file.is_none() { 0 } else { libc::MAP_NORESERVE };
    flags |= if backing.share && file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    if file.is_none() {
        flags |= libc::MAP_ANONYMOUS;
    }
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let (fd, offset) = file.map_or((-1, 0), |(f, offset)| (f.as_raw_fd(), offset));
    let at = mapping.at as *mut libc::c_void;
    let fixed = flags | libc::MAP_FIXED;
    // SAFETY: the range is reserved by `mapping`, so nothing of others is replaced.
    let mapped = unsafe { libc::mmap(at, len, prot, fixed, fd, offset as libc::off_t) };
    if mapped == libc::MAP_FAILED {
        return Err(failed(std::io::Error::last_os_error()));
    }
    // SAFETY: advice on our own mapping; a kernel without huge pages refuses, which is no harm.
    unsafe { libc::madvise(at, len, libc::MADV_HUGEPAGE) };
    if backing.prealloc {
        populate(&mapping)?;
    }
    // SAFETY: the pointer is to a mapping of `len` bytes with these rights, which `Mapping` keeps.
    let mut region = unsafe { MmapRegionBuilder::new(len).with_raw_mmap_pointer(at.cast()) }
        .with_mmap_prot(prot)
        .with_mmap_flags(flags);
    if let Some((file, offset)) = file {
        // A dup of the fd: vm-memory wants to own its File.
        let dup = file.try_clone();
        let dup = dup.map_err(|source| Error::Host { what: "RAM's fd".into(), source })?;
        region = region.with_file_offset(FileOffset::new(dup, offset));
    }
    let region = region.build().map_err(|e| failed(std::io::Error::other(e.to_string())))?;
    Ok((mapping, region))
}

/// vm-memory's view of memory that another process lent; `foreign` has to outlive it.
pub(crate) fn of_foreign(foreign: &crate::ForeignMapping) -> Result<MmapRegion<()>> {
    let len = foreign.size() as usize; // it is mapped, so it fits
    // SAFETY: the pointer is to a mapping of `len` bytes with these rights, which the caller keeps.
    unsafe { MmapRegionBuilder::new(len).with_raw_mmap_pointer(foreign.as_ptr()) }
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
        .map_err(|e| Error::Layout(e.to_string()))
}

/// Touches every page for writing, so that a host without the memory says so now.
fn populate(map: &Mapping) -> Result<()> {
    let at = map.at as *mut libc::c_void;
    // SAFETY: the range is exactly the mapping; the call changes no bytes in it.
    if unsafe { libc::madvise(at, map.len, libc::MADV_POPULATE_WRITE) } == 0 {
        return Ok(());
    }
    let mut source = std::io::Error::last_os_error();
    // So the kernel says that an access would be a SIGBUS: the file cannot get the page.
    if source.raw_os_error() == Some(libc::EFAULT) {
        source = std::io::Error::from_raw_os_error(libc::ENOSPC);
    }
    let what = format!("cannot allocate {:#x} bytes of guest RAM beforehand", map.len);
    Err(Error::Host { what, source })
}

/// Sets `len` bytes of address space at a multiple of `align` (a power of two) aside.
fn reserve(len: usize, align: usize) -> std::io::Result<Mapping> {
    let page = PAGE_SIZE as usize;
    let room = len
        .next_multiple_of(page)
        .checked_add(align - page)
        .ok_or(std::io::ErrorKind::OutOfMemory)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let raw = unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0) };
    if raw == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    let start = raw as usize;
    let at = start.next_multiple_of(align);
    let end = at + len.next_multiple_of(page);
    // What lies before and behind goes back.
    drop((at > start).then(|| Mapping { at: start, len: at - start }));
    drop((start + room > end).then(|| Mapping { at: end, len: start + room - end }));
    Ok(Mapping { at, len: end - at })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_at_huge_pages_and_gives_all_back() {
        let mapped = |at: usize| {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            maps.lines().any(|l| {
                let range = l.split(' ').next().unwrap().split_once('-').unwrap();
                let hex = |s| usize::from_str_radix(s, 16).unwrap();
                (hex(range.0)..hex(range.1)).contains(&at)
            })
        };
        let anonymous =
            Backing { kind: crate::BackingKind::Anonymous, share: false, prealloc: false };
        let of = |size| RegionSpec { gpa: 0, size };
        for _ in 0..4 {
            let (mapping, region) = map(&of(6 << 20), PAGE_SIZE, None, &anonymous).unwrap();
            assert_eq!(region.as_ptr() as usize % HUGE, 0);
            assert_eq!(region.size(), 6 << 20);
            assert!(mapped(mapping.at) && mapped(mapping.at + (6 << 20) - 1));
        }
        let (small, _) = map(&of(3 << 12), PAGE_SIZE, None, &anonymous).unwrap();
        assert_eq!(small.len, 3 << 12);
        let reserved = reserve(4 << 20, 1 << 30).unwrap();
        assert_eq!(reserved.at % (1 << 30), 0);
        let at = reserved.at;
        drop(reserved);
        assert!(!mapped(at));
    }
}
