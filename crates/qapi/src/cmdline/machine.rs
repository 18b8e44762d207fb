//! `-machine`, `-accel`, `-cpu`, `-smp`, `-m`, `-numa`.

use spec::{Cpu, MachineType, NumaNode, Smp};

use super::keys::Kind::{Id, List, Number, OneOf, Size, Switch, SwitchOrAuto, Text};
use super::keys::{Schema, key};
use super::keyval::Opts;
use super::suggest::hint;
use super::value;
use super::{Builder, CmdlineError, Stop, Taken, invalid};

/// vCPUs that a machine can have.
pub const MAX_CPUS: u64 = 255;
/// Bytes of RAM that a machine can have (below the smallest physical address width in use).
const MAX_MEMORY: u64 = 1 << 45;

/// `-cpu` properties that would change what a guest sees, and that cannot be set.
const CPU_FIXED: [&str; 14] = [
    "family",
    "host-cache-info",
    "host-phys-bits-limit",
    "hv-passthrough",
    "level",
    "min-level",
    "min-xlevel",
    "model",
    "model-id",
    "phys-bits",
    "stepping",
    "tsc-frequency",
    "vendor",
    "xlevel",
];

const NO_PART: &str = "the machine has no such part";
const THERE: &str = "it cannot be switched off";

/// `-machine`.
const MACHINE: Schema = Schema::of(
    None,
    &[&[
        key("type", Text, "q35", "Machine type; -machine help lists them"),
        key("accel", Text, "kvm", "Accelerators, joined by colons; kvm must be among them"),
        key("memory-backend", Id, "", "id of the -object memory-backend-* that is the RAM"),
        key("usb", Switch, "off", "USB controller").ignored(NO_PART),
        key("hpet", Switch, "off", "HPET timer").ignored(NO_PART),
        key("smm", SwitchOrAuto, "off", "System management mode").ignored(NO_PART),
        key("nvdimm", Switch, "off", "NVDIMM").ignored(NO_PART),
        key("hmat", Switch, "off", "ACPI HMAT").ignored(NO_PART),
        key("graphics", Switch, "off", "Display").ignored(NO_PART),
        key("vmport", SwitchOrAuto, "off", "VMware's I/O port").ignored(NO_PART),
        key("acpi", SwitchOrAuto, "on", "ACPI tables").only(&["on", "auto"], THERE),
        key("pit", SwitchOrAuto, "on", "8254 timer").only(&["on", "auto"], THERE),
        key("pic", SwitchOrAuto, "on", "8259 interrupt controller").only(&["on", "auto"], THERE),
        key("i8042", SwitchOrAuto, "on", "Keyboard controller, for resets")
            .only(&["on", "auto"], THERE),
        key("kernel_irqchip", OneOf(IRQCHIPS), "on", "Interrupt controllers in the kernel")
            .only(&["on"], "the others are not available"),
        key("kernel-irqchip", OneOf(IRQCHIPS), "on", "The same")
            .only(&["on"], "the others are not available"),
        key("dump-guest-core", Switch, "on", "Guest memory is part of core dumps").quiet(),
        key("mem-merge", Switch, "on", "Equal pages may be merged").quiet(),
        key("sata", Switch, "", "SATA controller; there is none").quiet(),
    ]],
);

const IRQCHIPS: &[&str] = &["on", "off", "split"];
const NOTHING: &str = "it changes nothing here";

/// `-accel kvm`.
const ACCEL: Schema = Schema {
    name: "kvm",
    implied: None,
    keys: &[&[
        key("kernel-irqchip", OneOf(IRQCHIPS), "on", "Interrupt controllers in the kernel")
            .only(&["on"], "the others are not available"),
        key("thread", Text, "", "Threads of TCG").ignored(NOTHING),
        key("tb-size", Text, "", "Cache of TCG").ignored(NOTHING),
        key("dirty-ring-size", Number(0, 0xffff_ffff), "0", "KVM's dirty ring")
            .ignored("dirty pages are found by the dirty log"),
        key("eager-split-size", Size(1), "0", "Splitting of huge pages").ignored(NOTHING),
    ]],
};

