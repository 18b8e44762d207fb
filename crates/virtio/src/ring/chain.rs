//! One descriptor chain, resolved: the driver's buffers as iovecs, the readable ones first.
//!
//! Invariants: every iovec lies in RAM of `mem`, which the chain keeps alive; readable ones come
//! before writable ones; both totals together are below 4 GiB. The guest may change the bytes
//! at any time, so they are only ever copied.
#![allow(unsafe_code)]

use std::cell::Cell;

use mem::{ByteValued, GuestMemory};

use super::RingError;
use super::raw::{DESC_INDIRECT, DESC_NEXT, DESC_SIZE, DESC_WRITE, RawDesc};

/// Most buffers in one chain, and most descriptors of an indirect table that are followed, empty
/// ones included: what `readv` and io_uring take at once (UIO_MAXIOV). A driver may not make a chain
/// longer than its queue (VIRTIO 1.2, 2.7.5.3.1), but some do where queues are short.
pub const MAX_SEGMENTS: usize = 1024;

/// A reusable holder of one chain. Made once with [`Chain::new`], filled by
/// [`Ring::pop`](super::Ring::pop) again and again.
///
/// One line of a CPU's cache: a switch keeps dozens of them for each ring, and nearly all chains
/// have one buffer.
#[repr(align(64))]
pub struct Chain {
    mem: Option<GuestMemory>,
    /// The only buffer, of length 0 if there is none; without a meaning if `shape` says several.
    one: libc::iovec,
    /// Guest address of `one`.
    gpa: u64,
    /// All buffers of a chain with several; kept for the next such chain.
    several: Option<Box<Several>>,
    readable_len: u32,
    writable_len: u32,
    /// Bytes of the writable part, from its start, that may have been written other than by the
    /// length given to `push`.
    touched: Cell<u32>,
    shape: Shape,
    pub(super) token: Token,
}

const _: () = assert!(size_of::<Chain>() == 64);

/// Buffers and their guest addresses.
#[derive(Default)]
struct Several {
    iov: Vec<libc::iovec>,
    gpa: Vec<u64>,
}

/// How many buffers of a chain are readable, and what is said in [`Shape::SEVERAL`] and
/// [`Shape::ALL_READABLE`].
#[derive(Debug, Default, Clone, Copy)]
struct Shape(u16);

impl Shape {
    /// The buffers are in `several`.
    const SEVERAL: u16 = 1 << 15;
    /// Every buffer counts as readable, whatever the driver says of it.
    const ALL_READABLE: u16 = 1 << 14;
    /// The bits of the number.
    const READABLE: u16 = Self::ALL_READABLE - 1;

    #[inline]
    fn has(self, flag: u16) -> bool {
        self.0 & flag != 0
    }

    #[inline]
    fn readable(self) -> usize {
        usize::from(self.0 & Self::READABLE)
    }

    /// `n` is [`MAX_SEGMENTS`] at most.
    #[inline]
    fn set_readable(&mut self, n: usize) {
        self.0 = self.0 & !Self::READABLE | n as u16;
    }
}

const _: () = assert!(MAX_SEGMENTS <= Shape::READABLE as usize);

impl Default for Chain {
    fn default() -> Self {
        Self {
            mem: None,
            one: libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 },
            gpa: 0,
            several: None,
            readable_len: 0,
            writable_len: 0,
            touched: Cell::new(0),
            shape: Shape::default(),
            token: Token::default(),
        }
    }
}

/// Which place in the ring a chain has.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token {
    /// Head index (split) or buffer id (packed).
    pub id: u16,
    /// Ring entries that it takes: 1 (split) or the number of descriptors (packed).
    pub entries: u16,
    /// Avail position before and after it was popped, as in `RingPos`; the same if it was taken by
    /// an earlier process.
    pub before: u16,
    pub after: u16,
    /// Its entry in the in-flight table, if there is one.
    pub slot: u16,
}

