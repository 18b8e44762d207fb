//! One ring as a front end describes it, message by message.
//!
//! ```text
//!   wanted   from SET_VRING_KICK to GET_VRING_BASE or a reset
//!   running  wanted, with size, addresses, memory and features all there, given to the device
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwapOption;
use virtio::{Interrupt, RingPos};
use vmm_sys_util::eventfd::EventFd;

use crate::lent_event;
use crate::message::VringAddr;

/// The driver's interrupt for one ring: an eventfd that may be exchanged while the ring runs.
#[derive(Debug, Default)]
pub struct Call {
    fd: ArcSwapOption<EventFd>,
    /// The front end made one block.
    blocked: AtomicBool,
}

impl Call {
    /// Uses `fd` from now on, or nothing. Interrupts once, as something may have been used just
    /// while the old one went.
    pub fn set(&self, fd: Option<EventFd>) {
        self.fd.store(fd.map(Arc::new));
        self.notify();
    }

    /// Whether the front end made the eventfd block, which is not used since.
    pub fn is_blocked(&self) -> bool {
        self.blocked.load(Ordering::Acquire)
    }
}

impl Interrupt for Call {
    fn notify(&self) {
        let blocked = match &*self.fd.load() {
            Some(fd) => lent_event::signal(fd).is_err(),
            None => false,
        };
        if blocked {
            self.blocked.store(true, Ordering::Release);
            self.fd.store(None);
        }
    }

    fn eventfd(&self) -> Option<EventFd> {
        self.fd.load().as_ref().and_then(|fd| fd.try_clone().ok())
    }
}

/// What a ring is kicked by.
#[derive(Debug, Default)]
pub enum Kick {
    /// Not told yet, or stopped.
    #[default]
    Unset,
    /// By nothing: it is to be polled.
    Polled,
    Fd(EventFd),
}

/// A ring's settings and state.
#[derive(Default)]
pub struct RingState {
    pub size: Option<u16>,
    pub addr: Option<VringAddr>,
    /// What SET_VRING_BASE said.
    pub base: u32,
    pub kick: Kick,
    pub call: Arc<Call>,
    pub err: Option<EventFd>,
    pub enabled: bool,
    pub running: bool,
    /// Where it stood when it was stopped for a moment.
    pub resume: Option<RingPos>,
}

impl RingState {
    /// As after the connection was made, but for the descriptors of call and error, which front
    /// ends set once, and the position: QEMU 7.2 sets the status to 0 when it stops a device, and
    /// asks only then how far its rings came.
    pub fn reset(&mut self) {
        let (call, err) = (std::mem::take(&mut self.call), self.err.take());
        *self = Self { call, err, base: self.base, ..Self::default() };
    }

    /// Whether the front end wants it to run.
    pub fn is_wanted(&self) -> bool {
        !matches!(self.kick, Kick::Unset)
    }
}

/// The u32 of SET_VRING_BASE and GET_VRING_BASE for `pos`.
pub fn base_of(pos: RingPos, packed: bool) -> u32 {
    if packed { u32::from(pos.avail) | u32::from(pos.used) << 16 } else { pos.avail.into() }
}
