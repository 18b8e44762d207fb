//! For tests, here and in the crates that have devices: the driver's side of both ring formats,
//! and a driver that writes nonsense. Only with the feature `testing`.
//!
//! Written apart from the device's side, after the driver's sections of the specification
//! (VIRTIO 1.2, sections 2.7.13 and 2.8.21), so that a misreading does not hide in both.

mod hostile;

pub use hostile::hostile;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering, fence};

use mem::{Backing, BackingKind, GuestMemory, RegionSpec};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{Interrupt, RingPos, RingSetup};
use crate::features::{VIRTIO_F_EVENT_IDX, VIRTIO_F_RING_PACKED, has};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// An [`Interrupt`] that counts.
#[derive(Debug, Default)]
pub struct CountingInterrupt(AtomicUsize);

impl CountingInterrupt {
    /// How often it was raised.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Interrupt for CountingInterrupt {
    fn notify(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn eventfd(&self) -> Option<EventFd> {
        None
    }
}

/// Anonymous RAM of `size` bytes (a multiple of 4 KiB) at address 0.
pub fn ram(size: u64) -> GuestMemory {
    let backing = Backing { kind: BackingKind::Anonymous, ..Backing::default() };
    GuestMemory::new(&[RegionSpec { gpa: 0, size }], &backing).expect("anonymous memory")
}

/// One buffer of a chain: guest address and length.
pub type Buffer = (u64, u32);

/// The driver's side of one ring. Panics on what a correct device never does.
pub struct DriverRing {
    pub mem: GuestMemory,
    pub size: u16,
    pub features: u64,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    free: VecDeque<u16>,
    /// What each outstanding id took: descriptors (packed: ring entries).
    outstanding: HashMap<u16, Vec<u16>>,
    next_avail: u16,
    next_used: u16,
    avail_wrap: bool,
    used_wrap: bool,
    /// Ring entries added since the last [`needs_kick`](Self::needs_kick).
    unkicked: u16,
}

impl DriverRing {
    /// A ring of `size` entries at `base` (a multiple of 4 KiB) in `mem`; packed if `features` say
    /// so. Takes [`bytes`](Self::bytes) of memory, which must be zero.
    pub fn new(mem: &GuestMemory, base: u64, size: u16, features: u64) -> Self {
        let desc = base;
        let avail = desc + 16 * u64::from(size);
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(4);
        Self {
            mem: mem.clone(),
            size,
            features,
            desc,
            avail,
            used,
            free: (0..size).collect(),
            outstanding: HashMap::new(),
            next_avail: 0,
            next_used: 0,
            avail_wrap: true,
            used_wrap: true,
            unkicked: 0,
        }
    }

    /// Bytes that a ring of `size` entries needs, in whole pages.
    pub fn bytes(size: u16) -> u64 {
        (26 * u64::from(size) + 16).next_multiple_of(4096)
    }

    /// What a transport hands to a device.
    pub fn setup(&self, pos: Option<RingPos>, call: Arc<dyn Interrupt>) -> RingSetup {
        RingSetup {
            mem: self.mem.clone(),
            size: self.size,
            desc: self.desc,
            avail: self.avail,
            used: self.used,
            features: self.features,
            pos,
            kick: EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
            call,
        }
    }

    fn packed(&self) -> bool {
        has(self.features, VIRTIO_F_RING_PACKED)
    }

    /// Free ring entries.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Chains added and not yet seen used.
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.mem.write(at, bytes).expect("the test's own memory");
    }

    fn u16_at(&self, at: u64) -> u16 {
        self.mem.load_u16(at, Ordering::Acquire).expect("the test's own memory")
    }

    fn put_u16(&self, at: u64, v: u16) {
        self.mem.store_u16(at, v, Ordering::Release).expect("the test's own memory");
    }

