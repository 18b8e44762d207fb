//! KVM through the traits, with tiny guests: every test runs in milliseconds on a real /dev/kvm
//! and is skipped, with the reason printed, where there is none.

mod common;

use std::time::{Duration, Instant};

use common::*;
use hv::{BootEntry, CpuidEntry, Entry, Exit, IoAddress, Route, Vm};
use mem::{Backing, Bitmap, GuestMemory, RegionSpec};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[test]
fn says_what_to_do_when_there_is_no_kvm() {
    let e = hv::KvmVm::new(std::path::Path::new("/nonexistent")).err().unwrap();
    assert!(e.to_string().contains("modprobe"), "{e}");
    let e = hv::KvmVm::new(std::path::Path::new("/dev/null")).err().unwrap();
    assert!(e.to_string().contains("KVM"), "{e}");
}

#[test]
fn starts_at_the_reset_vector_in_real_mode() {
    let Some(vm) = vm() else { return };
    let specs =
        [RegionSpec { gpa: 0, size: 0x10000 }, RegionSpec { gpa: 0xffff_f000, size: 0x1000 }];
    let mem = GuestMemory::new(&specs, &Backing::default()).unwrap();
    // ljmp 0:0x1000
    mem.write(0xffff_fff0, &[0xea, 0x00, 0x10, 0x00, 0x00]).unwrap();
    // mov al, 'T'; out 0xe9, al; in al, 0x71; out 0xe9, al
    mem.write(CODE, &[0xb0, 0x54, 0xe6, 0xe9, 0xe4, 0x71, 0xe6, 0xe9]).unwrap();
    vm.map_memory(&mem).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_boot(Some(BootEntry::Reset)).unwrap();
    assert_eq!(run(&mut *vcpu, Entry::Resume), out8(0xe9, b'T'));
    assert_eq!(run(&mut *vcpu, Entry::Resume), Exit::IoIn { port: 0x71, size: 1, count: 1 });
    assert_eq!(run(&mut *vcpu, Entry::Data(&[0x42])), out8(0xe9, 0x42));
    // And again after a reset.
    vcpu.set_boot(Some(BootEntry::Reset)).unwrap();
    assert_eq!(run(&mut *vcpu, Entry::Resume), out8(0xe9, b'T'));
}

#[test]
fn long_mode_and_pvh_start_with_their_registers() {
    // mov eax, esi; out 0xf4, eax
    let Some((_vm, _mem, mut vcpu)) = guest(&[0x89, 0xf0, 0xe7, 0xf4]) else { return };
    assert_eq!(run(&mut *vcpu, Entry::Resume), out32(0xf4, 0x5678));
    // mov eax, ebx; out 0xf4, eax (32 bit)
    let Some((_vm, mem, mut vcpu)) = guest(&[0x89, 0xd8, 0xe7, 0xf4]) else { return };
    for (i, e) in hv::kvm::flat_gdt(false).iter().enumerate() {
        mem.write(GDT + 8 * i as u64, &e.to_le_bytes()).unwrap();
    }
    let entry = BootEntry::Pvh { rip: CODE, start_info: 0x1234_5678, gdt: GDT };
    vcpu.set_boot(Some(entry)).unwrap();
    assert_eq!(run(&mut *vcpu, Entry::Resume), out32(0xf4, 0x1234_5678));
    assert!(vcpu.describe().contains("RBX=0000000012345678"));
}

