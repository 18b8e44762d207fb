//! `-netdev`, `-nic`, `-net`.

use std::path::PathBuf;

use spec::{DeviceKind, NetBackend, NetKind, VirtioNet};

use super::device::Pending;
use super::keys::Kind::{Fds, Id, Mac, Number, OneOf, Size, Switch, Text};
use super::keys::{Family, Key, Member, Schema, key, refused};
use super::keyval::Opts;
use super::value;
use super::{Builder, CmdlineError, Stop, Taken, invalid};

/// `-netdev`.
pub const BACKENDS: Family = Family { members: &[tap_member(&TAP)], ..FAMILY };

/// `-nic`: a back end with its card.
const NICS: Family = Family { members: &[tap_member(&TAP_NIC)], ..FAMILY };

const FAMILY: Family = Family {
    key: "type",
    what: "network back end",
    heading: "Available netdev backend types:",
    members: &[],
    absent: &[
        "user",
        "bridge",
        "socket",
        "stream",
        "dgram",
        "vhost-user",
        "vhost-vdpa",
        "vde",
        "l2tpv3",
        "hubport",
    ],
    instead: "use tap",
};

const fn tap_member(schema: &'static Schema) -> Member {
    Member { schema, aliases: &[], about: "tap interface of the host" }
}

const TAP: Schema = Schema {
    name: "tap",
    implied: None,
    keys: &[&[key("id", Id, "", "Name of the back end; must be given")], TAP_KEYS],
};

const TAP_NIC: Schema = Schema {
    name: "tap",
    implied: None,
    keys: &[
        &[
            key("id", Id, "", "Name of the back end"),
            key("model", OneOf(MODELS), "virtio-net-pci", "The card that the guest sees"),
            key(
                "mac",
                Mac,
                "",
                "MAC address; by default 52:54:00:12:34:56, the next card's one more",
            ),
            key("macaddr", Mac, "", "The same"),
        ],
        TAP_KEYS,
    ],
};

const MODELS: &[&str] =
    &["virtio-net-pci", "virtio", "virtio-net", "virtio-net-pci-non-transitional"];

const NO_VHOST: &str = "in-kernel vhost-net is not available; leave it out";
const NOTHING: &str = "it changes nothing here";

const TAP_KEYS: &[Key] = &[
    key(
        "ifname",
        Text,
        "",
        "Interface, made when it does not exist; by default the kernel names it",
    ),
    key("fd", Fds, "", "Inherited fd of an open tap"),
    key("fds", Fds, "", "Inherited fds, one a queue"),
    key("queues", Number(1, 64), "", "Queue pairs; by default 1, or one for each fd"),
    key("script", Text, "no", "Script run when the tap was opened, with the interface's name"),
    key("downscript", Text, "no", "Script run before the tap is closed"),
    key("br", Text, "", "Bridge that the interface is put into"),
    key("vnet_hdr", Switch, "on", "Frames carry offload headers").only(&["on"], "they always do"),
    key("vhost", Switch, "off", "In-kernel vhost-net").only(&["off"], NO_VHOST),
    key("vhostforce", Switch, "off", "Old name of vhost").only(&["off"], NO_VHOST),
    refused("vhostfd", NO_VHOST),
    refused("vhostfds", NO_VHOST),
    key("sndbuf", Size(1), "", "Send buffer of the tap").ignored(NOTHING),
    key("poll-us", Number(0, u64::MAX), "", "Time of polling").ignored(NOTHING),
];

impl Builder {
    pub(super) fn netdev(&mut self, option: &str, text: &str) -> Taken {
        let (mut o, _) = self.member(option, text, &BACKENDS)?;
        let id = o.required("id")?;
        if self.machine.netdevs.iter().any(|n| n.id == id) {
            return Err(o.error(format!("netdev '{id}' was given before")).into());
        }
        let kind = tap(&mut o)?;
        self.machine.netdevs.push(NetBackend { id, kind, written: String::new() });
        Ok(o.finish()?)
    }

    pub(super) fn nic(&mut self, option: &str, text: &str) -> Taken {
        if text == "none" {
            return Ok(());
        }
        let (mut o, _) = self.member(option, text, &NICS)?;
        let id = o.str("id").unwrap_or_else(|| format!("__org.qemu.net{}", self.nics.len()));
        o.str("model");
        let macs = [o.with("mac", value::mac)?, o.with("macaddr", value::mac)?];
        let mac = macs.into_iter().flatten().next().unwrap_or(self.next_mac());
        let kind = tap(&mut o)?;
        let NetKind::Tap { queues, .. } = &kind;
        let net = VirtioNet { netdev: id.clone(), mac, mq: *queues > 1, ..VirtioNet::default() };
        o.finish()?;
        let device = Pending::plain(option, DeviceKind::VirtioNet(net));
        self.nics.push((NetBackend { id, kind, written: String::new() }, device));
        Ok(())
    }

    pub(super) fn net(&mut self, option: &str, text: &str) -> Taken {
        match text {
            "none" => Ok(()),
            "help" | "?" => Err(Stop::Print(format!(
                "{option} none turns the default network off, of which there is none here.\n\
                 -netdev help lists back ends, -device help lists cards.\n"
            ))),
            _ => {
                Err(invalid(option, "only 'none' is supported; use -netdev with -device, or -nic"))
            }
        }
    }

    /// QEMU's range of default addresses: 52:54:00:12:34:56 and up.
    pub(super) fn next_mac(&self) -> [u8; 6] {
        let used = |mac: &[u8; 6]| {
            let devices = self.parsed_devices.iter().chain(self.nics.iter().map(|(_, d)| d));
            devices
                .into_iter()
                .any(|d| matches!(&d.device.kind, DeviceKind::VirtioNet(n) if n.mac == *mac))
        };
        (0..=255u8)
            .map(|n| [0x52, 0x54, 0x00, 0x12, 0x34, 0x56u8.wrapping_add(n)])
            .find(|mac| !used(mac))
            .unwrap_or([0x52, 0x54, 0x00, 0x12, 0x34, 0x56])
    }
}

fn tap(o: &mut Opts) -> Result<NetKind, CmdlineError> {
    let one = o.with("fd", value::fds)?;
    if one.as_ref().is_some_and(|l| l.len() > 1) {
        return Err(o.bad("fd", "several fds are given by 'fds'"));
    }
    let many = o.with("fds", value::fds)?;
    if one.is_some() && many.is_some() {
        return Err(o.error("'fd' and 'fds' exclude each other"));
    }
    let fds = one.or(many).unwrap_or_default();
    let queues = o.number_if("queues")?;
    let ifname = o.str("ifname");
    if ifname.as_ref().is_some_and(|n| n.is_empty() || n.len() > 15 || n.contains(['/', ' '])) {
        return Err(o.bad("ifname", "expected a name of 1 to 15 characters"));
    }
    let mut script =
        |key: &str| o.str(key).filter(|s| s != "no" && !s.is_empty()).map(PathBuf::from);
    let (script, downscript) = (script("script"), script("downscript"));
    let bridge = o.str("br");
    if !fds.is_empty() {
        let clash =
            ifname.is_some() || script.is_some() || downscript.is_some() || bridge.is_some();
        if clash || queues.is_some() {
            return Err(o.error(
                "'ifname', 'script', 'downscript', 'br' and 'queues' cannot be used with fd= or fds=",
            ));
        }
    }
    let queues = queues.unwrap_or(fds.len().max(1) as u16);
    Ok(NetKind::Tap { ifname, fds, queues, script, downscript, bridge })
}
