//! Named CPU models, as data: what QEMU calls them, and which features they have.
//!
//! A model can build on another: its list then adds to (`name`) or takes from (`-name`) that.
//! Features that QEMU's definitions hold but that KVM guests never get by default (svm, monitor)
//! are left out.

use super::features::FeatureSet;

/// CPU vendor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vendor {
    Intel,
    Amd,
}

impl Vendor {
    /// The 12 bytes of CPUID leaf 0.
    pub fn id(self) -> &'static [u8; 12] {
        match self {
            Self::Intel => b"GenuineIntel",
            Self::Amd => b"AuthenticAMD",
        }
    }
}

/// A named model.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    pub name: &'static str,
    pub vendor: Vendor,
    pub family: u32,
    pub model: u32,
    pub stepping: u32,
    /// Highest basic leaf, at least.
    pub level: u32,
    /// Highest extended leaf, at least.
    pub xlevel: u32,
    /// The brand string, at most 48 bytes.
    pub brand: &'static str,
    /// The model that the features build on, or "".
    base: &'static str,
    features: &'static str,
}

use Vendor::{Amd, Intel};

#[expect(clippy::too_many_arguments, reason = "rows of a table")]
const fn row(
    name: &'static str,
    vendor: Vendor,
    (family, model, stepping): (u32, u32, u32),
    level: u32,
    xlevel: u32,
    brand: &'static str,
    base: &'static str,
    features: &'static str,
) -> Model {
    Model { name, vendor, family, model, stepping, level, xlevel, brand, base, features }
}

const X8: u32 = 0x8000_0008;
const XA: u32 = 0x8000_000a;
const X1E: u32 = 0x8000_001e;
const X21: u32 = 0x8000_0021;

/// What every 64-bit CPU has.
const PC64: &str = "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush \
                    mmx fxsr sse sse2 pni lm syscall nx";
const TSX: &str = "hle rtm";
const NO_TSX: &str = "-hle -rtm";

