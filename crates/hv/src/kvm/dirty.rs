//! KVM's dirty log as a [`DirtySource`].
//!
//! With manual clearing (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) a harvest reads a region's log and
//! then write-protects only the pages that it found, in chunks, so that the MMU lock is never
//! held for long. With INITIALLY_SET nothing is write-protected at start: the first harvest
//! reports every page, which fits a first pass that sends everything anyway.

use std::sync::Arc;

use mem::{Bitmap, DirtySource, GuestMemory};
use parking_lot::Mutex;

use super::sys;
use super::vm::Shared;

/// Pages cleared by one KVM_CLEAR_DIRTY_LOG (128 MiB): a multiple of 64.
const CHUNK_PAGES: u64 = 32768;

pub(super) struct KvmDirty {
    vm: Arc<Shared>,
    /// Keeps the slots' memory alive.
    mem: GuestMemory,
    /// The last log read, reused by all regions.
    buffer: Mutex<Vec<u64>>,
}

impl KvmDirty {
    pub(super) fn new(vm: Arc<Shared>, mem: GuestMemory) -> Self {
        Self { vm, mem, buffer: Mutex::new(Vec::new()) }
    }

    fn set_logging(&self, on: bool) -> mem::Result<()> {
        for r in self.mem.regions() {
            self.vm.set_slot(r, on).map_err(|e| {
                let verb = if on { "start" } else { "stop" };
                host(format!("cannot {verb} KVM's dirty log of memory slot {}", r.index), e)
            })?;
        }
        Ok(())
    }
}

impl DirtySource for KvmDirty {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn start(&self) -> mem::Result<()> {
        self.set_logging(true).inspect_err(|_| {
            let _ = self.set_logging(false);
        })
    }

    fn harvest(&self, region: usize, pending: &Bitmap) -> mem::Result<u64> {
        self.read(region, pending, self.vm.manual_clear)
    }

    fn harvest_last(&self, region: usize, pending: &Bitmap) -> mem::Result<u64> {
        // Nothing runs: write-protecting pages would only cost time.
        self.read(region, pending, false)
    }

    fn stop(&self) -> mem::Result<()> {
        self.set_logging(false)
    }
}

impl KvmDirty {
    /// ORs the log of a region into `pending`; `clear`: and clears it by a call of its own.
    fn read(&self, region: usize, pending: &Bitmap, clear: bool) -> mem::Result<u64> {
        let Some(r) = self.mem.regions().get(region) else {
            return Err(mem::Error::Layout(format!("there is no memory region {region}")));
        };
        let mut buffer = self.buffer.lock();
        let words = r.pages().div_ceil(64) as usize;
        buffer.clear();
        buffer.resize(words, 0);
        let slot = r.index as u32;
        sys::get_dirty_log(&self.vm.fd, slot, r.pages(), &mut buffer)
            .map_err(|e| host(format!("cannot read KVM's dirty log of memory slot {slot}"), e))?;
        // Into `pending` first: should clearing fail, a page is sent too often, never too rarely.
        let fresh = buffer.iter().enumerate().map(|(i, w)| pending.or_word(i, *w)).sum();
        if clear {
            self.clear(slot, r.pages(), &buffer)?;
        }
        Ok(fresh)
    }

    /// Clears what `log` holds, skipping chunks without a dirty page.
    fn clear(&self, slot: u32, pages: u64, log: &[u64]) -> mem::Result<()> {
        for (first, count) in chunks(pages, log) {
            let words = &log[(first / 64) as usize..(first + count).div_ceil(64) as usize];
            sys::clear_dirty_log(&self.vm.fd, slot, first, count as u32, words).map_err(|e| {
                host(format!("cannot clear KVM's dirty log of memory slot {slot}"), e)
            })?;
        }
        Ok(())
    }
}

/// The pieces `(first page, pages)` of a log of `pages` pages that hold dirty pages: each begins
/// at a multiple of 64, is at most [`CHUNK_PAGES`] long, and is trimmed to its dirty words.
fn chunks(pages: u64, log: &[u64]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let step = (CHUNK_PAGES / 64) as usize;
    log.chunks(step).enumerate().filter_map(move |(i, words)| {
        let low = words.iter().position(|w| *w != 0)?;
        let high = words.iter().rposition(|w| *w != 0)?;
        let first = (i * step + low) as u64 * 64;
        let end = ((i * step + high + 1) as u64 * 64).min(pages);
        Some((first, end - first))
    })
}

fn host(what: String, source: std::io::Error) -> mem::Error {
    mem::Error::Host { what, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chunks_cover_every_dirty_page_and_are_aligned(
            pages in 1u64..(3 * CHUNK_PAGES),
            dirty in proptest::collection::vec(0u64..(3 * CHUNK_PAGES), 0..20),
        ) {
            let mut log = vec![0u64; pages.div_ceil(64) as usize];
            let dirty: Vec<_> = dirty.into_iter().filter(|p| *p < pages).collect();
            for p in &dirty {
                log[(p / 64) as usize] |= 1 << (p % 64);
            }
            let all: Vec<_> = chunks(pages, &log).collect();
            for (first, count) in &all {
                prop_assert!(first % 64 == 0 && *count > 0 && *count <= CHUNK_PAGES);
                prop_assert!(count % 64 == 0 || first + count == pages);
            }
            for p in dirty {
                let hits = all.iter().filter(|(f, c)| p >= *f && p < f + c).count();
                prop_assert_eq!(hits, 1);
            }
        }
    }
}
