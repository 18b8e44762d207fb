//! Real rings against a socket pair (which keeps frame boundaries, as a tap does) and a real tap.
#![allow(unsafe_code)] // a back end of our own

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use mem::GuestMemory;
use net::HEADER;
use virtio::testing::{CountingInterrupt, DriverRing, ram};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::testing::CountingEvents;

const MAC: Mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

struct Wire(UnixDatagram);

impl Backend for Wire {
    fn name(&self) -> &str {
        "wire"
    }
    fn poll_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
    unsafe fn recv(&mut self, iov: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller's iovecs are valid.
        let n = unsafe { libc::readv(self.0.as_raw_fd(), iov.as_ptr(), iov.len() as i32) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }
    unsafe fn send(&mut self, iov: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller's iovecs are valid.
        let n = unsafe { libc::writev(self.0.as_raw_fd(), iov.as_ptr(), iov.len() as i32) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }
    fn capabilities(&self) -> Offloads {
        Offloads::ALL
    }
    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
    fn set_enabled(&mut self, _: bool) -> io::Result<()> {
        Ok(())
    }
    fn set_link(&mut self, _: bool) {}
    fn mtu(&self) -> u16 {
        1500
    }
}

fn config() -> NetConfig {
    NetConfig {
        name: "net0".into(),
        mac: MAC,
        rx_queue_size: 256,
        tx_queue_size: 256,
        host_mtu: None,
        packed: false,
    }
}

struct Machine {
    mem: GuestMemory,
    nic: VirtioNet,
    /// Receive, transmit, control.
    rings: [DriverRing; 3],
    kicks: Vec<EventFd>,
    events: Arc<CountingEvents>,
    next_rx: u64,
}

const RX_AT: u64 = 1 << 20;
const RX_STEP: u64 = 2048;
const TX_AT: u64 = 0x80000;

impl Machine {
    fn new(backend: Box<dyn Backend>, without: u64) -> Self {
        let mut nic = VirtioNet::new(config(), vec![backend]).unwrap();
        let mem = ram(8 << 20);
        let features = nic.traits().features & !without;
        let events = Arc::new(CountingEvents::default());
        nic.activate(features, events.clone()).unwrap();
        let ring = |at, size| DriverRing::new(&mem, at, size, features);
        let rings = [ring(0x10000, 256), ring(0x20000, 256), ring(0x30000, 64)];
        let mut m = Self { mem, nic, rings, kicks: Vec::new(), events, next_rx: 0 };
        m.start([None; 3]);
        m
    }

    fn start(&mut self, pos: [Option<RingPos>; 3]) {
        self.kicks.clear();
        for (i, pos) in pos.into_iter().enumerate() {
            let setup = self.rings[i].setup(pos, Arc::new(CountingInterrupt::default()));
            self.kicks.push(setup.kick.try_clone().unwrap());
            self.nic.start_queue(i, setup).unwrap();
        }
    }

    /// Gives `n` receive buffers of 1 KiB; address by order of use.
    fn give(&mut self, n: u64) {
        for _ in 0..n {
            let at = RX_AT + self.next_rx % 512 * RX_STEP;
            self.rings[0].add(&[], &[(at, 1024)], None).unwrap();
            self.next_rx += 1;
        }
        self.kicks[0].write(1).unwrap();
    }

    fn used(&mut self, queue: usize) -> (u16, u32) {
        let start = Instant::now();
        loop {
            if let Some(used) = self.rings[queue].poll_used() {
                return used;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "queue {queue}: nothing used");
            std::thread::yield_now();
        }
    }

    fn transmit(&mut self, frame: &[u8]) {
        self.mem.write(TX_AT, &[0; HEADER]).unwrap();
        self.mem.write(TX_AT + 4096, frame).unwrap();
        let chain = [(TX_AT, HEADER as u32), (TX_AT + 4096, frame.len() as u32)];
        self.rings[1].add(&chain, &[], None).unwrap();
        self.kicks[1].write(1).unwrap();
        self.used(1);
    }

    fn command(&mut self, bytes: &[u8]) -> u8 {
        self.mem.write(0x40000, bytes).unwrap();
        self.rings[2].add(&[(0x40000, bytes.len() as u32)], &[(0x41000, 1)], None).unwrap();
        self.kicks[2].write(1).unwrap();
        self.used(2);
        let mut ack = [9];
        self.mem.read(0x41000, &mut ack).unwrap();
        ack[0]
    }
}

fn wire() -> (UnixDatagram, Box<dyn Backend>) {
    let (far, near) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    (far, Box::new(Wire(near)))
}

fn frame(to: Mac, len: usize, seed: u8) -> Vec<u8> {
    let mut f = vec![0; HEADER];
    f.extend(to);
    f.extend((6..len).map(|i| (i as u8).wrapping_mul(3).wrapping_add(seed)));
    f
}

#[test]
fn frames_go_out_and_come_in_over_several_buffers() {
    let (far, near) = wire();
    let mut m = Machine::new(near, 0);
    m.transmit(&frame(MAC, 200, 1)[HEADER..]);
    let mut got = vec![0; 70000];
    let n = far.recv(&mut got).unwrap();
    assert_eq!(got[..n], frame(MAC, 200, 1));
    m.give(200);
    let f = frame(MAC, 3000, 5);
    far.send(&f).unwrap();
    let lens: Vec<u32> = (0..3).map(|_| m.used(0).1).collect();
    assert_eq!(lens, [1024, 1024, 3012 - 2048]);
    let mut data = Vec::new();
    for (i, len) in lens.iter().enumerate() {
        let mut part = vec![0; *len as usize];
        m.mem.read(RX_AT + i as u64 * RX_STEP, &mut part).unwrap();
        data.extend(part);
    }
    assert_eq!(data[10..12], [3, 0], "num_buffers");
    assert_eq!(data[HEADER..], f[HEADER..]);
    let s = m.nic.handle().stats();
    assert_eq!((s.rx_packets, s.rx_bytes, s.tx_packets, s.tx_bytes), (1, 3000, 1, 200));
}

#[test]
fn no_frame_is_lost_over_stops_and_starts() {
    let (far, near) = wire();
    let mut m = Machine::new(near, 0);
    m.give(200);
    let mut seen = 0u8;
    for round in 0..10u8 {
        for i in 0..5 {
            far.send(&frame(MAC, 100, round * 5 + i)).unwrap();
        }
        let pos = [0, 1, 2].map(|i| m.nic.stop_queue(i));
        let p = pos[0].unwrap();
        assert_eq!(p.avail, p.used, "buffers at hand went back");
        m.start(pos);
        for _ in 0..5 {
            assert_eq!(m.used(0).1, 112);
            let mut b = [0];
            let at = RX_AT + u64::from(seen) * RX_STEP + HEADER as u64 + 6;
            m.mem.read(at, &mut b).unwrap();
            assert_eq!(b[0], 18 + seen, "in order");
            seen += 1;
        }
    }
    assert_eq!(m.nic.handle().stats().rx_packets, 50);
}

#[test]
fn waits_for_buffers_and_filters() {
    let (far, near) = wire();
    let mut m = Machine::new(near, 0);
    far.send(&frame(MAC, 100, 0)).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(m.rings[0].poll_used().is_none());
    m.give(100);
    m.used(0);
    assert_eq!(m.command(&[0, 0, 0]), 0, "promiscuous off");
    let other = [2, 0, 0, 0, 0, 9];
    far.send(&frame(other, 100, 0)).unwrap();
    far.send(&frame(MAC, 77, 0)).unwrap();
    assert_eq!(m.used(0).1, 89);
    let mut table = vec![1, 0, 1, 0, 0, 0];
    table.extend(other);
    table.extend([0; 4]);
    assert_eq!(m.command(&table), 0);
    far.send(&frame(other, 66, 0)).unwrap();
    assert_eq!(m.used(0).1, 78);
    assert_eq!(m.command(&[1, 1, 2, 0, 0, 0, 0, 7]), 0);
    assert_eq!(m.nic.handle().mac(), [2, 0, 0, 0, 0, 7]);
    for bad in [&[9, 9][..], &[1, 0, 255, 255, 255, 255], &[0, 6, 1], &[4, 0, 9, 0], &[1]] {
        assert_eq!(m.command(bad), 1, "{bad:?}");
    }
    assert_eq!(m.nic.handle().stats().rx_dropped, 1);
}

#[test]
fn link_announce_and_state() {
    let (far, near) = wire();
    let mut m = Machine::new(near, 0);
    let handle = m.nic.handle();
    let status = |m: &Machine| {
        let mut s = [0; 2];
        m.nic.read_config(6, &mut s);
        s[0]
    };
    handle.set_link(false);
    assert_eq!((status(&m), m.events.changed.load(Ordering::SeqCst)), (0, 1));
    m.transmit(&frame(MAC, 100, 1)[HEADER..]);
    assert_eq!(handle.stats().tx_dropped, 1);
    handle.set_link(true);
    m.nic.arrived();
    assert_eq!(status(&m), 3);
    for _ in 0..5 {
        let mut got = [0; 100];
        assert_eq!(far.recv(&mut got).unwrap(), HEADER + 60);
        assert_eq!(
            (&got[HEADER + 6..][..6], &got[HEADER + 12..][..2]),
            (&MAC[..], &[0x80, 0x35][..])
        );
    }
    assert_eq!(m.command(&[3, 0]), 0);
    assert_eq!(status(&m), 1);
    m.command(&[0, 0, 0]);
    for i in 0..3 {
        m.nic.stop_queue(i);
    }
    let saved = m.nic.save().unwrap();
    let (kind, version) = m.nic.state_kind();
    let mut other = VirtioNet::new(config(), vec![wire().1]).unwrap();
    other.restore(kind, version, &saved).unwrap();
    assert_eq!(other.save().unwrap(), saved);
    assert!(other.restore(kind, version, &saved[1..]).is_err());
    assert!(other.restore("virtio-blk", version, &saved).is_err());
}

#[test]
fn nonsense_stops_one_queue_only() {
    let (_far, near) = wire();
    let mut m = Machine::new(near, 0);
    m.mem.store_u16(m.rings[1].avail + 2, 9999, Ordering::SeqCst).unwrap();
    m.kicks[1].write(1).unwrap();
    let start = Instant::now();
    while m.events.reset.load(Ordering::SeqCst) == 0 {
        assert!(start.elapsed() < Duration::from_secs(10));
        std::thread::yield_now();
    }
    assert_eq!(m.command(&[0, 1, 1]), 0);
    m.nic.reset();
}

#[test]
fn a_real_tap_carries_frames() {
    let options = net::TapOptions { queues: 1, ..Default::default() };
    let tap = match net::Tap::open(&options) {
        Ok(mut taps) => taps.remove(0),
        Err(e) => return println!("skipped: {e}"),
    };
    let name = tap.ifname().to_owned();
    let mut m = Machine::new(Box::new(tap), 0);
    // IPv6 on the host talks by itself when an interface comes up; give it buffers, send one.
    m.give(200);
    m.transmit(&frame([0xff; 6], 100, 1)[HEADER..]);
    let path = format!("/sys/class/net/{name}/statistics/rx_packets");
    let packets: u64 = std::fs::read_to_string(path).unwrap().trim().parse().unwrap();
    assert_eq!(packets, 1);
    assert_eq!(m.nic.handle().stats().tx_packets, 1);
}
