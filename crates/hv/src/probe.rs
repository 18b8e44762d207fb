//! Can this host's KVM run Linux? Decided by doing it, not by a list of machines: a tiny
//! long-mode guest does in ring 0 what a kernel does, step by step, and says after each step that
//! it got there. Some hosts (nested under an emulator of their own) offer /dev/kvm but fail at
//! one of these.
//!
//! Guest memory: GDT at 0x500, its and the IDT's descriptors at 0x580 and 0x590, a mark at 0x5d0,
//! 16 bytes for cmpxchg16b at 0x5e0, TSS at 0x600, code at 0x1000, IDT at 0x4000, stack below
//! 0x8000, FXSAVE and XSAVE areas at 0x9000 and 0xa000, page tables at 0x10000.

use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use mem::{Backing, GuestMemory, RegionSpec};

use crate::kvm::{KvmVm, flat_gdt};
use crate::{BootEntry, Entry, Exit, Kicker, Vcpu, Vm};

/// The guest has this long; a guest that hangs has failed.
const TIMEOUT: Duration = Duration::from_secs(2);

const RAM: u64 = 1 << 20;
const GDT: u64 = 0x500;
const TSS: u64 = 0x600;
const CODE: u64 = 0x1000;
const IDT: u64 = 0x4000;
const PAGE_TABLES: u64 = 0x10000;
const MMIO: u64 = 0x3000_0000;
const PORT_STEP: u16 = 0xf0;
const PORT_IN: u16 = 0xf2;
const MSI_ADDRESS: u64 = 0xfee0_0000;
const VECTOR: u64 = 0x40;
/// The guest found a wrong value.
const STEP_FAILED: u8 = 0xff;
/// The step after which the guest waits for an interrupt.
const STEP_WAITS: u8 = 11;

/// What each step does: entry `n` is reported done by step `n + 1`.
const STEPS: &[&str] = &[
    "long mode and port output",
    "lgdt, lidt, ltr, far return",
    "int3 through the IDT and iretq",
    "lock cmpxchg16b",
    "rdmsr, wrmsr, swapgs",
    "clts, control registers, invlpg",
    "fxsave, fxrstor, xsave, xrstor",
    "a page fault through the IDT",
    "user mode: sysretq and syscall",
    "MMIO and port input",
    "the local APIC",
    "hlt, woken by an interrupt",
];