// SAFETY: the raw pointers point into guest RAM that `mem` keeps alive and that any thread may
// access; nothing else in the chain is tied to a thread.
unsafe impl Send for Chain {}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { readable_len, writable_len, token, .. } = self;
        write!(f, "Chain({} readable, {} writable, id {})", readable_len, writable_len, token.id)
    }
}

impl Chain {
    /// An empty chain, to be filled by `pop`.
    pub fn new() -> Self {
        Self::default()
    }

    /// One for a ring that only carries what the driver sends, in which every buffer counts as
    /// readable. DPDK's driver (22.11) marks the header of a packed indirect chain that it sends as
    /// writable, and other devices do not look.
    pub fn all_readable() -> Self {
        Self { shape: Shape(Shape::ALL_READABLE), ..Self::default() }
    }

    /// Head index (split) or buffer id (packed), for logs and in-flight tables.
    pub fn id(&self) -> u16 {
        self.token.id
    }

    /// Guest address of its first buffer.
    #[cfg(test)]
    pub(super) fn gpa(&self) -> u64 {
        self.addresses()[0]
    }

    /// Bytes that the device may read.
    #[inline]
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes that the device may write.
    #[inline]
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// The readable part. The pointers are valid while the chain is not popped into again or
    /// dropped. Never to be made into Rust slices: the guest writes there.
    #[inline]
    pub fn readable(&self) -> &[libc::iovec] {
        &self.buffers()[..self.shape.readable()]
    }

    /// The writable part, as [`readable`](Self::readable).
    #[inline]
    pub fn writable(&self) -> &[libc::iovec] {
        &self.buffers()[self.shape.readable()..]
    }

    #[inline]
    fn buffers(&self) -> &[libc::iovec] {
        match &self.several {
            Some(all) if self.shape.has(Shape::SEVERAL) => &all.iov,
            _ if self.one.iov_len > 0 => std::slice::from_ref(&self.one),
            _ => &[],
        }
    }

    /// Guest addresses of [`buffers`](Self::buffers).
    fn addresses(&self) -> &[u64] {
        match &self.several {
            Some(all) if self.shape.has(Shape::SEVERAL) => &all.gpa,
            _ if self.one.iov_len > 0 => std::slice::from_ref(&self.gpa),
            _ => &[],
        }
    }

    /// Appends the iovecs of up to `len` bytes at byte `offset` of the readable part to `out`;
    /// returns how many bytes they hold.
    pub fn readable_iovecs(&self, offset: u32, len: u32, out: &mut Vec<libc::iovec>) -> u32 {
        append(self.readable(), offset, len, out)
    }

    /// Appends the iovecs of up to `len` bytes at byte `offset` of the writable part to `out`;
    /// returns how many bytes they hold. If fewer bytes than may have been written are given to
    /// `push` (an I/O that failed half-way), call [`touch`](Self::touch).
    pub fn writable_iovecs(&self, offset: u32, len: u32, out: &mut Vec<libc::iovec>) -> u32 {
        append(self.writable(), offset, len, out)
    }

    /// Says that the first `len` bytes of the writable part may have been written, so that `push`
    /// records them as dirty whatever length it is given.
    pub fn touch(&self, len: u32) {
        self.touched.set(self.touched.get().max(len));
    }

    /// Copies from byte `offset` of the readable part into `buf`; returns how many bytes there
    /// were.
    pub fn read_at(&self, offset: u32, buf: &mut [u8]) -> usize {
        let mut done = 0;
        for_each(self.readable(), offset, buf.len(), |p, n| {
            // SAFETY: p is valid for n bytes of guest RAM; done + n <= buf.len().
            unsafe { std::ptr::copy_nonoverlapping(p, buf.as_mut_ptr().add(done), n) };
            done += n;
        });
        done
    }

    /// A plain-data value at byte `offset` of the readable part; `None` if that is too short.
    pub fn read_obj<T: ByteValued>(&self, offset: u32) -> Option<T> {
        let mut v = T::zeroed();
        (self.read_at(offset, v.as_mut_slice()) == size_of::<T>()).then_some(v)
    }

