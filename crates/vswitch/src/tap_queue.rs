//! A queue of a port behind a file descriptor of the kernel's: a tap, a packet socket.
//!
//! The kernel takes and gives one frame a system call; large segments make up for it. Frames are
//! read into buffers of the queue's own and copied from there to where they go.
#![allow(unsafe_code)] // iovecs go through `net::Backend`

use std::io;
use std::os::fd::RawFd;

use libc::iovec;
use net::{Backend, Offloads};

use crate::burst::{BURST, Burst, MAX_FRAME, MIN_FRAME};
use crate::copy::{Source, iovec_of};
use crate::counters::{Drop, QueueCounters};
use crate::header::{DATA_VALID, HEADER_LEN, NEEDS_CSUM, VnetHeader};
use crate::output::Output;

/// One frame with its header.
const SLOT: usize = HEADER_LEN + MAX_FRAME as usize + 1;
/// Most pieces of a frame in one system call.
const MAX_IOV: usize = 1024;
/// Bursts between two looks at what the host has lost.
const ASK_EVERY: u32 = 64;

/// One queue.
pub struct TapQueue {
    backend: Box<dyn Backend>,
    /// [`BURST`] slots, touched only as far as frames come.
    buffer: Vec<u8>,
    iov: Vec<iovec>,
    /// Bursts until it is asked what the host has lost.
    ask_in: u32,
}

// SAFETY: `iov` is only filled and used within one call.
unsafe impl Send for TapQueue {}

impl TapQueue {
    /// Takes a back end over; it gives whatever it can to be finished by others.
    pub fn new(mut backend: Box<dyn Backend>) -> io::Result<Self> {
        let capabilities = backend.capabilities();
        backend.set_offloads(Offloads { ufo: false, ..capabilities })?;
        Ok(Self {
            backend,
            buffer: vec![0; SLOT * BURST],
            iov: Vec::with_capacity(MAX_IOV),
            ask_in: 0,
        })
    }

    /// Readable when frames are there.
    pub fn poll_fd(&self) -> RawFd {
        self.backend.poll_fd()
    }

    /// Reads up to [`BURST`] frames.
    pub fn receive(&mut self, burst: &mut Burst, c: &QueueCounters) {
        self.read(burst, c);
        if !burst.frames().is_empty() {
            self.ask_in = self.ask_in.checked_sub(1).unwrap_or_else(|| {
                c.dropped(Drop::HostQueue, self.backend.lost());
                ASK_EVERY
            });
        }
    }

    fn read(&mut self, burst: &mut Burst, c: &QueueCounters) {
        for slot in self.buffer.chunks_exact_mut(SLOT) {
            let n = match net::backend::recv_bytes(self.backend.as_mut(), slot) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    c.dropped(Drop::HostError, 1);
                    return;
                }
            };
            let Some((head, frame)) = slot[..n].split_first_chunk::<HEADER_LEN>() else {
                refuse(c, Drop::Runt);
                continue;
            };
            let mut header = VnetHeader::from_bytes(head);
            header.flags &= NEEDS_CSUM | DATA_VALID;
            header.num_buffers = 0;
            if frame.len() < MIN_FRAME as usize {
                refuse(c, Drop::Runt);
            } else if n == SLOT {
                refuse(c, Drop::Oversized);
            } else if !header.is_plain() && !header.is_valid(frame.len() as u32) {
                refuse(c, Drop::BadHeader);
            } else {
                // SAFETY: the buffer is not written to before the next call, and the burst is
                // cleared before that.
                unsafe { burst.push_bytes(header, frame) };
            }
        }
    }
}

fn refuse(c: &QueueCounters, reason: Drop) {
    c.rx_frames.add(1);
    c.dropped(reason, 1);
}

impl Output for TapQueue {
    fn accepts(&self) -> Offloads {
        self.backend.capabilities()
    }

    fn put(&mut self, header: &VnetHeader, prefix: &[u8], rest: Source<'_>) -> Result<(), Drop> {
        let head = header.to_bytes();
        self.iov.clear();
        self.iov.push(iovec_of(&head));
        if !prefix.is_empty() {
            self.iov.push(iovec_of(prefix));
        }
        if !rest.append_to(&mut self.iov, MAX_IOV - 2) {
            return Err(Drop::TooBigForPort);
        }
        // SAFETY: the iovecs are `head`, `prefix` and the buffers of `rest`.
        match unsafe { self.backend.send(&self.iov) } {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(Drop::NoBuffers),
            Err(e) if e.raw_os_error() == Some(libc::EMSGSIZE) => Err(Drop::TooBigForPort),
            Err(_) => Err(Drop::HostError),
        }
    }

    fn flush(&mut self, _: &QueueCounters) {}
}
