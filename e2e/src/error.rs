//! What goes wrong in the harness.

use std::io;
use std::path::PathBuf;

/// A failure of the harness or of what it drives.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something of this host.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// A VMM refused a QMP command.
    #[error("{command}: {class}: {desc}")]
    Qmp {
        /// The command.
        command: String,
        /// The error's class.
        class: String,
        /// The error's text.
        desc: String,
    },
    /// A peer said something that it may not say.
    #[error("{0}")]
    Protocol(String),
    /// Something did not happen in time.
    #[error("{what} did not happen within {seconds} s")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
    },
    /// A VMM ended that should not have.
    #[error("{name} ended ({status}); it said: {said} (its files are in {dir})")]
    Ended {
        /// The VMM's name.
        name: String,
        /// Its exit status.
        status: String,
        /// The end of its standard error.
        said: String,
        /// Where its logs are.
        dir: PathBuf,
    },
    /// A migration did not complete.
    #[error("the migration ended as {status}: {why}")]
    Migration {
        /// The state in query-migrate.
        status: String,
        /// The error that it names.
        why: String,
    },
    /// This host lacks something.
    #[error("{0}")]
    Host(String),
}

/// The harness's results.
pub type Result<T> = std::result::Result<T, Error>;

/// Says what was tried when an input or output failed.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { what: format!("{}: {source}", what()), source })
    }
}
