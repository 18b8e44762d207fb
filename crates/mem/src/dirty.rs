//! Who changed which page: one trait for KVM's log, the VMM's own writes, vhost-user's shared log.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Bitmap, GuestMemory, PAGE_SHIFT, Result};

/// Something that changes guest memory and can tell which pages it changed.
///
/// Rules: every page changed after [`start`](Self::start) returns is reported by some later
/// [`harvest`](Self::harvest); a harvested page that changes again is reported again. Regions are
/// the indexes of [`GuestMemory::regions`].
pub trait DirtySource: Send + Sync {
    /// A short name for logs and errors ("kvm", "vmm").
    fn name(&self) -> &'static str;
    /// Begins to record.
    fn start(&self) -> Result<()>;
    /// ORs what region `region` changed since the last harvest into `pending` (one bit a 4 KiB
    /// page, as long as the region) and begins to record those pages anew. Returns the number of
    /// bits that were newly set in `pending`.
    fn harvest(&self, region: usize, pending: &Bitmap) -> Result<u64>;
    /// As [`harvest`](Self::harvest), while nothing can change memory any more until
    /// [`stop`](Self::stop): need not begin to record anew.
    fn harvest_last(&self, region: usize, pending: &Bitmap) -> Result<u64> {
        self.harvest(region, pending)
    }
    /// Ends recording; what was recorded and not harvested is forgotten.
    fn stop(&self) -> Result<()>;
}

/// The VMM's own writes into guest memory (device emulation, rings): recorded by
/// [`GuestMemory`]'s write methods and [`GuestMemory::mark_dirty`] while started.
#[derive(Debug)]
pub(crate) struct OwnWrites {
    enabled: AtomicBool,
    maps: Vec<Bitmap>,
}

impl OwnWrites {
    pub(crate) fn new(pages: impl Iterator<Item = u64>) -> Self {
        Self { enabled: AtomicBool::new(false), maps: pages.map(Bitmap::new).collect() }
    }

    #[inline]
    pub(crate) fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// Records a write of `len` bytes (at least 1) at byte `offset` of region `region`.
    #[inline]
    pub(crate) fn record(&self, region: usize, offset: u64, len: u64) {
        if self.enabled.load(Ordering::Acquire) && len > 0 {
            let first = offset >> PAGE_SHIFT;
            let last = (offset + len - 1) >> PAGE_SHIFT;
            if let Some(map) = self.maps.get(region) {
                map.set_range(first, last - first + 1);
            }
        }
    }
}

impl DirtySource for GuestMemory {
    fn name(&self) -> &'static str {
        "vmm"
    }

    fn start(&self) -> Result<()> {
        // Memory that another process owns has no maps here: `harvest` says so.
        self.own_writes().maps.iter().for_each(Bitmap::clear_all);
        self.own_writes().enabled.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn harvest(&self, region: usize, pending: &Bitmap) -> Result<u64> {
        let Some(map) = self.own_writes().maps.get(region) else {
            let why = "memory of another process records its writes in that process's log";
            return Err(crate::Error::Layout(why.into()));
        };
        Ok((0..map.words()).map(|i| pending.or_word(i, map.take_word(i))).sum())
    }

    fn stop(&self) -> Result<()> {
        self.own_writes().enabled.store(false, Ordering::SeqCst);
        Ok(())
    }
}