const MODELS: &[Model] = &[
    row("qemu64", Amd, (15, 107, 1), 0xd, XA, "QEMU Virtual CPU version 2.5+", "", "cx16 lahf-lm"),
    row("kvm64", Intel, (15, 6, 1), 0xd, X8, "Common KVM processor", "", "cx16 vme"),
    row(
        "Conroe",
        Intel,
        (6, 15, 11),
        10,
        X8,
        "Intel Celeron_4x0 (Conroe/Merom Class Core 2)",
        "",
        "vme ssse3 lahf-lm",
    ),
    row(
        "Penryn",
        Intel,
        (6, 23, 10),
        10,
        X8,
        "Intel Core 2 Duo P9xxx (Penryn Class Core 2)",
        "Conroe",
        "cx16 sse4.1",
    ),
    row(
        "Nehalem",
        Intel,
        (6, 26, 3),
        11,
        X8,
        "Intel Core i7 9xx (Nehalem Class Core i7)",
        "Penryn",
        "sse4.2 popcnt",
    ),
    row("Nehalem-IBRS", Intel, (6, 26, 3), 11, X8, "", "Nehalem", "spec-ctrl"),
    row(
        "Westmere",
        Intel,
        (6, 44, 1),
        11,
        X8,
        "Westmere E56xx/L56xx/X56xx (Nehalem-C)",
        "Nehalem",
        "aes pclmulqdq arat",
    ),
    row("Westmere-IBRS", Intel, (6, 44, 1), 11, X8, "", "Westmere", "spec-ctrl"),
    row(
        "SandyBridge",
        Intel,
        (6, 42, 1),
        0xd,
        X8,
        "Intel Xeon E312xx (Sandy Bridge)",
        "Westmere",
        "avx xsave tsc-deadline x2apic rdtscp xsaveopt",
    ),
    row("SandyBridge-IBRS", Intel, (6, 42, 1), 0xd, X8, "", "SandyBridge", "spec-ctrl"),
    row(
        "IvyBridge",
        Intel,
        (6, 58, 9),
        0xd,
        X8,
        "Intel Xeon E3-12xx v2 (Ivy Bridge)",
        "SandyBridge",
        "f16c rdrand fsgsbase smep erms",
    ),
    row("IvyBridge-IBRS", Intel, (6, 58, 9), 0xd, X8, "", "IvyBridge", "spec-ctrl"),
    row(
        "Haswell-noTSX",
        Intel,
        (6, 60, 1),
        0xd,
        X8,
        "Intel Core Processor (Haswell, no TSX)",
        "IvyBridge",
        "fma pcid movbe bmi1 avx2 bmi2 invpcid abm",
    ),
    row(
        "Haswell",
        Intel,
        (6, 60, 4),
        0xd,
        X8,
        "Intel Core Processor (Haswell)",
        "Haswell-noTSX",
        TSX,
    ),
    row("Haswell-IBRS", Intel, (6, 60, 4), 0xd, X8, "", "Haswell", "spec-ctrl"),
    row("Haswell-noTSX-IBRS", Intel, (6, 60, 1), 0xd, X8, "", "Haswell-noTSX", "spec-ctrl"),
    row(
        "Broadwell",
        Intel,
        (6, 61, 2),
        0xd,
        X8,
        "Intel Core Processor (Broadwell)",
        "Haswell",
        "rdseed adx smap 3dnowprefetch",
    ),
    row("Broadwell-noTSX", Intel, (6, 61, 2), 0xd, X8, "", "Broadwell", NO_TSX),
    row("Broadwell-IBRS", Intel, (6, 61, 2), 0xd, X8, "", "Broadwell", "spec-ctrl"),
    row("Broadwell-noTSX-IBRS", Intel, (6, 61, 2), 0xd, X8, "", "Broadwell-noTSX", "spec-ctrl"),
    row(
        "Skylake-Client",
        Intel,
        (6, 94, 3),
        0xd,
        X8,
        "Intel Core Processor (Skylake)",
        "Broadwell",
        "xsavec xgetbv1",
    ),
    row("Skylake-Client-IBRS", Intel, (6, 94, 3), 0xd, X8, "", "Skylake-Client", "spec-ctrl"),
    row("Skylake-Client-noTSX-IBRS", Intel, (6, 94, 3), 0xd, X8, "", "Skylake-Client-IBRS", NO_TSX),
    row(
        "Skylake-Server",
        Intel,
        (6, 85, 4),
        0xd,
        X8,
        "Intel Xeon Processor (Skylake)",
        "Skylake-Client",
        "pdpe1gb clwb avx512f avx512dq avx512bw avx512cd avx512vl pku",
    ),
    row("Skylake-Server-IBRS", Intel, (6, 85, 4), 0xd, X8, "", "Skylake-Server", "spec-ctrl"),
    row("Skylake-Server-noTSX-IBRS", Intel, (6, 85, 4), 0xd, X8, "", "Skylake-Server-IBRS", NO_TSX),
    row(
        "Cascadelake-Server",
        Intel,
        (6, 85, 6),
        0xd,
        X8,
        "Intel Xeon Processor (Cascadelake)",
        "Skylake-Server-IBRS",
        "clflushopt avx512vnni ssbd",
    ),
    row("Cascadelake-Server-noTSX", Intel, (6, 85, 6), 0xd, X8, "", "Cascadelake-Server", NO_TSX),
    row(
        "Cooperlake",
        Intel,
        (6, 85, 10),
        0xd,
        X8,
        "Intel Xeon Processor (Cooperlake)",
        "Cascadelake-Server",
        "stibp arch-capabilities avx512-bf16",
    ),
    row(
        "Icelake-Server",
        Intel,
        (6, 134, 0),
        0xd,
        X8,
        "Intel Xeon Processor (Icelake)",
        "Cascadelake-Server",
        "avx512vbmi umip avx512vbmi2 gfni vaes vpclmulqdq avx512bitalg avx512-vpopcntdq la57 \
         wbnoinvd",
    ),
    row("Icelake-Server-noTSX", Intel, (6, 134, 0), 0xd, X8, "", "Icelake-Server", NO_TSX),
    row(
        "SapphireRapids",
        Intel,
        (6, 143, 4),
        0x20,
        X8,
        "Intel Xeon Processor (SapphireRapids)",
        "Icelake-Server",
        "avx512ifma sha-ni rdpid bus-lock-detect fsrm serialize tsx-ldtrk avx512-fp16 \
         arch-capabilities avx-vnni avx512-bf16 fzrm fsrs fsrc xsaves",
    ),
    row(
        "Opteron_G4",
        Amd,
        (21, 1, 2),
        0xd,
        0x8000_001a,
        "AMD Opteron 62xx class CPU",
        "",
        "vme cx16 ssse3 sse4.1 sse4.2 popcnt aes pclmulqdq avx xsave rdtscp pdpe1gb lahf-lm abm \
         sse4a misalignsse 3dnowprefetch xop fma4",
    ),
    row(
        "Opteron_G5",
        Amd,
        (21, 2, 0),
        0xd,
        0x8000_001a,
        "AMD Opteron 63xx class CPU",
        "Opteron_G4",
        "f16c fma tbm",
    ),
    row(
        "EPYC",
        Amd,
        (23, 1, 2),
        0xd,
        X1E,
        "AMD EPYC Processor",
        "",
        "vme rdrand f16c avx xsave aes popcnt movbe sse4.2 sse4.1 cx16 fma ssse3 pclmulqdq rdtscp \
         pdpe1gb fxsr-opt mmxext osvw 3dnowprefetch misalignsse sse4a abm cr8legacy lahf-lm \
         topoext fsgsbase bmi1 avx2 smep bmi2 rdseed adx smap clflushopt sha-ni xsaveopt xsavec \
         xgetbv1 arat",
    ),
    row("EPYC-IBPB", Amd, (23, 1, 2), 0xd, X1E, "AMD EPYC Processor (with IBPB)", "EPYC", "ibpb"),
    row(
        "EPYC-Rome",
        Amd,
        (23, 49, 0),
        0xd,
        X1E,
        "AMD EPYC-Rome Processor",
        "EPYC-IBPB",
        "clzero xsaveerptr xsaves rdpid umip clwb wbnoinvd amd-stibp",
    ),
    row(
        "EPYC-Milan",
        Amd,
        (25, 1, 1),
        0xd,
        X1E,
        "AMD EPYC-Milan Processor",
        "EPYC-Rome",
        "pcid erms invpcid pku fsrm ibrs amd-ssbd",
    ),
    row(
        "EPYC-Genoa",
        Amd,
        (25, 17, 0),
        0xd,
        X21,
        "AMD EPYC-Genoa Processor",
        "EPYC-Milan",
        "avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512-bf16 avx512vbmi avx512vbmi2 \
         gfni vaes vpclmulqdq avx512vnni avx512bitalg avx512-vpopcntdq la57 stibp-always-on \
         amd-psfd no-nested-data-bp lfence-always-serializing null-sel-clr-base auto-ibrs",
    ),
    row(
        "EPYC-Turin",
        Amd,
        (26, 0, 0),
        0xd,
        X21,
        "AMD EPYC-Turin Processor",
        "EPYC-Genoa",
        "movdiri movdir64b avx-vnni avx512-vp2intersect prefetchi sbpb ibpb-brtype \
         srso-user-kernel-no",
    ),
];

