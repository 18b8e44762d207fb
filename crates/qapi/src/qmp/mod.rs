//! QMP: JSON commands in, replies and events out.
//!
//! - [`scanner`]: finds whole JSON values in a stream of bytes.
//! - [`session`]: [`QmpSession`], one client's conversation with no socket or thread inside.
//! - `strict`: JSON without duplicate keys.

pub mod scanner;
pub mod session;
pub(crate) mod strict;

pub use session::{QmpSession, Request, Step};
