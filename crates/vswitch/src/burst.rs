//! A burst of frames on their way, and what is known of each.
//!
//! The frames' bytes stay where they came in (a guest's memory, a tap's read buffer) until they are
//! copied to where they go. Invariant: the buffers in `segments` stay valid until
//! [`clear`](Burst::clear); the port that filled the burst does not give them back before.
#![allow(unsafe_code)] // hands out iovecs whose validity is the invariant above

use libc::iovec;

use crate::copy::{self, Source};
use crate::header::VnetHeader;
use crate::vlan::Edit;

/// Most frames in a burst.
pub const BURST: usize = 32;
/// Bytes of a frame that are looked at: addresses, tag, type.
pub const HEAD: usize = 18;
/// Bytes of the shortest frame that can be switched: addresses and type.
pub const MIN_FRAME: u32 = 14;
/// Longest frame: a large segment of 64 KiB with Ethernet header and tag.
pub const MAX_FRAME: u32 = 65_535 + 18;
/// Type of a VLAN tag (IEEE 802.1Q).
pub const TPID: u16 = 0x8100;

/// One frame.
#[derive(Debug, Clone, Copy)]
pub struct Frame {
    pub header: VnetHeader,
    /// Bytes, from the destination address on.
    pub len: u32,
    /// Where its buffers are in the burst's list, and how many bytes to leave out at their start.
    first: u32,
    count: u16,
    skip: u16,
    /// Our copy of its first bytes; zeroes behind its end.
    pub head: [u8; HEAD],
    /// The VLAN that it is in here, whatever its tag says.
    pub vlan: u16,
}

#[inline]
fn mac(b: &[u8]) -> u64 {
    u64::from(u32::from_be_bytes([b[0], b[1], b[2], b[3]])) << 16
        | u64::from(u16::from_be_bytes([b[4], b[5]]))
}

/// The bit of an address that says that it is a group's.
pub const GROUP: u64 = 1 << 40;

impl Frame {
    /// Destination address.
    #[inline]
    pub fn dst(&self) -> u64 {
        mac(&self.head[..6])
    }

    /// Source address.
    #[inline]
    pub fn src(&self) -> u64 {
        mac(&self.head[6..12])
    }

    /// Tag control information, if it is tagged.
    #[inline]
    pub fn tci(&self) -> Option<u16> {
        (self.head[12] == 0x81 && self.head[13] == 0 && self.len >= HEAD as u32)
            .then(|| u16::from_be_bytes([self.head[14], self.head[15]]))
    }

    /// Bytes that it has after `edit`.
    #[inline]
    pub fn len_after(&self, edit: Edit) -> u32 {
        match edit {
            Edit::Keep | Edit::Replace(_) => self.len,
            Edit::Strip => self.len - 4,
            Edit::Insert(_) => self.len + 4,
        }
    }
}

/// The start of a frame as it is sent: bytes of our own, and how many of the frame's they replace.
pub struct Prefix {
    bytes: [u8; 16],
    len: u8,
    /// Bytes of the frame that they stand for.
    pub replaces: u8,
}

impl Prefix {
    /// What `edit` makes of the start of `frame`.
    #[inline]
    pub fn new(frame: &Frame, edit: Edit) -> Self {
        let (len, replaces, tci) = match edit {
            Edit::Keep => return Self { bytes: [0; 16], len: 0, replaces: 0 },
            Edit::Strip => (12, 16, 0),
            Edit::Insert(tci) => (16, 12, tci),
            Edit::Replace(tci) => (16, 16, tci),
        };
        let mut bytes = [0; 16];
        bytes[..12].copy_from_slice(&frame.head[..12]);
        bytes[12..14].copy_from_slice(&TPID.to_be_bytes());
        bytes[14..].copy_from_slice(&tci.to_be_bytes());
        Self { bytes, len, replaces }
    }

    /// The bytes.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// Up to [`BURST`] frames of one queue.
#[derive(Default)]
pub struct Burst {
    frames: Vec<Frame>,
    segments: Vec<iovec>,
}

// SAFETY: the pointers lead to memory that any thread may use; the invariant above does not depend
// on the thread.
unsafe impl Send for Burst {}

impl Burst {
    /// An empty one, with room.
    pub fn new() -> Self {
        Self { frames: Vec::with_capacity(BURST), segments: Vec::with_capacity(4 * BURST) }
    }

