//! The hypervisor: [`Vm`] and [`Vcpu`], plain values in and out, and KVM behind them.
#![allow(unsafe_code)] // ioctls

pub mod traits;

pub use traits::*;
