//! Where frames leave: what every kind of port has in common on that side, and the steps from a list
//! of frames in a burst to the other side's buffers.

use net::Offloads;

use crate::burst::{Burst, Prefix};
use crate::capture::Direction;
use crate::copy::{Source, with_bytes};
use crate::counters::{Drop, QueueCounters};
use crate::header::VnetHeader;
use crate::segment;
use crate::table::PortView;
use crate::vlan::Edit;

/// A queue that frames can be put into.
pub trait Output {
    /// What the other side takes.
    fn accepts(&self) -> Offloads;
    /// So many frames are about to be put.
    fn prepare(&mut self, _frames: usize) {}
    /// Puts one frame, `prefix` (at most 16 bytes) and then `rest`; the other side sees it after
    /// [`flush`](Self::flush).
    ///
    /// # Errors
    /// Why it was dropped.
    fn put(&mut self, header: &VnetHeader, prefix: &[u8], rest: Source<'_>) -> Result<(), Drop>;
    /// Lets the other side see what was put.
    fn flush(&mut self, counters: &QueueCounters);
}

/// Buffers that a poll thread keeps for the frames that need work.
#[derive(Default)]
pub struct Scratch {
    frame: Vec<u8>,
    piece: Vec<u8>,
}

/// What sending needs beside the frames.
pub struct Context<'a> {
    /// Number of this poll thread.
    pub thread: usize,
    pub view: &'a PortView,
    pub counters: &'a QueueCounters,
    pub scratch: &'a mut Scratch,
    /// Copies for a mirror port leave as they came in, whatever its VLANs.
    pub mirror: bool,
}

/// Sends the frames of `burst` whose numbers are in `list`. Returns how many left.
#[inline]
pub fn send(out: &mut impl Output, burst: &Burst, list: &[u8], x: &mut Context<'_>) -> usize {
    let accepts = out.accepts();
    out.prepare(list.len());
    let (mut frames, mut bytes) = (0, 0);
    for &i in list {
        let i = usize::from(i);
        let f = &burst.frames()[i];
        let edit = if x.mirror { Some(Edit::Keep) } else { x.view.vlans.egress(f.vlan, f.tci()) };
        let Some(edit) = edit else {
            x.counters.dropped(Drop::Vlan, 1);
            continue;
        };
        let source = burst.source(i);
        let result = if edit == Edit::Keep && f.header.is_plain() && x.view.simple {
            if f.len > x.view.max_frame {
                Err(Drop::TooBigForPort)
            } else {
                out.put(&f.header, &[], source).map(|()| 1)
            }
        } else {
            send_edited(out, f, edit, source, accepts, x)
        };
        match result {
            Ok(n) => {
                frames += n;
                bytes += u64::from(f.len_after(edit));
            }
            Err(reason) => x.counters.dropped(reason, 1),
        }
    }
    if frames > 0 {
        x.counters.tx_frames.add(frames);
        x.counters.tx_bytes.add(bytes);
        x.counters.tx_bursts.add(1);
    }
    out.flush(x.counters);
    frames as usize
}

/// The way of a frame whose tag changes, that has offloads, or that is captured.
#[inline(never)]
fn send_edited(
    out: &mut impl Output,
    f: &crate::burst::Frame,
    edit: Edit,
    source: Source<'_>,
    accepts: Offloads,
    x: &mut Context<'_>,
) -> Result<u64, Drop> {
    let prefix = Prefix::new(f, edit);
    let rest = source.after(prefix.replaces.into());
    let shift = match edit {
        Edit::Keep | Edit::Replace(_) => 0,
        Edit::Strip => -4,
        Edit::Insert(_) => 4,
    };
    let header = f.header.shifted(shift);
    let tag = if f.tci().is_some() { 4 } else { 0 };
    if header.gso_kind() == 0 && f.len > x.view.max_frame.saturating_add(tag) {
        return Err(Drop::TooBigForPort);
    }
    for tap in &x.view.captures {
        tap.frame(x.thread, Direction::ToPort, prefix.bytes(), rest);
    }
    if segment::fits(&header, accepts) {
        let header = segment::for_receiver(header, accepts);
        return out.put(&header, prefix.bytes(), rest).map(|()| 1);
    }
    let Scratch { frame, piece } = &mut *x.scratch;
    frame.clear();
    frame.extend_from_slice(prefix.bytes());
    let at = frame.len();
    frame.resize(at + rest.len(), 0);
    rest.read(&mut frame[at..]);
    let work = segment::send(&header, frame, accepts, piece, |h, bytes| {
        with_bytes(bytes, |s| out.put(h, &[], s))
    })?;
    if header.gso_kind() != 0 {
        x.counters.segmented.add(1);
    }
    x.counters.checksummed.add(work.checksums);
    Ok(work.frames)
}
