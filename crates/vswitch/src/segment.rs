//! What a sender left undone and the receiver cannot do: checksums are filled in, large TCP segments
//! cut, where a frame leaves. Source: VIRTIO 1.2, section 5.1.6; RFC 791, 793, 8200.
//!
//! The frame is our own copy; every offset in it is checked against its length.

use net::Offloads;

use crate::counters::Drop;
use crate::header::{DATA_VALID, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, NEEDS_CSUM, VnetHeader};

pub(crate) const IPV4: u16 = 0x0800;
pub(crate) const IPV6: u16 = 0x86dd;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// Whether a receiver that takes `accepts` can have a frame with `header` as it is.
#[inline]
pub fn fits(header: &VnetHeader, accepts: Offloads) -> bool {
    if header.is_plain() {
        return true;
    }
    let kind = match header.gso_kind() {
        GSO_NONE => true,
        GSO_TCPV4 => accepts.tso4,
        GSO_TCPV6 => accepts.tso6,
        _ => false,
    };
    accepts.csum && kind && (header.gso_type & GSO_ECN == 0 || accepts.ecn)
}

/// The header as a receiver may see it: that a checksum was verified is only for one who negotiated
/// to hear of checksums.
#[inline]
pub fn for_receiver(mut header: VnetHeader, accepts: Offloads) -> VnetHeader {
    if !accepts.csum {
        header.flags &= !DATA_VALID;
    }
    header
}

/// What was done to a frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Frames made of it.
    pub frames: u64,
    /// Checksums filled in.
    pub checksums: u64,
}

/// Makes of `frame`, which does not [`fit`](fits) the receiver, frames that do, and gives each to
/// `out`. `scratch` is reused from call to call.
///
/// # Errors
/// [`Drop::Segmentation`] when its headers are not what the sender said; or what `out` says, after
/// which nothing more is sent.
pub fn send(
    header: &VnetHeader,
    frame: &mut [u8],
    accepts: Offloads,
    scratch: &mut Vec<u8>,
    mut out: impl FnMut(&VnetHeader, &[u8]) -> Result<(), Drop>,
) -> Result<Work, Drop> {
    if header.gso_kind() != GSO_NONE {
        return cut(header, frame, accepts, scratch, out);
    }
    let (start, at) = (usize::from(header.csum_start), usize::from(header.csum_offset));
    fill_checksum(frame, start, start + at).ok_or(Drop::Segmentation)?;
    let done = VnetHeader { flags: 0, csum_start: 0, csum_offset: 0, ..*header };
    out(&done, frame)?;
    Ok(Work { frames: 1, checksums: 1 })
}

/// Where the headers of a large segment are.
struct Layout {
    l3: usize,
    l4: usize,
    payload: usize,
    v6: bool,
}

fn layout(header: &VnetHeader, f: &[u8]) -> Option<Layout> {
    let word = |at: usize| f.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    let mut l3 = 14;
    let mut kind = word(12)?;
    if kind == crate::burst::TPID {
        (l3, kind) = (18, word(16)?);
    }
    let v6 = header.gso_kind() == GSO_TCPV6;
    let l4 = usize::from(header.csum_start);
    if v6 {
        if kind != IPV6 || l4 < l3 + 40 || f.get(l3)? >> 4 != 6 {
            return None;
        }
    } else {
        let first = *f.get(l3)?;
        let len = usize::from(first & 15) * 4;
        if kind != IPV4 || first >> 4 != 4 || len < 20 || l4 != l3 + len || *f.get(l3 + 9)? != 6 {
            return None;
        }
    }
    let tcp = usize::from(f.get(l4 + 12)? >> 4) * 4;
    let payload = l4 + tcp;
    (tcp >= 20 && payload <= f.len() && header.csum_offset == 16).then_some(Layout {
        l3,
        l4,
        payload,
        v6,
    })
}

