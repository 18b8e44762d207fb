//! Where everything lies in the guest's physical address space. Part of the machine version: what
//! is here may never change under a migrating guest (`q35-1`).
//!
//! ```text
//!   0x0000_0000  low RAM (up to 0xB000_0000, or to 0x8000_0000 when there is more than that)
//!   0x000A_0000  legacy hole (not given to the guest as RAM; ACPI tables from 0xE_0000)
//!   0xB000_0000  PCIe configuration space (ECAM), 256 buses
//!   0xC000_0000  32-bit PCI memory window
//!   0xFEC0_0000  IOAPIC; 0xFEE0_0000 local APICs
//!   0x1_0000_0000  high RAM
//!   above it      64-bit PCI memory window
//! ```

use mem::RegionSpec;

/// Name of this layout, part of the migration preamble.
pub const MACHINE_VERSION: &str = "1";
/// Lowest page that Linux's boot data uses: GDT.
pub const GDT: u64 = 0x500;
/// PVH start info.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH memory map.
pub const PVH_MEMMAP: u64 = 0x6100;
/// PVH module list.
pub const PVH_MODULES: u64 = 0x6e00;
/// Linux boot parameters ("zero page").
pub const BOOT_PARAMS: u64 = 0x7000;
/// Identity-mapped page tables for the 64-bit entry: PML4, PDPT, 4 PDs.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Bytes of command line at most, with its NUL (x86 COMMAND_LINE_SIZE is 2048; leave room).
pub const COMMAND_LINE_MAX: usize = 0x1_0000;
/// End of conventional memory.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables, RSDP first.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// End of the room for ACPI tables.
pub const ACPI_TABLES_END: u64 = 0x10_0000;
/// Where RAM goes on above the legacy hole; the kernel is loaded here.
pub const HIGH_RAM_START: u64 = 0x10_0000;
/// PCIe configuration space.
pub const ECAM: u64 = 0xb000_0000;
/// Bytes of it: 256 buses.
pub const ECAM_SIZE: u64 = 0x1000_0000;
/// 32-bit PCI memory window.
pub const PCI_MMIO32: u64 = 0xc000_0000;
/// End of the 32-bit window.
pub const PCI_MMIO32_END: u64 = 0xfec0_0000;
/// IOAPIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC.
pub const LAPIC: u32 = 0xfee0_0000;
/// First address above 4 GiB.
pub const HIGH: u64 = 0x1_0000_0000;
/// Bytes of the 64-bit PCI window.
pub const PCI_MMIO64_SIZE: u64 = 0x8_0000_0000;
/// Most RAM: leaves the 64-bit window below 2^46.
pub const MAX_RAM: u64 = 1 << 45;
/// ACPI power management registers.
pub const PM_BASE: u16 = 0x600;
/// General purpose event registers (ICH9: PM_BASE + 0x20), 16 bytes.
pub const GPE0: u16 = PM_BASE + 0x20;
/// SMI command port, where ACPI is switched on.
pub const SMI_COMMAND: u16 = 0xb2;
/// Reset control register.
pub const RESET_PORT: u16 = 0xcf9;
/// ACPI interrupt.
pub const SCI_GSI: u32 = 9;
/// First GSI that is no IOAPIC pin: MSI routes start here.
pub const FIRST_MSI_GSI: u32 = 24;

/// RAM regions for `size` bytes of RAM (at least 1 MiB, a multiple of 4 KiB).
pub fn ram(size: u64) -> Vec<RegionSpec> {
    if size <= ECAM {
        return vec![RegionSpec { gpa: 0, size }];
    }
    let low = 0x8000_0000;
    vec![RegionSpec { gpa: 0, size: low }, RegionSpec { gpa: HIGH, size: size - low }]
}

/// Start of the 64-bit PCI window for `size` bytes of RAM: 1 GiB aligned, above RAM.
pub fn mmio64(size: u64) -> u64 {
    let end = ram(size).last().map_or(0, |r| r.gpa + r.size).max(HIGH);
    end.next_multiple_of(1 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_stays_out_of_the_windows() {
        for size in [1 << 20, 256 << 20, ECAM, ECAM + 4096, 3 << 30, 64 << 30, MAX_RAM] {
            let regions = ram(size);
            assert_eq!(regions.iter().map(|r| r.size).sum::<u64>(), size);
            assert!(regions[0].size <= ECAM);
            assert!(regions.iter().all(|r| r.gpa + r.size <= mmio64(size)));
            assert_eq!(mmio64(size) % (1 << 30), 0);
        }
    }
}
