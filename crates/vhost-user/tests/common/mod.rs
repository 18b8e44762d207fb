//! A device that copies what a chain has to read into what it has to write, and threads to serve it.
#![allow(dead_code)] // not every test uses everything

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use mem::{Backing, GuestMemory, RegionSpec};
use vhost_user::backend::{Backend, Postcopy};
use vhost_user::{Connection, Error, Frontend, protocol};
use virtio::features::{
    VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, mask,
};
use virtio::testing::DriverRing;
use virtio::{Chain, InflightQueue, Interrupt, Queue, RingPos, RingSetup};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const RINGS: usize = 4;

/// What the tests see of a device, and how they steer it.
#[derive(Default)]
pub struct Shared {
    pub calls: Mutex<Vec<String>>,
    /// Take chains and hold on to them.
    pub hold: AtomicBool,
    /// Rings stop as if the process had died: what was taken is neither used nor given back.
    pub die: AtomicBool,
    pub resubmitted: Mutex<usize>,
}

impl Shared {
    pub fn log(&self, what: impl Into<String>) {
        self.calls.lock().unwrap().push(what.into());
    }

    pub fn calls(&self) -> Vec<String> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

struct Started {
    queue: Queue,
    enabled: bool,
    held: Vec<Chain>,
}

pub struct Copier {
    pub shared: Arc<Shared>,
    queues: Vec<Option<Started>>,
    config: [u8; 64],
    pub features: u64,
    pub postcopy: bool,
}

impl Copier {
    pub fn new(shared: &Arc<Shared>) -> Self {
        let features = mask(VIRTIO_F_EVENT_IDX)
            | mask(VIRTIO_F_INDIRECT_DESC)
            | mask(VIRTIO_F_VERSION_1)
            | mask(VIRTIO_F_RING_PACKED);
        let queues = (0..RINGS).map(|_| None).collect();
        Self { shared: shared.clone(), queues, config: [0; 64], features, postcopy: false }
    }

    /// Serves what there is.
    pub fn step(&mut self) {
        for started in self.queues.iter_mut().flatten() {
            let Started { queue, enabled, held } = started;
            queue.ack_kick();
            if !*enabled {
                continue;
            }
            let mut chain = Chain::new();
            while let Ok(true) = queue.pop(&mut chain) {
                if self.shared.hold.load(Ordering::SeqCst) {
                    held.push(std::mem::take(&mut chain));
                    continue;
                }
                copy(queue, &chain);
            }
            if !self.shared.hold.load(Ordering::SeqCst) {
                held.drain(..).for_each(|chain| copy(queue, &chain));
            }
            queue.flush();
            queue.ring.enable_kicks();
        }
    }
}

fn copy(queue: &mut Queue, chain: &Chain) {
    let mut bytes = vec![0; chain.readable_len() as usize];
    chain.read_at(0, &mut bytes);
    let n = chain.write_at(0, &bytes);
    queue.push(chain, n as u32);
}

impl Backend for Copier {
    fn features(&self) -> u64 {
        self.features
    }

    fn protocol_features(&self) -> u64 {
        let common = protocol::COMMON | protocol::RARP | protocol::MTU | protocol::CONFIG;
        common | if self.postcopy { protocol::PAGEFAULT } else { 0 }
    }

    fn max_queues(&self) -> usize {
        RINGS
    }

    fn queue_num(&self) -> u64 {
        RINGS as u64 / 2
    }

    fn activate(&mut self, features: u64) -> Result<(), String> {
        self.shared.log(format!("activate {features:#x}"));
        Ok(())
    }

    fn set_polled(&mut self, index: usize, polled: bool) {
        if polled {
            self.shared.log(format!("polled {index}"));
        }
    }

    fn start_queue(
        &mut self,
        index: usize,
        ring: RingSetup,
        inflight: Option<InflightQueue>,
    ) -> Result<(), String> {
        assert!(self.queues[index].is_none(), "ring {index} was started twice");
        self.shared.log(format!("start {index}"));
        let mut queue = Queue::new(ring).map_err(|e| e.to_string())?;
        if let Some(inflight) = inflight {
            *self.shared.resubmitted.lock().unwrap() += inflight.to_resubmit();
            queue.ring.track(inflight);
        }
        self.queues[index] = Some(Started { queue, enabled: false, held: Vec::new() });
        Ok(())
    }

