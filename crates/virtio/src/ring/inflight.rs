//! Which chains are in flight, written down in memory that outlives the process.
//! Source: QEMU's vhost-user specification, "Inflight I/O tracking"; version 1 of its tables.
//!
//! The memory is shared with a front end that may write anything there at any time. It is read only
//! when a queue is taken up ([`InflightQueue::open`]), with every number checked; afterwards it is
//! only written, from a copy of one's own.
//!
//! ```text
//!   pop:      take      the entry gets the next number and the mark "in flight"
//!   push:     done      the entry waits in the batch (in this process only)
//!   publish:  prepare   the batch is linked up in the table;
//!             (the driver is shown the batch)
//!             commit    marks cleared, used_idx noted
//! ```
//! A process that died in between is recognised by the next one from `used_idx` and the ring.

use std::collections::VecDeque;
use std::sync::Arc;

use mem::ForeignMapping;

use super::chain::Chain;
use super::raw::RawDesc;
use crate::device::{RingPos, RingSetup};
use crate::features::{VIRTIO_F_RING_PACKED, has};

mod open;
mod table;

use table::{DESC, HEAD, Table};

/// Version of the tables that is read and written.
const VERSION: u16 = 1;
/// What each queue's table begins at a multiple of.
const ALIGN: usize = 64;

/// A chain that an earlier process took and did not use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pending {
    /// Its entry in the table; in a split ring also its head descriptor.
    pub slot: u16,
    /// Buffer id of a packed ring.
    pub id: u16,
    /// Descriptors that it takes in a packed ring.
    pub entries: u16,
}

/// The in-flight table of one queue, for [`Ring::track`](super::Ring::track).
#[derive(Debug)]
pub struct InflightQueue {
    table: Table,
    packed: bool,
    /// Number of the next chain.
    counter: u64,
    /// To be given out again, oldest first.
    pub(super) resubmit: VecDeque<Pending>,
    /// Used and not yet shown to the driver.
    batch: Vec<u16>,
    /// Packed: what is in the table, so that it never has to be read. `next` of each entry, `last`
    /// of each head, the first free entry.
    next: Vec<u16>,
    last: Vec<u16>,
    free: u16,
}

impl InflightQueue {
    /// Bytes that the table of a queue of `size` entries takes, up to where the next may begin.
    pub fn bytes(size: u16, packed: bool) -> usize {
        let (head, desc) =
            if packed { (HEAD.packed, DESC.packed) } else { (HEAD.split, DESC.split) };
        (head + desc * usize::from(size)).next_multiple_of(ALIGN)
    }

    /// Takes up the table at byte `offset` of `mapping`, which was made for queues of `capacity`
    /// entries, for the ring `setup`. Returns it with the ring's position: `setup.pos` (or the
    /// start) if the table is fresh, otherwise what table and ring say together.
    ///
    /// # Errors
    /// A sentence: the table lies outside the mapping or contradicts itself.
    pub fn open(
        mapping: &Arc<ForeignMapping>,
        offset: usize,
        capacity: u16,
        setup: &RingSetup,
    ) -> Result<(Self, RingPos), String> {
        let packed = has(setup.features, VIRTIO_F_RING_PACKED);
        if setup.size == 0 || setup.size > capacity {
            let size = setup.size;
            return Err(format!(
                "the in-flight table is for {capacity} entries, the ring has {size}"
            ));
        }
        let table = Table::new(mapping, offset, capacity, packed)?;
        let mut this = Self {
            table,
            packed,
            counter: 0,
            resubmit: VecDeque::new(),
            batch: Vec::with_capacity(setup.size.into()),
            next: Vec::new(),
            last: Vec::new(),
            free: 0,
        };
        let pos =
            if packed { open::packed(&mut this, setup)? } else { open::split(&mut this, setup)? };
        Ok((this, pos))
    }

    /// How many chains an earlier process left behind that were not given out again yet.
    pub fn to_resubmit(&self) -> usize {
        self.resubmit.len()
    }

    /// Split: the chain with head `head` (below the ring's size) was taken.
    #[inline]
    pub fn take(&mut self, head: u16) {
        self.table.set_counter(head, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.table.set_inflight(head, true);
    }

    /// Packed: a chain of `descriptors` was taken. Returns its entry, for [`done`](Self::done).
    pub(super) fn take_packed(&mut self, descriptors: impl Iterator<Item = RawDesc>) -> u16 {
        let slot = self.free;
        let (mut at, mut last, mut count) = (slot, slot, 0);
        for d in descriptors {
            // The ring never has more taken than entries, so there is a free one.
            let Some(next) = self.next.get(usize::from(at)) else { break };
            self.table.set_desc(at, &d);
            (last, at, count) = (at, *next, count + 1);
        }
        self.table.set_chain(slot, last, count);
        if let Some(l) = self.last.get_mut(usize::from(slot)) {
            *l = last;
        }
        self.table.set_counter(slot, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.table.set_inflight(slot, true);
        self.set_free(at);
        self.table.set_old_free(at);
        slot
    }

    /// The chain with that head (split) or entry (packed) is used; the driver does not know yet.
    #[inline]
    pub fn done(&mut self, slot: u16) {
        self.batch.push(slot);
    }

    /// The chain taken last goes back to the ring. Nothing may wait in the batch.
    pub(super) fn untake(&mut self, slot: u16) {
        self.table.set_inflight(slot, false);
        if self.packed {
            self.release(slot);
            self.table.set_old_free(self.free);
        }
    }

    /// Right before the driver is shown the batch; `used` is where the ring will stand: the used
    /// index (split), or index and wrap counter (packed).
    #[inline]
    pub(super) fn prepare(&mut self, used: u16) {
        if self.packed {
            for i in 0..self.batch.len() {
                self.release(self.batch[i]);
            }
            self.table.set_used(used);
        } else {
            for head in &self.batch {
                self.table.link(*head);
            }
        }
    }

    /// Right after the driver was shown the batch; `used` as in `prepare`.
    #[inline]
    pub(super) fn commit(&mut self, used: u16) {
        for slot in &self.batch {
            self.table.set_inflight(*slot, false);
        }
        self.batch.clear();
        if self.packed {
            self.table.set_old_free(self.free);
            self.table.set_old_used(used);
        } else {
            self.table.set_used(used);
        }
    }

    /// Packed: the entries of the chain at `slot` become free.
    fn release(&mut self, slot: u16) {
        let Some(last) = self.last.get(usize::from(slot)).copied() else { return };
        self.set_next(last, self.free);
        self.set_free(slot);
    }

    fn set_next(&mut self, slot: u16, next: u16) {
        if let Some(n) = self.next.get_mut(usize::from(slot)) {
            *n = next;
            self.table.set_next(slot, next);
        }
    }

    fn set_free(&mut self, slot: u16) {
        self.free = slot;
        self.table.set_free(slot);
    }

    /// Packed: the descriptors of a chain to be given out again, into `chain`.
    pub(super) fn fill(
        &self,
        pending: Pending,
        chain: &mut Chain,
        mem: &mem::GuestMemory,
    ) -> Result<(), super::RingError> {
        let mut at = pending.slot;
        for _ in 0..pending.entries {
            let Some(next) = self.next.get(usize::from(at)) else {
                return Err(super::RingError::ChainTooLong);
            };
            let d = self.table.desc(at);
            chain.add_packed(mem, &d)?;
            at = *next;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
