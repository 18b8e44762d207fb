//! The bytes of an in-flight table.
//!
//! ```text
//!   split   head  features u64 | version u16 | desc_num u16 | last_batch_head u16 | used_idx u16
//!           entry inflight u8 | - [5] | next u16 | counter u64
//!   packed  head  features u64 | version u16 | desc_num u16 | free_head u16 | old_free_head u16
//!                 | used_idx u16 | old_used_idx u16 | used_wrap u8 | old_used_wrap u8 | - [10]
//!           entry inflight u8 | - | next u16 | last u16 | num u16 | counter u64 | id u16
//!                 | flags u16 | len u32 | addr u64
//! ```
#![allow(unsafe_code)] // the table is foreign memory, reached through pointers

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use mem::ForeignMapping;

use super::super::raw::RawDesc;

/// Bytes of a table's head and of one entry.
pub struct Bytes {
    pub split: usize,
    pub packed: usize,
}
pub const HEAD: Bytes = Bytes { split: 16, packed: 32 };
pub const DESC: Bytes = Bytes { split: 16, packed: 32 };

/// Invariant: the whole table lies in the mapping, and its first byte is aligned to 8.
#[derive(Debug)]
pub struct Table {
    _mapping: Arc<ForeignMapping>,
    base: *mut u8,
    capacity: u16,
    packed: bool,
    /// The last head linked (split).
    batch_head: u16,
}

// SAFETY: the pointer is into shared memory that `_mapping` keeps and any thread may access; the
// table is used by one thread at a time.
unsafe impl Send for Table {}

impl Table {
    pub fn new(
        mapping: &Arc<ForeignMapping>,
        offset: usize,
        capacity: u16,
        packed: bool,
    ) -> Result<Self, String> {
        let len = super::InflightQueue::bytes(capacity, packed);
        let end = offset.checked_add(len).map(|n| n as u64);
        if end.is_none_or(|end| end > mapping.size()) {
            let size = mapping.size();
            return Err(format!("the in-flight table passes the end of its {size:#x} bytes"));
        }
        // In range: offset + len <= size.
        let base = mapping.as_ptr().wrapping_add(offset);
        if !(base as usize).is_multiple_of(8) {
            return Err("the in-flight table is not aligned to 8 bytes".into());
        }
        Ok(Self { _mapping: mapping.clone(), base, capacity, packed, batch_head: 0 })
    }

    pub fn capacity(&self) -> u16 {
        self.capacity
    }

    fn u8(&self, at: usize) -> &AtomicU8 {
        // SAFETY: callers stay below `InflightQueue::bytes`, so inside the mapping.
        unsafe { AtomicU8::from_ptr(self.base.add(at)) }
    }