    fn stop_queue(&mut self, index: usize) -> Option<RingPos> {
        self.shared.log(format!("stop {index}"));
        let mut started = self.queues[index].take()?;
        if self.shared.die.load(Ordering::SeqCst) {
            return None;
        }
        for chain in started.held.drain(..).rev() {
            started.queue.ring.unpop(&chain).expect("the last one");
        }
        Some(started.queue.stop())
    }

    fn set_enabled(&mut self, index: usize, enabled: bool) {
        self.shared.log(format!("enable {index} {enabled}"));
        self.queues[index].as_mut().expect("only started rings").enabled = enabled;
    }

    fn send_rarp(&mut self, mac: [u8; 6]) {
        self.shared.log(format!("rarp {mac:x?}"));
    }

    fn set_mtu(&mut self, mtu: u16) -> Result<(), String> {
        if mtu < 68 {
            return Err(format!("an MTU of {mtu} is below 68"));
        }
        self.shared.log(format!("mtu {mtu}"));
        Ok(())
    }

    fn get_config(&self, offset: u32, data: &mut [u8]) -> Option<()> {
        let from = self.config.get(offset as usize..)?.get(..data.len())?;
        data.copy_from_slice(from);
        Some(())
    }

    fn set_config(&mut self, offset: u32, data: &[u8], _migration: bool) -> Result<(), String> {
        let to = self.config.get_mut(offset as usize..).and_then(|c| c.get_mut(..data.len()));
        to.ok_or("beyond the end")?.copy_from_slice(data);
        Ok(())
    }

    fn set_status(&mut self, status: u8) {
        self.shared.log(format!("status {status}"));
    }

    fn postcopy(&mut self, step: Postcopy<'_>) -> Result<Option<OwnedFd>, String> {
        Ok(match step {
            // Stands for a userfaultfd.
            Postcopy::Advise => Some(vhost_user::testing::memfd(7).into()),
            Postcopy::Memory(mem) => {
                self.shared.log(format!("fault in {} regions", mem.regions().len()));
                None
            }
            Postcopy::Listen | Postcopy::End => None,
        })
    }

    fn reset(&mut self) {
        assert!(self.queues.iter().all(Option::is_none), "reset with rings");
        self.shared.log("reset");
    }
}

/// A back end on a thread of its own, until its connection ends or it is told to.
pub struct Server {
    pub shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Option<Error>>>,
}

impl Server {
    pub fn spawn(stream: UnixStream) -> Self {
        Self::with(stream, Copier::new)
    }

    pub fn with(
        stream: UnixStream,
        device: impl FnOnce(&Arc<Shared>) -> Copier + Send + 'static,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        let stop = Arc::new(AtomicBool::new(false));
        let (s, stopped) = (shared.clone(), stop.clone());
        let thread = std::thread::spawn(move || serve(stream, device(&s), &stopped));
        Self { shared, stop, thread: Some(thread) }
    }

    /// Waits for the connection's end; what ended it.
    pub fn end(mut self) -> Error {
        let thread = self.thread.take().expect("joined once");
        thread.join().expect("the back end's thread").expect("it was not stopped")
    }

    /// Ends it here and now; with `die` as if the process had been killed.
    pub fn stop(mut self, die: bool) {
        self.shared.die.store(die, Ordering::SeqCst);
        self.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.take().expect("joined once");
        let end = thread.join().expect("the back end's thread");
        assert!(end.is_none(), "it had ended before: {end:?}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take()
            && !std::thread::panicking()
        {
            let _ = thread.join();
        }
    }
}

fn serve(stream: UnixStream, device: Copier, stop: &AtomicBool) -> Option<Error> {
    let mut connection = Connection::new(stream, device).expect("a connection");
    while !stop.load(Ordering::SeqCst) {
        let mut poll = libc::pollfd { fd: connection.fd(), events: libc::POLLIN, revents: 0 };
        #[allow(unsafe_code)]
        // SAFETY: one valid pollfd.
        unsafe {
            libc::poll(&mut poll, 1, 1);
        }
        if let Err(e) = connection.process() {
            return Some(e);
        }
        connection.device_mut().step();
    }
    None
}

/// An interrupt that is an eventfd.
pub struct Eventfd(pub EventFd);

impl Interrupt for Eventfd {
    fn notify(&self) {
        self.0.write(1).expect("an eventfd");
    }

