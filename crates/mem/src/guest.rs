//! The map from guest-physical addresses to host memory, and every checked access to it.
//!
//! Guest memory changes under our feet: the guest's CPUs write it while we read. So nothing here
//! ever makes a Rust reference to it; bytes are copied in and out, ring indexes are loaded and
//! stored atomically, and bulk I/O gets iovecs.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::dirty::OwnWrites;
use crate::mapping::{self, Mapping};
use crate::{Backing, DirtyLog, Error, ForeignRegion, PAGE_SIZE, Result, backing};

/// One piece of RAM to be made: where it lies for the guest, and in the backing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionSpec {
    /// First guest-physical address; a multiple of 4 KiB.
    pub gpa: u64,
    /// Bytes; a multiple of 4 KiB.
    pub size: u64,
}

/// A contiguous piece of guest RAM, mapped into this process.
#[derive(Debug, Clone)]
pub struct Region {
    /// Position in [`GuestMemory::regions`]; also its KVM memory slot.
    pub index: usize,
    /// First guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Address of its first byte in this process.
    pub host: usize,
    /// The file or memfd that holds its bytes and the offset in it; `None` when other mappers of
    /// a file would not see the guest's writes (anonymous memory, private mappings).
    pub file: Option<(Arc<File>, u64)>,
    /// Page size in bytes of the backing (4 KiB, or a huge page's).
    pub page_size: u64,
}

impl Region {
    /// Number of 4 KiB pages.
    pub fn pages(&self) -> u64 {
        self.size / PAGE_SIZE
    }
}

/// A range of guest RAM that was checked to lie inside one region. Holds the mapping's lifetime.
#[derive(Debug, Clone, Copy)]
pub struct GuestSlice<'a> {
    ptr: *mut u8,
    len: usize,
    _mem: std::marker::PhantomData<&'a GuestMemory>,
}

impl GuestSlice<'_> {
    /// First byte, in this process. Valid while the [`GuestMemory`] lives; the guest may change
    /// the bytes at any time.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }
    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// For readv, writev, io_uring.
    pub fn iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.ptr.cast(), iov_len: self.len }
    }
}

#[derive(Debug)]
struct Inner {
    mmap: GuestMemoryMmap<()>,
    regions: Vec<Region>,
    own: OwnWrites,
    /// Another process's log of the pages that are written here.
    log: Option<Arc<DirtyLog>>,
    /// Last: everything above points into them.
    _mappings: Vec<Mapping>,
    foreign: Vec<ForeignRegion>,
}

/// The guest's RAM. Cheap to clone: all clones are the same memory. It is also the
/// [`DirtySource`](crate::DirtySource) of the VMM's own writes.
#[derive(Debug, Clone)]
pub struct GuestMemory(Arc<Inner>);

impl GuestMemory {
    /// Makes RAM: `specs` in ascending order, not overlapping, all on one `backing`.
    ///
    /// # Errors
    /// [`Error::Layout`] for a wrong layout, [`Error::Host`] when the host refuses.
    pub fn new(specs: &[RegionSpec], backing: &Backing) -> Result<Self> {
        check_specs(specs)?;
        let total = specs.iter().map(|s| s.size).sum();
        let file = backing::open(backing, total)?;
        let page_size = file.as_deref().map_or(PAGE_SIZE, backing::page_size);
        let mut regions = Vec::new();
        let mut maps = Vec::new();
        let mut mappings = Vec::new();
        let mut offset = 0;
        for (index, s) in specs.iter().enumerate() {
            let part = file.as_ref().map(|f| (f, offset));
            let (mapping, map) = mapping::map(s, page_size, part, backing)?;
            mappings.push(mapping);
            regions.push(Region {
                index,
                gpa: s.gpa,
                size: s.size,
                host: map.as_ptr() as usize,
                // A private mapping's pages are not in the file: nobody may look for them there.
                file: file.clone().filter(|_| backing.share).map(|f| (f, offset)),
                page_size,
            });
            let guest = GuestRegionMmap::new(map, GuestAddress(s.gpa))
                .ok_or_else(|| Error::Layout("RAM passes the end of the address space".into()))?;
            maps.push(guest);
            offset += s.size;
        }
        let mmap = GuestMemoryMmap::from_regions(maps).map_err(|e| Error::Layout(e.to_string()))?;
        let own = OwnWrites::new(regions.iter().map(Region::pages));
        let (log, foreign) = (None, Vec::new());
        Ok(Self(Arc::new(Inner { mmap, regions, own, log, _mappings: mappings, foreign })))
    }