#[test]
fn mmio_goes_out_and_answers_come_in() {
    let code = [
        0x48, 0xc7, 0xc3, 0x00, 0x00, 0x00, 0x30, // mov rbx, MMIO
        0x8b, 0x03, // mov eax, [rbx]
        0x89, 0x43, 0x08, // mov [rbx + 8], eax
        0xe7, 0xf4, // out 0xf4, eax
    ];
    let Some((_vm, _mem, mut vcpu)) = guest(&code) else { return };
    assert_eq!(run(&mut *vcpu, Entry::Resume), Exit::MmioRead { addr: MMIO, len: 4 });
    // Wrong answers are refused and leave the exit open.
    assert!(vcpu.run(Entry::Data(&[1, 2, 3])).is_err());
    assert!(vcpu.run(Entry::Data(&[0; 200])).is_err());
    assert!(vcpu.run(Entry::Resume).is_err());
    assert!(vcpu.save("vcpu0").is_err());
    let exit = run(&mut *vcpu, Entry::Data(&7u32.to_le_bytes()));
    let data = hv::IoData::new(&7u32.to_le_bytes());
    assert_eq!(exit, Exit::MmioWrite { addr: MMIO + 8, data });
    assert_eq!(run(&mut *vcpu, Entry::Resume), out32(0xf4, 7));
    assert!(vcpu.run(Entry::Data(&[1])).is_err());
}

#[test]
fn string_input_and_output() {
    let code = [
        0x66, 0xba, 0x23, 0x01, // mov dx, 0x123
        0x48, 0xc7, 0xc7, 0x00, 0x90, 0x00, 0x00, // mov rdi, 0x9000
        0xb9, 0x05, 0x00, 0x00, 0x00, // mov ecx, 5
        0xf3, 0x6c, // rep insb
        0x48, 0xc7, 0xc6, 0x00, 0x90, 0x00, 0x00, // mov rsi, 0x9000
        0xb9, 0x05, 0x00, 0x00, 0x00, // mov ecx, 5
        0xf3, 0x6e, // rep outsb
        0xe6, 0xf4, // out 0xf4, al
    ];
    let Some((_vm, mem, mut vcpu)) = guest(&code) else { return };
    let text = b"hello";
    let (mut given, mut got) = (0, Vec::new());
    let mut exit = run(&mut *vcpu, Entry::Resume);
    loop {
        exit = match exit {
            Exit::IoIn { port: 0x123, size: 1, count } => {
                let n = count as usize;
                given += n;
                run(&mut *vcpu, Entry::Data(&text[given - n..given]))
            }
            Exit::IoOut { port: 0x123, size: 1, data } => {
                got.extend_from_slice(data.as_slice());
                run(&mut *vcpu, Entry::Resume)
            }
            Exit::IoOut { port: 0xf4, .. } => break,
            other => panic!("{other:?}"),
        }
    }
    let mut in_ram = [0; 5];
    mem.read(0x9000, &mut in_ram).unwrap();
    assert_eq!((&in_ram, got.as_slice()), (text, text.as_slice()));
}

#[test]
fn completing_an_exit_runs_no_guest_code() {
    let Some((_vm, _mem, mut vcpu)) = guest(COUNTER) else { return };
    for n in 1..4 {
        assert_eq!(run(&mut *vcpu, Entry::Resume), out32(0xf4, n));
        for _ in 0..3 {
            assert_eq!(vcpu.run(Entry::CompleteExit).unwrap(), Exit::Interrupted);
        }
    }
}

#[test]
fn an_answer_while_completing_runs_no_guest_code() {
    // mov rbx, MMIO; mov eax, [rbx]; out 0xf4, eax
    let code = [0x48, 0xc7, 0xc3, 0x00, 0x00, 0x00, 0x30, 0x8b, 0x03, 0xe7, 0xf4];
    let Some((_vm, _mem, mut vcpu)) = guest(&code) else { return };
    assert_eq!(run(&mut *vcpu, Entry::Resume), Exit::MmioRead { addr: MMIO, len: 4 });
    assert!(vcpu.run(Entry::CompleteExit).is_err(), "it wants an answer");
    assert_eq!(vcpu.run(Entry::Data(&7u32.to_le_bytes())).unwrap(), Exit::Interrupted);
    vcpu.save("vcpu.0").unwrap();
    assert_eq!(run(&mut *vcpu, Entry::Resume), out32(0xf4, 7));
}

#[test]
fn triple_faults_are_reported() {
    // lidt [0] of an empty table, then ud2.
    let code = [0x0f, 0x01, 0x1c, 0x25, 0x00, 0x00, 0x00, 0x00, 0x0f, 0x0b];
    let Some((_vm, _mem, mut vcpu)) = guest(&code) else { return };
    let exit = run(&mut *vcpu, Entry::Resume);
    assert!(matches!(exit, Exit::Shutdown | Exit::InternalError(_)), "{exit:?}");
}

