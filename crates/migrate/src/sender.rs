//! Sends the pages of a round over one RAM connection, straight from guest memory.
//!
//! Several connections share the work by taking chunks of the in-flight map. Nothing is copied and
//! nothing is allocated per page: a frame is a small table, and iovecs that point into the guest.
#![allow(unsafe_code)] // iovecs into guest memory, which changes while it is sent

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use mem::{Bitmap, GuestMemory, PAGE_SIZE};

use crate::channel::Channel;
use crate::pace::Pacer;
use crate::pending::{Chunk, Pending};
use crate::ram::{self, Kind, MAX_RUN_PAGES, MAX_RUNS, Run};
use crate::stats::Stats;
use crate::{Error, Parameters, Result, zero};

/// What all connections of a migration share.
pub struct Shared {
    pub memory: GuestMemory,
    pub pending: Pending,
    pub stats: Stats,
    pub params: Arc<Parameters>,
    pub pacer: Pacer,
    /// By region, the pages that exist; `None` where that is not known. For the first round only:
    /// what the guest touches later is dirty.
    pub populated: OnceLock<Vec<Option<Bitmap>>>,
}

/// One RAM connection.
pub struct Sender<'a> {
    shared: &'a Shared,
    channel: &'a Channel,
    cancelled: &'a dyn Fn() -> bool,
    sequence: u64,
    /// Header and table of the frame that is being filled.
    head: Vec<u8>,
    iov: Vec<libc::iovec>,
    run: Option<Run>,
    region: usize,
    runs: u32,
    data: u32,
    zeroes: u64,
    most_data: u32,
    paced: bool,
    first_round: bool,
    scan_start: Instant,
}

impl<'a> Sender<'a> {
    /// A sender on `channel`, which only it uses.
    pub fn new(shared: &'a Shared, channel: &'a Channel, cancelled: &'a dyn Fn() -> bool) -> Self {
        Self {
            shared,
            channel,
            cancelled,
            sequence: 0,
            head: vec![0; ram::HEADER],
            iov: Vec::with_capacity(MAX_RUNS + 1),
            run: None,
            region: 0,
            runs: 0,
            data: 0,
            zeroes: 0,
            most_data: ram::MAX_DATA_PAGES,
            paced: true,
            first_round: true,
            scan_start: Instant::now(),
        }
    }

    /// Sends its share of round `number`, and the mark of its end.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::Cancelled`].
    pub fn round(&mut self, number: u64, last: bool) -> Result<()> {
        self.paced = !last;
        self.first_round = number == 1;
        self.scan_start = Instant::now();
        while let Some(chunk) = self.shared.pending.next_chunk() {
            if (self.cancelled)() {
                return Err(Error::Cancelled);
            }
            self.chunk(chunk)?;
        }
        self.flush()?;
        let round = u32::try_from(number)
            .map_err(|_| Error::Machine("the migration has too many rounds".into()))?;
        ram::seal(&mut self.head, Kind::Sync { round, last }, self.sequence);
        self.write(0, 0)
    }

    fn chunk(&mut self, chunk: Chunk) -> Result<()> {
        if chunk.region != self.region {
            self.flush()?;
            self.region = chunk.region;
        }
        for w in chunk.first_word..chunk.first_word + chunk.words {
            let mut bits = self.shared.pending.word(chunk.region, w);
            let holes = self.holes(w) & bits;
            if holes == u64::MAX {
                self.add(Run { first: w as u32 * 64, count: 64, zero: true })?;
                continue;
            }
            while bits != 0 {
                let bit = bits.trailing_zeros();
                bits &= bits - 1;
                let page = w as u32 * 64 + bit;
                let zero = holes & (1 << bit) != 0 || self.is_zero(page);
                self.add(Run { first: page, count: 1, zero })?;
            }
        }
        Ok(())
    }

    /// The pages of word `w` that do not exist.
    fn holes(&self, w: usize) -> u64 {
        if !self.first_round {
            return 0;
        }
        let maps = self.shared.populated.get();
        maps.and_then(|maps| maps[self.region].as_ref()).map_or(0, |map| !map.word(w))
    }

    fn address(&self, page: u32) -> *const u8 {
        let region = &self.shared.memory.regions()[self.region];
        (region.host + page as usize * PAGE_SIZE as usize) as *const u8
    }

    fn is_zero(&self, page: u32) -> bool {
        let ahead = self.address(page).wrapping_add(zero::AHEAD * PAGE_SIZE as usize);
        zero::prefetch(ahead);
        // SAFETY: the in-flight map has no bits past the region's end, so the page is mapped RAM.
        unsafe { zero::is_zero(self.address(page)) }
    }

    /// Adds pages to the frame, which follow those added before or lie higher.
    fn add(&mut self, new: Run) -> Result<()> {
        let extends = self.run.is_some_and(|r| {
            r.zero == new.zero && r.first + r.count == new.first && r.count < MAX_RUN_PAGES - 64
        });
        match &mut self.run {
            Some(run) if extends => run.count += new.count,
            _ => {
                self.end_run();
                if self.runs as usize == MAX_RUNS {
                    self.flush()?;
                }
                self.run = Some(new);
            }
        }
        if new.zero {
            self.zeroes += u64::from(new.count);
        } else {
            self.data += new.count;
            if self.data >= self.most_data {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn end_run(&mut self) {
        let Some(run) = self.run.take() else {
            return;
        };
        run.put(&mut self.head);
        self.runs += 1;
        if !run.zero {
            self.iov.push(libc::iovec {
                iov_base: self.address(run.first).cast_mut().cast(),
                iov_len: run.count as usize * PAGE_SIZE as usize,
            });
        }
    }

    /// Sends the frame, if anything is in it.
    fn flush(&mut self) -> Result<()> {
        self.end_run();
        if self.runs == 0 {
            return Ok(());
        }
        let counters = &self.shared.stats.counters;
        let ns = self.scan_start.elapsed().as_nanos() as u64;
        counters.scan_ns.fetch_add(ns, std::sync::atomic::Ordering::Relaxed);
        let region = self.region as u16;
        let kind = Kind::Pages { region, runs: self.runs, data: self.data };
        ram::seal(&mut self.head, kind, self.sequence);
        let (data, zeroes) = (u64::from(self.data), self.zeroes);
        (self.runs, self.data, self.zeroes) = (0, 0, 0);
        self.write(data, zeroes)?;
        self.shared.pending.sent(data + zeroes);
        self.most_data = Pacer::frame_pages(&self.shared.params);
        self.scan_start = Instant::now();
        Ok(())
    }

    fn write(&mut self, data: u64, zeroes: u64) -> Result<()> {
        let bytes = self.head.len() as u64 + data * PAGE_SIZE;
        let shared = self.shared;
        if self.paced && !shared.pacer.wait(bytes, &shared.params, self.cancelled) {
            return Err(Error::Cancelled);
        }
        let head =
            libc::iovec { iov_base: self.head.as_mut_ptr().cast(), iov_len: self.head.len() };
        self.iov.insert(0, head);
        // SAFETY: the head is ours, and the rest are whole pages of mapped guest memory, which
        // `shared` keeps mapped.
        let sent = unsafe { self.channel.writev_all(&mut self.iov) };
        self.iov.clear();
        self.head.truncate(ram::HEADER);
        self.sequence += 1;
        shared.stats.counters.frame(bytes, data, zeroes);
        sent.map_err(|e| Error::Lost(format!("the migration's memory connection was lost: {e}")))
    }
}
