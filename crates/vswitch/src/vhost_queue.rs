//! The two rings of a vhost-user port's queue, as a poll thread owns them.
//!
//! Directions are the switch's: frames are received from the ring that the driver calls its
//! transmit queue. Both rings use buffers in the order in which they were made available, so the
//! position of the used ring is all that a restart needs to know.
#![allow(unsafe_code)] // buffers of chains are read and written through `copy`

use std::sync::Arc;

use net::Offloads;
use virtio::features::{VIRTIO_F_VERSION_1, has};
use virtio::{Chain, InflightQueue, Interrupt, Ring, RingError, RingPos, RingSetup};
use vmm_sys_util::eventfd::EventFd;

use crate::burst::{BURST, Burst, MAX_FRAME, MIN_FRAME};
use crate::copy::{self, Sink, Source};
use crate::counters::{Drop, QueueCounters};
use crate::header::{HEADER_LEN, LEGACY_HEADER_LEN, NEEDS_CSUM, VnetHeader};
use crate::output::Output;

/// Feature bits of a network device (VIRTIO 1.2, section 5.1.3).
pub mod feature {
    pub const CSUM: u32 = 0;
    pub const GUEST_CSUM: u32 = 1;
    pub const MTU: u32 = 3;
    pub const GUEST_TSO4: u32 = 7;
    pub const GUEST_TSO6: u32 = 8;
    pub const GUEST_ECN: u32 = 9;
    pub const HOST_TSO4: u32 = 11;
    pub const HOST_TSO6: u32 = 12;
    pub const HOST_ECN: u32 = 13;
    pub const MRG_RXBUF: u32 = 15;
    pub const CTRL_VQ: u32 = 17;
    pub const CTRL_RX: u32 = 18;
    pub const GUEST_ANNOUNCE: u32 = 21;
    pub const MQ: u32 = 22;
    /// Legacy drivers only: any layout of descriptors.
    pub const ANY_LAYOUT: u32 = 27;
}

/// Most buffers that one frame may be spread over.
const MAX_MERGED: usize = 256;

/// Bytes of the header in front of frames, as negotiated.
fn header_len(features: u64) -> usize {
    if has(features, VIRTIO_F_VERSION_1) || has(features, feature::MRG_RXBUF) {
        HEADER_LEN
    } else {
        LEGACY_HEADER_LEN
    }
}

/// What a driver that negotiated `features` takes.
pub fn accepts(features: u64) -> Offloads {
    let csum = has(features, feature::GUEST_CSUM);
    Offloads {
        csum,
        tso4: csum && has(features, feature::GUEST_TSO4),
        tso6: csum && has(features, feature::GUEST_TSO6),
        ecn: csum && has(features, feature::GUEST_ECN),
        ufo: false,
    }
}

/// Makes a ring that asks for no kicks.
fn quiet_ring(setup: &RingSetup, inflight: Option<InflightQueue>) -> Result<Ring, RingError> {
    let mut ring = Ring::new(setup)?;
    if let Some(table) = inflight {
        ring.track(table);
    }
    // The driver's memory still says what the last owner wanted.
    ring.enable_kicks();
    ring.disable_kicks();
    Ok(ring)
}

/// The ring that frames come in by.
pub struct RxRing {
    ring: Ring,
    kick: EventFd,
    call: Arc<dyn Interrupt>,
    header_len: usize,
    chains: Vec<Chain>,
    /// How many of `chains` are taken.
    taken: usize,
    /// How the driver broke the ring's rules behind them.
    broken: Option<RingError>,
}

impl RxRing {
    /// Takes the ring over.
    ///
    /// # Errors
    /// As [`Ring::new`].
    pub fn new(setup: RingSetup, inflight: Option<InflightQueue>) -> Result<Self, RingError> {
        Ok(Self {
            ring: quiet_ring(&setup, inflight)?,
            header_len: header_len(setup.features),
            kick: setup.kick,
            call: setup.call,
            chains: (0..BURST).map(|_| Chain::all_readable()).collect(),
            taken: 0,
            broken: None,
        })
    }

    /// Its doorbell.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Takes the buffers of up to [`BURST`] frames, and asks for the frames' first bytes: they are on
    /// their way while the caller does something else. [`receive`](Self::receive) and
    /// [`done`](Self::done) have to follow.
    #[inline]
    pub fn fetch(&mut self) {
        let (taken, result) = self.ring.pop_burst(&mut self.chains);
        (self.taken, self.broken) = (taken, result.err());
        for chain in &self.chains[..taken] {
            if let Some(v) = chain.readable().first() {
                // Header and headers: two lines, as drivers put them.
                let p = v.iov_base.cast::<u8>();
                copy::prefetch(p);
                copy::prefetch(p.wrapping_add(64));
            }
        }
    }