/// Counts of `-smp`; 0 is refused with a sentence of its own.
const SMP: Schema = Schema::of(
    Some("cpus"),
    &[&[
        key(
            "cpus",
            Number(0, 1 << 16),
            "",
            "vCPUs, 1 to 255; by default what the others give, or 1",
        ),
        key(
            "maxcpus",
            Number(0, 1 << 16),
            "",
            "vCPUs that there can be: as many as cpus, there is no hotplug",
        ),
        key("sockets", Number(0, 1 << 16), "", "Sockets"),
        key("dies", Number(0, 1 << 16), "", "Dies in a socket; by default 1"),
        key("clusters", Number(0, 1 << 16), "", "Clusters in a die; only 1"),
        key("cores", Number(0, 1 << 16), "", "Cores in a die"),
        key("threads", Number(0, 1 << 16), "", "Threads in a core"),
    ]],
);

const MEMORY: Schema = Schema::of(
    Some("size"),
    &[&[
        key("size", Size(1 << 20), "128M", "RAM"),
        key("slots", Number(0, 256), "", "Slots for memory hotplug, of which there is none"),
        key("maxmem", Size(1 << 20), "", "Most RAM with memory hotplug"),
    ]],
);

const NUMA: Schema = Schema::of(
    Some("type"),
    &[&[
        key("type", OneOf(&["node"]), "", "Distances and caches are not available; must be given"),
        key("nodeid", Number(0, 127), "", "Number of the node; by default the next"),
        key("cpus", List, "", "vCPUs of the node, such as 0-3; may be given several times"),
        key("memdev", Id, "", "id of the -object memory-backend-* that is its memory"),
        key("mem", Size(1 << 20), "", "Its memory, when there is no memdev"),
    ]],
);

const MACHINES: [&str; 3] = ["q35", "pc", "none"];

