//! Page bitmaps: set from several threads, drained by one.

use std::sync::atomic::{AtomicU64, Ordering};

/// A fixed-size bitmap, one bit a page. All operations are safe from any thread; bits past
/// [`Bitmap::len`] are never set.
pub struct Bitmap {
    words: Box<[AtomicU64]>,
    len: u64,
}

impl Bitmap {
    /// A bitmap of `len` bits, all clear.
    pub fn new(len: u64) -> Self {
        let words = (0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { words, len }
    }

    /// Number of bits.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bits at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of 64-bit words.
    pub fn words(&self) -> usize {
        self.words.len()
    }

    /// Word `i`: bits `64 * i ..`.
    pub fn word(&self, i: usize) -> u64 {
        self.words[i].load(Ordering::Acquire)
    }

    fn mask(&self, i: usize) -> u64 {
        let tail = self.len % 64;
        if i + 1 == self.words.len() && tail != 0 { (1 << tail) - 1 } else { u64::MAX }
    }

    /// Sets bit `bit` (ignored when out of range).
    pub fn set(&self, bit: u64) {
        if bit < self.len {
            self.words[(bit / 64) as usize].fetch_or(1 << (bit % 64), Ordering::AcqRel);
        }
    }

    /// Clears bit `bit`; tells whether it was set.
    pub fn clear(&self, bit: u64) -> bool {
        if bit >= self.len {
            return false;
        }
        let mask = 1 << (bit % 64);
        self.words[(bit / 64) as usize].fetch_and(!mask, Ordering::AcqRel) & mask != 0
    }

    /// Whether bit `bit` is set.
    pub fn test(&self, bit: u64) -> bool {
        bit < self.len && self.word((bit / 64) as usize) & (1 << (bit % 64)) != 0
    }

    /// Sets `count` bits from `first` (clamped to the end).
    pub fn set_range(&self, first: u64, count: u64) {
        let end = first.saturating_add(count).min(self.len);
        let mut bit = first;
        while bit < end {
            let n = (64 - bit % 64).min(end - bit);
            let mask = if n == 64 { u64::MAX } else { ((1 << n) - 1) << (bit % 64) };
            self.words[(bit / 64) as usize].fetch_or(mask, Ordering::AcqRel);
            bit += n;
        }
    }

    /// Sets every bit.
    pub fn set_all(&self) {
        self.set_range(0, self.len);
    }

    /// Clears every bit.
    pub fn clear_all(&self) {
        for w in &self.words {
            w.store(0, Ordering::Release);
        }
    }

    /// ORs `bits` into word `i`; returns how many bits were newly set.
    pub fn or_word(&self, i: usize, bits: u64) -> u64 {
        let bits = bits & self.mask(i);
        if bits == 0 {
            return 0;
        }
        let old = self.words[i].fetch_or(bits, Ordering::AcqRel);
        u64::from((bits & !old).count_ones())
    }

    /// Takes word `i`: returns its bits and clears them in one step.
    pub fn take_word(&self, i: usize) -> u64 {
        if self.words[i].load(Ordering::Relaxed) == 0 {
            return 0;
        }
        self.words[i].swap(0, Ordering::AcqRel)
    }

    /// Number of set bits.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.load(Ordering::Relaxed).count_ones())).sum()
    }

    /// The first run of set bits at or after `from`: `(first, count)`, `count <= max`.
    pub fn next_run(&self, from: u64, max: u64) -> Option<(u64, u64)> {
        let mut bit = from;
        while bit < self.len {
            let w = self.word((bit / 64) as usize) >> (bit % 64);
            if w == 0 {
                bit = (bit / 64 + 1) * 64;
                continue;
            }
            let first = bit + u64::from(w.trailing_zeros());
            let mut end = first;
            while end < self.len && end - first < max {
                let w = self.word((end / 64) as usize) >> (end % 64);
                let ones = u64::from((!w).trailing_zeros()).min(64 - end % 64);
                if ones == 0 {
                    break;
                }
                end += ones;
            }
            return Some((first, (end - first).min(max)));
        }
        None
    }
}

impl std::fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bitmap({} of {})", self.count(), self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_a_vector_of_bools(
            len in 1u64..400,
            ops in proptest::collection::vec((0u8..4, 0u64..420, 1u64..200), 0..40),
        ) {
            let map = Bitmap::new(len);
            let mut model = vec![false; len as usize];
            for (op, bit, count) in ops {
                match op {
                    0 => { map.set(bit); if bit < len { model[bit as usize] = true } }
                    1 => { map.clear(bit); if bit < len { model[bit as usize] = false } }
                    2 => {
                        map.set_range(bit, count);
                        for b in bit..(bit + count).min(len) { model[b as usize] = true }
                    }
                    _ => {
                        let want = (bit..len).find(|b| model[*b as usize]).map(|first| {
                            let n = (first..len).take_while(|b| model[*b as usize]).count() as u64;
                            (first, n.min(count))
                        });
                        prop_assert_eq!(map.next_run(bit, count), want);
                    }
                }
            }
            prop_assert_eq!(map.count(), model.iter().filter(|b| **b).count() as u64);
            for (b, set) in model.iter().enumerate() {
                prop_assert_eq!(map.test(b as u64), *set);
            }
        }
    }
}