    fn u16(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at.is_multiple_of(2));
        // SAFETY: as in `u8`; every field is at a multiple of its size.
        unsafe { AtomicU16::from_ptr(self.base.add(at).cast()) }
    }

    fn u32(&self, at: usize) -> &AtomicU32 {
        debug_assert!(at.is_multiple_of(4));
        // SAFETY: as in `u16`.
        unsafe { AtomicU32::from_ptr(self.base.add(at).cast()) }
    }

    fn u64(&self, at: usize) -> &AtomicU64 {
        debug_assert!(at.is_multiple_of(8));
        // SAFETY: as in `u16`.
        unsafe { AtomicU64::from_ptr(self.base.add(at).cast()) }
    }

    /// Where entry `slot` begins. A slot that does not exist is taken for the last one.
    #[inline]
    fn entry(&self, slot: u16) -> usize {
        let slot = usize::from(slot.min(self.capacity - 1));
        if self.packed { HEAD.packed + DESC.packed * slot } else { HEAD.split + DESC.split * slot }
    }

    fn load(&self, at: usize) -> u16 {
        u16::from_le(self.u16(at).load(Ordering::Acquire))
    }

    /// Release: what the next process finds is a prefix of what was written, in this order.
    #[inline]
    fn store(&self, at: usize, v: u16) {
        self.u16(at).store(v.to_le(), Ordering::Release);
    }

    pub fn version(&self) -> u16 {
        self.load(8)
    }

    /// Makes the head of a fresh table.
    pub fn init(&self, version: u16) {
        self.store(10, self.capacity);
        self.store(8, version);
    }

    pub fn inflight(&self, slot: u16) -> bool {
        self.u8(self.entry(slot)).load(Ordering::Acquire) == 1
    }

    #[inline]
    pub fn set_inflight(&self, slot: u16, on: bool) {
        self.u8(self.entry(slot)).store(on.into(), Ordering::Release);
    }

    pub fn counter(&self, slot: u16) -> u64 {
        u64::from_le(self.u64(self.entry(slot) + 8).load(Ordering::Acquire))
    }

    #[inline]
    pub fn set_counter(&self, slot: u16, counter: u64) {
        self.u64(self.entry(slot) + 8).store(counter.to_le(), Ordering::Release);
    }

    pub fn next(&self, slot: u16) -> u16 {
        self.load(self.entry(slot) + if self.packed { 2 } else { 6 })
    }

    pub fn set_next(&self, slot: u16, next: u16) {
        self.store(self.entry(slot) + if self.packed { 2 } else { 6 }, next);
    }

    // Split.

    pub fn batch_head(&self) -> u16 {
        self.load(12)
    }

    pub fn adopt_batch_head(&mut self) {
        self.batch_head = self.batch_head();
    }

    /// Puts `head` at the front of the batch.
    #[inline]
    pub fn link(&mut self, head: u16) {
        self.set_next(head, self.batch_head);
        self.batch_head = head;
        self.store(12, head);
    }

    pub fn used(&self) -> u16 {
        if self.packed { self.pos(16, 20) } else { self.load(14) }
    }

    #[inline]
    pub fn set_used(&self, used: u16) {
        if self.packed { self.set_pos(16, 20, used) } else { self.store(14, used) }
    }

    // Packed.

    /// Index and wrap counter as in `RingPos`.
    fn pos(&self, index: usize, wrap: usize) -> u16 {
        let wrap = self.u8(wrap).load(Ordering::Acquire) != 0;
        self.load(index) & 0x7fff | u16::from(wrap) << 15
    }

    fn set_pos(&self, index: usize, wrap: usize, pos: u16) {
        self.store(index, pos & 0x7fff);
        self.u8(wrap).store(u8::from(pos & 0x8000 != 0), Ordering::Release);
    }

    pub fn old_used(&self) -> u16 {
        self.pos(18, 21)
    }

    pub fn set_old_used(&self, used: u16) {
        self.set_pos(18, 21, used);
    }

    pub fn free(&self) -> u16 {
        self.load(12)
    }

    pub fn set_free(&self, slot: u16) {
        self.store(12, slot);
    }

    pub fn old_free(&self) -> u16 {
        self.load(14)
    }

    pub fn set_old_free(&self, slot: u16) {
        self.store(14, slot);
    }

    /// `last` and `num` of the chain at `slot`.
    pub fn chain(&self, slot: u16) -> (u16, u16) {
        let at = self.entry(slot);
        (self.load(at + 4), self.load(at + 6))
    }

    pub fn set_chain(&self, slot: u16, last: u16, num: u16) {
        let at = self.entry(slot);
        self.store(at + 4, last);
        self.store(at + 6, num);
    }

    pub fn desc(&self, slot: u16) -> RawDesc {
        let at = self.entry(slot);
        RawDesc {
            addr: u64::from_le(self.u64(at + 24).load(Ordering::Acquire)),
            len: u32::from_le(self.u32(at + 20).load(Ordering::Acquire)),
            at12: self.load(at + 16),
            at14: self.load(at + 18),
        }
    }

    pub fn set_desc(&self, slot: u16, d: &RawDesc) {
        let at = self.entry(slot);
        self.u64(at + 24).store(d.addr.to_le(), Ordering::Release);
        self.u32(at + 20).store(d.len.to_le(), Ordering::Release);
        self.store(at + 16, d.at12);
        self.store(at + 18, d.at14);
    }
}
