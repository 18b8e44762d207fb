//! A fake host (vectors, doorbells, a line) and a fake driver that finds everything by way of
//! configuration space.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mem::GuestMemory;
use parking_lot::Mutex;
use virtio::features::{VIRTIO_F_RING_RESET, mask, status};
use virtio::testing::{DriverRing, ram};
use vmm_sys_util::eventfd::EventFd;

use super::super::VirtioPci;
use super::super::layout::{self, common};
use crate::bus::Effect;
use crate::irq::{DoorbellAddress, Doorbells, IrqLine, MsiAllocator, MsiVector};
use crate::pci::PciDevice;

#[derive(Default)]
struct Vector {
    routed: AtomicBool,
    count: AtomicUsize,
}

impl MsiVector for Vector {
    fn trigger(&self) {
        if self.routed.load(Ordering::SeqCst) {
            self.count.fetch_add(1, Ordering::SeqCst);
        }
    }
    fn route(&self, message: Option<(u64, u32)>) {
        self.routed.store(message.is_some(), Ordering::SeqCst);
    }
    fn eventfd(&self) -> Option<EventFd> {
        None
    }
}

pub struct Host {
    pub mem: GuestMemory,
    vectors: Mutex<Vec<Arc<Vector>>>,
    doorbells: Mutex<BTreeMap<u64, EventFd>>,
    refuse: AtomicBool,
    kicks: AtomicUsize,
    line: AtomicBool,
    changes: AtomicUsize,
}

impl Host {
    pub fn new() -> Arc<Self> {
        Self::with_memory(ram(1 << 20))
    }

    pub fn with_memory(mem: GuestMemory) -> Arc<Self> {
        Arc::new(Self {
            mem,
            vectors: Mutex::default(),
            doorbells: Mutex::default(),
            refuse: AtomicBool::new(false),
            kicks: AtomicUsize::new(0),
            line: AtomicBool::new(false),
            changes: AtomicUsize::new(0),
        })
    }

    pub fn triggered(&self, vector: usize) -> usize {
        self.vectors.lock()[vector].count.load(Ordering::SeqCst)
    }
    pub fn doorbells(&self) -> Vec<u64> {
        self.doorbells.lock().keys().copied().collect()
    }
    pub fn refuse_doorbells(&self) {
        self.refuse.store(true, Ordering::SeqCst);
    }
    pub fn doorbell_kicks(&self) -> usize {
        self.kicks.load(Ordering::SeqCst)
    }
    pub fn line(&self) -> bool {
        self.line.load(Ordering::SeqCst)
    }
    pub fn line_changes(&self) -> usize {
        self.changes.load(Ordering::SeqCst)
    }

    /// Whether a doorbell took the write.
    fn ring(&self, address: u64) -> bool {
        let doorbells = self.doorbells.lock();
        let Some(fd) = doorbells.get(&address) else { return false };
        fd.write(1).unwrap();
        self.kicks.fetch_add(1, Ordering::SeqCst);
        true
    }
}

impl MsiAllocator for Host {
    fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiVector>>, String> {
        let mut vectors = self.vectors.lock();
        vectors.extend((0..count).map(|_| Arc::new(Vector::default())));
        Ok(vectors.iter().map(|v| Arc::clone(v) as _).collect())
    }
}

impl Doorbells for Host {
    fn register(
        &self,
        fd: &EventFd,
        address: DoorbellAddress,
        _datamatch: Option<u32>,
    ) -> Result<(), String> {
        let DoorbellAddress::Mmio(at) = address else { return Err("a port".into()) };
        if self.refuse.load(Ordering::SeqCst) {
            return Err("refused".into());
        }
        let old = self.doorbells.lock().insert(at, fd.try_clone().unwrap());
        assert!(old.is_none(), "two doorbells at {at:#x}");
        Ok(())
    }

    fn unregister(&self, _fd: &EventFd, address: DoorbellAddress, _datamatch: Option<u32>) {
        let DoorbellAddress::Mmio(at) = address else { panic!("a port") };
        assert!(self.doorbells.lock().remove(&at).is_some(), "no doorbell at {at:#x}");
    }
}

impl IrqLine for Host {
    fn set(&self, level: bool) {
        if self.line.swap(level, Ordering::SeqCst) != level {
            self.changes.fetch_add(1, Ordering::SeqCst);
        }
    }
}

const DATA: u64 = 0x80000;

pub struct FakeDriver {
    host: Arc<Host>,
    dev: Arc<VirtioPci>,
    pub features: u64,
    pub ring_base: u64,
    rings: Vec<DriverRing>,
    sent: u64,
}

