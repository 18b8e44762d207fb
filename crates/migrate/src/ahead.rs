//! Gets memory ready before its bytes come: while one thread copies what has arrived, another one
//! faults in what follows, as a stream of data goes on in order. At the destination most of the
//! time of a first round is the kernel's, for allocating and clearing pages.
//!
//! It never changes a byte, and so it may be late, or run beside whoever uses the memory.
#![allow(unsafe_code)] // madvise on guest memory

use std::sync::mpsc::{SyncSender, sync_channel};

use mem::{GuestMemory, PAGE_SIZE, Region};

/// Bytes that are got ready at once, and so at most in vain where the data ends: a huge page.
const PIECE: u64 = 2 << 20;
/// How many pieces ahead.
const PIECES: u64 = 2;
/// Pieces that may wait for the thread; what does not fit is not got ready.
const QUEUE: usize = 8;

/// One stream's.
pub struct Ahead {
    memory: GuestMemory,
    /// Starts with the first piece; `None` after it could not be started.
    to: Option<SyncSender<(usize, usize)>>,
    started: bool,
    /// Region, and first byte in it that was not asked for yet.
    next: (usize, u64),
}

impl Ahead {
    /// For a stream of pages into `memory`.
    pub fn new(memory: &GuestMemory) -> Self {
        Self { memory: memory.clone(), to: None, started: false, next: (usize::MAX, 0) }
    }

    /// Data for all pages from `first` to `end` (exclusive) is about to be read, to where nothing
    /// was yet: what lies behind it is likely to be next.
    pub fn follows(&mut self, region: &Region, first: u64, end: u64) {
        let (first, end) = (first * PAGE_SIZE, end * PAGE_SIZE);
        let until = ((end / PIECE + 1 + PIECES) * PIECE).min(region.size);
        let ahead = self.next.0 == region.index && (first..=until).contains(&self.next.1);
        let mut at = if ahead { self.next.1 } else { end.next_multiple_of(PIECE) };
        while at < until {
            let len = PIECE.min(region.size - at);
            if !self.put(region.host + at as usize, len as usize) {
                break;
            }
            at += len;
        }
        self.next = (region.index, at);
    }

    fn put(&mut self, host: usize, len: usize) -> bool {
        if !self.started {
            self.started = true;
            self.start();
        }
        self.to.as_ref().is_some_and(|to| to.try_send((host, len)).is_ok())
    }

    fn start(&mut self) {
        let (to, from) = sync_channel(QUEUE);
        let memory = self.memory.clone();
        let work = move || {
            // Ends with the stream, which holds the other end of the queue.
            for (host, len) in from {
                populate(host, len);
            }
            drop(memory); // was mapped all the time
        };
        let thread = std::thread::Builder::new().name("mig-ahead".into()).spawn(work);
        self.to = thread.is_ok().then_some(to);
    }
}

/// Faults pages in at once, which is cheaper than one by one in the read. A host that cannot does
/// it one by one.
pub fn populate(host: usize, len: usize) {
    // SAFETY: the range is mapped guest memory; this only allocates its pages.
    unsafe { libc::madvise(host as *mut libc::c_void, len, libc::MADV_POPULATE_WRITE) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::populated::populated;
    use mem::{Backing, RegionSpec};

    #[test]
    fn touches_what_follows_and_nothing_else() {
        let specs = [RegionSpec { gpa: 0, size: (20 << 20) + PAGE_SIZE }];
        let memory = GuestMemory::new(&specs, &Backing::default()).unwrap();
        let region = &memory.regions()[0];
        let mut ahead = Ahead::new(&memory);
        let there = |pages: u64| {
            for _ in 0..500 {
                if populated(region).unwrap().count() >= pages {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
            populated(region).unwrap()
        };
        // 1 MiB of data at 3 MiB, up to a piece's end: two pieces and the one that begins there.
        ahead.follows(region, 768, 1024);
        let map = there(3 * 512);
        assert_eq!(map.count(), 3 * 512);
        assert!(!map.test(1023) && map.test(1024) && map.test(1024 + 3 * 512 - 1));
        // The end of the region is the end.
        ahead.follows(region, 5000, region.pages());
        ahead.follows(region, 4000, 4500);
        let map = there(3 * 512 + region.pages() - 9 * 512);
        assert!(map.test(region.pages() - 1) && !map.test(8 * 512 - 1));
    }
}
