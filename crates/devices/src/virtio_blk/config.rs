//! Features and configuration space (VIRTIO 1.2, sections 5.2.3 and 5.2.4).

use std::sync::atomic::Ordering;

use virtio::features::{
    VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, mask,
};

use super::{BlkConfig, Shared};

pub(super) const VIRTIO_BLK_F_SEG_MAX: u32 = 2;
pub(super) const VIRTIO_BLK_F_RO: u32 = 5;
pub(super) const VIRTIO_BLK_F_BLK_SIZE: u32 = 6;
pub(super) const VIRTIO_BLK_F_FLUSH: u32 = 9;
pub(super) const VIRTIO_BLK_F_TOPOLOGY: u32 = 10;
pub(super) const VIRTIO_BLK_F_CONFIG_WCE: u32 = 11;
pub(super) const VIRTIO_BLK_F_MQ: u32 = 12;
pub(super) const VIRTIO_BLK_F_DISCARD: u32 = 13;
pub(super) const VIRTIO_BLK_F_WRITE_ZEROES: u32 = 14;

/// Bytes of configuration space.
pub(super) const CONFIG_LEN: usize = 60;
/// Where `writeback` is.
pub(super) const WRITEBACK_OFFSET: usize = 32;
/// Most sectors in one discard: 2 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 4 << 20;
/// Most sectors in one write-zeroes: 64 MiB, as they may have to be written one by one.
pub(super) const MAX_ZERO_SECTORS: u32 = 128 << 10;

pub(super) fn offered(queues: u16, read_only: bool, packed: bool) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        VIRTIO_F_INDIRECT_DESC,
        VIRTIO_F_EVENT_IDX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_CONFIG_WCE,
    ];
    if read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    if queues > 1 {
        bits.push(VIRTIO_BLK_F_MQ);
    }
    if packed {
        bits.push(VIRTIO_F_RING_PACKED);
    }
    bits.into_iter().map(mask).sum()
}

pub(super) fn config_space(shared: &Shared, config: &BlkConfig) -> [u8; CONFIG_LEN] {
    let t = shared.disk.topology();
    let mut space = [0; CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &shared.sectors().to_le_bytes());
    // Header and status take one each.
    put(12, &u32::from(config.queue_size - 2).to_le_bytes());
    put(20, &t.logical.to_le_bytes());
    let per_physical = (t.physical / t.logical).max(1);
    put(24, &[per_physical.ilog2() as u8, 0]);
    put(26, &u16::try_from(per_physical).unwrap_or(u16::MAX).to_le_bytes());
    put(28, &(t.optimal / t.logical).to_le_bytes());
    put(WRITEBACK_OFFSET, &[u8::from(shared.writeback.load(Ordering::Acquire))]);
    put(34, &config.num_queues.to_le_bytes());
    if !shared.disk.read_only() {
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &(t.discard / 512).max(1).to_le_bytes());
        put(48, &MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[u8::from(shared.disk.unmap())]);
    }
    space
}