/// Versioned and other names for the same.
const ALIASES: &[(&str, &str)] = &[
    ("Nehalem-v1", "Nehalem"),
    ("Nehalem-v2", "Nehalem-IBRS"),
    ("Westmere-v1", "Westmere"),
    ("SandyBridge-v1", "SandyBridge"),
    ("IvyBridge-v1", "IvyBridge"),
    ("Haswell-v1", "Haswell"),
    ("Haswell-v2", "Haswell-noTSX"),
    ("Haswell-v3", "Haswell-IBRS"),
    ("Haswell-v4", "Haswell-noTSX-IBRS"),
    ("Broadwell-v1", "Broadwell"),
    ("Broadwell-v2", "Broadwell-noTSX"),
    ("Broadwell-v3", "Broadwell-IBRS"),
    ("Broadwell-v4", "Broadwell-noTSX-IBRS"),
    ("Skylake-Client-v1", "Skylake-Client"),
    ("Skylake-Client-v2", "Skylake-Client-IBRS"),
    ("Skylake-Client-v3", "Skylake-Client-noTSX-IBRS"),
    ("Skylake-Server-v1", "Skylake-Server"),
    ("Skylake-Server-v2", "Skylake-Server-IBRS"),
    ("Skylake-Server-v3", "Skylake-Server-noTSX-IBRS"),
    ("Cascadelake-Server-v1", "Cascadelake-Server"),
    ("Cooperlake-v1", "Cooperlake"),
    ("Icelake-Server-v1", "Icelake-Server"),
    ("Icelake-Server-v2", "Icelake-Server-noTSX"),
    ("SapphireRapids-v1", "SapphireRapids"),
    ("EPYC-v1", "EPYC"),
    ("EPYC-v2", "EPYC-IBPB"),
    ("EPYC-Rome-v1", "EPYC-Rome"),
    ("EPYC-Milan-v1", "EPYC-Milan"),
    ("EPYC-Genoa-v1", "EPYC-Genoa"),
    ("EPYC-Turin-v1", "EPYC-Turin"),
    ("qemu64-v1", "qemu64"),
    ("kvm64-v1", "kvm64"),
];

