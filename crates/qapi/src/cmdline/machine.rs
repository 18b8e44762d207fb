//! `-machine`, `-accel`, `-cpu`, `-smp`, `-m`, `-numa`.

use spec::{Cpu, MachineType, NumaNode, Smp};

use super::keyval::{Opts, Scalar};
use super::value;
use super::{Builder, Stop, Taken, invalid};

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

impl Builder {
    pub(super) fn machine_option(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, Some("type"))?;
        if let Some(name) = o.str("type") {
            if matches!(name.as_str(), "help" | "?") {
                return Err(Stop::Print(machine_help()));
            }
            self.machine.machine_type = machine_type(&name).ok_or_else(|| {
                let known = ["q35", "pc", "none"];
                let near = super::suggest::hint(&name, known.into_iter(), "");
                o.error(format!(
                    "machine type '{name}' is not supported{near} (available: q35, pc, none; \
                     -machine help lists them)"
                ))
            })?;
        }
        if let Some(list) = o.str("accel") {
            self.accels.extend(list.split(':').map(str::to_string));
        }
        if let Some(id) = o.id("memory-backend")? {
            self.machine.memory_backend = Some(id);
        }
        for key in ["usb", "hpet", "smm", "nvdimm", "hmat", "graphics", "vmport"] {
            if o.on_off_auto(key)? == Some(true) {
                self.warn(format!("{option} {key}=on is ignored: the machine has no such part"));
            }
        }
        for key in ["acpi", "pit", "pic", "i8042"] {
            if o.on_off_auto(key)? == Some(false) {
                return Err(o.bad(key, "cannot be switched off").into());
            }
        }
        for key in ["kernel_irqchip", "kernel-irqchip"] {
            if let Some(v) = o.str(key).filter(|v| v != "on") {
                return Err(o.bad(key, format!("only 'on' is supported, not '{v}'")).into());
            }
        }
        o.bool("dump-guest-core")?;
        o.bool("mem-merge")?;
        o.bool("sata")?;
        Ok(o.finish()?)
    }

    pub(super) fn accel(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, Some("accel"))?;
        let name = o.required("accel")?;
        if matches!(name.as_str(), "help" | "?") {
            return Err(Stop::Print("Accelerators supported:\nkvm\n".into()));
        }
        self.accels.extend(name.split(':').map(str::to_string));
        if let Some(v) = o.str("kernel-irqchip").filter(|v| v != "on") {
            return Err(o
                .bad("kernel-irqchip", format!("only 'on' is supported, not '{v}'"))
                .into());
        }
        for key in o.ignore(&["thread", "tb-size", "dirty-ring-size", "eager-split-size"]) {
            self.warn(format!("{option} {key}= is ignored: it changes nothing here"));
        }
        Ok(o.finish()?)
    }

    pub(super) fn cpu(&mut self, option: &str, text: &str) -> Taken {
        let mut words = text.split(',');
        let model = words.next().unwrap_or_default();
        if matches!(model, "help" | "?") {
            return Err(Stop::Print(
                "Available CPUs:\n  host   the host's own CPU (KVM)\n  max    all that KVM offers\n\
                 Named models of QEMU are looked up when the machine starts.\n"
                    .into(),
            ));
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
        let mut o = Opts::parse(option, text, Some("cpus"))?;
        let mut count = |key: &str| -> Result<Option<u32>, super::CmdlineError> {
            let n = o.number::<u32>(key, 0, 1 << 16)?;
            match n {
                Some(0) => Err(o.error(
                    "Invalid CPU topology: CPU topology parameters must be greater than zero",
                )),
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
        if self.machine.smp.max_cpus > self.machine.smp.cpus {
            self.warn(format!("{option} maxcpus= is ignored: there is no vCPU hotplug"));
        }
        Ok(())
    }

    pub(super) fn memory(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, Some("size"))?;
        if let Some(size) = o.size("size", 1 << 20)?.filter(|s| *s != 0) {
            if size > MAX_MEMORY {
                return Err(o.bad("size", "more than 32 TiB").into());
            }
            // QEMU rounds up to 8 KiB; a page is what matters here.
            self.machine.memory = size.next_multiple_of(8192);
            self.memory_given = true;
        }
        let slots = o.number::<u32>("slots", 0, 256)?;
        let most = o.size("maxmem", 1 << 20)?;
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
        let mut o = Opts::parse(option, text, Some("type"))?;
        let kind = o.required("type")?;
        if kind != "node" {
            return Err(o.bad("type", format!("only 'node' is supported, not '{kind}'")).into());
        }
        let next = self.machine.numa.iter().map(|n| n.id + 1).max().unwrap_or(0);
        let id = o.number::<u32>("nodeid", 0, 127)?.unwrap_or(next);
        let memdev = o.id("memdev")?;
        let size = o.size("mem", 1 << 20)?;
        if memdev.is_some() && size.is_some() {
            return Err(o.error("'mem' and 'memdev' exclude each other").into());
        }
        // cpus= may be given several times, in JSON as a list.
        let mut cpus = Vec::new();
        let mut left = Vec::new();
        for (key, scalar) in o.rest() {
            match (key == "cpus" || key.starts_with("cpus."), scalar) {
                (true, Scalar::Text(s) | Scalar::Number(s)) => {
                    cpus.extend(cpu_range(&s).map_err(|e| o.bad("cpus", e))?);
                }
                _ => left.push(key),
            }
        }
        if let Some(key) = left.first() {
            return Err(o.bad(key, "is not supported").into());
        }
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
    let versioned = |prefix: &str| {
        name.strip_prefix(prefix).is_some_and(|v| {
            v.split('.').count() >= 2
                && v.split('.').all(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()))
        })
    };
    match name {
        "q35" => Some(MachineType::Q35),
        "pc" => Some(MachineType::Pc),
        "none" => Some(MachineType::None),
        _ if versioned("pc-q35-") => Some(MachineType::Q35),
        _ if versioned("pc-i440fx-") => Some(MachineType::Pc),
        _ => None,
    }
}

fn machine_help() -> String {
    "Supported machines are:\n\
     q35                  PCI Express machine (pc-q35-X.Y are names for it) (default)\n\
     pc                   conventional PCI machine (pc-i440fx-X.Y are names for it)\n\
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
