//! A queue of frames between two threads, one that pushes and one that pops; no locks. It carries
//! frames from one poll thread to another, and to a capture's writer.
//!
//! The bytes of a record: its length (u32) and 16 bytes of the user's, then the frame, padded to a
//! multiple of 8. A record that would cross the end begins at the start, and a length of [`SKIP`] says
//! so.
//!
//! Invariants: `tail` is written by the one who pushes, `head` by the one who pops; bytes in
//! `[head, tail)` belong to the one who pops, all others to the one who pushes. That there is one of
//! each at a time is enforced by a flag each, which a second one finds taken: it is told that the
//! ring is full, or empty.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::copy::{Sink, Source};

/// Most frames taken out at once.
pub const BATCH: usize = 32;
/// A frame with the user's 16 bytes.
pub type Record<'a> = (&'a [u8; 16], &'a [u8]);

const SKIP: u32 = u32::MAX;
const RECORD: usize = 24;

#[repr(align(128))]
#[derive(Debug, Default)]
struct Side {
    position: AtomicUsize,
    busy: AtomicBool,
}

/// The queue.
#[derive(Debug)]
pub struct FrameRing {
    bytes: Box<[UnsafeCell<u64>]>,
    mask: usize,
    tail: Side,
    head: Side,
}

// SAFETY: the module's invariant says which thread may touch which bytes.
unsafe impl Sync for FrameRing {}
// SAFETY: nothing in it is tied to a thread.
unsafe impl Send for FrameRing {}

impl FrameRing {
    /// Room for `bytes` (made a power of two, at least 256 KiB).
    pub fn new(bytes: usize) -> Self {
        let size = bytes.next_power_of_two().max(256 << 10);
        Self {
            bytes: (0..size / 8).map(|_| UnsafeCell::new(0)).collect(),
            mask: size - 1,
            tail: Side::default(),
            head: Side::default(),
        }
    }

    fn at(&self, position: usize) -> *mut u8 {
        // Positions of records are multiples of 8; the mask keeps it inside.
        UnsafeCell::raw_get(self.bytes.as_ptr()).cast::<u8>().wrapping_add(position & self.mask)
    }

    /// Adds `prefix` and `rest` as one frame, with `meta`. `false`: no room.
    pub fn push(&self, meta: &[u8; 16], prefix: &[u8], rest: Source<'_>) -> bool {
        if self.tail.busy.swap(true, Ordering::Acquire) {
            return false;
        }
        let done = self.push_alone(meta, prefix, rest);
        self.tail.busy.store(false, Ordering::Release);
        done
    }

    fn push_alone(&self, meta: &[u8; 16], prefix: &[u8], rest: Source<'_>) -> bool {
        let len = prefix.len() + rest.len();
        let need = (RECORD + len).next_multiple_of(8);
        let mut tail = self.tail.position.load(Ordering::Relaxed);
        let head = self.head.position.load(Ordering::Acquire);
        let size = self.mask + 1;
        let to_end = size - (tail & self.mask);
        let skip = if to_end < need { to_end } else { 0 };
        if tail - head + skip + need > size {
            return false;
        }
        // SAFETY: [tail, tail + skip + need) is free (just checked) and ours; `need` bytes lie before
        // the end of the buffer.
        unsafe {
            if skip > 0 {
                self.at(tail).cast::<u32>().write(SKIP);
                tail += skip;
            }
            let p = self.at(tail);
            p.cast::<u32>().write(len as u32);
            std::ptr::copy_nonoverlapping(meta.as_ptr(), p.add(8), meta.len());
            let to = [libc::iovec { iov_base: p.add(RECORD).cast(), iov_len: len }];
            Sink::new(&to).write(prefix, rest);
        }
        self.tail.position.store(tail + need, Ordering::Release);
        true
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.head.position.load(Ordering::Acquire) == self.tail.position.load(Ordering::Acquire)
    }

    /// Gives the oldest frames, up to [`BATCH`], to `f` and takes them out. `None`: there is none.
    pub fn pop<T>(&self, f: impl FnOnce(&[Record<'_>]) -> T) -> Option<T> {
        if self.head.busy.swap(true, Ordering::Acquire) {
            return None;
        }
        let done = self.pop_alone(f);
        self.head.busy.store(false, Ordering::Release);
        done
    }

    fn pop_alone<T>(&self, f: impl FnOnce(&[Record<'_>]) -> T) -> Option<T> {
        let mut head = self.head.position.load(Ordering::Relaxed);
        let tail = self.tail.position.load(Ordering::Acquire);
        if head == tail {
            return None;
        }
        let mut records = [(&[0; 16], &[][..]); BATCH];
        let mut n = 0;
        while n < BATCH && head != tail {
            // SAFETY: bytes in [head, tail) are ours and were written by `push_alone`, so they hold
            // whole records, each in one piece, before the end of the buffer.
            records[n] = unsafe {
                if self.at(head).cast::<u32>().read() == SKIP {
                    head += self.mask + 1 - (head & self.mask);
                }
                let p = self.at(head);
                let len = p.cast::<u32>().read() as usize;
                (&*p.add(8).cast::<[u8; 16]>(), std::slice::from_raw_parts(p.add(RECORD), len))
            };
            head += (RECORD + records[n].1.len()).next_multiple_of(8);
            n += 1;
        }
        let result = f(&records[..n]);
        self.head.position.store(head, Ordering::Release);
        Some(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::with_bytes;

    #[test]
    fn frames_come_out_as_they_went_in_on_another_thread() {
        let ring = FrameRing::new(1);
        const COUNT: u32 = 20_000;
        let len = |i: u32| (i as usize * 97) % 9000;
        std::thread::scope(|s| {
            s.spawn(|| {
                for i in 0..COUNT {
                    let body = vec![i as u8; len(i)];
                    let mut meta = [0; 16];
                    meta[..4].copy_from_slice(&i.to_le_bytes());
                    while !with_bytes(&body, |b| ring.push(&meta, &i.to_le_bytes(), b)) {
                        std::thread::yield_now();
                    }
                }
            });
            let mut i = 0;
            while i < COUNT {
                let got = ring.pop(|records| {
                    for (meta, bytes) in records {
                        assert_eq!(meta[..4], i.to_le_bytes());
                        assert_eq!(bytes[..4], i.to_le_bytes());
                        assert_eq!(bytes.len(), 4 + len(i));
                        assert!(bytes[4..].iter().all(|b| *b == i as u8));
                        i += 1;
                    }
                });
                if got.is_none() {
                    std::thread::yield_now();
                }
            }
        });
        assert!(ring.is_empty());
    }

    #[test]
    fn a_full_ring_says_so() {
        let ring = FrameRing::new(256 << 10);
        let body = vec![0; 60_000];
        let count = (0..10).filter(|_| with_bytes(&body, |b| ring.push(&[0; 16], &[], b))).count();
        assert_eq!(count, 4);
        assert_eq!(ring.pop(|r| r.len()), Some(4));
        assert_eq!(ring.pop(|r| r.len()), None);
    }
}
