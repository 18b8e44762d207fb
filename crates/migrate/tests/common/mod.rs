//! A machine for tests: real memory, a "guest" thread that changes it all the time, a lock that
//! only one can hold, and a state that carries a checksum of all memory.
#![allow(dead_code)] // each test file uses a part

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use mem::{Backing, DirtySource, GuestMemory, PAGE_SIZE, RegionSpec};
use migrate::{Endpoint, Events, Preamble, Status};
use parking_lot::Mutex;
use state::{Section, Sections};

/// Who holds the "disk lock".
pub type Lock = Arc<Mutex<Option<&'static str>>>;

pub struct Machine {
    pub name: &'static str,
    pub memory: GuestMemory,
    pub lock: Lock,
    pub guest: Arc<Guest>,
    pub output: AtomicBool,
    pub discarded: AtomicBool,
    pub handed_over: AtomicBool,
    pub undecided: AtomicBool,
    pub vcpus: u32,
    pub fail_locks: AtomicBool,
    pub fail_load: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
    me: Weak<Self>,
}

#[derive(Default)]
pub struct Guest {
    pub run: AtomicBool,
    pub steps: AtomicU64,
    /// Writes a second; 0 is as fast as it can.
    pub rate: AtomicU64,
}

impl Machine {
    pub fn new(name: &'static str, mib: u64, lock: &Lock) -> Arc<Self> {
        let specs =
            [RegionSpec { gpa: 0, size: mib << 19 }, RegionSpec { gpa: 4 << 30, size: mib << 19 }];
        let memory = GuestMemory::new(&specs, &Backing::default()).unwrap();
        Arc::new_cyclic(|me| Self {
            name,
            memory,
            lock: lock.clone(),
            guest: Arc::default(),
            output: AtomicBool::new(false),
            discarded: AtomicBool::new(false),
            handed_over: AtomicBool::new(false),
            undecided: AtomicBool::new(false),
            vcpus: 1,
            fail_locks: AtomicBool::new(false),
            fail_load: AtomicBool::new(false),
            thread: Mutex::new(None),
            me: me.clone(),
        })
    }

    /// Fills every third page with data, takes the lock, and runs.
    pub fn boot(&self) {
        for r in self.memory.regions() {
            for p in (0..r.pages()).step_by(3) {
                let data: Vec<u8> = (0..PAGE_SIZE).map(|i| (i * 7 + p) as u8 | 1).collect();
                self.memory.write(r.gpa + p * PAGE_SIZE, &data).unwrap();
            }
        }
        *self.lock.lock() = Some(self.name);
        self.output.store(true, Ordering::SeqCst);
        self.run();
    }

    pub fn run(&self) {
        let me = self.me.upgrade().unwrap();
        self.guest.run.store(true, Ordering::SeqCst);
        let work = move || {
            let regions = me.memory.regions().to_vec();
            let mut written = 0u64;
            let start = Instant::now();
            while me.guest.run.load(Ordering::SeqCst) {
                let n = me.guest.steps.fetch_add(1, Ordering::SeqCst);
                let r = &regions[n as usize % regions.len()];
                // A hot set of a few pages, and now and then any page; sometimes zeroes.
                let page = if n.is_multiple_of(8) { n * 2_654_435_761 % r.pages() } else { n % 16 };
                let data = if n.is_multiple_of(5) { [0; 4096] } else { [n as u8; 4096] };
                me.memory.write(r.gpa + page * PAGE_SIZE, &data).unwrap();
                written += 1;
                let rate = me.guest.rate.load(Ordering::Relaxed);
                while rate > 0
                    && written as f64 / rate as f64 > start.elapsed().as_secs_f64()
                    && me.guest.run.load(Ordering::SeqCst)
                {
                    std::thread::sleep(std::time::Duration::from_micros(200));
                }
            }
        };
        *self.thread.lock() = Some(std::thread::spawn(work));
    }

    pub fn stop(&self) {
        self.guest.run.store(false, Ordering::SeqCst);
        if let Some(t) = self.thread.lock().take() {
            t.join().unwrap();
        }
    }

    pub fn running(&self) -> bool {
        self.guest.run.load(Ordering::SeqCst)
    }

    /// A checksum over all memory.
    pub fn checksum(&self) -> u32 {
        let mut sum = 0;
        let mut page = vec![0; PAGE_SIZE as usize];
        for r in self.memory.regions() {
            for p in 0..r.pages() {
                self.memory.read(r.gpa + p * PAGE_SIZE, &mut page).unwrap();
                sum = crc32c::crc32c_append(sum, &page);
            }
        }
        sum
    }
}

