//! What a migration tells while it happens. STOP and RESUME come from the machine itself.

use crate::{Error, Status};

/// Where a migration's events go. Called from the migration's threads: do not block.
pub trait Events: Send + Sync {
    /// The MIGRATION event: the status changed.
    fn migration(&self, status: Status);
    /// The MIGRATION_PASS event: pass `pass` over the memory begins (counted from 1).
    fn pass(&self, pass: u64);
    /// The migration is over for this side; it comes after the last [`migration`](Self::migration).
    /// At a destination that keeps listening after a refusal it comes for each try, at a source
    /// that was in doubt where the guest is once more when it knows.
    fn ended(&self, result: &Result<(), Error>) {
        let _ = result;
    }
}

/// Tells nobody.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoEvents;

impl Events for NoEvents {
    fn migration(&self, _: Status) {}
    fn pass(&self, _: u64) {}
}
