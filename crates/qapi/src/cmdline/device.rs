//! `-device`.

use std::path::PathBuf;

use spec::{Device, DeviceKind, Load, VirtioBlk, VirtioNet};

use super::keyval::Opts;
use super::suggest::hint;
use super::value;
use super::{Builder, CmdlineError, Stop, Taken};

/// Drivers that work, with other names for them.
pub const DRIVERS: &[(&str, &[&str])] = &[
    ("isa-serial", &[]),
    ("loader", &[]),
    ("pcie-root-port", &[]),
    ("virtio-blk-pci", &["virtio-blk", "virtio-blk-pci-non-transitional"]),
    ("virtio-net-pci", &["virtio-net", "virtio-net-pci-non-transitional"]),
    ("virtio-rng-pci", &["virtio-rng", "virtio-rng-pci-non-transitional"]),
];

/// Drivers that are taken with a warning and left out: a guest does its work without them.
pub const HARMLESS_DRIVERS: &[&str] = &[
    "AC97",
    "ES1370",
    "VGA",
    "bochs-display",
    "cirrus-vga",
    "hda-duplex",
    "hda-micro",
    "hda-output",
    "ich9-intel-hda",
    "ich9-usb-ehci1",
    "ich9-usb-uhci1",
    "ich9-usb-uhci2",
    "ich9-usb-uhci3",
    "intel-hda",
    "nec-usb-xhci",
    "piix3-usb-uhci",
    "qemu-xhci",
    "qxl",
    "qxl-vga",
    "usb-ehci",
    "usb-hub",
    "usb-kbd",
    "usb-mouse",
    "usb-tablet",
    "virtio-sound-pci",
];

/// Features of virtio-net that are switches.
const NET_FEATURES: [&str; 20] = [
    "csum",
    "guest_csum",
    "gso",
    "guest_tso4",
    "guest_tso6",
    "guest_ecn",
    "guest_ufo",
    "host_tso4",
    "host_tso6",
    "host_ecn",
    "host_ufo",
    "mrg_rxbuf",
    "status",
    "ctrl_vq",
    "ctrl_rx",
    "ctrl_vlan",
    "ctrl_mac_addr",
    "guest_announce",
    "event_idx",
    "indirect_desc",
];

/// Features of virtio-blk that are switches.
const BLK_FEATURES: [&str; 5] =
    ["config-wce", "discard", "write-zeroes", "event_idx", "indirect_desc"];

/// A device whose references are checked when all options are read.
pub(super) struct Pending {
    pub device: Device,
    /// As written, for messages.
    pub option: String,
    /// The write cache was asked for, not defaulted.
    pub write_cache: Option<bool>,
}

impl Pending {
    pub fn plain(option: &str, kind: DeviceKind) -> Self {
        let device = Device { id: None, bus: None, addr: None, multifunction: false, kind };
        Self { device, option: option.into(), write_cache: None }
    }
}

