//! MSI-X: the vector table, the pending bit array, and the masks between an interrupt and its
//! message (PCI Local Bus 3.0, section 6.8.2).
//!
//! Invariants: a vector's route in the interrupt controller is its table entry exactly while
//! MSI-X is enabled and neither the function nor the vector is masked; else it has none. A
//! trigger while enabled but masked sets the pending bit, which is delivered when the last mask
//! goes. Each vector has a lock of its own, so queues do not meet; a change of the function's
//! masks is stored first and then applied to each vector under its lock, so a trigger in between
//! is either delivered or pending, never lost.
//!
//! A device uses it so: [`Msix::new`] adds the capability; table and pending bits are in a BAR
//! ([`Msix::bar_read`], [`Msix::bar_write`]); after every write to configuration space, and
//! after a reset or restore of it, call [`Msix::config_changed`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use minicbor::{Decode, Encode};
use parking_lot::Mutex;

use super::config::ConfigSpace;
use crate::irq::MsiVector;

/// Most vectors that a function can have.
pub const MAX_VECTORS: usize = 2048;

const CAPABILITY: u8 = 0x11;
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
const ENTRY_BYTES: u64 = 16;

/// Where table and pending bits are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixLayout {
    pub bar: u8,
    /// Offset of the table in the BAR, 8-byte aligned; 16 bytes a vector.
    pub table: u32,
    /// Offset of the pending bits, 8-byte aligned; 8 bytes for every 64 vectors.
    pub pending: u32,
}

/// One table entry and its pending bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct MsixEntry {
    #[n(0)]
    pub address: u64,
    #[n(1)]
    pub data: u32,
    #[n(2)]
    pub masked: bool,
    #[n(3)]
    pub pending: bool,
}

impl MsixEntry {
    const RESET: Self = Self { address: 0, data: 0, masked: true, pending: false };

    fn register(&self, index: u64) -> u32 {
        match index {
            0 => self.address as u32,
            1 => (self.address >> 32) as u32,
            2 => self.data,
            _ => u32::from(self.masked),
        }
    }
}

/// What is saved; enable and function mask are in the configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct MsixState {
    #[n(0)]
    pub entries: Vec<MsixEntry>,
}

struct Vector {
    entry: Mutex<MsixEntry>,
    msi: Arc<dyn MsiVector>,
}

/// A function's MSI-X.
pub struct Msix {
    vectors: Vec<Vector>,
    layout: MsixLayout,
    capability: u8,
    enabled: AtomicBool,
    function_masked: AtomicBool,
}

impl Msix {
    /// Adds the capability to `config`. The BAR itself is the caller's to add.
    ///
    /// # Panics
    /// If there is no vector or more than [`MAX_VECTORS`], or the layout is not aligned.
    pub fn new(
        config: &mut ConfigSpace,
        layout: MsixLayout,
        vectors: Vec<Arc<dyn MsiVector>>,
    ) -> Self {
        assert!((1..=MAX_VECTORS).contains(&vectors.len()));
        assert!(
            layout.table.is_multiple_of(8) && layout.pending.is_multiple_of(8) && layout.bar < 6
        );
        let mut body = (vectors.len() as u16 - 1).to_le_bytes().to_vec();
        body.extend((layout.table | u32::from(layout.bar)).to_le_bytes());
        body.extend((layout.pending | u32::from(layout.bar)).to_le_bytes());
        let writable = (ENABLE | FUNCTION_MASK).to_le_bytes();
        let capability = config.add_capability(CAPABILITY, &body, &writable);
        let vectors = vectors
            .into_iter()
            .map(|msi| Vector { entry: Mutex::new(MsixEntry::RESET), msi })
            .collect();
        let flag = || AtomicBool::new(false);
        Self { vectors, layout, capability, enabled: flag(), function_masked: flag() }
    }

