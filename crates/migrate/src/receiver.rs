//! Receives RAM frames on one connection, straight into guest memory.
//!
//! Every header and table is checked before a byte of data is read, so that nothing is written
//! outside the guest's RAM whatever comes. Pages that were never touched here are zero already: a
//! zero page leaves them untouched.
#![allow(unsafe_code)] // iovecs into guest memory

use std::io::{self, Read};

use mem::{Bitmap, GuestMemory, PAGE_SIZE, Region};

use crate::ahead::{Ahead, populate};
use crate::channel::Channel;
use crate::populated::populated;
use crate::ram::{self, Kind, Run};
use crate::stats::Counters;
use crate::{Error, Result, zero};

/// Pages of data in a row after which more are expected to follow.
const DENSE: u64 = 64;

/// A stream of RAM frames.
pub trait Stream {
    /// Fills `buf`.
    fn read_all(&mut self, buf: &mut [u8]) -> io::Result<()>;
    /// Fills all of `iov`, which is used up.
    ///
    /// # Safety
    /// Every iovec must be writable memory for the whole call.
    unsafe fn readv_all(&mut self, iov: &mut [libc::iovec]) -> io::Result<()>;
}

impl Stream for &Channel {
    fn read_all(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.read_exact(buf)
    }
    unsafe fn readv_all(&mut self, iov: &mut [libc::iovec]) -> io::Result<()> {
        // SAFETY: as the caller vouches.
        unsafe { Channel::readv_all(self, iov) }
    }
}

/// Bytes in memory, for tests and fuzzing.
impl Stream for &[u8] {
    fn read_all(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.read_exact(buf)
    }
    unsafe fn readv_all(&mut self, iov: &mut [libc::iovec]) -> io::Result<()> {
        for v in iov {
            let Some((now, rest)) = self.split_at_checked(v.iov_len) else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            // SAFETY: the caller vouches for iov_len writable bytes, and `now` has as many.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), v.iov_base.cast(), now.len()) };
            *self = rest;
        }
        Ok(())
    }
}

struct Target {
    /// Pages that may be other than zero here; `None` when that is not known (any may).
    touched: Option<Bitmap>,
    /// Pages that came at least once.
    seen: Bitmap,
}

/// The memory that is received into, shared by all connections.
pub struct Receiver {
    memory: GuestMemory,
    targets: Vec<Target>,
    pub counters: Counters,
}

/// The end of a round on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sync {
    pub round: u64,
    pub last: bool,
}

impl Receiver {
    /// For `memory`, as it is now.
    pub fn new(memory: &GuestMemory) -> Self {
        let target = |r: &Region| Target { touched: populated(r), seen: Bitmap::new(r.pages()) };
        let targets = memory.regions().iter().map(target).collect();
        Self { memory: memory.clone(), targets, counters: Counters::default() }
    }

    /// The first page that never came, if any: (guest address, number of missing pages).
    pub fn missing(&self) -> Option<(u64, u64)> {
        let mut missing = None;
        for (r, t) in self.memory.regions().iter().zip(&self.targets) {
            let lacks = r.pages() - t.seen.count();
            if lacks > 0 {
                let first = (0..r.pages()).find(|p| !t.seen.test(*p)).unwrap_or(0);
                let (_, n) = missing.unwrap_or((0, 0));
                missing =
                    Some((missing.map_or(r.gpa + first * PAGE_SIZE, |(at, _)| at), n + lacks));
            }
        }
        missing
    }

