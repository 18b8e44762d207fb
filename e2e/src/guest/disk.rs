//! Blocks on /dev/vda that are written, read again past the page cache, and compared with what was
//! written last: a lost write shows as an old generation.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::pattern;

const BLOCK: usize = 4096;
const SEED: u64 = 0x6469_736b;

/// One block in memory, aligned as O_DIRECT wants it.
#[repr(C, align(4096))]
struct Block([u8; BLOCK]);

/// Counters of the disk work.
#[derive(Default)]
pub struct Disk {
    /// Blocks written.
    pub written: AtomicU64,
    /// Blocks read again and compared.
    pub checked: AtomicU64,
    /// Blocks that were not what was written last, and failed requests.
    pub bad: AtomicU64,
}

/// What block `index` holds in its generation: that, and words that follow from both.
fn make(block: &mut Block, index: u64, generation: u64) {
    for (i, chunk) in block.0.chunks_exact_mut(8).enumerate() {
        let word = match i {
            0 => index,
            1 => generation,
            _ => pattern::word(SEED ^ (generation << 32), index * 512 + i as u64),
        };
        chunk.copy_from_slice(&word.to_le_bytes());
    }
}

impl Disk {
    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn step(
        &self,
        file: &File,
        index: u64,
        generation: &mut u64,
        has: &mut Block,
        wanted: &mut Block,
    ) -> io::Result<()> {
        let offset = index * BLOCK as u64;
        if *generation > 0 {
            file.read_exact_at(&mut has.0, offset)?;
            make(wanted, index, *generation);
            Self::count(&self.checked);
            if has.0 != wanted.0 {
                Self::count(&self.bad);
                let found = u64::from_le_bytes(has.0[8..16].try_into().unwrap_or_default());
                eprintln!("tern-guest: block {index} has generation {found}, not {generation}");
            }
        }
        make(wanted, index, *generation + 1);
        file.write_all_at(&wanted.0, offset)?;
        *generation += 1;
        Self::count(&self.written);
        Ok(())
    }

    /// Works on the first `blocks` blocks of `path` for ever.
    ///
    /// # Errors
    /// When the disk cannot be opened; failed requests are counted.
    pub fn run(&self, path: &str, blocks: u64) -> io::Result<()> {
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?;
        let mut generations = vec![0; blocks as usize];
        let (mut has, mut wanted) = (Box::new(Block([0; BLOCK])), Box::new(Block([0; BLOCK])));
        for turn in 0.. {
            // Half of the time a hot block, so that blocks come round while their write is young.
            let range = if turn % 2 == 0 { blocks.min(16) } else { blocks };
            let index = pattern::word(SEED, turn) % range;
            if let Err(e) =
                self.step(&file, index, &mut generations[index as usize], &mut has, &mut wanted)
            {
                Self::count(&self.bad);
                eprintln!("tern-guest: block {index}: {e}");
                thread::sleep(Duration::from_millis(100));
            }
            if turn % 64 == 63
                && let Err(e) = file.sync_data()
            {
                Self::count(&self.bad);
                eprintln!("tern-guest: flush: {e}");
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}
