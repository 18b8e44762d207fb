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
use crate::copy::{Sink, Source};
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
            chains: (0..BURST).map(|_| Chain::new()).collect(),
            taken: 0,
        })
    }

    /// Its doorbell.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Takes up to [`BURST`] frames. Their buffers stay taken until [`done`](Self::done).
    ///
    /// # Errors
    /// The driver broke the ring's rules. Frames taken before that are in `burst`.
    #[inline]
    pub fn receive(&mut self, burst: &mut Burst, c: &QueueCounters) -> Result<(), RingError> {
        let mut error = Ok(());
        while self.taken < BURST {
            let chain = &mut self.chains[self.taken];
            match self.ring.pop(chain) {
                Ok(true) => {
                    if let Some(v) = chain.readable().first() {
                        crate::copy::prefetch(v.iov_base.cast());
                    }
                    self.taken += 1;
                }
                Ok(false) => break,
                Err(e) => {
                    error = Err(e);
                    break;
                }
            }
        }
        for chain in &self.chains[..self.taken] {
            if let Err(reason) = take_frame(chain, self.header_len, burst) {
                c.dropped(reason, 1);
                c.rx_frames.add(1);
            }
        }
        error
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
    let mut bytes = [0; HEADER_LEN];
    match iov.first() {
        Some(v) if v.iov_len >= HEADER_LEN => {
            // SAFETY: the buffer is in guest memory that the chain keeps alive, and long enough.
            unsafe {
                let p = v.iov_base.cast::<u8>();
                std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), HEADER_LEN);
            }
        }
        // SAFETY: the chain's buffers, which it keeps alive.
        _ => drop_len(unsafe { Source::new(iov, 0, header_len) }.read(&mut bytes)),
    }
    let mut header = VnetHeader::from_bytes(&bytes);
    header.flags &= NEEDS_CSUM;
    header.num_buffers = 0;
    if !header.is_plain() && !header.is_valid(len) {
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
            chains: vec![Chain::new()],
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

    #[inline]
    fn pop(&mut self, i: usize) -> Result<bool, Drop> {
        if self.error.is_some() {
            return Ok(false);
        }
        if i == self.chains.len() {
            self.chains.push(Chain::new());
        }
        self.ring.pop(&mut self.chains[i]).map_err(|e| {
            self.error = Some(e);
            Drop::NoBuffers
        })
    }

    /// Gives the first `n` chains back, the last one first.
    fn unpop(&mut self, n: usize) {
        for chain in self.chains[..n].iter().rev() {
            if let Err(e) = self.ring.unpop(chain) {
                self.error.get_or_insert(e);
            }
        }
    }

    /// Takes as many buffers as hold `total` bytes.
    fn collect(&mut self, total: u32) -> Result<usize, Drop> {
        let mut room = self.chains[0].writable_len();
        let mut n = 1;
        while room < total {
            let more = if !self.mergeable || n == MAX_MERGED {
                Err(Drop::TooBigForPort)
            } else {
                self.pop(n).and_then(|got| if got { Ok(()) } else { Err(Drop::NoBuffers) })
            };
            if let Err(reason) = more {
                self.unpop(n);
                return Err(reason);
            }
            room = room.saturating_add(self.chains[n].writable_len());
            n += 1;
        }
        Ok(n)
    }
}

impl Output for TxRing {
    #[inline]
    fn accepts(&self) -> Offloads {
        self.accepts
    }

    #[inline]
    fn put(&mut self, header: &VnetHeader, prefix: &[u8], rest: Source<'_>) -> Result<(), Drop> {
        if !self.pop(0)? {
            return Err(Drop::NoBuffers);
        }
        let total = (self.header_len + prefix.len() + rest.len()) as u32;
        let n = if self.chains[0].writable_len() >= total { 1 } else { self.collect(total)? };
        let mut start = [0; HEADER_LEN + 16];
        let mut h = *header;
        h.num_buffers = n as u16;
        start[..HEADER_LEN].copy_from_slice(&h.to_bytes());
        start[self.header_len..self.header_len + prefix.len()].copy_from_slice(prefix);
        let start = &start[..self.header_len + prefix.len()];
        if n == 1 {
            let chain = &self.chains[0];
            // SAFETY: the chain's buffers, which it keeps alive.
            unsafe { Sink::new(chain.writable()) }.write(start, rest);
            self.ring.push(chain, total);
            return Ok(());
        }
        let (mut start, mut rest) = (start, rest);
        for chain in &self.chains[..n] {
            let room = chain.writable_len() as usize;
            let head = start.len().min(room);
            let body = rest.len().min(room - head);
            // SAFETY: as above.
            unsafe { Sink::new(chain.writable()) }.write(&start[..head], rest.first(body));
            self.ring.push(chain, (head + body) as u32);
            (start, rest) = (&start[head..], rest.after(body));
        }
        Ok(())
    }

    #[inline]
    fn flush(&mut self, c: &QueueCounters) {
        self.ring.publish();
        if self.ring.needs_notification() {
            self.call.notify();
            c.calls.add(1);
        }
    }
}