    /// The frames whose buffers were fetched. They stay taken until [`done`](Self::done).
    ///
    /// # Errors
    /// The driver broke the ring's rules. Frames taken before that are in `burst`.
    #[inline]
    pub fn receive(&mut self, burst: &mut Burst, c: &QueueCounters) -> Result<(), RingError> {
        for chain in &self.chains[..self.taken] {
            if let Err(reason) = take_frame(chain, self.header_len, burst) {
                c.dropped(reason, 1);
                c.rx_frames.add(1);
            }
        }
        self.broken.take().map_or(Ok(()), Err)
    }

    /// Gives the buffers of the frames of the last [`receive`](Self::receive) back to the driver.
    #[inline]
    pub fn done(&mut self, c: &QueueCounters) {
        if self.taken == 0 {
            return;
        }
        for chain in &self.chains[..self.taken] {
            self.ring.push(chain, 0);
        }
        self.taken = 0;
        self.ring.publish();
        if self.ring.needs_notification() {
            self.call.notify();
            c.calls.add(1);
        }
    }

    /// Asks for a kick. `true` if frames have come meanwhile.
    pub fn enable_kicks(&mut self) -> bool {
        self.ring.enable_kicks()
    }

    /// Asks for none.
    pub fn disable_kicks(&mut self) {
        self.ring.disable_kicks();
    }

    /// Ends its use here; nothing is taken.
    pub fn stop(mut self) -> RingPos {
        self.ring.position()
    }
}

/// Adds the frame in `chain` to the burst.
#[inline]
fn take_frame(chain: &Chain, header_len: usize, burst: &mut Burst) -> Result<(), Drop> {
    let total = chain.readable_len();
    if total < header_len as u32 + MIN_FRAME {
        return Err(Drop::Runt);
    }
    let len = total - header_len as u32;
    if len > MAX_FRAME {
        return Err(Drop::Oversized);
    }
    let iov = chain.readable();
    let mut header = match iov.first() {
        Some(v) if v.iov_len >= HEADER_LEN => {
            let p = v.iov_base.cast::<u8>();
            // SAFETY: the buffer is in guest memory that the chain keeps alive, and long enough.
            let (low, high) = unsafe {
                (p.cast::<u64>().read_unaligned(), p.add(8).cast::<u32>().read_unaligned())
            };
            VnetHeader::from_words(u64::from_le(low), u32::from_le(high))
        }
        _ => {
            let mut bytes = [0; HEADER_LEN];
            // SAFETY: the chain's buffers, which it keeps alive.
            drop_len(unsafe { Source::new(iov, 0, header_len) }.read(&mut bytes));
            VnetHeader::from_bytes(&bytes)
        }
    };
    header.flags &= NEEDS_CSUM;
    header.num_buffers = 0;
    if header.is_plain() {
        // The rest of it means nothing then.
        header = VnetHeader::default();
    } else if !header.is_valid(len) {
        return Err(Drop::BadHeader);
    }
    // A header in a buffer of its own is left out, so that the frame begins with its buffer.
    let (iov, skip) = match iov {
        [first, rest @ ..] if first.iov_len == header_len => (rest, 0),
        _ => (iov, header_len as u16),
    };
    // SAFETY: the chain keeps the buffers alive, and is not given back before the burst is cleared.
    unsafe { burst.push(header, iov, skip, len) };
    Ok(())
}

/// The number of bytes read is known before.
fn drop_len(_: usize) {}

/// The ring that frames leave by.
pub struct TxRing {
    ring: Ring,
    call: Arc<dyn Interrupt>,
    header_len: usize,
    accepts: Offloads,
    mergeable: bool,
    chains: Vec<Chain>,
    /// `chains[at..have]` are taken and not used.
    at: usize,
    have: usize,
    error: Option<RingError>,
}

impl TxRing {
    /// Takes the ring over.
    ///
    /// # Errors
    /// As [`Ring::new`].
    pub fn new(setup: &RingSetup, inflight: Option<InflightQueue>) -> Result<Self, RingError> {
        Ok(Self {
            ring: quiet_ring(setup, inflight)?,
            header_len: header_len(setup.features),
            accepts: accepts(setup.features),
            mergeable: has(setup.features, feature::MRG_RXBUF),
            call: setup.call.clone(),
            chains: (0..BURST + MAX_MERGED).map(|_| Chain::new()).collect(),
            at: 0,
            have: 0,
            error: None,
        })
    }

    /// How the driver broke the ring's rules, once.
    pub fn take_error(&mut self) -> Option<RingError> {
        self.error.take()
    }

    /// Ends its use here.
    pub fn stop(mut self) -> RingPos {
        self.ring.position()
    }

