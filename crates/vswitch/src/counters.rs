//! What is counted, by whom, and how it is read.
//!
//! Every block of counters has one writer, the poll thread that owns the queue; it adds with a plain
//! load and store. Readers sum over queues whenever they like. When a queue moves to another thread
//! its block moves with it, by message, so there is still one writer at a time.
//!
//! Invariant: every frame taken from a port is counted in `rx_frames` of its queue and then either
//! sent (`tx_frames` of one or more queues) or counted under one [`Drop`] for every port that it
//! was meant for and did not reach.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a frame was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Drop {
    /// Shorter than an Ethernet header, or than its virtio-net header.
    Runt,
    /// Longer than 65,550 bytes, or cut off by the buffer it was read into.
    Oversized,
    /// A virtio-net header that cannot be.
    BadHeader,
    /// Its VLAN is not one of the port's.
    Vlan,
    /// A source address that is a group address.
    BadSource,
    /// Addressed to where it came from.
    SamePort,
    /// To an address that no bridge forwards (IEEE 802.1D, table 7-10).
    Reserved,
    /// Above the port's rate limit.
    RateLimit,
    /// Above the port's storm limit.
    StormLimit,
    /// No port that it could go to.
    NoDestination,
    /// The port that it was for is not connected, or has no enabled queue.
    PortDown,
    /// The receiver gave no buffers.
    NoBuffers,
    /// Larger than the receiver's buffer, or the port's MTU.
    TooBigForPort,
    /// The queue between two poll threads was full.
    HandOff,
    /// Could not be segmented: headers that do not fit what the sender said of them.
    Segmentation,
    /// The host refused it.
    HostError,
    /// Lost in the host's queue, before the switch could take it; not among the frames received.
    HostQueue,
}

impl Drop {
    /// Every reason.
    pub const ALL: [Self; 17] = [
        Self::Runt,
        Self::Oversized,
        Self::BadHeader,
        Self::Vlan,
        Self::BadSource,
        Self::SamePort,
        Self::Reserved,
        Self::RateLimit,
        Self::StormLimit,
        Self::NoDestination,
        Self::PortDown,
        Self::NoBuffers,
        Self::TooBigForPort,
        Self::HandOff,
        Self::Segmentation,
        Self::HostError,
        Self::HostQueue,
    ];

    /// Name in statistics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runt => "runt",
            Self::Oversized => "oversized",
            Self::BadHeader => "bad-header",
            Self::Vlan => "vlan",
            Self::BadSource => "bad-source",
            Self::SamePort => "same-port",
            Self::Reserved => "reserved",
            Self::RateLimit => "rate-limit",
            Self::StormLimit => "storm-limit",
            Self::NoDestination => "no-destination",
            Self::PortDown => "port-down",
            Self::NoBuffers => "no-buffers",
            Self::TooBigForPort => "too-big-for-port",
            Self::HandOff => "hand-off",
            Self::Segmentation => "segmentation",
            Self::HostError => "host-error",
            Self::HostQueue => "host-queue",
        }
    }

    /// Whether it is counted at the port that the frame was for, instead of where it came from.
    pub fn at_receiver(self) -> bool {
        matches!(self, Self::NoBuffers | Self::TooBigForPort | Self::Segmentation | Self::HostError)
    }
}

/// One number with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds; only the owner of the block may.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Reads, from any thread.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What is counted of one queue (a receive and a transmit ring) of a port. Directions are the
/// switch's: received is what the port sent into the switch.
#[derive(Debug, Default)]
#[repr(align(128))] // two threads never write to one line
pub struct QueueCounters {
    pub rx_frames: Counter,
    pub rx_bytes: Counter,
    pub rx_bursts: Counter,
    pub tx_frames: Counter,
    pub tx_bytes: Counter,
    pub tx_bursts: Counter,
    /// Large segments that were cut for this port, and checksums filled in for it.
    pub segmented: Counter,
    pub checksummed: Counter,
    /// Interrupts sent to the other side.
    pub calls: Counter,
    /// Frames flooded from here: broadcast, multicast, unknown unicast.
    pub flooded: Counter,
    drops: [Counter; Drop::ALL.len()],
}

