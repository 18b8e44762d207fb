//! The machine as a migration sees it: [`migrate::Endpoint`] over [`Machine`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use devices::pci::PciDevice;
use hv::cpu::features::{self, Reg};
use mem::{DirtySource, GuestMemory};
use migrate::endpoint::{DeviceSpec, Preamble};
use migrate::{Endpoint, LateFrame};
use state::Sections;

use crate::assemble::device_name;
use crate::layout;
use crate::machine::Machine;
use crate::runstate::RunState;
use crate::vcpus::Request;

/// The machine at one end of a migration.
pub struct MachineEndpoint(pub Arc<Machine>);

impl Endpoint for MachineEndpoint {
    fn preamble(&self) -> Result<Preamble, String> {
        let parts = &self.0.parts;
        let kind = match parts.spec.machine_type {
            spec::MachineType::Q35 => "q35",
            spec::MachineType::Pc => "pc",
            spec::MachineType::None => "none",
        };
        let cpuid =
            parts.cpuid.iter().map(|e| (e.function, e.index, e.eax, e.ebx, e.ecx, e.edx)).collect();
        let devices = self.0.manifest().into_iter().map(|(name, kind, version)| {
            let properties = self.properties(&name);
            DeviceSpec { name, kind: kind.into(), version, reads: vec![version], properties }
        });
        Ok(Preamble {
            machine: format!("{kind}-{}", layout::MACHINE_VERSION),
            cpu_model: parts.spec.cpu.model.clone(),
            cpuid,
            vcpus: parts.vcpus.len() as u32,
            ram: parts.mem.regions().iter().map(|r| (r.gpa, r.size)).collect(),
            devices: devices.collect(),
            topology: Some(topology(&parts.spec.smp)),
            numa: Some(numa(&parts.spec.numa)),
        })
    }

    fn differences(&self, remote: &Preamble) -> Vec<String> {
        match self.preamble() {
            Ok(ours) => differences(remote, &ours),
            Err(e) => vec![e],
        }
    }

    fn blockers(&self) -> Vec<String> {
        let mut all = self.0.blockers();
        match self.0.state() {
            RunState::Inmigrate => all.push("an incoming migration is under way here".into()),
            _ if self.0.is_undecided() => all.push(
                "it is not known whether the guest runs at the destination of the last migration \
                 (see query-migrate); only if it does not, let it go on here with cont first"
                    .into(),
            ),
            RunState::Postmigrate => all.push("the guest was handed over already".into()),
            RunState::InternalError => {
                all.push("the machine stopped with an internal error; reset it first".into());
            }
            _ => {}
        }
        all
    }

    fn memory(&self) -> GuestMemory {
        self.0.parts.mem.clone()
    }

    fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>> {
        self.0.dirty_sources()
    }

    fn is_running(&self) -> bool {
        self.0.state() == RunState::Running
    }

    fn quiesce(&self, deadline: Instant) -> Result<(), String> {
        self.0.quiesce_for_migration(deadline)
    }

    fn save(&self) -> Result<Sections, String> {
        self.0.save()
    }

    fn release_locks(&self) -> Result<(), String> {
        self.0.release_locks()
    }

    fn resume(&self) -> Result<(), String> {
        self.0.resume_after_migration()
    }

    fn handed_over(&self) {
        self.0.handed_over();
    }

    fn undecided(&self) {
        self.0.undecided();
    }

    fn prepare(&self) -> Result<(), String> {
        self.0.rehearse()
    }

    fn load(&self, sections: Sections) -> Result<(), String> {
        self.0.load(sections)
    }

    fn acquire_locks(&self) -> Result<(), String> {
        self.0.acquire_locks()
    }

    fn run_held(&self) -> Result<(), String> {
        self.0.run_held();
        Ok(())
    }

    fn release_output(&self) {
        self.0.release_output();
    }

    fn late_frames(&self) -> Option<(Vec<LateFrame>, bool)> {
        self.0.late_frames()
    }

    fn deliver_late(&self, frames: Vec<LateFrame>) {
        self.0.deliver_late(frames);
    }

    fn discard(&self) {
        // As QEMU: a destination whose migration failed has nothing left to do.
        let _ = self.0.parts.requests.send(Request::Quit(1));
    }
}

