//! QMP: JSON commands in, replies and events out.
//!
//! - [`scanner`]: finds whole JSON values in a stream of bytes.
//! - [`session`]: [`QmpSession`], one client's conversation with no socket or thread inside.
//! - `spaced`: JSON as QEMU writes it on a line.
//! - `strict`: JSON without duplicate keys.

pub mod scanner;
pub mod session;
pub(crate) mod spaced;
pub(crate) mod strict;

pub use session::{QmpSession, Request, Step};
