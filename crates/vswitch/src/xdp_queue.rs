//! A queue of an af-xdp port. Frames stay in the socket's memory until they are copied to where they
//! go, and are written into it where they leave: one copy each way on our side, no system call a
//! frame.
//!
//! AF_XDP knows no offloads. What leaves has its checksums and its final size; what comes from this
//! host's own stack may lack its checksum, see [`unfinished`](crate::unfinished).
#![allow(unsafe_code)] // the socket's memory is put into a burst

use std::os::fd::RawFd;

use net::Offloads;
use net::af_xdp::{Fault, MAX_BURST, Refused, Sent, XdpSocket};

use crate::burst::{BURST, Burst, MIN_FRAME, TPID};
use crate::copy::{Sink, Source};
use crate::counters::{Drop, QueueCounters};
use crate::header::VnetHeader;
use crate::output::Output;
use crate::unfinished;

const _: () = assert!(MAX_BURST <= BURST);
/// Bytes of a VLAN tag.
const TAG: usize = 4;
/// Bursts between two looks at what the host has lost.
const ASK_EVERY: u32 = 64;

/// One queue.
pub struct XdpQueue {
    socket: XdpSocket,
    /// Longest frame without tag, in bytes.
    max_frame: usize,
    /// Frames may come without their checksum.
    unfinished: bool,
    /// Bursts until the host is asked what it has lost.
    ask_in: u32,
}

impl XdpQueue {
    /// Takes a socket over. `mtu`: largest payload of a frame, in bytes.
    pub fn new(socket: XdpSocket, mtu: u16, unfinished: bool) -> Self {
        let max_frame = usize::from(mtu) + MIN_FRAME as usize;
        Self { socket, max_frame, unfinished, ask_in: ASK_EVERY }
    }

    /// Readable when frames are there.
    pub fn poll_fd(&self) -> RawFd {
        self.socket.poll_fd()
    }

    /// Takes a burst. [`done`](Self::done) has to follow.
    ///
    /// # Errors
    /// The kernel's rings are broken.
    #[inline]
    pub fn receive(&mut self, burst: &mut Burst, c: &QueueCounters) -> Result<(), Fault> {
        if self.socket.is_waiting() {
            count(c, self.socket.retry());
        }
        self.socket.wake_receiver();
        let (max_frame, unfinished) = (self.max_frame, self.unfinished);
        let n = self.socket.receive(|parts| {
            let len: usize = parts.iter().map(|p| p.iov_len).sum();
            let refused = match len {
                n if n < MIN_FRAME as usize => Some(Drop::Runt),
                // A large segment of the host's stack: nothing says how it is to be cut.
                n if n > max_frame + TAG => Some(Drop::Oversized),
                _ => None,
            };
            if let Some(reason) = refused {
                c.rx_frames.add(1);
                c.dropped(reason, 1);
                return;
            }
            let mut header = VnetHeader::default();
            // SAFETY: the socket leaves the bytes alone until `done`; the burst is cleared before.
            unsafe {
                if unfinished {
                    header = unfinished::header(Source::new(parts, 0, len));
                }
                burst.push(header, parts, 0, len as u32);
            }
        })?;
        if n > 0 {
            self.ask_in -= 1;
            if self.ask_in == 0 {
                self.ask(c);
            }
        }
        Ok(())
    }

    /// Gives back what the last burst was in.
    #[inline]
    pub fn done(&mut self) {
        self.socket.done();
    }

    /// The thread is about to sleep. `true` if there is still something to do.
    pub fn before_sleep(&mut self, c: &QueueCounters) -> bool {
        self.ask(c);
        self.socket.is_waiting()
    }

    /// Counts what the host has lost.
    fn ask(&mut self, c: &QueueCounters) {
        self.ask_in = ASK_EVERY;
        let lost = self.socket.lost();
        c.dropped(Drop::HostQueue, lost.queue);
        c.rx_frames.add(lost.too_long);
        c.dropped(Drop::Oversized, lost.too_long);
    }

    /// How the kernel's rings are broken, once.
    pub fn take_fault(&mut self) -> Option<Fault> {
        self.socket.take_fault()
    }
}

impl Output for XdpQueue {
    #[inline]
    fn accepts(&self) -> Offloads {
        Offloads::default()
    }

    #[inline]
    fn prepare(&mut self, _: usize) {
        self.socket.reclaim();
    }

    #[inline]
    fn put(&mut self, _: &VnetHeader, prefix: &[u8], rest: Source<'_>) -> Result<(), Drop> {
        let len = prefix.len() + rest.len();
        if len > self.max_frame && len > self.max_frame + tag_len(prefix, rest) {
            return Err(Drop::TooBigForPort);
        }
        let written = self.socket.put(len, |parts| {
            // SAFETY: chunks of the socket's memory that are ours until they are flushed.
            unsafe { Sink::new(parts) }.write(prefix, rest);
        });
        written.map_err(|refused| match refused {
            Refused::TooLong => Drop::TooBigForPort,
            Refused::Full => Drop::NoBuffers,
            Refused::Broken => Drop::HostError,
        })
    }

    #[inline]
    fn flush(&mut self, c: &QueueCounters) {
        count(c, self.socket.flush());
    }
}

/// Counts what became of frames that were counted as sent when they were put.
#[inline]
fn count(c: &QueueCounters, sent: Sent) {
    if sent.kicks > 0 {
        c.calls.add(sent.kicks);
        c.dropped(Drop::HostError, sent.lost);
    }
}

/// Bytes of the VLAN tag, if the frame has one.
#[cold]
fn tag_len(prefix: &[u8], rest: Source<'_>) -> usize {
    let mut head = [0; 14];
    let n = prefix.len().min(head.len());
    head[..n].copy_from_slice(&prefix[..n]);
    rest.read(&mut head[n..]);
    if head[12..] == TPID.to_be_bytes() { TAG } else { 0 }
}
