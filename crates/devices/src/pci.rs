//! PCI and PCI Express: what a function is, its configuration space, MSI-X, the root that finds
//! functions and their BARs, and PCIe root ports.
//!
//! - [`device`]: [`PciDevice`], what the root needs of a function.
//! - [`config`]: [`ConfigSpace`], registers with write masks, BARs and capabilities.
//! - [`msix`]: [`Msix`], the vector table and pending bits.
//! - [`root`]: [`PciRoot`], the tree of functions and the guest's ways to them.
//! - [`assign`]: placing BARs and bridge windows where there is no firmware.
//! - [`root_port`]: [`RootPort`], a PCIe slot.

pub mod assign;
pub mod config;
pub mod device;
pub mod msix;
pub mod root;
pub mod root_port;

pub use assign::Windows;
pub use config::{ConfigSpace, ConfigState, Ident};
pub use device::{BarInfo, BarKind, BridgeInfo, PciDevice, Window};
pub use msix::{Msix, MsixLayout, MsixState};
pub use root::{FunctionInfo, PciError, PciRoot};
pub use root_port::RootPort;

/// Where a function is: bus, slot (device) 0..=31, function 0..=7.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    pub bus: u8,
    pub slot: u8,
    pub function: u8,
}

impl Bdf {
    /// Slot and function as one byte, as PCI packs them.
    pub fn devfn(self) -> u8 {
        self.slot << 3 | self.function
    }
}

impl std::fmt::Display for Bdf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02x}:{:02x}.{:x}", self.bus, self.slot, self.function)
    }
}

/// The GSI of a function's INTx on bus 0 when the guest uses the I/O APIC: PIRQE to PIRQH, that
/// is GSI 20 to 23, by slot. `pin` is 1 for INTA to 4 for INTD, as in configuration register 0x3d.
/// Level triggered; several functions share a GSI.
///
/// The `_PRT` of the host bridge must say the same: for every slot and pin,
/// `Package { slot << 16 | 0xffff, pin - 1, 0, intx_gsi(slot, pin) }`. Behind a bridge the pin is
/// first swizzled by [`swizzle`] with the slot behind it, once a bridge.
pub fn intx_gsi(slot: u8, pin: u8) -> u32 {
    20 + (u32::from(slot) + u32::from(pin.clamp(1, 4)) - 1) % 4
}

/// The pin on the primary side that `pin` (1..=4) of `slot` behind a bridge comes out at
/// (PCI-to-PCI Bridge Architecture 1.2, section 9.1).
pub fn swizzle(slot: u8, pin: u8) -> u8 {
    (slot % 4 + pin.clamp(1, 4) - 1) % 4 + 1
}
