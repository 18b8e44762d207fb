//! The description of a virtual machine as plain data: what it consists of, no behaviour.
//! QEMU's command line is parsed into it (`qapi`), and a machine is built from it (`vmm`).
//!
//! - [`machine`]: [`Machine`] and its parts.

pub mod machine;

pub use machine::*;
