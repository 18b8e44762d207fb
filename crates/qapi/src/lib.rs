//! QEMU's languages: QMP and HMP servers, events, the command line's option grammar.
//!
//! - [`command`]: [`Commands`], what a monitor needs of the machine; implemented by `vmm`.

pub mod command;

pub use command::{ClientFds, Commands, Error, ErrorClass};
