//! A port on an interface of the host: a tap, packet sockets, AF_XDP sockets. Opening what is behind
//! it, and noticing that the interface goes.
#![allow(unsafe_code)] // a netlink socket

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use net::af_xdp::{Attachment, XdpInterface};
use net::{Backend, PacketSocket, Tap, TapOptions, TapWatch, interface};

use crate::config::{PortSpec, PortType};
use crate::queue::Io;
use crate::tap_queue::TapQueue;
use crate::xdp_queue::XdpQueue;

/// What a port on an interface keeps; its queues are the poll threads'.
pub struct InterfacePort {
    interface: Interface,
    /// What keeps an AF_XDP port's frames coming.
    pub xdp: Option<Attachment>,
    /// Why it has no queues now.
    pub down: Option<String>,
}

/// How the interface is known again.
enum Interface {
    /// By its number: one that was made anew under the same name has another.
    Number(u32),
    /// By the descriptor: it may have been moved to another network namespace.
    Tap(TapWatch),
}

impl InterfacePort {
    /// Opens the interface of `spec`, with what is behind each queue.
    ///
    /// # Errors
    /// A sentence that names the interface.
    pub fn open(spec: &PortSpec) -> Result<(Self, Vec<Io>), String> {
        let ifname = spec.ifname.as_deref().unwrap_or_default();
        let text = |e: net::Error| e.to_string();
        let (interface, backends): (_, Vec<Box<dyn Backend>>) = match spec.kind {
            PortType::AfXdp => return open_xdp(spec, ifname).map_err(text),
            PortType::AfPacket => {
                let index = interface::index_of(ifname)
                    .map_err(|e| format!("interface '{ifname}': cannot find it: {e}"))?;
                let sockets = PacketSocket::open(ifname, spec.queues).map_err(text)?;
                (Interface::Number(index), sockets.into_iter().map(|s| Box::new(s) as _).collect())
            }
            PortType::Tap | PortType::VhostUser => {
                let (ifname, queues, mtu) = (Some(ifname.into()), spec.queues, spec.mtu);
                let options = TapOptions { ifname, queues, mtu, ..TapOptions::default() };
                let taps = Tap::open(&options).map_err(text)?;
                let first = taps.first().ok_or("no queues")?;
                let watch = TapWatch::new(first).map_err(|e| e.to_string())?;
                (Interface::Tap(watch), taps.into_iter().map(|t| Box::new(t) as _).collect())
            }
        };
        let queue = |b| TapQueue::new(b).map(|t| Io::Fd(Box::new(t)));
        let ios: io::Result<_> = backends.into_iter().map(queue).collect();
        Ok((Self { interface, xdp: None, down: None }, ios.map_err(|e| e.to_string())?))
    }

    /// Whether the interface that it was opened on is no longer there.
    pub fn is_gone(&self) -> bool {
        match &self.interface {
            Interface::Number(index) => {
                let mut name = [0; libc::IFNAMSIZ];
                // SAFETY: the name is written to a buffer of IF_NAMESIZE bytes.
                unsafe { libc::if_indextoname(*index, name.as_mut_ptr()).is_null() }
            }
            Interface::Tap(watch) => watch.is_gone(),
        }
    }
}

fn open_xdp(spec: &PortSpec, ifname: &str) -> net::Result<(InterfacePort, Vec<Io>)> {
    let XdpInterface { sockets, attachment } =
        XdpInterface::open(ifname, spec.queues, spec.xdp_mode.unwrap_or_default())?;
    let (mtu, unfinished) = (attachment.mtu, attachment.unfinished_checksums);
    let ios =
        sockets.into_iter().map(|s| Io::Xdp(Box::new(XdpQueue::new(s, mtu, unfinished)))).collect();
    let interface = Interface::Number(attachment.index);
    Ok((InterfacePort { interface, xdp: Some(attachment), down: None }, ios))
}

/// Readable when some interface of the host has changed.
pub struct LinkMonitor(OwnedFd);

impl LinkMonitor {
    /// Starts listening. Source: rtnetlink(7).
    ///
    /// # Errors
    /// When the host gives no netlink socket.
    pub fn new() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: only numbers are passed.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just opened and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all zeroes is a valid sockaddr_nl.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        address.nl_groups = libc::RTMGRP_LINK as u32;
        let len = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        // SAFETY: the address is a sockaddr_nl of that length.
        let bound = unsafe { libc::bind(fd.as_raw_fd(), std::ptr::from_ref(&address).cast(), len) };
        if bound == 0 { Ok(Self(fd)) } else { Err(io::Error::last_os_error()) }
    }

    /// Takes what has come. What it says is not looked at: some of it may have been lost on the way.
    pub fn drain(&self) {
        let mut buffer = [0u8; 8192];
        // No more than the socket's buffer holds; what comes meanwhile makes it readable again.
        for _ in 0..64 {
            // SAFETY: the kernel writes at most the buffer's length into it.
            let n = unsafe {
                libc::recv(self.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0)
            };
            if n < 0 && io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock {
                return;
            }
        }
    }
}

impl AsRawFd for LinkMonitor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
