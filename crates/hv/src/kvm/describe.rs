//! A vCPU's registers as text, for `info registers` and crash reports.

use std::fmt::Write;

use kvm_bindings::{kvm_dtable, kvm_segment};
use kvm_ioctls::VcpuFd;

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
    out
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
