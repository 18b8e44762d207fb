//! What the tests of several devices use.

use std::sync::atomic::{AtomicUsize, Ordering};

use virtio::ConfigEvents;

/// Counts what a virtio device tells its transport.
#[derive(Default)]
pub struct CountingEvents {
    pub changed: AtomicUsize,
    pub reset: AtomicUsize,
}

impl ConfigEvents for CountingEvents {
    fn config_changed(&self) {
        self.changed.fetch_add(1, Ordering::SeqCst);
    }
    fn needs_reset(&self, _reason: &str) {
        self.reset.fetch_add(1, Ordering::SeqCst);
    }
}