    /// How many vectors there are.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.vectors.len()
    }

    /// Bytes of the table.
    pub fn table_bytes(vectors: usize) -> u64 {
        vectors as u64 * ENTRY_BYTES
    }

    /// Bytes of the pending bit array.
    pub fn pending_bytes(vectors: usize) -> u64 {
        vectors.div_ceil(64) as u64 * 8
    }

    /// The capability's offset in configuration space.
    pub fn capability(&self) -> u8 {
        self.capability
    }

    /// Whether the guest has enabled MSI-X (else a device uses INTx).
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// The vector's interrupt, for an irqfd. While masked it has no route: what is signalled then
    /// stays in the eventfd's count.
    pub fn vector(&self, index: u16) -> Option<&Arc<dyn MsiVector>> {
        self.vectors.get(usize::from(index)).map(|v| &v.msi)
    }

    /// Interrupts with vector `index`: sends its message, or keeps it pending while masked. Does
    /// nothing while MSI-X is off or if there is no such vector.
    pub fn trigger(&self, index: u16) {
        let Some(v) = self.vectors.get(usize::from(index)) else { return };
        let mut entry = v.entry.lock();
        if !self.enabled() {
            return;
        }
        if entry.masked || self.function_masked.load(Ordering::SeqCst) {
            entry.pending = true;
        } else {
            v.msi.trigger();
        }
    }

    /// Takes over enable and function mask from the control register in `config`.
    pub fn config_changed(&self, config: &ConfigSpace) {
        let control = config.get_u16(usize::from(self.capability) + 2);
        let (on, masked) = (control & ENABLE != 0, control & FUNCTION_MASK != 0);
        let was = self.enabled.swap(on, Ordering::SeqCst);
        if self.function_masked.swap(masked, Ordering::SeqCst) != masked || was != on {
            self.vectors.iter().for_each(|v| self.apply(v, &mut v.entry.lock()));
        }
    }

    /// Makes the route fit the entry and masks, and delivers what is pending if it may go.
    fn apply(&self, v: &Vector, entry: &mut MsixEntry) {
        let open = self.enabled() && !entry.masked && !self.function_masked.load(Ordering::SeqCst);
        v.msi.route(open.then_some((entry.address, entry.data)));
        if open && std::mem::take(&mut entry.pending) {
            v.msi.trigger();
        }
    }

    fn table_entry(&self, bar: u8, offset: u64) -> Option<(&Vector, u64)> {
        let at = offset.checked_sub(u64::from(self.layout.table))?;
        let v = self.vectors.get(usize::try_from(at / ENTRY_BYTES).ok()?)?;
        (bar == self.layout.bar).then_some((v, at % ENTRY_BYTES))
    }

    /// Reads table or pending bits; false if the offset is in neither. Reads of other than 4 or
    /// 8 aligned bytes are undefined by the specification: here they read the bytes there.
    pub fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> bool {
        let mut hit = false;
        for (i, d) in data.iter_mut().enumerate() {
            let at = offset + i as u64;
            let byte = self.table_byte(bar, at).or_else(|| self.pending_byte(bar, at));
            hit |= byte.is_some();
            *d = byte.unwrap_or(0);
        }
        hit
    }

    fn table_byte(&self, bar: u8, offset: u64) -> Option<u8> {
        let (v, at) = self.table_entry(bar, offset)?;
        Some(v.entry.lock().register(at / 4).to_le_bytes()[(at % 4) as usize])
    }

    fn pending_byte(&self, bar: u8, offset: u64) -> Option<u8> {
        let at = offset.checked_sub(u64::from(self.layout.pending))?;
        if bar != self.layout.bar || at >= Self::pending_bytes(self.len()) {
            return None;
        }
        let bits = self.vectors.iter().skip(at as usize * 8).take(8).enumerate();
        Some(bits.fold(0, |b, (i, v)| b | u8::from(v.entry.lock().pending) << i))
    }

    /// Writes the table; false if the offset is not in table or pending bits. Only aligned 4 and
    /// 8 byte writes have an effect, and pending bits cannot be written.
    pub fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> bool {
        let Some((v, at)) = self.table_entry(bar, offset) else {
            return self.pending_byte(bar, offset).is_some();
        };
        if !matches!(data.len(), 4 | 8) || !at.is_multiple_of(data.len() as u64) {
            return true;
        }
        let mut entry = v.entry.lock();
        for (i, word) in data.chunks_exact(4).enumerate() {
            let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            let address = entry.address;
            match at / 4 + i as u64 {
                0 => entry.address = address >> 32 << 32 | u64::from(word & !3),
                1 => entry.address = address & 0xffff_ffff | u64::from(word) << 32,
                2 => entry.data = word,
                _ => entry.masked = word & 1 != 0,
            }
        }
        self.apply(v, &mut entry);
        true
    }

    /// Back to power-on: all masked, nothing pending. Reset the configuration space and call
    /// [`config_changed`](Self::config_changed) too.
    pub fn reset(&self) {
        for v in &self.vectors {
            let mut entry = v.entry.lock();
            *entry = MsixEntry::RESET;
            self.apply(v, &mut entry);
        }
    }

    /// What is to be saved.
    pub fn save(&self) -> MsixState {
        MsixState { entries: self.vectors.iter().map(|v| *v.entry.lock()).collect() }
    }

    /// Takes over saved entries and the control register in `config`, which is restored already.
    ///
    /// # Errors
    /// If the number of vectors differs.
    pub fn restore(&self, state: &MsixState, config: &ConfigSpace) -> state::Result<()> {
        let (a, b) = (state.entries.len(), self.len());
        if a != b {
            let reason = format!("{a} vectors, this device has {b}");
            return Err(state::Error::invalid("msix", reason));
        }
        let control = config.get_u16(usize::from(self.capability) + 2);
        self.enabled.store(control & ENABLE != 0, Ordering::SeqCst);
        self.function_masked.store(control & FUNCTION_MASK != 0, Ordering::SeqCst);
        for (v, saved) in self.vectors.iter().zip(&state.entries) {
            let mut entry = v.entry.lock();
            *entry = *saved;
            self.apply(v, &mut entry);
        }
        Ok(())
    }
}
