//! Counters of a disk, as `query-blockstats` reports them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::Op;

/// Operations of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Operations that succeeded.
    pub operations: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// Nanoseconds from taking to completing those, added up.
    pub time_ns: u64,
    /// Operations that failed on the host.
    pub failed: u64,
    /// Operations that the guest may not ask for (out of range, read-only, ...).
    pub invalid: u64,
}

/// All counters of a disk at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockStats {
    pub read: Counters,
    pub write: Counters,
    pub flush: Counters,
    /// Discards.
    pub unmap: Counters,
    /// Byte after the highest ever written.
    pub wr_highest_offset: u64,
}

/// Kind of operation in the counters; writing zeroes counts as writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Flush,
    Unmap,
}

impl From<&Op> for Kind {
    fn from(op: &Op) -> Self {
        match op {
            Op::Read { .. } => Self::Read,
            Op::Write { .. } | Op::WriteZeroes { .. } => Self::Write,
            Op::Flush => Self::Flush,
            Op::Discard { .. } => Self::Unmap,
        }
    }
}

#[derive(Debug, Default)]
struct Live {
    operations: AtomicU64,
    bytes: AtomicU64,
    time_ns: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
}

impl Live {
    fn get(&self) -> Counters {
        Counters {
            operations: self.operations.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            time_ns: self.time_ns.load(Relaxed),
            failed: self.failed.load(Relaxed),
            invalid: self.invalid.load(Relaxed),
        }
    }
}

/// Counters that any thread adds to.
#[derive(Debug, Default)]
pub struct LiveStats {
    kinds: [Live; 4],
    highest: AtomicU64,
}

impl LiveStats {
    /// Counts an operation that ended after `time`.
    pub fn account(&self, kind: Kind, bytes: u64, time: Duration, ok: bool) {
        let live = &self.kinds[kind as usize];
        if !ok {
            live.failed.fetch_add(1, Relaxed);
            return;
        }
        live.operations.fetch_add(1, Relaxed);
        live.bytes.fetch_add(bytes, Relaxed);
        live.time_ns.fetch_add(time.as_nanos() as u64, Relaxed);
    }

    /// Counts an operation that was refused.
    pub fn invalid(&self, kind: Kind) {
        self.kinds[kind as usize].invalid.fetch_add(1, Relaxed);
    }

    /// Notes that everything below byte `end` may have been written.
    pub fn wrote_up_to(&self, end: u64) {
        self.highest.fetch_max(end, Relaxed);
    }

    /// The counters now.
    pub fn get(&self) -> BlockStats {
        let [read, write, flush, unmap] = &self.kinds;
        BlockStats {
            read: read.get(),
            write: write.get(),
            flush: flush.get(),
            unmap: unmap.get(),
            wr_highest_offset: self.highest.load(Relaxed),
        }
    }
}
