//! The migration protocol as two state machines: [`Source`] and [`Dest`]. No socket, clock or
//! thread inside: a driver feeds what happened into `step` and does what comes out, in order.
//!
//! The hand-off is built on output commit. The destination runs the guest *held* (nothing outside
//! its process can see it) from go on, and lets its output out only on release; the source never
//! resumes once it has sent release, and the destination never lets out before. So whatever is
//! lost in between, at most one guest is ever visible. docs/migration.md has the diagrams.
//!
//! Invariants, which `tests` check with every message cut:
//! - never two machines that run with their output released;
//! - a machine that runs holds the locks;
//! - in the end exactly one runs, or none and that is reported.

pub mod dest;
pub mod source;
#[cfg(test)]
mod tests;

pub use dest::Dest;
pub use source::Source;

use std::time::Duration;

/// How long a peer may take to answer a greeting.
pub const HELLO_PATIENCE: Duration = Duration::from_secs(10);
/// How long a destination may take to look at the preamble and to prepare its memory.
pub const PREPARE_PATIENCE: Duration = Duration::from_secs(120);
/// How long the guest may stand still for a peer that does not answer, before go.
pub const STOPPED_PATIENCE: Duration = Duration::from_secs(30);
/// How long a source tries to ask a destination that it lost after go, before it tells its operator
/// that it is in doubt.
pub const RESOLVE_PATIENCE: Duration = Duration::from_secs(10);
/// How long a destination waits for that, until its operator may decide or, where nothing runs yet,
/// it gives up: longer than a source takes to notice a silence ([`RESOLVE_PATIENCE`]) and then to
/// ask, so that a source that is not in doubt yet has nobody's word to fear but the destination's.
pub const ASKED_PATIENCE: Duration = Duration::from_secs(25);
/// How long a source in doubt waits for an answer before it asks on another connection.
pub const ASK_AGAIN: Duration = Duration::from_secs(30);
/// How long connecting, and then the answer, may take once the operator insists.
pub const LAST_ASK: Duration = Duration::from_secs(3);
