//! The forwarding database: which port a MAC address was last seen at, by VLAN.
//!
//! All poll threads read and write one table of atomics, without locks. A bucket is one cache line of
//! four slots, and an address lives in one of four: in the one that its hash says or that one's
//! neighbour, or, when these are nearly full, in another one or its neighbour. So a look-up of what is
//! there touches one line, rarely more, however large the table is, and nothing is ever moved.
//!
//! Invariants:
//! - A key is whole in one word. A value (port, when seen) is whole in one word.
//! - A slot changes its key only through 0, which [`expire`](Fdb::expire) and
//!   [`flush`](Fdb::flush) write and a learner replaces by compare-and-swap.
//! - A reader may see the key of one moment with the value of the next: for one frame, an address
//!   that has just been forgotten may lead to the port of the one that took its slot. Whether that
//!   port is in the frame's VLAN is checked later, at the port itself.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::table::PortId;

const WAYS: usize = 4;
/// Above the 48 bits of the address and the 12 of the VLAN: the slot is taken.
const TAKEN: u64 = 1 << 63;
/// The value's bit of an entry that never ages and is never learned anew.
const STATIC: u64 = 1 << 63;

/// A MAC address and a VLAN as one number, never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(u64);

impl Key {
    /// `mac` as a 48-bit number, first byte on top.
    #[inline]
    pub fn new(mac: u64, vlan: u16) -> Self {
        Self(TAKEN | u64::from(vlan & 0xfff) << 48 | mac & 0xffff_ffff_ffff)
    }

    /// The address.
    pub fn mac(self) -> [u8; 6] {
        let b = self.0.to_be_bytes();
        [b[2], b[3], b[4], b[5], b[6], b[7]]
    }

    /// The VLAN, 0 for none.
    pub fn vlan(self) -> u16 {
        (self.0 >> 48) as u16 & 0xfff
    }

    /// The four buckets, of a table with `mask + 1` of them (at least 2), in the order in which they
    /// are looked at.
    #[inline]
    fn buckets(self, mask: usize) -> [usize; 4] {
        // A multiplication whose high half is folded in spreads addresses that count upwards.
        let p = u128::from(self.0) * 0x9e37_79b9_7f4a_7c15;
        let h = (p >> 64) as u64 ^ p as u64;
        let (a, b) = (h as usize & mask, (h >> 32) as usize & mask);
        [a, a ^ 1, b, b ^ 1]
    }
}

#[derive(Default)]
struct Slot {
    key: AtomicU64,
    value: AtomicU64,
}

#[derive(Default)]
#[repr(align(64))]
struct Bucket([Slot; WAYS]);

impl Bucket {
    fn free(&self) -> usize {
        self.0.iter().filter(|s| s.key.load(Ordering::Relaxed) == 0).count()
    }
}

/// The table.
pub struct Fdb {
    buckets: Box<[Bucket]>,
    mask: usize,
}

/// What became of learning an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learned {
    /// It was known there.
    Known,
    /// It is new, or has moved.
    Changed,
    /// All its buckets are full.
    Full,
}

/// One address, as shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub key: Key,
    pub port: PortId,
    /// Seconds since it was last seen.
    pub age: u32,
    pub fixed: bool,
}

#[inline]
fn pack(port: PortId, now: u32) -> u64 {
    u64::from(port) << 32 | u64::from(now)
}

#[inline]
fn port_of(value: u64) -> PortId {
    (value >> 32) as PortId
}

impl Fdb {
    /// A table for about `capacity` addresses (1 to 4 million); twice as many slots, so that buckets
    /// rarely overflow.
    pub fn new(capacity: usize) -> Self {
        let slots = capacity.clamp(64, 4 << 20) * 2;
        let buckets = slots.div_ceil(WAYS).next_power_of_two();
        let buckets: Box<[Bucket]> = (0..buckets).map(|_| Bucket::default()).collect();
        Self { mask: buckets.len() - 1, buckets }
    }