impl Builder {
    pub(super) fn device(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, Some("driver"))?;
        let name = o.required("driver")?;
        if matches!(name.as_str(), "help" | "?") {
            return Err(Stop::Print(device_help()));
        }
        if HARMLESS_DRIVERS.contains(&name.as_str()) {
            self.warn(format!("{option} {name} is ignored: there is no such device here"));
            return Ok(());
        }
        let driver = driver(&o, &name)?;
        if o.has("help") || o.has("?") {
            return Err(Stop::Print(format!(
                "{driver}: see docs/qemu-compat.md for its properties\n"
            )));
        }
        let id = o.id("id")?;
        let taken =
            |id: &str| self.parsed_devices.iter().any(|d| d.device.id.as_deref() == Some(id));
        if let Some(id) = &id
            && taken(id)
        {
            return Err(o.error(format!("Duplicate device ID '{id}'")).into());
        }
        if driver == "loader" {
            return self.loader(&mut o);
        }
        let bus = o.text("bus")?;
        let pci = driver != "isa-serial";
        let addr = if pci { o.with("addr", value::pci_addr)? } else { None };
        let multifunction = pci && o.flag("multifunction", false)?;
        let mut write_cache = None;
        let kind = match driver {
            "isa-serial" => serial(&mut o)?,
            "pcie-root-port" => self.root_port(&mut o)?,
            "virtio-blk-pci" => self.blk(&mut o, &mut write_cache)?,
            "virtio-net-pci" => self.net_device(&mut o)?,
            _ => self.rng(&mut o)?,
        };
        if pci {
            self.pci_properties(&mut o, driver)?;
        }
        o.finish()?;
        let bus = if pci { bus } else { None };
        let device = Device { id, bus, addr, multifunction, kind };
        self.parsed_devices.push(Pending { device, option: option.into(), write_cache });
        Ok(())
    }

    /// The generic loader: bytes of a file, at an address. It is no device that a guest sees.
    fn loader(&mut self, o: &mut Opts) -> Taken {
        for key in ["data", "data-len", "data-be"] {
            if o.has(key) {
                return Err(o.bad(key, "values are not loaded; give a file=").into());
            }
        }
        if o.has("cpu-num") {
            let why = "a vCPU cannot be started by a loader; it starts with -kernel";
            return Err(o.bad("cpu-num", why).into());
        }
        let file = o.required("file")?.into();
        let addr = o.with("addr", value::number)?.ok_or_else(|| {
            o.error("'addr' is missing: the guest-physical address for the file's first byte")
        })?;
        let raw = o.flag("force-raw", false)?;
        o.finish()?;
        self.machine.loads.push(Load { file, addr, raw });
        Ok(())
    }

    /// Properties of every PCI or virtio device that say what is so anyway.
    fn pci_properties(&mut self, o: &mut Opts, driver: &str) -> Result<(), CmdlineError> {
        o.ignore(&["rombar", "romsize", "romfile", "x-pcie-lnksta-dllla", "x-pcie-extcap-init"]);
        if !driver.starts_with("virtio") {
            return Ok(());
        }
        for (key, only) in [
            ("disable-modern", false),
            ("iommu_platform", false),
            ("ats", false),
            ("page-per-vq", false),
            ("failover", false),
            ("any_layout", true),
            ("ioeventfd", true),
            ("modern-pio-notify", false),
        ] {
            if o.bool(key)?.is_some_and(|v| v != only) {
                let only = if only { "on" } else { "off" };
                return Err(o.bad(key, format!("only '{only}' is supported")));
            }
        }
        if o.on_off_auto("disable-legacy")? == Some(false) {
            return Err(o.bad("disable-legacy", "legacy virtio is not available"));
        }
        Ok(())
    }

    fn root_port(&mut self, o: &mut Opts) -> Result<DeviceKind, CmdlineError> {
        let port = o.number::<u8>("port", 0, 255)?.unwrap_or(0);
        let chassis = o.number::<u8>("chassis", 0, 255)?.unwrap_or(0);
        let slot = o.number::<u16>("slot", 0, 8191)?;
        for key in ["hotplug", "power_controller_present"] {
            o.on_off_auto(key)?;
        }
        for key in o.ignore(&[
            "io-reserve",
            "mem-reserve",
            "pref64-reserve",
            "bus-reserve",
            "x-speed",
            "x-width",
        ]) {
            self.warn(format!(
                "-device pcie-root-port {key}= is ignored: windows follow the devices"
            ));
        }
        Ok(DeviceKind::PcieRootPort { port, chassis, slot })
    }

    fn net_device(&mut self, o: &mut Opts) -> Result<DeviceKind, CmdlineError> {
        let netdev = o.required("netdev")?;
        let default_mac = self.next_mac();
        let queue_size = |o: &mut Opts, key: &str| -> Result<u16, CmdlineError> {
            let size = o.number::<u16>(key, 64, 1024)?.unwrap_or(256);
            match size.is_power_of_two() {
                true => Ok(size),
                false => Err(o.bad(key, "must be a power of two from 64 to 1024")),
            }
        };
        let mut net = VirtioNet {
            netdev,
            mac: o.with("mac", value::mac)?.unwrap_or(default_mac),
            rx_queue_size: queue_size(o, "rx_queue_size")?,
            tx_queue_size: queue_size(o, "tx_queue_size")?,
            host_mtu: o.number::<u16>("host_mtu", 0, 65535)?.filter(|m| *m != 0),
            packed: o.flag("packed", false)?,
            vectors: vectors(o)?,
            mq: o.flag("mq", false)?,
            bootindex: bootindex(o)?,
            ..VirtioNet::default()
        };
        for key in NET_FEATURES {
            if let Some(on) = o.bool(key)? {
                net.features.insert(key.into(), on);
            }
        }
        for key in ["rss", "hash", "guest_uso4", "guest_uso6", "host_uso", "guest_rsc_ext"] {
            if o.flag(key, false)? {
                return Err(o.bad(key, "is not available"));
            }
        }
        for key in
            o.ignore(&["tx", "x-txtimer", "x-txburst", "ctrl_guest_offloads", "ctrl_rx_extra"])
        {
            self.warn(format!("-device virtio-net-pci {key}= is ignored: it changes nothing here"));
        }
        Ok(DeviceKind::VirtioNet(net))
    }

    fn blk(
        &mut self,
        o: &mut Opts,
        write_cache: &mut Option<bool>,
    ) -> Result<DeviceKind, CmdlineError> {
        let drive = o.required("drive")?;
        let serial = o.str("serial").unwrap_or_default();
        if serial.len() > 20 {
            return Err(o.bad("serial", "more than 20 bytes"));
        }
        *write_cache = o.on_off_auto("write-cache")?;
        let queue_size = o.number::<u16>("queue-size", 2, 1024)?.unwrap_or(256);
        if !queue_size.is_power_of_two() {
            return Err(o.bad("queue-size", "must be a power of two from 2 to 1024"));
        }
        let only_size = |o: &mut Opts, key: &str| match o.size(key, 1)? {
            Some(512) | None => Ok(()),
            Some(_) => Err(o.bad(key, "only 512 is supported")),
        };
        only_size(o, "logical_block_size")?;
        only_size(o, "physical_block_size")?;
        let mut features = std::collections::BTreeMap::new();
        for key in BLK_FEATURES {
            if let Some(on) = o.bool(key)? {
                features.insert(key.into(), on);
            }
        }
        if o.flag("scsi", false)? {
            return Err(o.bad("scsi", "SCSI requests are not available"));
        }
        for key in ["seg-max-adjust", "request-merging"] {
            if o.bool(key)? == Some(false) {
                self.warn(format!(
                    "-device virtio-blk-pci {key}=off is ignored: it is always done"
                ));
            }
        }
        for key in o.ignore(&["discard_granularity", "min_io_size", "opt_io_size"]) {
            self.warn(format!(
                "-device virtio-blk-pci {key}= is ignored: it follows from the image"
            ));
        }
        // Each disk has a thread of its own, so that there is one is all that is asked for.
        if let Some(id) = o.str("iothread").filter(|id| !self.machine.iothreads.contains(id)) {
            return Err(o.bad(
                "iothread",
                format!("there is no -object iothread with id '{id}' before this"),
            ));
        }
        for key in ["werror", "rerror"] {
            if let Some(v) =
                o.str(key).filter(|v| !["auto", "report", "enospc"].contains(&v.as_str()))
            {
                return Err(o.bad(key, format!("only 'report' is supported, not '{v}'")));
            }
        }
        Ok(DeviceKind::VirtioBlk(VirtioBlk {
            drive,
            num_queues: o.number::<u16>("num-queues", 1, 256)?.unwrap_or(1),
            queue_size,
            serial,
            packed: o.flag("packed", false)?,
            bootindex: bootindex(o)?,
            share_rw: o.flag("share-rw", false)?,
            vectors: vectors(o)?,
            features,
            ..VirtioBlk::default()
        }))
    }

    fn rng(&mut self, o: &mut Opts) -> Result<DeviceKind, CmdlineError> {
        let filename = match o.str("rng") {
            None => PathBuf::from("/dev/urandom"),
            Some(id) => self.rngs.get(&id).cloned().ok_or_else(|| {
                o.bad("rng", format!("there is no -object rng-random with id '{id}' before this"))
            })?,
        };
        if o.str("max-bytes").is_some() || o.str("period").is_some() {
            return Err(o.bad("max-bytes", "rate limits are not available"));
        }
        Ok(DeviceKind::VirtioRng { filename, vectors: vectors(o)? })
    }
}

