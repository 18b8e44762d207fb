//! Asking a destination that was lost at the hand-over how it stands: the new connection.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Driver;
use crate::channel;
use crate::session::source::Input;
use crate::session::{LAST_ASK, RESOLVE_PATIENCE};

/// How long a single try to connect may take in doubt: a network that is back is seen after it.
const TRY: Duration = Duration::from_secs(5);
/// How long to wait between two tries that have an end, and between two in doubt.
const BETWEEN: Duration = Duration::from_millis(100);
const BREATH: Duration = Duration::from_secs(1);
/// How often a wait looks whether the operator insists.
const SLICE: Duration = Duration::from_millis(20);

impl Driver {
    /// Connects to the same address again. Nobody waits for its end in doubt, except an operator
    /// who insists.
    pub(super) fn reconnect(&mut self) -> Input {
        if let Some(old) = self.inner.control.lock().take() {
            old.shutdown();
        }
        let first = *self.first_loss.get_or_insert_with(Instant::now);
        let nth = self.reconnects;
        self.reconnects += 1;
        if nth == 0 {
            let address = &self.address;
            tracing::warn!("connection lost at the hand-over; asking {address} how it stands");
        }
        if self.session.is_insisted() {
            return self.connect_until(Instant::now() + LAST_ASK);
        }
        if self.session.in_doubt() {
            return self.connect_in_doubt();
        }
        std::thread::sleep(pause_before(nth));
        self.connect_until(first + RESOLVE_PATIENCE)
    }

    fn connect_until(&mut self, deadline: Instant) -> Input {
        while Instant::now() < deadline {
            if let Some(input) = self.try_to_connect(deadline, &|| false) {
                return input;
            }
            std::thread::sleep(BETWEEN);
        }
        Input::Timeout
    }

    fn connect_in_doubt(&mut self) -> Input {
        let inner = self.inner.clone();
        let insisted = || inner.insisted.load(Ordering::Acquire);
        loop {
            let breath = Instant::now() + BREATH;
            while Instant::now() < breath {
                if insisted() {
                    return Input::Insist;
                }
                std::thread::sleep(SLICE);
            }
            if let Some(input) = self.try_to_connect(Instant::now() + TRY, &insisted) {
                return input;
            }
        }
    }

    fn try_to_connect(&mut self, deadline: Instant, cancelled: &dyn Fn() -> bool) -> Option<Input> {
        match channel::connect_to(&self.address, deadline, cancelled) {
            Ok(control) => self.use_control(control).is_ok().then_some(Input::Reconnected),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => Some(Input::Gone),
            Err(e) => {
                tracing::debug!("{}: {e}", self.address);
                None
            }
        }
    }
}

/// How long to wait before the `nth` connection (from 0) of those that have an end. A path that takes connections
/// and closes them at once, as a forwarder with a dead other end does, must not use up all tries
/// within milliseconds: the losses that the session bears last about as long as its patience.
fn pause_before(nth: u32) -> Duration {
    match nth {
        0 => Duration::ZERO,
        n => Duration::from_millis(50) * (1 << (n - 1).min(4)),
    }
}
