//! Keeping to `max-bandwidth`: one bucket of bytes for all connections of a migration.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::Parameters;

/// Longest sleep at once, so that a changed limit or a cancel is seen soon.
const SLICE: Duration = Duration::from_millis(10);
/// How much time's worth of bytes may be saved up: what a host that wakes the sender late costs is
/// caught up.
const BURST: f64 = 0.05;

/// The bucket. It may be overdrawn by one frame, which the next one waits off.
#[derive(Debug)]
pub struct Pacer {
    bucket: Mutex<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    level: f64,
    at: Instant,
}

impl Default for Pacer {
    fn default() -> Self {
        Self { bucket: Mutex::new(Bucket { level: 0.0, at: Instant::now() }) }
    }
}

impl Pacer {
    /// Waits until `bytes` may be sent. Returns false when `cancelled` says so meanwhile.
    pub fn wait(&self, bytes: u64, params: &Parameters, cancelled: &dyn Fn() -> bool) -> bool {
        loop {
            if cancelled() {
                return false;
            }
            let rate = params.max_bandwidth() as f64;
            if rate == 0.0 {
                return true;
            }
            let mut b = self.bucket.lock();
            let now = Instant::now();
            b.level = (b.level + now.duration_since(b.at).as_secs_f64() * rate).min(BURST * rate);
            b.at = now;
            if b.level >= 0.0 {
                b.level -= bytes as f64;
                return true;
            }
            let lack = Duration::try_from_secs_f64(-b.level / rate).unwrap_or(SLICE);
            drop(b);
            std::thread::sleep(lack.min(SLICE));
        }
    }

    /// Most pages of data that a frame should have, so that it lasts at most about 10 ms.
    pub fn frame_pages(params: &Parameters) -> u32 {
        match params.max_bandwidth() {
            0 => crate::ram::MAX_DATA_PAGES,
            rate => {
                (rate / 100 / mem::PAGE_SIZE).clamp(1, crate::ram::MAX_DATA_PAGES.into()) as u32
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_rate_and_takes_a_new_one_at_once() {
        let params = Parameters::default();
        let pacer = Pacer::default();
        params.set_max_bandwidth(100 << 20);
        let start = Instant::now();
        let mut sent = 0;
        while start.elapsed() < Duration::from_millis(200) {
            assert!(pacer.wait(1 << 19, &params, &|| false));
            sent += 1 << 19;
        }
        let rate = sent as f64 / start.elapsed().as_secs_f64() / f64::from(100 << 20);
        // Never more; less only on a host that is too busy.
        assert!((0.3..1.1).contains(&rate), "{rate}");
        // Whatever was saved up, this overdraws it.
        assert!(pacer.wait(1 << 30, &params, &|| false));
        params.set_max_bandwidth(1);
        assert!(!pacer.wait(1, &params, &|| start.elapsed() > Duration::from_millis(400)));
    }
}
