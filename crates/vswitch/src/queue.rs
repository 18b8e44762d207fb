//! A queue of a port, of whatever kind, as its poll thread owns it.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use net::af_xdp::Fault;
use virtio::RingError;
use vmm_sys_util::epoll::EventSet;

use crate::burst::Burst;
use crate::counters::QueueCounters;
use crate::output::{self, Context};
use crate::table::PortId;
use crate::tap_queue::TapQueue;
use crate::vhost_queue::{RxRing, TxRing};
use crate::xdp_queue::XdpQueue;

/// How the other side broke its ring's rules.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    #[error(transparent)]
    Virtio(#[from] RingError),
    #[error(transparent)]
    Xdp(#[from] Fault),
}

/// What is behind a queue.
pub enum Io {
    /// Rings of a vhost-user port; each comes and goes by itself.
    Vhost { rx: Option<Box<RxRing>>, tx: Option<Box<TxRing>> },
    /// A file descriptor.
    Fd(Box<TapQueue>),
    /// An AF_XDP socket.
    Xdp(Box<XdpQueue>),
}

impl Io {
    /// Sends frames of a burst.
    #[inline]
    pub fn send(&mut self, burst: &Burst, list: &[u8], x: &mut Context<'_>) -> usize {
        match self {
            Self::Vhost { tx: Some(tx), .. } => output::send(tx.as_mut(), burst, list, x),
            Self::Vhost { tx: None, .. } => 0,
            Self::Fd(tap) => output::send(tap.as_mut(), burst, list, x),
            Self::Xdp(xdp) => output::send(xdp.as_mut(), burst, list, x),
        }
    }

    /// How the receiver broke its ring's rules, once.
    #[inline]
    pub fn take_error(&mut self) -> Option<Broken> {
        match self {
            Self::Vhost { tx: Some(tx), .. } => tx.take_error().map(Broken::from),
            Self::Xdp(xdp) => xdp.take_fault().map(Broken::from),
            _ => None,
        }
    }
}

/// One queue.
pub struct Queue {
    pub port: PortId,
    /// Its number at its port.
    pub index: u16,
    pub io: Io,
    pub counters: Arc<QueueCounters>,
    /// Frames are taken from it.
    pub rx_enabled: bool,
    /// Frames are given to it.
    pub tx_enabled: bool,
    /// The driver broke the receive ring's rules.
    pub rx_broken: bool,
}

impl Queue {
    /// Whether frames can come from it. What a disabled one sends is taken and dropped.
    pub fn receives(&self) -> bool {
        match &self.io {
            Io::Vhost { rx, .. } => rx.is_some() && !self.rx_broken,
            Io::Fd(_) => self.rx_enabled,
            Io::Xdp(_) => self.rx_enabled && !self.rx_broken,
        }
    }

    /// Whether frames can be put into it.
    pub fn transmits(&self) -> bool {
        match &self.io {
            Io::Vhost { tx, .. } => tx.is_some() && self.tx_enabled,
            Io::Fd(_) | Io::Xdp(_) => self.tx_enabled,
        }
    }

    /// What to wait for.
    pub fn wait_fd(&self) -> Option<RawFd> {
        match &self.io {
            Io::Vhost { rx, .. } => rx.as_ref().map(|r| r.kick().as_raw_fd()),
            Io::Fd(tap) => Some(tap.poll_fd()),
            Io::Xdp(xdp) => Some(xdp.poll_fd()),
        }
    }

    /// For what of it. A kick's eventfd is the driver's, who could make a read of it wait: it is
    /// never read, and each kick is an edge.
    pub fn wait_set(&self) -> EventSet {
        match &self.io {
            Io::Vhost { .. } => EventSet::IN | EventSet::EDGE_TRIGGERED,
            Io::Fd(_) | Io::Xdp(_) => EventSet::IN,
        }
    }

    /// Looks for a burst, so that its bytes are on their way while another queue is worked on.
    /// [`receive`](Self::receive) has to follow.
    #[inline]
    pub fn fetch(&mut self) {
        if let Io::Vhost { rx: Some(rx), .. } = &mut self.io {
            rx.fetch();
        }
    }

    /// Takes the burst that was fetched, or, of what needs no fetching, the next one.
    /// [`done`](Self::done) has to follow.
    ///
    /// # Errors
    /// The driver broke its ring's rules; what came before that is in `burst`.
    #[inline]
    pub fn receive(&mut self, burst: &mut Burst) -> Result<(), Broken> {
        match &mut self.io {
            Io::Vhost { rx: Some(rx), .. } => Ok(rx.receive(burst, &self.counters)?),
            Io::Vhost { rx: None, .. } => Ok(()),
            Io::Fd(tap) => {
                tap.receive(burst, &self.counters);
                Ok(())
            }
            Io::Xdp(xdp) => Ok(xdp.receive(burst, &self.counters)?),
        }
    }

    /// Gives back what the last burst was in.
    #[inline]
    pub fn done(&mut self) {
        match &mut self.io {
            Io::Vhost { rx: Some(rx), .. } => rx.done(&self.counters),
            Io::Xdp(xdp) => xdp.done(),
            _ => {}
        }
    }

    /// Asks to be woken. `true` if there is something to do meanwhile.
    pub fn enable_kicks(&mut self) -> bool {
        match &mut self.io {
            Io::Vhost { rx: Some(rx), .. } => rx.enable_kicks(),
            Io::Xdp(xdp) => xdp.before_sleep(&self.counters),
            _ => false,
        }
    }

    /// Asks not to be woken.
    pub fn disable_kicks(&mut self) {
        if let Io::Vhost { rx: Some(rx), .. } = &mut self.io {
            rx.disable_kicks();
        }
    }
}
