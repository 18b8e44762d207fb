//! What CPUID says to a guest: a model (the host's CPU, or a named one), features switched on and
//! off by QEMU's names, and the topology.
//!
//! - [`features`]: feature names and where their bits are.
//! - [`models`]: named models as data.
//! - [`topology`]: APIC ids.
//! - [`xsave`]: leaf 0xD.
//!
//! Invariants: a guest is never told of a feature that the host's KVM does not support, nor of
//! one whose state Tern cannot move (nested virtualisation, SGX, processor trace, AMX, the PMU,
//! control-flow enforcement). Two hosts that support the same features give a named model the
//! same table.

pub mod features;
mod help;
mod leaves;
pub mod models;
mod topology;
mod xsave;

use std::collections::BTreeMap;

use features::{Feature, FeatureSet, Word};
pub use help::help;
pub use topology::{Topology, apic_id};

use crate::CpuidEntry;

/// What can be wrong with a CPU model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No such model.
    #[error("there is no CPU model '{name}'{} (-cpu help lists what is)", hint(.nearest))]
    Model { name: String, nearest: Option<&'static str> },
    /// No such feature.
    #[error("there is no CPU feature '{name}'{} (-cpu help lists what is)", hint(.nearest))]
    Feature { name: String, nearest: Option<&'static str> },
    /// A feature that a guest cannot have here.
    #[error("CPU feature '{0}' is not offered: its state cannot be migrated")]
    NotMigratable(String),
    /// `enforce` was given and the host lacks features.
    #[error("this host doesn't support requested features: {}", .0.join(", "))]
    Missing(Vec<String>),
    /// The topology cannot be.
    #[error("CPU topology {0:?} is out of range: 1 to 1024 of each, a million in all")]
    Topology(Topology),
}

fn hint(nearest: &Option<&'static str>) -> String {
    nearest.map_or(String::new(), |n| format!(" (did you mean '{n}'?)"))
}

/// The model that passes the host's CPU through.
const HOST: &str = "host";
/// Everything that the host's KVM supports: here the same as [`HOST`].
const MAX: &str = "max";

/// Features that a guest never gets, as their state is not saved (or needs what Tern lacks).
const NEVER: &str = "vmx svm sgx sgxlc intel-pt arch-lbr amx-tile amx-int8 amx-bf16 amx-fp16 \
                     amx-complex xfd monitor pdcm ds dtes64 ds-cpl perfctr-core perfctr-nb ibs \
                     lwp skinit fred avx10 pks est tm tm2 acpi ht smx";
/// Of these, what a user who asks for it is told no.
const REFUSED: &str = "vmx svm sgx intel-pt arch-lbr amx-tile monitor fred";
/// What the host model leaves out unless it is asked for: a guest that has it ties itself to the
/// host's TSC frequency.
const ONLY_ON_REQUEST: &str = "invtsc";
/// What named models get on KVM besides their own features.
const KVM_DEFAULTS: &str = "x2apic hypervisor kvmclock-old kvm-nopiodelay kvmclock kvm-asyncpf \
                            kvm-steal-time kvm-pv-eoi kvmclock-stable-bit kvm-pv-unhalt \
                            kvm-pv-tlb-flush kvm-pv-ipi kvm-pv-sched-yield kvm-asyncpf-int";
/// Of those, what goes without a word when the host lacks it.
const QUIET: &str = "kvm-asyncpf kvm-steal-time kvm-pv-eoi kvmclock-stable-bit kvm-pv-unhalt \
                     kvm-pv-tlb-flush kvm-pv-ipi kvm-pv-sched-yield kvm-asyncpf-int \
                     kvm-nopiodelay kvmclock-old";
/// Keys of `-cpu` that are no features.
const SWITCHES: &[&str] =
    &["enforce", "check", "kvm", "migratable", "host-phys-bits", "l3-cache", "pmu"];

/// A model by its name.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Host,
    Named(&'static models::Model),
}

/// Everything that decides what a guest's CPUID says.
struct Plan {
    kind: Kind,
    /// What the guest gets.
    features: FeatureSet,
    /// What was asked for and is not supported here.
    missing: Vec<Feature>,
    switches: BTreeMap<String, bool>,
}

impl Plan {
    fn switch(&self, name: &str, default: bool) -> bool {
        self.switches.get(name).copied().unwrap_or(default)
    }
}

/// The names that [`build`] takes as models, `host` and `max` first.
pub fn models() -> Vec<&'static str> {
    [HOST, MAX].into_iter().chain(models::all().iter().map(|m| m.name)).collect()
}

