//! The thread of a queue pair (and, for pair 0, of the control queue).
//!
//! Invariants:
//! - A frame is read from the back end only when the guest's buffers at hand can take the largest
//!   one, so nothing is ever read that cannot be delivered. Buffers at hand and not used go back
//!   to the ring when the queue stops.
//! - No allocation a frame, once chains and iovecs have grown.
#![allow(unsafe_code)] // iovecs of guest memory

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use net::backend::{recv_bytes, send_bytes};
use net::{Backend, HEADER, Offloads};
use virtio::ring::MAX_SEGMENTS;
use virtio::{Chain, LateInput, Queue, RingError, RingPos};

use super::control;
use super::shared::Shared;
use crate::virtio_worker::{pollfd, wait};

/// Frames in one direction before the other gets its turn.
const BURST: usize = 64;
/// Largest frame with segmentation: 64 KiB and its Ethernet header (VIRTIO 1.2, 5.1.6.3.1).
const LARGE_FRAME: usize = 65550;
/// Ethernet header with a VLAN tag.
const ETHERNET: usize = 18;
/// Wait after the back end failed, in milliseconds.
const RETRY: i32 = 200;

/// Frames that one look for late ones takes: more than a tap's queue holds.
const LATE_FRAMES: usize = 1024;

/// Which of the pair's queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Receive,
    Transmit,
    Control,
}

/// What a direction waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Nothing: it is off.
    Off,
    /// A kick.
    Kick,
    /// The back end.
    Backend,
    /// There is more to do already.
    More,
    /// A moment: the back end failed.
    Later,
}

/// Iovecs of the frame in hand, kept for their allocation.
#[derive(Default)]
struct Scratch(Vec<libc::iovec>);

// SAFETY: between frames, when the worker may change threads, nobody follows the pointers.
unsafe impl Send for Scratch {}

/// What the thread owns.
pub(super) struct PairWorker {
    index: usize,
    shared: Arc<Shared>,
    backend: Box<dyn Backend>,
    queues: [Option<Queue>; 3],
    mergeable: bool,
    /// Room that a frame may need, header included.
    room: usize,
    /// Receive chains taken and not used yet, oldest first, and their bytes.
    at_hand: VecDeque<Chain>,
    bytes_at_hand: usize,
    spare: Vec<Chain>,
    iov: Scratch,
    /// Queues whose driver broke the rules: they are not served.
    broken: [bool; 3],
    chain: Chain,
}

impl PairWorker {
    pub(super) fn new(index: usize, shared: Arc<Shared>, backend: Box<dyn Backend>) -> Self {
        let mut worker = Self {
            index,
            shared,
            backend,
            queues: [None, None, None],
            mergeable: false,
            room: 0,
            at_hand: VecDeque::new(),
            bytes_at_hand: 0,
            spare: Vec::new(),
            iov: Scratch::default(),
            broken: [false; 3],
            chain: Chain::new(),
        };
        worker.negotiated(Offloads::default(), false, 0);
        worker
    }

    /// Takes over what was negotiated. `least`: the MTU promised to the guest.
    pub(super) fn negotiated(&mut self, offloads: Offloads, mergeable: bool, least: usize) {
        if let Err(e) = self.backend.set_offloads(offloads) {
            tracing::warn!("{}: cannot set offloads: {e}", self.backend.name());
        }
        self.mergeable = mergeable;
        let mtu = usize::from(self.backend.mtu()).max(1500).max(least);
        self.room = HEADER + if offloads.large() { LARGE_FRAME } else { mtu + ETHERNET };
    }

    pub(super) fn has_queues(&self) -> bool {
        self.queues.iter().any(Option::is_some)
    }

    /// Takes a queue over; an error if it has that one.
    pub(super) fn start(&mut self, role: Role, queue: Queue) -> Result<(), ()> {
        let slot = &mut self.queues[role as usize];
        if slot.is_some() {
            return Err(());
        }
        *slot = Some(queue);
        self.broken[role as usize] = false;
        Ok(())
    }

