//! A function's configuration space: bytes with a mask of what the guest may write.
//!
//! Invariants: a guest's write changes only bits of the write mask (as written) and of the
//! write-one-to-clear mask (to zero). BAR sizing needs no state of its own: the size's low bits
//! are not writable, so writing all ones reads back the size mask. Restored bytes may differ from
//! the built ones only in writable bits and in those declared volatile (set by the device), so a
//! hostile state cannot give the function another identity or layout.
//!
//! Source: PCI Local Bus 3.0, chapter 6; PCI Express Base 5.0, chapter 7.

use minicbor::{Decode, Encode};

use super::device::{BarInfo, BarKind, Window};

/// Register offsets.
pub mod reg {
    pub const VENDOR: usize = 0x00;
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const REVISION: usize = 0x08;
    pub const HEADER_TYPE: usize = 0x0e;
    pub const BAR0: usize = 0x10;
    pub const PRIMARY_BUS: usize = 0x18;
    pub const IO_BASE: usize = 0x1c;
    pub const MEMORY_BASE: usize = 0x20;
    pub const PREFETCH_BASE: usize = 0x24;
    pub const SUBSYSTEM: usize = 0x2c;
    pub const CAPABILITIES: usize = 0x34;
    pub const INTERRUPT_LINE: usize = 0x3c;
    pub const INTERRUPT_PIN: usize = 0x3d;
    pub const BRIDGE_CONTROL: usize = 0x3e;
}

/// Command register bits.
pub mod command {
    pub const IO: u16 = 1 << 0;
    pub const MEMORY: u16 = 1 << 1;
    pub const MASTER: u16 = 1 << 2;
    pub const SERR: u16 = 1 << 8;
    pub const INTX_DISABLE: u16 = 1 << 10;
}

const STATUS_INTX: u16 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// The errors a guest clears by writing ones.
const STATUS_W1C: u16 = 0xf900;

/// Who a function says that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ident {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Class, subclass and programming interface, as 0xCCSSPP.
    pub class: u32,
    /// Subsystem vendor and id; header type 0 only.
    pub subsystem: (u16, u16),
}

/// What is saved of a configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ConfigState {
    #[cbor(n(0), with = "minicbor::bytes")]
    pub bytes: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    kind: BarKind,
    size: u64,
}

/// A configuration space of 256 (conventional) or 4096 bytes (PCI Express).
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    power_on: Vec<u8>,
    write: Vec<u8>,
    clear: Vec<u8>,
    volatile: Vec<u8>,
    bars: [Option<Bar>; 6],
    /// Where the next capability goes, and which byte links to it.
    next_capability: usize,
    link: usize,
    next_extended: usize,
    extended_link: usize,
}

impl ConfigSpace {
    /// An endpoint's space (header type 0). `express`: 4096 bytes, else 256.
    pub fn endpoint(ident: Ident, express: bool) -> Self {
        let mut c = Self::new(ident, express, 0);
        c.init_u16(reg::SUBSYSTEM, ident.subsystem.0);
        c.init_u16(reg::SUBSYSTEM + 2, ident.subsystem.1);
        c
    }

