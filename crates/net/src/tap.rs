//! The kernel's tap device: one [`Tap`] a queue. Frames pass between guest memory and the kernel
//! with the virtio-net header in front, so that nothing is copied or converted here.
#![allow(unsafe_code)] // ioctls, readv, writev

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use crate::interface::{control_socket, get_mtu, ifreq, index_of, ioctl, ioctl_mut};
use crate::{Backend, Error, HEADER, Offloads, Result};

// linux/if_tun.h
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETFEATURES: libc::c_ulong = 0x8004_54cf;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;
const TUN_F_TSO_ECN: u32 = 8;
const TUN_F_UFO: u32 = 16;
// linux/sockios.h
const SIOCBRADDIF: libc::c_ulong = 0x89a2;

/// How tap queues are opened.
#[derive(Debug, Clone, Default)]
pub struct TapOptions {
    /// Interface name; one with a `%d` or none at all lets the kernel choose.
    pub ifname: Option<String>,
    /// Queues, 1 to 64.
    pub queues: u16,
    /// Run with the interface's name as its argument after opening.
    pub script: Option<PathBuf>,
    /// Run likewise when the last queue is closed.
    pub downscript: Option<PathBuf>,
    /// Bridge that the interface is added to.
    pub bridge: Option<String>,
    /// MTU to set.
    pub mtu: Option<u16>,
}

/// What all queues of an interface have in common; its end is the interface's end.
#[derive(Debug)]
struct Interface {
    name: String,
    multi_queue: bool,
    downscript: Option<PathBuf>,
}

impl Drop for Interface {
    fn drop(&mut self) {
        if let Some(script) = &self.downscript
            && let Err(e) = run_script(script, &self.name)
        {
            tracing::warn!("{e}");
        }
    }
}

/// One queue of a tap interface.
#[derive(Debug)]
pub struct Tap {
    // Before `file`: the down script runs while the interface is still there.
    interface: Arc<Interface>,
    file: File,
    capabilities: Offloads,
    enabled: bool,
    mtu: u16,
}

impl Tap {
    /// Opens the queues of one interface, making it if it is not there, and brings it up.
    ///
    /// # Errors
    /// Each names the interface and what to do.
    pub fn open(o: &TapOptions) -> Result<Vec<Self>> {
        if !(1..=64).contains(&o.queues) {
            return Err(Error::Option(format!("queues={}: must be 1 to 64", o.queues)));
        }
        let multi = o.queues > 1;
        let mut files = Vec::new();
        let mut name = o.ifname.clone().unwrap_or_else(|| "tap%d".into());
        for _ in 0..o.queues {
            let file = open_tun()?;
            name = attach(&file, &name, multi)?;
            files.push(file);
        }
        let interface = Interface { name: name.clone(), multi_queue: multi, downscript: None };
        let mut interface = Arc::new(interface);
        if let Some(mtu) = o.mtu {
            set_mtu(&name, mtu)?;
        }
        if let Some(bridge) = &o.bridge {
            add_to_bridge(&name, bridge)?;
        }
        if let Some(script) = &o.script {
            run_script(script, &name)?;
        } else {
            set_up(&name)?;
        }
        if let Some(i) = Arc::get_mut(&mut interface) {
            i.downscript = o.downscript.clone();
        }
        files.into_iter().map(|f| Self::from_file(f, interface.clone())).collect()
    }