    /// Gives a queue up, with nothing in flight.
    pub(super) fn stop(&mut self, role: Role) -> Option<RingPos> {
        let mut queue = self.queues[role as usize].take()?;
        if role == Role::Receive {
            while let Some(chain) = self.at_hand.pop_back() {
                if let Err(e) = queue.ring.unpop(&chain) {
                    // Cannot be, as they are the last ones popped; the driver gets it back empty.
                    tracing::error!("{}: {e}", self.shared.name);
                    queue.push(&chain, 0);
                }
                self.spare.push(chain);
            }
            self.bytes_at_hand = 0;
        }
        Some(queue.stop())
    }

    /// Serves the queues until told to stop.
    pub(super) fn run(&mut self) {
        loop {
            self.look_at_settings();
            let receive = self.receive();
            let transmit = self.transmit();
            let control = self.control();
            let next = [receive, transmit, control];
            let mut fds = self.fds(next);
            let timeout = if next.contains(&Next::More) {
                0
            } else if next.contains(&Next::Later) {
                RETRY
            } else {
                -1
            };
            if let Err(e) = wait(&mut fds, timeout) {
                tracing::error!("{}: cannot wait for frames: {e}", self.shared.name);
                return;
            }
            for (queue, fd) in self.queues.iter().zip(&fds[2..]) {
                if let (Some(queue), true) = (queue, fd.revents != 0) {
                    queue.ack_kick();
                }
            }
            if fds[0].revents != 0 && self.shared.signals[self.index].take() {
                return;
            }
        }
    }

    /// Signal, back end, and the kicks of the three queues; only what is waited for.
    fn fds(&self, next: [Next; 3]) -> [libc::pollfd; 5] {
        let mut events = 0;
        if next[0] == Next::Backend {
            events |= libc::POLLIN;
        }
        if next[1] == Next::Backend {
            events |= libc::POLLOUT;
        }
        let backend = if events == 0 { -1 } else { self.backend.poll_fd() };
        let kick = |i: usize| match &self.queues[i] {
            Some(q) if next[i] == Next::Kick => pollfd(q.kick.as_raw_fd(), libc::POLLIN),
            _ => pollfd(-1, 0),
        };
        let signal = pollfd(self.shared.signals[self.index].fd(), libc::POLLIN);
        [signal, pollfd(backend, events), kick(0), kick(1), kick(2)]
    }

    fn enabled(&self) -> bool {
        self.index < usize::from(self.shared.active_pairs.load(Ordering::Acquire))
    }

    fn look_at_settings(&mut self) {
        if let Err(e) = self.backend.set_enabled(self.enabled()) {
            tracing::warn!("{}: queue {}: {e}", self.backend.name(), self.index);
        }
        if self.index == 0 {
            let frames = std::mem::take(&mut *self.shared.outbox.lock());
            for frame in frames {
                if let Err(e) = send_bytes(self.backend.as_mut(), &frame) {
                    tracing::warn!("{}: cannot announce the guest: {e}", self.backend.name());
                }
            }
        }
    }

    fn broke(&mut self, role: Role, e: RingError) -> Next {
        self.broken(role, &e.to_string())
    }

    /// The driver broke the rules: the queue is kept, for its position, and not served.
    fn broken(&mut self, role: Role, reason: &str) -> Next {
        if let Some(queue) = &mut self.queues[role as usize] {
            queue.flush();
            queue.ring.disable_kicks();
        }
        self.broken[role as usize] = true;
        self.shared.needs_reset(&format!("{role:?} queue: {reason}"));
        Next::Off
    }

    // Receiving.

    fn receive(&mut self) -> Next {
        if self.broken[0] || self.queues[0].is_none() || !self.enabled() {
            return Next::Off;
        }
        let next = if self.shared.link.load(Ordering::Acquire) {
            self.receive_burst()
        } else {
            self.discard_burst()
        };
        if let Some(queue) = &mut self.queues[0] {
            queue.flush();
        }
        next
    }

