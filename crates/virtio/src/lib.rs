//! Virtio, apart from any transport: virtqueues, feature negotiation, the device trait.
//! Source: Virtual I/O Device (VIRTIO) Version 1.2.
//!
//! - [`device`]: [`VirtioDevice`], what a device is to whoever hosts it (PCI, a vhost-user back end).
//! - [`ring`]: [`Ring`], the device side of virtqueues, and [`Chain`], one chain of buffers.
//! - [`features`]: feature bits, device ids, status bits, negotiation.
//! - `testing`: the driver's side of rings, for tests (feature `testing`).

pub mod device;
pub mod features;
pub mod ring;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use device::{
    ConfigEvents, DeviceTraits, Interrupt, LateInput, QueueIndex, RingPos, RingSetup, VirtioDevice,
};
pub use ring::{Chain, InflightQueue, Queue, Ring, RingError};
