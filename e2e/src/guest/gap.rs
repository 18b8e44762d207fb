//! What the guest feels: a thread that wakes every millisecond and looks at its own monotonic
//! clock. Every gap is time in which the guest did not run (or could not).

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Longer gaps are kept with their time.
const NOTABLE: Duration = Duration::from_millis(20);
/// So many of them.
const KEPT: usize = 64;

/// A notable gap.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Gap {
    /// The monotonic clock at its end, milliseconds.
    pub at_ms: f64,
    /// Its length, milliseconds.
    pub ms: f64,
}

/// What was seen so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Seen {
    /// The longest of all, milliseconds.
    pub longest_ms: f64,
    /// The longest since the last query, milliseconds.
    pub since_query_ms: f64,
    /// How many were longer than 20 ms.
    pub notable: u64,
    /// The last of them.
    pub last: Vec<Gap>,
}

/// The watch.
#[derive(Default)]
pub struct Watch(Mutex<Seen>);

impl Watch {
    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Watches for ever.
    pub fn run(&self) {
        super::init::be_urgent();
        let mut last = Instant::now();
        loop {
            thread::sleep(Duration::from_millis(1));
            let now = Instant::now();
            let gap = now - last;
            last = now;
            let ms = gap.as_secs_f64() * 1e3;
            let mut seen = self.lock();
            seen.longest_ms = seen.longest_ms.max(ms);
            seen.since_query_ms = seen.since_query_ms.max(ms);
            if gap > NOTABLE {
                seen.notable += 1;
                if seen.last.len() == KEPT {
                    seen.last.remove(0);
                }
                seen.last.push(Gap { at_ms: super::init::uptime_ms(), ms });
            }
        }
    }

    /// What was seen; with `reset`, the time since the last query starts anew.
    pub fn seen(&self, reset: bool) -> Seen {
        let mut seen = self.lock();
        let copy = seen.clone();
        if reset {
            seen.since_query_ms = 0.0;
            seen.last.clear();
        }
        copy
    }
}
