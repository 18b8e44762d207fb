//! Features and configuration space (VIRTIO 1.2, sections 5.1.3 and 5.1.4).

use net::Offloads;
use virtio::features::{
    VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, has, mask,
};

use super::NetConfig;
use super::shared::Shared;

pub(super) const VIRTIO_NET_F_CSUM: u32 = 0;
pub(super) const VIRTIO_NET_F_GUEST_CSUM: u32 = 1;
pub(super) const VIRTIO_NET_F_MTU: u32 = 3;
pub(super) const VIRTIO_NET_F_MAC: u32 = 5;
pub(super) const VIRTIO_NET_F_GUEST_TSO4: u32 = 7;
pub(super) const VIRTIO_NET_F_GUEST_TSO6: u32 = 8;
pub(super) const VIRTIO_NET_F_GUEST_ECN: u32 = 9;
pub(super) const VIRTIO_NET_F_HOST_TSO4: u32 = 11;
pub(super) const VIRTIO_NET_F_HOST_TSO6: u32 = 12;
pub(super) const VIRTIO_NET_F_HOST_ECN: u32 = 13;
pub(super) const VIRTIO_NET_F_MRG_RXBUF: u32 = 15;
pub(super) const VIRTIO_NET_F_STATUS: u32 = 16;
pub(super) const VIRTIO_NET_F_CTRL_VQ: u32 = 17;
pub(super) const VIRTIO_NET_F_CTRL_RX: u32 = 18;
pub(super) const VIRTIO_NET_F_CTRL_RX_EXTRA: u32 = 20;
pub(super) const VIRTIO_NET_F_GUEST_ANNOUNCE: u32 = 21;
pub(super) const VIRTIO_NET_F_MQ: u32 = 22;
pub(super) const VIRTIO_NET_F_CTRL_MAC_ADDR: u32 = 23;

/// Bytes of configuration space.
pub(super) const CONFIG_LEN: usize = 12;
pub(super) const CONTROL_QUEUE_SIZE: u16 = 64;
const STATUS_LINK_UP: u16 = 1;
const STATUS_ANNOUNCE: u16 = 2;

pub(super) fn offered(config: &NetConfig, can: Offloads, pairs: usize) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        VIRTIO_F_INDIRECT_DESC,
        VIRTIO_F_EVENT_IDX,
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_STATUS,
        VIRTIO_NET_F_CTRL_VQ,
        VIRTIO_NET_F_CTRL_RX,
        VIRTIO_NET_F_CTRL_RX_EXTRA,
        VIRTIO_NET_F_GUEST_ANNOUNCE,
        VIRTIO_NET_F_CTRL_MAC_ADDR,
    ];
    let optional: &[(bool, &[u32])] = &[
        (can.csum, &[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM]),
        (can.csum && can.tso4, &[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4]),
        (can.csum && can.tso6, &[VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO6]),
        (can.csum && can.ecn, &[VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_HOST_ECN]),
        (config.host_mtu.is_some(), &[VIRTIO_NET_F_MTU]),
        (pairs > 1, &[VIRTIO_NET_F_MQ]),
        (config.packed, &[VIRTIO_F_RING_PACKED]),
    ];
    for (on, more) in optional {
        if *on {
            bits.extend(*more);
        }
    }
    bits.into_iter().map(mask).sum()
}

/// What a driver with these features can be given. Segmentation needs the checksum
/// (section 5.1.3.1).
pub(super) fn guest_offloads(features: u64) -> Offloads {
    let csum = has(features, VIRTIO_NET_F_GUEST_CSUM);
    let tso4 = csum && has(features, VIRTIO_NET_F_GUEST_TSO4);
    let tso6 = csum && has(features, VIRTIO_NET_F_GUEST_TSO6);
    let ecn = (tso4 || tso6) && has(features, VIRTIO_NET_F_GUEST_ECN);
    Offloads { csum, tso4, tso6, ecn, ufo: false }
}

pub(super) fn config_space(shared: &Shared, config: &NetConfig, pairs: usize) -> [u8; CONFIG_LEN] {
    let mut space = [0; CONFIG_LEN];
    space[0..6].copy_from_slice(&shared.filter.load().mac);
    let mut status = 0;
    if shared.link.load(std::sync::atomic::Ordering::Acquire) {
        status |= STATUS_LINK_UP;
    }
    if shared.announcing.load(std::sync::atomic::Ordering::Acquire) {
        status |= STATUS_ANNOUNCE;
    }
    space[6..8].copy_from_slice(&status.to_le_bytes());
    space[8..10].copy_from_slice(&(pairs as u16).to_le_bytes());
    space[10..12].copy_from_slice(&config.host_mtu.unwrap_or(0).to_le_bytes());
    space
}
