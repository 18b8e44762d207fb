//! The rings' own memory: checked once, then reached through host pointers.
//!
//! Invariant of every type here: its pointer is valid, for as long as the `GuestMemory` that the
//! ring also holds lives, for the whole table; entries are reached by an index that is checked or
//! masked here. All accesses are atomic, since the driver writes at the same time.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use mem::GuestMemory;

use super::RingError;

/// Descriptor flags (VIRTIO 1.2, sections 2.7.5 and 2.8.13).
pub const DESC_NEXT: u16 = 1;
pub const DESC_WRITE: u16 = 2;
pub const DESC_INDIRECT: u16 = 4;
/// Bytes of a descriptor, split or packed.
pub const DESC_SIZE: u32 = 16;

/// A checked piece of guest RAM that belongs to a ring.
#[derive(Clone, Copy)]
pub struct Area {
    host: *mut u8,
    pub gpa: u64,
    pub len: usize,
}

// SAFETY: a pointer into guest RAM, which is shared between threads anyway; the ring that holds the
// area is used by one thread at a time.
unsafe impl Send for Area {}

impl Area {
    /// Checks that `[gpa, gpa + len)` is RAM and aligned to `align` (at most a page).
    pub fn new(
        mem: &GuestMemory,
        part: &'static str,
        gpa: u64,
        len: usize,
        align: u64,
    ) -> Result<Self, RingError> {
        if !gpa.is_multiple_of(align) {
            return Err(RingError::Unaligned { part, addr: gpa, align });
        }
        let slice = mem.slice(gpa, len).map_err(|_| RingError::Address {
            part,
            addr: gpa,
            len: len as u64,
        })?;
        if !(slice.as_ptr() as u64).is_multiple_of(align) {
            return Err(RingError::Unaligned { part, addr: gpa, align });
        }
        Ok(Self { host: slice.as_ptr(), gpa, len })
    }

    /// The u16 at byte `offset`, a multiple of 2.
    ///
    /// # Safety
    /// `offset + 2 <= len`.
    #[inline]
    pub unsafe fn u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset + 2 <= self.len && offset.is_multiple_of(2));
        // SAFETY: in range (the caller's promise) and aligned (base checked in `new`).
        unsafe { AtomicU16::from_ptr(self.host.add(offset).cast()) }
    }

    /// The u32 at byte `offset`, a multiple of 4; the area was made with `align` 4 or more.
    ///
    /// # Safety
    /// `offset + 4 <= len`.
    #[inline]
    pub unsafe fn u32(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset + 4 <= self.len && offset.is_multiple_of(4));
        // SAFETY: as in `u16`.
        unsafe { AtomicU32::from_ptr(self.host.add(offset).cast()) }
    }

    /// The u64 at byte `offset`, a multiple of 8; the area was made with `align` 8 or more.
    ///
    /// # Safety
    /// `offset + 8 <= len`.
    #[inline]
    pub unsafe fn u64(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset + 8 <= self.len && offset.is_multiple_of(8));
        // SAFETY: as in `u16`.
        unsafe { AtomicU64::from_ptr(self.host.add(offset).cast()) }
    }
}

/// One descriptor, copied out. The last two fields are as they lie in memory: flags and next in a
/// split ring, id and flags in a packed one.
#[derive(Debug, Clone, Copy)]
pub struct RawDesc {
    pub addr: u64,
    pub len: u32,
    pub at12: u16,
    pub at14: u16,
}

impl RawDesc {
    #[inline]
    fn new(low: u64, high: u64) -> Self {
        Self {
            addr: u64::from_le(low),
            len: u64::from_le(high) as u32,
            at12: (u64::from_le(high) >> 32) as u16,
            at14: (u64::from_le(high) >> 48) as u16,
        }
    }

    /// Decodes the 16 bytes of a descriptor.
    #[inline]
    pub fn from_bytes(b: [u8; DESC_SIZE as usize]) -> Self {
        let v = u128::from_ne_bytes(b);
        let (low, high) = if cfg!(target_endian = "little") {
            (v as u64, (v >> 64) as u64)
        } else {
            ((v >> 64) as u64, v as u64)
        };
        Self::new(low, high)
    }
}

