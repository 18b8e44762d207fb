//! The thread of a queue: takes chains, hands them to the engine, gives them back.
//!
//! Invariant: a slot's chain, and with it the guest memory of its request, stays untouched from
//! `pop` until its completion was seen.
#![allow(unsafe_code)] // buffers over a chain's iovecs

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use block::stats::Kind;
use block::{Buffer, Completion, Engine, Op, Request};
use mem::GuestMemory;
use virtio::{Chain, Queue, RingPos};

use super::Shared;
use super::request::{HEADER, Status, Todo, decode};
use crate::virtio_worker::{Signal, pollfd, wait};

/// Most requests in flight in one queue.
const MAX_IN_FLIGHT: usize = 256;

struct Slot {
    chain: Chain,
    buffer: Buffer,
    start: Instant,
    bytes: u64,
}

/// What the thread owns.
pub(super) struct QueueWorker {
    shared: Arc<Shared>,
    queue: Queue,
    mem: GuestMemory,
    engine: Box<dyn Engine>,
    signal: Signal,
    slots: Vec<Slot>,
    free: Vec<usize>,
    done: Vec<Completion>,
    /// The driver broke the rules: nothing more is taken.
    broken: bool,
}

impl QueueWorker {
    pub(super) fn new(
        shared: Arc<Shared>,
        queue: Queue,
        mem: GuestMemory,
        signal: Signal,
    ) -> Result<Self, String> {
        let depth = usize::from(queue.ring.size()).min(MAX_IN_FLIGHT);
        let engine = shared.disk.engine(depth).map_err(|e| e.to_string())?;
        let now = Instant::now();
        let slot = |_| Slot { chain: Chain::new(), buffer: Buffer::empty(), start: now, bytes: 0 };
        Ok(Self {
            shared,
            queue,
            mem,
            engine,
            signal,
            slots: (0..depth).map(slot).collect(),
            free: (0..depth).rev().collect(),
            done: Vec::with_capacity(depth),
            broken: false,
        })
    }

    /// Serves the queue until told to stop; then nothing is in flight.
    pub(super) fn run(mut self) -> Self {
        loop {
            self.queue.ring.disable_kicks();
            self.take_chains();
            self.submit();
            self.queue.flush();
            let full = self.free.is_empty() || self.broken;
            if !full && self.queue.ring.enable_kicks() {
                continue;
            }
            let kick = if full { -1 } else { self.queue.kick.as_raw_fd() };
            let mut fds = [
                pollfd(self.signal.fd(), libc::POLLIN),
                pollfd(self.engine.event(), libc::POLLIN),
                pollfd(kick, libc::POLLIN),
            ];
            if let Err(e) = wait(&mut fds, -1) {
                tracing::error!("{}: cannot wait for requests: {e}", self.shared.name);
                break;
            }
            if fds[0].revents != 0 && self.signal.take() {
                break;
            }
            if fds[2].revents != 0 {
                self.queue.ack_kick();
            }
            if fds[1].revents != 0 {
                self.complete();
            }
        }
        self.drain();
        self
    }

    /// Where the ring stands.
    pub(super) fn into_position(self) -> RingPos {
        self.queue.stop()
    }

    fn take_chains(&mut self) {
        while !self.broken {
            let Some(&slot) = self.free.last() else { return };
            match self.queue.pop(&mut self.slots[slot].chain) {
                Ok(true) => self.begin(slot),
                Ok(false) => return,
                Err(e) => self.fail(&e.to_string()),
            }
        }
    }

    fn fail(&mut self, reason: &str) {
        self.broken = true;
        self.shared.needs_reset(&format!("{}: {reason}", self.shared.name));
    }

    fn begin(&mut self, slot: usize) {
        let s = &mut self.slots[slot];
        let todo = decode(&self.shared, &s.chain);
        let (op, bytes) = match todo {
            Todo::Io { op, bytes } => (op, bytes),
            Todo::Answer { status, written } => {
                answer(&mut self.queue, &s.chain, status, written);
                return;
            }
            Todo::Broken(reason) => {
                self.queue.push(&s.chain, 0);
                self.fail(reason);
                return;
            }
        };
        s.start = Instant::now();
        s.bytes = bytes;
        let mut buffer = std::mem::take(&mut s.buffer);
        let chain = &s.chain;
        // SAFETY: a chain's iovecs lie in guest RAM.
        unsafe {
            buffer.refill_iovecs(&self.mem, |iov| match op {
                Op::Read { .. } => chain.writable_iovecs(0, bytes as u32, iov),
                Op::Write { .. } => chain.readable_iovecs(HEADER, bytes as u32, iov),
                _ => 0,
            });
        }
        self.free.pop();
        self.engine.queue(Request { op, buffer, token: slot as u64 });
    }

    fn submit(&mut self) {
        if let Err(e) = self.engine.submit() {
            tracing::error!("{}: the host takes no I/O: {e}", self.shared.name);
        }
    }

    fn complete(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        self.engine.reap(&mut done);
        for completion in done.drain(..) {
            self.finish(completion);
        }
        self.done = done;
    }

    fn finish(&mut self, completion: Completion) {
        let Completion { request, result } = completion;
        let index = request.token as usize;
        let slot = &mut self.slots[index];
        let stats = self.shared.disk.live_stats();
        let kind = Kind::from(&request.op);
        stats.account(kind, slot.bytes, slot.start.elapsed(), result.is_ok());
        let mut written = 0;
        match request.op {
            // Even a read that failed may have written.
            Op::Read { .. } => {
                slot.chain.touch(slot.bytes as u32);
                written = slot.bytes as u32;
            }
            Op::Write { offset, .. } => stats.wrote_up_to(offset + slot.bytes),
            _ => {}
        }
        let status = if result.is_ok() { Status::Ok } else { Status::IoErr };
        if let Err(e) = result {
            self.shared.log_failure(&request.op, &e);
        }
        answer(&mut self.queue, &slot.chain, status, written);
        slot.buffer = request.buffer;
        slot.buffer.clear();
        self.free.push(index);
    }

    fn drain(&mut self) {
        while self.engine.in_flight() > 0 {
            if let Err(e) = self.engine.wait() {
                tracing::error!("{}: cannot wait for requests: {e}", self.shared.name);
                return;
            }
            self.complete();
        }
        self.queue.flush();
    }
}

/// Puts the status behind the data and uses the chain.
fn answer(queue: &mut Queue, chain: &Chain, status: Status, written: u32) {
    let last = chain.writable_len() - 1;
    chain.write_at(last, &[status as u8]);
    // The length counts from the start; a status behind a gap makes it the whole.
    let length = if written == last { last + 1 } else { written.max(u32::from(last == 0)) };
    queue.push(chain, length);
}