impl MachineEndpoint {
    /// What must be equal at both ends, of the device whose section is called `unit`.
    fn properties(&self, unit: &str) -> Vec<(String, String)> {
        let parts = &self.0.parts;
        let mut all = Vec::new();
        if let Some(place) = parts.pci.place(unit) {
            all.push(("address".into(), place));
        }
        if let Some(v) = parts.virtio.iter().find(|v| v.name() == unit) {
            let info = v.describe();
            let sizes: Vec<_> = info.queues.iter().map(|q| q.offered.to_string()).collect();
            all.push((FEATURES.into(), format!("{:#x}", info.offered)));
            all.push(("queues".into(), sizes.len().to_string()));
            all.push(("queue sizes".into(), sizes.join(",")));
            all.push(("MSI-X vectors".into(), info.vectors.to_string()));
        }
        if let Some(disk) = parts.disks.iter().find(|d| d.device_name() == unit) {
            all.push(("disk size in sectors".into(), disk.sectors().to_string()));
        }
        let mut devices = parts.spec.devices.iter().enumerate();
        if let Some((_, device)) = devices.find(|(i, d)| device_name(*i, d) == unit) {
            all.extend(configured(device));
        }
        all
    }
}

/// Options of the device that the guest sees and that its other properties do not tell.
fn configured(device: &spec::Device) -> Vec<(String, String)> {
    let mut all = Vec::new();
    let mut add = |name: &str, value: String| all.push((name.to_owned(), value));
    let on_off = |on: bool| if on { "on" } else { "off" }.to_owned();
    match &device.kind {
        spec::DeviceKind::IsaSerial { .. } => return all,
        spec::DeviceKind::PcieRootPort { port, chassis, slot } => {
            add("port", port.to_string());
            add("chassis", chassis.to_string());
            add("slot", slot.unwrap_or(u16::from(*chassis)).to_string());
        }
        spec::DeviceKind::VirtioBlk(blk) => add("serial", format!("'{}'", blk.serial)),
        spec::DeviceKind::VirtioNet(net) => {
            let bytes: Vec<_> = net.mac.iter().map(|b| format!("{b:02x}")).collect();
            add("mac", bytes.join(":"));
        }
        spec::DeviceKind::VirtioRng { .. } => {}
    }
    add("multifunction", on_off(device.multifunction));
    all
}

/// One sentence a difference; `theirs` is the source, `ours` the destination.
fn differences(theirs: &Preamble, ours: &Preamble) -> Vec<String> {
    let mut all = Vec::new();
    let mut differ = |what: &str, source: String, here: String| {
        if source != here {
            all.push(format!("{what}: the source has {source}, the destination {here}"));
        }
    };
    differ("machine type", theirs.machine.clone(), ours.machine.clone());
    differ("CPU model", theirs.cpu_model.clone(), ours.cpu_model.clone());
    differ("number of vCPUs", theirs.vcpus.to_string(), ours.vcpus.to_string());
    differ("memory", ram_text(theirs), ram_text(ours));
    let count_differs = theirs.vcpus != ours.vcpus;
    let mut told = count_differs;
    if let (false, Some(source), Some(here)) = (count_differs, &theirs.topology, &ours.topology) {
        differ("arrangement of the vCPUs (-smp)", source.clone(), here.clone());
        told = source != here;
    }
    if let (Some(source), Some(here)) = (&theirs.numa, &ours.numa) {
        differ("NUMA nodes (-numa)", source.clone(), here.clone());
    }
    // What CPUID says of what is told already would hide what else differs.
    all.extend(cpuid_differences(&theirs.cpuid, &ours.cpuid, told));
    all.extend(device_differences(&theirs.devices, &ours.devices));
    all
}

fn ram_text(p: &Preamble) -> String {
    let total: u64 = p.ram.iter().map(|(_, size)| size).fold(0, |a, s| a.saturating_add(*s));
    let parts: Vec<_> =
        p.ram.iter().map(|(at, size)| format!("{} KiB at {at:#x}", size >> 10)).collect();
    format!("{} MiB ({})", total >> 20, parts.join(", "))
}

fn topology(smp: &spec::Smp) -> String {
    let spec::Smp { sockets, dies, cores, threads, .. } = smp;
    format!("sockets={sockets},dies={dies},cores={cores},threads={threads}")
}

fn numa(nodes: &[spec::NumaNode]) -> String {
    let text = |node: &spec::NumaNode| {
        let cpus: Vec<_> = node.cpus.iter().map(u32::to_string).collect();
        let (id, cpus, size) = (node.id, cpus.join(","), node.size >> 20);
        format!("node {id} (vCPUs {cpus}; {size} MiB)")
    };
    let all: Vec<_> = nodes.iter().map(text).collect();
    if all.is_empty() { "none".into() } else { all.join(", ") }
}

type CpuidRow = (u32, u32, u32, u32, u32, u32);

/// The bits of a leaf's eax, ebx, ecx and edx that follow from how many vCPUs there are (SDM and
/// APM, CPUID: logical processors, cache sharing, extended topology, APIC id sizes).
fn bits_of_vcpu_count(function: u32) -> [u32; 4] {
    match function {
        // How many logical processors, and the flag that there are several.
        1 => [0, 0x00ff_0000, 0, 1 << 28],
        4 => [0xffff_c000, 0, 0, 0],
        0xb | 0x1f => [u32::MAX; 4],
        // CmpLegacy.
        0x8000_0001 => [0, 0, 1 << 1, 0],
        0x8000_0008 => [0, 0, 0xffff, 0],
        0x8000_001d => [0x03ff_c000, 0, 0, 0],
        0x8000_001e => [0, u32::MAX, u32::MAX, 0],
        _ => [0; 4],
    }
}