    fn eventfd(&self) -> Option<EventFd> {
        self.0.try_clone().ok()
    }
}

pub const TIMEOUT: Duration = Duration::from_secs(20);
pub const RAM: u64 = 0x40_0000;
pub const SIZE: u16 = 64;

/// Two regions of shareable memory.
pub fn memory() -> GuestMemory {
    let specs =
        [RegionSpec { gpa: 0, size: RAM }, RegionSpec { gpa: 0x1_0000_0000, size: 0x10_0000 }];
    GuestMemory::new(&specs, &Backing::default()).unwrap()
}

/// A driver's ring that a back end serves.
pub struct Driver {
    pub ring: DriverRing,
    pub kick: EventFd,
    pub call: Arc<Eventfd>,
    index: u8,
    sent: u64,
    pub expected: std::collections::HashMap<u16, (u64, Vec<u8>)>,
}

impl Driver {
    pub fn new(mem: &GuestMemory, index: u8, features: u64) -> Self {
        let base = 0x1000 + u64::from(index) * DriverRing::bytes(SIZE);
        Self {
            ring: DriverRing::new(mem, base, SIZE, features),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: Arc::new(Eventfd(EventFd::new(EFD_NONBLOCK).unwrap())),
            index,
            sent: 0,
            expected: std::collections::HashMap::new(),
        }
    }

    pub fn start(&self, front: &mut Frontend, pos: Option<RingPos>) {
        let mut setup = self.ring.setup(pos, self.call.clone());
        setup.kick = self.kick.try_clone().unwrap();
        front.start_ring(self.index, &setup).unwrap();
        front.enable_ring(self.index, true).unwrap();
    }

    /// Gives the device something to copy; whether there was room.
    pub fn send(&mut self) -> bool {
        let n = self.sent;
        let at = 0x10_0000 + u64::from(self.index) * 0x4_0000 + n % 64 * 0x1000;
        let to = if n.is_multiple_of(3) { 0x1_0000_0000 + n % 64 * 0x1000 } else { at + 0x800 };
        let to = to + u64::from(self.index) * 0x4_0000 * u64::from(n.is_multiple_of(3));
        let text: Vec<u8> = (0..100 + n % 700).map(|i| (i * 7 + n * 13) as u8).collect();
        let table = n.is_multiple_of(2).then_some(at + 0x700);
        let len = text.len() as u32;
        let (first, second) = (len / 3, len - len / 3);
        // 64 slots, at most 20 outstanding: a slot is free again when its turn comes.
        self.ring.mem.write(at, &text).unwrap();
        let readable = [(at, first), (at + u64::from(first), second)];
        let Some(id) = self.ring.add(&readable, &[(to, len)], table) else { return false };
        self.expected.insert(id, (to, text));
        self.sent += 1;
        true
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Looks at what was used, and whether the right bytes are there.
    pub fn receive(&mut self) -> usize {
        let mut count = 0;
        while let Some((id, len)) = self.ring.poll_used() {
            let (at, text) = self.expected.remove(&id).expect("outstanding");
            let mut got = vec![0; text.len()];
            self.ring.mem.read(at, &mut got).unwrap();
            assert_eq!(len as usize, text.len());
            assert!(got == text, "other bytes at {at:#x}");
            count += 1;
        }
        count
    }

    /// Sends and receives until `count` have come back.
    pub fn exchange(&mut self, count: usize) {
        let mut got = 0;
        let deadline = std::time::Instant::now() + TIMEOUT;
        while got < count {
            while self.expected.len() < 20 && got + self.expected.len() < count && self.send() {}
            self.kick();
            got += self.receive();
            assert!(std::time::Instant::now() < deadline, "nothing comes back any more");
            std::thread::yield_now();
        }
    }
}

/// What a driver accepts.
pub fn features(packed: bool) -> u64 {
    let common = mask(VIRTIO_F_EVENT_IDX) | mask(VIRTIO_F_INDIRECT_DESC) | mask(VIRTIO_F_VERSION_1);
    common | if packed { mask(VIRTIO_F_RING_PACKED) } else { 0 }
}

/// Waits until `done`.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + TIMEOUT;
    while !done() {
        assert!(std::time::Instant::now() < deadline, "{what} does not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}
