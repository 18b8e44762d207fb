//! A poll thread, or several, with guests at its ports: real rings in shared memory, the driver's
//! side played by `virtio::testing`.
#![allow(dead_code)] // every test binary uses a part of it

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mem::GuestMemory;
use virtio::RingSetup;
use virtio::features::{
    VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, mask,
};
use virtio::testing::{CountingInterrupt, DriverRing, ram};
use vmm_sys_util::eventfd::EventFd;
use vswitch::PortSpec;
use vswitch::counters::QueueCounters;
use vswitch::header::{GSO_TCPV4, HEADER_LEN, NEEDS_CSUM, VnetHeader};
use vswitch::interface_port::InterfacePort;
use vswitch::queue::{Io, Queue};
use vswitch::shared::{Message, PollMode, Shared};
use vswitch::table::{PortId, PortView, Table};
use vswitch::vhost_queue::{RxRing, TxRing, feature};
use vswitch::vlan::Vlans;
use vswitch::worker::Worker;

pub const PLAIN: u64 = mask(VIRTIO_F_VERSION_1) | mask(VIRTIO_F_INDIRECT_DESC);
pub const MERGE: u64 = mask(feature::MRG_RXBUF);
pub const PACKED: u64 = mask(VIRTIO_F_RING_PACKED);
pub const EVENT: u64 = mask(VIRTIO_F_EVENT_IDX);
pub const OFFLOADS: u64 =
    mask(feature::GUEST_CSUM) | mask(feature::GUEST_TSO4) | mask(feature::GUEST_TSO6);

/// Memory of a guest.
pub const GUEST_BYTES: u64 = 0x400_0000;
const SIZE: u16 = 256;
const TX_BUFFERS: u64 = 0x40_0000;
const RX_BUFFERS: u64 = 0x100_0000;

/// A guest with one queue.
pub struct Guest {
    pub mem: GuestMemory,
    pub tx: DriverRing,
    pub rx: DriverRing,
    pub tx_kick: EventFd,
    pub rx_call: Arc<CountingInterrupt>,
    pub counters: Arc<QueueCounters>,
    buffer: u32,
    features: u64,
    next_tx: u64,
    free_rx: Vec<u64>,
    rx_at: std::collections::HashMap<u16, u64>,
}

impl Guest {
    fn new(features: u64, buffer: u32) -> (Self, RingSetup, RingSetup) {
        Self::with_memory(ram(GUEST_BYTES), features, buffer)
    }

    /// One whose memory is `mem`, of [`GUEST_BYTES`].
    pub fn with_memory(
        mem: GuestMemory,
        features: u64,
        buffer: u32,
    ) -> (Self, RingSetup, RingSetup) {
        let tx = DriverRing::new(&mem, 0x1000, SIZE, features);
        let rx = DriverRing::new(&mem, 0x10_0000, SIZE, features);
        let call = Arc::new(CountingInterrupt::default());
        let tx_setup = tx.setup(None, Arc::new(CountingInterrupt::default()));
        let rx_setup = rx.setup(None, call.clone());
        let tx_kick = tx_setup.kick.try_clone().unwrap();
        let slot = u64::from(buffer.next_multiple_of(64));
        let mut g = Self {
            mem,
            tx,
            rx,
            tx_kick,
            rx_call: call,
            counters: Arc::default(),
            buffer,
            features,
            next_tx: 0,
            free_rx: (0..u64::from(SIZE)).map(|i| RX_BUFFERS + i * slot).collect(),
            rx_at: std::collections::HashMap::new(),
        };
        g.refill();
        (g, tx_setup, rx_setup)
    }

    /// Makes all its receive buffers available.
    pub fn refill(&mut self) {
        while let Some(at) = self.free_rx.pop() {
            match self.rx.add(&[], &[(at, self.buffer)], None) {
                Some(id) => self.rx_at.insert(id, at),
                None => return self.free_rx.push(at),
            };
        }
    }