/// The program, at [`CODE`]. `out %al,$0xf0` says that the step with that number is done.
#[rustfmt::skip]
const MAIN: &[u8] = &[
    0xbc, 0x00, 0x80, 0x00, 0x00, // 1000: mov $0x8000,%esp
    0xb0, 0x01, // 1005: mov $0x1,%al
    0xe6, 0xf0, // 1007: out %al,$0xf0
    0x0f, 0x01, 0x14, 0x25, 0x80, 0x05, 0x00, 0x00, // 1009: lgdt 0x580
    0x0f, 0x01, 0x1c, 0x25, 0x90, 0x05, 0x00, 0x00, // 1011: lidt 0x590
    0x6a, 0x10, // 1019: push $0x10
    0x68, 0x22, 0x10, 0x00, 0x00, // 101b: push $0x1022
    0x48, 0xcb, // 1020: lretq
    0xb8, 0x18, 0x00, 0x00, 0x00, // 1022: mov $0x18,%eax
    0x8e, 0xd0, // 1027: mov %eax,%ss
    0x8e, 0xd8, // 1029: mov %eax,%ds
    0xb8, 0x20, 0x00, 0x00, 0x00, // 102b: mov $0x20,%eax
    0x0f, 0x00, 0xd8, // 1030: ltr %ax
    0xb0, 0x02, // 1033: mov $0x2,%al
    0xe6, 0xf0, // 1035: out %al,$0xf0
    0xcc, // 1037: int3
    0xb0, 0x03, // 1038: mov $0x3,%al
    0xe6, 0xf0, // 103a: out %al,$0xf0
    0x31, 0xc0, // 103c: xor %eax,%eax
    0x31, 0xd2, // 103e: xor %edx,%edx
    0xbb, 0x07, 0x00, 0x00, 0x00, // 1040: mov $0x7,%ebx
    0x31, 0xc9, // 1045: xor %ecx,%ecx
    0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25, 0xe0, 0x05, 0x00, 0x00, // 1047: lock cmpxchg16b 0x5e0
    0x0f, 0x85, 0x1f, 0x01, 0x00, 0x00, // 1051: jne 1176 (fail)
    0xb0, 0x04, // 1057: mov $0x4,%al
    0xe6, 0xf0, // 1059: out %al,$0xf0
    0xb9, 0x80, 0x00, 0x00, 0xc0, // 105b: mov $0xc0000080,%ecx
    0x0f, 0x32, // 1060: rdmsr
    0x0d, 0x01, 0x08, 0x00, 0x00, // 1062: or $0x801,%eax
    0x0f, 0x30, // 1067: wrmsr
    0xb9, 0x02, 0x01, 0x00, 0xc0, // 1069: mov $0xc0000102,%ecx
    0xb8, 0x34, 0x12, 0x00, 0x00, // 106e: mov $0x1234,%eax
    0x31, 0xd2, // 1073: xor %edx,%edx
    0x0f, 0x30, // 1075: wrmsr
    0x0f, 0x01, 0xf8, // 1077: swapgs
    0xb9, 0x01, 0x01, 0x00, 0xc0, // 107a: mov $0xc0000101,%ecx
    0x0f, 0x32, // 107f: rdmsr
    0x3d, 0x34, 0x12, 0x00, 0x00, // 1081: cmp $0x1234,%eax
    0x0f, 0x85, 0xea, 0x00, 0x00, 0x00, // 1086: jne 1176 (fail)
    0xb0, 0x05, // 108c: mov $0x5,%al
    0xe6, 0xf0, // 108e: out %al,$0xf0
    0x0f, 0x06, // 1090: clts
    0x0f, 0x20, 0xc0, // 1092: mov %cr0,%rax
    0x0f, 0x22, 0xc0, // 1095: mov %rax,%cr0
    0x0f, 0x20, 0xe0, // 1098: mov %cr4,%rax
    0x0d, 0x00, 0x06, 0x00, 0x00, // 109b: or $0x600,%eax
    0x0f, 0x22, 0xe0, // 10a0: mov %rax,%cr4
    0x0f, 0x20, 0xd8, // 10a3: mov %cr3,%rax
    0x0f, 0x22, 0xd8, // 10a6: mov %rax,%cr3
    0x0f, 0x01, 0x3c, 0x25, 0x00, 0x10, 0x00, 0x00, // 10a9: invlpg 0x1000
    0xb0, 0x06, // 10b1: mov $0x6,%al
    0xe6, 0xf0, // 10b3: out %al,$0xf0
    0x0f, 0xae, 0x04, 0x25, 0x00, 0x90, 0x00, 0x00, // 10b5: fxsave 0x9000
    0x0f, 0xae, 0x0c, 0x25, 0x00, 0x90, 0x00, 0x00, // 10bd: fxrstor 0x9000
    0xb8, 0x01, 0x00, 0x00, 0x00, // 10c5: mov $0x1,%eax
    0x0f, 0xa2, // 10ca: cpuid
    0x0f, 0xba, 0xe1, 0x1a, // 10cc: bt $0x1a,%ecx
    0x73, 0x21, // 10d0: jae 10f3
    0x0f, 0x20, 0xe0, // 10d2: mov %cr4,%rax
    0x0d, 0x00, 0x00, 0x04, 0x00, // 10d5: or $0x40000,%eax
    0x0f, 0x22, 0xe0, // 10da: mov %rax,%cr4
    0x31, 0xc9, // 10dd: xor %ecx,%ecx
    0x0f, 0x01, 0xd0, // 10df: xgetbv
    0x83, 0xc8, 0x03, // 10e2: or $0x3,%eax
    0x0f, 0x01, 0xd1, // 10e5: xsetbv
    0xbb, 0x00, 0xa0, 0x00, 0x00, // 10e8: mov $0xa000,%ebx
    0x0f, 0xae, 0x23, // 10ed: xsave (%rbx)
    0x0f, 0xae, 0x2b, // 10f0: xrstor (%rbx)
    0xb0, 0x07, // 10f3: mov $0x7,%al
    0xe6, 0xf0, // 10f5: out %al,$0xf0
    0xbb, 0x00, 0x00, 0x00, 0x40, // 10f7: mov $0x40000000,%ebx
    0x48, 0x8b, 0x03, // 10fc: mov (%rbx),%rax
    0xb0, 0x08, // 10ff: mov $0x8,%al
    0xe6, 0xf0, // 1101: out %al,$0xf0
    0xb9, 0x81, 0x00, 0x00, 0xc0, // 1103: mov $0xc0000081,%ecx
    0x31, 0xc0, // 1108: xor %eax,%eax
    0xba, 0x10, 0x00, 0x20, 0x00, // 110a: mov $0x200010,%edx
    0x0f, 0x30, // 110f: wrmsr
    0xff, 0xc1, // 1111: inc %ecx
    0xb8, 0x30, 0x12, 0x00, 0x00, // 1113: mov $0x1230,%eax
    0x31, 0xd2, // 1118: xor %edx,%edx
    0x0f, 0x30, // 111a: wrmsr
    0xb9, 0x84, 0x00, 0x00, 0xc0, // 111c: mov $0xc0000084,%ecx
    0x31, 0xc0, // 1121: xor %eax,%eax
    0x0f, 0x30, // 1123: wrmsr
    0xb9, 0x40, 0x12, 0x00, 0x00, // 1125: mov $0x1240,%ecx
    0x41, 0xbb, 0x02, 0x00, 0x00, 0x00, // 112a: mov $0x2,%r11d
    0x48, 0x0f, 0x07, // 1130: sysretq
    0xb0, 0x09, // 1133: mov $0x9,%al
    0xe6, 0xf0, // 1135: out %al,$0xf0
    0xbb, 0x00, 0x00, 0x00, 0x30, // 1137: mov $0x30000000,%ebx
    0xc7, 0x03, 0x55, 0x00, 0x00, 0x00, // 113c: movl $0x55,(%rbx)
    0x8b, 0x43, 0x04, // 1142: mov 0x4(%rbx),%eax
    0x83, 0xf8, 0x66, // 1145: cmp $0x66,%eax
    0x75, 0x2c, // 1148: jne 1176 (fail)
    0xe4, 0xf2, // 114a: in $0xf2,%al
    0x3c, 0x77, // 114c: cmp $0x77,%al
    0x75, 0x26, // 114e: jne 1176 (fail)
    0xb0, 0x0a, // 1150: mov $0xa,%al
    0xe6, 0xf0, // 1152: out %al,$0xf0
    0xb8, 0xf0, 0x00, 0xe0, 0xfe, // 1154: mov $0xfee000f0,%eax
    0xc7, 0x00, 0xff, 0x01, 0x00, 0x00, // 1159: movl $0x1ff,(%rax)
    0xb0, 0x0b, // 115f: mov $0xb,%al
    0xe6, 0xf0, // 1161: out %al,$0xf0
    0xfb, // 1163: sti
    0xf4, // 1164: hlt
    0xfa, // 1165: cli
    0x80, 0x3c, 0x25, 0xd0, 0x05, 0x00, 0x00, 0x40, // 1166: cmpb $0x40,0x5d0
    0x75, 0x06, // 116e: jne 1176 (fail)
    0xf3, 0x90, // 1170: pause
    0xb0, 0x0c, // 1172: mov $0xc,%al
    0xe6, 0xf0, // 1174: out %al,$0xf0
    0xb0, 0xff, // 1176: mov $0xff,%al
    0xe6, 0xf0, // 1178: out %al,$0xf0
    0xeb, 0xfe, // 117a: jmp 117a
];
/// Vector 3.
#[rustfmt::skip]
const ON_BREAKPOINT: &[u8] = &[
    0x48, 0xcf, // 1200: iretq
];
/// Vector 14: drops the error code and skips the 3-byte instruction.
#[rustfmt::skip]
const ON_PAGE_FAULT: &[u8] = &[
    0x48, 0x83, 0xc4, 0x08, // 1210: add $0x8,%rsp
    0x48, 0x83, 0x04, 0x24, 0x03, // 1214: addq $0x3,(%rsp)
    0x48, 0xcf, // 1219: iretq
];
/// Vector 0x40: leaves its number.
#[rustfmt::skip]
const ON_INTERRUPT: &[u8] = &[
    0xc6, 0x04, 0x25, 0xd0, 0x05, 0x00, 0x00, 0x40, // 1220: movb $0x40,0x5d0
    0x48, 0xcf, // 1228: iretq
];
/// The target of `syscall`.
#[rustfmt::skip]
const ON_SYSCALL: &[u8] = &[
    0xe9, 0xfe, 0xfe, 0xff, 0xff, // 1230: jmp 1133 (back)
];
/// User mode's code.
#[rustfmt::skip]
const USER: &[u8] = &[
    0x90, // 1240: nop
    0x0f, 0x05, // 1241: syscall
];

