//! A network interface of the host by AF_XDP: an XDP program of our own hands what the interface
//! receives to one socket a queue, past the host's network stack, and the sockets send past it.
//!
//! - [`socket`]: [`XdpSocket`], one queue: memory, rings, frames.
//! - [`ring`]: rings that are shared with the kernel.
//! - [`program`]: the XDP program and its attachment.

mod program;
mod ring;
mod socket;

use std::io;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
pub use socket::{CHUNK_FRAME, Lost, MAX_BURST, Refused, Sent, XdpSocket};

use crate::{Error, Result, af_packet, interface};
use program::{Hook, Program};
use socket::Copying;

/// Bytes of an Ethernet header with a VLAN tag.
const LINK_HEADER: usize = 18;

/// Rings that the kernel would never leave so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// An index.
    #[error("the kernel's index is more than the ring's size away from ours")]
    Index,
    /// An address or a length.
    #[error("the kernel's descriptor names memory that is not the ring's")]
    Descriptor,
    /// Memory that comes twice.
    #[error("the kernel gives more memory than it was given")]
    Chunks,
    /// A frame.
    #[error("a frame of more parts than the kernel makes")]
    Pieces,
}

/// How an interface is used. The names are those of Open vSwitch's `options:xdp-mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum XdpMode {
    /// The first of the three below that works.
    #[default]
    BestEffort,
    /// The driver runs the program and puts frames into our memory itself.
    #[serde(rename = "native-with-zerocopy")]
    NativeWithZeroCopy,
    /// The driver runs the program, frames are copied.
    Native,
    /// The network stack runs the program; any interface has this.
    Generic,
}

/// An interface with its sockets.
pub struct XdpInterface {
    /// One a queue.
    pub sockets: Vec<XdpSocket>,
    pub attachment: Attachment,
}

/// What keeps an interface's frames coming; they go to the host's stack when it is dropped.
pub struct Attachment {
    /// How it is used: never [`XdpMode::BestEffort`].
    pub mode: XdpMode,
    /// Why not by the driver, if that was tried.
    pub why_generic: Option<String>,
    /// Its number.
    pub index: u32,
    /// Largest payload of a frame, in bytes.
    pub mtu: u16,
    /// Frames that come from this host itself may lack their checksum, and nothing says so.
    pub unfinished_checksums: bool,
    _tags: Option<TagsLeftIn>,
    _link: OwnedFd,
    _program: Program,
    _promiscuous: OwnedFd,
}

/// An interface that takes VLAN tags out of frames says them beside the frame, where XDP does not
/// see them. So it is told to leave them in, until this is dropped.
struct TagsLeftIn(String);

impl TagsLeftIn {
    fn new(name: &str) -> Option<Self> {
        if !interface::strips_tags(name) {
            return None;
        }
        if let Err(e) = interface::set_strips_tags(name, false) {
            tracing::warn!(
                "interface '{name}' takes VLAN tags out of frames and cannot be told not to ({e}): \
                 tagged frames that it receives look untagged"
            );
            return None;
        }
        Some(Self(name.to_owned()))
    }
}

impl Drop for TagsLeftIn {
    fn drop(&mut self) {
        // It may have gone.
        let _ = interface::set_strips_tags(&self.0, true);
    }
}

fn failed(name: &str, what: &'static str) -> impl FnOnce(io::Error) -> Error {
    let name = name.to_owned();
    move |source| Error::Interface { name, what, source }
}

impl XdpInterface {
    /// Attaches to interface `name`: what comes in on its first `queues` (1 to 64) receive queues goes
    /// to the sockets. It hears everything (it is promiscuous) until this is dropped.
    ///
    /// # Errors
    /// Each names the interface, what was tried, and what to do.
    pub fn open(name: &str, queues: u16, mode: XdpMode) -> Result<Self> {
        if !(1..=64).contains(&queues) {
            return Err(Error::Option(format!("queues={queues}: must be 1 to 64")));
        }
        let index = interface::index_of(name).map_err(failed(name, "find it"))?;
        check_channels(name, queues)?;
        let mtu = interface::get_mtu(name).map_err(failed(name, "ask for its MTU"))?;
        let several = usize::from(mtu) + LINK_HEADER > CHUNK_FRAME;
        let promiscuous = af_packet::promiscuous(name, index)?;
        let program = Program::load(u32::from(queues), several).map_err(|source| {
            let advice = match source.raw_os_error() {
                Some(libc::EPERM) => {
                    "; this needs CAP_BPF, CAP_NET_ADMIN and CAP_NET_RAW, and not only in a user \
                     namespace: run the switch as root, or use type=af-packet"
                }
                _ if several => "; an MTU above 3822 needs Linux 6.6 or later",
                _ => "; Linux 5.9 or later with CONFIG_XDP_SOCKETS is needed",
            };
            Error::Xdp { name: name.into(), what: "load an XDP program".into(), source, advice }
        })?;
        let attached = attach(&program, name, index, mode)?;
        let copying = match (mode, attached.hook) {
            (XdpMode::NativeWithZeroCopy, _) => Copying::Never,
            (XdpMode::BestEffort, Hook::Native) => Copying::IfNeeded,
            _ => Copying::Always,
        };
        let mut sockets = Vec::new();
        for queue in 0..u32::from(queues) {
            let socket = XdpSocket::open(index, queue, copying, several)
                .map_err(|(what, e)| socket_error(name, queue, what, e, several))?;
            program
                .redirect(queue, socket.fd())
                .map_err(failed(name, "give an AF_XDP socket its queue"))?;
            sockets.push(socket);
        }
        let mode = match attached.hook {
            Hook::Generic => XdpMode::Generic,
            Hook::Native if sockets.iter().all(XdpSocket::is_zero_copy) => {
                XdpMode::NativeWithZeroCopy
            }
            Hook::Native => XdpMode::Native,
        };
        let attachment = Attachment {
            mode,
            why_generic: attached.why_generic,
            index,
            mtu,
            unfinished_checksums: mode == XdpMode::Generic || interface::is_virtual(name),
            _tags: TagsLeftIn::new(name),
            _link: attached.link,
            _program: program,
            _promiscuous: promiscuous,
        };
        Ok(Self { sockets, attachment })
    }
}