    /// Takes over open tap fds (`fd=`, `fds=`), one a queue; they are closed with it.
    ///
    /// # Errors
    /// When one is not a tap that can carry the virtio-net header.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Vec<Self>> {
        let multi_queue = fds.len() > 1;
        let mut interface: Option<Arc<Interface>> = None;
        let mut taps = Vec::new();
        for fd in fds {
            let file = File::from(fd);
            let number = file.as_raw_fd();
            let (name, flags) = interface_of(&file).map_err(|source| Error::Attach {
                name: format!("fd {number}"),
                source,
                advice: "the fd must be an open tap (/dev/net/tun after TUNSETIFF)",
            })?;
            let flags = i32::from(flags);
            if flags & libc::IFF_TAP == 0 || flags & libc::IFF_VNET_HDR == 0 {
                return Err(Error::Option(format!(
                    "fd {number} ('{name}') must be a tap opened with IFF_VNET_HDR"
                )));
            }
            set_nonblocking(&file).map_err(|source| Error::Setting {
                name: name.clone(),
                what: "make it non-blocking",
                source,
            })?;
            let shared = interface
                .get_or_insert_with(|| Arc::new(Interface { name, multi_queue, downscript: None }));
            taps.push(Self::from_file(file, shared.clone())?);
        }
        Ok(taps)
    }

    /// As [`from_fds`](Self::from_fds), from numbers as they come on a command line.
    ///
    /// # Safety
    /// The caller owns the fds and uses them no more.
    pub unsafe fn from_raw_fds(fds: &[RawFd]) -> Result<Vec<Self>> {
        if let Some(bad) = fds.iter().find(|fd| !is_open(**fd)) {
            return Err(Error::Option(format!("fd={bad}: no such open file descriptor")));
        }
        // SAFETY: they are open and the caller gives them away.
        Self::from_fds(fds.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }).collect())
    }

    fn from_file(file: File, interface: Arc<Interface>) -> Result<Self> {
        let name = interface.name.clone();
        let size = HEADER as libc::c_int;
        ioctl(&file, TUNSETVNETHDRSZ, &size).map_err(|source| Error::Setting {
            name: name.clone(),
            what: "set the header size to 12 bytes",
            source,
        })?;
        let mut capabilities = Offloads::default();
        // UFO last: newer kernels refuse it.
        for (candidate, _) in [(Offloads { ufo: false, ..Offloads::ALL }, 0), (Offloads::ALL, 1)] {
            if set_offload(&file, candidate).is_ok() {
                capabilities = candidate;
            }
        }
        set_offload(&file, Offloads::default()).map_err(|source| Error::Setting {
            name: name.clone(),
            what: "switch its offloads off",
            source,
        })?;
        let mtu = get_mtu(&name).unwrap_or(1500);
        Ok(Self { interface, file, capabilities, enabled: true, mtu })
    }

    /// The interface's name.
    pub fn ifname(&self) -> &str {
        &self.interface.name
    }
}

/// Tells whether a tap is still there, wherever its interface was moved to. The tap stays as long as
/// this does.
pub struct TapWatch(File);

impl TapWatch {
    /// Watches the tap that `tap` is a queue of.
    ///
    /// # Errors
    /// When its descriptor cannot be duplicated.
    pub fn new(tap: &Tap) -> io::Result<Self> {
        tap.file.try_clone().map(Self)
    }

    /// Whether the interface was removed.
    pub fn is_gone(&self) -> bool {
        interface_of(&self.0).is_err()
    }
}

impl Backend for Tap {
    fn name(&self) -> &str {
        self.ifname()
    }