/// What the probe found where KVM can run Linux.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// What the guest did, in order.
    pub steps: &'static [&'static str],
    /// From the first entry to the last step.
    pub took: Duration,
}

/// Why KVM cannot run Linux.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// There is no usable KVM at all.
    #[error("{0}")]
    NoKvm(String),
    /// The guest got no further than this.
    #[error("KVM here cannot run Linux: it fails at {step}: {reason}")]
    Step { step: &'static str, reason: String },
}

/// Runs the probe on KVM's device at `path`. Takes milliseconds, and 2 s at most.
///
/// # Errors
/// [`Failure`] says which step failed and KVM's reason.
pub fn can_run_linux(path: &Path) -> Result<Report, Failure> {
    let none = |e: crate::Error| Failure::NoKvm(e.to_string());
    let vm = KvmVm::new(path).map_err(none)?;
    let mem = guest_memory().map_err(|e| Failure::NoKvm(e.to_string()))?;
    vm.map_memory(&mem).map_err(none)?;
    let mut vcpu = vm.create_vcpu(0).map_err(none)?;
    let cpuid = vm.supported_cpuid().map_err(none)?;
    vcpu.set_cpuid(&cpuid).map_err(none)?;
    let (rip, page_table, gdt) = (CODE, PAGE_TABLES, GDT);
    vcpu.set_boot(Some(BootEntry::Long { rip, rsi: 0, page_table, gdt })).map_err(none)?;
    with_timeout(vcpu.kicker(), |deadline| follow(&*vm, &mut *vcpu, deadline))
}