    /// A bridge's space (header type 1): bus numbers and windows are writable; 4 KiB I/O
    /// granularity with 16-bit addresses, 1 MiB memory windows, 64-bit prefetch window.
    pub fn bridge(ident: Ident, express: bool) -> Self {
        let mut c = Self::new(ident, express, 1);
        c.allow(reg::PRIMARY_BUS, &[0xff, 0xff, 0xff]);
        c.allow(reg::IO_BASE, &[0xf0, 0xf0]);
        c.init_u16(reg::IO_BASE, 0);
        c.clear_on_write(reg::IO_BASE + 2, &STATUS_W1C.to_le_bytes());
        c.allow(reg::MEMORY_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        c.init_u16(reg::PREFETCH_BASE, 1);
        c.init_u16(reg::PREFETCH_BASE + 2, 1);
        c.allow(reg::PREFETCH_BASE, &[0xf0, 0xff, 0xf0, 0xff]);
        c.allow(reg::PREFETCH_BASE + 4, &[0xff; 8]);
        c.allow(reg::BRIDGE_CONTROL, &[0x5f, 0x00]);
        c
    }

    fn new(ident: Ident, express: bool, header: u8) -> Self {
        let size = if express { 4096 } else { 256 };
        let zeros = || vec![0; size];
        let mut c = Self {
            bytes: zeros(),
            power_on: zeros(),
            write: zeros(),
            clear: zeros(),
            volatile: zeros(),
            bars: [None; 6],
            next_capability: 0x40,
            link: reg::CAPABILITIES,
            next_extended: 0x100,
            extended_link: 0,
        };
        c.init_u16(reg::VENDOR, ident.vendor);
        c.init_u16(reg::VENDOR + 2, ident.device);
        c.init(reg::REVISION, &[ident.revision]);
        c.init(reg::REVISION + 1, &ident.class.to_le_bytes()[..3]);
        c.init(reg::HEADER_TYPE, &[header]);
        let cmd =
            command::IO | command::MEMORY | command::MASTER | command::SERR | command::INTX_DISABLE;
        c.allow(reg::COMMAND, &cmd.to_le_bytes());
        c.clear_on_write(reg::STATUS, &STATUS_W1C.to_le_bytes());
        c.volatile(reg::STATUS, &(STATUS_W1C | STATUS_INTX).to_le_bytes());
        c.allow(0x0c, &[0xff]);
        c.allow(reg::INTERRUPT_LINE, &[0xff]);
        c
    }

    // ---- building -------------------------------------------------------------------------

    /// Sets bytes as they are at power-on. Only while building.
    ///
    /// # Panics
    /// If out of the space, as do all building functions: their arguments are the device's own
    /// constants.
    pub fn init(&mut self, offset: usize, data: &[u8]) {
        self.bytes[offset..offset + data.len()].copy_from_slice(data);
        self.power_on[offset..offset + data.len()].copy_from_slice(data);
    }

    /// [`init`](Self::init) of a little-endian u16.
    pub fn init_u16(&mut self, offset: usize, value: u16) {
        self.init(offset, &value.to_le_bytes());
    }

    /// [`init`](Self::init) of a little-endian u32.
    pub fn init_u32(&mut self, offset: usize, value: u32) {
        self.init(offset, &value.to_le_bytes());
    }

    /// Bits that the guest may write.
    pub fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.write[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Bits that the guest clears by writing ones. They are volatile too.
    pub fn clear_on_write(&mut self, offset: usize, mask: &[u8]) {
        self.clear[offset..offset + mask.len()].copy_from_slice(mask);
        self.volatile(offset, mask);
    }

    /// Bits that the device itself changes, so that they may differ in a restored state.
    pub fn volatile(&mut self, offset: usize, mask: &[u8]) {
        for (v, m) in self.volatile[offset..].iter_mut().zip(mask) {
            *v |= m;
        }
    }

    /// Marks it as one of several functions of its slot.
    pub fn set_multifunction(&mut self) {
        let header = self.bytes[reg::HEADER_TYPE] | 0x80;
        self.init(reg::HEADER_TYPE, &[header]);
    }

    /// The pin of its INTx: 1 (INTA) to 4, 0 for none.
    pub fn set_interrupt_pin(&mut self, pin: u8) {
        self.init(reg::INTERRUPT_PIN, &[pin]);
    }

    /// Adds BAR `index` of `size` bytes, a power of two; memory at least 16 bytes, I/O at least 4.
    pub fn add_bar(&mut self, index: u8, kind: BarKind, size: u64) {
        let i = usize::from(index);
        assert!(size.is_power_of_two() && self.bars[i].is_none());
        let offset = reg::BAR0 + 4 * i;
        let low = (size as u32).wrapping_neg();
        match kind {
            BarKind::Io => {
                assert!((4..=0x1_0000).contains(&size));
                self.init_u32(offset, 1);
                self.allow(offset, &(low & !3).to_le_bytes());
            }
            BarKind::Mem32 => {
                assert!((16..=1 << 31).contains(&size));
                self.allow(offset, &low.to_le_bytes());
            }
            BarKind::Mem64Prefetch => {
                assert!(size >= 16 && index < 5);
                self.init_u32(offset, 0xc);
                self.allow(offset, &(size.wrapping_neg() & !0xf).to_le_bytes());
            }
        }
        self.bars[i] = Some(Bar { kind, size });
    }

    /// Adds a capability: its `id` and what follows the two header bytes, with the mask of what
    /// the guest may write there (missing bytes: nothing). Returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let at = self.next_capability;
        assert!(at + 2 + body.len() <= 0x100 && writable.len() <= body.len());
        self.init(self.link, &[at as u8]);
        self.init(at, &[id, 0]);
        self.init(at + 2, body);
        self.allow(at + 2, writable);
        let status = self.get_u16(reg::STATUS) | STATUS_CAPABILITIES;
        self.init_u16(reg::STATUS, status);
        self.link = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        at as u8
    }

    /// Adds an extended capability (PCI Express): body after the four header bytes. Returns its
    /// offset.
    pub fn add_extended_capability(&mut self, id: u16, version: u8, body: &[u8]) -> u16 {
        let at = self.next_extended;
        assert!(at + 4 + body.len() <= self.bytes.len());
        if self.extended_link != 0 {
            let link = self.get_u32(self.extended_link) | (at as u32) << 20;
            self.init_u32(self.extended_link, link);
        }
        self.init_u32(at, u32::from(id) | u32::from(version & 0xf) << 16);
        self.init(at + 4, body);
        self.extended_link = at;
        self.next_extended = (at + 4 + body.len()).next_multiple_of(4);
        at as u16
    }

    // ---- the device's side -----------------------------------------------------------------

    /// The byte at `offset`; zero beyond the space.
    pub fn get_u8(&self, offset: usize) -> u8 {
        self.bytes.get(offset).copied().unwrap_or(0)
    }

    /// The little-endian u16 at `offset`.
    pub fn get_u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.get_u8(offset), self.get_u8(offset + 1)])
    }

    /// The little-endian u32 at `offset`.
    pub fn get_u32(&self, offset: usize) -> u32 {
        u32::from(self.get_u16(offset)) | u32::from(self.get_u16(offset + 2)) << 16
    }

    /// The device changes bits at run time; they should be declared volatile or writable.
    pub fn set_u8(&mut self, offset: usize, value: u8) {
        if let Some(b) = self.bytes.get_mut(offset) {
            *b = value;
        }
    }

    /// [`set_u8`](Self::set_u8) for a little-endian u16.
    pub fn set_u16(&mut self, offset: usize, value: u16) {
        let [a, b] = value.to_le_bytes();
        self.set_u8(offset, a);
        self.set_u8(offset + 1, b);
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.get_u16(reg::COMMAND)
    }

    /// Shows in the status register whether the function asserts INTx. The line itself is to be
    /// up only if this is set and the command register does not disable INTx.
    pub fn set_intx_status(&mut self, asserted: bool) {
        let s = self.get_u16(reg::STATUS) & !STATUS_INTX;
        self.set_u16(reg::STATUS, if asserted { s | STATUS_INTX } else { s });
    }

    /// Whether the INTx line is to be up: asserted and not disabled.
    pub fn intx_level(&self) -> bool {
        self.get_u16(reg::STATUS) & STATUS_INTX != 0 && self.command() & command::INTX_DISABLE == 0
    }

    /// All BARs as they are now.
    pub fn bars(&self) -> Vec<BarInfo> {
        (0..6u8).filter_map(|i| self.bar(i)).collect()
    }

    /// BAR `index` as it is now.
    pub fn bar(&self, index: u8) -> Option<BarInfo> {
        let Bar { kind, size } = (*self.bars.get(usize::from(index))?)?;
        Some(BarInfo { index, kind, size, address: self.bar_address(index, kind, size) })
    }

    fn bar_address(&self, index: u8, kind: BarKind, size: u64) -> Option<u64> {
        let offset = reg::BAR0 + 4 * usize::from(index);
        let low = self.get_u32(offset);
        let (enable, address, end) = match kind {
            BarKind::Io => (command::IO, u64::from(low & !3), 0x1_0000),
            BarKind::Mem32 => (command::MEMORY, u64::from(low & !0xf), 0xffff_ffff),
            BarKind::Mem64Prefetch => {
                let high = u64::from(self.get_u32(offset + 4)) << 32;
                (command::MEMORY, high | u64::from(low & !0xf), 1 << 52)
            }
        };
        // Address zero and sizing patterns, which reach the end of the space, decode nothing.
        let fits = address.checked_add(size).is_some_and(|e| e <= end);
        (self.command() & enable != 0 && address != 0 && fits).then_some(address)
    }

    /// The windows of a bridge: I/O, memory, prefetchable memory; `None` if closed or not decoded.
    pub fn windows(&self) -> [Option<Window>; 3] {
        let cmd = self.command();
        let window = |enable: u16, base: u64, limit: u64| {
            (cmd & enable != 0 && base <= limit).then_some(Window { base, limit })
        };
        let io = |at| u64::from(self.get_u8(at) & 0xf0) << 8;
        let mem = |at| u64::from(self.get_u16(at) & 0xfff0) << 16;
        let high = |at| u64::from(self.get_u32(at)) << 32;
        let (m, p) = (reg::MEMORY_BASE, reg::PREFETCH_BASE);
        [
            window(command::IO, io(reg::IO_BASE), io(reg::IO_BASE + 1) | 0xfff),
            window(command::MEMORY, mem(m), mem(m + 2) | 0xf_ffff),
            window(command::MEMORY, mem(p) | high(p + 4), mem(p + 2) | high(p + 8) | 0xf_ffff),
        ]
    }

    // ---- the guest's side ------------------------------------------------------------------

    /// The guest reads; bytes beyond the space are zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, d) in data.iter_mut().enumerate() {
            *d = self.get_u8(usize::from(offset) + i);
        }
    }

    /// The guest writes. True when a BAR, bridge window or bus number is another than before: the
    /// device then returns [`Effect::Relayout`](crate::bus::Effect::Relayout).
    pub fn write(&mut self, offset: u16, data: &[u8]) -> bool {
        let start = usize::from(offset);
        let header = start < 0x40 && start + data.len() > reg::COMMAND;
        let before = header.then(|| self.layout());
        for (at, &v) in (start..self.bytes.len()).zip(data) {
            let (w, c) = (self.write[at], self.clear[at]);
            let b = &mut self.bytes[at];
            *b = (*b & !w | v & w) & !(v & c);
        }
        before.is_some_and(|b| b != self.layout())
    }

    /// All that decides where accesses go.
    fn layout(&self) -> ([Option<u64>; 6], [Option<Window>; 3], u32) {
        let mut bars = [None; 6];
        for (i, slot) in bars.iter_mut().enumerate() {
            *slot = self.bar(i as u8).and_then(|b| b.address);
        }
        if self.get_u8(reg::HEADER_TYPE) & 0x7f == 1 {
            (bars, self.windows(), self.get_u32(reg::PRIMARY_BUS) & 0x00ff_ffff)
        } else {
            (bars, [None; 3], 0)
        }
    }

    // ---- state -----------------------------------------------------------------------------

    /// Back to power-on.
    pub fn reset(&mut self) {
        self.bytes.copy_from_slice(&self.power_on);
    }

    /// What is to be saved.
    pub fn save(&self) -> ConfigState {
        ConfigState { bytes: self.bytes.clone() }
    }

    /// Takes over saved bytes.
    ///
    /// # Errors
    /// If the size differs, or a bit that neither the guest nor the device can change.
    pub fn restore(&mut self, state: &ConfigState) -> state::Result<()> {
        let saved = &state.bytes;
        if saved.len() != self.bytes.len() {
            let (a, b) = (saved.len(), self.bytes.len());
            let reason = format!("{a} bytes of configuration space, this device has {b}");
            return Err(state::Error::invalid("config", reason));
        }
        for (at, &s) in saved.iter().enumerate() {
            let free = self.write[at] | self.clear[at] | self.volatile[at];
            let fixed = self.power_on[at];
            if (s ^ fixed) & !free != 0 {
                let reason =
                    format!("byte {at:#x} is {s:#04x}, this device has {fixed:#04x} fixed there");
                return Err(state::Error::invalid("config", reason));
            }
        }
        self.bytes.copy_from_slice(saved);
        Ok(())
    }
}
