//! The CPUID table, leaf by leaf, from a [`Plan`].

use super::features::{
    FeatureSet, Reg, W1_ECX, W1_EDX, W6_EAX, W81_ECX, W81_EDX, W87_EDX, W88_EBX, WKVM_EAX, Word,
};
use super::models::Vendor;
use super::topology::{Topology, apic_id};
use super::{Kind, Plan, host_word, xsave};
use crate::CpuidEntry;

const HT: u32 = 1 << 28;
const CMP_LEGACY: u32 = 1 << 1;
const OSXSAVE: u32 = 1 << 27;
/// Bytes of a cache line, in units of 8, in leaf 1's EBX.
const CLFLUSH: u32 = 8 << 8;
/// Physical address bits of named models, unless the host has fewer.
const PHYS_BITS: u32 = 40;
/// KVM's signature leaf and its features.
const KVM_BASE: u32 = 0x4000_0000;
const EXTENDED: u32 = 0x8000_0000;

fn leaf(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> CpuidEntry {
    CpuidEntry { function, index: 0, indexed: false, eax, ebx, ecx, edx }
}

fn sub(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
    CpuidEntry { function, index, indexed: true, eax, ebx, ecx, edx }
}

fn word(leaf: u32, index: u32, reg: Reg) -> Word {
    Word { leaf, index, reg }
}

struct Builder<'a> {
    host: &'a [CpuidEntry],
    plan: &'a Plan,
    topo: &'a Topology,
    apic: u32,
    /// vCPUs a socket.
    logical: u32,
    vendor: Vendor,
}

pub(super) fn table(
    host: &[CpuidEntry],
    plan: &Plan,
    topo: &Topology,
    vcpu: u32,
) -> Vec<CpuidEntry> {
    let vendor = match plan.kind {
        Kind::Named(m) => m.vendor,
        Kind::Host => host_vendor(host),
    };
    let (apic, logical) = (apic_id(topo, vcpu), topo.per_socket());
    let b = Builder { host, plan, topo, apic, logical, vendor };
    let mut out = b.basic();
    out.extend(b.kvm());
    out.extend(b.extended());
    out
}

fn host_vendor(host: &[CpuidEntry]) -> Vendor {
    let amd = u32::from_le_bytes(*b"cAMD");
    if host_word(host, word(0, 0, Reg::Ecx)) == amd { Vendor::Amd } else { Vendor::Intel }
}

fn text(bytes: &[u8], at: usize) -> u32 {
    let mut w = [0; 4];
    for (to, from) in w.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    u32::from_le_bytes(w)
}

