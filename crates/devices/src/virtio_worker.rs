//! What the I/O threads of virtio devices have in common: waiting for several fds, and a thread
//! that gives back what it was given when it is told to stop.
#![allow(unsafe_code)] // poll

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An eventfd that never blocks.
pub(crate) fn event() -> Result<EventFd, String> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(|e| format!("cannot make an eventfd: {e}"))
}

/// An fd to wait for. `fd` -1 is left out.
pub(crate) fn pollfd(fd: RawFd, events: libc::c_short) -> libc::pollfd {
    libc::pollfd { fd, events, revents: 0 }
}

/// Waits until one of `fds` is ready, or `timeout` milliseconds passed (-1: for ever).
pub(crate) fn wait(fds: &mut [libc::pollfd], timeout: i32) -> io::Result<()> {
    loop {
        // SAFETY: a valid slice of pollfd.
        if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) } >= 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

/// The thread's view of being asked to stop, or to look at its settings.
#[derive(Clone)]
pub(crate) struct Signal {
    event: Arc<EventFd>,
    stop: Arc<AtomicBool>,
}

impl Signal {
    pub(crate) fn new() -> Result<Self, String> {
        Ok(Self { event: Arc::new(event()?), stop: Arc::default() })
    }

    /// Wakes the thread.
    pub(crate) fn wake(&self) {
        // Cannot fail but when the counter is full, and then it is awake anyway.
        let _ = self.event.write(1);
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Takes the wake-ups off; whether the thread is to stop.
    pub(crate) fn take(&self) -> bool {
        let _ = self.event.read();
        self.stop.load(Ordering::Acquire)
    }
}

/// A running thread that owns a `T` and returns it when stopped.
pub(crate) struct Worker<T> {
    signal: Signal,
    thread: JoinHandle<T>,
}

impl<T: Send + 'static> Worker<T> {
    /// Runs `work(value)` until its `signal` says stop. On an error the value is dropped.
    pub(crate) fn spawn(
        name: String,
        signal: Signal,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Self, String> {
        signal.stop.store(false, Ordering::Release);
        let thread = std::thread::Builder::new()
            .name(name.chars().take(15).collect())
            .spawn(work)
            .map_err(|e| format!("cannot start I/O thread '{name}': {e}"))?;
        Ok(Self { signal, thread })
    }

    /// Stops it and waits. `None` if it panicked.
    pub(crate) fn stop(self) -> Option<T> {
        self.signal.stop.store(true, Ordering::Release);
        self.signal.wake();
        let value = self.thread.join().ok();
        self.signal.stop.store(false, Ordering::Release);
        value
    }
}