    /// Memory that another process owns, in any order; it may be none at all. Regions may be shared
    /// with other `GuestMemory`s, so that one more or less is a new `GuestMemory` of the same
    /// mappings. Every write is recorded in `log`, if given; it is then no
    /// [`DirtySource`](crate::DirtySource), whose recording is for memory of one's own.
    ///
    /// # Errors
    /// [`Error::Layout`] for regions that overlap or are not whole 4 KiB pages.
    pub fn from_foreign(regions: &[ForeignRegion], log: Option<Arc<DirtyLog>>) -> Result<Self> {
        let mut foreign = regions.to_vec();
        foreign.sort_by_key(|r| r.gpa);
        let specs = foreign.iter().map(|r| RegionSpec { gpa: r.gpa, size: r.mapping.size() });
        check_specs(&specs.collect::<Vec<_>>())?;
        let mut regions = Vec::with_capacity(foreign.len());
        let mut maps = Vec::with_capacity(foreign.len());
        for (index, r) in foreign.iter().enumerate() {
            let (file, offset) = r.mapping.file();
            regions.push(Region {
                index,
                gpa: r.gpa,
                size: r.mapping.size(),
                host: r.mapping.as_ptr() as usize,
                file: Some((file.clone(), offset)),
                page_size: r.mapping.page_size(),
            });
            let map = mapping::of_foreign(&r.mapping)?;
            let guest = GuestRegionMmap::new(map, GuestAddress(r.gpa))
                .ok_or_else(|| Error::Layout("RAM passes the end of the address space".into()))?;
            maps.push(guest);
        }
        let mmap = if maps.is_empty() {
            GuestMemoryMmap::new()
        } else {
            GuestMemoryMmap::from_regions(maps).map_err(|e| Error::Layout(e.to_string()))?
        };
        let own = OwnWrites::new(std::iter::empty());
        Ok(Self(Arc::new(Inner { mmap, regions, own, log, _mappings: Vec::new(), foreign })))
    }

    /// Whether a file that another process lent shrank ([`crate::ForeignMapping::is_broken`]): what
    /// is read since is zeroes, and the memory is to be given up.
    #[inline]
    pub fn is_broken(&self) -> bool {
        let log = self.0.log.as_ref();
        self.0.foreign.iter().any(|r| r.mapping.is_broken())
            || log.is_some_and(|log| log.mapping().is_broken())
    }

    /// The same memory as vm-memory's type, for the loader, vhost and VFIO crates. Writes made
    /// through it are not recorded as dirty: use it before the guest runs, or mark them.
    pub fn mmap(&self) -> &GuestMemoryMmap<()> {
        &self.0.mmap
    }

    /// All regions, ascending.
    pub fn regions(&self) -> &[Region] {
        &self.0.regions
    }

    /// Bytes of RAM in all.
    pub fn size(&self) -> u64 {
        self.0.regions.iter().map(|r| r.size).sum()
    }

    pub(crate) fn own_writes(&self) -> &OwnWrites {
        &self.0.own
    }

    /// The region that holds all of `[gpa, gpa + len)`, and the offset in it.
    #[inline]
    fn locate(&self, gpa: u64, len: u64) -> Result<(&Region, u64)> {
        let mut regions = &self.0.regions[..];
        if regions.len() > 8 {
            // Memory lent in many slots: look at one only.
            let at = regions.partition_point(|r| r.gpa <= gpa).saturating_sub(1);
            regions = &regions[at..=at];
        }
        for r in regions {
            if gpa >= r.gpa && gpa - r.gpa < r.size {
                let offset = gpa - r.gpa;
                if len <= r.size - offset {
                    return Ok((r, offset));
                }
                break;
            }
        }
        Err(Error::NotRam { addr: gpa, len })
    }

    #[inline]
    fn ptr(&self, gpa: u64, len: u64) -> Result<*mut u8> {
        let (r, offset) = self.locate(gpa, len)?;
        Ok((r.host + offset as usize) as *mut u8)
    }