    /// Copies `data` to byte `offset` of the writable part; returns how many bytes fitted.
    pub fn write_at(&self, offset: u32, data: &[u8]) -> usize {
        let mut done = 0;
        for_each(self.writable(), offset, data.len(), |p, n| {
            // SAFETY: p is valid for n bytes of guest RAM; done + n <= data.len().
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr().add(done), p, n) };
            done += n;
        });
        if done > 0 {
            self.touch(offset.saturating_add(done as u32));
        }
        done
    }

    /// Writes a plain-data value at byte `offset` of the writable part; whether it fitted (a part
    /// may have been written if not).
    pub fn write_obj<T: ByteValued>(&self, offset: u32, v: &T) -> bool {
        self.write_at(offset, v.as_slice()) == size_of::<T>()
    }

    /// Zeroes up to `len` bytes at byte `offset` of the writable part; returns how many.
    pub fn fill_zero_at(&self, offset: u32, len: u32) -> u32 {
        let mut done = 0;
        for_each(self.writable(), offset, len as usize, |p, n| {
            // SAFETY: p is valid for n bytes of guest RAM.
            unsafe { std::ptr::write_bytes(p, 0, n) };
            done += n as u32;
        });
        if done > 0 {
            self.touch(offset.saturating_add(done));
        }
        done
    }

    /// Records the first `written` (or touched) bytes of the writable part as dirty.
    #[inline]
    pub(super) fn record_dirty(&self, written: u32) {
        let Some(mem) = self.mem.as_ref().filter(|m| m.is_recording()) else { return };
        let mut left = u64::from(written.max(self.touched.get()));
        for (iov, gpa) in self.writable().iter().zip(&self.addresses()[self.shape.readable()..]) {
            let n = left.min(iov.iov_len as u64);
            mem.mark_dirty(*gpa, n);
            left -= n;
            if left == 0 {
                break;
            }
        }
    }

    /// Empties it, before it is filled again from memory `mem`.
    #[inline]
    pub(super) fn begin(&mut self, mem: &GuestMemory) {
        if !self.mem.as_ref().is_some_and(|m| m.is_same(mem)) {
            self.mem = Some(mem.clone());
        }
        self.one.iov_len = 0;
        self.shape.0 &= Shape::ALL_READABLE;
        (self.readable_len, self.writable_len) = (0, 0);
        self.touched.set(0);
    }

    /// [`add`](Self::add) of a chain's only buffer, right after `begin`: the usual case.
    #[inline]
    pub(super) fn add_only(
        &mut self,
        mem: &GuestMemory,
        addr: u64,
        len: u32,
        writable: bool,
    ) -> Result<(), RingError> {
        match mem.slice(addr, len as usize) {
            Ok(slice) if len > 0 => {
                (self.one, self.gpa) = (slice.iovec(), addr);
                if writable && !self.shape.has(Shape::ALL_READABLE) {
                    self.writable_len = len;
                } else {
                    self.readable_len = len;
                    self.shape.set_readable(1);
                }
                Ok(())
            }
            _ => self.add(mem, addr, len, writable),
        }
    }

    /// Adds a buffer in `mem`, the same memory as given to `begin`. Empty ones are left out.
    #[inline]
    pub(super) fn add(
        &mut self,
        mem: &GuestMemory,
        addr: u64,
        len: u32,
        writable: bool,
    ) -> Result<(), RingError> {
        let writable = writable && !self.shape.has(Shape::ALL_READABLE);
        if !writable && self.buffers().len() > self.shape.readable() {
            return Err(RingError::Order);
        }
        let total =
            self.readable_len.checked_add(self.writable_len).and_then(|n| n.checked_add(len));
        if total.is_none() {
            return Err(RingError::TotalLength);
        }
        let mut done = 0;
        while done < len {
            if self.buffers().len() >= MAX_SEGMENTS {
                return Err(RingError::TooManySegments);
            }
            let at = addr.checked_add(u64::from(done)).ok_or(RingError::Buffer { addr, len })?;
            let want = (len - done) as usize;
            // A buffer may cross from one RAM region into one right behind it.
            let slice = mem.slice_up_to(at, want).map_err(|_| RingError::Buffer { addr, len })?;
            self.push_buffer(slice.iovec(), at);
            done += slice.len() as u32;
        }
        if writable {
            self.writable_len += len;
        } else {
            self.readable_len += len;
            self.shape.set_readable(self.buffers().len());
        }
        Ok(())
    }

    /// One buffer more, behind the others.
    #[inline]
    fn push_buffer(&mut self, buffer: libc::iovec, gpa: u64) {
        if self.buffers().is_empty() {
            (self.one, self.gpa) = (buffer, gpa);
            return;
        }
        let all = self.several.get_or_insert_default();
        if !self.shape.has(Shape::SEVERAL) {
            self.shape.0 |= Shape::SEVERAL;
            all.iov.clear();
            all.gpa.clear();
            all.iov.push(self.one);
            all.gpa.push(self.gpa);
        }
        all.iov.push(buffer);
        all.gpa.push(gpa);
    }

    /// Adds a descriptor of a packed ring, direct or not, as an in-flight table has kept it.
    pub(super) fn add_packed(&mut self, mem: &GuestMemory, d: &RawDesc) -> Result<(), RingError> {
        if d.at14 & DESC_INDIRECT != 0 {
            return self.add_indirect(mem, d.addr, d.len, false);
        }
        self.add(mem, d.addr, d.len, d.at14 & DESC_WRITE != 0)
    }

    /// Adds the buffers of an indirect table. `split` tables are linked by `next`, packed ones are
    /// in order.
    pub(super) fn add_indirect(
        &mut self,
        mem: &GuestMemory,
        table: u64,
        len: u32,
        split: bool,
    ) -> Result<(), RingError> {
        if len == 0 || !len.is_multiple_of(DESC_SIZE) {
            return Err(RingError::IndirectLength(len));
        }
        let host =
            mem.slice(table, len as usize).map_err(|_| RingError::Buffer { addr: table, len })?;
        let size = len / DESC_SIZE;
        let mut i = 0;
        for n in 0..size {
            if n == MAX_SEGMENTS as u32 {
                return Err(RingError::ChainTooLong);
            }
            let mut bytes = [0; DESC_SIZE as usize];
            // SAFETY: i < size, so the 16 bytes are inside the slice just checked.
            unsafe {
                let p = host.as_ptr().add(i as usize * DESC_SIZE as usize);
                std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), bytes.len());
            }
            let d = RawDesc::from_bytes(bytes);
            let flags = if split { d.at12 } else { d.at14 };
            if flags & DESC_INDIRECT != 0 {
                return Err(RingError::IndirectNested);
            }
            self.add(mem, d.addr, d.len, flags & DESC_WRITE != 0)?;
            if !split {
                i += 1;
            } else if flags & DESC_NEXT == 0 {
                return Ok(());
            } else if u32::from(d.at14) >= size {
                return Err(RingError::DescriptorIndex { index: d.at14, size });
            } else {
                i = u32::from(d.at14);
            }
        }
        if split { Err(RingError::ChainTooLong) } else { Ok(()) }
    }
}

/// Calls `f` with each contiguous piece of `len` bytes at `offset` of `iov`.
#[inline]
fn for_each(iov: &[libc::iovec], offset: u32, len: usize, mut f: impl FnMut(*mut u8, usize)) {
    let mut skip = offset as usize;
    let mut left = len;
    for v in iov {
        if left == 0 {
            return;
        }
        if skip >= v.iov_len {
            skip -= v.iov_len;
            continue;
        }
        let n = left.min(v.iov_len - skip);
        // Wrapping: no dereference here; skip < iov_len, so it stays inside the buffer.
        f(v.iov_base.cast::<u8>().wrapping_add(skip), n);
        left -= n;
        skip = 0;
    }
}

fn append(iov: &[libc::iovec], offset: u32, len: u32, out: &mut Vec<libc::iovec>) -> u32 {
    let mut done = 0;
    for_each(iov, offset, len as usize, |p, n| {
        out.push(libc::iovec { iov_base: p.cast(), iov_len: n });
        done += n as u32;
    });
    done
}