fn cut(
    header: &VnetHeader,
    frame: &[u8],
    accepts: Offloads,
    scratch: &mut Vec<u8>,
    mut out: impl FnMut(&VnetHeader, &[u8]) -> Result<(), Drop>,
) -> Result<Work, Drop> {
    let l = layout(header, frame).ok_or(Drop::Segmentation)?;
    let (heads, payload) = frame.split_at(l.payload);
    let size = usize::from(header.gso_size);
    let seq = be32(&heads[l.l4 + 4..]);
    let id = u16::from_be_bytes([heads[l.l3 + 4], heads[l.l3 + 5]]);
    let count = payload.len().div_ceil(size).max(1);
    let mut work = Work::default();
    for i in 0..count {
        let part = &payload[i * size..payload.len().min((i + 1) * size)];
        scratch.clear();
        scratch.extend_from_slice(heads);
        scratch.extend_from_slice(part);
        let f = scratch.as_mut_slice();
        let ip_len = f.len() - l.l3;
        if l.v6 {
            f[l.l3 + 4..l.l3 + 6].copy_from_slice(&((ip_len - 40) as u16).to_be_bytes());
        } else {
            f[l.l3 + 2..l.l3 + 4].copy_from_slice(&(ip_len as u16).to_be_bytes());
            f[l.l3 + 4..l.l3 + 6].copy_from_slice(&id.wrapping_add(i as u16).to_be_bytes());
            f[l.l3 + 10..l.l3 + 12].fill(0);
            let sum = !fold(sum(0, &f[l.l3..l.l4]));
            f[l.l3 + 10..l.l3 + 12].copy_from_slice(&sum.to_be_bytes());
        }
        let at = seq.wrapping_add((i * size) as u32);
        f[l.l4 + 4..l.l4 + 8].copy_from_slice(&at.to_be_bytes());
        if i > 0 {
            f[l.l4 + 13] &= !CWR;
        }
        if i + 1 < count {
            f[l.l4 + 13] &= !(FIN | PSH);
        }
        let pseudo = fold(pseudo_sum(f, &l));
        f[l.l4 + 16..l.l4 + 18].copy_from_slice(&pseudo.to_be_bytes());
        let mut h = VnetHeader { gso_type: GSO_NONE, gso_size: 0, hdr_len: 0, ..*header };
        if !accepts.csum {
            fill_checksum(f, l.l4, l.l4 + 16).ok_or(Drop::Segmentation)?;
            (h.flags, h.csum_start, h.csum_offset) = (0, 0, 0);
            work.checksums += 1;
        } else {
            h.flags = NEEDS_CSUM;
        }
        out(&h, f)?;
        work.frames += 1;
    }
    Ok(work)
}

fn be32(b: &[u8]) -> u32 {
    u32::from_be_bytes([b[0], b[1], b[2], b[3]])
}

/// Sum of the TCP pseudo header of the frame (RFC 793, section 3.1; RFC 8200, section 8.1).
fn pseudo_sum(f: &[u8], l: &Layout) -> u64 {
    let addresses = if l.v6 { l.l3 + 8..l.l3 + 40 } else { l.l3 + 12..l.l3 + 20 };
    sum(6 + (f.len() - l.l4) as u64, &f[addresses])
}

/// Adds 16-bit words, the last one filled up with a zero.
pub(crate) fn sum(mut acc: u64, bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(4);
    for w in &mut words {
        acc += u64::from(be32(w));
    }
    let mut rest = [0; 4];
    rest[..words.remainder().len()].copy_from_slice(words.remainder());
    acc + u64::from(be32(&rest))
}

/// The 16-bit one's complement sum that `acc` amounts to.
pub(crate) fn fold(mut acc: u64) -> u16 {
    while acc >> 16 != 0 {
        acc = (acc & 0xffff) + (acc >> 16);
    }
    acc as u16
}