    /// Checks that `[gpa, gpa + len)` lies in one region and gives its host memory. Whoever
    /// writes through the pointer calls [`mark_dirty`](Self::mark_dirty) afterwards.
    #[inline]
    pub fn slice(&self, gpa: u64, len: usize) -> Result<GuestSlice<'_>> {
        let ptr = self.ptr(gpa, len as u64)?;
        Ok(GuestSlice { ptr, len, _mem: std::marker::PhantomData })
    }

    /// Like [`slice`](Self::slice), for as many of `len` bytes as lie in the region of `gpa`: at
    /// least one, unless `len` is 0.
    ///
    /// # Errors
    /// [`Error::NotRam`] when `gpa` itself is not RAM.
    #[inline]
    pub fn slice_up_to(&self, gpa: u64, len: usize) -> Result<GuestSlice<'_>> {
        let (r, offset) = self.locate(gpa, len.min(1) as u64)?;
        let len = (len as u64).min(r.size - offset) as usize;
        let ptr = (r.host + offset as usize) as *mut u8;
        Ok(GuestSlice { ptr, len, _mem: std::marker::PhantomData })
    }

    /// Whether both are the same memory (clones of each other).
    #[inline]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether own writes are being recorded at the moment, so that
    /// [`mark_dirty`](Self::mark_dirty) has an effect. Ask after writing, not before.
    #[inline]
    pub fn is_recording(&self) -> bool {
        self.0.own.is_enabled() || self.0.log.is_some()
    }

    /// Records that `[gpa, gpa + len)` was written. Out-of-range parts are ignored.
    #[inline]
    pub fn mark_dirty(&self, gpa: u64, len: u64) {
        if let Ok((r, offset)) = self.locate(gpa, len) {
            self.record(r, offset, len);
        }
    }

    #[inline]
    fn record(&self, r: &Region, offset: u64, len: u64) {
        self.0.own.record(r.index, offset, len);
        if let Some(log) = &self.0.log {
            log.mark(r.gpa + offset, len);
        }
    }

    /// Copies bytes out of the guest.
    #[inline]
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<()> {
        let p = self.ptr(gpa, buf.len() as u64)?;
        // SAFETY: p is valid for buf.len() bytes (checked above), buf is ours, they cannot
        // overlap; a racing guest can only make the bytes odd, not the copy unsound.
        unsafe { std::ptr::copy_nonoverlapping(p, buf.as_mut_ptr(), buf.len()) };
        Ok(())
    }

    /// Copies bytes into the guest and records the pages.
    #[inline]
    pub fn write(&self, gpa: u64, buf: &[u8]) -> Result<()> {
        let (r, offset) = self.locate(gpa, buf.len() as u64)?;
        let p = (r.host + offset as usize) as *mut u8;
        // SAFETY: as in `read`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(buf.as_ptr(), p, buf.len()) };
        self.record(r, offset, buf.len() as u64);
        Ok(())
    }

    /// Reads a plain-data value (no alignment needed).
    #[inline]
    pub fn read_obj<T: ByteValued>(&self, gpa: u64) -> Result<T> {
        let mut v = T::zeroed();
        self.read(gpa, v.as_mut_slice())?;
        Ok(v)
    }

    /// Writes a plain-data value (no alignment needed).
    #[inline]
    pub fn write_obj<T: ByteValued>(&self, gpa: u64, v: &T) -> Result<()> {
        self.write(gpa, v.as_slice())
    }

    /// Loads a little-endian u16 atomically; `gpa` must be 2-byte aligned.
    #[inline]
    pub fn load_u16(&self, gpa: u64, order: Ordering) -> Result<u16> {
        let p = self.aligned(gpa, 2)?;
        // SAFETY: in RAM and aligned (checked); atomics allow the guest to race.
        Ok(u16::from_le(unsafe { AtomicU16::from_ptr(p.cast()) }.load(order)))
    }

    /// Stores a little-endian u16 atomically and records the page; `gpa` must be 2-byte aligned.
    #[inline]
    pub fn store_u16(&self, gpa: u64, v: u16, order: Ordering) -> Result<()> {
        let p = self.aligned(gpa, 2)?;
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU16::from_ptr(p.cast()) }.store(v.to_le(), order);
        self.mark_dirty(gpa, 2);
        Ok(())
    }

    /// Loads a little-endian u32 atomically; `gpa` must be 4-byte aligned.
    #[inline]
    pub fn load_u32(&self, gpa: u64, order: Ordering) -> Result<u32> {
        let p = self.aligned(gpa, 4)?;
        // SAFETY: as in `load_u16`.
        Ok(u32::from_le(unsafe { AtomicU32::from_ptr(p.cast()) }.load(order)))
    }

    fn aligned(&self, gpa: u64, size: u64) -> Result<*mut u8> {
        if !gpa.is_multiple_of(size) {
            return Err(Error::Unaligned { addr: gpa, align: size });
        }
        self.ptr(gpa, size)
    }
}

