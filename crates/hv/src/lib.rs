//! The hypervisor: [`Vm`] and [`Vcpu`], plain values in and out, and KVM behind them.
#![allow(unsafe_code)] // ioctls

pub mod cpu;
pub mod kvm;
pub mod probe;
pub mod traits;

pub use kvm::{KvmVcpu, KvmVm};
pub use traits::*;
