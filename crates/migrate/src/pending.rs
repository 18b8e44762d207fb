//! Which pages the destination has not acknowledged: the one map into which all dirty sources are
//! ORed.
//!
//! A page is in `pending` (to be sent), in `inflight` (sent or being sent in this round, not
//! acknowledged), in both (changed again meanwhile), or in neither (the destination has it). Only
//! [`Pending::acked`] takes pages out for good, so whatever breaks, pending and in-flight pages
//! together are what the destination lacks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mem::{Bitmap, DirtySource, GuestMemory};

/// Bitmap words of one piece of work: 1024 pages, 4 MiB of guest memory.
pub const CHUNK_WORDS: usize = 16;

/// A piece of work: some words of one region's in-flight map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    pub region: usize,
    pub first_word: usize,
    pub words: usize,
}

#[derive(Debug)]
struct RegionMap {
    pending: Bitmap,
    inflight: Bitmap,
    /// Chunks in the regions before this one.
    chunks_before: u64,
}

/// The map of all regions.
#[derive(Debug)]
pub struct Pending {
    regions: Vec<RegionMap>,
    chunks: u64,
    cursor: AtomicU64,
    /// Pages of this round that no channel has sent yet.
    unsent: AtomicU64,
}

impl Pending {
    /// A map for `memory` with every page pending.
    pub fn new(memory: &GuestMemory) -> Self {
        let mut chunks = 0;
        let mut regions = Vec::new();
        for r in memory.regions() {
            let pending = Bitmap::new(r.pages());
            pending.set_all();
            let words = pending.words();
            regions.push(RegionMap {
                pending,
                inflight: Bitmap::new(r.pages()),
                chunks_before: chunks,
            });
            chunks += words.div_ceil(CHUNK_WORDS) as u64;
        }
        Self { regions, chunks, cursor: AtomicU64::new(chunks), unsent: AtomicU64::new(0) }
    }

    /// ORs what every source saw into the map; returns how many pages became pending.
    ///
    /// # Errors
    /// A sentence that names the source.
    pub fn harvest(&self, sources: &[Arc<dyn DirtySource>]) -> Result<u64, String> {
        self.read(sources, |source, i, pending| source.harvest(i, pending))
    }

    /// The same, while the guest stands still and will not go on before the sources are stopped or
    /// the whole of memory is sent anew.
    ///
    /// # Errors
    /// A sentence that names the source.
    pub fn harvest_last(&self, sources: &[Arc<dyn DirtySource>]) -> Result<u64, String> {
        self.read(sources, |source, i, pending| source.harvest_last(i, pending))
    }

    fn read(
        &self,
        sources: &[Arc<dyn DirtySource>],
        harvest: impl Fn(&dyn DirtySource, usize, &Bitmap) -> mem::Result<u64>,
    ) -> Result<u64, String> {
        let mut new = 0;
        for source in sources {
            for (i, r) in self.regions.iter().enumerate() {
                new += harvest(source.as_ref(), i, &r.pending)
                    .map_err(|e| format!("cannot read the dirty log of {}: {e}", source.name()))?;
            }
        }
        Ok(new)
    }

    /// Begins a round: what is pending becomes in flight. Returns its pages.
    pub fn begin_round(&self) -> u64 {
        let mut pages = 0;
        for r in &self.regions {
            for w in 0..r.pending.words() {
                let bits = r.pending.take_word(w);
                if bits != 0 {
                    pages += r.inflight.or_word(w, bits);
                }
            }
        }
        self.unsent.store(pages, Ordering::Relaxed);
        self.cursor.store(0, Ordering::Release);
        pages
    }