/// Runs `work` while another thread kicks the vCPU once [`TIMEOUT`] has passed.
fn with_timeout<T>(kicker: std::sync::Arc<dyn Kicker>, work: impl FnOnce(Instant) -> T) -> T {
    let (done, is_done) = mpsc::channel::<()>();
    let deadline = Instant::now() + TIMEOUT;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut wait = TIMEOUT;
            while let Err(mpsc::RecvTimeoutError::Timeout) = is_done.recv_timeout(wait) {
                kicker.kick();
                wait = Duration::from_millis(50);
            }
        });
        let result = work(deadline);
        drop(done);
        result
    })
}

/// Runs the guest to its last step.
fn follow(vm: &dyn Vm, vcpu: &mut dyn Vcpu, deadline: Instant) -> Result<Report, Failure> {
    let start = Instant::now();
    let mut done = 0usize;
    let mut answer: Option<Vec<u8>> = None;
    loop {
        let step = STEPS.get(done).copied().unwrap_or("the end");
        let fail = |reason: String| Failure::Step { step, reason };
        let entry = answer.as_deref().map_or(Entry::Resume, Entry::Data);
        let exit = vcpu.run(entry).map_err(|e| fail(e.to_string()))?;
        answer = None;
        match exit {
            Exit::IoOut { port: PORT_STEP, data, .. } => match data.as_slice() {
                [STEP_FAILED] => return Err(fail("the guest read a wrong value".into())),
                [n] if usize::from(*n) == done + 1 => {
                    done += 1;
                    if *n == STEP_WAITS {
                        let sent = vm.signal_msi(MSI_ADDRESS, VECTOR as u32);
                        sent.map_err(|e| fail(e.to_string()))?;
                    }
                    if done == STEPS.len() {
                        return Ok(Report { steps: STEPS, took: start.elapsed() });
                    }
                }
                other => return Err(fail(format!("the guest lost its way ({other:x?})"))),
            },
            Exit::MmioWrite { addr: MMIO, .. } => {}
            Exit::MmioRead { addr, len: 4 } if addr == MMIO + 4 => {
                answer = Some(0x66u32.to_le_bytes().to_vec());
            }
            Exit::IoIn { port: PORT_IN, size: 1, count: 1 } => answer = Some(vec![0x77]),
            Exit::Interrupted if Instant::now() < deadline => {}
            Exit::Interrupted => return Err(fail("it hangs".into())),
            Exit::Shutdown => return Err(fail("triple fault".into())),
            Exit::InternalError(why) => return Err(fail(why)),
            other => return Err(fail(format!("an unexpected exit: {other:?}"))),
        }
    }
}

