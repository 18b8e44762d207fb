//! Saved state: save, change, restore, equal; and hostile states, which must be refused (or
//! taken) without a panic.

use std::path::Path;
use std::sync::Arc;

use kvm_bindings::{kvm_regs, kvm_xcrs};
use mem::{Backing, GuestMemory, RegionSpec};
use proptest::prelude::*;
use state::Section;

use super::irqchip::IrqchipState;
use super::msrs::{self, IA32_TSC_DEADLINE, Msr};
use super::plain::{from_bytes, to_bytes};
use super::state::VcpuState;
use super::{DEFAULT_PATH, KvmVcpu, KvmVm, flat_gdt};
use crate::{BootEntry, Entry, Exit, Vcpu, Vm, cpu};

const STAR: u32 = 0xc000_0081;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// A guest about to execute `out 0xf4, al` for ever, or `None` where there is no KVM.
fn guest() -> Option<(Arc<KvmVm>, GuestMemory, KvmVcpu)> {
    let vm = match KvmVm::new(Path::new(DEFAULT_PATH)) {
        Ok(vm) => vm,
        Err(e) => {
            eprintln!("skipped: {e}");
            return None;
        }
    };
    let mem =
        GuestMemory::new(&[RegionSpec { gpa: 0, size: 1 << 20 }], &Backing::default()).unwrap();
    for (i, e) in flat_gdt(false).iter().enumerate() {
        mem.write(0x500 + 8 * i as u64, &e.to_le_bytes()).unwrap();
    }
    mem.write(0x1000, &[0xe6, 0xf4, 0xeb, 0xfc]).unwrap();
    vm.map_memory(&mem).unwrap();
    let mut vcpu = vm.new_vcpu(0, 0).unwrap();
    let host = vm.supported_cpuid().unwrap();
    let table = cpu::build(&host, "host", &Default::default(), &Default::default(), 0).unwrap();
    vcpu.set_cpuid(&table).unwrap();
    vcpu.set_boot(Some(BootEntry::Pvh { rip: 0x1000, start_info: 0x42, gdt: 0x500 })).unwrap();
    Some((vm, mem, vcpu))
}

fn section(state: &VcpuState) -> Section {
    Section::encode("vcpu.0", state).unwrap()
}

/// Without what goes on by itself.
fn still(vcpu: &KvmVcpu) -> VcpuState {
    let mut s: VcpuState = vcpu.save("vcpu.0").unwrap().decode().unwrap();
    (s.tsc, s.tsc_offset) = (0, 0);
    s.msrs.retain(|m| m.index != IA32_TSC_DEADLINE);
    s
}

/// Equal, field by field, so that a difference is named.
#[track_caller]
fn assert_same(a: &VcpuState, b: &VcpuState) {
    let bytes = |name: &str, a: &[u8], b: &[u8]| {
        let at: Vec<_> = (0..a.len().max(b.len()))
            .filter(|i| a.get(*i) != b.get(*i))
            .map(|i| (i, a.get(i).copied(), b.get(i).copied()))
            .collect();
        assert!(at.is_empty(), "{name} differs at {at:x?}");
    };
    bytes("regs", &a.regs, &b.regs);
    bytes("sregs", &a.sregs, &b.sregs);
    bytes("xsave", &a.xsave, &b.xsave);
    bytes("xcrs", &a.xcrs, &b.xcrs);
    bytes("debugregs", &a.debugregs, &b.debugregs);
    bytes("lapic", &a.lapic, &b.lapic);
    bytes("events", &a.events, &b.events);
    for (a, b) in a.msrs.iter().zip(&b.msrs) {
        assert_eq!(a, b, "MSR {:#x}", a.index);
    }
    assert_eq!(a, b);
}

#[test]
fn a_vcpu_saves_changes_and_restores_to_the_same() {
    let Some((_vm, _mem, mut vcpu)) = guest() else { return };
    let marks = [Msr { index: STAR, value: 7 << 32 }, Msr { index: KERNEL_GS_BASE, value: 0x77 }];
    assert!(msrs::write(&vcpu.fd, &marks).unwrap().is_empty());
    let before = still(&vcpu);
    assert!(marks.iter().all(|m| before.msrs.contains(m)));
    let saved = vcpu.save("vcpu.0").unwrap();

    assert!(matches!(vcpu.run(Entry::Resume).unwrap(), Exit::IoOut { port: 0xf4, .. }));
    vcpu.fd.set_regs(&kvm_regs { rip: 0x5000, rax: 3, rflags: 2, ..Default::default() }).unwrap();
    msrs::write(&vcpu.fd, &[Msr { index: STAR, value: 0 }]).unwrap();
    assert_ne!(still(&vcpu), before);

    vcpu.restore(&saved).unwrap();
    assert_same(&still(&vcpu), &before);
    // And in a second VM.
    let Some((vm, _mem, mut other)) = guest() else { return };
    other.restore(&saved).unwrap();
    assert_same(&still(&other), &before);
    drop(vm);
}

#[test]
fn a_reset_forgets_what_the_guest_set() {
    let Some((_vm, _mem, mut vcpu)) = guest() else { return };
    let before = still(&vcpu);
    let gs = [Msr { index: KERNEL_GS_BASE, value: 0x77 }];
    msrs::write(&vcpu.fd, &gs).unwrap();
    vcpu.run(Entry::Resume).unwrap();
    vcpu.set_boot(Some(BootEntry::Pvh { rip: 0x1000, start_info: 0x42, gdt: 0x500 })).unwrap();
    assert_same(&still(&vcpu), &before);
}

