//! From a burst to the ports that its frames are for: VLAN, learning, look-up, flooding, mirrors.
//!
//! Frames of one burst reach each port in the order in which they came, whether they were flooded or
//! not.
#![allow(unsafe_code)] // frames of other threads are put into a burst

use std::sync::atomic::Ordering;

use crate::burst::{BURST, Burst, Frame, GROUP};
use crate::capture::Direction;
use crate::counters::{Drop, QueueCounters};
use crate::fdb::Key;
use crate::frame_ring::Record;
use crate::header::VnetHeader;
use crate::output::{Context, Scratch};
use crate::queue::Queue;
use crate::shared::Shared;
use crate::table::{PortId, PortView, Table};

/// Where a frame goes: a [`PortId`], or one of the two below.
type Verdict = u32;
const FLOOD: Verdict = 0x1_0000;
const DROPPED: Verdict = 0x2_0000;

/// Addresses that bridges keep to themselves: 01-80-c2-00-00-00 to -0f.
const RESERVED: u64 = 0x0180_c200_0000;

/// Where a burst came from.
#[derive(Debug, Clone, Copy)]
pub struct Ingress<'a> {
    pub port: PortId,
    /// The queue's number; frames of one queue keep to one queue of each receiver.
    pub queue: u16,
    pub counters: &'a QueueCounters,
}

/// A poll thread's queues and what it needs to send.
pub struct Forwarder {
    pub thread: usize,
    /// Places of queues; empty ones are reused.
    pub queues: Vec<Option<Queue>>,
    /// By port: places of its queues here that can be sent to.
    transmit: Vec<Vec<usize>>,
    scratch: Scratch,
}

impl Forwarder {
    /// Without queues.
    pub fn new(thread: usize) -> Self {
        Self { thread, queues: Vec::new(), transmit: Vec::new(), scratch: Scratch::default() }
    }

    /// Puts what was learned of queues into the shape that sending needs. After any change to
    /// `queues`.
    pub fn rebuild(&mut self) {
        self.transmit.iter_mut().for_each(Vec::clear);
        for (place, q) in self.queues.iter().enumerate() {
            let Some(q) = q.as_ref().filter(|q| q.transmits()) else { continue };
            let port = usize::from(q.port);
            if self.transmit.len() <= port {
                self.transmit.resize_with(port + 1, Vec::new);
            }
            self.transmit[port].push(place);
        }
    }

    /// Forwards `burst`.
    pub fn forward(
        &mut self,
        burst: &mut Burst,
        from: Ingress<'_>,
        table: &Table,
        shared: &Shared,
    ) {
        let Some(view) = table.port(from.port) else {
            // It has just been removed; its queue will be in a moment.
            from.counters.dropped(Drop::PortDown, burst.frames().len() as u64);
            return;
        };
        let mut verdicts = [DROPPED; BURST];
        let n = burst.frames().len().min(BURST);
        classify(burst.frames_mut(), &mut verdicts, from, view, shared);
        for tap in &view.captures {
            for i in 0..n {
                tap.frame(self.thread, Direction::FromPort, &[], burst.source(i));
            }
        }
        let mut list = [0; BURST];
        if !view.mirror_rx.is_empty() {
            let all = collect(&mut list, 0..n, |i| verdicts[i] != DROPPED);
            for to in &view.mirror_rx {
                self.send(burst, all, *to, true, from, table, shared);
            }
        }
        let mut i = 0;
        while i < n {
            let first = verdicts[i];
            // Most bursts go to one place as a whole.
            let run = verdicts[i..n].iter().take_while(|v| **v == first).count();
            let end = i + run;
            match first {
                DROPPED => {}
                FLOOD => self.flood(burst, i..end, from, table, shared),
                port => {
                    let all = collect(&mut list, i..end, |_| true);
                    self.send(burst, all, port as PortId, false, from, table, shared);
                }
            }
            i = end;
            // Frames that alternate between ports are gathered, up to the next one that is flooded.
            if run < 4 && i < n && first < FLOOD {
                let stop = (i..n).find(|k| verdicts[*k] == FLOOD).unwrap_or(n);
                for k in i..stop {
                    let port = verdicts[k];
                    if port == DROPPED {
                        continue;
                    }
                    let all = collect(&mut list, k..stop, |j| verdicts[j] == port);
                    for j in all.iter() {
                        verdicts[usize::from(*j)] = DROPPED;
                    }
                    self.send(burst, all, port as PortId, false, from, table, shared);
                }
                i = stop;
            }
        }
    }

