//! The packed ring (VIRTIO 1.2, section 2.8).
//!
//! Positions are an index below the size and a wrap counter that toggles whenever the index passes
//! the end. A descriptor is available when its AVAIL bit equals the device's wrap counter and its
//! USED bit does not.

use std::sync::atomic::{Ordering, fence};

use mem::GuestMemory;

use super::chain::{Chain, Token};
use super::inflight::Pending;
use super::raw::{DESC_INDIRECT, DESC_NEXT, DESC_SIZE, DESC_WRITE, DescTable, EventArea};
use super::{MAX_QUEUE_SIZE, RingError, crossed};
use crate::device::{RingPos, RingSetup};
use crate::features::{VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, has};

const DESC_AVAIL: u16 = 1 << 7;
const DESC_USED: u16 = 1 << 15;

const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// A position: index and wrap counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pos {
    index: u16,
    wrap: bool,
}

impl Pos {
    fn from_bits(bits: u16, size: u16) -> Result<Self, RingError> {
        let pos = Self { index: bits & 0x7fff, wrap: bits & 0x8000 != 0 };
        if pos.index < size { Ok(pos) } else { Err(RingError::Position(bits)) }
    }

    fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    /// `count` (at most `size`) entries further.
    #[inline]
    fn advance(self, count: u16, size: u16) -> Self {
        let index = self.index + count; // both at most 32768
        if index >= size {
            Self { index: index - size, wrap: !self.wrap }
        } else {
            Self { index, ..self }
        }
    }

    /// Entries from `from` to `self`, which is at most one round ahead.
    fn distance(self, from: Self, size: u16) -> Option<u16> {
        if self.wrap == from.wrap {
            self.index.checked_sub(from.index)
        } else {
            (self.index <= from.index).then(|| self.index + size - from.index)
        }
    }
}

pub struct PackedRing {
    mem: GuestMemory,
    desc: DescTable,
    /// What the driver wants to be told.
    driver: EventArea,
    /// What the device wants to be told.
    device: EventArea,
    size: u16,
    event_idx: bool,
    indirect: bool,
    next_avail: Pos,
    next_used: Pos,
    /// Descriptors popped and not pushed.
    taken: u16,
    /// First descriptor pushed since the last publish, and its flags, which are written last.
    first: Option<(u16, u16)>,
    /// Descriptors pushed since the driver was last considered for an interrupt.
    unsignalled: u16,
    /// Whether it was ever considered.
    signalled: bool,
    kicks_off: bool,
    inflight: Option<Box<super::InflightQueue>>,
}

