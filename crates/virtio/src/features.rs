//! Numbers that the specification fixes: feature bits, device ids, status bits; and which
//! features a driver may accept. Source: VIRTIO 1.2, sections 2.1, 5 and 6.

/// The ring may use indirect descriptors.
pub const VIRTIO_F_INDIRECT_DESC: u32 = 28;
/// Notifications are suppressed by ring positions instead of by one flag.
pub const VIRTIO_F_EVENT_IDX: u32 = 29;
/// The device follows VIRTIO 1.0 or later. Always offered, always needed.
pub const VIRTIO_F_VERSION_1: u32 = 32;
/// Addresses go through the platform's IOMMU.
pub const VIRTIO_F_ACCESS_PLATFORM: u32 = 33;
/// Packed rings instead of split ones.
pub const VIRTIO_F_RING_PACKED: u32 = 34;
/// Buffers are used in the order in which they were made available.
pub const VIRTIO_F_IN_ORDER: u32 = 35;
/// The device wants the platform's memory ordering (real hardware).
pub const VIRTIO_F_ORDER_PLATFORM: u32 = 36;
/// SR-IOV.
pub const VIRTIO_F_SR_IOV: u32 = 37;
/// Kicks carry the ring position.
pub const VIRTIO_F_NOTIFICATION_DATA: u32 = 38;
/// Kicks carry a number chosen by the device.
pub const VIRTIO_F_NOTIF_CONFIG_DATA: u32 = 39;
/// One queue can be reset by itself.
pub const VIRTIO_F_RING_RESET: u32 = 40;

/// Device types (VIRTIO 1.2, section 5).
pub mod device_id {
    pub const NET: u16 = 1;
    pub const BLOCK: u16 = 2;
    pub const CONSOLE: u16 = 3;
    pub const ENTROPY: u16 = 4;
    pub const BALLOON: u16 = 5;
    pub const SCSI: u16 = 8;
    pub const GPU: u16 = 16;
    pub const INPUT: u16 = 18;
    pub const VSOCK: u16 = 19;
}

/// Device status bits (VIRTIO 1.2, section 2.1).
pub mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
    /// All bits that a driver may set.
    pub const DRIVER_BITS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// The mask of feature bit `bit`.
pub const fn mask(bit: u32) -> u64 {
    1 << bit
}

/// Whether `features` has bit `bit`.
pub const fn has(features: u64, bit: u32) -> bool {
    features & mask(bit) != 0
}

/// Why a driver's choice of features is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FeatureError {
    #[error("the driver accepted features that were not offered: {0:#x}")]
    NotOffered(u64),
    #[error("the driver did not accept VIRTIO_F_VERSION_1, and legacy drivers are not supported")]
    Legacy,
}

/// Checks what a driver accepted against what was offered (VIRTIO 1.2, section 2.2). Returns the
/// negotiated features.
///
/// # Errors
/// [`FeatureError`]; the device must then not confirm FEATURES_OK.
pub fn negotiate(offered: u64, accepted: u64) -> Result<u64, FeatureError> {
    if accepted & !offered != 0 {
        return Err(FeatureError::NotOffered(accepted & !offered));
    }
    if !has(accepted, VIRTIO_F_VERSION_1) {
        return Err(FeatureError::Legacy);
    }
    Ok(accepted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_offered_features_and_only_modern_drivers() {
        let offered = mask(VIRTIO_F_VERSION_1) | mask(VIRTIO_F_EVENT_IDX) | 1;
        assert_eq!(negotiate(offered, mask(VIRTIO_F_VERSION_1)), Ok(mask(VIRTIO_F_VERSION_1)));
        assert_eq!(negotiate(offered, 1), Err(FeatureError::Legacy));
        assert_eq!(negotiate(offered, offered | 2), Err(FeatureError::NotOffered(2)));
    }
}
