//! Checksums that this host's own stack has left to hardware which is not there.
//!
//! A stack that sends over a software interface (veth, say) leaves the TCP or UDP checksum to be
//! filled in by whoever needs it, and notes that beside the frame. XDP sees the frame without the
//! note. The field then holds the sum of the pseudo header (RFC 9293, section 3.1; RFC 8200, section
//! 8.1), by which such a frame is known here.
//!
//! A finished frame whose checksum happens to be the same number loses nothing by that: filled in
//! again, it comes out as it was. The sum over everything is -0 for it; without the field that is
//! -0 minus the pseudo sum, whose complement is the pseudo sum.

use crate::burst::TPID;
use crate::copy::Source;
use crate::header::{NEEDS_CSUM, VnetHeader};
use crate::segment::{IPV4, IPV6, fold, sum};

/// Bytes that are looked at: Ethernet with tag, IPv4 with options or IPv6, TCP up to its checksum.
const LOOK: usize = 18 + 60 + 18;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// IPv4's "more fragments" and offset.
const FRAGMENT: u16 = 0x3fff;

/// What is still to be done for `frame`.
#[inline]
pub fn header(frame: Source<'_>) -> VnetHeader {
    let mut look = [0; LOOK];
    let n = frame.read(&mut look);
    find(&look[..n]).unwrap_or_default()
}

/// The header of a frame that begins with `f` and lacks its checksum.
fn find(f: &[u8]) -> Option<VnetHeader> {
    let word = |at: usize| f.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    let (mut l3, mut kind) = (14, word(12)?);
    if kind == TPID {
        (l3, kind) = (18, word(16)?);
    }
    let (protocol, l4, len, addresses) = match kind {
        IPV4 => {
            let header = usize::from(*f.get(l3)? & 15) * 4;
            let len = usize::from(word(l3 + 2)?).checked_sub(header)?;
            if header < 20 || word(l3 + 6)? & FRAGMENT != 0 {
                return None;
            }
            (*f.get(l3 + 9)?, l3 + header, len, f.get(l3 + 12..l3 + 20)?)
        }
        IPV6 => (*f.get(l3 + 6)?, l3 + 40, usize::from(word(l3 + 4)?), f.get(l3 + 8..l3 + 40)?),
        _ => return None,
    };
    let csum_offset = match protocol {
        TCP => 16,
        UDP => 6,
        _ => return None,
    };
    let field = word(l4 + csum_offset)?;
    if fold(sum(u64::from(protocol) + len as u64, addresses)) != field {
        return None;
    }
    Some(VnetHeader {
        flags: NEEDS_CSUM,
        csum_start: l4 as u16,
        csum_offset: csum_offset as u16,
        ..VnetHeader::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment;
    use net::Offloads;
    use proptest::prelude::*;

    /// A TCP or UDP frame whose checksum field holds the pseudo header's sum; where that is.
    fn unfinished(v6: bool, tcp: bool, tag: bool, payload: &[u8]) -> (Vec<u8>, usize) {
        let mut f: Vec<u8> = (1..13).collect();
        if tag {
            f.extend([0x81, 0, 0, 7]);
        }
        let (protocol, l4_len) = if tcp { (TCP, 20) } else { (UDP, 8) };
        let len = (payload.len() + l4_len) as u16;
        let addresses = if v6 {
            f.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            f.extend(len.to_be_bytes());
            f.extend([protocol, 64]);
            f.extend(100..132);
            f.len() - 32
        } else {
            f.extend([8, 0, 0x45, 0]);
            f.extend((len + 20).to_be_bytes());
            f.extend([0, 1, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            f.len() - 8
        };
        let pseudo = fold(sum(u64::from(protocol) + u64::from(len), &f[addresses..]));
        let l4 = f.len();
        f.resize(l4 + l4_len, 0);
        f[l4..l4 + 4].copy_from_slice(&[0, 80, 1, 0]);
        if tcp {
            f[l4 + 12] = 0x50;
        } else {
            f[l4 + 4..l4 + 6].copy_from_slice(&len.to_be_bytes());
        }
        let at = l4 + if tcp { 16 } else { 6 };
        f[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
        f.extend(payload);
        (f, l4)
    }

    fn finish(h: &VnetHeader, mut f: Vec<u8>) -> Vec<u8> {
        let mut out = Vec::new();
        segment::send(h, &mut f, Offloads::default(), &mut Vec::new(), |_, f| {
            out = f.to_vec();
            Ok(())
        })
        .unwrap();
        out
    }

    proptest! {
        #[test]
        fn an_unfinished_frame_is_known_and_a_finished_one_stays_as_it_is(
            v6: bool, tcp: bool, tag: bool,
            mut payload in proptest::collection::vec(any::<u8>(), 2..200),
        ) {
            let (f, l4) = unfinished(v6, tcp, tag, &payload);
            let h = find(&f[..f.len().min(LOOK)]).unwrap();
            prop_assert_eq!(usize::from(h.csum_start), l4);
            let done = finish(&h, f.clone());
            let at = l4 + usize::from(h.csum_offset);
            // A right checksum: with the pseudo header, whose sum `f` has in that field, all is -0.
            let pseudo = u64::from(u16::from_be_bytes([f[at], f[at + 1]]));
            prop_assert_eq!(fold(sum(pseudo, &done[l4..])), 0xffff);
            // Known again only if the number is the same, and then filled in to the same.
            if let Some(h) = find(&done[..done.len().min(LOOK)]) {
                prop_assert_eq!(finish(&h, done.clone()), done);
            }
            // A payload that makes the finished checksum the pseudo sum: nothing changes.
            payload[..2].fill(0);
            let (mut f, l4) = unfinished(v6, tcp, tag, &payload);
            let rest = fold(sum(pseudo, &f[l4..]));
            let start = f.len() - payload.len();
            f[start..start + 2].copy_from_slice(&(!rest).to_be_bytes());
            let h = find(&f[..f.len().min(LOOK)]).unwrap();
            prop_assert_eq!(finish(&h, f.clone()), f);
        }

        #[test]
        fn anything_is_looked_at_without_harm(f in proptest::collection::vec(any::<u8>(), 0..120)) {
            if let Some(h) = find(&f) {
                prop_assert!(h.is_valid(f.len() as u32));
            }
        }
    }

    #[test]
    fn fragments_and_other_protocols_are_left_alone() {
        let (f, _) = unfinished(false, true, false, &[1; 40]);
        assert!(find(&f).is_some());
        for (at, value) in [(20, 0x20), (21, 1), (23, 1), (14, 0x41), (12, 9)] {
            let mut other = f.clone();
            other[at] = value;
            assert_eq!(find(&other), None, "byte {at}");
        }
    }
}