fn driver(o: &Opts, name: &str) -> Result<&'static str, CmdlineError> {
    let found = DRIVERS.iter().find(|(d, aliases)| *d == name || aliases.contains(&name));
    if let Some((driver, _)) = found {
        return Ok(driver);
    }
    let known =
        DRIVERS.iter().flat_map(|(d, aliases)| [*d].into_iter().chain(aliases.iter().copied()));
    let near = hint(name, known.chain(HARMLESS_DRIVERS.iter().copied()), "");
    Err(o.error(format!("device '{name}' is not supported{near} (-device help lists what is)")))
}

fn serial(o: &mut Opts) -> Result<DeviceKind, CmdlineError> {
    let chardev = o.required("chardev")?;
    // None given is told by 255 until all serial ports are known.
    let index = o.number::<u8>("index", 0, 3)?.unwrap_or(u8::MAX);
    for key in ["iobase", "irq", "wakeup"] {
        if o.str(key).is_some() {
            return Err(o.bad(key, "follows from 'index'"));
        }
    }
    Ok(DeviceKind::IsaSerial { chardev, index })
}

fn vectors(o: &mut Opts) -> Result<Option<u16>, CmdlineError> {
    o.number::<u16>("vectors", 0, 2048)
}

fn bootindex(o: &mut Opts) -> Result<Option<i32>, CmdlineError> {
    Ok(o.with("bootindex", |s| {
        s.parse::<i32>().map_err(|_| format!("expected a number, not '{s}'"))
    })?
    .filter(|i| *i >= 0))
}

fn device_help() -> String {
    let mut text = String::from("Devices:\n");
    for (name, aliases) in DRIVERS {
        text += &format!("name \"{name}\"");
        for alias in *aliases {
            text += &format!(", alias \"{alias}\"");
        }
        text.push('\n');
    }
    text
}