    /// Receives frames from `stream` until its last sync. `synced` is called at the end of every
    /// round, with all of its pages in memory.
    ///
    /// # Errors
    /// [`Error::Lost`] when the stream ends early, [`Error::Protocol`] for anything malformed.
    pub fn run(&self, mut stream: impl Stream, synced: &mut dyn FnMut(Sync)) -> Result<()> {
        let lost = |e| Error::Lost(format!("the migration's memory connection was lost: {e}"));
        let mut head = [0; ram::HEADER];
        let mut table = vec![0; ram::MAX_RUNS * ram::RUN];
        let mut runs = Vec::with_capacity(ram::MAX_RUNS);
        let mut iov = Vec::with_capacity(ram::MAX_RUNS);
        let mut ahead = Ahead::new(&self.memory);
        let mut round = 0;
        for sequence in 0.. {
            stream.read_all(&mut head).map_err(lost)?;
            match ram::header(&head, sequence)? {
                Kind::Pages { region, runs: n, data } => {
                    let table = &mut table[..n as usize * ram::RUN];
                    stream.read_all(table).map_err(lost)?;
                    let region = usize::from(region);
                    let Some(r) = self.memory.regions().get(region) else {
                        let have = self.targets.len();
                        return Err(Error::Protocol(format!("memory region {region} of {have}")));
                    };
                    ram::table(&head, table, data, r.pages(), &mut runs)?;
                    self.place(r, &runs, &mut iov, &mut ahead);
                    // SAFETY: `place` made the iovecs of runs that lie in the region, whose
                    // mapping self.memory keeps.
                    unsafe { stream.readv_all(&mut iov) }.map_err(lost)?;
                    let zeroes = runs.iter().filter(|r| r.zero).map(|r| u64::from(r.count)).sum();
                    let bytes = (ram::HEADER + table.len()) as u64 + u64::from(data) * PAGE_SIZE;
                    self.counters.frame(bytes, data.into(), zeroes);
                }
                Kind::Sync { round: r, last } => {
                    ram::check(&head, &[])?;
                    if u64::from(r) != round + 1 {
                        return Err(Error::Protocol(format!("round {r} ends after {round}")));
                    }
                    round += 1;
                    synced(Sync { round, last });
                    if last {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Zeroes the zero runs, and makes iovecs of the others.
    fn place(&self, region: &Region, runs: &[Run], iov: &mut Vec<libc::iovec>, ahead: &mut Ahead) {
        iov.clear();
        let target = &self.targets[region.index];
        for run in runs {
            let (first, count) = (u64::from(run.first), u64::from(run.count));
            target.seen.set_range(first, count);
            if run.zero {
                zero_run(region, target, first, count);
                continue;
            }
            let host = region.host + (first * PAGE_SIZE) as usize;
            let len = (count * PAGE_SIZE) as usize;
            if let Some(touched) = &target.touched
                && words(touched, first, count).any(|(_, mask, word)| word & mask != mask)
            {
                if count >= DENSE {
                    ahead.follows(region, first, first + count);
                }
                populate(host, len);
                touched.set_range(first, count);
            }
            iov.push(libc::iovec { iov_base: host as *mut libc::c_void, iov_len: len });
        }
    }
}

/// The words of `map` that `count` bits from `first` touch: (index, which bits, value).
fn words(map: &Bitmap, first: u64, count: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let end = first + count;
    (first / 64..end.div_ceil(64)).map(move |w| {
        let low = first.saturating_sub(w * 64);
        let high = (end - w * 64).min(64);
        let mask = (u64::MAX << low) & (u64::MAX >> (64 - high));
        (w, mask, map.word(w as usize))
    })
}

/// Makes pages zero that are not.
fn zero_run(region: &Region, target: &Target, first: u64, count: u64) {
    let page = |p: u64| {
        let at = (region.host + (p * PAGE_SIZE) as usize) as *mut u8;
        // SAFETY: the run lies in the region (checked by `ram::table`); no guest runs here yet.
        unsafe {
            if !zero::is_zero(at) {
                std::ptr::write_bytes(at, 0, PAGE_SIZE as usize);
            }
        }
    };
    match &target.touched {
        None => (first..first + count).for_each(page),
        Some(touched) => {
            for (w, mask, word) in words(touched, first, count) {
                let mut bits = word & mask;
                while bits != 0 {
                    page(w * 64 + u64::from(bits.trailing_zeros()));
                    bits &= bits - 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mem::{Backing, RegionSpec};
    use proptest::prelude::*;

    fn memory() -> GuestMemory {
        let specs =
            [RegionSpec { gpa: 0, size: 70 << 12 }, RegionSpec { gpa: 1 << 30, size: 9 << 12 }];
        GuestMemory::new(&specs, &Backing::default()).unwrap()
    }

    fn frame(region: u16, runs: &[Run], fill: u8, sequence: u64) -> Vec<u8> {
        let data: u32 = runs.iter().filter(|r| !r.zero).map(|r| r.count).sum();
        let mut f = vec![0; ram::HEADER];
        runs.iter().for_each(|r| r.put(&mut f));
        ram::seal(&mut f, Kind::Pages { region, runs: runs.len() as u32, data }, sequence);
        f.resize(f.len() + data as usize * PAGE_SIZE as usize, fill);
        f
    }

    fn sync(round: u32, last: bool, sequence: u64) -> Vec<u8> {
        let mut f = vec![0; ram::HEADER];
        ram::seal(&mut f, Kind::Sync { round, last }, sequence);
        f
    }

    fn run(first: u32, count: u32, zero: bool) -> Run {
        Run { first, count, zero }
    }

    #[test]
    fn places_pages_zeroes_what_was_not_zero_and_leaves_the_rest_untouched() {
        let m = memory();
        m.write(5 << 12, &[7; 4096]).unwrap();
        let r = Receiver::new(&m);
        let mut stream = frame(0, &[run(0, 66, true), run(66, 4, false)], 3, 0);
        stream.extend(frame(1, &[run(0, 9, true)], 0, 1));
        stream.extend(sync(1, true, 2));
        let mut rounds = Vec::new();
        r.run(&stream[..], &mut |s| rounds.push(s)).unwrap();
        assert_eq!(rounds, [Sync { round: 1, last: true }]);
        assert_eq!(r.missing(), None);
        assert_eq!(m.read_obj::<u64>(5 << 12).unwrap(), 0);
        assert_eq!(m.read_obj::<u64>(69 << 12).unwrap(), u64::from_ne_bytes([3; 8]));
        assert_eq!(populated(&m.regions()[0]).unwrap().count(), 5);
        assert_eq!(populated(&m.regions()[1]).unwrap().count(), 0);
    }

    #[test]
    fn says_which_pages_never_came() {
        let m = memory();
        let r = Receiver::new(&m);
        let mut stream = frame(0, &[run(0, 70, true)], 0, 0);
        stream.extend(frame(1, &[run(0, 4, true), run(5, 3, true)], 0, 1));
        stream.extend(sync(1, true, 2));
        r.run(&stream[..], &mut |_| {}).unwrap();
        assert_eq!(r.missing(), Some(((1 << 30) + (4 << 12), 2)));
    }

    #[test]
    fn refuses_what_lies_outside_and_what_is_out_of_order() {
        let m = memory();
        for (stream, says) in [
            (frame(0, &[run(70, 1, false)], 0, 0), "outside"),
            (frame(0, &[run(u32::MAX, u32::MAX >> 1, true)], 0, 0), "outside"),
            (frame(0, &[run(0, 0, true)], 0, 0), "outside"),
            (frame(2, &[run(0, 1, false)], 0, 0), "region 2 of 2"),
            (frame(0, &[run(0, 1, false)], 0, 5), "sequence"),
            (sync(2, false, 0), "ends after"),
            (vec![0; 64], "magic"),
            (vec![], "lost"),
        ] {
            let e = Receiver::new(&m).run(&stream[..], &mut |_| {}).unwrap_err().to_string();
            assert!(e.contains(says), "{says}: {e}");
        }
        let mut flipped = frame(0, &[run(0, 1, true)], 0, 0);
        flipped[ram::HEADER] ^= 1;
        let e = Receiver::new(&m).run(&flipped[..], &mut |_| {}).unwrap_err();
        assert!(e.to_string().contains("checksum"));
    }

    proptest! {
        #[test]
        fn any_runs_are_safe(
            region in 0u16..3,
            list in proptest::collection::vec((0u32..80, 0u32..20, any::<bool>()), 1..20),
            cut in 0usize..100_000,
        ) {
            let m = memory();
            let list: Vec<_> = list.into_iter().map(|(f, c, z)| run(f, c, z)).collect();
            let mut stream = frame(region, &list, 1, 0);
            stream.truncate(cut);
            let result = Receiver::new(&m).run(&stream[..], &mut |_| ());
            prop_assert!(result.is_err());
        }

        #[test]
        fn words_cover_exactly_the_range(first in 0u64..300, count in 1u64..300) {
            let map = Bitmap::new(600);
            let mut bits = std::collections::BTreeSet::new();
            for (w, mask, _) in words(&map, first, count) {
                (0..64).filter(|b| mask & (1 << b) != 0).for_each(|b| { bits.insert(w * 64 + b); });
            }
            prop_assert_eq!(bits, (first..first + count).collect());
        }
    }
}
