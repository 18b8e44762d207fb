//! The four rings of an AF_XDP socket: one side here, the other in the kernel. Source: Linux'
//! Documentation/networking/af_xdp.rst, linux/if_xdp.h.
//!
//! Indexes run freely and wrap; an entry's place is its index modulo the size, a power of two. What
//! the other side's index says is checked every time: a ring never has more entries than its size.
#![allow(unsafe_code)] // memory that is shared with the kernel

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use super::Fault;

/// Memory that is mapped; unmapped when dropped.
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread.
unsafe impl Send for Mapping {}

impl Mapping {
    /// `len` bytes of `fd` from `offset` on, or of zeroes without one.
    pub fn new(fd: Option<&OwnedFd>, offset: u64, len: usize) -> io::Result<Self> {
        let flags = match fd {
            Some(_) => libc::MAP_SHARED | libc::MAP_POPULATE,
            None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
        };
        // SAFETY: a new mapping wherever the kernel likes; nothing that exists changes.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                fd.map_or(-1, AsRawFd::as_raw_fd),
                offset as libc::off_t,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(p.cast()).map(|start| Self { start, len }).ok_or_else(io::Error::last_os_error)
    }

    /// Its first byte.
    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and no pointer into it is used after its owner.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// A ring as it lies in memory. `T` is one that any bytes are a value of.
struct Ring<T> {
    map: Mapping,
    producer: usize,
    consumer: usize,
    flags: usize,
    entries: usize,
    mask: u32,
    kind: PhantomData<T>,
}

impl<T: Copy> Ring<T> {
    /// Maps the ring of `size` entries that `fd` has at `page`.
    fn map(
        fd: &OwnedFd,
        page: u64,
        offsets: &libc::xdp_ring_offset,
        size: u32,
    ) -> io::Result<Self> {
        let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        let entries = place(offsets.desc);
        let len = entries.saturating_add(size as usize * size_of::<T>());
        let [producer, consumer, flags] =
            [offsets.producer, offsets.consumer, offsets.flags].map(place);
        let inside = |at: usize| at.is_multiple_of(4) && at.saturating_add(4) <= entries;
        let fits = [producer, consumer, flags].into_iter().all(inside);
        if !fits || len > 1 << 30 || !entries.is_multiple_of(align_of::<T>()) {
            return Err(io::Error::other("the kernel's ring offsets cannot be"));
        }
        let map = Mapping::new(Some(fd), page, len)?;
        Ok(Self { map, producer, consumer, flags, entries, mask: size - 1, kind: PhantomData })
    }

    #[inline]
    fn word(&self, at: usize) -> &AtomicU32 {
        // SAFETY: `at` is aligned and inside the mapping (checked by `map`), which lives as long as
        // `self`; both sides only use these words as atomics.
        unsafe { AtomicU32::from_ptr(self.map.start().add(at).cast()) }
    }

    #[inline]
    fn entry(&self, index: u32) -> *mut T {
        let place = (index & self.mask) as usize;
        // SAFETY: the place is below the size, for which the mapping has room behind `entries`.
        unsafe { self.map.start().add(self.entries).cast::<T>().add(place) }
    }

    fn size(&self) -> u32 {
        self.mask + 1
    }