    fn poll_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    unsafe fn recv(&mut self, iov: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller's iovecs are valid for writes.
        let n =
            unsafe { libc::readv(self.file.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    unsafe fn send(&mut self, iov: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller's iovecs are valid for reads.
        let n =
            unsafe { libc::writev(self.file.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    fn capabilities(&self) -> Offloads {
        self.capabilities
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        set_offload(&self.file, offloads)
    }

    fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        if enabled == self.enabled || !self.interface.multi_queue {
            return Ok(());
        }
        let flag = if enabled { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        let mut ifr = ifreq("");
        ifr.ifr_ifru.ifru_flags = flag as libc::c_short;
        ioctl(&self.file, TUNSETQUEUE, &ifr)?;
        self.enabled = enabled;
        Ok(())
    }

    fn set_link(&mut self, _up: bool) {
        // The interface belongs to the host's administrator; the NIC itself drops frames.
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: only numbers are passed.
    unsafe { libc::fcntl(fd, libc::F_GETFD) != -1 }
}

fn set_nonblocking(file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: only numbers are passed.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags < 0 || libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn name_of(ifr: &libc::ifreq) -> String {
    ifr.ifr_name.iter().take_while(|c| **c != 0).map(|c| *c as u8 as char).collect()
}

fn check_name(name: &str) -> Result<()> {
    let bad = |c: char| c == '/' || c.is_whitespace() || c == '\0' || !c.is_ascii();
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(bad) {
        return Err(Error::Option(format!(
            "'{name}' is not an interface name: 1 to 15 characters, no '/' or space"
        )));
    }
    Ok(())
}

fn open_tun() -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(|source| {
            let advice = match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    "give this user access to it, or pass an open tap with fd="
                }
                _ => "load the kernel module: modprobe tun",
            };
            Error::NoTun { source, advice }
        })?;
    let mut features: libc::c_uint = 0;
    let known = ioctl_mut(&file, TUNGETFEATURES, &mut features).is_ok();
    if known && features & libc::IFF_VNET_HDR as libc::c_uint == 0 {
        return Err(Error::Option("this kernel's tun driver has no IFF_VNET_HDR".into()));
    }
    Ok(file)
}

/// Attaches `file` to interface `name`; returns its name as the kernel made it.
fn attach(file: &File, name: &str, multi: bool) -> Result<String> {
    check_name(name)?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if multi {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut ifr = ifreq(name);
    ifr.ifr_ifru.ifru_flags = flags as libc::c_short;
    ioctl_mut(file, TUNSETIFF, &mut ifr).map_err(|source| {
        let advice = match source.raw_os_error() {
            Some(libc::EPERM) => {
                "this needs CAP_NET_ADMIN; or make it for this user with \
                 'ip tuntap add dev NAME mode tap user USER vnet_hdr', or pass it with fd="
            }
            Some(libc::EBUSY) => "another process uses it",
            Some(libc::EINVAL) if !is_tap(name) => {
                "it is another kind of interface; give the name of a tap, or a new one to make it"
            }
            Some(libc::EINVAL) => {
                "it exists with other flags: a tap made for several queues needs queues=2 or more \
                 and multi_queue, one made for one queue needs queues=1"
            }
            _ => "see 'ip -details link show'",
        };
        Error::Attach { name: name.into(), source, advice }
    })?;
    Ok(name_of(&ifr))
}

/// Whether the interface there is one of the tun driver's.
fn is_tap(name: &str) -> bool {
    Path::new("/sys/class/net").join(name).join("tun_flags").exists()
}

fn interface_of(file: &File) -> io::Result<(String, libc::c_short)> {
    let mut ifr = ifreq("");
    ioctl_mut(file, TUNGETIFF, &mut ifr)?;
    // SAFETY: TUNGETIFF fills the flags in.
    Ok((name_of(&ifr), unsafe { ifr.ifr_ifru.ifru_flags }))
}

fn set_offload(file: &File, o: Offloads) -> io::Result<()> {
    let mut bits = 0;
    // The kernel takes the others only together with the checksum.
    if o.csum {
        bits |= TUN_F_CSUM;
        for (on, bit) in [(o.tso4, TUN_F_TSO4), (o.tso6, TUN_F_TSO6), (o.ufo, TUN_F_UFO)] {
            bits |= if on { bit } else { 0 };
        }
        if o.ecn && (o.tso4 || o.tso6) {
            bits |= TUN_F_TSO_ECN;
        }
    }
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    match unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(bits)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn setting(name: &str, what: &'static str) -> impl Fn(io::Error) -> Error {
    let name = name.to_owned();
    move |source| Error::Setting { name: name.clone(), what, source }
}

fn set_up(name: &str) -> Result<()> {
    let err = setting(name, "bring it up");
    let socket = control_socket().map_err(&err)?;
    let mut ifr = ifreq(name);
    ioctl_mut(&socket, libc::SIOCGIFFLAGS as libc::c_ulong, &mut ifr).map_err(&err)?;
    // SAFETY: SIOCGIFFLAGS filled the flags in.
    let flags = unsafe { ifr.ifr_ifru.ifru_flags };
    if i32::from(flags) & libc::IFF_UP != 0 {
        return Ok(()); // an unprivileged user may use an interface that is up already
    }
    ifr.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    ioctl(&socket, libc::SIOCSIFFLAGS as libc::c_ulong, &ifr).map_err(&err)
}

fn set_mtu(name: &str, mtu: u16) -> Result<()> {
    let err = setting(name, "set its MTU");
    let socket = control_socket().map_err(&err)?;
    let mut ifr = ifreq(name);
    ifr.ifr_ifru.ifru_mtu = i32::from(mtu);
    ioctl(&socket, libc::SIOCSIFMTU as libc::c_ulong, &ifr).map_err(&err)
}

fn add_to_bridge(name: &str, bridge: &str) -> Result<()> {
    check_name(bridge)?;
    let err = setting(name, "add it to its bridge");
    let socket = control_socket().map_err(&err)?;
    let index = index_of(name).map_err(&err)?;
    let mut ifr = ifreq(bridge);
    ifr.ifr_ifru.ifru_ifindex = index as libc::c_int;
    match ioctl(&socket, SIOCBRADDIF, &ifr) {
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => {
            Err(Error::Option(format!("bridge '{bridge}' does not exist")))
        }
        // EBUSY: it is a port of a bridge already, which may well be this one.
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) && is_port_of(name, bridge) => Ok(()),
        other => other.map_err(err),
    }
}

fn is_port_of(name: &str, bridge: &str) -> bool {
    std::fs::read_link(format!("/sys/class/net/{name}/brport/bridge"))
        .is_ok_and(|p| p.file_name().is_some_and(|f| f == bridge))
}

fn run_script(script: &Path, name: &str) -> Result<()> {
    let fail = |reason| Error::Script {
        script: script.display().to_string(),
        name: name.to_owned(),
        reason,
    };
    let status = Command::new(script)
        .arg(name)
        .stdin(Stdio::null())
        .status()
        .map_err(|e| fail(e.to_string()))?;
    if status.success() { Ok(()) } else { Err(fail(status.to_string())) }
}
