//! CPU features by QEMU's names: each is one bit of one CPUID register.
//!
//! Bit positions are those of Intel's SDM (volume 2, CPUID) and AMD's APM (volume 3, appendix E);
//! 0x4000_0001 is KVM's own leaf (Linux documentation, virt/kvm/x86/cpuid).

use std::collections::BTreeMap;

/// A CPUID output register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// One register of one leaf: 32 feature bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Word {
    pub leaf: u32,
    pub index: u32,
    pub reg: Reg,
}

/// One feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    pub name: &'static str,
    pub word: Word,
    /// 0..=31.
    pub bit: u32,
}

impl Feature {
    /// As QEMU prints it: `CPUID.07H:EBX.avx2 [bit 5]`.
    pub fn describe(&self) -> String {
        let Word { leaf, reg, .. } = self.word;
        let reg = format!("{reg:?}").to_uppercase();
        format!("CPUID.{leaf:02X}H:{reg}.{} [bit {}]", self.name, self.bit)
    }
}

const fn word(leaf: u32, index: u32, reg: Reg) -> Word {
    Word { leaf, index, reg }
}

pub const W1_EDX: Word = word(1, 0, Reg::Edx);
pub const W1_ECX: Word = word(1, 0, Reg::Ecx);
pub const W7_EBX: Word = word(7, 0, Reg::Ebx);
pub const W7_ECX: Word = word(7, 0, Reg::Ecx);
pub const W7_EDX: Word = word(7, 0, Reg::Edx);
pub const W6_EAX: Word = word(6, 0, Reg::Eax);
pub const WD1_EAX: Word = word(0xd, 1, Reg::Eax);
pub const W81_EDX: Word = word(0x8000_0001, 0, Reg::Edx);
pub const W81_ECX: Word = word(0x8000_0001, 0, Reg::Ecx);
pub const W87_EDX: Word = word(0x8000_0007, 0, Reg::Edx);
pub const W88_EBX: Word = word(0x8000_0008, 0, Reg::Ebx);
pub const WKVM_EAX: Word = word(0x4000_0001, 0, Reg::Eax);

/// Names of each word's bits from 0, `-` where there is none (or one that guests never get).
const WORDS: &[(Word, &str)] = &[
    (
        W1_EDX,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - \
         ds acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    (
        W1_ECX,
        "pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm - \
         pcid dca sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave - avx f16c rdrand \
         hypervisor",
    ),
    (
        W7_EBX,
        "fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn-only smep bmi2 erms invpcid rtm - \
         zero-fcs-fds mpx - avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb \
         intel-pt avx512pf avx512er avx512cd sha-ni avx512bw avx512vl",
    ),
    (
        W7_ECX,
        "- avx512vbmi umip pku - waitpkg avx512vbmi2 - gfni vaes vpclmulqdq avx512vnni \
         avx512bitalg - avx512-vpopcntdq - la57 - - - - - rdpid - bus-lock-detect cldemote - \
         movdiri movdir64b - sgxlc pks",
    ),
    (
        W7_EDX,
        "- - avx512-4vnniw avx512-4fmaps fsrm - - - avx512-vp2intersect - md-clear - - - \
         serialize - tsx-ldtrk - - arch-lbr - - amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl \
         stibp flush-l1d arch-capabilities core-capability ssbd",
    ),
    (
        word(7, 1, Reg::Eax),
        "sha512 sm3 sm4 - avx-vnni avx512-bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs \
         wrmsrns - amx-fp16 - avx-ifma - - lam - - - - movrs",
    ),
    (
        word(7, 1, Reg::Edx),
        "- - - - avx-vnni-int8 avx-ne-convert - - amx-complex - avx-vnni-int16 - - - prefetchiti \
         - - - - avx10",
    ),
    (word(7, 2, Reg::Edx), "intel-psfd ipred-ctrl rrsba-ctrl ddpd-u bhi-ctrl mcdt-no"),
    (W6_EAX, "- - arat"),
    (WD1_EAX, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
        W81_EDX,
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr-opt pdpe1gb rdtscp - \
         lm 3dnowext 3dnow",
    ),
    (
        W81_ECX,
        "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs \
         xop skinit wdt - lwp fma4 tce - nodeid-msr - tbm topoext perfctr-core perfctr-nb",
    ),
    (W87_EDX, "- - - - - - - - invtsc"),
    (
        W88_EBX,
        "clzero - xsaveerptr - - - - - - wbnoinvd - - ibpb - ibrs amd-stibp - stibp-always-on - - \
         - - - - amd-ssbd virt-ssbd amd-no-ssb - amd-psfd",
    ),
    (
        word(0x8000_0021, 0, Reg::Eax),
        "no-nested-data-bp fs-gs-base-ns lfence-always-serializing - - - null-sel-clr-base - \
         auto-ibrs - - - - - - - - - - - prefetchi - - - - - - eraps sbpb ibpb-brtype srso-no \
         srso-user-kernel-no",
    ),
    (
        WKVM_EAX,
        "kvmclock-old kvm-nopiodelay kvm-mmu kvmclock kvm-asyncpf kvm-steal-time kvm-pv-eoi \
         kvm-pv-unhalt - kvm-pv-tlb-flush kvm-asyncpf-vmexit kvm-pv-ipi kvm-poll-control \
         kvm-pv-sched-yield kvm-asyncpf-int kvm-msi-ext-dest-id - - - - - - - - \
         kvmclock-stable-bit",
    ),
    (word(0x4000_0001, 0, Reg::Edx), "kvm-hint-dedicated"),
];

/// Other spellings.
const ALIASES: &[(&str, &str)] = &[
    ("sse3", "pni"),
    ("pclmuldq", "pclmulqdq"),
    ("sse4-1", "sse4.1"),
    ("sse4-2", "sse4.2"),
    ("i64", "lm"),
    ("xd", "nx"),
    ("ffxsr", "fxsr-opt"),
    ("kvm-stable-clock", "kvmclock-stable-bit"),
    ("kvm-steal-tm", "kvm-steal-time"),
];

/// Every feature.
pub fn all() -> impl Iterator<Item = Feature> {
    WORDS.iter().flat_map(|(word, names)| {
        names
            .split_whitespace()
            .zip(0..)
            .filter(|(name, _)| *name != "-")
            .map(|(name, bit)| Feature { name, word: *word, bit })
    })
}

/// Every word that holds features.
pub fn words() -> impl Iterator<Item = Word> {
    WORDS.iter().map(|(word, _)| *word)
}

/// The feature called `name`; `_` and `-` are the same, as QEMU has it.
pub fn find(name: &str) -> Option<Feature> {
    let name = name.to_ascii_lowercase().replace('_', "-");
    let name = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name.as_str(), |(_, n)| n);
    all().find(|f| f.name == name)
}

