//! Which pages of guest memory exist at all: untouched ones are zero, and reading one to find out
//! would allocate it.
#![allow(unsafe_code)] // lseek on the memory's file

use std::os::fd::AsRawFd;

use mem::{Bitmap, PAGE_SIZE, Region};

/// The pages of `region` that hold data, by asking the file behind it for its holes. `None` when
/// that cannot be told (no file, a private mapping, or a file system that does not know).
pub fn populated(region: &Region) -> Option<Bitmap> {
    let (file, offset) = region.file.as_ref()?;
    // What a private mapping changed is not in the file.
    if !is_shared(region.host) {
        return None;
    }
    let map = Bitmap::new(region.pages());
    let end = offset + region.size;
    let seek = |at: u64, whence| {
        // SAFETY: plain call on an open fd. The file's position is used by nobody.
        let r = unsafe { libc::lseek(file.as_raw_fd(), at as libc::off_t, whence) };
        u64::try_from(r).map_err(|_| std::io::Error::last_os_error())
    };
    let mut at = *offset;
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

/// Whether the mapping at `host` is shared, by the kernel's own list.
fn is_shared(host: usize) -> bool {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else {
        return false;
    };
    maps.lines().any(|line| {
        let mut words = line.split(' ');
        let (Some(range), Some(mode)) = (words.next(), words.next()) else {
            return false;
        };
        let Some((from, to)) = range.split_once('-') else {
            return false;
        };
        let hex = |s| usize::from_str_radix(s, 16).unwrap_or(usize::MAX);
        hex(from) <= host && host < hex(to) && mode.ends_with('s')
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mem::{Backing, GuestMemory, RegionSpec};

    #[test]
    fn knows_the_touched_pages_of_shared_memory_only() {
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