/// A table of descriptors: split, or the packed ring itself.
pub struct DescTable {
    area: Area,
    size: u16,
}

impl DescTable {
    /// The table of `size` descriptors at `gpa`.
    pub fn new(mem: &GuestMemory, gpa: u64, size: u16) -> Result<Self, RingError> {
        let len = usize::from(size) * DESC_SIZE as usize;
        Ok(Self { area: Area::new(mem, "descriptor area", gpa, len, 16)?, size })
    }

    /// Descriptor `i`, or `None` when there is none. Its flags are loaded without ordering.
    #[inline]
    pub fn get(&self, i: u16) -> Option<RawDesc> {
        if i >= self.size {
            return None;
        }
        let at = usize::from(i) * DESC_SIZE as usize;
        // SAFETY: i < size, so all 16 bytes are inside the area.
        let (low, high) = unsafe { (self.area.u64(at), self.area.u64(at + 8)) };
        Some(RawDesc::new(low.load(Ordering::Relaxed), high.load(Ordering::Relaxed)))
    }

    /// Asks the CPU for descriptor `i` (any number), which will be read soon.
    #[inline(always)]
    pub fn prefetch(&self, i: u16) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch never faults and changes nothing, whatever the address.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let at = usize::from(i) * DESC_SIZE as usize;
            _mm_prefetch::<_MM_HINT_T0>(self.area.host.wrapping_add(at).cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = i;
    }

    /// The flags of packed descriptor `i`; 0 when there is none.
    #[inline]
    pub fn packed_flags(&self, i: u16, order: Ordering) -> u16 {
        if i >= self.size {
            return 0;
        }
        // SAFETY: i < size.
        let flags = unsafe { self.area.u16(usize::from(i) * DESC_SIZE as usize + 14) };
        u16::from_le(flags.load(order))
    }

    /// Writes id and length of packed descriptor `i` (nothing when there is none).
    #[inline]
    pub fn set_packed_used(&self, i: u16, id: u16, len: u32) {
        if i < self.size {
            let at = usize::from(i) * DESC_SIZE as usize;
            // SAFETY: i < size.
            unsafe {
                self.area.u32(at + 8).store(len.to_le(), Ordering::Relaxed);
                self.area.u16(at + 12).store(id.to_le(), Ordering::Relaxed);
            }
        }
    }

    /// Writes the flags of packed descriptor `i`, after everything before (nothing when there is
    /// none).
    #[inline]
    pub fn set_packed_flags(&self, i: u16, flags: u16) {
        if i < self.size {
            // SAFETY: i < size.
            let at = unsafe { self.area.u16(usize::from(i) * DESC_SIZE as usize + 14) };
            at.store(flags.to_le(), Ordering::Release);
        }
    }

    /// Guest address of descriptor `i`.
    pub fn gpa(&self, i: u16) -> u64 {
        self.area.gpa + u64::from(i) * u64::from(DESC_SIZE)
    }
}

/// The avail ring: flags, idx, `size` entries, used_event.
pub struct AvailRing {
    area: Area,
    mask: u16,
}

impl AvailRing {
    /// `size` is a power of two.
    pub fn new(mem: &GuestMemory, gpa: u64, size: u16) -> Result<Self, RingError> {
        let area = Area::new(mem, "avail ring", gpa, 6 + 2 * usize::from(size), 2)?;
        Ok(Self { area, mask: size - 1 })
    }

    #[inline]
    fn load(&self, offset: usize, order: Ordering) -> u16 {
        debug_assert!(offset + 2 <= self.area.len);
        // SAFETY: the callers below stay inside 6 + 2 * size bytes.
        u16::from_le(unsafe { self.area.u16(offset) }.load(order))
    }

    #[inline]
    pub fn flags(&self) -> u16 {
        self.load(0, Ordering::Relaxed)
    }

