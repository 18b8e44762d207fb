//! A device that dies again and again, and the driver that must not notice.

use std::collections::HashMap;
use std::sync::Arc;

use mem::{Backing, ForeignMapping, GuestMemory, RegionSpec};
use proptest::prelude::*;

use super::*;
use crate::features::{VIRTIO_F_INDIRECT_DESC, mask};
use crate::ring::{Format, Ring};
use crate::testing::{CountingInterrupt, DriverRing, ram};

const SIZE: u16 = 8;

/// Shared memory of its own, zeroed.
fn table() -> Arc<ForeignMapping> {
    let size = 4096;
    let mem = GuestMemory::new(&[RegionSpec { gpa: 0, size }], &Backing::default()).unwrap();
    let file = mem.regions()[0].file.as_ref().unwrap().0.try_clone().unwrap();
    ForeignMapping::map(file, 0, size).unwrap()
}

struct World {
    packed: bool,
    driver: DriverRing,
    table: Arc<ForeignMapping>,
    ring: Ring,
    taken: Vec<Chain>,
    /// Used by the device, by id: what the driver has to find used, and not before.
    next_buffer: u64,
    /// Each outstanding id's buffer address.
    added: HashMap<u16, u64>,
}

impl World {
    fn new(packed: bool) -> Self {
        let mem = ram(0x20000);
        let mut features = mask(VIRTIO_F_INDIRECT_DESC);
        if packed {
            features |= mask(VIRTIO_F_RING_PACKED);
        }
        let driver = DriverRing::new(&mem, 0, SIZE, features);
        let table = table();
        let ring = open(&driver, &table).unwrap();
        let (taken, next_buffer, added) = (Vec::new(), 0, HashMap::new());
        Self { packed, driver, table, ring, taken, next_buffer, added }
    }

    /// The driver makes a chain of `len` buffers available, whose first names it.
    fn add(&mut self, len: usize, indirect: bool) {
        let at = 0x8000 + 0x100 * (self.next_buffer % 64);
        let buffers: Vec<_> = (0..len as u64).map(|i| (at + 16 * i, 8)).collect();
        let table = indirect.then_some(0x18000 + 0x100 * (self.next_buffer % 64));
        if let Some(id) = self.driver.add(&[], &buffers, table) {
            self.added.insert(id, at);
            self.next_buffer += 1;
        }
    }

    fn pop(&mut self) {
        let mut chain = Chain::new();
        if self.ring.pop(&mut chain).unwrap() {
            // What is given, also for the second time, is what the driver gave.
            assert!(self.added.contains_key(&chain.id()), "id {} is not outstanding", chain.id());
            assert_eq!(chain.gpa(), self.added[&chain.id()]);
            assert!(self.taken.iter().all(|c| c.id() != chain.id()), "given out twice");
            self.taken.push(chain);
        }
    }

    fn push(&mut self, which: usize) {
        if !self.taken.is_empty() {
            let chain = self.taken.swap_remove(which % self.taken.len());
            self.ring.push(&chain, 8);
        }
    }

    /// Returns chains to the ring while that goes (in reverse order, and not after others).
    fn unpop(&mut self) {
        if let Some(chain) = self.taken.last()
            && self.ring.unpop(chain).is_ok()
        {
            self.taken.pop();
        }
    }

    /// The driver looks; `poll_used` itself panics over what was not outstanding.
    fn drain(&mut self) {
        while let Some((id, _)) = self.driver.poll_used() {
            self.added.remove(&id);
        }
    }

    /// The process dies, perhaps inside `publish`, and another takes over.
    fn crash(&mut self, step: u8) {
        match &mut self.ring.0 {
            Format::Split(r) => r.publish_until(step),
            Format::Packed(r) => r.publish_until(step),
        }
        self.taken.clear();
        self.ring = open(&self.driver, &self.table).unwrap();
    }

    /// Everything that the driver ever gave gets used.
    fn finish(&mut self) {
        for _ in 0..3 * SIZE {
            self.pop();
        }
        while !self.taken.is_empty() {
            self.push(0);
        }
        self.ring.publish();
        self.drain();
        assert_eq!(self.driver.outstanding(), 0, "lost, packed: {}", self.packed);
        assert_eq!(self.ring.taken(), 0);
    }
}