impl Builder {
    pub(super) fn machine_option(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, Some("type"))?;
        if o.is("type", "help") {
            return Err(Stop::Print(machine_help()));
        }
        self.adopt(&mut o, &MACHINE)?;
        if let Some(name) = o.str("type") {
            self.machine.machine_type = machine_type(&name).ok_or_else(|| {
                let near = hint(&name, MACHINES.into_iter(), "");
                o.error(format!(
                    "machine type '{name}' is not supported{near} ({option} help lists what is)"
                ))
            })?;
        }
        if let Some(list) = o.str("accel") {
            self.accels.extend(list.split(':').map(str::to_string));
        }
        if let Some(id) = o.str("memory-backend") {
            self.machine.memory_backend = Some(id);
        }
        Ok(o.finish()?)
    }

    pub(super) fn accel(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, Some("accel"))?;
        let names = o.required("accel")?;
        if matches!(names.as_str(), "help" | "?") {
            return Err(Stop::Print("Accelerators supported:\nkvm\n".into()));
        }
        self.adopt(&mut o, &ACCEL)?;
        self.accels.extend(names.split(':').map(str::to_string));
        Ok(o.finish()?)
    }

    pub(super) fn cpu(&mut self, option: &str, text: &str) -> Taken {
        let mut words = text.split(',');
        let model = words.next().unwrap_or_default();
        if matches!(model, "help" | "?") {
            return Err(Stop::CpuHelp);
        }
        if model.is_empty() {
            return Err(invalid(option, "the CPU model is missing; use 'host'"));
        }
        let mut cpu = Cpu { model: model.into(), ..Cpu::default() };
        for word in words {
            if word.is_empty() {
                return Err(invalid(option, "an empty feature name"));
            }
            let (name, on) = match (word.strip_prefix('+'), word.strip_prefix('-')) {
                (Some(name), _) => (name, Some(true)),
                (_, Some(name)) => (name, Some(false)),
                _ => (word, None),
            };
            let (name, text) = match (on, name.split_once('=')) {
                (None, Some((name, text))) => (name, Some(text)),
                _ => (name, None),
            };
            let name = name.replace('_', "-");
            // `off` is what these are.
            let harmless = ["host-cache-info", "hv-passthrough"].contains(&name.as_str())
                && (on == Some(false) || text.is_some_and(|t| value::switch(t) == Ok(false)));
            if harmless {
                continue;
            }
            if CPU_FIXED.contains(&name.as_str()) {
                return Err(invalid(option, format!("property '{name}' cannot be set")));
            }
            let state = match (on, text) {
                (Some(on), _) => on,
                (None, None) => true,
                (None, Some(text)) => value::switch(text)
                    .map_err(|e| invalid(option, format!("parameter '{name}': {e}")))?,
            };
            match (name.as_str(), state) {
                ("pmu", true) => {
                    return Err(invalid(option, "pmu=on: its state cannot be migrated"));
                }
                ("migratable", false) => {
                    self.warn(format!("{option} migratable=off is ignored: every CPU here is"));
                }
                _ => {}
            }
            cpu.features.insert(name, state);
        }
        self.machine.cpu = cpu;
        Ok(())
    }

    pub(super) fn smp(&mut self, option: &str, text: &str) -> Taken {
        let mut o = self.opts(option, text, &SMP)?;
        let mut count = |key: &str| -> Result<Option<u32>, CmdlineError> {
            match o.number_if(key)? {
                Some(0) => Err(o.bad(key, "must be greater than zero")),
                n => Ok(n),
            }
        };
        let given = SmpGiven {
            cpus: count("cpus")?,
            max_cpus: count("maxcpus")?,
            sockets: count("sockets")?,
            dies: count("dies")?,
            clusters: count("clusters")?,
            cores: count("cores")?,
            threads: count("threads")?,
        };
        o.finish()?;
        self.machine.smp = given.resolve().map_err(|e| invalid(option, e))?;
        let Smp { cpus, max_cpus, .. } = self.machine.smp;
        if max_cpus > cpus {
            self.warn(format!(
                "{option} maxcpus={max_cpus} is ignored beyond the topology: there is no vCPU \
                 hotplug, the machine keeps its {cpus}"
            ));
        }
        Ok(())
    }

    pub(super) fn memory(&mut self, option: &str, text: &str) -> Taken {
        let mut o = self.opts(option, text, &MEMORY)?;
        match o.size("size")? {
            Some(0) => self.warn(format!(
                "{option} 0 is taken as the default, {} MiB, as QEMU does",
                spec::DEFAULT_MEMORY >> 20
            )),
            Some(size) if size > MAX_MEMORY => {
                return Err(o.bad("size", "more than 32 TiB").into());
            }
            Some(size) => {
                // As QEMU rounds.
                self.machine.memory = size.next_multiple_of(8192);
                self.memory_given = true;
            }
            None => {}
        }
        let slots: Option<u32> = o.number_if("slots")?;
        let most = o.size("maxmem")?;
        if let Some(most) = most
            && most < self.machine.memory
        {
            return Err(o.bad("maxmem", "smaller than the initial memory").into());
        }
        if slots.is_some_and(|s| s > 0) != most.is_some_and(|m| m > self.machine.memory) {
            return Err(o.error("'slots' and 'maxmem' go together").into());
        }
        if slots.is_some() {
            self.warn(format!("{option} slots=,maxmem= are ignored: there is no memory hotplug"));
        }
        Ok(o.finish()?)
    }

    pub(super) fn numa(&mut self, option: &str, text: &str) -> Taken {
        let mut o = self.opts(option, text, &NUMA)?;
        o.required("type")?;
        let next = self.machine.numa.iter().map(|n| n.id + 1).max().unwrap_or(0);
        let id = o.number_if("nodeid")?.unwrap_or(next);
        let memdev = o.str("memdev");
        let size = o.size("mem")?;
        if memdev.is_some() && size.is_some() {
            return Err(o.error("'mem' and 'memdev' exclude each other").into());
        }
        let mut cpus = Vec::new();
        for range in o.list("cpus") {
            cpus.extend(cpu_range(&range).map_err(|e| o.bad("cpus", e))?);
        }
        o.finish()?;
        if self.machine.numa.iter().any(|n| n.id == id) {
            return Err(o.bad("nodeid", format!("node {id} was given before")).into());
        }
        self.machine.numa.push(NumaNode { id, cpus, memdev, size: size.unwrap_or(0) });
        Ok(())
    }
}

/// "3" or "0-3".
fn cpu_range(text: &str) -> Result<std::ops::RangeInclusive<u32>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (value::number(first)?, value::number(last)?);
    if first > last || last >= MAX_CPUS {
        return Err(format!("'{text}' is not a range of vCPUs"));
    }
    Ok(first as u32..=last as u32)
}

