//! Real rings, real files: a driver's requests, good and bad, to a whole device.

use std::time::{Duration, Instant};

use block::DiskOptions;
use mem::GuestMemory;
use virtio::testing::{CountingInterrupt, DriverRing, ram};

use super::*;
use crate::testing::CountingEvents;

/// Where requests are, each in a slot of its own: its neighbours may be in flight.
const SLOTS_AT: u64 = 0x20000;
const SLOTS: u64 = 16;
const SLOT: u64 = 0x8000;
/// What a slot holds, and where.
const HEADER: u64 = 0;
const STATUS: u64 = 0x10;
const OUT: u64 = 0x1000;
const IN: u64 = 0x4000;

struct Machine {
    _file: tempfile::NamedTempFile,
    mem: GuestMemory,
    blk: VirtioBlk,
    ring: DriverRing,
    kick: vmm_sys_util::eventfd::EventFd,
    events: Arc<CountingEvents>,
    /// Requests that were sent.
    sent: u64,
    /// Slots by the ids that their requests have on the ring.
    slots: std::collections::HashMap<u16, u64>,
    /// The slot of the last answer.
    answered: u64,
}

impl Machine {
    fn new(packed: bool, unmap: bool) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let mut o = DiskOptions::new(file.path());
        o.unmap = unmap;
        let disk = Disk::open(&o).unwrap();
        let config = BlkConfig {
            name: "disk0".into(),
            serial: "tern-serial".into(),
            num_queues: 1,
            queue_size: 64,
            write_cache: true,
            packed,
        };
        let mut blk = VirtioBlk::new(config, disk).unwrap();
        let mem = ram(1 << 20);
        let features = blk.traits().features;
        let ring = DriverRing::new(&mem, 0x1000, 64, features);
        let events = Arc::new(CountingEvents::default());
        blk.activate(features, events.clone()).unwrap();
        let kick = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        let slots = std::collections::HashMap::new();
        let mut m = Self { _file: file, mem, blk, ring, kick, events, sent: 0, slots, answered: 0 };
        m.start(None);
        m
    }

    fn start(&mut self, pos: Option<RingPos>) {
        let setup = self.ring.setup(pos, Arc::new(CountingInterrupt::default()));
        self.kick = setup.kick.try_clone().unwrap();
        self.blk.start_queue(0, setup).unwrap();
    }

    fn send(&mut self, kind: u32, sector: u64, out: &[u8], room: u32) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        assert!(out.len() as u64 <= IN - OUT && u64::from(room) <= SLOT - IN);
        let slot = SLOTS_AT + self.sent % SLOTS * SLOT;
        self.sent += 1;
        self.mem.write(slot + HEADER, &header).unwrap();
        self.mem.write(slot + OUT, out).unwrap();
        self.mem.write(slot + STATUS, &[0xee]).unwrap();
        let mut readable = vec![(slot + HEADER, 16)];
        let mut writable = Vec::new();
        if !out.is_empty() {
            readable.push((slot + OUT, out.len() as u32));
        }
        if room > 0 {
            writable.push((slot + IN, room));
        }
        writable.push((slot + STATUS, 1));
        let id = self.ring.add(&readable, &writable, None).unwrap();
        assert!(self.slots.insert(id, slot).is_none());
        self.kick.write(1).unwrap();
    }

    /// Waits for the answer: status and bytes written.
    fn answer(&mut self) -> (u8, u32) {
        let start = Instant::now();
        loop {
            if let Some((id, len)) = self.ring.poll_used() {
                let mut status = [0];
                self.answered = self.slots.remove(&id).unwrap();
                self.mem.read(self.answered + STATUS, &mut status).unwrap();
                return (status[0], len);
            }
            assert!(start.elapsed() < Duration::from_secs(10), "no answer");
            std::thread::yield_now();
        }
    }

    fn ask(&mut self, kind: u32, sector: u64, out: &[u8], room: u32) -> (u8, u32) {
        self.send(kind, sector, out, room);
        self.answer()
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.mem.read(self.answered + IN, &mut data).unwrap();
        data
    }
}

#[test]
fn writes_are_read_back_and_counted() {
    for packed in [false, true] {
        let mut m = Machine::new(packed, true);
        let block: Vec<u8> = (0..8192u32).map(|i| (i % 253) as u8).collect();
        assert_eq!(m.ask(1, 8, &block, 0), (0, 1));
        assert_eq!(m.ask(4, 0, &[], 0), (0, 1));
        assert_eq!(m.ask(0, 8, &[], 8192), (0, 8193));
        assert_eq!(m.data(8192), block);
        assert_eq!(m.ask(8, 0, &[], 20), (0, 21));
        assert_eq!(&m.data(11), b"tern-serial");
        let s = m.blk.handle().stats();
        assert_eq!((s.write.bytes, s.read.bytes, s.flush.operations), (8192, 8192, 1));
        assert_eq!(s.wr_highest_offset, 8 * 512 + 8192);
    }
}

