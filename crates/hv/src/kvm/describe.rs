//! A vCPU's registers, events and local APIC as text, for the log.

use std::fmt::Write;

use kvm_bindings::{kvm_dtable, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::msrs::{self, IA32_TSC, IA32_TSC_DEADLINE};

pub(super) fn vcpu(fd: &VcpuFd, id: u32) -> String {
    let mut out = format!("CPU#{id}\n");
    match (fd.get_regs(), fd.get_sregs()) {
        (Ok(r), Ok(s)) => {
            let pairs = [
                [("RAX", r.rax), ("RBX", r.rbx), ("RCX", r.rcx), ("RDX", r.rdx)],
                [("RSI", r.rsi), ("RDI", r.rdi), ("RBP", r.rbp), ("RSP", r.rsp)],
                [("R8 ", r.r8), ("R9 ", r.r9), ("R10", r.r10), ("R11", r.r11)],
                [("R12", r.r12), ("R13", r.r13), ("R14", r.r14), ("R15", r.r15)],
            ];
            for line in pairs {
                let words: Vec<_> = line.iter().map(|(n, v)| format!("{n}={v:016x}")).collect();
                let _ = writeln!(out, "{}", words.join(" "));
            }
            let _ = writeln!(out, "RIP={:016x} RFL={:08x}", r.rip, r.rflags);
            let all = [
                ("ES", s.es),
                ("CS", s.cs),
                ("SS", s.ss),
                ("DS", s.ds),
                ("FS", s.fs),
                ("GS", s.gs),
                ("LDT", s.ldt),
                ("TR", s.tr),
            ];
            for (name, segment) in all {
                write_segment(&mut out, name, &segment);
            }
            write_table(&mut out, "GDT", &s.gdt);
            write_table(&mut out, "IDT", &s.idt);
            let (cr0, cr2, cr3, cr4) = (s.cr0, s.cr2, s.cr3, s.cr4);
            let _ = writeln!(out, "CR0={cr0:08x} CR2={cr2:016x} CR3={cr3:016x} CR4={cr4:08x}");
            let _ = writeln!(out, "EFER={:016x} APIC_BASE={:x}", s.efer, s.apic_base);
        }
        (Err(e), _) | (_, Err(e)) => {
            let _ = writeln!(out, "registers cannot be read: {e}");
        }
    }
    write_events(&mut out, fd);
    write_apic(&mut out, fd);
    out
}

fn write_events(out: &mut String, fd: &VcpuFd) {
    let (Ok(state), Ok(e)) = (fd.get_mp_state(), fd.get_vcpu_events()) else { return };
    let (irq, exception, nmi) = (e.interrupt, e.exception, e.nmi);
    let _ = writeln!(
        out,
        "MP_STATE={} IRQ={}:{:02x} SHADOW={} EXC={}:{} NMI={}:{}",
        state.mp_state,
        irq.injected,
        irq.nr,
        irq.shadow,
        exception.injected,
        exception.nr,
        nmi.injected,
        nmi.pending
    );
}

/// Timer, and the vectors in service and requested (Intel SDM volume 3, section 11.4.1).
fn write_apic(out: &mut String, fd: &VcpuFd) {
    let Ok(apic) = fd.get_lapic() else { return };
    let word = |at: usize| {
        let bytes = [apic.regs[at], apic.regs[at + 1], apic.regs[at + 2], apic.regs[at + 3]];
        bytes.map(|b| b as u8)
    };
    let word = |at: usize| u32::from_le_bytes(word(at));
    let vectors = |at: usize| -> Vec<String> {
        let set = (0..256).filter(|v| word(at + v / 32 * 0x10) & (1 << (v % 32)) != 0);
        set.map(|v| format!("{v:02x}")).collect()
    };
    let _ = writeln!(
        out,
        "APIC TPR={:x} LVTT={:x} TMICT={:x} ISR=[{}] IRR=[{}]",
        word(0x80),
        word(0x320),
        word(0x380),
        vectors(0x100).join(" "),
        vectors(0x200).join(" ")
    );
    for msr in msrs::read(fd, &[IA32_TSC, IA32_TSC_DEADLINE]).unwrap_or_default() {
        let _ = writeln!(out, "MSR {:x}={:x}", msr.index, msr.value);
    }
}

fn write_segment(out: &mut String, name: &str, s: &kvm_segment) {
    let (sel, base, limit) = (s.selector, s.base, s.limit);
    let bits = (s.type_, s.s, s.dpl, s.present, s.l, s.db, s.g);
    let (t, sys, dpl, p, l, db, g) = bits;
    let _ = writeln!(
        out,
        "{name:<3}={sel:04x} {base:016x} {limit:08x} type={t:x} s={sys} dpl={dpl} p={p} l={l} \
         db={db} g={g}"
    );
}

fn write_table(out: &mut String, name: &str, t: &kvm_dtable) {
    let _ = writeln!(out, "{name}=     {:016x} {:08x}", t.base, t.limit);
}
