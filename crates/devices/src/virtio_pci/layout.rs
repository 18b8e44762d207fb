//! Where a virtio function keeps what: ids, capabilities, BARs. The places are those of QEMU's
//! modern functions, which firmware and drivers have seen most.

use virtio::DeviceTraits;
use virtio::features::device_id;

use crate::pci::{ConfigSpace, Ident, Msix, MsixLayout};

/// The BAR with the virtio structures.
pub const BAR: u8 = 4;
/// Bytes of [`BAR`].
pub const BAR_SIZE: u64 = 0x4000;
/// The BAR with the MSI-X table.
pub const MSIX_BAR: u8 = 1;
/// Bytes of each region in [`BAR`].
pub const REGION: u64 = 0x1000;
/// Common configuration, in [`BAR`].
pub const COMMON: u64 = 0;
/// ISR status.
pub const ISR: u64 = 0x1000;
/// Device-specific configuration.
pub const DEVICE: u64 = 0x2000;
/// Doorbells: queue `n` at `n * NOTIFY_MULTIPLIER`.
pub const NOTIFY: u64 = 0x3000;
/// Bytes between doorbells.
pub const NOTIFY_MULTIPLIER: u32 = 4;
/// "No vector" in the vector registers.
pub const NO_VECTOR: u16 = 0xffff;

const VENDOR_CAPABILITY: u8 = 0x09;
const EXPRESS_CAPABILITY: u8 = 0x10;

/// Offsets in the common configuration (VIRTIO 1.2, section 4.1.4.3).
pub mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_VECTOR: u64 = 16;
    pub const NUM_QUEUES: u64 = 18;
    pub const STATUS: u64 = 20;
    pub const GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
    pub const QUEUE_NOTIFY_DATA: u64 = 56;
    pub const QUEUE_RESET: u64 = 58;
    /// Bytes in all.
    pub const LEN: usize = 60;
}

/// PCI ids of a device type (VIRTIO 1.2, section 4.1.2).
pub fn ident(device_type: u16) -> Ident {
    Ident {
        vendor: 0x1af4,
        device: 0x1040 + device_type,
        revision: 1,
        class: class(device_type),
        subsystem: (0x1af4, 0x1100),
    }
}

fn class(device_type: u16) -> u32 {
    match device_type {
        device_id::NET => 0x02_00_00,
        device_id::BLOCK | device_id::SCSI => 0x01_00_00,
        device_id::CONSOLE => 0x07_80_00,
        device_id::GPU => 0x03_80_00,
        device_id::INPUT => 0x09_80_00,
        device_id::VSOCK => 0x07_80_00,
        _ => 0x00_ff_00,
    }
}

/// QEMU's name for the function.
pub fn type_name(device_type: u16) -> &'static str {
    match device_type {
        device_id::NET => "virtio-net-pci",
        device_id::BLOCK => "virtio-blk-pci",
        device_id::CONSOLE => "virtio-serial-pci",
        device_id::ENTROPY => "virtio-rng-pci",
        device_id::BALLOON => "virtio-balloon-pci",
        device_id::SCSI => "virtio-scsi-pci",
        device_id::GPU => "virtio-gpu-pci",
        device_id::INPUT => "virtio-input-pci",
        device_id::VSOCK => "vhost-vsock-pci",
        _ => "virtio-pci",
    }
}

/// Adds the five virtio capabilities (VIRTIO 1.2, section 4.1.4). Returns where the one for access
/// through configuration space is.
pub fn add_capabilities(config: &mut ConfigSpace, traits: &DeviceTraits) -> usize {
    let body = |kind: u8, offset: u64, len: u64, extra: Option<u32>| {
        let bytes = 16 + if extra.is_some() { 4 } else { 0 };
        let bar = if kind == 5 { 0 } else { BAR };
        let mut b = vec![bytes, kind, bar, 0, 0, 0];
        b.extend((offset as u32).to_le_bytes());
        b.extend((len as u32).to_le_bytes());
        b.extend(extra.map(u32::to_le_bytes).into_iter().flatten());
        b
    };
    let queues = traits.queue_sizes.len().max(1) as u64;
    let doorbells = queues * u64::from(NOTIFY_MULTIPLIER);
    let mut add = |b: &[u8], w: &[u8]| config.add_capability(VENDOR_CAPABILITY, b, w);
    add(&body(1, COMMON, REGION, None), &[]);
    add(&body(3, ISR, REGION, None), &[]);
    if traits.config_len > 0 {
        add(&body(4, DEVICE, REGION, None), &[]);
    }
    add(&body(2, NOTIFY, doorbells, Some(NOTIFY_MULTIPLIER)), &[]);
    // The guest chooses BAR, offset and length, and reads or writes the data.
    let mut writable = [0; 18];
    writable[2] = 0xff;
    writable[6..18].fill(0xff);
    usize::from(add(&body(5, 0, 0, Some(0)), &writable))
}

/// MSI-X's place for `vectors` vectors, and the size of its BAR.
pub fn msix(vectors: u16) -> (MsixLayout, u64) {
    let table = Msix::table_bytes(vectors.into());
    let pending = table.max(0x800);
    let size = (pending + Msix::pending_bytes(vectors.into())).next_power_of_two().max(0x1000);
    (MsixLayout { bar: MSIX_BAR, table: 0, pending: pending as u32 }, size)
}

/// Adds a PCI Express capability: version 2, endpoint, a link of one lane at 2.5 GT/s
/// (PCI Express Base 5.0, section 7.5.3).
pub fn add_express(config: &mut ConfigSpace) {
    let mut body = [0; 0x3a];
    let mut writable = [0; 0x3a];
    body[0] = 0x02; // version 2, endpoint
    body[3] = 0x80; // role-based error reporting
    // Device control: error reporting enables, relaxed ordering, payload and read request sizes.
    writable[6..8].copy_from_slice(&0x70ff_u16.to_le_bytes());
    body[10] = 0x11; // link capabilities: 2.5 GT/s, x1
    body[16] = 0x11; // link status: the same
    config.add_capability(EXPRESS_CAPABILITY, &body, &writable);
}
