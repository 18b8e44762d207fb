//! The sending side's driver.

use std::sync::Arc;

use crate::{Endpoint, Error, Events, MigrationInfo, Parameters, Result, Status, Uri};

/// A running or finished outgoing migration.
pub struct Handle {}

impl Handle {
    /// Ends the migration if the guest has not been handed over yet; the guest goes on here.
    /// Returns at once; the status is `cancelling`, then `cancelled`. After go, or when it is
    /// over, it does nothing.
    pub fn cancel(&self) {}
    /// The status now.
    pub fn status(&self) -> Status {
        Status::Failed
    }
    /// What `query-migrate` says.
    pub fn info(&self) -> MigrationInfo {
        MigrationInfo::default()
    }
    /// Waits for the end.
    pub fn wait(&self) -> Result<()> {
        Err(Error::Lost("not connected".into()))
    }
}

/// Starts to migrate `endpoint`'s machine to `uri`, in threads of its own.
///
/// # Errors
/// At once when the machine cannot be migrated ([`Error::Blocked`]). Everything later, failing to
/// connect among it, is in the status, in `error-desc`, and in [`Events::ended`].
pub fn start(
    endpoint: Arc<dyn Endpoint>,
    uri: Uri,
    params: Arc<Parameters>,
    events: Arc<dyn Events>,
) -> Result<Handle> {
    let _ = (endpoint, uri, params, events);
    Err(Error::Connect("outgoing migration is not built in yet".into()))
}
