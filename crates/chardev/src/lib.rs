//! Character devices: a byte stream in and out of the VM, under QEMU's `-chardev` names.
//!
//! A [`Chardev`] is the back end (stdio, pty, file, socket, null, mux); a [`Frontend`] is what in
//! the VM it is connected to (a serial port, a monitor). Each back end has a thread of its own:
//! a client that stalls or dies harms nobody else.

use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What a chardev is connected to. Called on the chardev's thread; must not block for long.
pub trait Frontend: Send + Sync {
    /// How many bytes it takes now; 0 stops reading until [`Chardev::resume_input`].
    fn can_receive(&self) -> usize;
    /// Bytes came in, at most [`can_receive`](Self::can_receive), with any fds passed along.
    fn receive(&self, data: &[u8], fds: Vec<OwnedFd>);
    /// A client connected (for stdio, file, null: once at the start).
    fn opened(&self);
    /// The client went away.
    fn closed(&self);
}

/// A character back end.
pub trait Chardev: Send + Sync {
    /// Its id.
    fn label(&self) -> &str;
    /// As `query-chardev` shows it: "pty:/dev/pts/3", "unix:/path,server=on", ...
    fn filename(&self) -> String;
    /// Whether a front end is connected and open.
    fn frontend_open(&self) -> bool;
    /// Connects the front end (one; a mux takes several) and begins to read.
    fn connect(&self, frontend: Arc<dyn Frontend>);
    /// Sends bytes to the client. Never blocks: what exceeds the bounded queue of a client that
    /// does not read is dropped for a serial port's stream. Returns how many bytes were taken.
    fn write(&self, data: &[u8]) -> usize;
    /// The front end has room again.
    fn resume_input(&self);
    /// Closes the current client's connection; a server goes on to listen.
    fn disconnect(&self);
}
