//! A PCIe root port: a bridge with one slot behind it, with native hotplug registers.
//!
//! Invariants: presence detect follows what is plugged in; the change bits, command completed and
//! the interrupt follow PCI Express Base 5.0, sections 6.7 and 7.5.3. What is plugged in before
//! power-on shows presence with no change bit, so that the guest sees a device that was always
//! there. The interrupt is MSI-X vector 0.

use std::sync::Arc;

use minicbor::{Decode, Encode};
use parking_lot::Mutex;

use super::config::{ConfigSpace, ConfigState, Ident};
use super::device::{BarInfo, BarKind, BridgeInfo, PciDevice};
use super::msix::{Msix, MsixLayout, MsixState};
use crate::bus::{Access, Effect};
use crate::irq::MsiAllocator;
use crate::shared::Shared;

/// QEMU's generic root port, which guests know.
const IDENT: Ident =
    Ident { vendor: 0x1b36, device: 0x000c, revision: 0, class: 0x06_0400, subsystem: (0, 0) };
const BAR_BYTES: u64 = 0x1000;
const MSIX: MsixLayout = MsixLayout { bar: 0, table: 0, pending: 0x800 };

// Offsets in the PCI Express capability.
const LINK_STATUS: usize = 0x12;
const SLOT_CONTROL: usize = 0x18;
const SLOT_STATUS: usize = 0x1a;

// Slot status bits.
const BUTTON_PRESSED: u16 = 1 << 0;
const PRESENCE_CHANGED: u16 = 1 << 3;
const COMMAND_COMPLETED: u16 = 1 << 4;
const PRESENT: u16 = 1 << 6;
const LINK_CHANGED: u16 = 1 << 8;
/// Slot control bits that enable an interrupt for the status bit of the same place.
const EVENT_ENABLES: u16 = BUTTON_PRESSED | PRESENCE_CHANGED | COMMAND_COMPLETED;
const HOTPLUG_INTERRUPT: u16 = 1 << 5;
const LINK_CHANGE_ENABLE: u16 = 1 << 12;
const POWER_OFF: u16 = 1 << 10;
const LINK_ACTIVE: u16 = 1 << 13;

/// What is saved of a root port.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RootPortState {
    #[n(0)]
    pub config: ConfigState,
    #[n(1)]
    pub msix: MsixState,
}

impl state::SavedState for RootPortState {
    const KIND: &'static str = "pcie-root-port";
    const VERSION: u16 = 1;
}

struct Registers {
    config: ConfigSpace,
    present: bool,
}

/// A root port.
pub struct RootPort {
    name: String,
    express: usize,
    msix: Msix,
    registers: Mutex<Registers>,
}

impl RootPort {
    /// A port called `name`, which is also the name of the bus behind it. `chassis` and `slot`
    /// number the physical slot, `port` the link; the pair (chassis, slot) is unique.
    ///
    /// # Errors
    /// When there is no interrupt vector left.
    pub fn new(
        name: &str,
        port: u8,
        chassis: u8,
        slot: u16,
        msi: &dyn MsiAllocator,
    ) -> Result<Arc<Self>, String> {
        let mut config = ConfigSpace::bridge(IDENT, true);
        config.set_interrupt_pin(1);
        config.add_bar(0, BarKind::Mem32, BAR_BYTES);
        let express = usize::from(add_express(&mut config, port, slot));
        let msix = Msix::new(&mut config, MSIX, msi.allocate(1)?);
        // Bridge subsystem identification, then the slot's chassis.
        config.add_capability(0x0d, &[0, 0, 0x36, 0x1b, 0, 0], &[]);
        config.add_capability(0x04, &[0x20, chassis], &[]);
        let registers = Mutex::new(Registers { config, present: false });
        Ok(Arc::new(Self { name: name.to_owned(), express, msix, registers }))
    }

    /// The guest's attention button: asks it to let the device behind the port go, or to look.
    pub fn press_attention_button(&self) {
        let mut r = self.registers.lock();
        self.raise(&mut r.config, BUTTON_PRESSED);
    }

    /// Whether the guest has switched the slot's power off: its device may be pulled.
    pub fn powered_off(&self) -> bool {
        self.registers.lock().config.get_u16(self.express + SLOT_CONTROL) & POWER_OFF != 0
    }

    /// Sets status bits, and interrupts if they are enabled and were not all set before.
    fn raise(&self, config: &mut ConfigSpace, bits: u16) {
        let before = self.wanted(config);
        let status = config.get_u16(self.express + SLOT_STATUS);
        config.set_u16(self.express + SLOT_STATUS, status | bits);
        self.interrupt(config, before);
    }

    /// The events that are set and enabled.
    fn wanted(&self, config: &ConfigSpace) -> u16 {
        let control = config.get_u16(self.express + SLOT_CONTROL);
        let status = config.get_u16(self.express + SLOT_STATUS);
        if control & HOTPLUG_INTERRUPT == 0 {
            return 0;
        }
        let link = if control & LINK_CHANGE_ENABLE != 0 { LINK_CHANGED } else { 0 };
        status & (control & EVENT_ENABLES | link)
    }

    fn interrupt(&self, config: &ConfigSpace, before: u16) {
        if self.wanted(config) & !before != 0 {
            self.msix.trigger(0);
        }
    }

    fn show_presence(&self, config: &mut ConfigSpace, present: bool) {
        let mut set = |at: usize, bit: u16| {
            let v = config.get_u16(at) & !bit;
            config.set_u16(at, if present { v | bit } else { v });
        };
        set(self.express + SLOT_STATUS, PRESENT);
        set(self.express + LINK_STATUS, LINK_ACTIVE);
    }
}