/// The register of `host` that holds `word`.
fn host_word(host: &[CpuidEntry], word: Word) -> u32 {
    let found = host.iter().find(|e| e.function == word.leaf && e.index == word.index);
    found.map_or(0, |e| match word.reg {
        features::Reg::Eax => e.eax,
        features::Reg::Ebx => e.ebx,
        features::Reg::Ecx => e.ecx,
        features::Reg::Edx => e.edx,
    })
}

/// What a guest could have on this host.
fn supported(host: &[CpuidEntry]) -> FeatureSet {
    let mut set = FeatureSet::default();
    for word in features::words() {
        set.set_word(word, host_word(host, word));
    }
    for f in NEVER.split_whitespace().filter_map(features::find) {
        set.set(f, false);
    }
    // Only bits that have a name: an unknown feature may have state that nobody saves.
    let mut named = FeatureSet::default();
    for f in features::all().filter(|f| set.has(*f)) {
        named.set(f, true);
    }
    named
}

fn lookup(model: &str) -> Result<Kind, Error> {
    if [HOST, MAX].iter().any(|n| n.eq_ignore_ascii_case(model)) {
        return Ok(Kind::Host);
    }
    models::find(model).map(Kind::Named).ok_or_else(|| {
        let nearest = nearest(model, self::models().into_iter());
        Error::Model { name: model.into(), nearest }
    })
}

fn plan(host: &[CpuidEntry], model: &str, wanted: &BTreeMap<String, bool>) -> Result<Plan, Error> {
    let kind = lookup(model)?;
    let supported = supported(host);
    let mut features = match kind {
        Kind::Host => {
            let mut set = supported.clone();
            for f in ONLY_ON_REQUEST.split_whitespace().filter_map(features::find) {
                set.set(f, false);
            }
            set
        }
        Kind::Named(m) => {
            let mut set = m.features();
            set.apply(KVM_DEFAULTS);
            for f in QUIET.split_whitespace().filter_map(features::find) {
                set.set(f, supported.has(f));
            }
            set
        }
    };
    let mut switches = BTreeMap::new();
    for (name, on) in wanted {
        let canonical = name.to_ascii_lowercase().replace('_', "-");
        if SWITCHES.contains(&canonical.as_str()) {
            switches.insert(canonical, *on);
            continue;
        }
        let f = features::find(name).ok_or_else(|| {
            let names = features::all().map(|f| f.name).chain(SWITCHES.iter().copied());
            Error::Feature { name: name.clone(), nearest: nearest(name, names) }
        })?;
        if *on && REFUSED.split_whitespace().any(|r| r == f.name) {
            return Err(Error::NotMigratable(f.name.into()));
        }
        features.set(f, *on);
    }
    let missing: Vec<_> =
        features::all().filter(|f| features.has(*f) && !supported.has(*f)).collect();
    for f in &missing {
        features.set(*f, false);
    }
    xsave::drop_orphans(&mut features);
    Ok(Plan { kind, features, missing, switches })
}

/// The features that `model` with `wanted` has and this host does not support, as QEMU prints
/// them (`CPUID.07H:EBX.avx2 [bit 5]`): [`build`] leaves them out.
pub fn missing(
    host: &[CpuidEntry],
    model: &str,
    wanted: &BTreeMap<String, bool>,
) -> Result<Vec<String>, Error> {
    Ok(plan(host, model, wanted)?.missing.iter().map(Feature::describe).collect())
}

/// The CPUID table of vCPU `vcpu`.
///
/// `host` is what KVM supports here ([`Vm::supported_cpuid`](crate::Vm::supported_cpuid));
/// `model` one of [`models`]; `wanted` features by QEMU's names, and of `-cpu`'s other switches
/// `enforce`, `check`, `kvm`, `migratable`, `host-phys-bits`, `l3-cache`, `pmu`.
///
/// # Errors
/// Unknown names, with the nearest known one; features whose state cannot move; with `enforce`,
/// features that the host lacks.
pub fn build(
    host: &[CpuidEntry],
    model: &str,
    wanted: &BTreeMap<String, bool>,
    topo: &Topology,
    vcpu: u32,
) -> Result<Vec<CpuidEntry>, Error> {
    if !topo.is_sound() {
        return Err(Error::Topology(*topo));
    }
    let plan = plan(host, model, wanted)?;
    if plan.switch("enforce", false) && !plan.missing.is_empty() {
        return Err(Error::Missing(plan.missing.iter().map(Feature::describe).collect()));
    }
    Ok(leaves::table(host, &plan, topo, vcpu))
}

/// The name nearest to `name` by edit distance, if it is near at all.
fn nearest(name: &str, names: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    let name: String = name.chars().take(64).collect::<String>().to_ascii_lowercase();
    let best = names.map(|n| (distance(&name, &n.to_ascii_lowercase()), n)).min()?;
    (best.0 <= name.len().div_ceil(3)).then_some(best.1)
}

fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests;
