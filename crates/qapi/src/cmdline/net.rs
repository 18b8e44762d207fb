//! `-netdev`, `-nic`, `-net`.

use std::path::PathBuf;

use spec::{DeviceKind, NetBackend, NetKind, VirtioNet};

use super::device::Pending;
use super::keyval::Opts;
use super::suggest::hint;
use super::value;
use super::{Builder, CmdlineError, Stop, Taken, invalid};

const MODELS: [&str; 4] =
    ["virtio-net-pci", "virtio", "virtio-net", "virtio-net-pci-non-transitional"];

impl Builder {
    pub(super) fn netdev(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, Some("type"))?;
        let kind = o.required("type")?;
        if matches!(kind.as_str(), "help" | "?") {
            return Err(Stop::Print("Available netdev backend types:\ntap\n".into()));
        }
        let id = o.id("id")?.ok_or_else(|| o.error("parameter 'id' is missing"))?;
        if self.machine.netdevs.iter().any(|n| n.id == id) {
            return Err(o.error(format!("netdev '{id}' was given before")).into());
        }
        let kind = self.backend(&mut o, &kind)?;
        self.machine.netdevs.push(NetBackend { id, kind });
        Ok(o.finish()?)
    }

    pub(super) fn nic(&mut self, option: &str, text: &str) -> Taken {
        let mut o = Opts::parse(option, text, Some("type"))?;
        let kind = o.required("type")?;
        if kind == "none" {
            return Ok(o.finish()?);
        }
        let id = o.id("id")?.unwrap_or_else(|| format!("__org.qemu.net{}", self.nics.len()));
        if let Some(model) = o.str("model").filter(|m| !MODELS.contains(&m.as_str())) {
            let near = hint(&model, MODELS.into_iter(), "");
            return Err(o.bad("model", format!("'{model}' is not supported{near}")).into());
        }
        let mut net =
            VirtioNet { netdev: id.clone(), mac: self.next_mac(), ..VirtioNet::default() };
        if let Some(mac) = match o.with("mac", value::mac)? {
            Some(mac) => Some(mac),
            None => o.with("macaddr", value::mac)?,
        } {
            net.mac = mac;
        }
        let kind = self.backend(&mut o, &kind)?;
        net.mq = match &kind {
            NetKind::Tap { queues, .. } => *queues > 1,
        };
        o.finish()?;
        let device = Pending::plain(option, DeviceKind::VirtioNet(net));
        self.nics.push((NetBackend { id, kind }, device));
        Ok(())
    }

    pub(super) fn net(&mut self, option: &str, text: &str) -> Taken {
        match text {
            "none" => Ok(()),
            _ => {
                Err(invalid(option, "only 'none' is supported; use -netdev with -device, or -nic"))
            }
        }
    }

    fn backend(&mut self, o: &mut Opts, kind: &str) -> Result<NetKind, CmdlineError> {
        let made = backend(o, kind)?;
        for key in o.ignore(&["sndbuf", "poll-us"]) {
            self.warn(format!("-netdev tap {key}= is ignored: it changes nothing here"));
        }
        Ok(made)
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

fn backend(o: &mut Opts, kind: &str) -> Result<NetKind, CmdlineError> {
    match kind {
        "tap" => tap(o),
        "user" | "bridge" | "socket" | "stream" | "dgram" | "vhost-user" | "vhost-vdpa" | "vde"
        | "l2tpv3" | "hubport" => {
            Err(o.error(format!("network back end '{kind}' is not available; use tap")))
        }
        _ => Err(o.error(format!(
            "network back end '{kind}' is not supported{}",
            hint(kind, ["tap"].into_iter(), "")
        ))),
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
    let mut vhostfds = o.with("vhostfd", value::fds)?.unwrap_or_default();
    vhostfds.extend(o.with("vhostfds", value::fds)?.unwrap_or_default());
    let queues = o.number::<u16>("queues", 1, 64)?;
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
    let force = o.flag("vhostforce", false)?;
    let vhost = o.bool("vhost")?.unwrap_or(force || !vhostfds.is_empty());
    if !vhostfds.is_empty() && (!vhost || vhostfds.len() != usize::from(queues)) {
        return Err(o.error("there must be one vhost fd for each queue, and vhost=on"));
    }
    if !o.flag("vnet_hdr", true)? {
        return Err(o.bad("vnet_hdr", "cannot be switched off"));
    }
    Ok(NetKind::Tap { ifname, fds, queues, script, downscript, bridge, vhost, vhostfds })
}
