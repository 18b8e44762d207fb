//! vhost-user: a virtio device that lives in another process than its VM.
//! Source: QEMU's "Vhost-user Protocol" (docs/interop/vhost-user.rst), with what QEMU, libvhost-user
//! and DPDK do where that leaves room.
//!
//! - [`backend`]: the device's side. [`backend::Connection`] talks to one front end and drives a
//!   [`backend::Backend`].
//! - [`frontend`]: the VM's side. [`frontend::Frontend`] talks to one back end and sets it up
//!   again when it was restarted.
//! - [`message`]: the wire, with its validity checks.
//! - [`protocol`]: feature bits that the protocol fixes.
//! - `testing`: peers that lie (feature `testing`).
//! - `lent_event`, `aio_signal`: interrupting the other side, whatever it did to the eventfd.
//! - `socket`: messages and descriptors over a socket.
//!
//! Left out, and refused by name: IOMMU messages, in-band notifications, crypto sessions, Xen
//! memory, shared objects, device state, rings of the other endianness, hardware doorbells.

mod aio_signal;
pub mod backend;
pub mod frontend;
mod lent_event;
pub mod message;
pub mod protocol;
mod socket;
#[cfg(feature = "testing")]
pub mod testing;

pub use backend::{Backend, Connection};
pub use frontend::Frontend;

/// What ends a connection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The other side closed the socket. No fault by itself.
    #[error("the other side closed the vhost-user socket")]
    Disconnected,
    /// The other side broke the protocol.
    #[error("vhost-user {message}: {reason}")]
    Protocol {
        /// The message's name in the specification.
        message: &'static str,
        /// Which field, what it is, what was expected.
        reason: String,
    },
    /// The device behind the connection refused something that cannot be answered.
    #[error("vhost-user {message}: {reason}")]
    Device { message: &'static str, reason: String },
    /// The socket or the host failed.
    #[error("vhost-user {what}: {source}")]
    Host { what: &'static str, source: std::io::Error },
}

/// Shorthand for this crate's results.
pub type Result<T> = std::result::Result<T, Error>;