    #[inline]
    fn find(&self, key: Key) -> Option<&AtomicU64> {
        for bucket in key.buckets(self.mask) {
            for slot in &self.buckets[bucket].0 {
                if slot.key.load(Ordering::Acquire) == key.0 {
                    return Some(&slot.value);
                }
            }
        }
        None
    }

    /// Asks the CPU for the line that a look-up of `key` will read first.
    #[inline]
    pub fn prefetch(&self, key: Key) {
        let [first, ..] = key.buckets(self.mask);
        crate::copy::prefetch(std::ptr::from_ref(&self.buckets[first]).cast());
    }

    /// The port that `key` was last seen at.
    #[inline]
    pub fn lookup(&self, key: Key) -> Option<PortId> {
        self.find(key).map(|v| port_of(v.load(Ordering::Relaxed)))
    }

    /// Notes that `key` was seen at `port` at second `now`.
    #[inline]
    pub fn learn(&self, key: Key, port: PortId, now: u32) -> Learned {
        let Some(value) = self.find(key) else { return self.insert(key, pack(port, now)) };
        let (old, new) = (value.load(Ordering::Relaxed), pack(port, now));
        if old == new || old & STATIC != 0 {
            return Learned::Known;
        }
        value.store(new, Ordering::Relaxed);
        if port_of(old) == port { Learned::Known } else { Learned::Changed }
    }

    #[cold]
    fn insert(&self, key: Key, value: u64) -> Learned {
        let [a, b, c, d] = key.buckets(self.mask).map(|i| &self.buckets[i]);
        // As early in the order as there is room, unless the first two are nearly full and the others
        // are not: so all are full only when the table is.
        let free = a.free() + b.free();
        let first = free > 1 || free >= c.free() + d.free();
        let order = if first { [a, b, c, d] } else { [c, d, a, b] };
        for slot in order.into_iter().flat_map(|bucket| &bucket.0) {
            if slot.key.load(Ordering::Relaxed) != 0 {
                continue;
            }
            // The value first: a reader that finds the key finds a value that was meant for it, unless
            // two learners race for the slot, of which one takes the next slot.
            slot.value.store(value, Ordering::Relaxed);
            let taken = slot.key.compare_exchange(0, key.0, Ordering::AcqRel, Ordering::Relaxed);
            if taken.is_ok() {
                slot.value.store(value, Ordering::Relaxed);
                return Learned::Changed;
            }
        }
        Learned::Full
    }

    /// Ties `key` to `port` for good, in the place of a learned address if it must be.
    pub fn set_static(&self, key: Key, port: PortId) -> Learned {
        match self.find(key) {
            Some(v) => {
                v.store(pack(port, 0) | STATIC, Ordering::Relaxed);
                Learned::Changed
            }
            None => loop {
                match self.insert(key, pack(port, 0) | STATIC) {
                    Learned::Full if self.evict(key) => {}
                    done => return done,
                }
            },
        }
    }