    /// Takes `more` buffers beyond those that it has, as far as they are there.
    fn take(&mut self, more: usize) {
        if self.error.is_some() {
            return;
        }
        if self.at == self.have {
            (self.at, self.have) = (0, 0);
        }
        let end = (self.have + more).min(self.chains.len());
        let (n, result) = self.ring.pop_burst(&mut self.chains[self.have..end]);
        for chain in &self.chains[self.have..self.have + n] {
            if let Some(v) = chain.writable().first() {
                let p = v.iov_base.cast::<u8>();
                copy::prefetch_write(p);
                copy::prefetch_write(p.wrapping_add(64));
            }
        }
        self.have += n;
        if let Err(e) = result {
            self.error = Some(e);
        }
    }

    /// Gives buffers that were taken and not used back, the last one first.
    fn give_back(&mut self) {
        for chain in self.chains[self.at..self.have].iter().rev() {
            if let Err(e) = self.ring.unpop(chain) {
                self.error.get_or_insert(e);
            }
        }
        (self.at, self.have) = (0, 0);
    }

    /// How many of the next buffers hold `total` bytes.
    fn collect(&mut self, total: u32) -> Result<usize, Drop> {
        let (mut room, mut n) = (0u32, 0);
        while room < total {
            if n > 0 && (!self.mergeable || n == MAX_MERGED) {
                return Err(Drop::TooBigForPort);
            }
            if self.at + n == self.have {
                if self.at > 0 && self.have == self.chains.len() {
                    // The end of the list: go on from its start.
                    self.give_back();
                    n = 0;
                    room = 0;
                }
                self.take(1);
                if self.at + n == self.have {
                    return Err(Drop::NoBuffers);
                }
            }
            room = room.saturating_add(self.chains[self.at + n].writable_len());
            n += 1;
        }
        Ok(n)
    }

    /// The way of a frame that does not fit one buffer, or comes after the last one taken.
    #[inline(never)]
    fn put_merged(
        &mut self,
        header: &VnetHeader,
        prefix: &[u8],
        mut rest: Source<'_>,
    ) -> Result<(), Drop> {
        let total = (self.header_len + prefix.len() + rest.len()) as u32;
        let n = self.collect(total)?;
        let start = Start::new(header, prefix, self.header_len, n);
        let mut start = start.bytes();
        for chain in &self.chains[self.at..self.at + n] {
            let room = chain.writable_len() as usize;
            let head = start.len().min(room);
            let body = rest.len().min(room - head);
            // SAFETY: the chain's buffers, which it keeps alive.
            unsafe { Sink::new(chain.writable()) }.write(&start[..head], rest.first(body));
            self.ring.push(chain, (head + body) as u32);
            (start, rest) = (&start[head..], rest.after(body));
        }
        self.at += n;
        Ok(())
    }
}

/// Header and prefix of a frame as they are sent.
struct Start {
    bytes: [u8; HEADER_LEN + 16],
    len: usize,
}

impl Start {
    #[inline]
    fn new(header: &VnetHeader, prefix: &[u8], header_len: usize, buffers: usize) -> Self {
        let mut bytes = [0; HEADER_LEN + 16];
        let h = VnetHeader { num_buffers: buffers as u16, ..*header };
        bytes[..HEADER_LEN].copy_from_slice(&h.to_bytes());
        let len = header_len + prefix.len();
        bytes[header_len..len].copy_from_slice(prefix);
        Self { bytes, len }
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Output for TxRing {
    #[inline]
    fn accepts(&self) -> Offloads {
        self.accepts
    }

    #[inline]
    fn prepare(&mut self, frames: usize) {
        self.take(frames);
    }

    #[inline]
    fn put(&mut self, header: &VnetHeader, prefix: &[u8], rest: Source<'_>) -> Result<(), Drop> {
        let total = (self.header_len + prefix.len() + rest.len()) as u32;
        let next = self.chains[..self.have].get(self.at);
        let Some(chain) = next.filter(|c| c.writable_len() >= total) else {
            return self.put_merged(header, prefix, rest);
        };
        // SAFETY: the chain's buffers, which it keeps alive.
        let mut sink = unsafe { Sink::new(chain.writable()) };
        if prefix.is_empty() && self.header_len == HEADER_LEN {
            // Nearly all headers are of plain frames, which need not be put together.
            let header = if header.is_plain() { VnetHeader::default() } else { *header };
            sink.write_header(VnetHeader { num_buffers: 1, ..header }.to_words(), rest);
        } else {
            sink.write(Start::new(header, prefix, self.header_len, 1).bytes(), rest);
        }
        self.ring.push(chain, total);
        self.at += 1;
        Ok(())
    }

    #[inline]
    fn flush(&mut self, c: &QueueCounters) {
        if self.at < self.have {
            self.give_back();
        }
        (self.at, self.have) = (0, 0);
        self.ring.publish();
        if self.ring.needs_notification() {
            self.call.notify();
            c.calls.add(1);
        }
    }
}