    /// The next piece of this round's work that nobody has; several threads share it.
    pub fn next_chunk(&self) -> Option<Chunk> {
        loop {
            let n = self.cursor.fetch_add(1, Ordering::AcqRel);
            if n >= self.chunks {
                // Do not let it run away, however often it is asked.
                self.cursor.store(self.chunks, Ordering::Release);
                return None;
            }
            let region = self.regions.partition_point(|r| r.chunks_before <= n) - 1;
            let r = &self.regions[region];
            let first_word = (n - r.chunks_before) as usize * CHUNK_WORDS;
            let words = CHUNK_WORDS.min(r.inflight.words() - first_word);
            if (first_word..first_word + words).any(|w| r.inflight.word(w) != 0) {
                return Some(Chunk { region, first_word, words });
            }
        }
    }

    /// In-flight word `word` of region `region`.
    pub fn word(&self, region: usize, word: usize) -> u64 {
        self.regions[region].inflight.word(word)
    }

    /// Counts `pages` as sent.
    pub fn sent(&self, pages: u64) {
        self.unsent.fetch_sub(pages, Ordering::Relaxed);
    }

    /// The destination has all of the round.
    pub fn acked(&self) {
        self.regions.iter().for_each(|r| r.inflight.clear_all());
        self.unsent.store(0, Ordering::Relaxed);
    }

    /// The round failed: what was in flight is pending again (for a connection that is resumed).
    pub fn failed(&self) {
        for r in &self.regions {
            for w in 0..r.inflight.words() {
                r.pending.or_word(w, r.inflight.take_word(w));
            }
        }
        self.unsent.store(0, Ordering::Relaxed);
    }

    /// Pages that are pending (not those in flight).
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(|r| r.pending.count()).sum()
    }

    /// Pages of this round that were not sent yet.
    pub fn unsent(&self) -> u64 {
        self.unsent.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mem::{Backing, RegionSpec};
    use proptest::prelude::*;

    fn memory(pages: &[u64]) -> GuestMemory {
        let mut gpa = 0;
        let specs: Vec<_> = pages
            .iter()
            .map(|p| {
                let spec = RegionSpec { gpa, size: p * mem::PAGE_SIZE };
                gpa += spec.size + mem::PAGE_SIZE;
                spec
            })
            .collect();
        GuestMemory::new(&specs, &Backing::default()).unwrap()
    }

    fn drain(p: &Pending) -> u64 {
        let mut pages = 0;
        while let Some(c) = p.next_chunk() {
            for w in c.first_word..c.first_word + c.words {
                pages += u64::from(p.word(c.region, w).count_ones());
            }
        }
        pages
    }

    #[test]
    fn a_page_stays_until_it_is_acknowledged() {
        let m = memory(&[100, 5000]);
        let p = Pending::new(&m);
        assert_eq!(p.begin_round(), 5100);
        assert_eq!(p.pages(), 0);
        p.failed();
        assert_eq!(p.pages(), 5100);
        assert_eq!(p.begin_round(), 5100);
        m.start().unwrap();
        m.write(0x1000, &[1]).unwrap();
        let own: Arc<dyn DirtySource> = Arc::new(m.clone());
        assert_eq!(p.harvest(&[own]).unwrap(), 1);
        p.acked();
        assert_eq!(p.pages(), 1);
        assert_eq!(p.begin_round(), 1);
        assert_eq!(drain(&p), 1);
    }

    proptest! {
        #[test]
        fn every_page_is_in_exactly_one_chunk(
            regions in proptest::collection::vec(1u64..3000, 1..4),
            dirty in proptest::collection::vec((0usize..4, 0u64..3000), 0..50),
        ) {
            let p = Pending::new(&memory(&regions));
            prop_assert_eq!(p.begin_round(), regions.iter().sum::<u64>());
            prop_assert_eq!(drain(&p), regions.iter().sum::<u64>());
            p.acked();
            let mut set = std::collections::BTreeSet::new();
            for (r, page) in dirty {
                if r < regions.len() && page < regions[r] {
                    p.regions[r].pending.set(page);
                    set.insert((r, page));
                }
            }
            prop_assert_eq!(p.begin_round(), set.len() as u64);
            prop_assert_eq!(drain(&p), set.len() as u64);
            prop_assert_eq!(p.next_chunk(), None);
        }
    }
}
