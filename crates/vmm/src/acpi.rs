//! ACPI tables for direct kernel boot. Source: ACPI 6.4; PCI Firmware 3.3 for MCFG and _OSC.

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::{Aml, aml};
use acpi_tables::{facs::FACS, mcfg::MCFG, rsdp::Rsdp, sdt::Sdt, xsdt::XSDT};

use crate::layout;

const OEM: [u8; 6] = *b"TERN  ";
const TABLE: [u8; 8] = *b"TERNVM  ";
const CREATOR_REVISION: u32 = 1;

/// What the tables describe.
pub struct AcpiSpec<'a> {
    /// APIC id of each vCPU.
    pub apic_ids: &'a [u32],
    /// Whether there is ECAM (q35).
    pub pcie: bool,
    /// PCI buses that the guest may use, from 1: it looks for devices on every one of them.
    pub buses: u16,
    /// 64-bit PCI window: first address and bytes.
    pub mmio64: (u64, u64),
    /// ISA serial ports present, by index (COM1 is 0).
    pub serials: &'a [u8],
    /// GSI of a PCI slot's pin (0 is INTA).
    pub intx_gsi: fn(u8, u8) -> u32,
    /// NUMA: (first address, bytes, node) of RAM, and the node of each vCPU. Empty: no SRAT.
    pub numa_ram: &'a [(u64, u64, u32)],
    pub numa_cpus: &'a [u32],
}

/// All tables as one piece of memory to be put at [`layout::ACPI_TABLES`], RSDP first.
///
/// # Errors
/// A sentence when they do not fit below 1 MiB.
pub fn build(spec: &AcpiSpec<'_>) -> Result<Vec<u8>, String> {
    let mut image = Image { base: layout::ACPI_TABLES, bytes: vec![0; Rsdp::len()] };
    let facs = image.add_aligned(&FACS::new(), 64);
    let dsdt = image.add(&dsdt(spec));
    let fadt = image.add(&fadt(dsdt, facs as u32).finalize());
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(image.add(&madt(spec.apic_ids)));
    if spec.pcie {
        let mut mcfg = MCFG::new(OEM, TABLE, 1);
        mcfg.add_ecam(layout::ECAM, 0, 0, last_bus(spec) as u8);
        xsdt.add_entry(image.add(&mcfg));
    }
    if !spec.numa_ram.is_empty() {
        xsdt.add_entry(image.add(&srat(spec)));
    }
    let xsdt = image.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    let room = layout::ACPI_TABLES_END - layout::ACPI_TABLES;
    if image.bytes.len() as u64 > room {
        return Err(format!(
            "the ACPI tables for {} vCPUs need {} bytes, there is room for {room}",
            spec.apic_ids.len(),
            image.bytes.len()
        ));
    }
    Ok(image.bytes)
}

struct Image {
    base: u64,
    bytes: Vec<u8>,
}

impl Image {
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.add_aligned(table, 16)
    }

    fn add_aligned(&mut self, table: &dyn Aml, align: usize) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(align), 0);
        let at = self.base + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        at
    }
}

fn io_gas(port: u16, bits: u8, size: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, size, u64::from(port))
}

fn fadt(dsdt: u64, facs: u32) -> FADTBuilder {
    let pm = layout::PM_BASE;
    let mut t = acpi_tables::fadt::FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(facs)
        .preferred_pm_profile(PmProfile::Unspecified)
        .gpe_info(layout::GPE0.into(), 0, 16, 0, 0)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    t.sci_int = (layout::SCI_GSI as u16).into();
    t.smi_cmd = u32::from(layout::SMI_COMMAND).into();
    t.acpi_enable = 2;
    t.acpi_disable = 3;
    t.pm1a_evt_blk = u32::from(pm).into();
    t.pm1a_cnt_blk = u32::from(pm + 4).into();
    t.pm_tmr_blk = u32::from(pm + 8).into();
    t.pm1_evt_len = 4;
    t.pm1_cnt_len = 2;
    t.pm_tmr_len = 4;
    t.p_lvl2_lat = 0xfff.into();
    t.p_lvl3_lat = 0xfff.into();
    t.century = 0x32;
    // IAPC_BOOT_ARCH: legacy devices and an 8042 are there; no VGA to probe for.
    t.iapc_boot_arch = 0b111.into();
    t.reset_reg = io_gas(layout::RESET_PORT, 8, AccessSize::ByteAccess);
    t.reset_value = 0x0f;
    t.x_pm1a_evt_blk = io_gas(pm, 32, AccessSize::WordAccess);
    t.x_pm1a_cnt_blk = io_gas(pm + 4, 16, AccessSize::WordAccess);
    t.x_pm_tmr_blk = io_gas(pm + 8, 32, AccessSize::DwordAccess);
    t.x_gpe0_blk = io_gas(layout::GPE0, 128, AccessSize::ByteAccess);
    t
}