    fn receive_burst(&mut self) -> Next {
        for _ in 0..BURST {
            match self.gather() {
                Ok(true) => {}
                Ok(false) => return Next::Kick,
                Err(e) => return self.broke(Role::Receive, e),
            }
            self.iov.0.clear();
            for chain in &self.at_hand {
                chain.writable_iovecs(0, u32::MAX, &mut self.iov.0);
                if !self.mergeable || self.iov.0.len() >= MAX_SEGMENTS {
                    break;
                }
            }
            self.iov.0.truncate(MAX_SEGMENTS);
            match self.next_frame() {
                Ok(n) => {
                    if let Err(reason) = self.deliver(n) {
                        return self.broken(Role::Receive, reason);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Next::Backend,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Next::Later,
            }
        }
        Next::More
    }

    /// Puts the next frame into the buffers at hand: late ones of a migration come first.
    fn next_frame(&mut self) -> io::Result<usize> {
        if self.index == 0
            && let Some(frame) = self.shared.inbox.lock().pop_front()
        {
            return Ok(scatter(&self.iov.0, &frame));
        }
        // SAFETY: the iovecs lie in guest RAM, which the chains at hand keep alive.
        unsafe { self.backend.recv(&self.iov.0) }
    }

    /// Takes from the back end what the stopped queue did not: at most [`LATE_FRAMES`] frames.
    /// Broadcasts and multicasts reach the guest's new place by themselves and are left out; one
    /// from the guest's own address is its announcement from there, and settles it.
    pub(super) fn late_frames(&mut self, late: &mut LateInput) {
        let mac = self.shared.filter.load().mac;
        let mut buffer = vec![0; HEADER + LARGE_FRAME];
        for _ in 0..LATE_FRAMES {
            let Ok(n) = recv_bytes(self.backend.as_mut(), &mut buffer) else { break };
            let Some((to, from)) = buffer[..n].get(HEADER..HEADER + 12).map(|a| a.split_at(6))
            else {
                continue;
            };
            late.settled |= from == mac;
            if to[0] & 1 == 0 {
                late.frames.push(buffer[..n].to_vec());
            }
        }
    }

    /// Takes chains until the largest frame fits. `false`: the driver has to give more.
    fn gather(&mut self) -> Result<bool, RingError> {
        let Some(queue) = &mut self.queues[0] else { return Ok(false) };
        loop {
            let enough = if self.mergeable {
                self.bytes_at_hand >= self.room
                    // All that the ring can hold, or that one system call takes.
                    || queue.ring.taken() >= queue.ring.size()
                    || self.at_hand.len() >= MAX_SEGMENTS
            } else {
                !self.at_hand.is_empty()
            };
            if enough {
                return Ok(true);
            }
            let mut chain = self.spare.pop().unwrap_or_default();
            if queue.pop(&mut chain)? {
                self.bytes_at_hand += chain.writable_len() as usize;
                self.at_hand.push_back(chain);
                continue;
            }
            self.spare.push(chain);
            queue.flush();
            if !queue.ring.enable_kicks() {
                return Ok(false);
            }
            queue.ring.disable_kicks();
        }
    }

    /// Uses as many chains as the frame of `n` bytes took.
    fn deliver(&mut self, n: usize) -> Result<(), &'static str> {
        let counters = &self.shared.counters;
        let mut to = [0; 6];
        if n < HEADER + ETHERNET - 4 || !peek(&self.iov.0, HEADER, &mut to) {
            counters.rx_dropped.fetch_add(1, Ordering::Relaxed);
            return self.first_fits();
        }
        if !self.shared.filter.load().accepts(to) {
            counters.rx_dropped.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        self.first_fits()?;
        let Some(queue) = &mut self.queues[0] else { return Ok(()) };
        let mut left = n;
        let mut used = 0u16;
        for chain in &self.at_hand {
            left -= left.min(chain.writable_len() as usize);
            used += 1;
            if left == 0 {
                break;
            }
        }
        if let Some(first) = self.at_hand.front() {
            first.write_at(HEADER as u32 - 2, &used.to_le_bytes());
        }
        left = n;
        for _ in 0..used {
            let Some(chain) = self.at_hand.pop_front() else { break };
            let part = left.min(chain.writable_len() as usize);
            queue.push(&chain, part as u32);
            left -= part;
            self.bytes_at_hand -= chain.writable_len() as usize;
            self.spare.push(chain);
        }
        counters.rx_packets.fetch_add(1, Ordering::Relaxed);
        counters.rx_bytes.fetch_add((n - HEADER) as u64, Ordering::Relaxed);
        Ok(())
    }

    fn first_fits(&self) -> Result<(), &'static str> {
        match self.at_hand.front() {
            Some(c) if (c.writable_len() as usize) < HEADER => {
                Err("a receive buffer too small for the header")
            }
            _ => Ok(()),
        }
    }

    /// Reads frames and forgets them: the link is down.
    fn discard_burst(&mut self) -> Next {
        let mut scratch = [0; 64];
        for _ in 0..BURST {
            match recv_bytes(self.backend.as_mut(), &mut scratch) {
                Ok(_) => self.shared.counters.rx_dropped.fetch_add(1, Ordering::Relaxed),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Next::Backend,
                Err(_) => return Next::Later,
            };
        }
        Next::More
    }

    // Transmitting.

    fn transmit(&mut self) -> Next {
        if self.broken[1] {
            return Next::Off;
        }
        let next = self.transmit_burst();
        let Some(queue) = &mut self.queues[1] else { return Next::Off };
        queue.flush();
        if next == Next::Kick && queue.ring.enable_kicks() {
            queue.ring.disable_kicks();
            return Next::More;
        }
        next
    }

    fn transmit_burst(&mut self) -> Next {
        let link = self.shared.link.load(Ordering::Acquire);
        for _ in 0..BURST {
            let Some(queue) = &mut self.queues[1] else { return Next::Off };
            match queue.pop(&mut self.chain) {
                Ok(true) => {}
                Ok(false) => return Next::Kick,
                Err(e) => return self.broke(Role::Transmit, e),
            }
            let counters = &self.shared.counters;
            let whole = self.chain.readable_len() as usize > HEADER;
            // SAFETY: the iovecs lie in guest RAM, which the chain keeps alive.
            let sent = (link && whole).then(|| unsafe { self.backend.send(self.chain.readable()) });
            match sent {
                Some(Ok(n)) => {
                    counters.tx_packets.fetch_add(1, Ordering::Relaxed);
                    counters.tx_bytes.fetch_add(n.saturating_sub(HEADER) as u64, Ordering::Relaxed);
                }
                Some(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                    return match queue.ring.unpop(&self.chain) {
                        Ok(()) => Next::Backend,
                        Err(e) => self.broke(Role::Transmit, e),
                    };
                }
                _ => {
                    counters.tx_dropped.fetch_add(1, Ordering::Relaxed);
                }
            }
            queue.push(&self.chain, 0);
        }
        Next::More
    }

    // The control queue.

    fn control(&mut self) -> Next {
        if self.broken[2] {
            return Next::Off;
        }
        for _ in 0..BURST {
            let Some(queue) = &mut self.queues[2] else { return Next::Off };
            match queue.pop(&mut self.chain) {
                Ok(true) => {}
                Ok(false) => {
                    queue.flush();
                    if queue.ring.enable_kicks() { continue } else { return Next::Kick }
                }
                Err(e) => return self.broke(Role::Control, e),
            }
            let written = control::serve(&self.shared, &self.chain);
            queue.push(&self.chain, written.unwrap_or(0));
            if written.is_none() {
                return self.broken(Role::Control, "a command without room for its answer");
            }
        }
        if let Some(queue) = &mut self.queues[2] {
            queue.flush();
        }
        Next::More
    }
}

/// Copies `frame` into the iovecs, as far as they reach; returns the bytes copied.
fn scatter(iov: &[libc::iovec], frame: &[u8]) -> usize {
    let mut done = 0;
    for v in iov {
        let part = v.iov_len.min(frame.len() - done);
        // SAFETY: the iovecs lie in guest RAM, which the chains at hand keep alive; `part` bytes
        // are within both, and the frame is memory of our own.
        unsafe { std::ptr::copy_nonoverlapping(frame[done..].as_ptr(), v.iov_base.cast(), part) };
        done += part;
    }
    done
}

/// Copies bytes at `offset` of `iov` out; whether they are all there.
fn peek(iov: &[libc::iovec], offset: usize, out: &mut [u8]) -> bool {
    let mut skip = offset;
    let mut done = 0;
    for v in iov {
        let s = skip.min(v.iov_len);
        skip -= s;
        let n = (v.iov_len - s).min(out.len() - done);
        // SAFETY: the iovec is valid for iov_len bytes, s + n of which are used; out has room.
        unsafe {
            let from = v.iov_base.cast::<u8>().add(s);
            std::ptr::copy_nonoverlapping(from, out.as_mut_ptr().add(done), n);
        }
        done += n;
        if done == out.len() {
            return true;
        }
    }
    false
}
