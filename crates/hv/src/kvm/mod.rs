//! KVM behind [`Vm`](crate::Vm) and [`Vcpu`](crate::Vcpu).
//!
//! - [`vm`]: the VM, its memory slots, interrupts, doorbells.
//! - [`vcpu`]: one vCPU: the run loop's values in and out, kicks.
//! - [`boot`]: register states to start from.
//! - [`dirty`]: the dirty log.
//! - [`state`], [`irqchip`], [`clock`]: what is saved and restored.
//! - [`sys`]: ioctls that kvm-ioctls lacks.
//!
//! Invariants: a memory slot's number is its region's index; slots are set once and afterwards
//! only their logging flag changes; everything that a guest or a saved state can choose is
//! checked before it reaches an ioctl with a length in it.

mod boot;
mod clock;
mod describe;
mod dirty;
mod irqchip;
mod kick;
mod msrs;
mod plain;
mod state;
#[cfg(test)]
mod state_tests;
mod sys;
mod vcpu;
mod vm;

pub use boot::{FLAT_GDT_ENTRIES, flat_gdt};
pub use vcpu::KvmVcpu;
pub use vm::{DEFAULT_PATH, KvmVm};

/// Wraps an errno of kvm-ioctls with what was tried.
fn os(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> crate::Error {
    move |e| crate::Error::Os { what, source: std::io::Error::from_raw_os_error(e.errno()) }
}

/// Wraps an I/O error with what was tried.
fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> crate::Error {
    move |source| crate::Error::Os { what, source }
}