/// Feature bits by word.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FeatureSet(BTreeMap<Word, u32>);

impl FeatureSet {
    /// The bits of `word`.
    pub fn word(&self, word: Word) -> u32 {
        self.0.get(&word).copied().unwrap_or(0)
    }
    /// Replaces the bits of `word`.
    pub fn set_word(&mut self, word: Word, bits: u32) {
        self.0.insert(word, bits);
    }
    /// Whether the feature is in it.
    pub fn has(&self, f: Feature) -> bool {
        self.word(f.word) & (1 << f.bit) != 0
    }
    /// Whether the feature called `name` is in it; unknown names are not.
    pub fn has_name(&self, name: &str) -> bool {
        find(name).is_some_and(|f| self.has(f))
    }
    /// Adds or removes one.
    pub fn set(&mut self, f: Feature, on: bool) {
        let bits = self.0.entry(f.word).or_default();
        if on { *bits |= 1 << f.bit } else { *bits &= !(1 << f.bit) }
    }
    /// Adds (`name`) or removes (`-name`) a list separated by blanks; unknown names are ignored
    /// (a test makes sure that tables here have none).
    pub fn apply(&mut self, list: &str) {
        for item in list.split_whitespace() {
            let (name, on) = item.strip_prefix('-').map_or((item, true), |name| (name, false));
            if let Some(f) = find(name) {
                self.set(f, on);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_at_their_bits() {
        for (name, word, bit) in [
            ("fpu", W1_EDX, 0),
            ("pbe", W1_EDX, 31),
            ("hypervisor", W1_ECX, 31),
            ("xsave", W1_ECX, 26),
            ("tsc_deadline", W1_ECX, 24),
            ("sse4_2", W1_ECX, 20),
            ("avx2", W7_EBX, 5),
            ("avx512f", W7_EBX, 16),
            ("avx512vl", W7_EBX, 31),
            ("rdpid", W7_ECX, 22),
            ("pks", W7_ECX, 31),
            ("la57", W7_ECX, 16),
            ("ssbd", W7_EDX, 31),
            ("fsrm", W7_EDX, 4),
            ("amx-tile", W7_EDX, 24),
            ("avx512-bf16", word(7, 1, Reg::Eax), 5),
            ("fsrc", word(7, 1, Reg::Eax), 12),
            ("nx", W81_EDX, 20),
            ("lm", W81_EDX, 29),
            ("topoext", W81_ECX, 22),
            ("svm", W81_ECX, 2),
            ("invtsc", W87_EDX, 8),
            ("ibpb", W88_EBX, 12),
            ("amd-ssbd", W88_EBX, 24),
            ("auto-ibrs", word(0x8000_0021, 0, Reg::Eax), 8),
            ("kvm-pv-ipi", WKVM_EAX, 11),
            ("kvmclock-stable-bit", WKVM_EAX, 24),
        ] {
            let f = find(name).unwrap_or_else(|| panic!("{name}"));
            assert_eq!((f.word, f.bit), (word, bit), "{name}");
        }
        assert!(all().all(|f| f.bit < 32));
        assert_eq!(find("avx2").unwrap().describe(), "CPUID.07H:EBX.avx2 [bit 5]");
    }
}
