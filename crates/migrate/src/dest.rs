//! The receiving side's driver.

use std::sync::Arc;

use crate::{Endpoint, Error, Events, MigrationInfo, Result, Status, Uri};

/// How a destination behaves.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// After a refusal (nothing of memory has moved) wait for the next source instead of ending.
    pub keep_listening: bool,
}

/// A destination that waits for, or receives, a migration.
pub struct Incoming {}

impl Incoming {
    /// The address that is listened on, with the real port where 0 was asked for.
    pub fn uri(&self) -> Uri {
        Uri::Tcp { host: String::new(), port: 0 }
    }
    /// The status now (`none` until a source has been accepted).
    pub fn status(&self) -> Status {
        Status::None
    }
    /// What `query-migrate` says.
    pub fn info(&self) -> MigrationInfo {
        MigrationInfo::default()
    }
    /// Ends waiting or receiving if go has not come yet; the machine is discarded.
    pub fn stop(&self) {}
    /// The operator's decision for a guest that runs here with its output held and whose source
    /// cannot be reached: release it. Tells whether there was anything to release.
    pub fn force_release(&self) -> bool {
        false
    }
    /// Waits for the end.
    pub fn wait(&self) -> Result<()> {
        Err(Error::Lost("not connected".into()))
    }
}

/// Listens on `uri` for one migration into `endpoint`'s machine. When it returns, the listener is
/// up; the rest happens in threads of its own.
///
/// # Errors
/// [`Error::Connect`] when the address cannot be listened on.
pub fn listen(
    endpoint: Arc<dyn Endpoint>,
    uri: &Uri,
    options: Options,
    events: Arc<dyn Events>,
) -> Result<Incoming> {
    let _ = (endpoint, uri, options, events);
    Err(Error::Connect("incoming migration is not built in yet".into()))
}