/// MADT: local APICs (x2APIC entries from id 255 on), IOAPIC, ISA overrides, NMI on LINT1.
fn madt(apic_ids: &[u32]) -> Sdt {
    let mut t = Sdt::new(*b"APIC", 36, 5, OEM, TABLE, CREATOR_REVISION);
    t.append(layout::LAPIC);
    t.append(1u32); // PCAT_COMPAT: there are 8259s too
    for (uid, &id) in apic_ids.iter().enumerate() {
        if id < 255 && uid < 255 {
            t.append_slice(&[0, 8, uid as u8, id as u8, 1, 0, 0, 0]);
        } else {
            t.append_slice(&[9, 16, 0, 0]);
            t.append(id);
            t.append(1u32);
            t.append(uid as u32);
        }
    }
    t.append_slice(&[1, 12, 0, 0]);
    t.append(layout::IOAPIC);
    t.append(0u32);
    // The PIT's IRQ 0 is on pin 2; the SCI is level, active high.
    t.append_slice(&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    t.append_slice(&[2, 10, 0, layout::SCI_GSI as u8, layout::SCI_GSI as u8, 0, 0, 0, 0x0d, 0]);
    t.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    t.update_checksum();
    t
}

fn srat(spec: &AcpiSpec<'_>) -> Sdt {
    let mut t = Sdt::new(*b"SRAT", 36, 3, OEM, TABLE, CREATOR_REVISION);
    t.append(1u32);
    t.append(0u64);
    for (&id, &node) in spec.apic_ids.iter().zip(spec.numa_cpus) {
        t.append_slice(&[2, 24, 0, 0]);
        t.append(node);
        t.append(id);
        t.append(1u32);
        t.append(0u32);
        t.append(0u32);
    }
    for &(start, size, node) in spec.numa_ram {
        t.append_slice(&[1, 40]);
        t.append(node);
        t.append(0u16);
        t.append(start);
        t.append(size);
        t.append(0u32);
        t.append(1u32);
        t.append(0u64);
    }
    t.update_checksum();
    t
}

fn dsdt(spec: &AcpiSpec<'_>) -> Sdt {
    let mut t = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, CREATOR_REVISION);
    let mut body = Vec::new();
    pci_root(spec, &mut body);
    isa(spec, &mut body);
    cpus(spec.apic_ids.len(), &mut body);
    // S5: SLP_TYP 0, as QEMU's.
    aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&aml::ZERO, &aml::ZERO, &aml::ZERO, &aml::ZERO]),
    )
    .to_aml_bytes(&mut body);
    t.append_slice(&body);
    t
}

/// Number of the last PCI bus.
fn last_bus(spec: &AcpiSpec<'_>) -> u16 {
    spec.buses.clamp(1, 256) - 1
}

fn pci_root(spec: &AcpiSpec<'_>, out: &mut Vec<u8>) {
    let hid = aml::Name::new(
        "_HID".into(),
        &aml::EISAName::new(if spec.pcie { "PNP0A08" } else { "PNP0A03" }),
    );
    let cid = aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03"));
    let uid = aml::Name::new("_UID".into(), &aml::ZERO);
    let bbn = aml::Name::new("_BBN".into(), &aml::ZERO);
    let seg = aml::Name::new("_SEG".into(), &aml::ZERO);
    let mmio = |min: u32, max: u32| {
        aml::AddressSpace::new_memory(
            aml::AddressSpaceCacheable::NotCacheable,
            true,
            min,
            max,
            None,
        )
    };
    let buses = aml::AddressSpace::new_bus_number(0u16, last_bus(spec));
    let config_ports = aml::IO::new(0xcf8, 0xcf8, 1, 8);
    let io_low = aml::AddressSpace::new_io(0u16, 0xcf7u16, None);
    let io_high = aml::AddressSpace::new_io(0xd00u16, 0xffffu16, None);
    let mmio32 = mmio(layout::PCI_MMIO32 as u32, (layout::PCI_MMIO32_END - 1) as u32);
    let (start, size) = spec.mmio64;
    let mmio64 = aml::AddressSpace::new_memory(
        aml::AddressSpaceCacheable::Cacheable,
        true,
        start,
        start + size - 1,
        None,
    );
    let crs = aml::Name::new(
        "_CRS".into(),
        &aml::ResourceTemplate::new(vec![
            &buses,
            &config_ports,
            &io_low,
            &io_high,
            &mmio32,
            &mmio64,
        ]),
    );
    let prt = aml::Name::new("_PRT".into(), &Prt(spec.intx_gsi));
    let osc = Osc;
    let mut children: Vec<&dyn Aml> = vec![&hid, &cid, &uid, &bbn, &seg, &crs, &prt];
    if spec.pcie {
        children.push(&osc);
    }
    aml::Device::new("_SB_.PCI0".into(), children).to_aml_bytes(out);
    if spec.pcie {
        ecam_reservation(out);
    }
}

/// Linux uses ECAM only where a motherboard resource reserves it (PCI Firmware 3.3, 4.1.2).
fn ecam_reservation(out: &mut Vec<u8>) {
    let hid = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C02"));
    let uid = aml::Name::new("_UID".into(), &aml::ONE);
    let ecam = aml::AddressSpace::new_memory(
        aml::AddressSpaceCacheable::NotCacheable,
        true,
        layout::ECAM,
        layout::ECAM + layout::ECAM_SIZE - 1,
        None,
    );
    let crs = aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&ecam]));
    aml::Device::new("_SB_.MRES".into(), vec![&hid, &uid, &crs]).to_aml_bytes(out);
}

