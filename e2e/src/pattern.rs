//! Contents that can be checked: every word follows from where it is, so a lost, doubled, swapped
//! or old piece shows.

/// The word number `index` of the sequence `seed`. Neighbouring arguments give unrelated words
/// (the finaliser of SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", 2014).
pub fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A byte stream of such words, little-endian; made on one side, checked on the other.
pub struct Stream {
    seed: u64,
    position: u64,
}

impl Stream {
    /// The stream from its first byte.
    pub fn new(seed: u64) -> Self {
        Self { seed, position: 0 }
    }

    /// Bytes so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    fn next_byte(&mut self) -> u8 {
        let byte = word(self.seed, self.position / 8).to_le_bytes()[(self.position % 8) as usize];
        self.position += 1;
        byte
    }

    /// The stream's next bytes.
    pub fn fill(&mut self, buf: &mut [u8]) {
        let mut rest = buf;
        while !rest.is_empty() {
            if self.position.is_multiple_of(8) && rest.len() >= 8 {
                let (head, tail) = rest.split_at_mut(8);
                head.copy_from_slice(&word(self.seed, self.position / 8).to_le_bytes());
                self.position += 8;
                rest = tail;
            } else {
                rest[0] = self.next_byte();
                rest = &mut rest[1..];
            }
        }
    }

    /// How many of `buf` are not the stream's next bytes.
    pub fn check(&mut self, buf: &[u8]) -> u64 {
        let mut bad = 0;
        let mut rest = buf;
        while !rest.is_empty() {
            if self.position.is_multiple_of(8) && rest.len() >= 8 {
                let wanted = word(self.seed, self.position / 8).to_le_bytes();
                bad += wanted.iter().zip(rest).filter(|(a, b)| a != b).count() as u64;
                self.position += 8;
                rest = &rest[8..];
            } else {
                bad += u64::from(self.next_byte() != rest[0]);
                rest = &rest[1..];
            }
        }
        bad
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_the_same_in_any_pieces() {
        let mut whole = vec![0; 1000];
        Stream::new(7).fill(&mut whole);
        let mut pieces = Stream::new(7);
        let mut rest = &mut whole.clone()[..];
        for n in [1, 3, 8, 17, 64, 5] {
            let (piece, tail) = rest.split_at_mut(n);
            pieces.fill(piece);
            rest = tail;
        }
        let mut checker = Stream::new(7);
        assert_eq!(checker.check(&whole[..13]) + checker.check(&whole[13..]), 0);
        assert_eq!(checker.position(), 1000);
    }

    #[test]
    fn damage_shows() {
        let mut bytes = vec![0; 256];
        Stream::new(1).fill(&mut bytes);
        bytes[77] ^= 4;
        assert_eq!(Stream::new(1).check(&bytes), 1);
        let mut bytes = vec![0; 256];
        Stream::new(1).fill(&mut bytes);
        bytes.remove(100);
        assert!(Stream::new(1).check(&bytes) > 100);
    }
}