fn open(driver: &DriverRing, table: &Arc<ForeignMapping>) -> Result<Ring, String> {
    let mut setup = driver.setup(None, Arc::new(CountingInterrupt::default()));
    let (inflight, pos) = InflightQueue::open(table, 0, SIZE, &setup)?;
    setup.pos = Some(pos);
    let mut ring = Ring::new(&setup).map_err(|e| e.to_string())?;
    ring.track(inflight);
    Ok(ring)
}

#[test]
fn sizes_are_those_of_the_specification() {
    assert_eq!(InflightQueue::bytes(1, false), 64);
    assert_eq!(InflightQueue::bytes(128, false), 16 + 128 * 16 + 48);
    assert_eq!(InflightQueue::bytes(128, true), 32 + 128 * 32 + 32);
}

#[test]
fn what_was_taken_comes_again_in_order_after_a_crash() {
    for packed in [false, true] {
        let mut w = World::new(packed);
        (0..4).for_each(|_| w.add(1, false));
        (0..4).for_each(|_| w.pop());
        let ids: Vec<_> = w.taken.iter().map(Chain::id).collect();
        w.push(1);
        w.ring.publish();
        w.crash(0);
        (0..4).for_each(|_| w.pop());
        let again: Vec<_> = w.taken.iter().map(Chain::id).collect();
        assert_eq!(again, [ids[0], ids[2], ids[3]], "packed: {packed}");
        w.finish();
    }
}

#[test]
fn a_table_that_makes_no_sense_is_refused() {
    let mut w = World::new(false);
    w.add(1, false);
    let write = |at: usize, v: u8| {
        let used = w.table.as_ptr().wrapping_add(at);
        // SAFETY: inside the mapping of 4096 bytes.
        #[allow(unsafe_code)]
        unsafe {
            used.write_volatile(v);
        }
    };
    write(8, 2);
    assert!(open(&w.driver, &w.table).err().unwrap().contains("version 2"));
    write(8, 1);
    // One entry in the last batch, that the table places beyond its end.
    write(14, 0xff);
    write(15, 0xff);
    write(12, 200);
    assert!(open(&w.driver, &w.table).err().unwrap().contains("entry 200"));
    let setup = w.driver.setup(None, Arc::new(CountingInterrupt::default()));
    assert!(InflightQueue::open(&w.table, 0, SIZE / 2, &setup).is_err());
    assert!(InflightQueue::open(&w.table, 4096 - 64, SIZE, &setup).is_err());
    assert!(InflightQueue::open(&w.table, usize::MAX - 8, SIZE, &setup).is_err());
}

proptest! {
    #[test]
    fn no_chain_is_lost_or_used_twice_however_often_the_device_dies(
        packed: bool,
        ops in proptest::collection::vec((0u8..12, 0u8..16), 0..200),
    ) {
        let mut w = World::new(packed);
        for (op, n) in ops {
            match op {
                0..=2 => w.add(usize::from(n % 3) + 1, n & 8 != 0),
                3..=5 => w.pop(),
                6 | 7 => w.push(n.into()),
                8 => w.ring.publish(),
                9 => w.unpop(),
                10 => w.drain(),
                _ => w.crash(n % 4),
            }
        }
        w.finish();
    }

    #[test]
    fn any_bytes_for_a_table_are_survived(
        packed: bool,
        bytes in proptest::collection::vec(any::<u8>(), 0..512),
        plausible: bool,
    ) {
        let mut w = World::new(packed);
        for (i, b) in bytes.iter().enumerate() {
            let b = if plausible { b & 7 } else { *b };
            #[allow(unsafe_code)]
            // SAFETY: inside the mapping of 4096 bytes.
            unsafe { w.table.as_ptr().wrapping_add(i).write_volatile(b) };
        }
        if let Ok(mut ring) = open(&w.driver, &w.table) {
            w.add(1, false);
            for _ in 0..2 * SIZE {
                let mut chain = Chain::new();
                if let Ok(true) = ring.pop(&mut chain) {
                    ring.push(&chain, 0);
                    ring.publish();
                }
            }
        }
    }
}