/// The PCI Express capability of a root port with a hotplug slot: 2.5 GT/s, one lane.
fn add_express(config: &mut ConfigSpace, port: u8, slot: u16) -> u8 {
    let mut body = [0u8; 0x3a];
    let mut put = |at: usize, data: &[u8]| body[at - 2..at - 2 + data.len()].copy_from_slice(data);
    put(0x02, &0x0142u16.to_le_bytes()); // version 2, root port, slot implemented
    put(0x04, &0x0000_8000u32.to_le_bytes()); // role-based errors
    let link = 0x0010_0011u32 | u32::from(port) << 24; // data link layer reports active
    put(0x0c, &link.to_le_bytes());
    put(LINK_STATUS, &0x0011u16.to_le_bytes());
    // Button, power controller, both indicators, hotplug with surprise removal.
    let slot_capability = 0x0000_007bu32 | u32::from(slot & 0x1fff) << 19;
    put(0x14, &slot_capability.to_le_bytes());
    put(SLOT_CONTROL, &0x07c0u16.to_le_bytes()); // power off, indicators off
    put(0x2c, &2u32.to_le_bytes()); // link capabilities 2: 2.5 GT/s
    let mut writable = [0u8; 0x3a];
    let mut allow =
        |at: usize, mask: u16| writable[at - 2..at].copy_from_slice(&mask.to_le_bytes());
    allow(0x08, 0x00ff);
    allow(0x10, 0x00fb);
    allow(SLOT_CONTROL, 0x17ff);
    allow(0x1c, 0x001f);
    allow(0x28, 0x0020);
    let at = config.add_capability(0x10, &body, &writable);
    let e = usize::from(at);
    config.clear_on_write(e + 0x0a, &0x000fu16.to_le_bytes());
    let events = BUTTON_PRESSED | 0x6 | PRESENCE_CHANGED | COMMAND_COMPLETED | LINK_CHANGED;
    config.clear_on_write(e + SLOT_STATUS, &events.to_le_bytes());
    config.volatile(e + SLOT_STATUS, &PRESENT.to_le_bytes());
    config.volatile(e + LINK_STATUS, &LINK_ACTIVE.to_le_bytes());
    at
}

impl PciDevice for RootPort {
    fn name(&self) -> &str {
        &self.name
    }

    fn type_name(&self) -> &str {
        "pcie-root-port"
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.registers.lock().config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Effect {
        let mut r = self.registers.lock();
        let before = self.wanted(&r.config);
        let relayout = r.config.write(offset, data);
        self.msix.config_changed(&r.config);
        let range = usize::from(offset)..usize::from(offset) + data.len();
        // A write of slot control is a command to the slot, and is done at once.
        let control = self.express + SLOT_CONTROL;
        if range.start < control + 2 && range.end > control {
            let status = r.config.get_u16(self.express + SLOT_STATUS) | COMMAND_COMPLETED;
            r.config.set_u16(self.express + SLOT_STATUS, status);
        }
        self.interrupt(&r.config, before);
        if relayout { Effect::Relayout } else { Effect::None }
    }

    fn bars(&self) -> Vec<BarInfo> {
        self.registers.lock().config.bars()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Access {
        data.fill(0);
        self.msix.bar_read(bar, offset, data);
        Access::Done
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> (Access, Effect) {
        self.msix.bar_write(bar, offset, data);
        (Access::Done, Effect::None)
    }

    fn bridge(&self) -> Option<BridgeInfo> {
        let r = self.registers.lock();
        let numbers = r.config.get_u32(super::config::reg::PRIMARY_BUS).to_le_bytes();
        let [io, memory, prefetch] = r.config.windows();
        let [primary, secondary, subordinate, _] = numbers;
        Some(BridgeInfo { primary, secondary, subordinate, io, memory, prefetch })
    }

    fn slot_occupied(&self, occupied: bool) {
        let mut r = self.registers.lock();
        if std::mem::replace(&mut r.present, occupied) == occupied {
            return;
        }
        self.show_presence(&mut r.config, occupied);
        // Before the guest has enabled anything this is how the slot was at power-on.
        if r.config.get_u16(self.express + SLOT_CONTROL) & EVENT_ENABLES != 0 {
            self.raise(&mut r.config, PRESENCE_CHANGED | LINK_CHANGED);
        } else if occupied {
            power_on(&mut r.config, self.express);
        }
    }
}

/// A slot that is occupied at power-on has power.
fn power_on(config: &mut ConfigSpace, express: usize) {
    let control = config.get_u16(express + SLOT_CONTROL) & !(POWER_OFF | 0x0300);
    config.set_u16(express + SLOT_CONTROL, control | 0x0100);
}

impl Shared for RootPort {
    type State = RootPortState;

    fn unit_name(&self) -> &str {
        &self.name
    }

    fn save(&self) -> state::Result<RootPortState> {
        let config = self.registers.lock().config.save();
        Ok(RootPortState { config, msix: self.msix.save() })
    }

    fn restore(&self, state: RootPortState) -> state::Result<()> {
        let mut r = self.registers.lock();
        r.config.restore(&state.config)?;
        let shown = r.config.get_u16(self.express + SLOT_STATUS) & PRESENT != 0;
        if shown != r.present {
            let reason = format!(
                "the slot of {} was {}, here it is {}",
                self.name,
                if shown { "occupied" } else { "empty" },
                if r.present { "occupied" } else { "empty" }
            );
            return Err(state::Error::invalid("config", reason));
        }
        self.msix.restore(&state.msix, &r.config)
    }

    fn reset(&self) {
        let mut r = self.registers.lock();
        r.config.reset();
        if r.present {
            self.show_presence(&mut r.config, true);
            power_on(&mut r.config, self.express);
        }
        self.msix.reset();
        self.msix.config_changed(&r.config);
    }

    fn migration_blocker(&self) -> Option<String> {
        None
    }
}
