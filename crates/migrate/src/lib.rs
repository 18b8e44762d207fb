//! Live migration: the session state machine, the planner of memory rounds, the wire, channels.
//!
//! - [`endpoint`]: [`Endpoint`], what a migration needs of the machine; implemented by `vmm`.

pub mod endpoint;

pub use endpoint::{Endpoint, Preamble};
