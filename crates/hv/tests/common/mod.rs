//! Tiny guests on the local KVM: memory, page tables, and code by hand.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hv::{BootEntry, Entry, Exit, IoData, KvmVm, Vcpu, Vm};
use mem::{Backing, GuestMemory, RegionSpec};

pub const GDT: u64 = 0x500;
pub const CODE: u64 = 0x1000;
pub const PAGE_TABLES: u64 = 0x10000;
/// Identity-mapped, but no RAM.
pub const MMIO: u64 = 0x3000_0000;
pub const RAM: u64 = 4 << 20;

/// A VM, or `None` (with the reason printed) where KVM cannot be opened.
pub fn vm() -> Option<Arc<KvmVm>> {
    match KvmVm::new(Path::new(hv::kvm::DEFAULT_PATH)) {
        Ok(vm) => Some(vm),
        Err(e) => {
            eprintln!("skipped: {e}");
            None
        }
    }
}

/// RAM at 0 with a GDT, an identity map of 4 GiB, and `code` at [`CODE`].
pub fn memory(code: &[u8]) -> GuestMemory {
    let mem = GuestMemory::new(&[RegionSpec { gpa: 0, size: RAM }], &Backing::default()).unwrap();
    for (i, e) in hv::kvm::flat_gdt(true).iter().enumerate() {
        mem.write(GDT + 8 * i as u64, &e.to_le_bytes()).unwrap();
    }
    let put = |at: u64, v: u64| mem.write(at, &v.to_le_bytes()).unwrap();
    put(PAGE_TABLES, (PAGE_TABLES + 0x1000) | 3);
    for gib in 0..4 {
        let pd = PAGE_TABLES + 0x2000 + 0x1000 * gib;
        put(PAGE_TABLES + 0x1000 + 8 * gib, pd | 3);
        for i in 0..512 {
            put(pd + 8 * i, (gib << 30) | (i << 21) | 0x83);
        }
    }
    mem.write(CODE, code).unwrap();
    mem
}

pub fn long() -> BootEntry {
    BootEntry::Long { rip: CODE, rsi: 0x5678, page_table: PAGE_TABLES, gdt: GDT }
}

/// The host model's CPUID for the first vCPU: the same on every CPU of this host.
pub fn cpuid(vm: &KvmVm) -> Vec<hv::CpuidEntry> {
    let host = vm.supported_cpuid().unwrap();
    hv::cpu::build(&host, "host", &Default::default(), &Default::default(), 0).unwrap()
}

/// A VM with one vCPU about to run `code` in long mode.
pub fn guest(code: &[u8]) -> Option<(Arc<KvmVm>, GuestMemory, Box<dyn Vcpu>)> {
    let vm = vm()?;
    let mem = memory(code);
    vm.map_memory(&mem).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid(&cpuid(&vm)).unwrap();
    vcpu.set_boot(Some(long())).unwrap();
    Some((vm, mem, vcpu))
}

/// Runs until something other than an interruption comes back, for 5 s at most.
pub fn run(vcpu: &mut dyn Vcpu, entry: Entry<'_>) -> Exit {
    let end = Instant::now() + Duration::from_secs(5);
    let mut exit = vcpu.run(entry).unwrap();
    while exit == Exit::Interrupted {
        assert!(Instant::now() < end, "nothing happened:\n{}", vcpu.describe());
        exit = vcpu.run(Entry::Resume).unwrap();
    }
    exit
}

pub fn out8(port: u16, value: u8) -> Exit {
    Exit::IoOut { port, size: 1, data: IoData::new(&[value]) }
}

pub fn out32(port: u16, value: u32) -> Exit {
    Exit::IoOut { port, size: 4, data: IoData::new(&value.to_le_bytes()) }
}

/// Counts at 0x8000 and reports each count at port 0xf4.
pub const COUNTER: &[u8] = &[
    0x48, 0xff, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, // inc qword [0x8000]
    0x8b, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, // mov eax, [0x8000]
    0xe7, 0xf4, // out 0xf4, eax
    0xeb, 0xed, // jmp to the start
];
