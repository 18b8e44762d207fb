//! The register states that a vCPU starts from: what firmware or a boot loader would leave.

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_fpu, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;

use super::os;
use crate::{BootEntry, Result};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_FIXED: u64 = 2;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;

/// Local APIC register offsets and values (Intel SDM volume 3, 12.5.1).
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const LVT_EXTINT: u32 = 0x700;
const LVT_NMI: u32 = 0x400;

/// Code and data selectors of [`flat_gdt`]: Linux's `__BOOT_CS` and `__BOOT_DS`.
const SEL_CODE: u16 = 0x10;
const SEL_DATA: u16 = 0x18;

/// Entries of [`flat_gdt`].
pub const FLAT_GDT_ENTRIES: usize = 4;

/// The GDT that [`BootEntry::Long`] (`long`) and [`BootEntry::Pvh`] expect in guest memory:
/// null, null, flat code at 0x10, flat data at 0x18.
pub fn flat_gdt(long: bool) -> [u64; FLAT_GDT_ENTRIES] {
    [0, 0, if long { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff }, 0x00cf_9300_0000_ffff]
}

/// Sets registers of a vCPU that is in its state at power-on: to start at `entry`, or (`None`)
/// to wait for INIT and SIPI.
pub fn set_boot(vcpu: &VcpuFd, entry: Option<BootEntry>) -> Result<()> {
    let Some(entry) = entry else {
        return set_mp_state(vcpu, KVM_MP_STATE_UNINITIALIZED);
    };
    match entry {
        BootEntry::Reset => set_reset(vcpu)?,
        BootEntry::Long { rip, rsi, page_table, gdt } => {
            let mut sregs = flat(vcpu, gdt, true)?;
            sregs.cr3 = page_table;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
            let regs = kvm_regs { rip, rsi, rflags: RFLAGS_FIXED, ..Default::default() };
            set_direct(vcpu, &sregs, &regs)?;
        }
        BootEntry::Pvh { rip, start_info, gdt } => {
            let mut sregs = flat(vcpu, gdt, false)?;
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            sregs.efer = 0;
            let rbx = start_info;
            let regs = kvm_regs { rip, rbx, rflags: RFLAGS_FIXED, ..Default::default() };
            set_direct(vcpu, &sregs, &regs)?;
        }
    }
    set_mp_state(vcpu, KVM_MP_STATE_RUNNABLE)
}

fn set_mp_state(vcpu: &VcpuFd, mp_state: u32) -> Result<()> {
    vcpu.set_mp_state(kvm_mp_state { mp_state }).map_err(os("cannot set a vCPU's run state"))
}

fn set_direct(vcpu: &VcpuFd, sregs: &kvm_sregs, regs: &kvm_regs) -> Result<()> {
    vcpu.set_sregs(sregs).map_err(os("cannot set a vCPU's boot segments"))?;
    vcpu.set_regs(regs).map_err(os("cannot set a vCPU's boot registers"))?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(os("cannot set a vCPU's FPU"))?;
    set_msr(vcpu, MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING);
    set_msr(vcpu, MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK);
    wire_lapic(vcpu)
}

/// Segments for flat 64-bit or 32-bit code, everything else as it is.
fn flat(vcpu: &VcpuFd, gdt: u64, long: bool) -> Result<kvm_sregs> {
    let mut s = vcpu.get_sregs().map_err(os("cannot read a vCPU's segments"))?;
    let segment = |selector, type_| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    s.cs = kvm_segment { l: long.into(), db: (!long).into(), ..segment(SEL_CODE, 0xb) };
    let data = kvm_segment { db: 1, ..segment(SEL_DATA, 0x3) };
    (s.ds, s.es, s.fs, s.gs, s.ss) = (data, data, data, data, data);
    // VT-x wants a busy TSS in TR even when nobody uses it.
    s.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    s.ldt = kvm_segment { unusable: 1, ..Default::default() };
    s.gdt.base = gdt;
    s.gdt.limit = (FLAT_GDT_ENTRIES * 8 - 1) as u16;
    s.idt.base = 0;
    s.idt.limit = 0;
    Ok(s)
}

/// The reset vector (Intel SDM volume 3, table 10-1).
fn set_reset(vcpu: &VcpuFd) -> Result<()> {
    let mut s = vcpu.get_sregs().map_err(os("cannot read a vCPU's segments"))?;
    let segment = |selector, base, type_| kvm_segment {
        base,
        limit: 0xffff,
        selector,
        type_,
        present: 1,
        s: 1,
        ..Default::default()
    };
    s.cs = segment(0xf000, 0xffff_0000, 0xb);
    let data = segment(0, 0, 0x3);
    (s.ds, s.es, s.fs, s.gs, s.ss) = (data, data, data, data, data);
    s.tr = kvm_segment { limit: 0xffff, type_: 0xb, present: 1, ..Default::default() };
    s.ldt = kvm_segment { limit: 0xffff, type_: 0x2, present: 1, ..Default::default() };
    (s.gdt.base, s.gdt.limit) = (0, 0xffff);
    (s.idt.base, s.idt.limit) = (0, 0xffff);
    // Caches disabled, as at reset; firmware enables them.
    (s.cr0, s.cr2, s.cr3, s.cr4, s.efer) = (0x6000_0010, 0, 0, 0, 0);
    vcpu.set_sregs(&s).map_err(os("cannot set a vCPU's reset segments"))?;
    let regs = kvm_regs { rip: 0xfff0, rdx: 0x600, rflags: RFLAGS_FIXED, ..Default::default() };
    vcpu.set_regs(&regs).map_err(os("cannot set a vCPU's reset registers"))
}

/// Sets an MSR where the host takes it; these only make a guest faster or quieter.
fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    let done = Msrs::from_entries(&[entry]).map(|m| vcpu.set_msrs(&m));
    if !matches!(done, Ok(Ok(1))) {
        tracing::debug!("this host does not take MSR {index:#x}");
    }
}

/// LINT0 takes the PIC's interrupts and LINT1 NMIs, as firmware leaves the boot processor.
fn wire_lapic(vcpu: &VcpuFd) -> Result<()> {
    let mut lapic = vcpu.get_lapic().map_err(os("cannot read a vCPU's local APIC"))?;
    for (offset, value) in [(APIC_LVT0, LVT_EXTINT), (APIC_LVT1, LVT_NMI)] {
        for (reg, byte) in lapic.regs[offset..offset + 4].iter_mut().zip(value.to_le_bytes()) {
            *reg = byte as _;
        }
    }
    vcpu.set_lapic(&lapic).map_err(os("cannot set a vCPU's local APIC"))
}
