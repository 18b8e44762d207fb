//! The chipset's functions as configuration space: q35 (host bridge, ICH9 LPC) and pc (i440FX,
//! PIIX3, PIIX4 power management). What they control is elsewhere: power management in
//! [`acpi_pm`](crate::acpi_pm), interrupts in the in-kernel interrupt controller.
//!
//! The registers are as firmware would have left them: the power management block is switched on
//! at [`PM_BASE`], and ECAM at [`ECAM_BASE`]. Those two are not writable, since nothing here
//! moves them. Bytes at power-on are pinned by golden files (`crates/devices/golden`).

use std::sync::Arc;

use minicbor::{Decode, Encode};
use parking_lot::Mutex;
use state::Unit;

use crate::acpi_pm::PM_BASE;
use crate::bus::{Access, Effect};
use crate::pci::root::ECAM_BASE;
use crate::pci::{BarInfo, ConfigSpace, ConfigState, Ident, PciDevice, PciError, PciRoot};
use crate::shared::{Shared, SharedUnit};

const SUBSYSTEM: (u16, u16) = (0x1af4, 0x1100);
/// PIRQ routing as at power-on: routed nowhere in PIC mode.
const UNROUTED: [u8; 4] = [0x80; 4];
const ROUTE_BITS: [u8; 4] = [0x8f; 4];

/// What is saved of a chipset function.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct ChipsetState {
    #[n(0)]
    pub config: ConfigState,
}

impl state::SavedState for ChipsetState {
    const KIND: &'static str = "chipset";
    const VERSION: u16 = 1;
}

/// A function that is nothing but its configuration space.
pub struct ChipsetFunction {
    name: &'static str,
    type_name: &'static str,
    config: Mutex<ConfigSpace>,
}

fn ident(device: u16, revision: u8, class: u32) -> Ident {
    Ident { vendor: 0x8086, device, revision, class, subsystem: SUBSYSTEM }
}

impl ChipsetFunction {
    fn build(name: &'static str, type_name: &'static str, config: ConfigSpace) -> Arc<Self> {
        Arc::new(Self { name, type_name, config: Mutex::new(config) })
    }

    /// q35's host bridge, for 00:00.0.
    pub fn q35_host() -> Arc<Self> {
        let mut c = ConfigSpace::endpoint(ident(0x29c0, 0, 0x06_0000), false);
        // PCIEXBAR: on, 256 MiB.
        c.init_u32(0x60, ECAM_BASE as u32 | 1);
        Self::build("q35-host", "mch", c)
    }

    /// ICH9's LPC bridge, for 00:1f.0, multifunction.
    pub fn ich9_lpc() -> Arc<Self> {
        let mut c = ConfigSpace::endpoint(ident(0x2918, 2, 0x06_0100), false);
        c.set_multifunction();
        c.init_u32(0x40, u32::from(PM_BASE) | 1);
        // ACPI on, SCI at IRQ 9.
        c.init(0x44, &[0x80]);
        for at in [0x60, 0x68] {
            c.init(at, &UNROUTED);
            c.allow(at, &ROUTE_BITS);
        }
        Self::build("ich9-lpc", "ICH9-LPC", c)
    }

    /// pc's host bridge, for 00:00.0.
    pub fn i440fx() -> Arc<Self> {
        let mut c = ConfigSpace::endpoint(ident(0x1237, 2, 0x06_0000), false);
        // PAM: the areas for ROM, readable and writable RAM here.
        c.init(0x59, &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33]);
        Self::build("i440fx", "i440FX", c)
    }

    /// PIIX3's ISA bridge, for 00:01.0, multifunction.
    pub fn piix3() -> Arc<Self> {
        let mut c = ConfigSpace::endpoint(ident(0x7000, 0, 0x06_0100), false);
        c.set_multifunction();
        c.init(0x60, &UNROUTED);
        c.allow(0x60, &ROUTE_BITS);
        Self::build("piix3", "PIIX3", c)
    }

    /// PIIX4's power management, for 00:01.3.
    pub fn piix4_pm() -> Arc<Self> {
        let mut c = ConfigSpace::endpoint(ident(0x7113, 3, 0x06_8000), false);
        c.set_interrupt_pin(1);
        c.init(0x3c, &[9]);
        c.init_u32(0x40, u32::from(PM_BASE) | 1);
        c.init(0x80, &[1]);
        Self::build("piix4-pm", "PIIX4_PM", c)
    }
}

/// Plugs in q35's functions, and returns their units.
///
/// # Errors
/// If one of their places is taken.
pub fn plug_q35(root: &PciRoot) -> Result<Vec<Box<dyn Unit>>, PciError> {
    let functions = [
        (ChipsetFunction::q35_host(), (0, 0), false),
        (ChipsetFunction::ich9_lpc(), (31, 0), true),
    ];
    plug(root, "pcie.0", functions)
}

/// Plugs in pc's functions, and returns their units.
///
/// # Errors
/// If one of their places is taken.
pub fn plug_pc(root: &PciRoot) -> Result<Vec<Box<dyn Unit>>, PciError> {
    let functions = [
        (ChipsetFunction::i440fx(), (0, 0), false),
        (ChipsetFunction::piix3(), (1, 0), true),
        (ChipsetFunction::piix4_pm(), (1, 3), true),
    ];
    plug(root, "pci.0", functions)
}

fn plug<const N: usize>(
    root: &PciRoot,
    bus: &str,
    functions: [(Arc<ChipsetFunction>, (u8, u8), bool); N],
) -> Result<Vec<Box<dyn Unit>>, PciError> {
    let mut units: Vec<Box<dyn Unit>> = Vec::new();
    for (function, place, multifunction) in functions {
        root.add(bus, Some(place), multifunction, function.clone())?;
        units.push(Box::new(SharedUnit::new(function)));
    }
    Ok(units)
}

impl PciDevice for ChipsetFunction {
    fn name(&self) -> &str {
        self.name
    }

    fn type_name(&self) -> &str {
        self.type_name
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Effect {
        if self.config.lock().write(offset, data) { Effect::Relayout } else { Effect::None }
    }

    fn bars(&self) -> Vec<BarInfo> {
        Vec::new()
    }

    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) -> Access {
        data.fill(0xff);
        Access::Fault
    }

    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) -> (Access, Effect) {
        (Access::Fault, Effect::None)
    }
}

impl Shared for ChipsetFunction {
    type State = ChipsetState;

    fn unit_name(&self) -> &str {
        self.name
    }

    fn save(&self) -> state::Result<ChipsetState> {
        Ok(ChipsetState { config: self.config.lock().save() })
    }

    fn restore(&self, state: ChipsetState) -> state::Result<()> {
        self.config.lock().restore(&state.config)
    }

    fn reset(&self) {
        self.config.lock().reset();
    }

    fn migration_blocker(&self) -> Option<String> {
        None
    }
}
