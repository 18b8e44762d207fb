//! Which pages of guest memory exist at all: untouched ones are zero, and reading one to find out
//! would allocate it.
#![allow(unsafe_code)] // lseek on the memory's file

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use mem::{Bitmap, PAGE_SIZE, Region};

/// The pages of `region` that hold data. `None` when that cannot be told (a private mapping of a
/// file, or a file system that does not know).
pub fn populated(region: &Region) -> Option<Bitmap> {
    match (mapping(region.host)?, region.file.as_ref()) {
        (Kind::Shared, Some((file, offset))) => by_holes(region, file, *offset),
        (Kind::Anonymous, None) => by_page_map(region),
        // What a private mapping changed is not in its file, and what it did not change is.
        _ => None,
    }
}

/// Anonymous memory: what the kernel has in its page tables, or swapped out. Source: Linux
/// Documentation/admin-guide/mm/pagemap.rst.
fn by_page_map(region: &Region) -> Option<Bitmap> {
    const PRESENT_OR_SWAPPED: u64 = 3 << 62;
    const ENTRIES: u64 = 8192;
    let file = File::open("/proc/self/pagemap").ok()?;
    let map = Bitmap::new(region.pages());
    let base = region.host as u64 / PAGE_SIZE;
    let mut buf = vec![0; ENTRIES as usize * 8];
    let mut page = 0;
    while page < region.pages() {
        let count = ENTRIES.min(region.pages() - page);
        let bytes = &mut buf[..count as usize * 8];
        file.read_exact_at(bytes, (base + page) * 8).ok()?;
        for (i, entry) in bytes.as_chunks::<8>().0.iter().enumerate() {
            if u64::from_le_bytes(*entry) & PRESENT_OR_SWAPPED != 0 {
                map.set(page + i as u64);
            }
        }
        page += count;
    }
    Some(map)
}

/// Memory behind which there is a file: what is no hole.
fn by_holes(region: &Region, file: &File, offset: u64) -> Option<Bitmap> {
    let map = Bitmap::new(region.pages());
    let end = offset + region.size;
    let seek = |at: u64, whence| {
        // SAFETY: plain call on an open fd. The file's position is used by nobody.
        let r = unsafe { libc::lseek(file.as_raw_fd(), at as libc::off_t, whence) };
        u64::try_from(r).map_err(|_| std::io::Error::last_os_error())
    };
    let mut at = offset;
    while at < end {
        let data = match seek(at, libc::SEEK_DATA) {
            Ok(data) => data.min(end),
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => break,
            Err(_) => return None,
        };
        let hole = seek(data, libc::SEEK_HOLE).ok()?.min(end);
        let first = (data - offset) / PAGE_SIZE;
        map.set_range(first, (hole - offset).div_ceil(PAGE_SIZE) - first);
        at = hole.max(data + 1);
    }
    Some(map)
}

/// What a mapping is, to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Shared,
    Anonymous,
    PrivateFile,
}

/// What the mapping at `host` is, by the kernel's own list.
fn mapping(host: usize) -> Option<Kind> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| {
        // Range, rights, offset, device, inode, path.
        let mut words = line.split_ascii_whitespace();
        let (from, to) = words.next()?.split_once('-')?;
        let hex = |s| usize::from_str_radix(s, 16).ok();
        if !(hex(from)?..hex(to)?).contains(&host) {
            return None;
        }
        let shared = words.next()?.ends_with('s');
        let inode = words.nth(2)?;
        Some(match (shared, inode) {
            (true, _) => Kind::Shared,
            (false, "0") => Kind::Anonymous,
            (false, _) => Kind::PrivateFile,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mem::{Backing, BackingKind, GuestMemory, RegionSpec};

    #[test]
    fn knows_the_touched_pages_of_anonymous_memory() {
        let spec = [RegionSpec { gpa: 0, size: 80 << 20 }];
        let kind = BackingKind::Anonymous;
        let m = GuestMemory::new(&spec, &Backing { kind, share: false, prealloc: false }).unwrap();
        assert_eq!(populated(&m.regions()[0]).unwrap().count(), 0);
        m.write(0x3000, &[1]).unwrap();
        m.write((80 << 20) - 1, &[0]).unwrap();
        let map = populated(&m.regions()[0]).unwrap();
        // A huge page comes as a whole.
        assert!(map.test(3) && map.test(map.len() - 1) && map.count() <= 1024, "{map:?}");
    }

    #[test]
    fn knows_the_touched_pages_of_shared_memory_and_nothing_of_private_files() {
        let spec = [RegionSpec { gpa: 0, size: 1 << 20 }];
        let m = GuestMemory::new(&spec, &Backing::default()).unwrap();
        m.write(0x3000, &[1]).unwrap();
        m.write(0x80_000, &[0]).unwrap();
        let map = populated(&m.regions()[0]).unwrap();
        assert!(map.test(3) && map.test(0x80) && map.count() == 2, "{map:?}");
        let private = Backing { share: false, ..Backing::default() };
        let m = GuestMemory::new(&spec, &private).unwrap();
        m.write(0x3000, &[1]).unwrap();
        assert!(populated(&m.regions()[0]).is_none());
    }
}
