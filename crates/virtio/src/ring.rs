//! Virtqueues, device side: split and packed, batched, with indirect descriptors and event index.
//! Source: VIRTIO 1.2, sections 2.7 (split) and 2.8 (packed).
//!
//! What a device does:
//! ```text
//!   loop {
//!       while ring.pop(&mut chain)? {          // one chain of guest buffers, as iovecs
//!           ... read chain.readable(), fill chain.writable() ...
//!           ring.push(&chain, written);        // not yet seen by the driver
//!       }
//!       ring.publish();                        // now it is
//!       if ring.needs_notification() { call }
//!       if !ring.enable_kicks() { wait for a kick }    // true: more came meanwhile
//!       ring.disable_kicks();
//!   }
//! ```
//! [`Queue`] wraps a ring with its kick and call. No allocation per chain, once the buffers in
//! [`Chain`] have grown; no locks: a ring belongs to one thread.
//!
//! Invariants:
//! - The rings' own memory was checked once, in [`Ring::new`]; addresses in descriptors are checked
//!   one by one, before a [`Chain`] shows them.
//! - At most `size` chains are taken (popped, not pushed) at any time, whatever the driver does.
//! - Every byte written to the guest is recorded as dirty at the latest by [`Ring::publish`].
//! - Whatever the driver writes, a method returns, with a [`RingError`] if it makes no sense; the
//!   device then stops the queue and calls [`ConfigEvents::needs_reset`](crate::ConfigEvents).

mod chain;
mod inflight;
mod packed;
mod queue;
mod raw;
mod split;

pub use chain::{Chain, MAX_SEGMENTS};
pub use inflight::InflightQueue;
pub use queue::Queue;

use packed::PackedRing;
use split::SplitRing;

use crate::device::{RingPos, RingSetup};
use crate::features::{VIRTIO_F_RING_PACKED, has};

