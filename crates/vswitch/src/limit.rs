//! Token buckets: a port's rate limit and its storm limit. One bucket is shared by all queues of a
//! port, which may be polled by several threads; a frame of a limited port costs one atomic operation.
//!
//! It is kept as the time at which the bucket would be full again: whoever takes moves it on, and
//! may not move it further ahead of now than the bucket is deep.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A bucket of tokens (bytes or frames).
#[derive(Debug)]
pub struct Limiter {
    /// Tokens a second.
    rate: u64,
    /// Most tokens that may be taken at once, as the nanoseconds that they take to come back.
    depth_ns: u64,
    start: Instant,
    /// When the bucket is full again, in nanoseconds after `start`.
    full_at: AtomicU64,
}

impl Limiter {
    /// A full bucket of `depth` tokens (at least 1), which refills at `rate` (at least 1) a second.
    pub fn new(rate: u64, depth: u64) -> Self {
        let rate = rate.max(1);
        Self {
            rate,
            depth_ns: ns(depth.max(1), rate),
            start: Instant::now(),
            full_at: AtomicU64::new(0),
        }
    }

    /// Tokens a second.
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// Takes `n` tokens now; whether there were so many (otherwise none is taken). One more than
    /// there are is given to a bucket that is full, however large `n` is.
    pub fn take(&self, n: u64) -> bool {
        self.take_at(n, u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn take_at(&self, n: u64, now: u64) -> bool {
        let cost = ns(n, self.rate).max(1);
        let step = |full_at: u64| {
            let from = full_at.max(now);
            let to = from.saturating_add(cost);
            (from == now || to - now <= self.depth_ns).then_some(to)
        };
        self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step).is_ok()
    }
}

fn ns(tokens: u64, rate: u64) -> u64 {
    u64::try_from(u128::from(tokens) * 1_000_000_000 / u128::from(rate)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_its_depth_at_once_and_then_its_rate() {
        let l = Limiter::new(1000, 100);
        let mut at_once = 0;
        while l.take_at(1, 5) {
            at_once += 1;
        }
        assert_eq!(at_once, 100);
        // A tenth of a second brings all 100 back; half of it 50.
        let later = |t: u64| (0..1000).filter(|_| l.take_at(1, t)).count();
        assert_eq!(later(50_000_005), 50);
        assert_eq!(later(1_000_000_000), 100);
        assert_eq!(later(1_000_000_000), 0);
    }

    #[test]
    fn one_large_frame_passes_a_full_bucket_and_is_paid_for() {
        let l = Limiter::new(1000, 10);
        assert!(l.take_at(1000, 7));
        assert!(!l.take_at(1, 8));
        assert!(!l.take_at(1, 900_000_000));
        assert!(l.take_at(1, 1_000_000_008));
    }
}
