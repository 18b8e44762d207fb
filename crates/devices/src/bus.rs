//! Port and memory-mapped I/O: what a device on a bus is, and what its accesses may ask for.

use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

/// How an access went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Done at once.
    Done,
    /// Nobody answers there: reads are all ones.
    Fault,
}

/// What a device asks the machine for after an access. The device asks, the life-cycle driver acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[must_use]
pub enum Effect {
    #[default]
    None,
    /// Reset the machine.
    Reset,
    /// Power off (ACPI S5).
    Shutdown,
    /// The device's BARs moved or were switched on or off: look at them again.
    Relayout,
}

/// A device on the port or memory bus. All methods take `&self`: vCPUs access it at the same time.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the device's base.
    fn read(&self, offset: u64, data: &mut [u8]) -> Access;
    /// Writes `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]) -> (Access, Effect);
}

/// Two devices claim the same addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "addresses {start:#x} to {last:#x} are taken by a device at {other_start:#x} to {other_last:#x}"
)]
pub struct Overlap {
    pub start: u64,
    pub last: u64,
    pub other_start: u64,
    pub other_last: u64,
}

#[derive(Clone)]
struct Entry {
    start: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
}

#[derive(Clone, Default)]
struct Ranges {
    /// Sorted, without overlap.
    entries: Vec<Entry>,
    fallback: Option<Arc<dyn BusDevice>>,
}

impl Ranges {
    fn find(&self, address: u64) -> Option<&Entry> {
        let after = self.entries.partition_point(|e| e.start <= address);
        self.entries[..after].last().filter(|e| address <= e.last)
    }
}

/// The bus of ports or of memory-mapped registers. Lookups take no lock: they see a snapshot, and
/// a change makes a new one.
#[derive(Default)]
pub struct Bus {
    ranges: ArcSwap<Ranges>,
    /// Held by who changes the ranges.
    change: Mutex<()>,
}

impl Bus {
    /// A bus with nothing on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `length` addresses from `start`.
    ///
    /// # Errors
    /// If something is there already, or the range is empty or wraps.
    pub fn insert(
        &self,
        start: u64,
        length: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Overlap> {
        let _change = self.change.lock();
        let mut ranges = Ranges::clone(&self.ranges.load());
        let last = start.wrapping_add(length.wrapping_sub(1));
        let clash = ranges.entries.iter().find(|e| e.start <= last && start <= e.last);
        if let Some((other_start, other_last)) = clash.map(|e| (e.start, e.last)) {
            return Err(Overlap { start, last, other_start, other_last });
        }
        if length == 0 || last < start {
            return Err(Overlap { start, last, other_start: start, other_last: start });
        }
        let at = ranges.entries.partition_point(|e| e.start < start);
        ranges.entries.insert(at, Entry { start, last, device });
        self.ranges.store(Arc::new(ranges));
        Ok(())
    }

    /// Takes away what [`insert`](Self::insert) put at `start`; false if nothing begins there.
    pub fn remove(&self, start: u64) -> bool {
        let _change = self.change.lock();
        let mut ranges = Ranges::clone(&self.ranges.load());
        let before = ranges.entries.len();
        ranges.entries.retain(|e| e.start != start);
        let removed = ranges.entries.len() != before;
        self.ranges.store(Arc::new(ranges));
        removed
    }

    /// Who answers where nobody else does; its offsets are bus addresses. The PCI root, for BARs.
    pub fn set_fallback(&self, device: Arc<dyn BusDevice>) {
        let _change = self.change.lock();
        let mut ranges = Ranges::clone(&self.ranges.load());
        ranges.fallback = Some(device);
        self.ranges.store(Arc::new(ranges));
    }

    /// The guest reads. What nobody claims reads as all ones. An access that leaves a device's
    /// range is taken apart into bytes.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Access {
        let ranges = self.ranges.load();
        let Some(last) = last_address(address, data.len()) else {
            data.fill(0xff);
            return Access::Fault;
        };
        let access = match ranges.find(address) {
            Some(e) if last <= e.last => e.device.read(address - e.start, data),
            None if ranges.find(last).is_none() => match &ranges.fallback {
                Some(f) => f.read(address, data),
                None => Access::Fault,
            },
            _ => {
                for (a, byte) in (address..=last).zip(data.chunks_mut(1)) {
                    let _ = self.read(a, byte);
                }
                Access::Done
            }
        };
        if access == Access::Fault {
            data.fill(0xff);
        }
        access
    }

    /// The guest writes. What nobody claims is dropped.
    pub fn write(&self, address: u64, data: &[u8]) -> (Access, Effect) {
        let ranges = self.ranges.load();
        let Some(last) = last_address(address, data.len()) else {
            return (Access::Fault, Effect::None);
        };
        match ranges.find(address) {
            Some(e) if last <= e.last => e.device.write(address - e.start, data),
            None if ranges.find(last).is_none() => match &ranges.fallback {
                Some(f) => f.write(address, data),
                None => (Access::Fault, Effect::None),
            },
            _ => {
                let mut effect = Effect::None;
                for (a, byte) in (address..=last).zip(data.chunks(1)) {
                    let (_, e) = self.write(a, byte);
                    if e != Effect::None {
                        effect = e;
                    }
                }
                (Access::Done, effect)
            }
        }
    }
}

/// The last address of an access; `None` for one that is empty, wraps or is too wide for a CPU.
fn last_address(address: u64, length: usize) -> Option<u64> {
    (1..=64).contains(&length).then(|| address.checked_add(length as u64 - 1)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) -> Access {
            data.iter_mut().enumerate().for_each(|(i, d)| *d = self.0 + offset as u8 + i as u8);
            Access::Done
        }

        fn write(&self, _offset: u64, _data: &[u8]) -> (Access, Effect) {
            (Access::Done, if self.0 == 0x40 { Effect::Reset } else { Effect::None })
        }
    }

    #[test]
    fn finds_the_device_of_an_address() {
        let bus = Bus::new();
        bus.insert(0x10, 4, Arc::new(Echo(0x20))).unwrap();
        bus.insert(0x14, 4, Arc::new(Echo(0x40))).unwrap();
        assert!(bus.insert(0x13, 1, Arc::new(Echo(0))).is_err());
        assert!(bus.insert(0x00, 0x100, Arc::new(Echo(0))).is_err());
        assert!(bus.insert(0x30, 0, Arc::new(Echo(0))).is_err());
        assert!(bus.insert(u64::MAX, 2, Arc::new(Echo(0))).is_err());
        let mut d = [0; 2];
        assert_eq!(bus.read(0x12, &mut d), Access::Done);
        assert_eq!(d, [0x22, 0x23]);
        // Across two devices, and across a device's end into nothing.
        bus.read(0x13, &mut d);
        assert_eq!(d, [0x23, 0x40]);
        bus.read(0x17, &mut d);
        assert_eq!(d, [0x43, 0xff]);
        assert_eq!(bus.read(0x18, &mut d), Access::Fault);
        assert_eq!(d, [0xff, 0xff]);
        assert_eq!(bus.read(u64::MAX, &mut d), Access::Fault);
        assert_eq!(bus.write(0x13, &[0, 0]), (Access::Done, Effect::Reset));
        assert!(bus.remove(0x10) && !bus.remove(0x10));
        assert_eq!(bus.read(0x10, &mut d), Access::Fault);
        bus.set_fallback(Arc::new(Echo(0)));
        bus.read(0x50, &mut d);
        assert_eq!(d, [0x50, 0x51]);
    }
}