fn guest_memory() -> mem::Result<GuestMemory> {
    let mem = GuestMemory::new(&[RegionSpec { gpa: 0, size: RAM }], &Backing::default())?;
    let put = |at: u64, v: u64| mem.write(at, &v.to_le_bytes());
    for (i, e) in flat_gdt(true).iter().enumerate() {
        put(GDT + 8 * i as u64, *e)?;
    }
    // An available 64-bit TSS at selector 0x20.
    put(GDT + 0x20, 0x0000_8900_0000_0067 | TSS << 16)?;
    put(GDT + 0x28, 0)?;
    table_register(&mem, 0x580, 0x2f, GDT)?;
    table_register(&mem, 0x590, 0xfff, IDT)?;
    for (vector, handler) in [(3, 0x1200), (14, 0x1210), (VECTOR, 0x1220)] {
        // A 64-bit interrupt gate to 0x10:handler.
        put(IDT + 16 * vector, 0x0000_8e00_0010_0000 | handler)?;
    }
    for (at, code) in [
        (CODE, MAIN),
        (0x1200, ON_BREAKPOINT),
        (0x1210, ON_PAGE_FAULT),
        (0x1220, ON_INTERRUPT),
        (0x1230, ON_SYSCALL),
        (0x1240, USER),
    ] {
        mem.write(at, code)?;
    }
    page_tables(&mem)?;
    Ok(mem)
}

/// What `lgdt` and `lidt` read.
fn table_register(mem: &GuestMemory, at: u64, limit: u16, base: u64) -> mem::Result<()> {
    mem.write(at, &limit.to_le_bytes())?;
    mem.write(at + 2, &base.to_le_bytes())
}

/// An identity map of the first and the fourth GiB in 2 MiB pages that user mode may use too.
fn page_tables(mem: &GuestMemory) -> mem::Result<()> {
    const TABLE: u64 = 7;
    const PAGE: u64 = 0x87;
    let put = |at: u64, v: u64| mem.write(at, &v.to_le_bytes());
    let pdpt = PAGE_TABLES + 0x1000;
    put(PAGE_TABLES, pdpt | TABLE)?;
    for (table, gib) in [(pdpt + 0x1000, 0), (pdpt + 0x2000, 3)] {
        put(pdpt + 8 * gib, table | TABLE)?;
        for i in 0..512 {
            put(table + 8 * i, (gib << 30) | (i << 21) | PAGE)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_yes_or_names_a_step_in_time() {
        let start = Instant::now();
        match can_run_linux(Path::new(crate::kvm::DEFAULT_PATH)) {
            Ok(report) => assert_eq!(report.steps.len(), STEPS.len()),
            Err(e) => eprintln!("{e}"),
        }
        assert!(start.elapsed() < TIMEOUT * 3);
    }

    #[test]
    fn says_no_without_kvm() {
        let e = can_run_linux(Path::new("/nonexistent")).unwrap_err();
        assert!(matches!(e, Failure::NoKvm(_)));
    }

    #[test]
    fn the_code_fits_its_places() {
        assert!(MAIN.len() <= 0x200);
        assert!(ON_PAGE_FAULT.len() <= 16 && ON_INTERRUPT.len() <= 16);
        let steps = MAIN.windows(4).filter(|w| w[0] == 0xb0 && w[2..] == [0xe6, 0xf0]).count();
        assert_eq!(steps, STEPS.len() + 1, "and the failure");
    }
}
