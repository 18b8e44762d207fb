//! What is done when all options are read: default devices, and checks across options.

use spec::{
    BlockDriver, Chardev, ChardevKind, Device, DeviceKind, MachineType, MemoryKind, MonitorMode,
    NetKind, VirtioBlk,
};

use super::device::Pending;
use super::value;
use super::{Builder, Taken, invalid};

/// 16550s at COM1 to COM4.
const MAX_SERIALS: usize = 4;

impl Builder {
    pub(super) fn finish(&mut self) -> Taken {
        self.check_accel()?;
        self.default_characters()?;
        self.drive_devices();
        self.nic_devices()?;
        self.check_devices()?;
        self.serial_ports()?;
        self.check_monitors()?;
        self.check_memory()?;
        self.check_boot()?;
        let stdio =
            self.machine.chardevs.iter().any(|c| matches!(c.kind, ChardevKind::Stdio { .. }));
        if self.machine.process.daemonize && stdio {
            return Err(invalid("-daemonize", "cannot be used with a character device on stdio"));
        }
        self.machine.devices = self.parsed_devices.drain(..).map(|d| d.device).collect();
        Ok(())
    }

    fn check_accel(&self) -> Taken {
        match self.accels.iter().find(|a| *a != "kvm") {
            Some(other) if !self.accels.iter().any(|a| a == "kvm") => {
                Err(invalid("-accel", format!("'{other}' is not available; only kvm is")))
            }
            _ => Ok(()),
        }
    }

    /// Serial ports and monitors, with QEMU's defaults (vl.c): without a display both are on
    /// stdio with -nographic, and on nothing otherwise.
    fn default_characters(&mut self) -> Taken {
        let none = self.machine.machine_type == MachineType::None;
        let serial_given = !self.serials.is_empty()
            || self
                .parsed_devices
                .iter()
                .any(|d| matches!(d.device.kind, DeviceKind::IsaSerial { .. }));
        let default_serial = !serial_given && !self.no_defaults && !none;
        let default_monitor = !self.monitor_given && !self.no_defaults;
        match (self.nographic, default_serial, default_monitor) {
            (true, true, true) => self.serials.push("mon:stdio".into()),
            (true, true, false) => self.serials.push("stdio".into()),
            (true, false, true) if self.stdio_option.is_none() && !self.serials_use_stdio() => {
                self.monitor_words.push(("-monitor".into(), "stdio".into()));
            }
            (false, true, _) => {
                self.serials.push("null".into());
                if !self.headless {
                    self.warn(
                        "there is no display: -nographic or -serial stdio shows the console".into(),
                    );
                }
            }
            _ => {}
        }
        let serials = std::mem::take(&mut self.serials);
        let mut ports = Vec::new();
        for (i, word) in serials.iter().enumerate() {
            if let Some(chardev) = self.character_device("-serial", &format!("serial{i}"), word)? {
                let index = u8::try_from(i).unwrap_or(u8::MAX);
                ports.push(Pending::plain("-serial", DeviceKind::IsaSerial { chardev, index }));
            }
        }
        self.parsed_devices.extend(ports);
        for (i, (option, word)) in std::mem::take(&mut self.monitor_words).into_iter().enumerate() {
            let label = format!("compat_monitor{i}");
            if let Some(chardev) = self.character_device(&option, &label, &word)? {
                let qmp = option.trim_start_matches('-').starts_with("qmp");
                let mode = if qmp { MonitorMode::Control } else { MonitorMode::Readline };
                self.add_monitor(chardev, mode, option.ends_with("pretty"));
            }
        }
        Ok(())
    }

    fn serials_use_stdio(&self) -> bool {
        self.serials.iter().any(|s| s == "stdio" || s == "mon:stdio")
    }

