//! `-device`.

pub mod keys;

use std::collections::BTreeMap;
use std::path::PathBuf;

use keys::{BLK_FEATURES, DEVICES, HARMLESS_DRIVERS, NET_FEATURES};
use spec::{Device, DeviceKind, Load, VirtioBlk, VirtioNet};

use super::keys::Key;
use super::keyval::Opts;
use super::value;
use super::{Builder, CmdlineError, Stop, Taken};

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
        let (id, bus, addr, written) = (None, None, None, String::new());
        let device = Device { id, bus, addr, multifunction: false, kind, written };
        Self { device, option: option.into(), write_cache: None }
    }
}

impl Builder {
    pub(super) fn device(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, Some(DEVICES.key))?;
        let name = o.required(DEVICES.key)?;
        if HARMLESS_DRIVERS.contains(&name.as_str()) {
            if o.asks_help() {
                let text = format!("{name} is taken and left out: there is no such device here\n");
                return Err(Stop::Print(text));
            }
            self.warn(format!("{option} {name} is ignored: there is no such device here"));
            return Ok(());
        }
        let schema = self.choose(&mut o, &DEVICES, &name, HARMLESS_DRIVERS)?;
        let id = o.str("id");
        let taken =
            |id: &str| self.parsed_devices.iter().any(|d| d.device.id.as_deref() == Some(id));
        if let Some(id) = &id
            && taken(id)
        {
            return Err(o.error(format!("Duplicate device ID '{id}'")).into());
        }
        let mut write_cache = None;
        let kind = match schema.name {
            "loader" => return self.loader(&mut o),
            "isa-serial" => serial(&mut o)?,
            "pcie-root-port" => root_port(&mut o)?,
            "virtio-blk-pci" => self.blk(&mut o, &mut write_cache)?,
            "virtio-net-pci" => self.net_device(&mut o)?,
            _ => self.rng(&mut o)?,
        };
        let device = match kind {
            DeviceKind::IsaSerial { .. } => Device { id, ..Pending::plain(option, kind).device },
            _ => Device {
                id,
                bus: o.str("bus"),
                addr: o.with("addr", value::pci_addr)?,
                multifunction: o.flag("multifunction")?,
                kind,
                written: String::new(),
            },
        };
        o.finish()?;
        self.parsed_devices.push(Pending { device, option: option.into(), write_cache });
        Ok(())
    }

    /// The generic loader: bytes of a file, at an address. It is no device that a guest sees.
    fn loader(&mut self, o: &mut Opts) -> Taken {
        let file = o.required("file")?.into();
        let addr = o.with("addr", value::number)?.ok_or_else(|| {
            o.error("'addr' is missing: the guest-physical address for the file's first byte")
        })?;
        let raw = o.flag("force-raw")?;
        o.finish()?;
        self.machine.loads.push(Load { file, addr, raw });
        Ok(())
    }

    fn net_device(&mut self, o: &mut Opts) -> Result<DeviceKind, CmdlineError> {
        Ok(DeviceKind::VirtioNet(VirtioNet {
            netdev: o.required("netdev")?,
            mac: o.with("mac", value::mac)?.unwrap_or(self.next_mac()),
            rx_queue_size: o.number("rx_queue_size")?,
            tx_queue_size: o.number("tx_queue_size")?,
            host_mtu: Some(o.number("host_mtu")?).filter(|m| *m != 0),
            packed: o.flag("packed")?,
            vectors: o.number_if("vectors")?,
            mq: o.flag("mq")?,
            bootindex: bootindex(o)?,
            features: features(o, NET_FEATURES)?,
        }))
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
        // Each disk has a thread of its own, so that there is one is all that is asked for.
        if let Some(id) = o.str("iothread").filter(|id| !self.machine.iothreads.contains(id)) {
            let why = format!("there is no -object iothread with id '{id}' before this");
            return Err(o.bad("iothread", why));
        }
        Ok(DeviceKind::VirtioBlk(VirtioBlk {
            drive,
            num_queues: o.number("num-queues")?,
            queue_size: o.number("queue-size")?,
            serial,
            packed: o.flag("packed")?,
            bootindex: bootindex(o)?,
            share_rw: o.flag("share-rw")?,
            vectors: o.number_if("vectors")?,
            features: features(o, BLK_FEATURES)?,
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
        Ok(DeviceKind::VirtioRng { filename, vectors: o.number_if("vectors")? })
    }
}

fn root_port(o: &mut Opts) -> Result<DeviceKind, CmdlineError> {
    Ok(DeviceKind::PcieRootPort {
        port: o.number("port")?,
        chassis: o.number("chassis")?,
        slot: o.number_if("slot")?,
    })
}

fn serial(o: &mut Opts) -> Result<DeviceKind, CmdlineError> {
    let chardev = o.required("chardev")?;
    // None given is told by 255 until all serial ports are known.
    let index = o.number_if("index")?.unwrap_or(u8::MAX);
    Ok(DeviceKind::IsaSerial { chardev, index })
}

fn bootindex(o: &mut Opts) -> Result<Option<i32>, CmdlineError> {
    let index = o.with("bootindex", |s| s.parse().map_err(|e| format!("'{s}': {e}")))?;
    Ok(index.filter(|i| *i >= 0))
}

/// The switches that were given, of those that go to the device by their names.
fn features(o: &mut Opts, own: &[Key]) -> Result<BTreeMap<String, bool>, CmdlineError> {
    let mut given = BTreeMap::new();
    for name in own.iter().map(|k| k.name).chain(["event_idx", "indirect_desc"]) {
        if let Some(on) = o.bool(name)? {
            given.insert(name.into(), on);
        }
    }
    Ok(given)
}