impl PackedRing {
    pub fn new(s: &RingSetup) -> Result<Self, RingError> {
        if s.size == 0 || s.size > MAX_QUEUE_SIZE {
            return Err(RingError::Size(s.size));
        }
        let start = s.pos.unwrap_or(RingPos::PACKED_START);
        let next_avail = Pos::from_bits(start.avail, s.size)?;
        let next_used = Pos::from_bits(start.used, s.size)?;
        let taken =
            next_avail.distance(next_used, s.size).ok_or(RingError::Position(start.avail))?;
        Ok(Self {
            desc: DescTable::new(&s.mem, s.desc, s.size)?,
            driver: EventArea::new(&s.mem, "driver event area", s.avail)?,
            device: EventArea::new(&s.mem, "device event area", s.used)?,
            mem: s.mem.clone(),
            size: s.size,
            event_idx: has(s.features, VIRTIO_F_EVENT_IDX),
            indirect: has(s.features, VIRTIO_F_INDIRECT_DESC),
            next_avail,
            next_used,
            taken,
            first: None,
            unsignalled: 0,
            signalled: false,
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
        self.taken
    }

    #[inline]
    pub fn has_work(&mut self) -> bool {
        let flags = self.desc.packed_flags(self.next_avail.index, Ordering::Acquire);
        let (avail, used) = (flags & DESC_AVAIL != 0, flags & DESC_USED != 0);
        let there = avail == self.next_avail.wrap && used != self.next_avail.wrap;
        there || self.to_resubmit().is_some()
    }

    #[inline]
    fn to_resubmit(&self) -> Option<Pending> {
        self.inflight.as_ref()?.resubmit.front().copied()
    }

    /// Takes what an earlier process had taken; it counts as taken already.
    #[cold]
    fn resubmit(&mut self, pending: Pending, chain: &mut Chain) -> Result<bool, RingError> {
        chain.begin(&self.mem);
        if let Some(table) = &mut self.inflight {
            table.fill(pending, chain, &self.mem)?;
            table.resubmit.pop_front();
        }
        let Pending { slot, id, entries } = pending;
        let at = self.next_avail.bits();
        chain.token = Token { id, entries, before: at, after: at, slot };
        Ok(true)
    }

    /// Notes the chain of `entries` descriptors at the avail position; returns its entry.
    #[cold]
    fn note_taken(&mut self, entries: u16) -> u16 {
        let (desc, at, size) = (&self.desc, self.next_avail, self.size);
        let descriptors = (0..entries).filter_map(|i| desc.get(at.advance(i, size).index));
        self.inflight.as_mut().map_or(0, |table| table.take_packed(descriptors))
    }

    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        if !self.has_work() {
            return Ok(false);
        }
        if let Some(pending) = self.to_resubmit() {
            return self.resubmit(pending, chain);
        }
        chain.begin(&self.mem);
        let (id, entries) = self.walk(chain)?;
        let before = self.next_avail.bits();
        let slot = if self.inflight.is_some() { self.note_taken(entries) } else { 0 };
        self.next_avail = self.next_avail.advance(entries, self.size);
        self.taken += entries;
        chain.token = Token { id, entries, before, after: self.next_avail.bits(), slot };
        Ok(true)
    }

    /// Adds the chain at the avail position; returns its buffer id and number of descriptors.
    #[inline]
    fn walk(&self, chain: &mut Chain) -> Result<(u16, u16), RingError> {
        let free = self.size - self.taken;
        if free == 0 {
            return Err(RingError::TooManyAvailable);
        }
        let mut index = self.next_avail.index;
        for entries in 1..=free {
            let Some(d) = self.desc.get(index) else {
                return Err(RingError::DescriptorIndex { index, size: self.size.into() });
            };
            let (id, flags) = (d.at12, d.at14);
            if flags & DESC_INDIRECT != 0 {
                if !self.indirect {
                    return Err(RingError::IndirectNotNegotiated);
                }
                // A list has descriptors of one kind only (VIRTIO 1.2, section 2.8.8).
                if flags & DESC_NEXT != 0 || entries > 1 {
                    return Err(RingError::IndirectNested);
                }
                chain.add_indirect(&self.mem, d.addr, d.len, false)?;
                return Ok((id, 1));
            }
            chain.add(&self.mem, d.addr, d.len, flags & DESC_WRITE != 0)?;
            if flags & DESC_NEXT == 0 {
                return Ok((id, entries));
            }
            index = if index + 1 == self.size { 0 } else { index + 1 };
        }
        Err(RingError::ChainTooLong)
    }

    #[inline]
    pub fn pop_burst(&mut self, chains: &mut [Chain]) -> (usize, Result<(), RingError>) {
        for (n, chain) in chains.iter_mut().enumerate() {
            match self.pop(chain) {
                Ok(true) => {}
                Ok(false) => return (n, Ok(())),
                Err(e) => return (n, Err(e)),
            }
        }
        (chains.len(), Ok(()))
    }

    pub fn unpop(&mut self, chain: &Chain) -> Result<(), RingError> {
        let Token { id, entries, before, after, slot } = chain.token;
        if after != self.next_avail.bits() || entries == 0 || entries > self.taken {
            return Err(RingError::Unpop);
        }
        if before == after {
            let Some(table) = &mut self.inflight else { return Err(RingError::Unpop) };
            table.resubmit.push_front(Pending { slot, id, entries });
            return Ok(());
        }
        if self.inflight.is_some() {
            self.publish(); // the table cannot have a batch open over this
        }
        if let Some(table) = &mut self.inflight {
            table.untake(slot);
        }
        self.next_avail = Pos::from_bits(before, self.size)?;
        self.taken -= entries;
        Ok(())
    }

    #[inline]
    pub fn push(&mut self, chain: &Chain, written: u32) {
        let Token { id, entries, .. } = chain.token;
        debug_assert!(entries <= self.taken, "a chain was pushed that was not popped");
        let entries = entries.min(self.taken);
        let at = self.next_used;
        let mut flags = if at.wrap { DESC_AVAIL | DESC_USED } else { 0 };
        if written > 0 {
            flags |= DESC_WRITE;
        }
        self.desc.set_packed_used(at.index, id, written);
        if let Some(table) = &mut self.inflight {
            table.done(chain.token.slot);
        }
        // The driver looks at the first one of a batch: while that is hidden, so are the others.
        match self.first {
            None => self.first = Some((at.index, flags)),
            Some(_) => self.write_flags(at.index, flags),
        }
        self.next_used = at.advance(entries, self.size);
        self.taken -= entries;
        self.unsignalled = self.unsignalled.saturating_add(entries);
    }

    #[inline]
    fn write_flags(&self, index: u16, flags: u16) {
        self.desc.set_packed_flags(index, flags);
        if self.mem.is_recording() {
            self.mem.mark_dirty(self.desc.gpa(index), DESC_SIZE.into());
        }
    }

    #[inline]
    pub fn publish(&mut self) {
        let Some((index, flags)) = self.first.take() else { return };
        let used = self.next_used.bits();
        if let Some(table) = &mut self.inflight {
            table.prepare(used);
        }
        self.write_flags(index, flags);
        if let Some(table) = &mut self.inflight {
            table.commit(used);
        }
    }

    /// Dies inside `publish`, after `step` of its steps.
    #[cfg(test)]
    pub fn publish_until(&mut self, step: u8) {
        let Some((index, flags)) = self.first.take() else { return };
        let used = self.next_used.bits();
        if step > 0
            && let Some(table) = &mut self.inflight
        {
            table.prepare(used);
        }
        if step > 1 {
            self.write_flags(index, flags);
        }
        if step > 2
            && let Some(table) = &mut self.inflight
        {
            table.commit(used);
        }
    }

    #[inline]
    pub fn needs_notification(&mut self) -> bool {
        let count = std::mem::take(&mut self.unsignalled);
        if count == 0 {
            return false;
        }
        // What was used must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let first_time = !std::mem::replace(&mut self.signalled, true);
        let (pos, flags) = self.driver.load();
        match flags & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                let mut event = pos & 0x7fff;
                if (pos & 0x8000 != 0) != self.next_used.wrap {
                    event = event.wrapping_sub(self.size);
                }
                let new = self.next_used.index;
                first_time || crossed(event, new, new.wrapping_sub(count))
            }
            _ => true,
        }
    }

    pub fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            self.device.store(&self.mem, self.next_avail.bits(), EVENT_DESC);
        } else if self.kicks_off {
            self.device.store(&self.mem, 0, EVENT_ENABLE);
        }
        self.kicks_off = false;
        // The wish must be visible before the ring is looked at again.
        fence(Ordering::SeqCst);
        self.has_work()
    }

    pub fn disable_kicks(&mut self) {
        if !self.kicks_off {
            self.device.store(&self.mem, 0, EVENT_DISABLE);
        }
        self.kicks_off = true;
    }

    pub fn position(&self) -> RingPos {
        RingPos { avail: self.next_avail.bits(), used: self.next_used.bits() }
    }
}
