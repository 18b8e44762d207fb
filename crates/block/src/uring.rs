//! The io_uring engine: one ring, many requests in one system call, completions through an
//! eventfd. What the ring cannot do well (unaligned direct I/O, short transfers, block-device
//! discards, zeroes that must be written) goes to a [`ThreadEngine`] beside it that shares the
//! eventfd.
//!
//! Invariant: a request whose entry is in the ring sits in `slots` until its completion was seen,
//! so its iovecs and buffers outlive the kernel's use of them.
#![allow(unsafe_code)] // pushing entries

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::sync_io::{IOV_MAX, PUNCH, Target, unsupported};
use crate::threads::ThreadEngine;
use crate::{Completion, Engine, Op, Request};

/// Waits until `fd` is readable.
pub(crate) fn wait_readable(fd: RawFd) -> io::Result<()> {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    loop {
        // SAFETY: one valid pollfd.
        if unsafe { libc::poll(&mut poll, 1, -1) } >= 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

/// See the module.
pub struct UringEngine {
    ring: IoUring,
    target: Arc<Target>,
    slots: Vec<Option<Request>>,
    free: Vec<u32>,
    helper: ThreadEngine,
    event: EventFd,
}

impl UringEngine {
    /// A ring for `depth` requests.
    ///
    /// # Errors
    /// What the kernel says: EPERM or ENOSYS where io_uring is not permitted.
    pub fn new(target: Arc<Target>, depth: usize) -> io::Result<Self> {
        let depth = depth.clamp(1, 4096);
        let ring = IoUring::new(depth.next_power_of_two() as u32)?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        if needed.iter().any(|c| !probe.is_supported(*c)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let helper = ThreadEngine::new(target.clone(), depth, event.try_clone()?);
        Ok(Self {
            ring,
            target,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth as u32).rev().collect(),
            helper,
            event,
        })
    }

    /// The ring's entry for `request`, or `None` when it is for the helper.
    fn entry(&self, request: &Request) -> Option<squeue::Entry> {
        let t = &self.target;
        let fd = types::Fd(t.fd());
        let iov = request.buffer.iovecs();
        let ring_can = |offset| iov.len() <= IOV_MAX && !t.needs_bounce(offset, &request.buffer);
        match request.op {
            Op::Read { offset } if ring_can(offset) => {
                Some(opcode::Readv::new(fd, iov.as_ptr(), iov.len() as u32).offset(offset).build())
            }
            Op::Write { offset, durable } if ring_can(offset) => Some(
                opcode::Writev::new(fd, iov.as_ptr(), iov.len() as u32)
                    .offset(offset)
                    .rw_flags(if durable && !t.no_flush { libc::RWF_DSYNC } else { 0 })
                    .build(),
            ),
            Op::Flush if t.no_flush => Some(opcode::Nop::new().build()),
            Op::Flush => Some(opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build()),
            Op::Discard { offset, len } if !t.block_device => {
                Some(opcode::Fallocate::new(fd, len).offset(offset).mode(PUNCH).build())
            }
            Op::WriteZeroes { offset, len, unmap } if !t.block_device => {
                let mode = if unmap { PUNCH } else { libc::FALLOC_FL_ZERO_RANGE };
                Some(opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build())
            }
            _ => None,
        }
    }

    /// Whether the helper should do it again: the transfer was short, or the file system cannot.
    fn again(request: &Request, res: i32) -> bool {
        if res < 0 {
            let e = io::Error::from_raw_os_error(-res);
            let soft = matches!(-res, libc::EAGAIN | libc::EINTR);
            let space = matches!(request.op, Op::Discard { .. } | Op::WriteZeroes { .. });
            return soft || (space && unsupported(&e));
        }
        let transfer = matches!(request.op, Op::Read { .. } | Op::Write { .. });
        transfer && (res as usize) < request.buffer.len()
    }
}

impl Engine for UringEngine {
    fn queue(&mut self, request: Request) {
        let Some(entry) = self.entry(&request) else { return self.helper.queue(request) };
        let Some(slot) = self.free.pop() else { return self.helper.queue(request) };
        let entry = entry.user_data(u64::from(slot));
        self.slots[slot as usize] = Some(request);
        // SAFETY: the request (its iovecs and buffer) stays in its slot until the completion.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            if self.submit().is_err() {
                // The kernel does not take entries: the helper does it.
                self.free.push(slot);
                if let Some(request) = self.slots[slot as usize].take() {
                    self.helper.queue(request);
                }
                return;
            }
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        loop {
            if self.ring.submission().is_empty() {
                return Ok(());
            }
            match self.ring.submit() {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Out of memory for a moment: try again while the kernel works on the others.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    std::thread::yield_now();
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let _ = self.event.read();
        while let Some(cqe) = self.ring.completion().next() {
            let slot = cqe.user_data() as usize;
            let Some(request) = self.slots.get_mut(slot).and_then(Option::take) else { continue };
            self.free.push(slot as u32);
            let res = cqe.result();
            if Self::again(&request, res) {
                self.helper.queue(request);
                continue;
            }
            let result = if res < 0 { Err(io::Error::from_raw_os_error(-res)) } else { Ok(()) };
            done.push(Completion { request, result });
        }
        self.helper.take_done(done);
    }

    fn wait(&mut self) -> io::Result<()> {
        self.submit()?;
        if self.in_flight() == 0 { Ok(()) } else { wait_readable(self.event()) }
    }

    fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.helper.in_flight()
    }

    fn capacity(&self) -> usize {
        self.slots.len()
    }

    fn name(&self) -> &'static str {
        "io_uring"
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.in_flight() > 0 {
            if self.wait().is_err() {
                // The kernel may still write to these buffers: leaking them is the safe way out.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            self.reap(&mut done);
            done.clear();
        }
    }
}