#[test]
fn a_kick_ends_an_endless_loop_and_none_is_lost() {
    let Some((_vm, _mem, mut vcpu)) = guest(&[0xeb, 0xfe]) else { return };
    let (tx, rx) = std::sync::mpsc::channel();
    let (done_tx, done_rx) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        tx.send(vcpu.kicker()).unwrap();
        for _ in 0..20 {
            assert_eq!(vcpu.run(Entry::Resume).unwrap(), Exit::Interrupted);
            done_tx.send(()).unwrap();
        }
    });
    let kicker = rx.recv().unwrap();
    for i in 0..20 {
        // Sometimes before, sometimes while it runs.
        if i % 2 == 0 {
            std::thread::sleep(Duration::from_millis(2));
        }
        kicker.kick();
        done_rx.recv_timeout(Duration::from_secs(5)).expect("a kick was lost");
    }
    thread.join().unwrap();
    kicker.kick(); // the vCPU is gone: nothing happens
}

fn dirty_pages(source: &dyn mem::DirtySource) -> Vec<u64> {
    let map = Bitmap::new(RAM / 4096);
    source.harvest(0, &map).unwrap();
    (0..map.len()).filter(|p| map.test(*p)).collect()
}

#[test]
fn the_dirty_log_names_written_pages_once() {
    let Some((vm, mem, mut vcpu)) = guest(COUNTER) else { return };
    let source = vm.dirty(&mem);
    let map = Bitmap::new(RAM / 4096);
    assert!(source.harvest(0, &map).is_err(), "not started");
    assert!(source.harvest(1, &map).is_err(), "no such region");
    for round in 0..2 {
        source.start().unwrap();
        dirty_pages(&*source); // the first may say that all is dirty
        assert!(dirty_pages(&*source).is_empty());
        for _ in 0..3 {
            run(&mut *vcpu, Entry::Resume);
            assert_eq!(vcpu.run(Entry::CompleteExit).unwrap(), Exit::Interrupted);
            assert!(dirty_pages(&*source).contains(&8), "round {round}");
            assert!(dirty_pages(&*source).is_empty());
        }
        source.stop().unwrap();
    }
}

#[test]
fn doorbells_are_heard_without_an_exit() {
    let code = [
        0xb0, 0x01, 0xe6, 0x77, // mov al, 1; out 0x77, al
        0xb0, 0x02, 0xe6, 0x78, // mov al, 2; out 0x78, al: matches
        0xb0, 0x03, 0xe6, 0x78, // mov al, 3; out 0x78, al: does not
        0x48, 0xc7, 0xc3, 0x00, 0x00, 0x00, 0x30, // mov rbx, MMIO
        0x66, 0x89, 0x43, 0x10, // mov [rbx + 16], ax
        0xe6, 0xf4, // out 0xf4, al
    ];
    let Some((vm, _mem, mut vcpu)) = guest(&code) else { return };
    let fd = || EventFd::new(EFD_NONBLOCK).unwrap();
    let (any, matched, mmio) = (fd(), fd(), fd());
    vm.register_ioevent(&any, IoAddress::Port(0x77), 1, None).unwrap();
    vm.register_ioevent(&matched, IoAddress::Port(0x78), 1, Some(2)).unwrap();
    vm.register_ioevent(&mmio, IoAddress::Mmio(MMIO + 16), 0, None).unwrap();
    assert_eq!(run(&mut *vcpu, Entry::Resume), out8(0x78, 3));
    assert_eq!(run(&mut *vcpu, Entry::Resume), out8(0xf4, 3));
    assert_eq!((any.read().unwrap(), matched.read().unwrap(), mmio.read().unwrap()), (1, 1, 1));
    vm.unregister_ioevent(&any, IoAddress::Port(0x77), 1, None).unwrap();
    vm.unregister_ioevent(&matched, IoAddress::Port(0x78), 1, Some(2)).unwrap();
    vm.unregister_ioevent(&mmio, IoAddress::Mmio(MMIO + 16), 0, None).unwrap();
    vcpu.set_boot(Some(long())).unwrap();
    assert_eq!(run(&mut *vcpu, Entry::Resume), out8(0x77, 1));
}