impl Builder<'_> {
    fn features(&self) -> &FeatureSet {
        &self.plan.features
    }

    fn host(&self, leaf: u32, reg: Reg) -> u32 {
        host_word(self.host, word(leaf, 0, reg))
    }

    /// Vendor as EBX, ECX, EDX of leaves 0 and 0x8000_0000.
    fn vendor_words(&self) -> [u32; 3] {
        match self.plan.kind {
            Kind::Host => [self.host(0, Reg::Ebx), self.host(0, Reg::Ecx), self.host(0, Reg::Edx)],
            Kind::Named(m) => {
                let id = m.vendor.id();
                [text(id, 0), text(id, 8), text(id, 4)]
            }
        }
    }

    /// Leaves 0 to 0x1f.
    fn basic(&self) -> Vec<CpuidEntry> {
        let xsave = xsave::entries(self.host, self.features());
        let mut level = match self.plan.kind {
            Kind::Host => self.host(0, Reg::Eax).min(0x16),
            Kind::Named(m) => m.level,
        };
        // x2APIC's topology and XSAVE's sizes have to be reachable.
        level = level.max(if xsave.is_empty() { 0xb } else { 0xd });
        if self.topo.dies > 1 {
            level = level.max(0x1f);
        }
        let [ebx, ecx, edx] = self.vendor_words();
        let mut out = vec![leaf(0, level, ebx, ecx, edx), self.leaf_1()];
        if self.vendor == Vendor::Intel {
            // "No data here, ask leaf 4" (SDM, CPUID leaf 2, descriptor 0xff).
            out.push(leaf(2, 0x00fe_ff01, 0, 0, 0));
            out.extend(self.caches(4));
        }
        out.push(leaf(5, 0, 0, 0, 0));
        out.push(leaf(6, self.features().word(W6_EAX), 0, 0, 0));
        out.extend(self.leaf_7());
        out.push(leaf(0xa, 0, 0, 0, 0));
        out.extend(self.x2apic_topology(0xb, false));
        out.extend(xsave);
        if self.topo.dies > 1 {
            out.extend(self.x2apic_topology(0x1f, true));
        }
        out
    }

    fn leaf_1(&self) -> CpuidEntry {
        let eax = match self.plan.kind {
            Kind::Host => self.host(1, Reg::Eax),
            Kind::Named(m) => m.signature(),
        };
        let mut edx = self.features().word(W1_EDX);
        let mut ebx = CLFLUSH | (self.apic & 0xff) << 24;
        if self.logical > 1 {
            edx |= HT;
            ebx |= self.logical.next_power_of_two().min(0xff) << 16;
        }
        // OSXSAVE follows CR4: KVM keeps it.
        leaf(1, eax, ebx, self.features().word(W1_ECX) & !OSXSAVE, edx)
    }

    fn leaf_7(&self) -> Vec<CpuidEntry> {
        let f = |index, reg| self.features().word(word(7, index, reg));
        let row = |i| [f(i, Reg::Eax), f(i, Reg::Ebx), f(i, Reg::Ecx), f(i, Reg::Edx)];
        let last = (0..=2).rev().find(|i| row(*i) != [0; 4]).unwrap_or(0);
        (0..=last)
            .map(|i| {
                let mut words = row(i);
                if i == 0 {
                    words[0] = last;
                }
                sub(7, i, words)
            })
            .collect()
    }

    /// Extended topology: threads, cores, and (leaf 0x1f) dies.
    fn x2apic_topology(&self, function: u32, dies: bool) -> Vec<CpuidEntry> {
        const SMT: u32 = 1;
        const CORE: u32 = 2;
        const DIE: u32 = 5;
        let t = self.topo;
        let per_die = t.cores * t.threads;
        let mut levels = vec![(t.core_shift(), t.threads, SMT)];
        if dies {
            levels.push((t.die_shift(), per_die, CORE));
            levels.push((t.socket_shift(), self.logical, DIE));
        } else {
            levels.push((t.socket_shift(), self.logical, CORE));
        }
        levels.push((0, 0, 0));
        (0u32..)
            .zip(levels)
            .map(|(i, (shift, count, kind))| {
                sub(function, i, [shift, count & 0xffff, i | kind << 8, self.apic])
            })
            .collect()
    }

    /// Cache descriptions in the form that leaf 4 and leaf 0x8000_001d share: the host's for the
    /// host model, plain ones for named models; who shares them follows the topology.
    fn caches(&self, function: u32) -> Vec<CpuidEntry> {
        let native: Vec<_> =
            self.host.iter().filter(|e| e.function == function && e.eax & 0x1f != 0).collect();
        let mut list: Vec<[u32; 4]> = match self.plan.kind {
            Kind::Host if !native.is_empty() => {
                native.iter().map(|e| [e.eax, e.ebx, e.ecx, e.edx]).collect()
            }
            // (type, level, ways, sets): 32 KiB data and code, 512 KiB or 2 MiB, 16 MiB shared.
            _ => [(1, 1, 8, 64), (2, 1, 8, 64), (3, 2, 16, 2048), (3, 3, 16, 16384)]
                .map(|(kind, level, ways, sets): (u32, u32, u32, u32)| {
                    [kind | level << 5 | 1 << 8, 63 | (ways - 1) << 22, sets - 1, 0]
                })
                .to_vec(),
        };
        let l3 = self.plan.switch("l3-cache", true);
        list.retain(|w| l3 || (w[0] >> 5) & 7 < 3);
        for w in &mut list {
            let shared = match (w[0] >> 5) & 7 {
                1 | 2 => 1 << self.topo.core_shift(),
                _ => 1u32 << self.topo.die_shift(),
            };
            w[0] = (w[0] & 0x3fff) | ((shared - 1) & 0xfff) << 14;
            if function == 4 {
                let cores = 1u32 << (self.topo.socket_shift() - self.topo.core_shift());
                w[0] |= ((cores - 1) & 0x3f) << 26;
            }
        }
        list.push([0; 4]);
        (0..).zip(list).map(|(i, words)| sub(function, i, words)).collect()
    }

    /// KVM's signature and paravirtual features, unless they are hidden (`kvm=off`).
    fn kvm(&self) -> Vec<CpuidEntry> {
        if !self.plan.switch("kvm", true) {
            return Vec::new();
        }
        let id = b"KVMKVMKVM\0\0\0";
        let hints = self.features().word(word(KVM_BASE + 1, 0, Reg::Edx));
        vec![
            leaf(KVM_BASE, KVM_BASE + 1, text(id, 0), text(id, 4), text(id, 8)),
            leaf(KVM_BASE + 1, self.features().word(WKVM_EAX), 0, 0, hints),
        ]
    }

    /// Leaves from 0x8000_0000.
    fn extended(&self) -> Vec<CpuidEntry> {
        let mut xlevel = match self.plan.kind {
            Kind::Host => self.host(EXTENDED, Reg::Eax).clamp(EXTENDED + 8, EXTENDED + 0x21),
            Kind::Named(m) => m.xlevel,
        };
        let w21 = self.features().word(word(EXTENDED + 0x21, 0, Reg::Eax));
        if w21 != 0 {
            xlevel = xlevel.max(EXTENDED + 0x21);
        }
        let [ebx, ecx, edx] = self.vendor_words();
        let mut out = vec![leaf(EXTENDED, xlevel, ebx, ecx, edx), self.leaf_81()];
        out.extend(self.brand());
        for n in [5, 6] {
            let f = EXTENDED + n;
            let host = matches!(self.plan.kind, Kind::Host);
            let r = |reg| if host { self.host(f, reg) } else { 0 };
            out.push(leaf(f, r(Reg::Eax), r(Reg::Ebx), r(Reg::Ecx), r(Reg::Edx)));
        }
        out.push(leaf(EXTENDED + 7, 0, 0, 0, self.features().word(W87_EDX)));
        out.push(self.leaf_88());
        if self.vendor == Vendor::Amd && self.features().has_name("topoext") {
            out.extend(self.caches(EXTENDED + 0x1d));
            out.push(self.leaf_8_1e());
        }
        if w21 != 0 {
            out.push(leaf(EXTENDED + 0x21, w21, 0, 0, 0));
        }
        out.retain(|e| e.function <= xlevel);
        out
    }

    fn leaf_81(&self) -> CpuidEntry {
        /// Bits of leaf 1's EDX that AMD repeats here.
        const REPEATED: u32 = 0x0183_f3ff;
        let mut ecx = self.features().word(W81_ECX);
        let mut edx = self.features().word(W81_EDX);
        if self.vendor == Vendor::Amd {
            edx |= self.features().word(W1_EDX) & REPEATED;
            if self.logical > 1 {
                ecx |= CMP_LEGACY;
            } else {
                ecx &= !CMP_LEGACY;
            }
        }
        let eax = self.leaf_1().eax;
        leaf(EXTENDED + 1, if self.vendor == Vendor::Amd { eax } else { 0 }, 0, ecx, edx)
    }

    fn brand(&self) -> Vec<CpuidEntry> {
        (0..3)
            .map(|i| {
                let f = EXTENDED + 2 + i;
                match self.plan.kind {
                    Kind::Host => {
                        let r = |reg| self.host(f, reg);
                        leaf(f, r(Reg::Eax), r(Reg::Ebx), r(Reg::Ecx), r(Reg::Edx))
                    }
                    Kind::Named(m) => {
                        let t = |at| text(m.brand().as_bytes(), 16 * i as usize + at);
                        leaf(f, t(0), t(4), t(8), t(12))
                    }
                }
            })
            .collect()
    }

    /// Address widths, and AMD's core count.
    fn leaf_88(&self) -> CpuidEntry {
        let native = self.host(EXTENDED + 8, Reg::Eax);
        let host_phys = if native & 0xff == 0 { PHYS_BITS } else { native & 0xff };
        let whole = matches!(self.plan.kind, Kind::Host);
        let phys = if self.plan.switch("host-phys-bits", whole) {
            host_phys
        } else {
            PHYS_BITS.min(host_phys)
        };
        let linear = if self.features().has_name("la57") { 57 } else { 48 };
        let ecx = if self.vendor == Vendor::Amd && self.logical > 1 {
            self.topo.socket_shift() << 12 | ((self.logical - 1) & 0xff)
        } else {
            0
        };
        leaf(EXTENDED + 8, phys | linear << 8, self.features().word(W88_EBX), ecx, 0)
    }

    /// AMD: extended APIC id, core and node.
    fn leaf_8_1e(&self) -> CpuidEntry {
        let core = self.apic >> self.topo.core_shift();
        let node = self.apic >> self.topo.die_shift();
        let ebx = (core & 0xff) | ((self.topo.threads - 1) & 0xff) << 8;
        let ecx = (node & 0xff) | ((self.topo.dies - 1) & 7) << 8;
        leaf(EXTENDED + 0x1e, self.apic, ebx, ecx, 0)
    }
}