    /// Sends frames of one run to every port of their VLANs but the one that they came from.
    fn flood(
        &mut self,
        burst: &Burst,
        run: std::ops::Range<usize>,
        from: Ingress<'_>,
        table: &Table,
        shared: &Shared,
    ) {
        from.counters.flooded.add(run.len() as u64);
        let mut list = [0; BURST];
        let mut reached = 0u32;
        for (id, view) in table.ports.iter().enumerate() {
            let id = id as PortId;
            let Some(view) = view else { continue };
            if id == from.port || view.mirror_output || !self.is_up(id, view) {
                continue;
            }
            let frames = burst.frames();
            let all = collect(&mut list, run.clone(), |i| view.vlans.carries(frames[i].vlan));
            if !all.is_empty() {
                reached |= all.iter().fold(0, |bits, i| bits | 1 << i);
                self.send(burst, all, id, false, from, table, shared);
            }
        }
        let missed = run.filter(|i| reached & 1 << i == 0).count();
        if missed > 0 {
            from.counters.dropped(Drop::NoDestination, missed as u64);
        }
    }

    fn is_up(&self, id: PortId, view: &PortView) -> bool {
        self.transmit.get(usize::from(id)).is_some_and(|q| !q.is_empty())
            || !view.tx_owners.is_empty()
    }

    /// Sends frames to port `to`, and their copies to its mirrors.
    #[allow(clippy::too_many_arguments)]
    fn send(
        &mut self,
        burst: &Burst,
        list: &[u8],
        to: PortId,
        mirror: bool,
        from: Ingress<'_>,
        table: &Table,
        shared: &Shared,
    ) {
        let Some(view) = table.port(to) else {
            from.counters.dropped(Drop::PortDown, list.len() as u64);
            return;
        };
        if !mirror && !view.mirror_tx.is_empty() {
            for copy in &view.mirror_tx {
                self.send(burst, list, *copy, true, from, table, shared);
            }
        }
        let places = self.transmit.get(usize::from(to)).map_or(&[][..], Vec::as_slice);
        if places.is_empty() {
            self.hand_off(burst, list, to, view, mirror, from, shared);
            return;
        }
        let place = match places {
            [one] => *one,
            many => many[usize::from(from.queue) % many.len()],
        };
        self.send_to_place(burst, list, place, view, mirror, shared);
    }

    fn send_to_place(
        &mut self,
        burst: &Burst,
        list: &[u8],
        place: usize,
        view: &PortView,
        mirror: bool,
        shared: &Shared,
    ) {
        let Some(Queue { io, counters, port, index, .. }) = &mut self.queues[place] else { return };
        let scratch = &mut self.scratch;
        let mut x = Context { thread: self.thread, view, counters, scratch, mirror };
        io.send(burst, list, &mut x);
        if let Some(e) = io.take_error() {
            shared.report(*port, format!("receive ring of queue {index}: {e}"));
        }
    }

    /// Copies frames to the thread that has `to`.
    #[allow(clippy::too_many_arguments)]
    fn hand_off(
        &self,
        burst: &Burst,
        list: &[u8],
        to: PortId,
        view: &PortView,
        mirror: bool,
        from: Ingress<'_>,
        shared: &Shared,
    ) {
        let owners = &view.tx_owners;
        let Some((thread, queue)) =
            owners.get(usize::from(from.queue) % owners.len().max(1)).copied()
        else {
            from.counters.dropped(Drop::PortDown, list.len() as u64);
            return;
        };
        let mailbox = &shared.mailboxes[usize::from(thread)];
        let Some(ring) = &mailbox.incoming[self.thread] else {
            // The table is ahead of this thread's own queues, for a moment.
            from.counters.dropped(Drop::PortDown, list.len() as u64);
            return;
        };
        let mut full = 0;
        for &i in list {
            let f = &burst.frames()[usize::from(i)];
            let meta = HandOff { to, queue, vlan: f.vlan, mirror }.to_bytes();
            if !ring.push(&meta, &f.header.to_bytes(), burst.source(i.into())) {
                full += 1;
            }
        }
        from.counters.dropped(Drop::HandOff, full);
        mailbox.nudge();
    }

    /// Sends the frames that another thread has left for this one. Returns how many.
    pub fn receive_from(
        &mut self,
        other: usize,
        burst: &mut Burst,
        table: &Table,
        shared: &Shared,
    ) -> usize {
        let Some(ring) = &shared.mailboxes[self.thread].incoming[other] else { return 0 };
        ring.pop(|records| self.deliver(records, burst, table, shared)).unwrap_or(0)
    }