    /// Makes room for `key` by forgetting an address that was learned; whether there was one.
    fn evict(&self, key: Key) -> bool {
        let slots = key.buckets(self.mask).into_iter().flat_map(|i| &self.buckets[i].0);
        slots.filter(|s| s.value.load(Ordering::Relaxed) & STATIC == 0).any(|slot| {
            let old = slot.key.load(Ordering::Acquire);
            old != 0
                && slot.key.compare_exchange(old, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })
    }

    fn retain(&self, keep: impl Fn(Key, u64) -> bool) -> usize {
        let mut gone = 0;
        for Slot { key: k, value } in self.buckets.iter().flat_map(|b| &b.0) {
            let key = k.load(Ordering::Acquire);
            if key != 0
                && !keep(Key(key), value.load(Ordering::Relaxed))
                && k.compare_exchange(key, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            {
                gone += 1;
            }
        }
        gone
    }

    /// Forgets what was not seen for more than `ageing` seconds. Returns how many.
    pub fn expire(&self, now: u32, ageing: u32) -> usize {
        self.retain(|_, v| v & STATIC != 0 || now.saturating_sub(v as u32) <= ageing)
    }

    /// Forgets what was learned (of `port` only, if given; static entries too then). Returns how
    /// many.
    pub fn flush(&self, port: Option<PortId>) -> usize {
        self.retain(|_, v| match port {
            Some(p) => port_of(v & !STATIC) != p,
            None => v & STATIC != 0,
        })
    }

    /// Everything in it, in no order.
    pub fn entries(&self, now: u32) -> Vec<Entry> {
        let mut all = Vec::new();
        for Slot { key, value } in self.buckets.iter().flat_map(|b| &b.0) {
            let (key, value) = (key.load(Ordering::Acquire), value.load(Ordering::Relaxed));
            if key != 0 {
                all.push(Entry {
                    key: Key(key),
                    port: port_of(value),
                    age: if value & STATIC != 0 { 0 } else { now.saturating_sub(value as u32) },
                    fixed: value & STATIC != 0,
                });
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learns_moves_ages_and_flushes() {
        let f = Fdb::new(1000);
        let k = Key::new(0x5254_0000_0001, 7);
        assert_eq!(f.lookup(k), None);
        assert_eq!(f.learn(k, 3, 10), Learned::Changed);
        assert_eq!(f.learn(k, 3, 11), Learned::Known);
        assert_eq!(f.lookup(k), Some(3));
        assert_eq!(f.lookup(Key::new(0x5254_0000_0001, 8)), None);
        assert_eq!(f.learn(k, 4, 12), Learned::Changed);
        assert_eq!(f.lookup(k), Some(4));
        assert_eq!(f.expire(312, 300), 0);
        assert_eq!(f.expire(313, 300), 1);
        assert_eq!(f.lookup(k), None);
        f.learn(k, 4, 400);
        f.set_static(Key::new(1, 0), 4);
        assert_eq!((f.flush(Some(3)), f.flush(None)), (0, 1));
        assert_eq!(f.learn(Key::new(1, 0), 9, 0), Learned::Known);
        assert_eq!(f.lookup(Key::new(1, 0)), Some(4));
        assert_eq!(f.flush(Some(4)), 1);
    }

    #[test]
    fn holds_what_it_promises_for_addresses_that_count_upwards() {
        let f = Fdb::new(100_000);
        for i in 0..100_000u64 {
            assert_ne!(f.learn(Key::new(0x5254_0000_0000 + i, 0), 1, 1), Learned::Full, "{i}");
        }
        assert!((0..100_000).all(|i| f.lookup(Key::new(0x5254_0000_0000 + i, 0)) == Some(1)));
        assert_eq!(f.entries(1).len(), 100_000);
    }

    #[test]
    fn random_addresses_fit_into_a_table_made_for_them() {
        let (mut x, capacity) = (1u64, 8192);
        let f = Fdb::new(capacity);
        let mut full = 0;
        for _ in 0..capacity {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            full += usize::from(f.learn(Key::new(x >> 16, 0), 1, 1) == Learned::Full);
        }
        assert!(full < capacity / 1000, "{full} of {capacity} found no slot");
    }

    #[test]
    fn a_flood_of_addresses_is_bounded() {
        let f = Fdb::new(64);
        let full = (0..10_000).filter(|i| f.learn(Key::new(*i, 0), 1, 1) == Learned::Full).count();
        assert!(full > 9_000);
        assert!(f.entries(1).len() <= 128);
    }

    #[test]
    fn threads_learn_at_the_same_time() {
        let f = Fdb::new(10_000);
        std::thread::scope(|s| {
            for t in 0..4u16 {
                let f = &f;
                s.spawn(move || {
                    for round in 0..20 {
                        for i in 0..2000u64 {
                            f.learn(Key::new(i * 4 + u64::from(t), 0), t, round);
                        }
                    }
                });
            }
        });
        for i in 0..8000u64 {
            assert_eq!(f.lookup(Key::new(i, 0)), Some((i % 4) as u16));
        }
    }
}