/// Checks that regions ascend without overlap, in whole pages.
fn check_specs(specs: &[RegionSpec]) -> Result<()> {
    let mut end = 0;
    for s in specs {
        let bad =
            s.size == 0 || !s.gpa.is_multiple_of(PAGE_SIZE) || !s.size.is_multiple_of(PAGE_SIZE);
        if bad || s.gpa < end || s.gpa.checked_add(s.size).is_none() {
            return Err(Error::Layout(format!(
                "RAM at {:#x}, {:#x} bytes: must be ascending, whole 4 KiB pages",
                s.gpa, s.size
            )));
        }
        end = s.gpa + s.size;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bitmap, DirtySource};

    fn two_regions() -> GuestMemory {
        let specs =
            [RegionSpec { gpa: 0, size: 0x4000 }, RegionSpec { gpa: 0x10000, size: 0x2000 }];
        GuestMemory::new(&specs, &Backing::default()).unwrap()
    }

    #[test]
    fn refuses_addresses_outside_ram() {
        let m = two_regions();
        let mut b = [0; 8];
        for gpa in [0x3ffc, 0x4000, 0xfffc, 0x12000, u64::MAX, u64::MAX - 7] {
            assert!(matches!(m.read(gpa, &mut b), Err(Error::NotRam { .. })), "{gpa:#x}");
            assert!(m.write(gpa, &b).is_err());
        }
        assert!(m.read(0x11ff8, &mut b).is_ok());
        assert!(matches!(m.load_u16(1, Ordering::Relaxed), Err(Error::Unaligned { .. })));
    }

    #[test]
    fn records_its_own_writes_page_by_page() {
        let m = two_regions();
        m.write(0, &[1]).unwrap();
        m.start().unwrap();
        m.write(0x0fff, &[1, 2]).unwrap();
        m.store_u16(0x11000, 7, Ordering::Release).unwrap();
        let low = Bitmap::new(4);
        let high = Bitmap::new(2);
        assert_eq!(m.harvest(0, &low).unwrap(), 2);
        assert_eq!(m.harvest(1, &high).unwrap(), 1);
        assert!(low.test(0) && low.test(1) && high.test(1));
        assert_eq!(m.harvest(0, &Bitmap::new(4)).unwrap(), 0);
    }

    #[test]
    fn prealloc_touches_every_page() {
        let backing = Backing { prealloc: true, ..Backing::default() };
        let m = GuestMemory::new(&[RegionSpec { gpa: 0, size: 0x40000 }], &backing).unwrap();
        let (file, _) = m.regions()[0].file.clone().unwrap();
        let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        assert_eq!(blocks * 512, 0x40000);
    }

    #[test]
    fn huge_pages_that_are_not_there_are_an_error() {
        // More than any host has free; 2 MiB pages are known to every x86-64 kernel.
        let kind = crate::BackingKind::Memfd { hugetlb: Some(2 << 20) };
        let backing = Backing { kind, ..Backing::default() };
        let new = |size| GuestMemory::new(&[RegionSpec { gpa: 0, size }], &backing);
        assert!(new(1 << 44).is_err());
        assert!(new(3 << 20).is_err());
    }

    #[test]
    fn refuses_wrong_layouts() {
        let b = Backing::default();
        for specs in [
            vec![RegionSpec { gpa: 0, size: 0 }],
            vec![RegionSpec { gpa: 1, size: 0x1000 }],
            vec![RegionSpec { gpa: 0, size: 0x2000 }, RegionSpec { gpa: 0x1000, size: 0x1000 }],
            vec![RegionSpec { gpa: u64::MAX - 0xfff, size: 0x1000 }],
        ] {
            assert!(GuestMemory::new(&specs, &b).is_err(), "{specs:?}");
        }
    }
}
