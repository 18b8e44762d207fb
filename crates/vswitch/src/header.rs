//! The virtio-net header that goes in front of every frame (VIRTIO 1.2, section 5.1.6), and whether
//! what a sender wrote into it can be.

/// Bytes of the header with `num_buffers`: always for VERSION_1 drivers.
pub const HEADER_LEN: usize = 12;
/// Bytes without `num_buffers`: legacy drivers without mergeable buffers.
pub const LEGACY_HEADER_LEN: usize = 10;

/// `flags`: the checksum at `csum_start + csum_offset` has to be filled in.
pub const NEEDS_CSUM: u8 = 1;
/// `flags`: the sender has verified the checksum.
pub const DATA_VALID: u8 = 2;

/// `gso_type`: not a large segment.
pub const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// `gso_type`: with the congestion bit, beside one of the others.
pub const GSO_ECN: u8 = 0x80;

/// The header, its numbers in host order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VnetHeader {
    pub flags: u8,
    pub gso_type: u8,
    /// Bytes of the headers that every segment repeats; only a hint.
    pub hdr_len: u16,
    /// Payload bytes of one segment.
    pub gso_size: u16,
    /// Where the checksummed part begins, from the start of the Ethernet frame.
    pub csum_start: u16,
    /// Where in that part the checksum lies.
    pub csum_offset: u16,
    /// Receive buffers that hold the frame.
    pub num_buffers: u16,
}

impl VnetHeader {
    /// Decodes the 12 bytes.
    #[inline]
    pub fn from_bytes(b: &[u8; HEADER_LEN]) -> Self {
        let [b0, b1, b2, b3, b4, b5, b6, b7, rest @ ..] = *b;
        let low = u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]);
        Self::from_words(low, u32::from_le_bytes(rest))
    }

    /// Decodes the 12 bytes as two little-endian numbers, the first 8 and the last 4.
    #[inline]
    pub fn from_words(low: u64, high: u32) -> Self {
        Self {
            flags: low as u8,
            gso_type: (low >> 8) as u8,
            hdr_len: (low >> 16) as u16,
            gso_size: (low >> 32) as u16,
            csum_start: (low >> 48) as u16,
            csum_offset: high as u16,
            num_buffers: (high >> 16) as u16,
        }
    }

    /// Encodes it as [`from_words`](Self::from_words) decodes it.
    #[inline]
    pub fn to_words(self) -> (u64, u32) {
        let Self { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers } =
            self;
        let low = u64::from(flags)
            | u64::from(gso_type) << 8
            | u64::from(hdr_len) << 16
            | u64::from(gso_size) << 32
            | u64::from(csum_start) << 48;
        (low, u32::from(csum_offset) | u32::from(num_buffers) << 16)
    }

    /// Encodes it.
    #[inline]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let (low, high) = self.to_words();
        let mut b = [0; HEADER_LEN];
        b[..8].copy_from_slice(&low.to_le_bytes());
        b[8..].copy_from_slice(&high.to_le_bytes());
        b
    }

    /// Whether nothing is left to be done for the frame: no checksum, no segmentation.
    #[inline]
    pub fn is_plain(&self) -> bool {
        self.flags & NEEDS_CSUM == 0 && self.gso_type == GSO_NONE
    }

    /// Kind of large segment, without the congestion bit.
    #[inline]
    pub fn gso_kind(&self) -> u8 {
        self.gso_type & !GSO_ECN
    }

    /// Whether it can be, for a frame of `len` bytes: the checksum lies inside, a large segment is of
    /// a kind that the switch offers, has a segment size and a checksum to fill in.
    pub fn is_valid(&self, len: u32) -> bool {
        if self.flags & NEEDS_CSUM != 0 {
            let end = u32::from(self.csum_start) + u32::from(self.csum_offset) + 2;
            if end > len || self.csum_start < 14 {
                return false;
            }
        }
        match self.gso_kind() {
            GSO_NONE => self.gso_type == GSO_NONE,
            GSO_TCPV4 | GSO_TCPV6 => self.gso_size > 0 && self.flags & NEEDS_CSUM != 0,
            _ => false,
        }
    }

    /// Moves what points into the frame by `by` bytes: a VLAN tag came (4) or went (-4).
    pub fn shifted(mut self, by: i16) -> Self {
        if self.flags & NEEDS_CSUM != 0 {
            self.csum_start = self.csum_start.saturating_add_signed(by);
        }
        if self.hdr_len != 0 {
            self.hdr_len = self.hdr_len.saturating_add_signed(by);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodes_as_the_specification_says() {
        let h = VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            hdr_len: 0x0102,
            gso_size: 0x0304,
            csum_start: 0x0506,
            csum_offset: 0x0708,
            num_buffers: 0x090a,
        };
        assert_eq!(h.to_bytes(), [1, 1, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9]);
        assert_eq!(VnetHeader::from_bytes(&h.to_bytes()), h);
    }

    #[test]
    fn a_checksum_outside_the_frame_is_invalid() {
        let h = |start, offset| VnetHeader {
            flags: NEEDS_CSUM,
            csum_start: start,
            csum_offset: offset,
            ..VnetHeader::default()
        };
        assert!(h(34, 16).is_valid(60));
        assert!(h(34, 16).is_valid(52));
        assert!(!h(34, 16).is_valid(51));
        assert!(!h(u16::MAX, u16::MAX).is_valid(60));
        assert!(!h(0, 2).is_valid(60));
    }

    #[test]
    fn a_large_segment_needs_its_size_and_checksum() {
        let mut h = VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4 | GSO_ECN,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
            ..VnetHeader::default()
        };
        assert!(h.is_valid(4000));
        h.gso_size = 0;
        assert!(!h.is_valid(4000));
        (h.gso_size, h.flags) = (1448, 0);
        assert!(!h.is_valid(4000));
        (h.flags, h.gso_type) = (NEEDS_CSUM, 3);
        assert!(!h.is_valid(4000));
        h.gso_type = GSO_ECN;
        assert!(!h.is_valid(4000));
    }
}