    /// Sends a frame cut into buffers of `pieces` bytes (the rest in one more), and kicks if asked
    /// to. Waits for room.
    pub fn send_pieces(&mut self, header: VnetHeader, frame: &[u8], pieces: &[usize]) {
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend_from_slice(frame);
        // 150 slots of 72 KiB.
        let at = TX_BUFFERS + self.next_tx % 150 * 0x1_2000;
        self.next_tx += 1;
        let mut buffers = Vec::new();
        let mut done = 0;
        for n in pieces.iter().copied().chain([bytes.len()]) {
            let n = n.min(bytes.len() - done);
            if n > 0 {
                buffers.push((at + done as u64, n as u32));
                done += n;
            }
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        // No more in flight than buffers do not overlap.
        while self.tx.outstanding() > 100 || self.tx.room() < buffers.len() {
            if self.tx.poll_used().is_none() {
                assert!(Instant::now() < deadline, "the switch does not take frames");
                std::thread::yield_now();
            }
        }
        self.mem.write(at, &bytes).unwrap();
        self.tx.add(&buffers, &[], None).unwrap();
        if self.tx.needs_kick() {
            self.tx_kick.write(1).unwrap();
        }
    }

    pub fn send(&mut self, frame: &[u8]) {
        self.send_pieces(VnetHeader::default(), frame, &[]);
    }

    /// The next frame that has come, without waiting.
    pub fn try_receive(&mut self) -> Option<(VnetHeader, Vec<u8>)> {
        let (id, len) = self.rx.poll_used()?;
        let mut bytes = self.take(id, len);
        let header = VnetHeader::from_bytes(bytes[..HEADER_LEN].try_into().unwrap());
        for _ in 1..header.num_buffers {
            // All parts of a frame are published together.
            let (id, len) = self.rx.poll_used().expect("the rest of a merged frame");
            let more = self.take(id, len);
            bytes.extend(more);
        }
        self.refill();
        Some((header, bytes.split_off(HEADER_LEN)))
    }

    fn take(&mut self, id: u16, len: u32) -> Vec<u8> {
        let at = self.rx_at.remove(&id).unwrap();
        self.free_rx.push(at);
        assert!(len <= self.buffer);
        let mut bytes = vec![0; len as usize];
        self.mem.read(at, &mut bytes).unwrap();
        bytes
    }

    /// The next frame.
    pub fn receive(&mut self) -> (VnetHeader, Vec<u8>) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(got) = self.try_receive() {
                return got;
            }
            assert!(Instant::now() < deadline, "no frame has come");
            std::thread::yield_now();
        }
    }
}

/// How a port is made.
pub struct PortOptions {
    pub features: u64,
    pub buffer: u32,
    pub view: PortView,
    pub thread: u16,
}

impl Default for PortOptions {
    fn default() -> Self {
        let view = PortView { max_frame: u32::MAX - 4, ..PortView::default() };
        Self { features: PLAIN, buffer: 2048, view, thread: 0 }
    }
}

impl PortOptions {
    pub fn vlan(vlan: Option<u16>, trunk: &[u16]) -> Self {
        let mut o = Self::default();
        o.view.vlans = Vlans::new(vlan, trunk);
        o
    }
}

/// What is known of a port on an interface.
pub struct Interface {
    pub counters: Arc<QueueCounters>,
    /// Its interface stays attached as long as this lives.
    pub kept: InterfacePort,
}

/// Poll threads with ports.
pub struct Net {
    pub shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    pub views: Vec<PortView>,
}

impl Net {
    pub fn new(threads: usize, poll: PollMode, ports: Vec<PortOptions>) -> (Self, Vec<Guest>) {
        let shared = Shared::new(threads, 1024, poll).unwrap();
        let handles = (0..threads)
            .map(|t| {
                let worker = Worker::new(shared.clone(), t).unwrap();
                std::thread::spawn(move || worker.run())
            })
            .collect();
        let mut net = Self { shared, threads: handles, views: Vec::new() };
        let guests = ports.into_iter().map(|o| net.add(o)).collect();
        net.publish();
        (net, guests)
    }

