//! End-to-end tests with real guests.
//!
//! [`guest`] is the workload inside a guest (the binary `tern-guest` is its init); the rest is the
//! harness on the host: it starts VMMs, drives them over QMP, gives them a network, checks what the
//! guest does, and measures migrations. [`switch`] and [`netguest`] are the same for the switch, whose
//! guests run under QEMU's software CPU on the host itself.

pub mod bench;
mod error;
pub mod failure;
pub mod frames;
pub mod guest;
pub mod link;
pub mod loss;
pub mod migration;
pub mod netguest;
pub mod network;
pub mod pattern;
pub mod ping;
pub mod proxy;
pub mod qmp;
pub mod report;
pub mod svg;
pub mod switch;
pub mod testbed;
pub mod tiny;
pub mod vmm;

pub use error::{Error, Result};
