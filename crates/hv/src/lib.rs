//! The hypervisor: [`Vm`] and [`Vcpu`], plain values in and out, and KVM behind them.
//!
//! - [`traits`]: what the rest of Tern knows of a hypervisor.
//! - [`kvm`]: KVM behind it.
//! - [`cpu`]: what CPUID says to a guest.
//! - [`probe`]: can this host's KVM run Linux?
//! - [`host`]: what a host has of what Tern needs.
#![allow(unsafe_code)] // ioctls

pub mod cpu;
pub mod host;
pub mod kvm;
pub mod probe;
pub mod traits;

pub use kvm::{KvmVcpu, KvmVm};
pub use traits::*;