/// Completes the checksum at `at` over everything from `start` on; the field holds the pseudo
/// header's sum. `None` if that lies outside.
fn fill_checksum(f: &mut [u8], start: usize, at: usize) -> Option<()> {
    let s = !fold(sum(0, f.get(start..)?));
    // No checksum is written as 0 in UDP; for others both are the same number.
    let s = if s == 0 { 0xffff } else { s };
    f.get_mut(at..at + 2)?.copy_from_slice(&s.to_be_bytes());
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A large TCP segment as a guest's driver gives it out: the field holds the pseudo sum.
    fn large(v6: bool, tag: bool, payload: &[u8], mss: u16) -> (VnetHeader, Vec<u8>) {
        let mut f: Vec<u8> = (1..13).collect();
        if tag {
            f.extend([0x81, 0, 0, 7]);
        }
        let l3 = f.len() + 2;
        if v6 {
            f.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            f.extend(((payload.len() + 20) as u16).to_be_bytes());
            f.extend([6, 64]);
            f.extend(100..132);
        } else {
            f.extend([8, 0, 0x45, 0]);
            f.extend(((payload.len() + 40) as u16).to_be_bytes());
            f.extend([0xff, 0xff, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        }
        let l4 = f.len();
        f.extend([0, 80, 1, 0]);
        f.extend(0xffff_ff00u32.to_be_bytes());
        f.extend([0, 0, 0, 1, 0x50, FIN | PSH | CWR | 0x10, 1, 0, 0, 0, 0, 0]);
        f.extend(payload);
        let l = Layout { l3, l4, payload: l4 + 20, v6 };
        let pseudo = fold(pseudo_sum(&f, &l));
        f[l4 + 16..l4 + 18].copy_from_slice(&pseudo.to_be_bytes());
        let header = VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: if v6 { GSO_TCPV6 } else { GSO_TCPV4 },
            hdr_len: (l4 + 20) as u16,
            gso_size: mss,
            csum_start: l4 as u16,
            csum_offset: 16,
            num_buffers: 0,
        };
        (header, f)
    }

    proptest! {
        #[test]
        fn segments_are_right_and_whole(
            v6: bool, tag: bool, len in 1usize..20_000, mss in 100u16..3000,
        ) {
            let payload: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
            let (h, mut f) = large(v6, tag, &payload, mss);
            let mut got = Vec::new();
            let mut expected_seq = 0xffff_ff00u32;
            let mut flags = Vec::new();
            let work = send(&h, &mut f, Offloads::default(), &mut Vec::new(), |h, f| {
                assert!(h.is_plain());
                let l4 = if v6 { 54 } else { 34 } + if tag { 4 } else { 0 };
                let l3 = l4 - if v6 { 40 } else { 20 };
                let l = Layout { l3, l4, payload: l4 + 20, v6 };
                // A right checksum makes the sum of everything all ones.
                assert_eq!(fold(pseudo_sum(f, &l) + sum(0, &f[l4..])), 0xffff);
                if v6 {
                    assert_eq!(usize::from(u16::from_be_bytes([f[l3 + 4], f[l3 + 5]])), f.len() - l4);
                } else {
                    assert_eq!(usize::from(u16::from_be_bytes([f[l3 + 2], f[l3 + 3]])), f.len() - l3);
                    assert_eq!(fold(sum(0, &f[l3..l4])), 0xffff);
                }
                assert_eq!(be32(&f[l4 + 4..]), expected_seq);
                expected_seq = expected_seq.wrapping_add((f.len() - l4 - 20) as u32);
                assert!(f.len() - l4 - 20 <= mss.into());
                flags.push(f[l4 + 13]);
                got.extend_from_slice(&f[l4 + 20..]);
                Ok(())
            }).unwrap();
            prop_assert_eq!(&got, &payload);
            prop_assert_eq!(work.frames as usize, len.div_ceil(mss.into()));
            prop_assert_eq!(work.checksums, work.frames);
            for (i, x) in flags.iter().enumerate() {
                prop_assert_eq!(x & CWR != 0, i == 0);
                prop_assert_eq!(x & (FIN | PSH) != 0, i + 1 == flags.len());
            }
        }

        #[test]
        fn nonsense_is_refused_or_cut_but_never_panics(
            mut f in proptest::collection::vec(any::<u8>(), 14..300),
            b: [u8; 12], like_ip: bool,
        ) {
            if like_ip {
                f[12..14].copy_from_slice(&[8, 0]);
            }
            let mut h = VnetHeader::from_bytes(&b);
            h.gso_type = [0, 1, 4, 0x81][usize::from(b[1] & 3)];
            h.flags = NEEDS_CSUM;
            if h.is_valid(f.len() as u32) {
                let _ = send(&h, &mut f, Offloads::default(), &mut Vec::new(), |_, _| Ok(()));
            }
        }
    }

    #[test]
    fn a_checksum_alone_is_filled_in() {
        // UDP over IPv4, the field holds the pseudo header's sum.
        let mut f: Vec<u8> = (1..13).chain([8, 0, 0x45, 0, 0, 32]).collect();
        f.extend([0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        f.extend([0, 53, 1, 0, 0, 12, 0, 0, 1, 2, 3, 4]);
        let pseudo = fold(sum(17 + 12, &f[26..34]));
        f[40..42].copy_from_slice(&pseudo.to_be_bytes());
        let h = VnetHeader {
            flags: NEEDS_CSUM,
            csum_start: 34,
            csum_offset: 6,
            ..VnetHeader::default()
        };
        assert!(
            !fits(&h, Offloads::default())
                && fits(&h, Offloads { csum: true, ..Offloads::default() })
        );
        let mut sent = Vec::new();
        send(&h, &mut f, Offloads::default(), &mut Vec::new(), |h, f| {
            assert!(h.is_plain());
            sent = f.to_vec();
            Ok(())
        })
        .unwrap();
        assert_eq!(fold(sum(17 + 12, &sent[26..34]) + sum(0, &sent[34..])), 0xffff);
    }

    #[test]
    fn whoever_takes_checksums_gets_pieces_without() {
        let (h, mut f) = large(false, false, &[5; 3000], 1000);
        let accepts = Offloads { csum: true, ..Offloads::default() };
        assert!(!fits(&h, accepts) && fits(&h, Offloads::ALL));
        let mut n = 0;
        let work = send(&h, &mut f, accepts, &mut Vec::new(), |h, f| {
            assert_eq!((h.flags, h.gso_type, h.csum_start), (NEEDS_CSUM, GSO_NONE, 34));
            let l = Layout { l3: 14, l4: 34, payload: 54, v6: false };
            assert_eq!([f[50], f[51]], fold(pseudo_sum(f, &l)).to_be_bytes());
            n += 1;
            Ok(())
        });
        assert_eq!((work.unwrap(), n), (Work { frames: 3, checksums: 0 }, 3));
    }
}
