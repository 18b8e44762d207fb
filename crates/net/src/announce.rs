//! Frames that tell the network where a MAC address lives now.

use crate::Mac;

const BROADCAST: Mac = [0xff; 6];
/// Shortest Ethernet frame without its checksum.
const MIN_FRAME: usize = 60;

/// A reverse ARP request in the name of `mac` (RFC 903): switches learn its new port, nobody
/// answers.
pub fn rarp(mac: Mac) -> [u8; MIN_FRAME] {
    frame(mac, 0x8035, 3, mac, [0; 4], mac, [0; 4])
}

/// A gratuitous ARP request (RFC 5227, section 3): hosts refresh their caches of `ip`.
pub fn gratuitous_arp(mac: Mac, ip: [u8; 4]) -> [u8; MIN_FRAME] {
    frame(mac, 0x0806, 1, mac, ip, [0; 6], ip)
}

fn frame(
    source: Mac,
    ethertype: u16,
    operation: u16,
    sender: Mac,
    sender_ip: [u8; 4],
    target: Mac,
    target_ip: [u8; 4],
) -> [u8; MIN_FRAME] {
    let mut f = [0; MIN_FRAME];
    f[0..6].copy_from_slice(&BROADCAST);
    f[6..12].copy_from_slice(&source);
    f[12..14].copy_from_slice(&ethertype.to_be_bytes());
    // Ethernet, IPv4, their address lengths.
    f[14..20].copy_from_slice(&[0, 1, 8, 0, 6, 4]);
    f[20..22].copy_from_slice(&operation.to_be_bytes());
    f[22..28].copy_from_slice(&sender);
    f[28..32].copy_from_slice(&sender_ip);
    f[32..38].copy_from_slice(&target);
    f[38..42].copy_from_slice(&target_ip);
    f
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rarp_is_a_broadcast_from_the_mac() {
        let mac = [0x52, 0x54, 0, 1, 2, 3];
        let f = rarp(mac);
        assert_eq!(f[0..6], BROADCAST);
        assert_eq!(f[6..12], mac);
        assert_eq!(f[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(f[22..28], mac);
        assert_eq!(f[32..38], mac);
    }

    #[test]
    fn gratuitous_arp_asks_for_its_own_address() {
        let f = gratuitous_arp([2, 0, 0, 0, 0, 1], [10, 0, 0, 7]);
        assert_eq!(f[12..14], [8, 6]);
        assert_eq!(f[28..32], f[38..42]);
    }
}
