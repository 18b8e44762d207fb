//! A ring with its kick and call: what a device keeps for a started queue.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::{Chain, Ring, RingError};
use crate::device::{Interrupt, RingPos, RingSetup};

/// A started virtqueue.
pub struct Queue {
    /// The ring itself.
    pub ring: Ring,
    /// Written to by the driver. Non-blocking or not as the transport made it: wait for it with
    /// poll, then [`ack_kick`](Self::ack_kick).
    pub kick: EventFd,
    /// Interrupts the driver.
    pub call: Arc<dyn Interrupt>,
}

impl Queue {
    /// Takes a queue over from the transport.
    ///
    /// # Errors
    /// As [`Ring::new`].
    pub fn new(setup: RingSetup) -> Result<Self, RingError> {
        let ring = Ring::new(&setup)?;
        Ok(Self { ring, kick: setup.kick, call: setup.call })
    }

    /// As [`Ring::pop`].
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        self.ring.pop(chain)
    }

    /// As [`Ring::push`].
    #[inline]
    pub fn push(&mut self, chain: &Chain, written: u32) {
        self.ring.push(chain, written);
    }

    /// Publishes what was pushed and interrupts the driver if it wants that.
    #[inline]
    pub fn flush(&mut self) {
        self.ring.publish();
        if self.ring.needs_notification() {
            self.call.notify();
        }
    }

    /// Takes pending kicks off the eventfd, after poll said that there is one.
    pub fn ack_kick(&self) {
        // Nothing there (a spurious wake-up) is no error worth a word.
        let _ = self.kick.read();
    }

    /// Publishes and interrupts for what was pushed, and tells where the ring stands.
    pub fn stop(mut self) -> RingPos {
        self.flush();
        self.ring.position()
    }
}