fn machine_type(name: &str) -> Option<MachineType> {
    let versioned = |prefix: &str| name.strip_prefix(prefix).is_some_and(is_qemu_version);
    match name {
        "q35" => Some(MachineType::Q35),
        "pc" => Some(MachineType::Pc),
        "none" => Some(MachineType::None),
        _ if versioned("pc-q35-") => Some(MachineType::Q35),
        _ if versioned("pc-i440fx-") => Some(MachineType::Pc),
        _ => None,
    }
}

/// The most recent major version of QEMU whose machine types are taken.
const LAST_MAJOR: u32 = 11;

/// Whether QEMU had machine types of this version: "2.12", "9.0", and the one "4.0.1".
fn is_qemu_version(text: &str) -> bool {
    let numbers: Option<Vec<u32>> = text.split('.').map(|n| n.parse().ok()).collect();
    let plain = text.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    plain
        && match numbers.as_deref() {
            Some([1, minor]) => *minor <= 7,
            Some([2, minor]) => *minor <= 12,
            Some([3, minor]) => *minor <= 1,
            Some([4..=LAST_MAJOR, minor]) => *minor <= 2,
            Some(other) => *other == [4, 0, 1],
            None => false,
        }
}

fn machine_help() -> String {
    "Supported machines are:\n\
     q35                  PCI Express machine (pc-q35-X.Y, of QEMU up to 11.2, are names for it) (default)\n\
     pc                   conventional PCI machine (pc-i440fx-X.Y likewise)\n\
     none                 empty machine\n"
        .into()
}

/// `-smp` as written.
struct SmpGiven {
    cpus: Option<u32>,
    max_cpus: Option<u32>,
    sockets: Option<u32>,
    dies: Option<u32>,
    clusters: Option<u32>,
    cores: Option<u32>,
    threads: Option<u32>,
}

impl SmpGiven {
    /// Fills in what is missing as QEMU does since 6.2: cores before sockets before threads.
    fn resolve(&self) -> Result<Smp, String> {
        if self.clusters.is_some_and(|c| c != 1) {
            return Err("clusters are not supported by this machine's CPU topology".into());
        }
        let dies = u64::from(self.dies.unwrap_or(1));
        let wanted = self.max_cpus.or(self.cpus).map(u64::from);
        let [mut sockets, mut cores, mut threads] =
            [self.sockets, self.cores, self.threads].map(|n| n.map(u64::from));
        if let Some(total) = wanted {
            if cores.is_none() {
                let (s, t) = (*sockets.get_or_insert(1), *threads.get_or_insert(1));
                cores = Some(total / (s * dies * t));
            } else if sockets.is_none() {
                let t = *threads.get_or_insert(1);
                sockets = Some(total / (dies * cores.unwrap_or(1) * t));
            }
            let rest = sockets.unwrap_or(1) * dies * cores.unwrap_or(1);
            threads = threads.or(Some(total.checked_div(rest).unwrap_or(0)));
        }
        let (sockets, cores, threads) =
            (sockets.unwrap_or(1), cores.unwrap_or(1), threads.unwrap_or(1));
        let shape =
            format!("sockets ({sockets}) * dies ({dies}) * cores ({cores}) * threads ({threads})");
        let product = [dies, cores, threads]
            .iter()
            .try_fold(sockets, |product, n| product.checked_mul(*n))
            .ok_or("Invalid CPU topology: too many CPUs")?;
        let max_cpus = wanted.unwrap_or(product);
        let cpus = self.cpus.map_or(max_cpus, u64::from);
        if product != max_cpus {
            return Err(format!(
                "Invalid CPU topology: product of the hierarchy must match maxcpus: {shape} != \
                 maxcpus ({max_cpus})"
            ));
        }
        if max_cpus < cpus {
            return Err(format!(
                "Invalid CPU topology: maxcpus must be equal to or greater than smp: {shape} == \
                 maxcpus ({max_cpus}) < smp_cpus ({cpus})"
            ));
        }
        if max_cpus > MAX_CPUS {
            return Err(format!(
                "Invalid SMP CPUs {max_cpus}. The max CPUs supported by this machine is {MAX_CPUS}"
            ));
        }
        Ok(Smp {
            cpus: cpus as u32,
            max_cpus: max_cpus as u32,
            sockets: sockets as u32,
            dies: dies as u32,
            cores: cores as u32,
            threads: threads as u32,
        })
    }
}