/// A CPUID row's registers, in its order.
const REGISTERS: [(Reg, &str); 4] =
    [(Reg::Eax, "eax"), (Reg::Ebx, "ebx"), (Reg::Ecx, "ecx"), (Reg::Edx, "edx")];

/// `told`: that number or arrangement of the vCPUs differ is told already.
fn cpuid_differences(theirs: &[CpuidRow], ours: &[CpuidRow], told: bool) -> Vec<String> {
    let table = |rows: &[CpuidRow]| -> BTreeMap<(u32, u32), [u32; 4]> {
        rows.iter().map(|r| ((r.0, r.1), [r.2, r.3, r.4, r.5])).collect()
    };
    let (theirs, ours) = (table(theirs), table(ours));
    let keys: std::collections::BTreeSet<_> = theirs.keys().chain(ours.keys()).collect();
    let (mut more, mut less) = (Vec::new(), Vec::new());
    let mut all = Vec::new();
    for &&(function, index) in &keys {
        let (a, b) = (theirs.get(&(function, index)), ours.get(&(function, index)));
        let (a, b) = (a.copied().unwrap_or_default(), b.copied().unwrap_or_default());
        for (i, (_, register)) in REGISTERS.into_iter().enumerate() {
            let covered = if told { bits_of_vcpu_count(function)[i] } else { 0 };
            let mut differs = (a[i] ^ b[i]) & !covered;
            for f in features::all().filter(|f| {
                (f.word.leaf, f.word.index) == (function, index) && f.word.reg == REGISTERS[i].0
            }) {
                if differs & (1 << f.bit) != 0 {
                    differs &= !(1 << f.bit);
                    let list = if a[i] & (1 << f.bit) != 0 { &mut more } else { &mut less };
                    list.push(format!("+{}", f.name));
                }
            }
            if differs != 0 {
                all.push(format!(
                    "CPU features (CPUID {function:#x}.{index} {register}): the source has \
                     {:#010x}, the destination {:#010x}",
                    a[i], b[i]
                ));
            }
        }
    }
    let only = [("the source's", more), ("the destination's", less)];
    let named = only.into_iter().filter(|(_, names)| !names.is_empty()).map(|(whose, names)| {
        let names = names.join(",");
        format!("CPU features: only {whose} CPU has {names}; give both the same -cpu")
    });
    all.splice(0..0, named);
    const SHOWN: usize = 8;
    if all.len() > SHOWN {
        let more = all.len() - SHOWN;
        all.truncate(SHOWN);
        all.push(format!("CPU features: {more} more CPUID registers differ"));
    }
    all
}

/// The property with the feature bits that a virtio device offers.
const FEATURES: &str = "features";

