//! The limits of a migration (QEMU's migration parameters). They may change while it runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// QEMU's default for `max-bandwidth`: 128 MiB/s.
pub const DEFAULT_MAX_BANDWIDTH: u64 = 128 << 20;
/// QEMU's default for `downtime-limit`: 300 ms.
pub const DEFAULT_DOWNTIME_LIMIT_MS: u64 = 300;
/// QEMU's largest `downtime-limit`: 2000 s.
pub const MAX_DOWNTIME_LIMIT_MS: u64 = 2_000_000;

/// Migration parameters: set from any thread at any time, read by the migration at every batch.
#[derive(Debug)]
pub struct Parameters {
    max_bandwidth: AtomicU64,
    downtime_limit_ms: AtomicU64,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            max_bandwidth: AtomicU64::new(DEFAULT_MAX_BANDWIDTH),
            downtime_limit_ms: AtomicU64::new(DEFAULT_DOWNTIME_LIMIT_MS),
        }
    }
}

impl Parameters {
    /// `max-bandwidth`: bytes a second on the wire while the guest runs; 0 is no limit.
    pub fn max_bandwidth(&self) -> u64 {
        self.max_bandwidth.load(Ordering::Relaxed)
    }

    /// Sets `max-bandwidth` in bytes a second; 0 is no limit.
    pub fn set_max_bandwidth(&self, bytes_per_second: u64) {
        self.max_bandwidth.store(bytes_per_second, Ordering::Relaxed);
    }

    /// `downtime-limit`: how long the guest may stand still.
    pub fn downtime_limit(&self) -> Duration {
        Duration::from_millis(self.downtime_limit_ms.load(Ordering::Relaxed))
    }

    /// Sets `downtime-limit` in milliseconds, 0 to [`MAX_DOWNTIME_LIMIT_MS`].
    ///
    /// # Errors
    /// A sentence when it is out of range.
    pub fn set_downtime_limit_ms(&self, ms: u64) -> Result<(), String> {
        if ms > MAX_DOWNTIME_LIMIT_MS {
            return Err(format!(
                "downtime-limit is {ms} ms; expected 0 to {MAX_DOWNTIME_LIMIT_MS} milliseconds"
            ));
        }
        self.downtime_limit_ms.store(ms, Ordering::Relaxed);
        Ok(())
    }
}