/// All named models, without `host` and `max`.
pub fn all() -> &'static [Model] {
    MODELS
}

/// Versioned names, each with the model that it is.
pub fn aliases() -> impl Iterator<Item = (&'static str, &'static str)> {
    ALIASES.iter().copied()
}

/// The model called `name` (or by a versioned name); case does not matter.
pub fn find(name: &str) -> Option<&'static Model> {
    let alias = ALIASES.iter().find(|(a, _)| a.eq_ignore_ascii_case(name)).map(|(_, n)| *n);
    let name = alias.unwrap_or(name);
    MODELS.iter().find(|m| m.name.eq_ignore_ascii_case(name))
}

impl Model {
    /// Everything that it offers, its bases' features included.
    pub fn features(&self) -> FeatureSet {
        let mut set = match find(self.base) {
            Some(base) => base.features(),
            None => {
                let mut set = FeatureSet::default();
                set.apply(PC64);
                set
            }
        };
        set.apply(self.features);
        set
    }

    /// The brand string: its own, or the one of the model that it builds on.
    pub fn brand(&self) -> &'static str {
        match find(self.base) {
            Some(base) if self.brand.is_empty() => base.brand(),
            _ => self.brand,
        }
    }

    /// EAX of CPUID leaf 1 (Intel SDM volume 2, CPUID, figure 3-6).
    pub fn signature(&self) -> u32 {
        let (family, extended) = (self.family.min(15), self.family.saturating_sub(15));
        let model = ((self.model >> 4) << 16) | ((self.model & 0xf) << 4);
        (extended << 20) | model | (family << 8) | self.stepping
    }
}

#[cfg(test)]
mod tests {
    use super::super::features;
    use super::*;

    #[test]
    fn the_table_is_sound() {
        for m in MODELS {
            assert!(m.base.is_empty() || find(m.base).is_some(), "{}", m.name);
            for f in m.features.split_whitespace() {
                assert!(features::find(f.trim_start_matches('-')).is_some(), "{}: {f}", m.name);
            }
            assert!(!m.brand().is_empty() && m.brand().len() <= 48, "{}", m.name);
        }
        assert!(ALIASES.iter().all(|(_, n)| find(n).is_some()));
        for f in PC64.split_whitespace() {
            assert!(features::find(f).is_some(), "{f}");
        }
    }

    #[test]
    fn models_have_what_their_hardware_has() {
        let has = |m: &str, f: &str| find(m).unwrap().features().has_name(f);
        assert!(has("Haswell", "avx2") && has("Haswell", "rtm") && !has("Haswell-noTSX", "rtm"));
        assert!(!has("IvyBridge", "avx2") && has("Broadwell", "smap"));
        assert!(has("epyc-rome", "rdpid") && !has("EPYC", "rdpid"));
        assert!(has("Icelake-Server", "avx512f") && has("EPYC-Genoa", "avx512vnni"));
        assert!(!has("qemu64", "sse4.1"));
        assert_eq!(find("EPYC-Rome").unwrap().signature(), 0x0083_0f10);
        assert_eq!(find("Skylake-Server").unwrap().signature(), 0x0005_0654);
    }
}