#[test]
fn discard_and_write_zeroes() {
    let mut m = Machine::new(false, true);
    assert_eq!(m.ask(1, 0, &[7; 4096], 0).0, 0);
    let segment = |sector: u64, count: u32, flags: u32| {
        let mut s = sector.to_le_bytes().to_vec();
        s.extend(count.to_le_bytes());
        s.extend(flags.to_le_bytes());
        s
    };
    assert_eq!(m.ask(13, 0, &segment(1, 2, 1), 0), (0, 1));
    assert_eq!(m.ask(0, 0, &[], 2048).0, 0);
    let d = m.data(2048);
    assert!(d[..512].iter().all(|b| *b == 7) && d[1536..].iter().all(|b| *b == 7));
    assert!(d[512..1536].iter().all(|b| *b == 0));
    assert_eq!(m.ask(11, 0, &segment(0, 8, 0), 0).0, 0);
    assert_eq!(m.ask(11, 0, &segment(0, 8, 1), 0).0, 2);
    assert_eq!(m.ask(13, 0, &segment(0, 8, 4), 0).0, 2);
    assert_eq!(m.ask(11, 0, &segment(2040, 9, 0), 0).0, 1);
    assert_eq!(m.ask(13, 0, &segment(u64::MAX, 9, 0), 0).0, 1);
    assert_eq!(m.ask(13, 0, &[0; 15], 0).0, 1);
}

#[test]
fn nonsense_gets_an_error_and_no_more() {
    let mut m = Machine::new(false, false);
    for (kind, sector, out, room) in [
        (0, 2048, 0, 512),
        (0, 2047, 0, 1024),
        (0, u64::MAX, 0, 512),
        (0, 0, 0, 511),
        (0, 0, 512, 0),
        (1, 0, 0, 512),
        (1, 2048, 512, 0),
        (1, 0, 100, 0),
    ] {
        let out = vec![1; out];
        assert_eq!(m.ask(kind, sector, &out, room).0, 1, "{kind} {sector} {room}");
    }
    assert_eq!(m.ask(99, 0, &[], 0).0, 2);
    assert_eq!(m.events.reset.load(Ordering::SeqCst), 0);
    assert_eq!(m.ask(0, 0, &[], 512).0, 0);
    // No header: the device gives up and can still be stopped and reset.
    let id = m.ring.add(&[(SLOTS_AT, 8)], &[(SLOTS_AT + STATUS, 1)], None).unwrap();
    m.slots.insert(id, SLOTS_AT);
    m.kick.write(1).unwrap();
    m.answer();
    let start = Instant::now();
    while m.events.reset.load(Ordering::SeqCst) == 0 {
        assert!(start.elapsed() < Duration::from_secs(10));
        std::thread::yield_now();
    }
    assert!(m.blk.stop_queue(0).is_some());
    m.blk.reset();
}

#[test]
fn stops_with_nothing_in_flight_and_goes_on_where_it_was() {
    let mut m = Machine::new(false, true);
    for round in 0..20u64 {
        for i in 0..8 {
            m.send(1, i * 8, &[round as u8; 4096], 0);
        }
        let pos = m.blk.stop_queue(0).unwrap();
        assert_eq!(pos.avail, pos.used);
        assert!(m.blk.stop_queue(0).is_none());
        m.start(Some(pos));
        for _ in 0..8 {
            assert_eq!(m.answer().0, 0);
        }
    }
}

#[test]
fn state_moves_and_what_does_not_fit_is_refused() {
    let mut a = Machine::new(false, true);
    a.blk.write_config(WRITEBACK_OFFSET as u32, &[0]);
    a.blk.stop_queue(0);
    let saved = a.blk.save().unwrap();
    let (kind, version) = a.blk.state_kind();
    let mut b = Machine::new(false, true);
    b.blk.stop_queue(0);
    b.blk.restore(kind, version, &saved).unwrap();
    assert!(!b.blk.handle().writeback());
    assert_eq!(b.blk.save().unwrap(), saved);
    assert!(b.blk.restore(kind, 99, &saved).is_err());
    assert!(b.blk.restore(kind, version, &saved[..3]).is_err());
    b._file.as_file().set_len(2 << 20).unwrap();
    assert_eq!(b.blk.handle().refresh_size().unwrap(), 2 << 20);
    assert_eq!(b.events.changed.load(Ordering::SeqCst), 1);
    let e = b.blk.restore(kind, version, &saved).unwrap_err().to_string();
    assert!(e.contains("2048 sectors at the source"), "{e}");
}
