//! Network back ends of a NIC, one object a queue pair, and the frames that announce a guest.
//!
//! - [`backend`]: [`Backend`], what a NIC needs of the network behind it.
//! - [`af_xdp`]: [`XdpInterface`], an interface of the host by AF_XDP sockets.
//! - [`af_packet`]: [`PacketSocket`], an interface of the host by packet sockets.
//! - [`tap`]: [`Tap`], the kernel's tap device.
//! - [`interface`]: what the kernel says of an interface.
//! - [`announce`]: RARP and gratuitous ARP.

pub mod af_packet;
pub mod af_xdp;
pub mod announce;
pub mod backend;
pub mod interface;
pub mod tap;

pub use af_packet::PacketSocket;
pub use af_xdp::{XdpInterface, XdpMode, XdpSocket};
pub use backend::{Backend, Offloads};
pub use tap::{Tap, TapOptions, TapWatch};

/// Bytes of the virtio-net header in front of every frame (VIRTIO 1.2, section 5.1.6).
pub const HEADER: usize = 12;

/// A MAC address.
pub type Mac = [u8; 6];

/// What can go wrong with a back end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// /dev/net/tun cannot be opened.
    #[error("cannot open /dev/net/tun: {source}; {advice}")]
    NoTun { source: std::io::Error, advice: &'static str },
    /// The interface cannot be made or attached to.
    #[error("cannot use tap interface '{name}': {source}; {advice}")]
    Attach { name: String, source: std::io::Error, advice: &'static str },
    /// A setting of the interface was refused.
    #[error("tap interface '{name}': cannot {what}: {source}")]
    Setting { name: String, what: &'static str, source: std::io::Error },
    /// A packet socket on an interface.
    #[error("interface '{name}': cannot {what}: {source}")]
    Interface { name: String, what: &'static str, source: std::io::Error },
    /// XDP on an interface.
    #[error("interface '{name}': cannot {what}: {source}{advice}")]
    Xdp { name: String, what: String, source: std::io::Error, advice: &'static str },
    /// An option that cannot be.
    #[error("{0}")]
    Option(String),
    /// An up or down script failed.
    #[error("network script '{script}' for '{name}' failed: {reason}")]
    Script { script: String, name: String, reason: String },
}

/// Shorthand for this crate's results.
pub type Result<T> = std::result::Result<T, Error>;