/// Enables its local APIC, waits for interrupts, and reports vector 0x40 at port 0xf5.
fn interrupt_guest(mem: &GuestMemory) {
    let code = [
        0xbc, 0x00, 0x70, 0x00, 0x00, // mov esp, 0x7000
        0x0f, 0x01, 0x1c, 0x25, 0xf0, 0x9f, 0x00, 0x00, // lidt [0x9ff0]
        0xb8, 0xf0, 0x00, 0xe0, 0xfe, // mov eax, 0xfee000f0
        0xc7, 0x00, 0xff, 0x01, 0x00, 0x00, // mov dword [rax], 0x1ff: enable
        0xe6, 0xf4, // out 0xf4, al: ready
        0xfb, // sti
        0xf4, // hlt
        0xeb, 0xfd, // jmp to hlt
    ];
    mem.write(CODE, &code).unwrap();
    mem.write(0x2000, &[0xe6, 0xf5, 0xeb, 0xfc]).unwrap(); // out 0xf5, al; again
    let mut idt = [0u8; 10];
    idt[..2].copy_from_slice(&0xfffu16.to_le_bytes());
    idt[2..].copy_from_slice(&0xa000u64.to_le_bytes());
    mem.write(0x9ff0, &idt).unwrap();
    let gate = [0x00, 0x20, 0x10, 0x00, 0x00, 0x8e, 0, 0]; // 0x10:0x2000, interrupt gate
    mem.write(0xa000 + 16 * 0x40, &gate).unwrap();
}

#[test]
fn interrupts_arrive_by_irqfd_and_by_msi() {
    for by_fd in [true, false] {
        let Some((vm, mem, mut vcpu)) = guest(&[]) else { return };
        interrupt_guest(&mem);
        let routes = [
            Route::Irqchip { gsi: 4, chip: 2, pin: 4 },
            Route::Msi { gsi: 24, address: 0xfee0_0000, data: 0x40 },
        ];
        vm.set_routes(&routes).unwrap();
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        vm.register_irqfd(&fd, 24).unwrap();
        assert!(matches!(run(&mut *vcpu, Entry::Resume), Exit::IoOut { port: 0xf4, .. }));
        if by_fd {
            fd.write(1).unwrap();
        } else {
            vm.signal_msi(0xfee0_0000, 0x40).unwrap();
        }
        // The guest sleeps in the kernel until the interrupt comes.
        assert!(matches!(run(&mut *vcpu, Entry::Resume), Exit::IoOut { port: 0xf5, .. }));
        vm.unregister_irqfd(&fd, 24).unwrap();
        vm.set_irq_line(4, true).unwrap();
        vm.set_irq_line(4, false).unwrap();
    }
}

#[test]
fn many_vcpus_wait_for_their_start() {
    let Some((vm, _mem, _bsp)) = guest(COUNTER) else { return };
    let cpuid = cpuid(&vm);
    let threads: Vec<_> = (1..16)
        .map(|id| {
            let mut vcpu = vm.create_vcpu(id).unwrap();
            assert_eq!(vcpu.id(), id);
            vcpu.set_cpuid(&cpuid).unwrap();
            vcpu.set_boot(None).unwrap();
            let (tx, rx) = std::sync::mpsc::channel();
            let thread = std::thread::spawn(move || {
                tx.send(vcpu.kicker()).unwrap();
                vcpu.run(Entry::Resume).unwrap()
            });
            (rx.recv().unwrap(), thread)
        })
        .collect();
    for (kicker, thread) in threads {
        kicker.kick();
        assert_eq!(thread.join().unwrap(), Exit::Interrupted);
    }
    assert!(vm.create_vcpu(3).is_err(), "there is one");
    let far = vm.create_vcpu_as(16, 0x20).unwrap();
    assert_eq!(far.id(), 16);
}

