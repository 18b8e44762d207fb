//! Copying between lists of buffers, most of them in guests' memory.
//!
//! A guest may change its bytes while they are copied. So they are only ever copied, byte by byte as
//! far as the language is concerned, and whatever is decided from them is decided from our copy.
#![allow(unsafe_code)]

use libc::iovec;

use crate::header::{HEADER_LEN, VnetHeader};

/// Asks the CPU for the cache line at `p`, for reading. Any address is allowed.
#[inline(always)]
pub fn prefetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults and changes nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Asks the CPU for the cache line at `p`, for writing. Any address is allowed.
#[inline(always)]
pub fn prefetch_write(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as in `prefetch`. Processors without the instruction take it as a no-op (Intel's SDM,
    // PREFETCHW); the intrinsic for it becomes a prefetch for reading unless the whole program is
    // built for newer processors, and then the line has to be asked for a second time.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) p, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// A list of buffers to read from.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    iov: &'a [iovec],
    /// Bytes at its start that do not belong to it.
    skip: usize,
    len: usize,
}

impl<'a> Source<'a> {
    /// `len` bytes from byte `skip` of the buffers on. No more bytes than they hold are ever read.
    ///
    /// # Safety
    /// Every buffer is valid for reads for `'a`, whoever else writes to it.
    #[inline]
    pub unsafe fn new(iov: &'a [iovec], skip: usize, len: usize) -> Self {
        Self { iov, skip, len }
    }

    /// Bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Without its first `n` bytes.
    #[inline]
    #[must_use]
    pub fn after(self, n: usize) -> Self {
        Self { skip: self.skip + n, len: self.len.saturating_sub(n), ..self }
    }

    /// Only its first `n` bytes.
    #[must_use]
    pub fn first(self, n: usize) -> Self {
        Self { len: self.len.min(n), ..self }
    }

    /// Appends its pieces to `out`, at most `max`; whether all went in.
    pub fn append_to(&self, out: &mut Vec<iovec>, max: usize) -> bool {
        let mut room = max;
        let mut whole = true;
        self.each(|p, n| {
            if room > 0 {
                out.push(iovec { iov_base: p.cast_mut().cast(), iov_len: n });
                room -= 1;
            } else {
                whole = false;
            }
        });
        whole
    }

    #[inline]
    fn each(&self, mut f: impl FnMut(*const u8, usize)) {
        let (mut skip, mut left) = (self.skip, self.len);
        for v in self.iov {
            if left == 0 {
                return;
            }
            if skip >= v.iov_len {
                skip -= v.iov_len;
                continue;
            }
            let n = left.min(v.iov_len - skip);
            f(v.iov_base.cast::<u8>().cast_const().wrapping_add(skip), n);
            left -= n;
            skip = 0;
        }
    }

    /// Copies into `out`; returns how many bytes there were.
    #[inline]
    pub fn read(&self, out: &mut [u8]) -> usize {
        let mut done = 0;
        Self { len: self.len.min(out.len()), ..*self }.each(|p, n| {
            // SAFETY: p is readable for n bytes (the promise of `new`); done + n <= out.len(); guest
            // memory and `out`, which is borrowed exclusively, do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(p, out.as_mut_ptr().add(done), n) };
            done += n;
        });
        done
    }
}

/// A list of buffers to write to, from the front.
pub struct Sink<'a> {
    iov: &'a [iovec],
    at: usize,
}

impl<'a> Sink<'a> {
    /// # Safety
    /// Every buffer is valid for writes for `'a`, whoever else uses it, and is no Rust object.
    #[inline]
    pub unsafe fn new(iov: &'a [iovec]) -> Self {
        Self { iov, at: 0 }
    }

    /// Writes `bytes`, then `source`, as far as there is room; returns how many bytes.
    #[inline]
    pub fn write(&mut self, bytes: &[u8], source: Source<'_>) -> usize {
        if let ([to], [from]) = (self.iov, source.iov)
            && self.at == 0
            && bytes.len() + source.len <= to.iov_len
            && source.skip + source.len <= from.iov_len
        {
            let p = to.iov_base.cast::<u8>();
            // SAFETY: both ranges were just checked to lie inside their buffers; where a guest sends
            // to itself they may overlap, which only `copy` allows.
            unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), p, bytes.len());
                let from = from.iov_base.cast::<u8>().add(source.skip);
                copy_frame(from, p.add(bytes.len()), source.len);
            }
            return bytes.len() + source.len;
        }
        self.write_pieces(bytes, source)
    }

    /// [`write`](Self::write) of a virtio-net header, as two numbers: they go from registers to the
    /// buffer. Through bytes on the stack they would wait there for all stores before them.
    #[inline]
    pub fn write_header(&mut self, (low, high): (u64, u32), source: Source<'_>) {
        const N: usize = HEADER_LEN;
        if let ([to], [from]) = (self.iov, source.iov)
            && self.at == 0
            && N + source.len <= to.iov_len
            && source.skip + source.len <= from.iov_len
        {
            let p = to.iov_base.cast::<u8>();
            // SAFETY: as in `write`; 12 bytes of header.
            unsafe {
                p.cast::<u64>().write_unaligned(low.to_le());
                p.add(8).cast::<u32>().write_unaligned(high.to_le());
                let from = from.iov_base.cast::<u8>().add(source.skip);
                copy_frame(from, p.add(N), source.len);
            }
        } else {
            self.write_pieces(&VnetHeader::from_words(low, high).to_bytes(), source);
        }
    }

    #[inline(never)]
    fn write_pieces(&mut self, bytes: &[u8], source: Source<'_>) -> usize {
        let mut done = self.put(bytes.as_ptr(), bytes.len());
        source.each(|p, n| done += self.put(p, n));
        done
    }

    fn put(&mut self, mut from: *const u8, len: usize) -> usize {
        let mut left = len;
        while left > 0 {
            let Some(v) = self.iov.first() else { break };
            let n = left.min(v.iov_len - self.at);
            // SAFETY: `at + n` is inside the buffer, `from` is readable for `left` bytes.
            unsafe {
                std::ptr::copy(from, v.iov_base.cast::<u8>().add(self.at), n);
                from = from.add(n);
            }
            left -= n;
            self.at += n;
            if self.at == v.iov_len {
                (self.iov, self.at) = (&self.iov[1..], 0);
            }
        }
        len - left
    }
}