    fn drive_devices(&mut self) {
        for drive in self.drives.iter_mut().filter(|d| d.virtio) {
            drive.used = true;
            let kind = DeviceKind::VirtioBlk(VirtioBlk {
                drive: drive.id.clone(),
                read_only: drive.read_only,
                write_cache: drive.write_cache,
                ..VirtioBlk::default()
            });
            let mut device = Pending::plain("-drive", kind);
            device.device.written.clone_from(&drive.written);
            self.parsed_devices.push(device);
        }
    }

    fn nic_devices(&mut self) -> Taken {
        for (backend, device) in std::mem::take(&mut self.nics) {
            if self.machine.netdevs.iter().any(|n| n.id == backend.id) {
                return Err(invalid("-nic", format!("netdev '{}' was given before", backend.id)));
            }
            self.machine.netdevs.push(backend);
            self.parsed_devices.push(device);
        }
        Ok(())
    }

    /// References of devices to back ends, each used once, and to buses.
    fn check_devices(&mut self) -> Taken {
        let mut devices = std::mem::take(&mut self.parsed_devices);
        let mut used: Vec<String> = Vec::new();
        for pending in &mut devices {
            let option = pending.option.clone();
            let mut claim = |kind: &str, id: &str| {
                let name = format!("{kind} '{id}'");
                match used.contains(&name) {
                    true => Err(invalid(&option, format!("{name} is used by another device"))),
                    false => {
                        used.push(name);
                        Ok(())
                    }
                }
            };
            match &mut pending.device.kind {
                DeviceKind::VirtioNet(net) => {
                    if !self.machine.netdevs.iter().any(|n| n.id == net.netdev) {
                        return Err(invalid(
                            &option,
                            format!("there is no netdev '{}'", net.netdev),
                        ));
                    }
                    claim("netdev", &net.netdev)?;
                }
                DeviceKind::VirtioBlk(blk) => {
                    claim("drive", &blk.drive)?;
                    let from_option = option == "-drive";
                    self.check_disk(&option, blk, pending.write_cache, from_option)?;
                }
                DeviceKind::IsaSerial { chardev, .. } => {
                    let found = self.machine.chardevs.iter().find(|c| c.id == *chardev);
                    let found = found.ok_or_else(|| {
                        invalid(&option, format!("there is no chardev '{chardev}'"))
                    })?;
                    if !found.mux {
                        claim("chardev", chardev)?;
                    }
                }
                DeviceKind::VirtioRng { .. } | DeviceKind::PcieRootPort { .. } => {}
            }
        }
        self.check_buses(&devices)?;
        self.parsed_devices = devices;
        for id in self.machine.netdevs.iter().map(|n| n.id.clone()).collect::<Vec<_>>() {
            if !used.contains(&format!("netdev '{id}'")) {
                self.warn(format!("netdev {id} has no peer"));
            }
        }
        Ok(())
    }

    fn check_disk(
        &mut self,
        option: &str,
        blk: &mut VirtioBlk,
        write_cache: Option<bool>,
        own: bool,
    ) -> Taken {
        let node = self.machine.blocks.iter().find(|b| b.node_name == blk.drive);
        let node = node.ok_or_else(|| {
            invalid(option, format!("there is no drive or block node '{}'", blk.drive))
        })?;
        blk.read_only = node.read_only;
        if own {
            return Ok(());
        }
        blk.write_cache = true;
        if let Some(drive) = self.drives.iter_mut().find(|d| d.id == blk.drive) {
            if drive.virtio {
                return Err(invalid(
                    option,
                    format!("drive '{}' has a device by if=virtio", drive.id),
                ));
            }
            drive.used = true;
            blk.write_cache = drive.write_cache;
        }
        blk.write_cache = write_cache.unwrap_or(blk.write_cache);
        Ok(())
    }