    /// Forgets all frames.
    #[inline]
    pub fn clear(&mut self) {
        self.frames.clear();
        self.segments.clear();
    }

    /// The frames.
    #[inline]
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// The frames, to be classified.
    #[inline]
    pub fn frames_mut(&mut self) -> &mut [Frame] {
        &mut self.frames
    }

    /// Keeps only the frames for which `keep` says so.
    pub fn retain(&mut self, keep: impl FnMut(&Frame) -> bool) {
        self.frames.retain(keep);
    }

    /// Frame `i`'s bytes.
    #[inline]
    pub fn source(&self, i: usize) -> Source<'_> {
        let f = &self.frames[i];
        let iov = &self.segments[f.first as usize..][..usize::from(f.count)];
        // SAFETY: the promise made to `push`.
        unsafe { Source::new(iov, usize::from(f.skip), f.len as usize) }
    }

    /// Adds a frame of `len` bytes (at least [`MIN_FRAME`]) that begins at byte `skip` of `iov`, which
    /// holds it wholly.
    ///
    /// # Safety
    /// The buffers stay valid for reads until [`clear`](Self::clear).
    #[inline]
    pub unsafe fn push(&mut self, header: VnetHeader, iov: &[iovec], skip: u16, len: u32) {
        let first = self.segments.len() as u32;
        let mut head = [0; HEAD];
        match iov.first() {
            Some(v) if v.iov_len >= usize::from(skip) + HEAD => {
                // SAFETY: the buffer holds the bytes (just checked) and is valid (the promise).
                unsafe {
                    let p = v.iov_base.cast::<u8>().add(usize::from(skip));
                    std::ptr::copy_nonoverlapping(p, head.as_mut_ptr(), HEAD);
                }
                if len < HEAD as u32 {
                    head[len as usize..].fill(0);
                }
            }
            _ => {
                // SAFETY: the promise.
                unsafe { Source::new(iov, usize::from(skip), len as usize) }.read(&mut head);
            }
        }
        match iov {
            [one] => self.segments.push(*one),
            many => self.segments.extend_from_slice(many),
        }
        let count = iov.len() as u16;
        self.frames.push(Frame { header, len, first, count, skip, head, vlan: 0 });
    }

    /// Adds a frame from bytes that outlive the burst.
    ///
    /// # Safety
    /// As [`push`](Self::push).
    pub unsafe fn push_bytes(&mut self, header: VnetHeader, bytes: &[u8]) {
        // SAFETY: the caller's promise.
        unsafe { self.push(header, &[copy::iovec_of(bytes)], 0, bytes.len() as u32) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(bytes: &[u8], edit: Edit) -> Vec<u8> {
        let mut b = Burst::new();
        // SAFETY: `bytes` outlives the burst.
        unsafe { b.push_bytes(VnetHeader::default(), bytes) };
        let f = b.frames()[0];
        let prefix = Prefix::new(&f, edit);
        let mut out = prefix.bytes().to_vec();
        let rest = b.source(0).after(prefix.replaces.into());
        let at = out.len();
        out.resize(at + rest.len(), 0);
        assert_eq!(rest.read(&mut out[at..]), rest.len());
        assert_eq!(out.len() as u32, f.len_after(edit));
        out
    }

    #[test]
    fn tags_come_and_go() {
        let plain: Vec<u8> = (0..12).chain([8, 0]).chain(20..40).collect();
        let tagged: Vec<u8> = (0..12).chain([0x81, 0, 0x20, 5, 8, 0]).chain(20..40).collect();
        assert_eq!(frame(&plain, Edit::Insert(0x2005)), tagged);
        assert_eq!(frame(&tagged, Edit::Strip), plain);
        assert_eq!(frame(&tagged, Edit::Keep), tagged);
        let mut other = tagged.clone();
        other[14] = 0x40;
        assert_eq!(frame(&tagged, Edit::Replace(0x4005)), other);
    }

    #[test]
    fn a_tag_that_is_cut_off_is_none() {
        let mut b = Burst::new();
        let bytes: Vec<u8> = (0..12).chain([0x81, 0, 0x20, 5]).collect();
        // SAFETY: `bytes` outlives the burst.
        unsafe { b.push_bytes(VnetHeader::default(), &bytes) };
        assert_eq!(b.frames()[0].tci(), None);
        assert_eq!(
            (b.frames()[0].dst(), b.frames()[0].src()),
            (0x0001_0203_0405, 0x0607_0809_0a0b)
        );
    }
}