#[test]
fn the_irqchip_saves_changes_and_restores_to_the_same() {
    let Some((vm, _mem, _vcpu)) = guest() else { return };
    let save = || vm.save_irqchip("irqchip").unwrap();
    let chips = |s: &Section| {
        // Not the PIT, whose load time is of the host's clock.
        let s: IrqchipState = s.decode().unwrap();
        (s.pic_master, s.pic_slave, s.ioapic)
    };
    let before = save();
    vm.set_irq_line(4, true).unwrap();
    assert_ne!(chips(&save()), chips(&before));
    vm.restore_irqchip(&before).unwrap();
    assert_eq!(chips(&save()), chips(&before));
}

fn refuses(vcpu: &mut KvmVcpu, good: &VcpuState, field: &str, change: impl FnOnce(&mut VcpuState)) {
    let mut bad = good.clone();
    change(&mut bad);
    let e = vcpu.restore(&section(&bad)).unwrap_err().to_string();
    assert!(e.contains(field), "{field}: {e}");
}

#[test]
fn wrong_lengths_and_counts_are_refused_by_name() {
    let Some((_vm, _mem, mut vcpu)) = guest() else { return };
    let good = vcpu.take_state().unwrap();
    let v = &mut vcpu;
    refuses(v, &good, "regs", |s| s.regs.truncate(7));
    refuses(v, &good, "sregs", |s| s.sregs.clear());
    refuses(v, &good, "sregs2", |s| s.sregs2 = Some(vec![0; 3]));
    refuses(v, &good, "xsave", |s| s.xsave.truncate(4095));
    refuses(v, &good, "xsave", |s| s.xsave = vec![1; 3 << 20]);
    refuses(v, &good, "xsave", |s| {
        s.xsave.resize(64 << 10, 0);
        s.xsave.push(1);
    });
    refuses(v, &good, "xcrs", |s| s.xcrs.push(0));
    refuses(v, &good, "xcrs", |s| {
        let mut x: kvm_xcrs = from_bytes("xcrs", &s.xcrs).unwrap();
        x.nr_xcrs = u32::MAX;
        s.xcrs = to_bytes(&x);
    });
    refuses(v, &good, "debugregs", |s| s.debugregs = vec![0; 129]);
    refuses(v, &good, "lapic", |s| s.lapic = vec![0; 1]);
    refuses(v, &good, "events", |s| s.events = vec![0; 1 << 20]);
    refuses(v, &good, "mp_state", |s| s.mp_state = 0xffff);
    refuses(v, &good, "msrs", |s| s.msrs = vec![Msr { index: 1, value: 1 }; 100_000]);
    refuses(v, &good, "0xdead0000", |s| {
        s.msrs.push(Msr { index: 0xdead_0000, value: 1 });
    });
    refuses(v, &good, "cpuid", |s| s.cpuid = vec![[0; 7]; 1000]);
    refuses(v, &good, "leaf 0x1.0", |s| {
        s.cpuid.iter_mut().filter(|w| w[0] == 1).for_each(|w| w[3] ^= 1);
    });
    v.restore(&section(&good)).unwrap();
}

#[test]
fn an_msr_that_this_host_lacks_is_taken_when_it_is_zero() {
    let Some((_vm, _mem, mut vcpu)) = guest() else { return };
    let mut s = vcpu.take_state().unwrap();
    s.msrs.push(Msr { index: 0xdead_0000, value: 0 });
    vcpu.restore(&section(&s)).unwrap();
}

#[test]
fn truncated_and_foreign_sections_are_refused() {
    let Some((vm, _mem, mut vcpu)) = guest() else { return };
    let good = [
        vcpu.save("vcpu.0").unwrap(),
        vm.save_irqchip("irqchip").unwrap(),
        vm.save_clock("clock").unwrap(),
    ];
    for (i, s) in good.iter().enumerate() {
        for cut in (0..s.payload.len()).step_by(s.payload.len().div_ceil(97)) {
            let mut bad = s.clone();
            bad.payload.truncate(cut);
            let refused = match i {
                0 => vcpu.restore(&bad),
                1 => vm.restore_irqchip(&bad),
                _ => vm.restore_clock(&bad),
            };
            assert!(refused.is_err(), "{} cut to {cut}", s.name);
        }
        let newer = Section { version: 99, ..s.clone() };
        assert!(vcpu.restore(&newer).is_err());
        let other = &good[(i + 1) % 3];
        assert!(vm.restore_clock(other).is_err() || i == 1);
    }
}

#[test]
fn no_state_that_decodes_makes_restoring_panic() {
    let Some((_vm, _mem, vcpu)) = guest() else { return };
    let good = vcpu.take_state().unwrap();
    let vcpu = std::cell::RefCell::new(vcpu);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(64));
    let noise = || proptest::collection::vec((any::<usize>(), any::<u8>()), 1..8);
    let strategy = (noise(), noise(), noise(), any::<u32>(), any::<u64>(), any::<u64>());
    let run = runner.run(&strategy, |(sregs, lapic, events, mp_state, tsc, khz)| {
        let mut s = good.clone();
        for (bytes, noise) in
            [(&mut s.sregs, sregs), (&mut s.lapic, lapic), (&mut s.events, events)]
        {
            let n = bytes.len();
            noise.iter().for_each(|(at, b)| bytes[at % n] = *b);
        }
        s.sregs2 = None;
        (s.mp_state, s.tsc, s.tsc_offset, s.tsc_khz) = (mp_state % 12, tsc, tsc, khz as u32);
        let _ = vcpu.borrow_mut().restore(&section(&s));
        Ok(())
    });
    run.unwrap();
}
