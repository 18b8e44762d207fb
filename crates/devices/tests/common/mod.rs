//! Interrupt lines, vectors and chardevs that count what is done to them.
#![allow(dead_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use chardev::{Chardev, Frontend};
use devices::bus::{Access, BusDevice, Effect};
use devices::irq::{IrqLine, MsiAllocator, MsiVector};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

#[derive(Default)]
pub struct Line {
    pub up: AtomicBool,
    pub rises: AtomicU32,
}

impl Line {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::SeqCst)
    }
}

impl IrqLine for Line {
    fn set(&self, level: bool) {
        if level && !self.up.swap(level, Ordering::SeqCst) {
            self.rises.fetch_add(1, Ordering::SeqCst);
        }
        self.up.store(level, Ordering::SeqCst);
    }
}

#[derive(Default)]
pub struct Vector {
    pub route: Mutex<Option<(u64, u32)>>,
    pub sent: AtomicU32,
}

impl MsiVector for Vector {
    fn trigger(&self) {
        self.sent.fetch_add(1, Ordering::SeqCst);
    }

    fn route(&self, message: Option<(u64, u32)>) {
        *self.route.lock() = message;
    }

    fn eventfd(&self) -> Option<EventFd> {
        None
    }
}

/// Remembers the vectors that it made.
#[derive(Default)]
pub struct Vectors(pub Mutex<Vec<Arc<Vector>>>);

impl MsiAllocator for Vectors {
    fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiVector>>, String> {
        let made: Vec<Arc<Vector>> = (0..count).map(|_| Arc::default()).collect();
        self.0.lock().extend(made.iter().cloned());
        Ok(made.into_iter().map(|v| -> Arc<dyn MsiVector> { v }).collect())
    }
}

#[derive(Default)]
pub struct Sink {
    pub out: Mutex<Vec<u8>>,
    pub resumed: AtomicU32,
    pub frontend: Mutex<Option<Arc<dyn Frontend>>>,
}

impl Chardev for Sink {
    fn label(&self) -> &str {
        "sink"
    }

    fn filename(&self) -> String {
        "sink".into()
    }

    fn frontend_open(&self) -> bool {
        true
    }

    fn connect(&self, frontend: Arc<dyn Frontend>) {
        *self.frontend.lock() = Some(frontend);
    }

    fn write(&self, data: &[u8]) -> usize {
        self.out.lock().extend_from_slice(data);
        data.len()
    }

    fn resume_input(&self) {
        self.resumed.fetch_add(1, Ordering::SeqCst);
    }

    fn disconnect(&self) {}
}

pub fn get(d: &dyn BusDevice, at: u64) -> u8 {
    let mut b = [0];
    assert_eq!(d.read(at, &mut b), Access::Done);
    b[0]
}

pub fn put(d: &dyn BusDevice, at: u64, v: u8) {
    let _ = d.write(at, &[v]);
}

pub fn effect(d: &dyn BusDevice, at: u64, v: u8) -> Effect {
    d.write(at, &[v]).1
}

/// Numbers that look random and are the same on every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Accesses of every width at every offset, also beyond the device.
pub fn hostile(d: &dyn BusDevice, length: u64, seed: u64) {
    let mut random = Random(seed | 1);
    for _ in 0..20_000 {
        let at = random.next() % (length + 4);
        let width = [1, 2, 4, 8, 3][random.next() as usize % 5];
        let data = random.next().to_le_bytes();
        if random.next() & 1 == 0 {
            let _ = d.write(at, &data[..width]);
        } else {
            let _ = d.read(at, &mut [0; 8][..width]);
        }
    }
}