/// "0x1f" as a number.
fn word(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// Which switches of the device only one side has on.
fn feature_differences(device: &DeviceSpec, theirs: u64, ours: u64) -> Vec<String> {
    let only = [("source", theirs & !ours), ("destination", ours & !theirs)];
    let told = only.into_iter().filter(|(_, bits)| *bits != 0).map(|(side, bits)| {
        let names = crate::features::names(&device.kind, bits);
        format!("device {}, features: only the {side} has {names}", device.name)
    });
    told.collect()
}

fn device_differences(theirs: &[DeviceSpec], ours: &[DeviceSpec]) -> Vec<String> {
    let mut all = Vec::new();
    for their in theirs {
        let Some(our) = ours.iter().find(|d| d.name == their.name) else {
            all.push(format!("device {} ({}): only the source has it", their.name, their.kind));
            continue;
        };
        if our.kind != their.kind {
            all.push(format!(
                "device {}: the source has a {}, the destination a {}",
                their.name, their.kind, our.kind
            ));
        } else if !our.reads.contains(&their.version) {
            all.push(format!(
                "device {}: the source writes version {} of its state, the destination reads {:?}",
                their.name, their.version, our.reads
            ));
        }
        for (name, value) in &their.properties {
            match our.properties.iter().find(|(n, _)| n == name) {
                Some((_, here)) if here == value => {}
                Some((_, here)) => match (name == FEATURES, word(value), word(here)) {
                    (true, Some(a), Some(b)) if a != b => {
                        all.extend(feature_differences(their, a, b));
                    }
                    _ => all.push(format!(
                        "device {}, {name}: the source has {value}, the destination {here}",
                        their.name
                    )),
                },
                None => all.push(format!(
                    "device {}, {name}: the source has {value}, the destination does not know it",
                    their.name
                )),
            }
        }
    }
    for our in ours.iter().filter(|d| theirs.iter().all(|t| t.name != d.name)) {
        all.push(format!("device {} ({}): only the destination has it", our.name, our.kind));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_that_only_one_cpu_has_are_told_by_name() {
        let row = |ebx| [(7, 0, 0, ebx, 0, 0)];
        let told = cpuid_differences(&row(1 << 5 | 1 << 3), &row(1 << 7), false);
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].contains("only the source's CPU has +bmi1,+avx2;"), "{told:?}");
        assert!(told[1].contains("only the destination's CPU has +smep;"), "{told:?}");
    }

    fn preamble() -> Preamble {
        let device = |name: &str| DeviceSpec {
            name: name.into(),
            kind: "virtio-net".into(),
            version: 1,
            reads: vec![1],
            properties: vec![("address".into(), "00:02.0".into())],
        };
        Preamble {
            machine: "q35-1".into(),
            cpu_model: "host".into(),
            cpuid: vec![(1, 0, 1, 2, 3, 4)],
            vcpus: 2,
            ram: vec![(0, 256 << 20)],
            devices: vec![device("net0"), device("net1")],
            topology: None,
            numa: None,
        }
    }

    #[test]
    fn equal_machines_do_not_differ() {
        assert!(differences(&preamble(), &preamble()).is_empty());
    }

    /// CPUID tables as machines of one and of more vCPUs really have them.
    #[test]
    fn another_number_of_vcpus_is_one_difference() {
        use hv::{KvmVm, Vm};
        let host = match KvmVm::new(std::path::Path::new(hv::kvm::DEFAULT_PATH)) {
            Ok(vm) => vm.supported_cpuid().unwrap(),
            Err(e) => {
                eprintln!("skipped: {e}");
                return;
            }
        };
        let of = |model: &str, (sockets, cores, threads): (u32, u32, u32)| {
            let arranged = hv::cpu::Topology { sockets, dies: 1, cores, threads };
            let table = hv::cpu::build(&host, model, &BTreeMap::new(), &arranged, 0).unwrap();
            let rows = table.iter().map(|e| (e.function, e.index, e.eax, e.ebx, e.ecx, e.edx));
            let vcpus = sockets * cores * threads;
            let smp = spec::Smp { cpus: vcpus, max_cpus: vcpus, sockets, dies: 1, cores, threads };
            let topology = Some(topology(&smp));
            Preamble { cpuid: rows.collect(), vcpus, topology, ..preamble() }
        };
        for model in ["host", "EPYC-Rome", "Skylake-Server"] {
            for topology in [(4, 1, 1), (1, 4, 1), (2, 4, 2)] {
                let all = differences(&of(model, (1, 1, 1)), &of(model, topology));
                let [only] = &all[..] else { panic!("{model} {topology:?}: {all:?}") };
                assert!(only.starts_with("number of vCPUs: the source has 1"), "{only}");
            }
            // Another difference is told all the same, and so is another topology of as many.
            let mut fewer = of(model, (2, 1, 1));
            fewer.cpuid.iter_mut().filter(|r| r.0 == 1).for_each(|r| r.4 ^= 1);
            assert_eq!(differences(&of(model, (1, 1, 1)), &fewer).len(), 2, "{model}");
            let all = differences(&of(model, (1, 4, 1)), &of(model, (1, 1, 4)));
            let [only] = &all[..] else { panic!("{model}: {all:?}") };
            let expected =
                "arrangement of the vCPUs (-smp): the source has sockets=1,dies=1,cores=4";
            assert!(only.starts_with(expected), "{only}");
        }
    }

    #[test]
    fn each_difference_is_a_sentence_that_names_both_sides() {
        let mut ours = preamble();
        ours.ram = vec![(0, 512 << 20)];
        ours.vcpus = 4;
        ours.cpuid[0].4 = 7;
        ours.devices[0].properties[0].1 = "00:03.0".into();
        ours.devices[0].properties.push((FEATURES.into(), "0x3".into()));
        ours.devices[1].name = "net7".into();
        let mut theirs = preamble();
        theirs.devices[0].properties.push((FEATURES.into(), "0x1".into()));
        let all = differences(&theirs, &ours);
        for part in [
            "number of vCPUs: the source has 2, the destination 4",
            "memory: the source has 256 MiB",
            "only the destination's CPU has +dtes64",
            "device net0, address: the source has 00:02.0, the destination 00:03.0",
            "device net0, features: only the destination has guest_csum",
            "device net1 (virtio-net): only the source has it",
            "device net7 (virtio-net): only the destination has it",
        ] {
            assert!(all.iter().any(|s| s.contains(part)), "{part} in {all:?}");
        }
        assert_eq!(all.len(), 7);
    }
}