impl QueueCounters {
    /// Counts `n` dropped frames.
    #[inline]
    pub fn dropped(&self, reason: Drop, n: u64) {
        self.drops[reason as usize].add(n);
    }

    /// What was dropped for `reason`.
    pub fn drops(&self, reason: Drop) -> u64 {
        self.drops[reason as usize].get()
    }

    /// Everything, as of now.
    pub fn snapshot(&self) -> Totals {
        let mut t = Totals {
            rx_frames: self.rx_frames.get(),
            rx_bytes: self.rx_bytes.get(),
            rx_bursts: self.rx_bursts.get(),
            tx_frames: self.tx_frames.get(),
            tx_bytes: self.tx_bytes.get(),
            tx_bursts: self.tx_bursts.get(),
            segmented: self.segmented.get(),
            checksummed: self.checksummed.get(),
            calls: self.calls.get(),
            flooded: self.flooded.get(),
            ..Totals::default()
        };
        for reason in Drop::ALL {
            t.drops[reason as usize] = self.drops(reason);
        }
        t
    }
}

/// Sums of [`QueueCounters`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub rx_frames: u64,
    pub rx_bytes: u64,
    pub rx_bursts: u64,
    pub tx_frames: u64,
    pub tx_bytes: u64,
    pub tx_bursts: u64,
    pub segmented: u64,
    pub checksummed: u64,
    pub calls: u64,
    pub flooded: u64,
    pub drops: [u64; Drop::ALL.len()],
}

impl Totals {
    /// Adds another queue's.
    pub fn add(&mut self, o: &Self) {
        for (to, from) in [
            (&mut self.rx_frames, o.rx_frames),
            (&mut self.rx_bytes, o.rx_bytes),
            (&mut self.rx_bursts, o.rx_bursts),
            (&mut self.tx_frames, o.tx_frames),
            (&mut self.tx_bytes, o.tx_bytes),
            (&mut self.tx_bursts, o.tx_bursts),
            (&mut self.segmented, o.segmented),
            (&mut self.checksummed, o.checksummed),
            (&mut self.calls, o.calls),
            (&mut self.flooded, o.flooded),
        ] {
            *to += from;
        }
        for (to, from) in self.drops.iter_mut().zip(o.drops) {
            *to += from;
        }
    }

    /// All drops: at the frames' way in, and at their way out.
    pub fn dropped(&self) -> (u64, u64) {
        let sum = |out: bool| {
            Drop::ALL
                .iter()
                .filter(|r| r.at_receiver() == out)
                .map(|r| self.drops[*r as usize])
                .sum()
        };
        (sum(false), sum(true))
    }

    /// Reasons that happened, with their counts.
    pub fn reasons(&self) -> impl Iterator<Item = (Drop, u64)> + '_ {
        Drop::ALL.into_iter().map(|r| (r, self.drops[r as usize])).filter(|(_, n)| *n > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_places_and_names_of_their_own() {
        for (i, r) in Drop::ALL.into_iter().enumerate() {
            assert_eq!(r as usize, i);
        }
        let names: std::collections::HashSet<_> = Drop::ALL.iter().map(|r| r.name()).collect();
        assert_eq!(names.len(), Drop::ALL.len());
    }

    #[test]
    fn sums() {
        let (a, b) = (QueueCounters::default(), QueueCounters::default());
        a.rx_frames.add(3);
        a.dropped(Drop::Runt, 1);
        b.dropped(Drop::Runt, 2);
        b.dropped(Drop::NoBuffers, 5);
        let mut t = a.snapshot();
        t.add(&b.snapshot());
        assert_eq!((t.rx_frames, t.dropped()), (3, (3, 5)));
        assert_eq!(t.reasons().collect::<Vec<_>>(), [(Drop::Runt, 3), (Drop::NoBuffers, 5)]);
    }
}
