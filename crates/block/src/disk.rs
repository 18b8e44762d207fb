//! An open image with the policy of its user: cache mode, discard, which engine, and counters.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::raw::RawOptions;
use crate::stats::LiveStats;
use crate::{BlockStats, Engine, Image, Locking, RawImage, Result, Topology};

/// QEMU's cache modes, as their three properties.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cache {
    /// `cache.direct`: past the host's page cache.
    pub direct: bool,
    /// `cache.no-flush`: flushes are not passed on; a host crash may lose the image.
    pub no_flush: bool,
    /// `cache.writeback`: writes complete before they are durable, and the guest flushes.
    pub writeback: bool,
}

impl Cache {
    /// `cache=NAME`: writeback, none, writethrough, directsync, unsafe.
    pub fn parse(name: &str) -> Option<Self> {
        let (direct, no_flush, writeback) = match name {
            "writeback" => (false, false, true),
            "none" | "off" => (true, false, true),
            "writethrough" => (false, false, false),
            "directsync" => (true, false, false),
            "unsafe" => (false, true, true),
            _ => return None,
        };
        Some(Self { direct, no_flush, writeback })
    }
}

impl Default for Cache {
    fn default() -> Self {
        Self { direct: false, no_flush: false, writeback: true }
    }
}

/// Which engine does the I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Aio {
    /// io_uring; threads where the host does not permit it.
    #[default]
    IoUring,
    /// Blocking system calls on threads.
    Threads,
}

/// How a disk is opened.
#[derive(Debug, Clone)]
pub struct DiskOptions {
    pub path: PathBuf,
    pub read_only: bool,
    /// Opens read-only when it cannot be opened for writing.
    pub auto_read_only: bool,
    pub cache: Cache,
    /// `discard=unmap`: the guest's discards give space back; otherwise they do nothing.
    pub unmap: bool,
    pub aio: Aio,
    pub locking: Locking,
    /// Other writers are let in.
    pub share_rw: bool,
    /// Take the image locks now. `false` at an incoming migration: then
    /// [`Disk::acquire_locks`] follows when the source has given them up.
    pub take_locks: bool,
}

impl DiskOptions {
    /// A writable raw image with the defaults of the command line.
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
            read_only: false,
            auto_read_only: false,
            cache: Cache::default(),
            unmap: false,
            aio: Aio::default(),
            locking: Locking::default(),
            share_rw: false,
            take_locks: true,
        }
    }
}

/// An open disk, shared by its device, the monitor and the life cycle.
pub struct Disk {
    image: Box<dyn Image>,
    cache: Cache,
    unmap: bool,
    aio: Aio,
    stats: LiveStats,
}

impl Disk {
    /// Opens the image, and takes its locks unless told not to.
    ///
    /// # Errors
    /// Each names the file; [`crate::Error::Locked`] when another process uses it.
    pub fn open(o: &DiskOptions) -> Result<Arc<Self>> {
        let image = RawImage::open(&RawOptions {
            path: &o.path,
            read_only: o.read_only,
            auto_read_only: o.auto_read_only,
            direct: o.cache.direct,
            no_flush: o.cache.no_flush,
            locking: o.locking,
            share_rw: o.share_rw,
        })?;
        if o.take_locks {
            image.acquire_locks()?;
        }
        Ok(Arc::new(Self::new(Box::new(image), o.cache, o.unmap, o.aio)))
    }

    /// A disk over an image of any kind.
    pub fn new(image: Box<dyn Image>, cache: Cache, unmap: bool, aio: Aio) -> Self {
        Self { image, cache, unmap, aio, stats: LiveStats::default() }
    }

    /// The image.
    pub fn image(&self) -> &dyn Image {
        self.image.as_ref()
    }

    /// The file's name.
    pub fn name(&self) -> &str {
        self.image.name()
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.image.len()
    }

    /// Bytes that it takes in its file system; 0 of a block device.
    ///
    /// # Errors
    /// The system's, naming the file.
    pub fn allocated(&self) -> Result<u64> {
        self.image.allocated()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.image.read_only()
    }

    /// Block sizes.
    pub fn topology(&self) -> Topology {
        self.image.topology()
    }

    /// The cache mode that it was opened with.
    pub fn cache(&self) -> Cache {
        self.cache
    }

    /// Whether discards reach the image.
    pub fn unmap(&self) -> bool {
        self.unmap
    }

    /// Makes an engine with room for `depth` requests.
    pub fn engine(&self, depth: usize) -> Result<Box<dyn Engine>> {
        self.image.engine(self.aio, depth)
    }

    /// Flushes, then gives the image locks up: another process may use the image now.
    pub fn release_locks(&self) -> Result<()> {
        self.image.flush()?;
        self.image.release_locks()
    }

    /// Takes the image locks and looks at the image afresh.
    pub fn acquire_locks(&self) -> Result<()> {
        self.image.acquire_locks()
    }

    /// Counters to add to.
    pub fn live_stats(&self) -> &LiveStats {
        &self.stats
    }

    /// Counters now.
    pub fn stats(&self) -> BlockStats {
        self.stats.get()
    }
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("name", &self.name()).field("len", &self.len()).finish()
    }
}
