//! Puts a machine together from its description. The order in which devices are made, and so their
//! slots and their section names, is part of the machine version: it may not change.

use std::path::Path;
use std::sync::Arc;

use chardev::Chardev;
use crossbeam_channel::Sender;
use devices::acpi_pm::{self, AcpiPm};
use devices::bus::BusDevice;
use devices::chipset::{plug_pc, plug_q35};
use devices::pci::assign::Windows;
use devices::pci::root::{self, PciRoot};
use devices::pci::root_port::RootPort;
use devices::pci::{PciDevice, intx_gsi};
use devices::shared::{Shared, SharedUnit};
use devices::virtio_pci::{VirtioPci, VirtioPciConfig, VirtioPciUnit};
use hv::Vm;
use hv::kvm::KvmVm;
use mem::GuestMemory;
use qapi::EventBus;
use spec::{DeviceKind, MachineType};
use state::{Unit, UnitSet};

use crate::disks::{self, Disk};
use crate::interrupts::Interrupts;
use crate::io::IoSpace;
use crate::legacy;
use crate::machine::{Machine, Parts};
use crate::nics::Nic;
use crate::power_on::PowerOn;
use crate::vcpus::{Request, Vcpus};
use crate::{features, layout, memory};

/// Builds the machine; nothing runs yet.
///
/// # Errors
/// Sentences that name the option, the device or the file.
pub fn build(
    spec: &spec::Machine,
    chardevs: &[Arc<dyn Chardev>],
    events: &EventBus,
    requests: &Sender<Request>,
) -> Result<Arc<Machine>, String> {
    let incoming = spec.process.incoming.is_some();
    let vm: Arc<dyn Vm> = KvmVm::new(Path::new(hv::kvm::DEFAULT_PATH)).map_err(text)?;
    let mem = memory::build(spec)?;
    let ram = qapi::cmdline::value::bytes(spec.memory);
    vm.map_memory(&mem)
        .map_err(|e| format!("-m: {e}; {ram} may be too much for this host's KVM"))?;
    let interrupts = Interrupts::new(vm.clone()).map_err(text)?;
    let pcie = spec.machine_type == MachineType::Q35;
    let mut builder = Builder {
        spec,
        incoming,
        pcie,
        mem: mem.clone(),
        io: Arc::new(IoSpace::default()),
        interrupts: interrupts.clone(),
        pci: PciRoot::new(if pcie { "pcie.0" } else { "pci.0" }),
        units: Vec::new(),
        virtio: Vec::new(),
        disks: Vec::new(),
        nics: Vec::new(),
    };
    builder.pci_access()?;
    let pm = builder.chipset()?;
    let serials = legacy::add(&mut builder, chardevs)?;
    builder.devices()?;
    builder.assign()?;
    let Builder { io, pci, units, virtio, disks, nics, .. } = builder;

    let (vcpus, cpuid, apic_ids) = crate::cpus::create(spec, vm.as_ref())?;
    let vcpus = Vcpus::start(vcpus, &io, requests).map_err(|e| format!("vCPU threads: {e}"))?;
    let power_on = PowerOn::new(spec, vm.clone(), mem.clone(), &vcpus, apic_ids, serials, pcie)?;
    if !incoming {
        power_on.run(&vcpus)?;
    }
    let parts = Parts {
        spec: spec.clone(),
        vm,
        mem,
        #[cfg(test)]
        io,
        pci,
        pm,
        vcpus,
        cpuid,
        virtio,
        disks,
        nics,
        events: events.clone(),
        requests: requests.clone(),
        incoming,
        power_on,
    };
    Ok(Machine::new(parts, UnitSet::new(units)))
}

/// A machine in the making.
pub(crate) struct Builder<'a> {
    pub spec: &'a spec::Machine,
    pub incoming: bool,
    pcie: bool,
    mem: GuestMemory,
    pub io: Arc<IoSpace>,
    pub interrupts: Arc<Interrupts>,
    pci: Arc<PciRoot>,
    units: Vec<Box<dyn Unit>>,
    virtio: Vec<Arc<VirtioPci>>,
    disks: Vec<Disk>,
    nics: Vec<Nic>,
}

