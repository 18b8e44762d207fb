//! What an image offers, whatever its format.

use crate::{Aio, Engine, Result};

/// Block sizes, in bytes; each a power of two of at least 512.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Smallest unit that can be addressed.
    pub logical: u32,
    /// Smallest unit that can be written without reading.
    pub physical: u32,
    /// Preferred granularity of I/O (0: none).
    pub optimal: u32,
    /// Granularity of discards.
    pub discard: u32,
}

/// An open image. Shared by all queues of a disk; I/O goes through engines.
pub trait Image: Send + Sync {
    /// The file's name, for messages.
    fn name(&self) -> &str;
    /// Bytes, as last looked up.
    fn len(&self) -> u64;
    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Looks the length up again: it may have been resized from outside.
    fn refresh_len(&self) -> Result<u64>;
    /// Whether writes are refused.
    fn read_only(&self) -> bool;
    /// Block sizes.
    fn topology(&self) -> Topology;
    /// Bytes that it takes in its file system; 0 of a block device.
    fn allocated(&self) -> Result<u64>;
    /// Writes everything to stable storage, waiting for it.
    fn flush(&self) -> Result<()>;
    /// Gives the image locks up (a migration hands them over). Does nothing when none are held.
    fn release_locks(&self) -> Result<()>;
    /// Takes the image locks. Does nothing when they are held.
    fn acquire_locks(&self) -> Result<()>;
    /// Whether the image locks are held (or not wanted at all).
    fn has_locks(&self) -> bool;
    /// Makes an engine with room for `depth` requests.
    fn engine(&self, aio: Aio, depth: usize) -> Result<Box<dyn Engine>>;
}