    /// Adds a port on an interface of the host, as `NAME,type=...`; one queue of it, on thread 0.
    pub fn add_interface(&mut self, spec: &str) -> Interface {
        let port = self.views.len() as PortId;
        let spec = PortSpec::parse(spec).unwrap();
        let (kept, mut ios) = InterfacePort::open(&spec).unwrap();
        assert_eq!(ios.len(), 1);
        let counters: Arc<QueueCounters> = Arc::default();
        let queue = Queue {
            port,
            index: 0,
            io: ios.remove(0),
            counters: counters.clone(),
            rx_enabled: true,
            tx_enabled: true,
            rx_broken: false,
        };
        self.shared.mailboxes[0].send(Message::Add(Box::new(queue)));
        let vlans = spec.vlans();
        let tx_owners = vec![(0, 0)];
        self.views.push(PortView {
            max_frame: u32::MAX - 4,
            vlans,
            tx_owners,
            ..PortView::default()
        });
        self.publish();
        Interface { counters, kept }
    }

    fn add(&mut self, o: PortOptions) -> Guest {
        let port = self.views.len() as PortId;
        let (guest, tx, rx) = Guest::new(o.features, o.buffer);
        let queue = Queue {
            port,
            index: 0,
            io: Io::Vhost { rx: None, tx: None },
            counters: guest.counters.clone(),
            rx_enabled: false,
            tx_enabled: false,
            rx_broken: false,
        };
        let to = &self.shared.mailboxes[usize::from(o.thread)];
        to.send(Message::Add(Box::new(queue)));
        let ring = Box::new(RxRing::new(tx, None).unwrap());
        to.send(Message::StartRx { port, index: 0, ring });
        let ring = Box::new(TxRing::new(&rx, None).unwrap());
        to.send(Message::StartTx { port, index: 0, ring });
        to.send(Message::Enable { port, index: 0, tx: false, on: true });
        to.send(Message::Enable { port, index: 0, tx: true, on: true });
        self.views.push(PortView { tx_owners: vec![(o.thread, 0)], ..o.view });
        guest
    }

    /// Shows the poll threads `views`, and returns when they have handled what was sent before.
    pub fn publish(&self) {
        let ports = self.views.iter().map(|v| Some(Arc::new(v.clone().finished()))).collect();
        self.shared.publish(Table { ports, ageing: 300 });
        for m in &self.shared.mailboxes {
            let (done, gone) = crossbeam_channel::bounded(1);
            m.send(Message::Remove { port: 9999, index: 0, done });
            let _ = gone.recv();
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for m in &self.shared.mailboxes {
            m.send(Message::Stop);
        }
        for t in self.threads.drain(..) {
            let ended = t.join();
            if !std::thread::panicking() {
                ended.unwrap();
            }
        }
    }
}

/// A frame from address `src` to `dst` (last bytes; 0xff: broadcast) with `len` bytes that tell its
/// number apart from others'.
pub fn frame(dst: u8, src: u8, len: usize, number: usize) -> Vec<u8> {
    let mut f = if dst == 0xff { vec![0xff; 6] } else { vec![2, 0, 0, 0, 0, dst] };
    f.extend([2, 0, 0, 0, 0, src, 0x88, 0xb5]);
    f.extend((0..len.saturating_sub(14)).map(|i| (i * 31 + number * 7) as u8));
    f
}

/// The same with a tag.
pub fn tagged(dst: u8, src: u8, tci: u16, len: usize, number: usize) -> Vec<u8> {
    let mut f = frame(dst, src, len - 4, number);
    let tag: Vec<u8> = [0x81, 0].into_iter().chain(tci.to_be_bytes()).collect();
    f.splice(12..12, tag);
    f
}

/// A TCP segment from address 0 to 1, that leaves its checksum, and cutting, to others.
pub fn tcp(payload: usize) -> (VnetHeader, Vec<u8>) {
    let mut f = frame(1, 0, 14, 0);
    f[12..14].copy_from_slice(&[8, 0]);
    f.extend([0x45, 0]);
    f.extend(((payload + 40) as u16).to_be_bytes());
    f.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    f.extend([0, 80, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    f.extend((0..payload).map(|i| i as u8));
    let h = VnetHeader {
        flags: NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };
    (h, f)
}