/// Largest ring, in entries (VIRTIO 1.2, sections 2.7 and 2.8.10.1).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// How a driver broke the rules of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    #[error("queue size {0} is not allowed: 1 to 32768, and a power of two for a split ring")]
    Size(u16),
    #[error("the {part} at guest address {addr:#x} ({len:#x} bytes) is not wholly in RAM")]
    Address { part: &'static str, addr: u64, len: u64 },
    #[error("the {part} at guest address {addr:#x} is not aligned to {align} bytes")]
    Unaligned { part: &'static str, addr: u64, align: u64 },
    #[error("ring position {0:#x} does not fit the queue")]
    Position(u16),
    #[error("the driver made more buffers available than the queue has entries")]
    TooManyAvailable,
    #[error("descriptor index {index} is outside its table of {size}")]
    DescriptorIndex { index: u16, size: u32 },
    #[error("a descriptor chain loops, or is longer than its table or {MAX_SEGMENTS} descriptors")]
    ChainTooLong,
    #[error("a descriptor chain has more than {MAX_SEGMENTS} buffers")]
    TooManySegments,
    #[error("a descriptor chain describes more than 4 GiB")]
    TotalLength,
    #[error("a buffer at guest address {addr:#x}, {len:#x} bytes, is not in RAM")]
    Buffer { addr: u64, len: u32 },
    #[error("a device-readable buffer follows a device-writable one")]
    Order,
    #[error("an indirect descriptor, which was not negotiated")]
    IndirectNotNegotiated,
    #[error("an indirect descriptor that also has a successor, or is inside an indirect table")]
    IndirectNested,
    #[error("an indirect table of {0} bytes: must be a multiple of 16 above zero")]
    IndirectLength(u32),
    #[error("a chain was given back out of order")]
    Unpop,
}

enum Format {
    Split(SplitRing),
    Packed(PackedRing),
}

/// The device side of one virtqueue.
pub struct Ring(Format);

macro_rules! each {
    ($self:expr, $r:ident => $e:expr) => {
        match $self {
            Format::Split($r) => $e,
            Format::Packed($r) => $e,
        }
    };
}

impl Ring {
    /// Takes up a ring as the driver set it up, at `setup.pos` (or at the start). Packed when
    /// `VIRTIO_F_RING_PACKED` was negotiated.
    ///
    /// # Errors
    /// Size, addresses, alignment or position that cannot be.
    pub fn new(setup: &RingSetup) -> Result<Self, RingError> {
        Ok(Self(if has(setup.features, VIRTIO_F_RING_PACKED) {
            Format::Packed(PackedRing::new(setup)?)
        } else {
            Format::Split(SplitRing::new(setup)?)
        }))
    }

    /// Notes from now on in `table` what is in flight, and has the next pops give what the table
    /// says an earlier process took and did not use, before anything new. Right after
    /// [`new`](Self::new), with the position that the table was opened with.
    pub fn track(&mut self, table: InflightQueue) {
        each!(&mut self.0, r => r.track(table));
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        each!(&self.0, r => r.size())
    }

    /// Takes the next available chain into `chain`, whose buffers are reused. `false`: none there.
    ///
    /// # Errors
    /// The driver broke the rules; nothing was taken, and the ring stays where it is.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        each!(&mut self.0, r => r.pop(chain))
    }

    /// [`pop`](Self::pop) into as many of `chains` as there is something for, from the front, with
    /// one look at how far the driver is. Returns how many, and the error that ended it, if any.
    #[inline]
    pub fn pop_burst(&mut self, chains: &mut [Chain]) -> (usize, Result<(), RingError>) {
        each!(&mut self.0, r => r.pop_burst(chains))
    }

    /// Whether [`pop`](Self::pop) would find something (a chain or an error), without taking it.
    #[inline]
    pub fn has_work(&mut self) -> bool {
        each!(&mut self.0, r => r.has_work())
    }

    /// Gives back `chain`, the last one popped (several: in reverse order), as if it had never been
    /// popped.
    ///
    /// # Errors
    /// [`RingError::Unpop`] if it is not the last one.
    pub fn unpop(&mut self, chain: &Chain) -> Result<(), RingError> {
        each!(&mut self.0, r => r.unpop(chain))
    }

    /// Uses `chain`: `written` bytes of its writable part were filled, from its start. They, and
    /// whatever was written by way of `chain`, are recorded as dirty. Chains may be used in any
    /// order. The driver sees it after [`publish`](Self::publish).
    #[inline]
    pub fn push(&mut self, chain: &Chain, written: u32) {
        chain.record_dirty(written);
        each!(&mut self.0, r => r.push(chain, written));
    }

    /// Lets the driver see everything pushed, in one step.
    #[inline]
    pub fn publish(&mut self) {
        each!(&mut self.0, r => r.publish());
    }

    /// Whether the driver wants to be interrupted for what was published since the last call.
    #[inline]
    pub fn needs_notification(&mut self) -> bool {
        each!(&mut self.0, r => r.needs_notification())
    }

    /// Asks for kicks. `true` if more became available meanwhile, for which no kick will come:
    /// look again before waiting.
    pub fn enable_kicks(&mut self) -> bool {
        each!(&mut self.0, r => r.enable_kicks())
    }

    /// Asks for no kicks. Only a hint: they may still come.
    pub fn disable_kicks(&mut self) {
        each!(&mut self.0, r => r.disable_kicks());
    }

    /// Where the ring stands; publishes first what was pushed. Meant for a ring with nothing
    /// taken: chains taken and not pushed are lost to whoever goes on from here.
    pub fn position(&mut self) -> RingPos {
        self.publish();
        each!(&self.0, r => r.position())
    }

    /// How many entries are taken: chains (split) or descriptors (packed) popped and not pushed.
    pub fn taken(&self) -> u16 {
        each!(&self.0, r => r.taken())
    }
}

/// Whether an event at ring position `event` lies in `(old, new]`, all modulo 2^16
/// (VIRTIO 1.2, section 2.7.7.2).
#[inline]
fn crossed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests;