    /// Bytes of a descriptor, whose last two fields are `a` and `b`.
    fn encode(buffer: Buffer, a: u16, b: u16) -> [u8; 16] {
        let mut d = [0; 16];
        d[..8].copy_from_slice(&buffer.0.to_le_bytes());
        d[8..12].copy_from_slice(&buffer.1.to_le_bytes());
        d[12..14].copy_from_slice(&a.to_le_bytes());
        d[14..].copy_from_slice(&b.to_le_bytes());
        d
    }

    /// Makes a chain available: through an indirect table at `table` if given. Returns its id, or
    /// `None` if the ring is full.
    ///
    /// # Panics
    /// If it has no buffers.
    pub fn add(
        &mut self,
        readable: &[Buffer],
        writable: &[Buffer],
        table: Option<u64>,
    ) -> Option<u16> {
        let r = readable.iter().map(|b| (*b, 0));
        let all: Vec<_> = r.chain(writable.iter().map(|b| (*b, WRITE))).collect();
        assert!(!all.is_empty());
        let list = match table {
            Some(t) => {
                self.write_table(t, &all);
                vec![((t, 16 * all.len() as u32), INDIRECT)]
            }
            None => all,
        };
        if list.len() > self.free.len() {
            return None;
        }
        let ids: Vec<u16> = self.free.drain(..list.len()).collect();
        let id = ids[0];
        if self.packed() {
            self.add_packed(id, &list);
        } else {
            self.add_split(&ids, &list);
        }
        let entries = if self.packed() { ids.len() as u16 } else { 1 };
        // Whoever never asks for kicks gets here more than 65,535 times.
        self.unkicked = self.unkicked.saturating_add(entries);
        self.outstanding.insert(id, ids);
        Some(id)
    }

    fn write_table(&self, table: u64, list: &[(Buffer, u16)]) {
        for (i, (buffer, flags)) in list.iter().enumerate() {
            let last = i + 1 == list.len();
            let d = if self.packed() {
                Self::encode(*buffer, 0, *flags)
            } else if last {
                Self::encode(*buffer, *flags, 0)
            } else {
                Self::encode(*buffer, flags | NEXT, i as u16 + 1)
            };
            self.put(table + 16 * i as u64, &d);
        }
    }

    fn add_split(&mut self, ids: &[u16], list: &[(Buffer, u16)]) {
        for (i, (buffer, flags)) in list.iter().enumerate() {
            let d = match ids.get(i + 1) {
                Some(next) => Self::encode(*buffer, flags | NEXT, *next),
                None => Self::encode(*buffer, *flags, 0),
            };
            self.put(self.desc + 16 * u64::from(ids[i]), &d);
        }
        let slot = u64::from(self.next_avail % self.size);
        self.put_u16(self.avail + 4 + 2 * slot, ids[0]);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.put_u16(self.avail + 2, self.next_avail);
    }

    fn add_packed(&mut self, id: u16, list: &[(Buffer, u16)]) {
        let head = self.next_avail;
        let mut head_flags = 0;
        for (i, (buffer, flags)) in list.iter().enumerate() {
            let mut flags = flags | if self.avail_wrap { AVAIL } else { USED };
            if i + 1 < list.len() {
                flags |= NEXT;
            }
            let at = self.desc + 16 * u64::from(self.next_avail);
            self.put(at, &Self::encode(*buffer, id, 0)[..14]);
            if i == 0 {
                head_flags = flags;
            } else {
                self.put_u16(at + 14, flags);
            }
            self.next_avail += 1;
            if self.next_avail == self.size {
                (self.next_avail, self.avail_wrap) = (0, !self.avail_wrap);
            }
        }
        self.put_u16(self.desc + 16 * u64::from(head) + 14, head_flags);
    }