impl FakeDriver {
    pub fn new(host: &Arc<Host>, dev: &Arc<VirtioPci>) -> Self {
        let (host, dev) = (Arc::clone(host), Arc::clone(dev));
        Self { host, dev, features: 0, ring_base: 0x1000, rings: Vec::new(), sent: 0 }
    }

    /// The same driver, after the guest moved.
    pub fn at(self, host: &Arc<Host>, dev: &Arc<VirtioPci>) -> Self {
        Self { host: Arc::clone(host), dev: Arc::clone(dev), ..self }
    }

    // ---- PCI -------------------------------------------------------------------------------

    pub fn config32(&self, offset: u16) -> u32 {
        let mut b = [0; 4];
        self.dev.config_read(offset, &mut b);
        u32::from_le_bytes(b)
    }

    pub fn config_write(&self, offset: u16, data: &[u8]) {
        if self.dev.config_write(offset, data) == Effect::Relayout {
            self.dev.relayout();
        }
    }

    /// The capability with this id, and for virtio's own with this type.
    pub fn find_capability(&self, id: u8, kind: Option<u8>) -> Option<u16> {
        let mut at = (self.config32(0x34) & 0xff) as u16;
        while at != 0 {
            let word = self.config32(at).to_le_bytes();
            if word[0] == id && kind.is_none_or(|k| k == word[3]) {
                return Some(at);
            }
            at = word[1].into();
        }
        None
    }

    /// BAR, offset and length of a virtio structure.
    pub fn capability(&self, kind: u8) -> (u8, u32, u32) {
        let at = self.find_capability(9, Some(kind)).unwrap();
        (self.config32(at + 4) as u8, self.config32(at + 8), self.config32(at + 12))
    }

    pub fn bar_sizes(&self) -> Vec<(u8, u64)> {
        let mut sizes = Vec::new();
        let mut i = 0;
        while i < 6 {
            let at = 0x10 + 4 * u16::from(i);
            self.config_write(at, &[0xff; 4]);
            let low = self.config32(at);
            let wide = low & 6 == 4;
            let high = if wide {
                self.config_write(at + 4, &[0xff; 4]);
                self.config32(at + 4)
            } else {
                u32::MAX
            };
            let mask = u64::from(low & !0xf) | u64::from(high) << 32;
            if low != 0 {
                sizes.push((i, mask.wrapping_neg()));
            }
            i += if wide { 2 } else { 1 };
        }
        sizes
    }

    pub fn move_bar(&self, address: u64) {
        self.config_write(0x20, &(address as u32).to_le_bytes());
        self.config_write(0x24, &((address >> 32) as u32).to_le_bytes());
    }

    pub fn bar_address(&self) -> u64 {
        self.dev.bars().iter().find(|b| b.index == 4).unwrap().address.unwrap()
    }

