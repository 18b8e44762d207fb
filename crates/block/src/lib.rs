//! Disk images: raw files and host block devices, the engines that do their I/O, image locks that
//! QEMU understands, and counters.
//!
//! - [`disk`]: [`Disk`], an open image with its policy (cache mode, discard) and counters.
//! - [`image`]: [`Image`], what an image format or protocol has to offer.
//! - [`raw`]: [`RawImage`], raw files and block devices.
//! - [`buffer`], [`request`]: what is read or written, and the requests.
//! - [`engine`]: [`Engine`], where requests go in and completions come out; [`uring`] and
//!   [`threads`] implement it.
//! - [`sync_io`]: requests carried out by blocking system calls; used by both engines.
//! - [`locks`]: QEMU's image locks.
//! - [`stats`]: counters as `query-blockstats` reports them.

pub mod buffer;
pub mod disk;
pub mod engine;
pub mod image;
pub mod locks;
pub mod raw;
pub mod request;
pub mod stats;
pub mod sync_io;
pub mod threads;
pub mod uring;

pub use buffer::Buffer;
pub use disk::{Aio, Cache, Disk, DiskOptions};
pub use engine::Engine;
pub use image::{Image, Topology};
pub use locks::{Locking, Permissions};
pub use raw::RawImage;
pub use request::{Completion, Op, Request};
pub use stats::{BlockStats, Counters};

/// What can go wrong with an image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened, read, sized, ...
    #[error("{what} '{path}': {source}")]
    File { what: &'static str, path: String, source: std::io::Error },
    /// Neither a regular file nor a block device.
    #[error("'{path}' is {kind}; a disk image must be a regular file or a block device")]
    NotAnImage { path: String, kind: &'static str },
    /// Another process holds a lock that excludes ours.
    #[error(
        "Failed to get {shared}\"{permission}\" lock\nIs another process using the image [{path}]?"
    )]
    Locked { shared: &'static str, permission: &'static str, path: String },
    /// The host cannot do what the options ask for.
    #[error("'{path}': {reason}")]
    Unsupported { path: String, reason: String },
    /// A thread or ring of an engine could not be made.
    #[error("cannot set up I/O for '{path}': {source}")]
    Engine { path: String, source: std::io::Error },
}

/// Shorthand for this crate's results.
pub type Result<T> = std::result::Result<T, Error>;

/// Bytes of a sector, the unit in which virtio-blk counts.
pub const SECTOR: u64 = 512;
