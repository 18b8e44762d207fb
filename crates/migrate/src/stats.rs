//! The counters of a running migration, and the reply to `query-migrate` made from them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::info::{DowntimePhases, Mark, MigrationInfo, RamInfo, Round, Status, Trace};

/// Most rounds and marks kept in the trace: the first half, and the latest.
const MAX_TRACE: usize = 4096;

/// Counters that channels' threads raise.
#[derive(Debug, Default)]
pub struct Counters {
    pub bytes: AtomicU64,
    pub zero: AtomicU64,
    pub normal: AtomicU64,
    /// Nanoseconds that were spent in looking for zero pages.
    pub scan_ns: AtomicU64,
}

impl Counters {
    /// Adds a frame.
    pub fn frame(&self, bytes: u64, normal: u64, zero: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.normal.fetch_add(normal, Ordering::Relaxed);
        self.zero.fetch_add(zero, Ordering::Relaxed);
    }

    /// (bytes, zero pages, normal pages) so far.
    pub fn read(&self) -> (u64, u64, u64) {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        (get(&self.bytes), get(&self.zero), get(&self.normal))
    }
}

/// What changes seldom, under one lock.
#[derive(Debug, Default)]
pub struct Slow {
    pub error: Option<String>,
    /// A destination that no source has greeted yet: its time has not begun.
    pub waiting: bool,
    /// When it began, where that is later than the start.
    pub began: Option<Instant>,
    pub ended: Option<Instant>,
    pub setup: Option<Duration>,
    pub expected_downtime: Option<Duration>,
    pub downtime: Option<Duration>,
    pub phases: Option<DowntimePhases>,
    pub blackout: Option<Duration>,
    pub late_frames: Option<u64>,
    pub syncs: u64,
    pub dirty_pages_rate: u64,
    pub pages_per_second: u64,
    /// Bytes on the wire when the guest was stopped.
    pub bytes_at_stop: Option<u64>,
    pub trace: Trace,
}

/// Everything that is counted.
#[derive(Debug)]
pub struct Stats {
    pub start: Instant,
    pub ram_bytes: u64,
    pub counters: Counters,
    pub slow: Mutex<Slow>,
}

impl Stats {
    /// For a machine with `ram_bytes` of memory, from now on.
    pub fn new(ram_bytes: u64) -> Self {
        let (counters, slow) = (Counters::default(), Mutex::new(Slow::default()));
        Self { start: Instant::now(), ram_bytes, counters, slow }
    }

    /// A destination: nobody has come yet.
    pub fn wait(&self) {
        self.slow.lock().waiting = true;
    }

    /// A destination: a source has come, and its migration is timed from now on.
    pub fn begin(&self) {
        let mut slow = self.slow.lock();
        slow.waiting = false;
        slow.began = Some(Instant::now());
    }

    /// Microseconds since the start.
    pub fn now_us(&self) -> u64 {
        micros(self.start.elapsed())
    }

    /// Notes a moment in the trace.
    pub fn mark(&self, name: &'static str) {
        let at_us = self.now_us();
        let mut slow = self.slow.lock();
        if slow.trace.marks.len() < MAX_TRACE {
            slow.trace.marks.push(Mark { name, at_us });
        }
    }

    /// Notes a round in the trace.
    pub fn round(&self, round: Round) {
        let mut slow = self.slow.lock();
        if slow.trace.rounds.len() >= MAX_TRACE {
            slow.trace.rounds.remove(MAX_TRACE / 2);
        }
        slow.trace.rounds.push(round);
    }

    /// The end, with what went wrong if anything did.
    pub fn end(&self, error: Option<String>) {
        let mut slow = self.slow.lock();
        slow.ended = Some(Instant::now());
        slow.error = error;
    }

    /// The reply to `query-migrate`. `remaining` in pages.
    pub fn info(&self, status: Status, remaining: u64) -> MigrationInfo {
        if status == Status::None {
            return MigrationInfo::default();
        }
        let slow = self.slow.lock();
        let total = match slow.waiting {
            true => Duration::ZERO,
            false => {
                let start = slow.began.unwrap_or(self.start);
                slow.ended.unwrap_or_else(Instant::now).saturating_duration_since(start)
            }
        };
        let done = status == Status::Completed;
        MigrationInfo {
            status: Some(status),
            total_time: Some(millis(total)),
            expected_downtime: if done { None } else { slow.expected_downtime.map(millis) },
            downtime: slow.downtime.map(millis),
            setup_time: slow.setup.map(millis),
            ram: Some(self.ram(&slow, total, if done { 0 } else { remaining })),
            error_desc: slow.error.clone(),
            blocked_reasons: Vec::new(),
            tern_downtime: slow.phases,
            tern_late_frames: slow.late_frames,
            tern_blackout_us: slow.blackout.map(micros),
            tern_trace: Some(slow.trace.clone()),
        }
    }

    fn ram(&self, slow: &Slow, total: Duration, remaining: u64) -> RamInfo {
        let (bytes, zero, normal) = self.counters.read();
        let sending = total.saturating_sub(slow.setup.unwrap_or_default()).as_secs_f64();
        let precopy = slow.bytes_at_stop.unwrap_or(bytes);
        RamInfo {
            transferred: bytes,
            remaining: remaining * mem::PAGE_SIZE,
            total: self.ram_bytes,
            duplicate: zero,
            skipped: 0,
            normal,
            normal_bytes: normal * mem::PAGE_SIZE,
            dirty_pages_rate: slow.dirty_pages_rate,
            mbps: if sending > 0.0 { bytes as f64 * 8.0 / sending / 1e6 } else { 0.0 },
            dirty_sync_count: slow.syncs,
            page_size: mem::PAGE_SIZE,
            multifd_bytes: 0,
            pages_per_second: slow.pages_per_second,
            precopy_bytes: precopy,
            downtime_bytes: bytes - precopy.min(bytes),
            postcopy_bytes: 0,
            postcopy_requests: 0,
            dirty_sync_missed_zero_copy: 0,
        }
    }
}

/// Whole microseconds of `d`.
pub fn micros(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_is_timed_from_its_source_s_greeting() {
        let mut stats = Stats::new(0);
        let listening = Duration::from_secs(9);
        stats.start = Instant::now().checked_sub(listening).unwrap();
        stats.wait();
        assert_eq!(stats.info(Status::Setup, 0).total_time, Some(0));
        stats.begin();
        stats.end(None);
        let info = stats.info(Status::Completed, 0);
        assert!(info.total_time.unwrap() < millis(listening), "{:?}", info.total_time);
    }
}