    // ---- virtio registers ------------------------------------------------------------------

    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.dev.bar_read(4, offset, data);
    }

    pub fn write(&self, offset: u64, data: &[u8]) {
        let _ = self.dev.bar_write(4, offset, data);
    }

    pub fn common(&self, offset: u64, len: usize) -> u64 {
        let mut b = [0; 8];
        self.read(layout::COMMON + offset, &mut b[..len]);
        u64::from_le_bytes(b)
    }

    fn set16(&self, offset: u64, v: u16) {
        self.write(offset, &v.to_le_bytes());
    }

    fn set64(&self, offset: u64, v: u64) {
        self.write(offset, &(v as u32).to_le_bytes());
        self.write(offset + 4, &((v >> 32) as u32).to_le_bytes());
    }

    pub fn status(&self) -> u8 {
        self.common(common::STATUS, 1) as u8
    }

    pub fn set_status(&self, v: u8) {
        self.write(common::STATUS, &[v]);
    }

    pub fn read_isr(&self) -> u8 {
        let mut b = [0];
        self.read(layout::ISR, &mut b);
        b[0]
    }

    pub fn offered(&self) -> u64 {
        let half = |n: u32| {
            self.write(common::DEVICE_FEATURE_SELECT, &n.to_le_bytes());
            self.common(common::DEVICE_FEATURE, 4)
        };
        half(0) | half(1) << 32
    }

    pub fn accept(&self, features: u64) {
        for n in 0..2_u32 {
            self.write(common::DRIVER_FEATURE_SELECT, &n.to_le_bytes());
            self.write(common::DRIVER_FEATURE, &((features >> (32 * n)) as u32).to_le_bytes());
        }
    }

    // ---- a whole driver --------------------------------------------------------------------

    /// From reset to DRIVER_OK, with all queues.
    pub fn set_up(&mut self, msix: bool) {
        // Decoding goes off first: nothing may stay where an earlier owner of it put it.
        self.config_write(4, &[0, 0]);
        self.config_write(0x14, &0xfebf_0000_u32.to_le_bytes());
        self.move_bar(0x8_0000_0000);
        self.config_write(4, &[6, 0]);
        self.set_status(0);
        assert_eq!(self.status(), 0);
        if let Some(at) = self.find_capability(0x11, None) {
            self.config_write(at + 2, &[0, if msix { 0x80 } else { 0 }]);
            for v in 0..3_u64 {
                let entry: [u32; 4] = [0xfee0_0000, 0, 0x40 + v as u32, 0];
                for (i, word) in entry.iter().enumerate() {
                    let at = 16 * v + 4 * i as u64;
                    let _ = self.dev.bar_write(1, at, &word.to_le_bytes());
                }
            }
        }
        self.negotiate();
        self.set_up_rings(true);
        if msix {
            self.set16(common::CONFIG_VECTOR, 0);
            assert_eq!(self.common(common::CONFIG_VECTOR, 2), 0);
        }
        self.set_status(0xf);
        assert_eq!(self.status(), 0xf);
    }

    fn negotiate(&mut self) {
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        self.features = self.offered() & !mask(VIRTIO_F_RING_RESET);
        self.accept(self.features);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        assert!(self.status() & status::FEATURES_OK != 0);
    }

    fn set_up_rings(&mut self, clear: bool) {
        self.rings.clear();
        for i in 0..self.common(common::NUM_QUEUES, 2) {
            self.set16(common::QUEUE_SELECT, i as u16);
            let size = self.common(common::QUEUE_SIZE, 2) as u16;
            let base = self.ring_base + 0x1000 * i;
            if clear {
                self.host.mem.write(base, &[0; 0x1000]).unwrap();
            }
            let ring = DriverRing::new(&self.host.mem, base, size, self.features);
            self.set16(common::QUEUE_VECTOR, i as u16 + 1);
            self.set64(common::QUEUE_DESC, ring.desc);
            self.set64(common::QUEUE_DRIVER, ring.avail);
            self.set64(common::QUEUE_DEVICE, ring.used);
            assert_eq!(self.common(common::QUEUE_DRIVER, 8), ring.avail);
            assert_eq!(self.common(common::QUEUE_NOTIFY_OFF, 2), i);
            self.set16(common::QUEUE_ENABLE, 1);
            assert_eq!(self.common(common::QUEUE_ENABLE, 2), 1);
            self.rings.push(ring);
        }
    }

    /// Like `set_up`, with rings at `ring_base` even if that is not RAM.
    pub fn set_up_rings_anywhere(&mut self) {
        self.set_status(0);
        self.negotiate();
        self.set_up_rings(false);
        self.set_status(0xf);
    }

    fn kick(&self, queue: usize) {
        let at = layout::NOTIFY + 4 * queue as u64;
        let by_doorbell =
            self.dev.bars().iter().any(|b| {
                b.index == 4 && b.address.is_some_and(|address| self.host.ring(address + at))
            });
        if !by_doorbell {
            self.write(at, &(queue as u16).to_le_bytes());
        }
    }

    /// Sends 4 bytes to be echoed; returns where the answer will be.
    pub fn send(&mut self, queue: usize, data: &[u8; 4]) -> (u16, u64) {
        let at = DATA + self.sent % 0x1000 * 8;
        self.sent += 1;
        self.host.mem.write(at, data).unwrap();
        self.rings[queue].enable_interrupts();
        let id = self.rings[queue].add(&[(at, 4)], &[(at + 4, 4)], None).unwrap();
        self.kick(queue);
        (id, at + 4)
    }

    pub fn receive(&mut self, queue: usize, sent: (u16, u64)) -> [u8; 4] {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(used) = self.rings[queue].poll_used() {
                assert_eq!(used, (sent.0, 4));
                return self.host.mem.read_obj(sent.1).unwrap();
            }
            assert!(Instant::now() < until, "no answer on queue {queue}");
            std::thread::yield_now();
        }
    }

    pub fn echo(&mut self, queue: usize, data: &[u8; 4]) -> [u8; 4] {
        let sent = self.send(queue, data);
        self.receive(queue, sent)
    }

    /// Makes a buffer available that is not in RAM.
    pub fn break_ring(&mut self, queue: usize) {
        self.rings[queue].add(&[(u64::MAX - 8, 4)], &[], None).unwrap();
        self.kick(queue);
    }

    pub fn wait(&self, what: impl Fn() -> bool) {
        let until = Instant::now() + Duration::from_secs(10);
        while !what() {
            assert!(Instant::now() < until, "it did not happen");
            std::thread::yield_now();
        }
    }
}
