//! Memory that changes at a known rate and can be checked.
//!
//! Every page has a base content that follows from its number, and its generation in three of its
//! words. The generations are also kept in a table, on other pages: a page that was lost, or came
//! over in an old state, does not agree with it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::pattern;

const WORDS: usize = 512;
/// Where a page keeps its generation.
const MARKS: [usize; 3] = [0, 255, 511];
const SEED: u64 = 0x6d65_6d00;

struct Pages {
    words: Vec<u64>,
    generations: Vec<u64>,
    random: usize,
    next: usize,
}

impl Pages {
    fn expected(&self, page: usize, index: usize) -> u64 {
        if MARKS.contains(&index) {
            self.generations[page] ^ pattern::word(SEED + 1, page as u64)
        } else if page < self.random {
            pattern::word(SEED, (page * WORDS + index) as u64)
        } else {
            page as u64
        }
    }

    fn is_good(&self, page: usize) -> bool {
        (0..WORDS).all(|i| self.words[page * WORDS + i] == self.expected(page, i))
    }

    /// Checks the page whose turn it is and changes it.
    fn turn(&mut self) -> bool {
        let page = self.next;
        self.next = (self.next + 1) % self.generations.len();
        let good = self.is_good(page);
        self.generations[page] += 1;
        for mark in MARKS {
            self.words[page * WORDS + mark] = self.expected(page, mark);
        }
        good
    }
}

/// The memory and its counters.
pub struct Memory {
    pages: Mutex<Pages>,
    /// Pages to change a second.
    pub rate: AtomicU64,
    /// Pages changed so far.
    pub dirtied: AtomicU64,
    /// Pages found wrong so far.
    pub bad: AtomicU64,
}

impl Memory {
    /// `mib` MiB, of which `random_percent` hold random data.
    pub fn new(mib: u64, random_percent: u64, rate: u64) -> Self {
        let count = (mib * 256) as usize;
        let random = count * random_percent.min(100) as usize / 100;
        let mut pages =
            Pages { words: vec![0; count * WORDS], generations: vec![1; count], random, next: 0 };
        for page in 0..count {
            for index in 0..WORDS {
                pages.words[page * WORDS + index] = pages.expected(page, index);
            }
        }
        Self {
            pages: Mutex::new(pages),
            rate: AtomicU64::new(rate),
            dirtied: AtomicU64::new(0),
            bad: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many pages there are.
    pub fn len(&self) -> usize {
        self.lock().generations.len()
    }

    /// Whether there is no page.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Changes pages for ever, at the rate.
    pub fn run(&self) {
        if self.is_empty() {
            return;
        }
        let mut last = Instant::now();
        let mut due = 0.0;
        loop {
            thread::sleep(Duration::from_millis(5));
            // A pause of the guest is not made good for afterwards.
            let passed = last.elapsed().min(Duration::from_millis(50));
            last = Instant::now();
            due += passed.as_secs_f64() * self.rate.load(Ordering::Relaxed) as f64;
            let mut pages = self.lock();
            while due >= 1.0 {
                due -= 1.0;
                if !pages.turn() {
                    self.bad.fetch_add(1, Ordering::Relaxed);
                }
                self.dirtied.fetch_add(1, Ordering::Relaxed);
                if last.elapsed() > Duration::from_millis(50) {
                    due = 0.0;
                }
            }
        }
    }

    /// Looks at every page; the number of wrong ones.
    pub fn verify(&self) -> u64 {
        let bad = (0..self.len()).filter(|&page| !self.lock().is_good(page)).count() as u64;
        self.bad.fetch_add(bad, Ordering::Relaxed);
        bad
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_pages_stay_good_and_damage_shows() {
        let memory = Memory::new(1, 50, 0);
        for _ in 0..600 {
            assert!(memory.lock().turn());
        }
        assert_eq!(memory.verify(), 0);
        memory.lock().words[40_000] ^= 1;
        memory.lock().generations[200] -= 1;
        assert_eq!(memory.verify(), 2);
    }
}