    fn check_buses(&self, devices: &[Pending]) -> Taken {
        let root = match self.machine.machine_type {
            MachineType::Q35 => "pcie.0",
            MachineType::Pc => "pci.0",
            MachineType::None if devices.is_empty() => return Ok(()),
            MachineType::None => {
                return Err(invalid("-device", "machine type 'none' has no bus for devices"));
            }
        };
        let port = |d: &&Device| matches!(d.kind, DeviceKind::PcieRootPort { .. });
        let ports: Vec<&str> = devices
            .iter()
            .map(|d| &d.device)
            .filter(port)
            .filter_map(|d| d.id.as_deref())
            .collect();
        let mut taken: Vec<(&str, (u8, u8))> = Vec::new();
        for Pending { device, option, .. } in devices {
            let is_port = port(&device);
            let bus = match device.bus.as_deref() {
                None => root,
                // The root bus goes by its plain name too.
                Some("pci.0" | "pcie.0") if !ports.contains(&"pci.0") => root,
                Some(bus) if ports.contains(&bus) => bus,
                Some(bus) => return Err(invalid(option, format!("Bus '{bus}' not found"))),
            };
            if is_port && bus != root {
                return Err(invalid(option, "a pcie-root-port belongs on the root bus"));
            }
            if is_port && root == "pci.0" {
                return Err(invalid(option, "a pcie-root-port needs the q35 machine"));
            }
            let Some(addr) = device.addr else { continue };
            if bus != root && addr.0 != 0 {
                return Err(invalid(
                    option,
                    format!("slot {:#x}: a root port has only slot 0", addr.0),
                ));
            }
            if taken.contains(&(bus, addr)) {
                return Err(invalid(
                    option,
                    format!("PCI: slot {:#x} function {} on {bus} is in use", addr.0, addr.1),
                ));
            }
            taken.push((bus, addr));
        }
        Ok(())
    }

    /// Gives serial ports without an index the next free one.
    fn serial_ports(&mut self) -> Taken {
        let mut used = [false; MAX_SERIALS];
        let mut open = Vec::new();
        for (at, pending) in self.parsed_devices.iter().enumerate() {
            let DeviceKind::IsaSerial { index, .. } = pending.device.kind else { continue };
            if index == u8::MAX {
                open.push(at);
                continue;
            }
            match used.get_mut(usize::from(index)) {
                Some(slot) if !*slot => *slot = true,
                Some(_) => {
                    return Err(invalid(
                        &pending.option,
                        format!("serial port {index} is given twice"),
                    ));
                }
                None => return Err(invalid(&pending.option, "there are at most 4 serial ports")),
            }
        }
        for at in open {
            let pending = &mut self.parsed_devices[at];
            let free = used.iter().position(|u| !u);
            let free =
                free.ok_or_else(|| invalid(&pending.option, "there are at most 4 serial ports"))?;
            used[free] = true;
            if let DeviceKind::IsaSerial { index, .. } = &mut pending.device.kind {
                *index = free as u8;
            }
        }
        Ok(())
    }

    fn check_monitors(&mut self) -> Taken {
        let chardevs = &self.machine.chardevs;
        let serial = |id: &str| {
            self.parsed_devices.iter().any(
                |d| matches!(&d.device.kind, DeviceKind::IsaSerial { chardev, .. } if chardev == id),
            )
        };
        for (i, monitor) in self.machine.monitors.iter().enumerate() {
            let id = &monitor.chardev;
            let Some(Chardev { mux, kind, .. }) = chardevs.iter().find(|c| c.id == *id) else {
                return Err(invalid("-mon", format!("there is no chardev '{id}'")));
            };
            let twice = self.machine.monitors[..i].iter().any(|m| m.chardev == *id) || serial(id);
            if twice && !mux {
                return Err(invalid(
                    "-mon",
                    format!("chardev '{id}' is in use; give it mux=on to share it"),
                ));
            }
            if *mux && monitor.mode == MonitorMode::Control {
                return Err(invalid(
                    "-mon",
                    format!("QMP is not supported on the shared chardev '{id}'"),
                ));
            }
            if matches!(kind, ChardevKind::Null) {
                continue;
            }
        }
        Ok(())
    }

