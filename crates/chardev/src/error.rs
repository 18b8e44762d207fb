//! What can go wrong when a back end is opened.

use std::io;
use std::path::PathBuf;

/// Most bytes of a Unix socket's path (unix(7): sun_path with its ending zero).
pub(crate) const MAX_UNIX_PATH: usize = 107;

/// Why a chardev could not be opened. Each names what the user wrote, or the chardev's id.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{who}: cannot open the {what} '{}': {source}", path.display())]
    Open { who: String, what: &'static str, path: PathBuf, source: io::Error },
    #[error("{who}: cannot listen on {address}: {source}")]
    Listen { who: String, address: String, source: io::Error },
    #[error(
        "{who}: cannot listen on {address}: another process listens there; stop it or give another path"
    )]
    InUse { who: String, address: String },
    #[error(
        "{who}: cannot listen on '{}': a file that is not a socket is in the way; move it or give another path",
        path.display()
    )]
    NotASocket { who: String, path: PathBuf },
    #[error(
        "{who}: the path '{}' has {} bytes; that of a Unix socket can have {MAX_UNIX_PATH}",
        path.display(), path.as_os_str().len()
    )]
    LongPath { who: String, path: PathBuf },
    #[error("{who}: cannot connect to {address}: {source}")]
    Connect { who: String, address: String, source: io::Error },
    #[error("{who}: fd {fd} is not usable: expected {expected}")]
    Fd { who: String, fd: i32, expected: &'static str },
    #[error(
        "{who}: stdio is in use by another chardev; only one can have it (several front ends can share one with mux=on)"
    )]
    StdioTaken { who: String },
    #[error("{who}: cannot set up {what}: {source}")]
    Setup { who: String, what: &'static str, source: io::Error },
}