    /// The next used chain: id and bytes written.
    ///
    /// # Panics
    /// If the device used an id that is not outstanding.
    pub fn poll_used(&mut self) -> Option<(u16, u32)> {
        let (id, len) = if self.packed() { self.poll_packed()? } else { self.poll_split()? };
        let ids = self.outstanding.remove(&id).expect("the device used what it was not given");
        if self.packed() {
            self.next_used += ids.len() as u16;
            if self.next_used >= self.size {
                (self.next_used, self.used_wrap) = (self.next_used - self.size, !self.used_wrap);
            }
        } else {
            self.next_used = self.next_used.wrapping_add(1);
        }
        self.free.extend(ids);
        Some((id, len))
    }

    fn poll_split(&self) -> Option<(u16, u32)> {
        if self.u16_at(self.used + 2) == self.next_used {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let id = self.mem.load_u32(at, Ordering::Relaxed).expect("in RAM");
        let len = self.mem.load_u32(at + 4, Ordering::Relaxed).expect("in RAM");
        Some((u16::try_from(id).expect("an id of 16 bits"), len))
    }

    fn poll_packed(&self) -> Option<(u16, u32)> {
        let at = self.desc + 16 * u64::from(self.next_used);
        let flags = self.u16_at(at + 14);
        let (avail, used) = (flags & AVAIL != 0, flags & USED != 0);
        if avail != used || used != self.used_wrap {
            return None;
        }
        let len = self.mem.load_u32(at + 8, Ordering::Relaxed).expect("in RAM");
        Some((self.u16_at(at + 12), len))
    }

    /// Asks for an interrupt when the next chain is used (with the event index), or for all.
    pub fn enable_interrupts(&self) {
        let event = has(self.features, VIRTIO_F_EVENT_IDX);
        if self.packed() {
            let pos = self.next_used | u16::from(self.used_wrap) << 15;
            self.put_u16(self.avail, if event { pos } else { 0 });
            self.put_u16(self.avail + 2, if event { 2 } else { 0 });
        } else if event {
            self.put_u16(self.avail + 4 + 2 * u64::from(self.size), self.next_used);
        } else {
            self.put_u16(self.avail, 0);
        }
    }

    /// Asks for no interrupts. With the event index a split ring only leaves the position behind.
    pub fn disable_interrupts(&self) {
        if self.packed() {
            self.put_u16(self.avail + 2, 1);
        } else if !has(self.features, VIRTIO_F_EVENT_IDX) {
            self.put_u16(self.avail, 1);
        }
    }

    /// Whether the device wants no kicks at all (flags only, not the event index).
    pub fn kicks_disabled(&self) -> bool {
        if self.packed() { self.u16_at(self.used + 2) == 1 } else { self.u16_at(self.used) == 1 }
    }

    /// Whether the device is to be kicked for what was added since the last call.
    pub fn needs_kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let count = std::mem::take(&mut self.unkicked);
        if count == 0 {
            return false;
        }
        let flags = self.u16_at(if self.packed() { self.used + 2 } else { self.used });
        let mut event = self.kick_event();
        if !has(self.features, VIRTIO_F_EVENT_IDX) {
            return flags == 0;
        }
        if self.packed() {
            if flags != 2 {
                return flags == 0;
            }
            let wrap = event & 0x8000 != 0;
            event &= 0x7fff;
            if wrap != self.avail_wrap {
                event = event.wrapping_sub(self.size);
            }
        }
        // The event lies among the entries that were just added.
        self.next_avail.wrapping_sub(1).wrapping_sub(event) < count
    }

    /// Whether something is used that [`poll_used`](Self::poll_used) would give; after
    /// [`enable_interrupts`](Self::enable_interrupts), so that no interrupt is missed.
    pub fn has_used(&self) -> bool {
        fence(Ordering::SeqCst);
        if self.packed() { self.poll_packed().is_some() } else { self.poll_split().is_some() }
    }

    /// Where the device asks to be kicked, with the event index.
    pub fn kick_event(&self) -> u16 {
        let at = if self.packed() { self.used } else { self.used + 4 + 8 * u64::from(self.size) };
        self.u16_at(at)
    }
}
