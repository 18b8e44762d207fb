//! What a device needs of the interrupt controller and of the bus's fast path. `vmm` implements
//! these over the hypervisor; tests implement them with counters.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// An interrupt line (ISA, PCI INTx). Several devices may share a pin: each has a line of its own, and
/// the pin is up while any of them is.
pub trait IrqLine: Send + Sync {
    /// Sets its level.
    fn set(&self, level: bool);
}

/// One MSI or MSI-X vector of a device.
pub trait MsiVector: Send + Sync {
    /// Sends the message of the current route.
    fn trigger(&self);
    /// Where messages go from now on; `None`: masked, nothing is sent (the MSI-X table keeps the
    /// pending bit).
    fn route(&self, message: Option<(u64, u32)>);
    /// Triggers when written to (irqfd), for back ends outside the process or in the kernel.
    fn eventfd(&self) -> Option<EventFd>;
}

/// Makes MSI vectors.
pub trait MsiAllocator: Send + Sync {
    /// `count` vectors, masked.
    fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiVector>>, String>;
}

/// Where a doorbell (ioeventfd) is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DoorbellAddress {
    Port(u16),
    Mmio(u64),
}

/// Guest writes that signal an eventfd without leaving the kernel.
pub trait Doorbells: Send + Sync {
    /// Signals `fd` on writes to `address`.
    fn register(
        &self,
        fd: &EventFd,
        address: DoorbellAddress,
        datamatch: Option<u32>,
    ) -> Result<(), String>;
    /// Undoes [`register`](Self::register).
    fn unregister(&self, fd: &EventFd, address: DoorbellAddress, datamatch: Option<u32>);
}
