//! Devices: PCI and PCIe root ports, the chipset, serial, RTC, virtio over PCI, virtio-net, -blk
//! and -rng. No device knows the hypervisor: what it needs of it are the small traits of [`irq`].
//!
//! - [`bus`]: what a device on an I/O bus is, and the bus.
//! - [`irq`]: interrupt lines, MSI vectors, doorbells; implemented by `vmm`.
//! - [`pci`]: functions, configuration space, MSI-X, the root, root ports.
//! - [`virtio_blk`], [`virtio_net`], [`virtio_rng`]: the virtio devices.
//! - [`chipset`], [`acpi_pm`], [`i8042`], [`rtc`], [`serial`], [`debugcon`]: what a PC has.
//! - [`shared`]: devices behind an `Arc` as units of the machine.
//! - [`virtio_pci`]: any virtio device as a PCI function.

pub mod acpi_pm;
pub mod bus;
pub mod chipset;
pub mod debugcon;
pub mod i8042;
pub mod irq;
pub mod pci;
pub mod rtc;
pub mod serial;
pub mod shared;
#[cfg(test)]
mod testing;
mod timer;
pub mod virtio_blk;
pub mod virtio_net;
pub mod virtio_pci;
pub mod virtio_rng;
mod virtio_worker;