/// Copies `len` bytes; short frames without a call.
///
/// # Safety
/// Both are valid for `len` bytes.
#[inline(always)]
unsafe fn copy_frame(from: *const u8, to: *mut u8, len: usize) {
    /// # Safety
    /// Both are valid for `size_of::<T>()` bytes at `at`.
    #[inline(always)]
    unsafe fn one<T>(from: *const u8, to: *mut u8, at: usize) {
        // SAFETY: the caller's promise; no alignment is needed.
        unsafe {
            to.add(at).cast::<T>().write_unaligned(from.add(at).cast::<T>().read_unaligned());
        }
    }
    // SAFETY: every piece lies in [0, len); pieces at the end overlap the ones before.
    unsafe {
        if (32..=128).contains(&len) {
            one::<[u128; 2]>(from, to, 0);
            if len > 64 {
                one::<[u128; 2]>(from, to, 32);
                if len > 96 {
                    one::<[u128; 2]>(from, to, 64);
                }
            }
            one::<[u128; 2]>(from, to, len - 32);
        } else {
            std::ptr::copy(from, to, len);
        }
    }
}

/// The iovec of bytes of our own, to be read from.
#[inline]
pub fn iovec_of(bytes: &[u8]) -> iovec {
    iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

/// Gives `f` the bytes as a [`Source`].
#[inline]
pub fn with_bytes<T>(bytes: &[u8], f: impl FnOnce(Source<'_>) -> T) -> T {
    let iov = [iovec_of(bytes)];
    // SAFETY: the one buffer is `bytes`, borrowed while `f` runs.
    f(unsafe { Source::new(&iov, 0, bytes.len()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut(buffer: &mut [u8], cuts: &[usize]) -> Vec<iovec> {
        let mut rest = buffer;
        let mut out = Vec::new();
        for c in cuts {
            let n = (*c).min(rest.len());
            let (a, b) = rest.split_at_mut(n);
            out.push(iovec { iov_base: a.as_mut_ptr().cast(), iov_len: a.len() });
            rest = b;
        }
        out.push(iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
        out
    }

    proptest! {
        #[test]
        fn copies_what_a_plain_copy_would(
            data in proptest::collection::vec(any::<u8>(), 0..400),
            prefix in proptest::collection::vec(any::<u8>(), 0..30),
            from_cuts in proptest::collection::vec(0usize..90, 0..5),
            to_cuts in proptest::collection::vec(0usize..90, 0..5),
            skip in 0usize..50,
            room in 0usize..500,
        ) {
            let mut from = data.clone();
            let iov = cut(&mut from, &from_cuts);
            let len = data.len().saturating_sub(skip);
            // SAFETY: the buffers are `from`, which outlives it.
            let source = unsafe { Source::new(&iov, skip, len) };
            let mut to = vec![0xaa; room];
            let to_iov = cut(&mut to, &to_cuts);
            // SAFETY: the buffers are `to`, not otherwise used meanwhile.
            let n = unsafe { Sink::new(&to_iov) }.write(&prefix, source);
            let mut expected = prefix.clone();
            expected.extend_from_slice(&data[data.len() - len..]);
            prop_assert_eq!(n, room.min(expected.len()));
            prop_assert_eq!(&to[..n], &expected[..n]);
            prop_assert!(to[n..].iter().all(|b| *b == 0xaa));
            let mut read = vec![0; len];
            prop_assert_eq!(source.read(&mut read), len);
            prop_assert_eq!(&read[..], &data[data.len() - len..]);
        }
    }

    #[test]
    fn every_short_length() {
        for len in 0..300usize {
            let mut from: Vec<u8> = (0..len).map(|i| i as u8 ^ 0x5a).collect();
            let mut to = vec![0; len + 1];
            let (f, t) = (cut(&mut from, &[]), cut(&mut to, &[]));
            // SAFETY: vectors that live longer.
            let n = unsafe { Sink::new(&t).write(&[], Source::new(&f, 0, len)) };
            assert_eq!((n, &to[..len], to[len]), (len, &from[..], 0));
        }
    }
}
