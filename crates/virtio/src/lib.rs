//! Virtio, apart from any transport: virtqueues, feature negotiation, the device trait.
//! Source: Virtual I/O Device (VIRTIO) Version 1.2.
//!
//! - [`device`]: [`VirtioDevice`], what a device is to whoever hosts it (PCI, a vhost-user back end).

pub mod device;

pub use device::{ConfigEvents, DeviceTraits, Interrupt, QueueIndex, RingPos, RingSetup, VirtioDevice};
