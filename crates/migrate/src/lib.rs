//! Live migration: the session state machine, the planner of memory rounds, the wire, channels.
//!
//! What others use:
//! - [`endpoint`]: [`Endpoint`], what a migration needs of the machine; implemented by `vmm`.
//! - [`source`]: [`source::start`], the driver of the sending side, and its [`source::Handle`].
//! - [`dest`]: [`dest::listen`], the driver of the receiving side, and its [`dest::Incoming`].
//! - [`uri`]: [`Uri`], where a migration goes to or comes from.
//! - [`params`]: [`Parameters`], the limits, which may change while a migration runs.
//! - [`info`]: [`MigrationInfo`], what `query-migrate` says, and the trace.
//! - [`events`]: [`Events`], what is told while it happens.
//!
//! Inside, lowest first: `zero` (finding zero pages), `wire` (control frames), `ram` (RAM frames),
//! `pending` (which pages the peer has not acknowledged), `planner` (when to stop the guest),
//! `session` (the protocol with no socket, clock or thread), `channel` (sockets), `greeter` (connections
//! that have said nothing yet), `control` (what both drivers do alike), `sender`
//! and `receiver` (RAM streams), `stats`.

mod ahead;
mod channel;
mod control;
pub mod dest;
pub mod endpoint;
pub mod events;
mod greeter;
pub mod info;
mod pace;
pub mod params;
mod pending;
pub mod planner;
mod populated;
pub mod ram;
pub mod receiver;
mod sender;
pub mod session;
pub mod source;
mod stats;
pub mod uri;
pub mod wire;
mod zero;

pub use endpoint::{DeviceSpec, Endpoint, LateFrame, Preamble};
pub use events::{Events, NoEvents};
pub use info::{MigrationInfo, Status};
pub use params::Parameters;
pub use uri::Uri;

/// What can go wrong with a migration. Each message is a sentence for the operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A URI that cannot be understood, or of a kind that is not offered.
    #[error("{0}")]
    Uri(String),
    /// The peer cannot be reached, or the address not be listened on.
    #[error("{0}")]
    Connect(String),
    /// This machine has something that cannot be migrated now.
    #[error("this machine cannot be migrated: {}", .0.join("; "))]
    Blocked(Vec<String>),
    /// The destination does not fit; nothing of memory has moved.
    #[error("the destination refuses this machine: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// The peer sent what the protocol does not allow.
    #[error("the peer broke the migration protocol: {0}")]
    Protocol(String),
    /// A connection ended or stalled.
    #[error("{0}")]
    Lost(String),
    /// The machine at this end could not do its part.
    #[error("{0}")]
    Machine(String),
    /// The machine at the other end could not do its part.
    #[error("the other side failed: {0}")]
    Peer(String),
    /// `migrate_cancel`.
    #[error("the migration was cancelled")]
    Cancelled,
    /// After go, and the destination cannot be asked: the guest may run there. Only the operator
    /// can decide.
    #[error("{0}")]
    Unknown(String),
}

/// Shorthand for this crate's results.
pub type Result<T> = std::result::Result<T, Error>;