    #[inline]
    fn wants_wakeup(&self) -> bool {
        self.word(self.flags).load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

/// A ring that is filled here: fill, transmit.
pub struct Producer<T> {
    ring: Ring<T>,
    /// The next entry to be written.
    next: u32,
    /// How far the kernel was when it was last looked at.
    consumed: u32,
}

impl<T: Copy> Producer<T> {
    /// Maps it, empty.
    pub fn map(
        fd: &OwnedFd,
        page: u64,
        offsets: &libc::xdp_ring_offset,
        size: u32,
    ) -> io::Result<Self> {
        Ok(Self { ring: Ring::map(fd, page, offsets, size)?, next: 0, consumed: 0 })
    }

    /// Entries that the kernel has not taken yet, published or not.
    ///
    /// # Errors
    /// The kernel's index is not between what it was and ours.
    #[inline]
    pub fn pending(&mut self) -> Result<u32, Fault> {
        let consumed = self.ring.word(self.ring.consumer).load(Ordering::Acquire);
        let pending = self.next.wrapping_sub(consumed);
        if pending > self.ring.size() {
            return Err(Fault::Index);
        }
        self.consumed = consumed;
        Ok(pending)
    }

    /// Entries that have room; looks at how far the kernel is only if they seem fewer than `wanted`.
    ///
    /// # Errors
    /// As [`pending`](Self::pending).
    #[inline]
    pub fn room(&mut self, wanted: u32) -> Result<u32, Fault> {
        let room = self.ring.size() - self.next.wrapping_sub(self.consumed);
        if room >= wanted { Ok(room) } else { Ok(self.ring.size() - self.pending()?) }
    }

    /// Writes an entry, for which there has to be room.
    #[inline]
    pub fn push(&mut self, entry: T) {
        // SAFETY: the entry is inside the ring, and the kernel does not read it before `publish`.
        unsafe { self.ring.entry(self.next).write(entry) };
        self.next = self.next.wrapping_add(1);
    }

    /// Shows the kernel what was written.
    #[inline]
    pub fn publish(&self) {
        self.ring.word(self.ring.producer).store(self.next, Ordering::Release);
    }

    /// Whether the kernel sleeps and is to be woken for what was published.
    #[inline]
    pub fn wants_wakeup(&self) -> bool {
        self.ring.wants_wakeup()
    }
}

/// A ring that is emptied here: receive, completion.
pub struct Consumer<T> {
    ring: Ring<T>,
    /// The next entry to be read.
    next: u32,
}

impl<T: Copy> Consumer<T> {
    /// Maps it, empty.
    pub fn map(
        fd: &OwnedFd,
        page: u64,
        offsets: &libc::xdp_ring_offset,
        size: u32,
    ) -> io::Result<Self> {
        Ok(Self { ring: Ring::map(fd, page, offsets, size)?, next: 0 })
    }

    /// Entries that are there.
    ///
    /// # Errors
    /// More than the ring has room for.
    #[inline]
    pub fn available(&self) -> Result<u32, Fault> {
        let produced = self.ring.word(self.ring.producer).load(Ordering::Acquire);
        let n = produced.wrapping_sub(self.next);
        if n <= self.ring.size() { Ok(n) } else { Err(Fault::Index) }
    }

    /// Our copy of entry `i` of those that are available.
    #[inline]
    pub fn peek(&self, i: u32) -> T {
        // SAFETY: the entry is inside the ring; any bytes are a `T`.
        unsafe { self.ring.entry(self.next.wrapping_add(i)).read() }
    }

    /// Gives the kernel the next `n` entries' room back.
    #[inline]
    pub fn advance(&mut self, n: u32) {
        self.next = self.next.wrapping_add(n);
        self.ring.word(self.ring.consumer).store(self.next, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;

    const OFFSETS: libc::xdp_ring_offset =
        libc::xdp_ring_offset { producer: 0, consumer: 64, flags: 128, desc: 192 };

    /// A file that both sides map: the kernel's side is played by the other kind of ring.
    fn memory() -> OwnedFd {
        // SAFETY: a C string and no flags; the descriptor is nobody else's.
        unsafe {
            let fd = libc::memfd_create(c"ring".as_ptr(), 0);
            assert!(fd >= 0 && libc::ftruncate(fd, 8192) == 0);
            OwnedFd::from_raw_fd(fd)
        }
    }

    fn put(map: &Mapping, at: usize, value: u32) {
        // SAFETY: an aligned word inside the mapping.
        unsafe { AtomicU32::from_ptr(map.start().add(at).cast()) }.store(value, Ordering::Release);
    }

    #[test]
    fn entries_go_round_in_order_and_no_more_than_fit() {
        let fd = memory();
        let mut p = Producer::<u64>::map(&fd, 0, &OFFSETS, 8).unwrap();
        let mut c = Consumer::<u64>::map(&fd, 0, &OFFSETS, 8).unwrap();
        let (mut sent, mut got) = (0, 0);
        for round in 0..100u32 {
            while p.room(1).unwrap() > 0 {
                p.push(sent);
                sent += 1;
            }
            assert_eq!(p.pending().unwrap(), 8);
            p.publish();
            let n = c.available().unwrap().min(round % 8 + 1);
            for i in 0..n {
                assert_eq!(c.peek(i), got);
                got += 1;
            }
            c.advance(n);
        }
        assert_eq!(sent - got, u64::from(c.available().unwrap()));
    }

    #[test]
    fn an_index_that_runs_ahead_is_refused() {
        let fd = memory();
        let raw = Mapping::new(Some(&fd), 0, 4096).unwrap();
        let mut p = Producer::<u64>::map(&fd, 0, &OFFSETS, 8).unwrap();
        let c = Consumer::<u64>::map(&fd, 0, &OFFSETS, 8).unwrap();
        put(&raw, 0, 9);
        assert_eq!(c.available(), Err(Fault::Index));
        put(&raw, 0, 8);
        assert_eq!(c.available(), Ok(8));
        put(&raw, 64, 1);
        assert_eq!(p.pending(), Err(Fault::Index));
        for _ in 0..8 {
            p.push(1);
        }
        assert_eq!(p.room(1), Ok(1));
    }

    #[test]
    fn offsets_that_cannot_be_are_refused() {
        let fd = memory();
        for bad in [
            libc::xdp_ring_offset { producer: 190, ..OFFSETS },
            libc::xdp_ring_offset { flags: 192, ..OFFSETS },
            libc::xdp_ring_offset { desc: u64::MAX, ..OFFSETS },
            libc::xdp_ring_offset { desc: 196, ..OFFSETS },
        ] {
            assert!(Consumer::<u64>::map(&fd, 0, &bad, 8).is_err(), "{bad:?}");
        }
    }
}