impl Builder<'_> {
    /// Adds a device's saved state.
    pub fn unit<D: Shared + 'static>(&mut self, device: Arc<D>) {
        self.units.push(Box::new(SharedUnit::new(device)));
    }

    /// Puts a device on the port bus.
    pub fn ports(&self, first: u64, count: u64, device: Arc<dyn BusDevice>) -> Result<(), String> {
        self.io.ports.insert(first, count, device).map_err(text)
    }

    fn pci_access(&mut self) -> Result<(), String> {
        self.ports(root::CONFIG_PORTS, root::CONFIG_PORTS_COUNT, self.pci.config_ports())?;
        if self.pcie {
            let ecam = self.pci.ecam();
            self.io.mmio.insert(layout::ECAM, layout::ECAM_SIZE, ecam).map_err(text)?;
        }
        self.io.mmio.set_fallback(self.pci.mmio());
        self.io.ports.set_fallback(self.pci.pio());
        self.unit(self.pci.clone());
        Ok(())
    }

    fn chipset(&mut self) -> Result<Arc<AcpiPm>, String> {
        let plugged = if self.pcie { plug_q35(&self.pci) } else { plug_pc(&self.pci) };
        self.units.extend(plugged.map_err(text)?);
        let pm = AcpiPm::new(self.interrupts.line(acpi_pm::SCI_GSI));
        self.ports(acpi_pm::PM_BASE.into(), acpi_pm::PM_BYTES.into(), pm.clone())?;
        self.ports(acpi_pm::SMI_PORT.into(), 2, pm.smi_ports())?;
        self.unit(pm.clone());
        Ok(pm)
    }

    fn root_bus(&self) -> &'static str {
        if self.pcie { "pcie.0" } else { "pci.0" }
    }

    fn devices(&mut self) -> Result<(), String> {
        disks::check_idle(self.spec)?;
        for (index, device) in self.spec.devices.iter().enumerate() {
            let name = device_name(index, device);
            self.device(device, &name).map_err(|e| match device.written.as_str() {
                "" => format!("{} {name}: {e}", driver(&device.kind)),
                written => format!("{written}: {e}"),
            })?;
        }
        Ok(())
    }

    fn device(&mut self, device: &spec::Device, name: &str) -> Result<(), String> {
        match &device.kind {
            DeviceKind::IsaSerial { .. } => Ok(()), // made with the legacy devices
            DeviceKind::PcieRootPort { port, chassis, slot } => {
                let slot = slot.unwrap_or(u16::from(*chassis));
                let port = RootPort::new(name, *port, *chassis, slot, self.interrupts.as_ref())?;
                self.unit(port.clone());
                self.plug(device, port)
            }
            DeviceKind::VirtioBlk(blk) => {
                let disk = Disk::open(self.spec, blk, name, self.incoming)?;
                let function = disk.device(blk)?;
                self.disks.push(disk);
                let config = VirtioPciConfig {
                    vectors: blk.vectors,
                    packed: blk.packed,
                    without: features::blk(blk),
                    ..VirtioPciConfig::default()
                };
                self.virtio(device, name, function, config)
            }
            DeviceKind::VirtioNet(net) => {
                let (nic, function) = Nic::open(self.spec, net, name)?;
                self.nics.push(nic);
                let config = VirtioPciConfig {
                    vectors: net.vectors,
                    packed: net.packed,
                    without: features::net(net),
                    ..VirtioPciConfig::default()
                };
                self.virtio(device, name, function, config)
            }
            DeviceKind::VirtioRng { filename, vectors } => {
                let function = crate::nics::rng(name, filename)?;
                let config = VirtioPciConfig { vectors: *vectors, ..VirtioPciConfig::default() };
                self.virtio(device, name, function, config)
            }
        }
    }

    fn virtio(
        &mut self,
        device: &spec::Device,
        name: &str,
        function: Box<dyn virtio::VirtioDevice>,
        config: VirtioPciConfig,
    ) -> Result<(), String> {
        let bus = device.bus.as_deref().unwrap_or(self.root_bus());
        let express = self.pcie && bus != self.root_bus();
        // The pin's GSI depends on the slot, so that is chosen now.
        let place = device.addr.or_else(|| self.pci.free_place(bus));
        let slot = place.map_or(0, |(slot, _)| slot);
        let gsi = self.pci.intx_gsi(bus, slot, 1).unwrap_or_else(|_| intx_gsi(slot, 1));
        let function = VirtioPci::new(
            name,
            function,
            VirtioPciConfig { express, ..config },
            self.interrupts.clone(),
            self.interrupts.clone(),
            Some(self.interrupts.line(gsi)),
            self.mem.clone(),
        )
        .map_err(text)?;
        self.units.push(Box::new(VirtioPciUnit(function.clone())));
        self.virtio.push(function.clone());
        self.plug(device, function)
    }

    fn plug(&self, device: &spec::Device, function: Arc<dyn PciDevice>) -> Result<(), String> {
        let bus = device.bus.as_deref().unwrap_or(self.root_bus());
        self.pci.add(bus, device.addr, device.multifunction, function).map_err(text)?;
        Ok(())
    }

    fn assign(&self) -> Result<(), String> {
        let start = layout::mmio64(self.spec.memory);
        self.pci.assign(Windows::standard(start, layout::PCI_MMIO64_SIZE)).map_err(text)
    }
}

/// What the device is called that stands at `index` of the description: its section's name too.
pub fn device_name(index: usize, device: &spec::Device) -> String {
    device.id.clone().unwrap_or_else(|| format!("{}.{index}", driver(&device.kind)))
}

fn driver(kind: &DeviceKind) -> &'static str {
    match kind {
        DeviceKind::VirtioNet(_) => "virtio-net-pci",
        DeviceKind::VirtioBlk(_) => "virtio-blk-pci",
        DeviceKind::VirtioRng { .. } => "virtio-rng-pci",
        DeviceKind::PcieRootPort { .. } => "pcie-root-port",
        DeviceKind::IsaSerial { .. } => "isa-serial",
    }
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}
