//! CPUID leaf 0xD: which state components XSAVE keeps, and how large the area is (Intel SDM
//! volume 1, chapter 13). Sizes and offsets are the host's; which components there are follows
//! from the features that the guest has.

use super::features::{FeatureSet, W1_ECX, WD1_EAX, find};
use crate::CpuidEntry;

/// Legacy region and header, in bytes.
const LEGACY: u32 = 576;
/// x87 and SSE are always there.
const BASE: u64 = 3;

/// Components and the feature that needs them. AMX's (17, 18) are missing: they need a permission
/// of the process and are never offered.
const COMPONENTS: &[(u64, &str)] =
    &[(1 << 2, "avx"), (0b11 << 3, "mpx"), (0b111 << 5, "avx512f"), (1 << 9, "pku")];

/// XCR0's bits for a guest with `features`.
pub(super) fn components(features: &FeatureSet) -> u64 {
    COMPONENTS.iter().filter(|(_, f)| features.has_name(f)).fold(BASE, |m, (bits, _)| m | bits)
}

/// Takes away what cannot be without something that the guest does not have.
pub(super) fn drop_orphans(features: &mut FeatureSet) {
    const NEEDS: &[(&str, &str)] = &[
        ("xsave", "avx mpx pku xsaveopt xsavec xgetbv1 xsaves xfd fma f16c avx512f"),
        (
            "avx",
            "fma f16c avx2 fma4 xop vaes vpclmulqdq avx-vnni avx-ifma avx-vnni-int8 avx512f \
             avx-ne-convert avx-vnni-int16 sha512 sm3 sm4",
        ),
        (
            "avx512f",
            "avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi \
             avx512vbmi2 avx512vnni avx512bitalg avx512-vpopcntdq avx512-4vnniw avx512-4fmaps \
             avx512-vp2intersect avx512-bf16 avx512-fp16 avx10",
        ),
    ];
    for (needed, list) in NEEDS {
        if !features.has_name(needed) {
            for f in list.split_whitespace().filter_map(find) {
                features.set(f, false);
            }
        }
    }
}

/// Leaf 0xD and its sub-leaves, or nothing when the guest has no XSAVE.
pub(super) fn entries(host: &[CpuidEntry], features: &FeatureSet) -> Vec<CpuidEntry> {
    const XSAVE_BIT: u32 = 1 << 26;
    if features.word(W1_ECX) & XSAVE_BIT == 0 {
        return Vec::new();
    }
    let sub = |i: u32| host.iter().find(|e| e.function == 0xd && e.index == i).copied();
    let offered = sub(0).map_or(0, |e| u64::from(e.eax) | u64::from(e.edx) << 32);
    let mask = components(features) & offered;
    let mut size = LEGACY;
    let mut parts = Vec::new();
    for i in (2..63).filter(|i| mask & (1 << i) != 0) {
        if let Some(e) = sub(i) {
            size = size.max(e.ebx.saturating_add(e.eax));
            parts.push(CpuidEntry { edx: 0, ..e });
        }
    }
    let leaf = |index, eax, ebx, ecx, edx| CpuidEntry {
        function: 0xd,
        index,
        indexed: true,
        eax,
        ebx,
        ecx,
        edx,
    };
    let mut out = vec![leaf(0, mask as u32, size, size, (mask >> 32) as u32)];
    // No supervisor components (IA32_XSS): nothing here needs them.
    out.push(leaf(1, features.word(WD1_EAX), size, 0, 0));
    out.extend(parts);
    out
}