/// `_PRT` for all slots and pins, straight to GSIs.
struct Prt(fn(u8, u8) -> u32);

impl Aml for Prt {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let mut rows = aml::PackageBuilder::new();
        for slot in 0u8..32 {
            for pin in 0u8..4 {
                let address = (u32::from(slot) << 16) | 0xffff;
                let gsi = (self.0)(slot, pin);
                rows.add_element(&aml::Package::new(vec![&address, &pin, &aml::ZERO, &gsi]));
            }
        }
        rows.to_aml_bytes(sink);
    }
}

/// `_OSC`: gives the guest PCIe native hotplug, PME, AER and the capability structure, not SHPC.
struct Osc;

impl Aml for Osc {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let control: aml::Path = "CDW3".into();
        aml::Method::new(
            "_OSC".into(),
            4,
            false,
            vec![
                &aml::CreateDWordField::new(&control, &aml::Arg(3), &8u8),
                &aml::And::new(&control, &control, &0x1du8),
                &aml::Return::new(&aml::Arg(3)),
            ],
        )
        .to_aml_bytes(sink);
    }
}

fn isa(spec: &AcpiSpec<'_>, out: &mut Vec<u8>) {
    const SERIAL: [(u16, u32); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];
    const PATHS: [&str; 4] = ["_SB_.COM1", "_SB_.COM2", "_SB_.COM3", "_SB_.COM4"];
    for &index in spec.serials.iter().filter(|i| usize::from(**i) < SERIAL.len()) {
        let (port, irq) = SERIAL[usize::from(index)];
        device(out, PATHS[usize::from(index)], "PNP0501", index + 1, &[(port, 8)], Some(irq));
    }
    device(out, "_SB_.RTC_", "PNP0B00", 0, &[(0x70, 2)], Some(8));
    device(out, "_SB_.KBD_", "PNP0303", 0, &[(0x60, 1), (0x64, 1)], Some(1));
}

fn device(out: &mut Vec<u8>, path: &str, hid: &str, uid: u8, io: &[(u16, u8)], irq: Option<u32>) {
    let hid = aml::Name::new("_HID".into(), &aml::EISAName::new(hid));
    let uid = aml::Name::new("_UID".into(), &uid);
    let ios: Vec<_> = io.iter().map(|&(port, len)| aml::IO::new(port, port, 1, len)).collect();
    let irq = irq.map(|irq| aml::Interrupt::new(true, true, false, false, irq));
    let mut resources: Vec<&dyn Aml> = ios.iter().map(|i| i as &dyn Aml).collect();
    resources.extend(irq.as_ref().map(|i| i as &dyn Aml));
    let crs = aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(resources));
    let sta = aml::Name::new("_STA".into(), &0xfu8);
    aml::Device::new(path.into(), vec![&hid, &uid, &sta, &crs]).to_aml_bytes(out);
}

fn cpus(count: usize, out: &mut Vec<u8>) {
    for i in 0..count {
        let hid = aml::Name::new("_HID".into(), &"ACPI0007");
        let uid = aml::Name::new("_UID".into(), &(i as u32));
        aml::Device::new(format!("_SB_.C{i:03X}").as_str().into(), vec![&hid, &uid])
            .to_aml_bytes(out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checksum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0u8, |a, b| a.wrapping_add(*b))
    }

    fn table(image: &[u8], at: u64) -> &[u8] {
        let at = (at - layout::ACPI_TABLES) as usize;
        let len = u32::from_le_bytes(image[at + 4..at + 8].try_into().unwrap()) as usize;
        &image[at..at + len]
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let apic_ids: Vec<u32> = (0..288).collect();
        let spec = AcpiSpec {
            apic_ids: &apic_ids,
            pcie: true,
            buses: 4,
            mmio64: (1 << 33, 1 << 35),
            serials: &[0, 1],
            intx_gsi: |slot, pin| 16 + u32::from((slot + pin) % 8),
            numa_ram: &[(0, 1 << 30, 0)],
            numa_cpus: &vec![0; 288],
        };
        let image = build(&spec).unwrap();
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!(checksum(&image[..20]), 0);
        assert_eq!(checksum(&image[..36]), 0);
        let xsdt = table(&image, u64::from_le_bytes(image[24..32].try_into().unwrap()));
        assert_eq!(checksum(xsdt), 0);
        let mut found = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let t = table(&image, u64::from_le_bytes(entry.try_into().unwrap()));
            assert_eq!(checksum(t), 0);
            found.push(String::from_utf8_lossy(&t[..4]).into_owned());
            if &t[..4] == b"FACP" {
                let dsdt = table(&image, u64::from_le_bytes(t[140..148].try_into().unwrap()));
                assert_eq!(&dsdt[..4], b"DSDT");
                assert_eq!(checksum(dsdt), 0);
            }
        }
        assert_eq!(found, ["FACP", "APIC", "MCFG", "SRAT"]);
    }
}
