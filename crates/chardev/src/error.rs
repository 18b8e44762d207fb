//! What can go wrong when a back end is opened.

use std::io;
use std::path::PathBuf;

/// Why a chardev could not be opened. Each names the chardev.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("chardev '{id}': cannot open the {what} '{}': {source}", path.display())]
    Open { id: String, what: &'static str, path: PathBuf, source: io::Error },
    #[error("chardev '{id}': cannot listen on {address}: {source}")]
    Listen { id: String, address: String, source: io::Error },
    #[error(
        "chardev '{id}': cannot listen on {address}: another process listens there; stop it or give another path"
    )]
    InUse { id: String, address: String },
    #[error(
        "chardev '{id}': cannot listen on '{}': a file that is not a socket is in the way; move it or give another path",
        path.display()
    )]
    NotASocket { id: String, path: PathBuf },
    #[error("chardev '{id}': cannot connect to {address}: {source}")]
    Connect { id: String, address: String, source: io::Error },
    #[error("chardev '{id}': fd {fd} is not usable: expected {expected}")]
    Fd { id: String, fd: i32, expected: &'static str },
    #[error(
        "chardev '{id}': stdio is in use by another chardev; only one can have it (several front ends can share one with mux=on)"
    )]
    StdioTaken { id: String },
    #[error("chardev '{id}': cannot set up {what}: {source}")]
    Setup { id: String, what: &'static str, source: io::Error },
}