/// Refuses more queues than there are, and says so where there are more.
fn check_channels(name: &str, queues: u16) -> Result<()> {
    let Some(channels) = interface::channels(name) else { return Ok(()) };
    if u32::from(queues) > channels {
        return Err(Error::Option(format!(
            "interface '{name}' has {channels} receive channels: queues={queues} is too many (see \
             'ethtool -l {name}')"
        )));
    }
    if u32::from(queues) < channels {
        tracing::warn!(
            "interface '{name}' has {channels} receive channels and the port {queues} queues: what \
             arrives on the others goes to the host's stack, not to the switch; use \
             queues={channels}, or 'ethtool -L {name} combined {queues}'"
        );
    }
    Ok(())
}

struct Attached {
    link: OwnedFd,
    hook: Hook,
    why_generic: Option<String>,
}

fn attach(program: &Program, name: &str, index: u32, mode: XdpMode) -> Result<Attached> {
    let refused = |hook: Hook, source: io::Error| {
        let advice = match source.raw_os_error() {
            Some(libc::EBUSY | libc::EEXIST) => {
                "; it has an XDP program already: see 'ip link show', and take it away with 'ip link \
                 set dev NAME xdp off' if nobody needs it"
            }
            Some(libc::EOPNOTSUPP) if hook == Hook::Native => {
                "; its driver has no XDP: use xdp-mode=generic"
            }
            Some(libc::ENOSPC) if hook == Hook::Native => {
                "; the other end of a veth pair may not have more queues than this one: see 'ethtool \
                 -l', or use xdp-mode=generic"
            }
            Some(libc::ERANGE | libc::EINVAL) if hook == Hook::Native => {
                "; its driver may not take XDP with this MTU: lower it, or use xdp-mode=generic"
            }
            _ => "",
        };
        let what = match hook {
            Hook::Native => "attach an XDP program to its driver",
            Hook::Generic => "attach an XDP program",
        };
        Error::Xdp { name: name.into(), what: what.into(), source, advice }
    };
    let mut why_generic = None;
    if mode != XdpMode::Generic {
        match program.attach(index, Hook::Native) {
            Ok(link) => return Ok(Attached { link, hook: Hook::Native, why_generic }),
            Err(e) => {
                let taken = matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EEXIST));
                if taken || mode != XdpMode::BestEffort {
                    return Err(refused(Hook::Native, e));
                }
                why_generic = Some(format!("its driver refuses XDP: {e}"));
            }
        }
    }
    let link = program.attach(index, Hook::Generic).map_err(|e| refused(Hook::Generic, e))?;
    Ok(Attached { link, hook: Hook::Generic, why_generic })
}

fn socket_error(name: &str, queue: u32, what: &str, source: io::Error, several: bool) -> Error {
    let advice = match source.raw_os_error() {
        Some(libc::EPERM) => "; it needs CAP_NET_RAW",
        Some(libc::EAFNOSUPPORT) => "; a kernel with CONFIG_XDP_SOCKETS is needed",
        Some(libc::ENOBUFS) => {
            "; it locks 16 MiB of memory for each queue: raise the limit ('ulimit -l')"
        }
        Some(libc::EBUSY) => "; another AF_XDP socket has it",
        Some(libc::EINVAL) if several => {
            "; an MTU above 3822 needs Linux 6.6 or later: lower it ('ip link set dev NAME mtu 3822')"
        }
        Some(libc::EINVAL) => "; has the interface this queue? ('ethtool -l')",
        Some(libc::EOPNOTSUPP) => "; its driver has no zero-copy: use xdp-mode=native",
        _ => "",
    };
    Error::Xdp { name: name.into(), what: format!("{what} (queue {queue})"), source, advice }
}
