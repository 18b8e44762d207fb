//! Memory that I/O reads from or writes to: pieces of guest RAM, or bytes of our own.
//!
//! Invariant: every iovec of a [`Buffer`] points into memory that the buffer itself keeps alive
//! (a clone of the guest memory, or a heap allocation), so a request may be handed to the kernel
//! for as long as its buffer is kept.
#![allow(unsafe_code)] // raw copies between iovecs and aligned bounce memory

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

use mem::GuestMemory;

/// Heap memory with a chosen alignment.
#[derive(Debug)]
pub(crate) struct Aligned {
    ptr: *mut u8,
    layout: Layout,
}

// SAFETY: it owns its allocation, as a Box does.
unsafe impl Send for Aligned {}

impl Aligned {
    /// `len` zero bytes at a multiple of `align` (a power of two; rounded up to one).
    pub(crate) fn new(len: usize, align: usize) -> Self {
        let align = align.next_power_of_two().max(512);
        let layout = Layout::from_size_align(len.max(1), align).unwrap_or(Layout::new::<u64>());
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        if ptr.is_null() {
            handle_alloc_error(layout);
        }
        Self { ptr, layout }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: ptr is valid for the layout's size and initialised (zeroed at the start); `&mut
        // self` is needed for any write by Rust code.
        unsafe { std::slice::from_raw_parts(self.ptr, self.layout.size()) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and we hold it exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.layout.size()) }
    }

    pub(crate) fn iovec(&self, len: usize) -> libc::iovec {
        libc::iovec { iov_base: self.ptr.cast(), iov_len: len.min(self.layout.size()) }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.ptr, self.layout) };
    }
}

/// Where the bytes of a request are.
#[derive(Debug, Default)]
pub struct Buffer {
    iov: Vec<libc::iovec>,
    len: usize,
    /// Keeps guest RAM mapped.
    mem: Option<GuestMemory>,
    /// Keeps our own bytes.
    own: Option<Aligned>,
}

// SAFETY: the iovecs point into memory that the buffer owns or keeps alive; which thread holds
// the buffer makes no difference to that.
unsafe impl Send for Buffer {}

impl Buffer {
    /// No bytes.
    pub fn empty() -> Self {
        Self::default()
    }

    /// The pieces `(guest address, bytes)` of guest RAM, in order; empty pieces are left out.
    ///
    /// # Errors
    /// [`mem::Error::NotRam`] when a piece is not RAM.
    pub fn guest(
        mem: &GuestMemory,
        pieces: impl IntoIterator<Item = (u64, usize)>,
    ) -> mem::Result<Self> {
        let mut buffer = Self { mem: Some(mem.clone()), ..Self::default() };
        for (gpa, len) in pieces {
            buffer.push(gpa, len)?;
        }
        Ok(buffer)
    }

    fn push(&mut self, gpa: u64, len: usize) -> mem::Result<()> {
        if len > 0
            && let Some(mem) = &self.mem
        {
            self.iov.push(mem.slice(gpa, len)?.iovec());
            self.len += len;
        }
        Ok(())
    }

    /// Starts anew with other pieces of guest RAM, keeping the allocation.
    ///
    /// # Errors
    /// As [`guest`](Self::guest); the buffer is empty then.
    pub fn refill(
        &mut self,
        mem: &GuestMemory,
        pieces: impl IntoIterator<Item = (u64, usize)>,
    ) -> mem::Result<()> {
        self.clear();
        self.mem = Some(mem.clone());
        for (gpa, len) in pieces {
            if let Err(e) = self.push(gpa, len) {
                self.clear();
                return Err(e);
            }
        }
        Ok(())
    }

    /// Starts anew with the iovecs that `fill` appends (it returns how many bytes they hold),
    /// keeping the allocation.
    ///
    /// # Safety
    /// Every iovec must lie in RAM of `mem`, which the buffer keeps alive.
    pub unsafe fn refill_iovecs(
        &mut self,
        mem: &GuestMemory,
        fill: impl FnOnce(&mut Vec<libc::iovec>) -> u32,
    ) {
        self.clear();
        if !self.mem.as_ref().is_some_and(|m| m.is_same(mem)) {
            self.mem = Some(mem.clone());
        }
        self.len = fill(&mut self.iov) as usize;
    }

    /// Forgets all pieces.
    pub fn clear(&mut self) {
        self.iov.clear();
        self.len = 0;
        self.own = None;
    }

    /// A copy of `bytes`, aligned for direct I/O.
    pub fn bytes(bytes: &[u8]) -> Self {
        let mut own = Aligned::new(bytes.len(), 4096);
        own.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        Self { iov: vec![own.iovec(bytes.len())], len: bytes.len(), mem: None, own: Some(own) }
    }

    /// `len` zero bytes of our own.
    pub fn zeroes(len: usize) -> Self {
        let own = Aligned::new(len, 4096);
        Self { iov: vec![own.iovec(len)], len, mem: None, own: Some(own) }
    }

    /// Our own bytes, if it was made by [`bytes`](Self::bytes) or [`zeroes`](Self::zeroes).
    pub fn own_bytes(&self) -> Option<&[u8]> {
        self.own.as_ref().map(|o| &o.bytes()[..self.len])
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn iovecs(&self) -> &[libc::iovec] {
        &self.iov
    }

    /// Whether every piece begins and ends at a multiple of `align` bytes of host memory.
    pub(crate) fn aligned_to(&self, align: usize) -> bool {
        self.iov.iter().all(|v| v.iov_base.addr() % align == 0 && v.iov_len % align == 0)
    }

    /// Calls `f(pointer, length, position)` for each piece of bytes `[from, from + len)`;
    /// `position` counts from `from`.
    fn pieces(&self, from: usize, len: usize, mut f: impl FnMut(*mut u8, usize, usize)) {
        let (mut skip, mut at) = (from, 0);
        for v in &self.iov {
            let s = skip.min(v.iov_len);
            skip -= s;
            let n = (v.iov_len - s).min(len - at);
            if n > 0 {
                f(v.iov_base.cast::<u8>().wrapping_add(s), n, at);
                at += n;
            }
        }
    }

    /// Copies bytes from position `from` on out.
    pub(crate) fn copy_to(&self, from: usize, out: &mut [u8]) {
        let len = out.len();
        let out = out.as_mut_ptr();
        self.pieces(from, len, |p, n, at| {
            // SAFETY: p is valid for n bytes (invariant of the buffer), at + n <= out's length;
            // guest RAM that changes meanwhile only makes the bytes odd.
            unsafe { std::ptr::copy_nonoverlapping(p, out.add(at), n) };
        });
    }

    /// Copies `bytes` to position `from`.
    pub(crate) fn copy_from(&self, from: usize, bytes: &[u8]) {
        self.pieces(from, bytes.len(), |p, n, at| {
            // SAFETY: as in `copy_to`.
            unsafe { std::ptr::copy_nonoverlapping(bytes[at..].as_ptr(), p, n) };
        });
    }

    /// Zeroes everything from byte `from` on.
    pub(crate) fn zero_from(&self, from: usize) {
        self.pieces(from, self.len.saturating_sub(from), |p, n, _| {
            // SAFETY: p is valid for n bytes.
            unsafe { std::ptr::write_bytes(p, 0, n) };
        });
    }
}