    fn deliver(
        &mut self,
        records: &[Record<'_>],
        burst: &mut Burst,
        table: &Table,
        shared: &Shared,
    ) -> usize {
        let strays = &shared.mailboxes[self.thread].strays;
        let mut list = [0; BURST];
        let mut rest = records;
        while let Some((meta, _)) = rest.first() {
            let h = HandOff::from_bytes(meta);
            let alike = |r: &&Record<'_>| HandOff::from_bytes(r.0).same_way(&h);
            let (run, others) =
                rest.split_at(rest.iter().take_while(alike).count().clamp(1, BURST));
            rest = others;
            burst.clear();
            for (meta, bytes) in run {
                if let Some((header, frame)) = bytes.split_first_chunk() {
                    // SAFETY: the records stay until this function returns; the burst is cleared
                    // before.
                    unsafe { burst.push_bytes(VnetHeader::from_bytes(header), frame) };
                    if let Some(f) = burst.frames_mut().last_mut() {
                        f.vlan = HandOff::from_bytes(meta).vlan;
                    }
                }
            }
            let place = self.queues.iter().position(|q| {
                q.as_ref().is_some_and(|q| q.port == h.to && q.index == h.queue && q.transmits())
            });
            match (table.port(h.to), place) {
                (Some(view), Some(place)) => {
                    let all = collect(&mut list, 0..run.len(), |_| true);
                    self.send_to_place(burst, all, place, view, h.mirror, shared);
                }
                _ => strays.dropped(Drop::PortDown, run.len() as u64),
            }
        }
        burst.clear();
        records.len()
    }
}

/// What a frame takes along to another thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct HandOff {
    to: PortId,
    queue: u16,
    vlan: u16,
    mirror: bool,
}

impl HandOff {
    fn to_bytes(self) -> [u8; 16] {
        let mut b = [0; 16];
        b[..2].copy_from_slice(&self.to.to_le_bytes());
        b[2..4].copy_from_slice(&self.queue.to_le_bytes());
        b[4..6].copy_from_slice(&self.vlan.to_le_bytes());
        b[6] = self.mirror.into();
        b
    }

    fn from_bytes(b: &[u8; 16]) -> Self {
        let word = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
        Self { to: word(0), queue: word(2), vlan: word(4), mirror: b[6] != 0 }
    }

    fn same_way(&self, o: &Self) -> bool {
        (self.to, self.queue, self.mirror) == (o.to, o.queue, o.mirror)
    }
}

/// The numbers in `range` that `wanted` says, in `list`.
#[inline]
fn collect(
    list: &mut [u8; BURST],
    range: std::ops::Range<usize>,
    wanted: impl Fn(usize) -> bool,
) -> &[u8] {
    let mut n = 0;
    for i in range {
        list[n] = i as u8;
        n += usize::from(wanted(i));
        if n == BURST {
            break;
        }
    }
    &list[..n]
}

/// Counts, checks, learns and looks up every frame of a burst.
#[inline]
fn classify(
    frames: &mut [Frame],
    verdicts: &mut [Verdict; BURST],
    from: Ingress<'_>,
    view: &PortView,
    shared: &Shared,
) {
    let (now, fdb) = (shared.now.load(Ordering::Relaxed), &shared.fdb);
    let (mut bytes, mut last) = (0, None);
    for f in frames.iter_mut() {
        bytes += u64::from(f.len);
        f.vlan = view.vlans.ingress(f.tci()).unwrap_or(NO_VLAN);
        // Frames of one conversation come together, and are looked up once.
        let way = Some((f.src(), f.dst(), f.vlan));
        if f.vlan != NO_VLAN && way != last {
            last = way;
            fdb.prefetch(Key::new(f.src(), f.vlan));
            fdb.prefetch(Key::new(f.dst(), f.vlan));
        }
    }
    let c = from.counters;
    c.rx_frames.add(frames.len() as u64);
    c.rx_bytes.add(bytes);
    c.rx_bursts.add(1);
    let (mut last_src, mut last_dst) = (None, None);
    for (f, verdict) in frames.iter().zip(verdicts) {
        *verdict = DROPPED;
        let (src, dst) = (f.src(), f.dst());
        let refused = if view.mirror_output {
            Some(Drop::NoDestination)
        } else if f.vlan == NO_VLAN {
            Some(Drop::Vlan)
        } else if src & GROUP != 0 || src == 0 {
            Some(Drop::BadSource)
        } else if dst & !0xf == RESERVED {
            Some(Drop::Reserved)
        } else if view.rate.as_ref().is_some_and(|l| !l.take(8 * u64::from(f.len))) {
            Some(Drop::RateLimit)
        } else {
            None
        };
        if let Some(reason) = refused {
            c.dropped(reason, 1);
            continue;
        }
        let key = Key::new(src, f.vlan);
        if last_src != Some(key) {
            fdb.learn(key, from.port, now);
            last_src = Some(key);
        }
        let found = if dst & GROUP != 0 {
            FLOOD
        } else {
            let key = Key::new(dst, f.vlan);
            match last_dst {
                Some((k, v)) if k == key => v,
                _ => {
                    let v = fdb.lookup(key).map_or(FLOOD, Verdict::from);
                    last_dst = Some((key, v));
                    v
                }
            }
        };
        if found == Verdict::from(from.port) {
            c.dropped(Drop::SamePort, 1);
        } else if found == FLOOD && view.storm.as_ref().is_some_and(|l| !l.take(1)) {
            c.dropped(Drop::StormLimit, 1);
        } else {
            *verdict = found;
        }
    }
}

/// No VLAN number: the frame's VLAN is none of its port's.
const NO_VLAN: u16 = u16::MAX;
