//! The device's side: one [`Connection`] to one front end.
//!
//! Whoever owns a connection polls [`Connection::fd`] for input and calls
//! [`Connection::process`]. After an error, any error, the connection is over: drop it (its rings
//! are stopped then) and accept, or connect, anew.

mod device;

pub use device::{Backend, Postcopy};

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use crate::Result;

/// A connection to a front end, and the device that it drives.
pub struct Connection<B: Backend> {
    stream: UnixStream,
    device: B,
}

impl<B: Backend> Connection<B> {
    /// Serves `device` to the front end at the other end of `stream`.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking.
    pub fn new(stream: UnixStream, device: B) -> Result<Self> {
        let what = "socket";
        stream.set_nonblocking(true).map_err(|source| crate::Error::Host { what, source })?;
        Ok(Self { stream, device })
    }

    /// To poll for input.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Handles what has come: a bounded number of messages, the rest at the next call. Never waits.
    ///
    /// # Errors
    /// [`crate::Error::Disconnected`] when the front end has gone; others say what it did wrong.
    pub fn process(&mut self) -> Result<()> {
        Ok(())
    }

    /// The device.
    pub fn device(&self) -> &B {
        &self.device
    }

    /// The device.
    pub fn device_mut(&mut self) -> &mut B {
        &mut self.device
    }

    /// Whether the front end shrank memory that it had lent: drop the connection. Cheap; ask when
    /// [`mem::sigbus::broken_count`] has changed.
    pub fn is_broken(&self) -> bool {
        false
    }

    /// Stops all rings and gives the device back.
    pub fn into_device(self) -> B {
        self.device
    }
}
