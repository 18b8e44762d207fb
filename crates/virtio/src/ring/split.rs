//! The split ring (VIRTIO 1.2, section 2.7).
//!
//! ```text
//!   used_idx (driver sees) <= next_used (pushed) ;  next_used + taken = next_avail <= avail.idx
//! ```

use std::sync::atomic::{Ordering, fence};

use mem::GuestMemory;

use super::chain::{Chain, Token};
use super::inflight::Pending;
use super::raw::{AvailRing, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, DescTable, RawDesc, UsedRing};
use super::{MAX_QUEUE_SIZE, RingError, crossed};
use crate::device::{RingPos, RingSetup};
use crate::features::{VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, has};

const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

pub struct SplitRing {
    mem: GuestMemory,
    desc: DescTable,
    avail: AvailRing,
    used: UsedRing,
    size: u16,
    event_idx: bool,
    indirect: bool,
    /// Next avail entry to look at.
    next_avail: u16,
    /// The driver's index when last read.
    avail_seen: u16,
    /// Next used entry to write.
    next_used: u16,
    /// What the driver was told.
    published: u16,
    /// `published` when the driver was last considered for an interrupt; `None`: never.
    signalled: Option<u16>,
    kicks_off: bool,
    inflight: Option<Box<super::InflightQueue>>,
}

impl SplitRing {
    pub fn new(s: &RingSetup) -> Result<Self, RingError> {
        if !s.size.is_power_of_two() || s.size > MAX_QUEUE_SIZE {
            return Err(RingError::Size(s.size));
        }
        let pos = s.pos.unwrap_or_default();
        if pos.avail.wrapping_sub(pos.used) > s.size {
            return Err(RingError::Position(pos.avail));
        }
        Ok(Self {
            desc: DescTable::new(&s.mem, s.desc, s.size)?,
            avail: AvailRing::new(&s.mem, s.avail, s.size)?,
            used: UsedRing::new(&s.mem, s.used, s.size)?,
            mem: s.mem.clone(),
            size: s.size,
            event_idx: has(s.features, VIRTIO_F_EVENT_IDX),
            indirect: has(s.features, VIRTIO_F_INDIRECT_DESC),
            next_avail: pos.avail,
            avail_seen: pos.avail,
            next_used: pos.used,
            published: pos.used,
            signalled: None,
            kicks_off: true,
            inflight: None,
        })
    }

    pub fn track(&mut self, table: super::InflightQueue) {
        self.inflight = Some(Box::new(table));
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    pub fn taken(&self) -> u16 {
        self.next_avail.wrapping_sub(self.next_used)
    }

    #[inline]
    pub fn has_work(&mut self) -> bool {
        if self.next_avail == self.avail_seen {
            self.avail_seen = self.avail.idx();
        }
        self.next_avail != self.avail_seen || self.to_resubmit().is_some()
    }

    #[inline]
    fn to_resubmit(&self) -> Option<Pending> {
        self.inflight.as_ref()?.resubmit.front().copied()
    }

    /// Takes what an earlier process had taken; it counts as taken already.
    #[cold]
    fn resubmit(&mut self, pending: Pending, chain: &mut Chain) -> Result<bool, RingError> {
        chain.begin(&self.mem);
        self.walk(pending.slot, chain)?;
        let (id, at) = (pending.slot, self.next_avail);
        chain.token = Token { id, entries: 1, before: at, after: at, slot: id };
        if let Some(table) = &mut self.inflight {
            table.resubmit.pop_front();
        }
        Ok(true)
    }

    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        if !self.has_work() {
            return Ok(false);
        }
        if let Some(pending) = self.to_resubmit() {
            return self.resubmit(pending, chain);
        }
        // There are at most `size` entries in all: those that wait and those taken. An index that
        // the driver moved backwards looks like a great many that wait.
        let waiting = self.avail_seen.wrapping_sub(self.next_avail);
        if u32::from(waiting) + u32::from(self.taken()) > u32::from(self.size) {
            // What was seen may be stale nonsense: look afresh at the next try.
            self.avail_seen = self.next_avail;
            return Err(RingError::TooManyAvailable);
        }
        let head = self.avail.entry(self.next_avail);
        chain.begin(&self.mem);
        self.walk(head, chain)?;
        let before = self.next_avail;
        self.next_avail = before.wrapping_add(1);
        chain.token = Token { id: head, entries: 1, before, after: self.next_avail, slot: head };
        if let Some(table) = &mut self.inflight {
            table.take(head);
        }
        Ok(true)
    }

    #[inline]
    pub fn pop_burst(&mut self, chains: &mut [Chain]) -> (usize, Result<(), RingError>) {
        if usize::from(self.avail_seen.wrapping_sub(self.next_avail)) < chains.len() {
            // The driver writes here all the time: every look costs a cache miss.
            self.avail_seen = self.avail.idx();
        }
        let waiting = usize::from(self.avail_seen.wrapping_sub(self.next_avail));
        let n = waiting.min(chains.len());
        for i in 0..n {
            self.desc.prefetch(self.avail.entry(self.next_avail.wrapping_add(i as u16)));
        }
        if self.inflight.is_some() || waiting + usize::from(self.taken()) > usize::from(self.size) {
            return self.pop_one_by_one(chains);
        }
        // What `pop` asks of every chain has been asked of all of them.
        for (i, chain) in chains[..n].iter_mut().enumerate() {
            let before = self.next_avail;
            let id = self.avail.entry(before);
            chain.begin(&self.mem);
            if let Err(e) = self.walk(id, chain) {
                return (i, Err(e));
            }
            self.next_avail = before.wrapping_add(1);
            chain.token = Token { id, entries: 1, before, after: self.next_avail, slot: id };
        }
        (n, Ok(()))
    }

