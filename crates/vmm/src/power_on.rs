//! The state of power-on, without firmware: what is in memory and registers when vCPU 0 starts.
//! The same is done again at every reset.

use std::sync::Arc;
use std::thread::JoinHandle;

use hv::{BootEntry, Vm};
use mem::GuestMemory;
use parking_lot::Mutex;
use state::Section;

use crate::acpi::{self, AcpiSpec};
use crate::boot::Files;
use crate::layout;
use crate::vcpus::Vcpus;

/// Brings memory, irqchip and vCPUs to power-on.
pub struct PowerOn {
    files: Arc<Files>,
    vm: Arc<dyn Vm>,
    mem: GuestMemory,
    tables: Vec<u8>,
    /// State of the irqchip and of each vCPU before anything ran.
    irqchip: Section,
    vcpus: Vec<Section>,
    /// The first load, which goes on while the machine is put together.
    first: Mutex<Option<Loading>>,
}

type Loading = JoinHandle<Result<BootEntry, String>>;

impl PowerOn {
    /// Remembers the state before anything ran, and checks that there is something to boot.
    pub fn new(
        spec: &spec::Machine,
        vm: Arc<dyn Vm>,
        mem: GuestMemory,
        vcpus: &Vcpus,
        apic_ids: Vec<u32>,
        serials: Vec<u8>,
        pcie: bool,
    ) -> Result<Self, String> {
        let files = Arc::new(Files::open(spec).map_err(text)?);
        let first = match spec.process.incoming {
            Some(_) => None,
            None => Some(load_aside(mem.clone(), files.clone())?),
        };
        let numa_ram = numa_ram(spec);
        let numa_cpus = numa_cpus(spec);
        let tables = acpi::build(&AcpiSpec {
            apic_ids: &apic_ids,
            pcie,
            buses: buses(spec),
            mmio64: (layout::mmio64(spec.memory), layout::PCI_MMIO64_SIZE),
            serials: &serials,
            intx_gsi: |slot, pin| devices::pci::intx_gsi(slot, pin + 1),
            numa_ram: &numa_ram,
            numa_cpus: &numa_cpus,
        })?;
        let sections = vcpus.with_all(|i, vcpu| vcpu.save(&format!("vcpu.{i}")));
        let sections = sections.into_iter().collect::<state::Result<_>>().map_err(text)?;
        let irqchip = vm.save_irqchip("irqchip").map_err(text)?;
        let first = Mutex::new(first);
        Ok(Self { files, vm, mem, tables, irqchip, vcpus: sections, first })
    }

    /// Does it. vCPUs stand still.
    ///
    /// # Errors
    /// Sentences, most often on what the kernel or initrd file has in it.
    pub fn run(&self, vcpus: &Vcpus) -> Result<(), String> {
        self.mem.write(layout::ACPI_TABLES, &self.tables).map_err(text)?;
        let entry = match self.first.lock().take() {
            Some(loading) => loading.join().map_err(|_| "the kernel's loader failed")??,
            None => load(&self.mem, &self.files)?,
        };
        self.files.load_bytes(&self.mem).map_err(text)?;
        // What the kernel's loader wrote past our own accessors is dirty too.
        self.mem.mark_dirty(0, self.mem.regions().first().map_or(0, |r| r.size));
        self.vm.restore_irqchip(&self.irqchip).map_err(text)?;
        let sections = self.vcpus.clone();
        let results = vcpus.with_all(move |i, vcpu| -> Result<(), String> {
            vcpu.restore(&sections[i]).map_err(text)?;
            vcpu.set_boot((i == 0).then_some(entry)).map_err(text)
        });
        results.into_iter().collect()
    }
}

fn load(mem: &GuestMemory, files: &Files) -> Result<BootEntry, String> {
    files.load(mem, layout::ACPI_TABLES).map_err(text)
}

/// Loads kernel and initrd in a thread: tens of milliseconds, in which vCPUs are made.
fn load_aside(mem: GuestMemory, files: Arc<Files>) -> Result<Loading, String> {
    let thread = std::thread::Builder::new().name("boot-load".into());
    thread.spawn(move || load(&mem, &files)).map_err(|e| format!("thread boot-load: {e}"))
}

/// PCI buses of the guest: the root bus, and for each root port its own and one for a bridge that is
/// plugged in there. No more, as a Linux guest reads the slots of all of them one by one at boot.
fn buses(spec: &spec::Machine) -> u16 {
    let is_port = |d: &&spec::Device| matches!(d.kind, spec::DeviceKind::PcieRootPort { .. });
    let ports = spec.devices.iter().filter(is_port).count();
    u16::try_from(1 + 2 * ports).unwrap_or(256).min(256)
}

/// RAM by node: (first address, bytes, node). Nodes take RAM in ascending order.
fn numa_ram(spec: &spec::Machine) -> Vec<(u64, u64, u32)> {
    let mut all = Vec::new();
    let mut regions = layout::ram(spec.memory).into_iter();
    let Some(mut region) = regions.next() else { return all };
    for node in &spec.numa {
        let backend = node.memdev.as_ref();
        let backend = backend.and_then(|id| spec.memory_backends.iter().find(|b| b.id == *id));
        let mut left = backend.map_or(node.size, |b| b.size);
        while left > 0 {
            let take = left.min(region.size);
            if take > 0 {
                all.push((region.gpa, take, node.id));
            }
            region.gpa += take;
            region.size -= take;
            left -= take;
            if region.size == 0 {
                match regions.next() {
                    Some(next) => region = next,
                    None => return all,
                }
            }
        }
    }
    all
}

/// Node of each vCPU; vCPUs that no node names are on the first.
fn numa_cpus(spec: &spec::Machine) -> Vec<u32> {
    let node_of = |cpu: u32| spec.numa.iter().find(|n| n.cpus.contains(&cpu)).map_or(0, |n| n.id);
    (0..spec.smp.cpus).map(node_of).collect()
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}