    fn check_memory(&mut self) -> Taken {
        let m = &mut self.machine;
        let backend =
            |id: &str| m.memory_backends.iter().find(|b| b.id == id).map(|b| (b.size, &b.kind));
        if let Some(id) = &m.memory_backend {
            let (size, _) = backend(id).ok_or_else(|| {
                invalid(
                    "-machine",
                    format!("memory-backend '{id}' is not an -object memory-backend-*"),
                )
            })?;
            if self.memory_given && size != m.memory {
                let (object, ram) = (value::bytes(size), value::bytes(m.memory));
                return Err(invalid(
                    "-machine",
                    format!(
                        "memory-backend={id}: that -object has {object} and -m says {ram}; give \
                         both the same size, or leave -m out"
                    ),
                ));
            }
            m.memory = size;
            if !m.numa.is_empty() && m.numa.iter().any(|n| n.memdev.is_some()) {
                return Err(invalid(
                    "-numa",
                    "'memory-backend' and '-numa memdev' exclude each other",
                ));
            }
        }
        let mut total = 0u64;
        let mut sizes = Vec::new();
        let (mut backends, mut cpus): (Vec<&str>, Vec<u32>) = (Vec::new(), Vec::new());
        for node in &m.numa {
            if let Some(id) = node.memdev.as_deref() {
                if backends.contains(&id) {
                    return Err(invalid("-numa", format!("memory backend {id} is used twice")));
                }
                backends.push(id);
            }
            if let Some(cpu) = node.cpus.iter().find(|cpu| cpus.contains(cpu)) {
                return Err(invalid("-numa", format!("CPU {cpu} is in two nodes")));
            }
            cpus.extend(&node.cpus);
            let size = match &node.memdev {
                None => node.size,
                Some(id) => {
                    let (size, kind) = backend(id).ok_or_else(|| {
                        invalid(
                            "-numa",
                            format!("memdev '{id}' is not an -object memory-backend-*"),
                        )
                    })?;
                    let _: &MemoryKind = kind;
                    size
                }
            };
            total = total.saturating_add(size);
            sizes.push(size);
            if let Some(cpu) = node.cpus.iter().find(|c| **c >= m.smp.max_cpus) {
                return Err(invalid(
                    "-numa",
                    format!("CPU index {cpu} should be smaller than maxcpus ({})", m.smp.max_cpus),
                ));
            }
        }
        if !m.numa.is_empty() && total != m.memory {
            return Err(invalid(
                "-numa",
                format!(
                    "total memory for NUMA nodes ({}) should equal RAM size ({}, from -m)",
                    value::bytes(total),
                    value::bytes(m.memory)
                ),
            ));
        }
        for (node, size) in m.numa.iter_mut().zip(sizes) {
            node.size = size;
        }
        let in_use = |id: &String| {
            m.memory_backend.as_ref() == Some(id)
                || m.numa.iter().any(|n| n.memdev.as_ref() == Some(id))
        };
        let idle = m.memory_backends.iter().map(|b| b.id.clone()).find(|id| !in_use(id));
        if let Some(id) = idle {
            self.warn(format!(
                "-object id={id} is not used: -machine memory-backend={id} makes it the RAM"
            ));
        }
        Ok(())
    }

    fn check_boot(&mut self) -> Taken {
        let boot = &self.machine.boot;
        if boot.kernel.is_none() && boot.initrd.is_some() {
            return Err(invalid("-initrd", "only allowed with -kernel option"));
        }
        if boot.kernel.is_none() && !boot.append.is_empty() {
            return Err(invalid("-append", "only allowed with -kernel option"));
        }
        for drive in
            self.drives.iter().filter(|d| !d.used).map(|d| d.id.clone()).collect::<Vec<_>>()
        {
            self.warn(format!("-drive id={drive} has if=none and no device uses it"));
        }
        debug_assert!(self.machine.blocks.iter().all(|b| match &b.driver {
            BlockDriver::Raw { file } => self.machine.blocks.iter().any(|f| f.node_name == *file),
            BlockDriver::File { .. } => true,
        }));
        debug_assert!(self.machine.netdevs.iter().all(|n| matches!(n.kind, NetKind::Tap { .. })));
        Ok(())
    }
}