    /// [`pop_burst`](Self::pop_burst) with in-flight tables, and of rings that make no sense.
    fn pop_one_by_one(&mut self, chains: &mut [Chain]) -> (usize, Result<(), RingError>) {
        for (n, chain) in chains.iter_mut().enumerate() {
            if self.next_avail == self.avail_seen && self.to_resubmit().is_none() {
                return (n, Ok(()));
            }
            match self.pop(chain) {
                Ok(true) => {}
                Ok(false) => return (n, Ok(())),
                Err(e) => return (n, Err(e)),
            }
        }
        (chains.len(), Ok(()))
    }

    #[inline]
    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        let only = |d: &RawDesc| d.at12 & (DESC_INDIRECT | DESC_NEXT) == 0;
        if let Some(d) = self.desc.get(head).filter(only) {
            return chain.add_only(&self.mem, d.addr, d.len, d.at12 & DESC_WRITE != 0);
        }
        self.walk_all(head, chain)
    }

    /// [`walk`](Self::walk) of chains with several descriptors, or with an indirect one.
    fn walk_all(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        let mut index = head;
        for _ in 0..self.size {
            let Some(d) = self.desc.get(index) else {
                return Err(RingError::DescriptorIndex { index, size: self.size.into() });
            };
            let (flags, next) = (d.at12, d.at14);
            if flags & DESC_INDIRECT != 0 {
                if !self.indirect {
                    return Err(RingError::IndirectNotNegotiated);
                }
                if flags & DESC_NEXT != 0 {
                    return Err(RingError::IndirectNested);
                }
                return chain.add_indirect(&self.mem, d.addr, d.len, true);
            }
            chain.add(&self.mem, d.addr, d.len, flags & DESC_WRITE != 0)?;
            if flags & DESC_NEXT == 0 {
                return Ok(());
            }
            index = next;
        }
        Err(RingError::ChainTooLong)
    }

    pub fn unpop(&mut self, chain: &Chain) -> Result<(), RingError> {
        if chain.token.after != self.next_avail || chain.token.entries != 1 || self.taken() == 0 {
            return Err(RingError::Unpop);
        }
        if chain.token.before == chain.token.after {
            let Some(table) = &mut self.inflight else { return Err(RingError::Unpop) };
            let slot = chain.token.slot;
            table.resubmit.push_front(Pending { slot, id: slot, entries: 1 });
            return Ok(());
        }
        self.next_avail = chain.token.before;
        if let Some(table) = &mut self.inflight {
            table.untake(chain.token.slot);
        }
        Ok(())
    }

    #[inline]
    pub fn push(&mut self, chain: &Chain, written: u32) {
        debug_assert!(self.taken() > 0, "a chain was pushed that was not popped");
        self.used.set_entry(self.next_used, chain.token.id, written);
        if let Some(table) = &mut self.inflight {
            table.done(chain.token.slot);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    #[inline]
    pub fn publish(&mut self) {
        let count = self.next_used.wrapping_sub(self.published);
        if count == 0 {
            return;
        }
        if self.mem.is_recording() {
            self.used.mark_entries(&self.mem, self.published, count);
        }
        if let Some(table) = &mut self.inflight {
            table.prepare(self.next_used);
        }
        self.used.set_idx(&self.mem, self.next_used);
        if let Some(table) = &mut self.inflight {
            table.commit(self.next_used);
        }
        self.published = self.next_used;
    }

    /// Dies inside `publish`, after `step` of its steps.
    #[cfg(test)]
    pub fn publish_until(&mut self, step: u8) {
        let Some(table) = &mut self.inflight else { return };
        if step > 0 {
            table.prepare(self.next_used);
        }
        if step > 1 {
            self.used.set_idx(&self.mem, self.next_used);
        }
        if step > 2 {
            table.commit(self.next_used);
        }
    }

    #[inline]
    pub fn needs_notification(&mut self) -> bool {
        if self.signalled == Some(self.published) {
            return false;
        }
        // The used index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let old = self.signalled.replace(self.published);
        if self.event_idx {
            old.is_none_or(|old| crossed(self.avail.used_event(), self.published, old))
        } else {
            self.avail.flags() & AVAIL_NO_INTERRUPT == 0
        }
    }

    pub fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            self.used.set_avail_event(&self.mem, self.next_avail);
        } else if self.kicks_off {
            self.used.set_flags(&self.mem, 0);
        }
        self.kicks_off = false;
        // The wish must be visible before the index is read again.
        fence(Ordering::SeqCst);
        self.has_work()
    }

    pub fn disable_kicks(&mut self) {
        // With the event index there is nothing to write: the last position stays behind.
        if !self.event_idx && !self.kicks_off {
            self.used.set_flags(&self.mem, USED_NO_NOTIFY);
        }
        self.kicks_off = true;
    }

    pub fn position(&self) -> RingPos {
        RingPos { avail: self.next_avail, used: self.next_used }
    }
}