#[test]
fn memory_is_mapped_once_and_bad_input_is_refused() {
    let Some((vm, mem, mut vcpu)) = guest(COUNTER) else { return };
    assert!(vm.map_memory(&mem).is_err());
    let many = vec![Route::Msi { gsi: 1, address: 0, data: 0 }; 5000];
    assert!(vm.set_routes(&many).is_err());
    assert!(vcpu.set_cpuid(&vec![CpuidEntry::default(); 10_000]).is_err());
}

#[test]
fn a_running_counter_goes_on_in_a_second_vm() {
    let Some((vm, mem, mut vcpu)) = guest(COUNTER) else { return };
    for n in 1..=5 {
        assert_eq!(run(&mut *vcpu, Entry::Resume), out32(0xf4, n));
    }
    assert_eq!(vcpu.run(Entry::CompleteExit).unwrap(), Exit::Interrupted);
    let clock = vm.save_clock("clock").unwrap();
    let irqchip = vm.save_irqchip("irqchip").unwrap();
    let section = vcpu.save("vcpu.0").unwrap();
    let mut bytes = vec![0; RAM as usize];
    mem.read(0, &mut bytes).unwrap();
    drop((vcpu, vm, mem));

    let Some((vm, mem, mut vcpu)) = guest(&[0xeb, 0xfe]) else { return };
    mem.write(0, &bytes).unwrap();
    vm.restore_clock(&clock).unwrap();
    vcpu.restore(&section).unwrap();
    vm.restore_irqchip(&irqchip).unwrap();
    vcpu.notify_paused();
    for n in 6..=9 {
        assert_eq!(run(&mut *vcpu, Entry::Resume), out32(0xf4, n));
    }
}

/// Reads the TSC and reports its halves at ports 0xf4 (low) and 0xf5 (high).
const TSC_READER: &[u8] = &[
    0x0f, 0x31, // rdtsc
    0xe7, 0xf4, // out 0xf4, eax
    0x89, 0xd0, // mov eax, edx
    0xe7, 0xf5, // out 0xf5, eax
    0xeb, 0xf6, // jmp to the start
];

fn tsc(vcpu: &mut dyn hv::Vcpu) -> u64 {
    let mut half = |port| match run(vcpu, Entry::Resume) {
        Exit::IoOut { port: p, size: 4, data } if p == port => {
            u64::from(u32::from_le_bytes(data.as_slice().try_into().unwrap()))
        }
        other => panic!("{other:?}"),
    };
    half(0xf4) | half(0xf5) << 32
}

#[test]
fn clock_and_tsc_go_on_by_the_pause() {
    let Some((vm, _mem, mut vcpu)) = guest(TSC_READER) else { return };
    let t0 = tsc(&mut *vcpu);
    let start = Instant::now();
    std::thread::sleep(Duration::from_millis(50));
    let t1 = tsc(&mut *vcpu);
    let per_ms = (t1 - t0) as f64 / start.elapsed().as_secs_f64() / 1000.0;

    assert_eq!(vcpu.run(Entry::CompleteExit).unwrap(), Exit::Interrupted);
    let saved = Instant::now();
    let clock = vm.save_clock("clock").unwrap();
    let section = vcpu.save("vcpu.0").unwrap();
    let before = tsc(&mut *vcpu);
    std::thread::sleep(Duration::from_millis(100));

    let Some((second, _mem2, mut other)) = guest(TSC_READER) else { return };
    second.restore_clock(&clock).unwrap();
    other.restore(&section).unwrap();
    let after = tsc(&mut *other);
    let ms = saved.elapsed().as_secs_f64() * 1000.0;
    assert!(after > before, "the TSC jumped back: {before} to {after}");
    let passed = (after - before) as f64 / per_ms;
    assert!((80.0..ms + 60.0).contains(&passed), "{passed} ms passed for the guest, {ms} here");

    // A clock from the future must not take the guest's time back.
    let again = second.save_clock("clock").unwrap();
    second.restore_clock(&again).unwrap();
}