    /// The driver's index; entries before it are valid to read.
    #[inline]
    pub fn idx(&self) -> u16 {
        self.load(2, Ordering::Acquire)
    }

    /// The head of the chain at ring position `pos` (taken modulo the size).
    #[inline]
    pub fn entry(&self, pos: u16) -> u16 {
        self.load(4 + 2 * usize::from(pos & self.mask), Ordering::Relaxed)
    }

    #[inline]
    pub fn used_event(&self) -> u16 {
        self.load(4 + 2 * (usize::from(self.mask) + 1), Ordering::Relaxed)
    }
}

/// The used ring: flags, idx, `size` entries of id and length, avail_event.
pub struct UsedRing {
    area: Area,
    mask: u16,
}

impl UsedRing {
    /// `size` is a power of two.
    pub fn new(mem: &GuestMemory, gpa: u64, size: u16) -> Result<Self, RingError> {
        let area = Area::new(mem, "used ring", gpa, 6 + 8 * usize::from(size), 4)?;
        Ok(Self { area, mask: size - 1 })
    }

    fn store(&self, mem: &GuestMemory, offset: usize, v: u16, order: Ordering) {
        debug_assert!(offset + 2 <= self.area.len);
        // SAFETY: the callers below stay inside 6 + 8 * size bytes.
        unsafe { self.area.u16(offset) }.store(v.to_le(), order);
        mem.mark_dirty(self.area.gpa + offset as u64, 2);
    }

    pub fn set_flags(&self, mem: &GuestMemory, flags: u16) {
        self.store(mem, 0, flags, Ordering::Relaxed);
    }

    /// Publishes entries before `idx`.
    #[inline]
    pub fn set_idx(&self, mem: &GuestMemory, idx: u16) {
        self.store(mem, 2, idx, Ordering::Release);
    }

    pub fn set_avail_event(&self, mem: &GuestMemory, pos: u16) {
        self.store(mem, 4 + 8 * (usize::from(self.mask) + 1), pos, Ordering::Relaxed);
    }

    /// Writes the entry at ring position `pos` (modulo the size); not yet recorded as dirty.
    #[inline]
    pub fn set_entry(&self, pos: u16, id: u16, len: u32) {
        let at = 4 + 8 * usize::from(pos & self.mask);
        // SAFETY: the masked position is below size, so at + 8 is inside the area.
        unsafe {
            self.area.u32(at).store(u32::from(id).to_le(), Ordering::Relaxed);
            self.area.u32(at + 4).store(len.to_le(), Ordering::Relaxed);
        }
    }

    /// Records `count` (at most the size) entries from ring position `pos` as dirty.
    pub fn mark_entries(&self, mem: &GuestMemory, pos: u16, count: u16) {
        let size = u32::from(self.mask) + 1;
        let first = u32::from(pos & self.mask);
        let count = u32::from(count).min(size);
        let head = count.min(size - first);
        mem.mark_dirty(self.area.gpa + 4 + 8 * u64::from(first), 8 * u64::from(head));
        mem.mark_dirty(self.area.gpa + 4, 8 * u64::from(count - head));
    }
}

/// An event suppression area of a packed ring: position and wrap counter, flags.
pub struct EventArea(Area);

impl EventArea {
    pub fn new(mem: &GuestMemory, part: &'static str, gpa: u64) -> Result<Self, RingError> {
        Area::new(mem, part, gpa, 4, 4).map(Self)
    }

    /// (position and wrap counter, flags)
    #[inline]
    pub fn load(&self) -> (u16, u16) {
        // SAFETY: the area has 4 bytes.
        let v = u32::from_le(unsafe { self.0.u32(0) }.load(Ordering::Relaxed));
        (v as u16, (v >> 16) as u16)
    }

    pub fn store(&self, mem: &GuestMemory, pos: u16, flags: u16) {
        let v = u32::from(pos) | u32::from(flags) << 16;
        // SAFETY: the area has 4 bytes.
        unsafe { self.0.u32(0) }.store(v.to_le(), Ordering::Relaxed);
        mem.mark_dirty(self.0.gpa, 4);
    }
}