impl Endpoint for Machine {
    fn preamble(&self) -> Result<Preamble, String> {
        Ok(Preamble {
            machine: "test-1".into(),
            cpu_model: "host".into(),
            cpuid: vec![],
            vcpus: self.vcpus,
            ram: self.memory.regions().iter().map(|r| (r.gpa, r.size)).collect(),
            devices: vec![],
            topology: None,
            numa: None,
        })
    }
    fn differences(&self, remote: &Preamble) -> Vec<String> {
        let mine = self.preamble().unwrap();
        let mut d = Vec::new();
        if mine.ram != remote.ram {
            d.push(format!("memory is {:?} at the source and {:?} here", remote.ram, mine.ram));
        }
        if mine.vcpus != remote.vcpus {
            d.push(format!("{} vCPUs at the source and {} here", remote.vcpus, mine.vcpus));
        }
        d
    }
    fn blockers(&self) -> Vec<String> {
        vec![]
    }
    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }
    fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>> {
        vec![Arc::new(self.memory.clone())]
    }
    fn is_running(&self) -> bool {
        self.running()
    }
    fn quiesce(&self, _: Instant) -> Result<(), String> {
        self.stop();
        self.output.store(false, Ordering::SeqCst);
        Ok(())
    }
    fn save(&self) -> Result<Sections, String> {
        assert!(!self.running());
        let mut payload = self.guest.steps.load(Ordering::SeqCst).to_le_bytes().to_vec();
        payload.extend(self.guest.rate.load(Ordering::SeqCst).to_le_bytes());
        payload.extend(self.checksum().to_le_bytes());
        let (name, kind) = ("guest".into(), "guest".into());
        Ok(Sections(vec![Section { name, kind, version: 1, payload }]))
    }
    fn release_locks(&self) -> Result<(), String> {
        let mut lock = self.lock.lock();
        assert_eq!(*lock, Some(self.name));
        *lock = None;
        Ok(())
    }
    fn resume(&self) -> Result<(), String> {
        let mut lock = self.lock.lock();
        assert!(!self.handed_over.load(Ordering::SeqCst));
        if lock.is_some_and(|who| who != self.name) {
            return Err("the disk is locked by another".into());
        }
        *lock = Some(self.name);
        self.output.store(true, Ordering::SeqCst);
        self.run();
        Ok(())
    }
    fn handed_over(&self) {
        self.handed_over.store(true, Ordering::SeqCst);
    }
    fn undecided(&self) {
        assert!(!self.running());
        self.undecided.store(true, Ordering::SeqCst);
    }
    fn prepare(&self) -> Result<(), String> {
        Ok(())
    }
    fn load(&self, sections: Sections) -> Result<(), String> {
        if self.fail_load.load(Ordering::SeqCst) {
            return Err("cannot load".into());
        }
        let s = &sections.0[0];
        let word = |at: usize| u64::from_le_bytes(s.payload[at..at + 8].try_into().unwrap());
        self.guest.steps.store(word(0), Ordering::SeqCst);
        self.guest.rate.store(word(8), Ordering::SeqCst);
        let want = u32::from_le_bytes(s.payload[16..20].try_into().unwrap());
        if self.checksum() != want {
            return Err("MEMORY DIFFERS".into());
        }
        Ok(())
    }
    fn acquire_locks(&self) -> Result<(), String> {
        let mut lock = self.lock.lock();
        if lock.is_some() || self.fail_locks.load(Ordering::SeqCst) {
            return Err(format!("the disk is locked by {:?}", *lock));
        }
        *lock = Some(self.name);
        Ok(())
    }
    fn run_held(&self) -> Result<(), String> {
        assert_eq!(*self.lock.lock(), Some(self.name));
        self.run();
        Ok(())
    }
    fn release_output(&self) {
        self.output.store(true, Ordering::SeqCst);
    }
    fn discard(&self) {
        assert!(!self.running());
        self.discarded.store(true, Ordering::SeqCst);
        let mut lock = self.lock.lock();
        if *lock == Some(self.name) {
            *lock = None;
        }
    }
}

/// Remembers what it was told.
#[derive(Default)]
pub struct Log(pub Mutex<Vec<String>>);

impl Events for Log {
    fn migration(&self, status: Status) {
        self.0.lock().push(status.to_string());
    }
    fn pass(&self, pass: u64) {
        self.0.lock().push(format!("pass {pass}"));
    }
}

/// Checks that exactly one of the two runs, visibly, with the lock.
pub fn exactly_one<'a>(a: &'a Machine, b: &'a Machine) -> &'a Machine {
    let visible = |m: &Machine| m.running() && m.output.load(Ordering::SeqCst);
    assert!(visible(a) ^ visible(b), "{}: {}, {}: {}", a.name, visible(a), b.name, visible(b));
    let winner = if visible(a) { a } else { b };
    assert_eq!(*winner.lock.lock(), Some(winner.name));
    let loser = if visible(a) { b } else { a };
    assert!(!loser.running());
    winner
}
