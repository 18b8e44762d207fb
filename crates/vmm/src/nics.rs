//! NICs and the random number device: from the description to virtio devices and their back ends.

use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;

use devices::virtio_net::{NetConfig, NetHandle, VirtioNet};
use devices::virtio_rng::{RngConfig, VirtioRng};
use net::{Backend, Tap, TapOptions};
use serde_json::{Value, json};
use spec::NetKind;
use virtio::VirtioDevice;

/// A NIC that was plugged in, with the names that it goes by.
pub struct Nic {
    device: String,
    netdev: String,
    mac: [u8; 6],
    /// Of the back end, for `info network`.
    info: String,
    handle: NetHandle,
}

impl Nic {
    /// Opens the back end that `net` names and makes the device.
    ///
    /// # Errors
    /// Sentences that name the netdev, the interface or the option.
    pub fn open(
        spec: &spec::Machine,
        net: &spec::VirtioNet,
        device: &str,
    ) -> Result<(Self, Box<dyn VirtioDevice>), String> {
        let backend =
            spec.netdevs.iter().find(|n| n.id == net.netdev).ok_or_else(|| {
                format!("netdev={}: there is no -netdev of that name", net.netdev)
            })?;
        let NetKind::Tap { .. } = &backend.kind;
        let taps = open_tap(&backend.kind).map_err(|e| match backend.written.as_str() {
            // -nic and --net: said by who plugs the device.
            written if !written.starts_with("-netdev") => e,
            written => format!("{written}: {e}"),
        })?;
        let name = taps.first().map_or(String::new(), |t| t.name().to_owned());
        let queues = taps.len() as u16;
        let config = NetConfig {
            name: device.to_owned(),
            mac: net.mac,
            rx_queue_size: net.rx_queue_size,
            tx_queue_size: net.tx_queue_size,
            host_mtu: net.host_mtu,
            packed: net.packed,
        };
        let backends = taps.into_iter().map(|t| Box::new(t) as Box<dyn Backend>).collect();
        let virtio = VirtioNet::new(config, backends)?;
        let nic = Self {
            device: device.to_owned(),
            netdev: backend.id.clone(),
            mac: net.mac,
            info: format!("ifname={name},queues={queues}"),
            handle: virtio.handle(),
        };
        Ok((nic, Box::new(virtio)))
    }

    /// Whether `name` is the device or its back end.
    pub fn is_called(&self, name: &str) -> bool {
        self.device == name || self.netdev == name
    }

    /// `set_link`.
    pub fn set_link(&self, up: bool) {
        self.handle.set_link(up);
    }

    /// For `info network`.
    pub fn describe(&self) -> Value {
        let mac: Vec<_> = self.mac.iter().map(|b| format!("{b:02x}")).collect();
        json!({
            "name": self.device,
            "type": "nic",
            "info": format!("model=virtio-net-pci,macaddr={}", mac.join(":")),
            "link": self.handle.link(),
            "peer": {"name": self.netdev, "type": "tap", "info": self.info},
        })
    }
}

fn open_tap(kind: &NetKind) -> Result<Vec<Tap>, String> {
    let NetKind::Tap { ifname, fds, queues, script, downscript, bridge } = kind;
    let opened = if fds.is_empty() {
        Tap::open(&TapOptions {
            ifname: ifname.clone(),
            queues: *queues,
            script: script.clone(),
            downscript: downscript.clone(),
            bridge: bridge.clone(),
            mtu: None,
        })
    } else {
        Tap::from_fds(fds.iter().map(|fd| inherited(*fd)).collect::<Result<_, _>>()?)
    };
    opened.map_err(|e| e.to_string())
}

/// An fd that the process was started with (`fd=N`).
#[allow(unsafe_code)]
fn inherited(fd: i32) -> Result<OwnedFd, String> {
    // SAFETY: only asks whether the number is an open fd.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(format!("fd={fd}: is not an open file descriptor"));
    }
    // SAFETY: it is open, and the command line gave it to this back end alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The entropy device on `file`.
pub fn rng(name: &str, file: &Path) -> Result<Box<dyn VirtioDevice>, String> {
    let config = RngConfig { name: name.to_owned(), filename: file.to_owned(), packed: false };
    Ok(Box::new(VirtioRng::new(config)?))
}
