//! What the kernel says of a network interface, by ioctls on a socket. Source: netdevice(7),
//! linux/ethtool.h. Everything is asked in the caller's network namespace.
#![allow(unsafe_code)] // ioctls

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

// linux/ethtool.h
const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_SFLAGS: u32 = 0x26;
const ETHTOOL_GCHANNELS: u32 = 0x3c;
const ETH_FLAG_RXVLAN: u32 = 1 << 8;

pub(crate) fn ioctl<T>(fd: &impl AsRawFd, request: libc::c_ulong, arg: &T) -> io::Result<()> {
    // SAFETY: every caller passes the type that the request reads; none writes.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_ref(arg)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

pub(crate) fn ioctl_mut<T>(
    fd: &impl AsRawFd,
    request: libc::c_ulong,
    arg: &mut T,
) -> io::Result<()> {
    // SAFETY: every caller passes the type that the request reads or writes.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(arg)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// An ifreq with `name`, cut to what fits.
pub(crate) fn ifreq(name: &str) -> libc::ifreq {
    // SAFETY: all zeroes is a valid ifreq.
    let mut ifr: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in ifr.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    ifr
}

/// A socket for interface ioctls.
pub(crate) fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: only numbers are passed.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The number of interface `name`, above 0.
///
/// # Errors
/// There is none.
pub fn index_of(name: &str) -> io::Result<u32> {
    let c_name = CString::new(name)?;
    // SAFETY: a C string.
    match unsafe { libc::if_nametoindex(c_name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

pub(crate) fn get_mtu(name: &str) -> io::Result<u16> {
    let socket = control_socket()?;
    let mut ifr = ifreq(name);
    ioctl_mut(&socket, libc::SIOCGIFMTU as libc::c_ulong, &mut ifr)?;
    // SAFETY: SIOCGIFMTU filled the MTU in.
    let mtu = unsafe { ifr.ifr_ifru.ifru_mtu };
    Ok(u16::try_from(mtu).unwrap_or(u16::MAX))
}

/// Runs an ethtool command: `arg` begins with its number, and is filled in.
///
/// # Safety
/// `T` is what the command reads and writes.
unsafe fn ethtool<T>(name: &str, arg: &mut T) -> io::Result<()> {
    let socket = control_socket()?;
    let mut ifr = ifreq(name);
    ifr.ifr_ifru.ifru_data = std::ptr::from_mut(arg).cast();
    ioctl_mut(&socket, libc::SIOCETHTOOL as libc::c_ulong, &mut ifr)
}

/// Channels of interface `name` that receive (`ethtool -l`); `None` where its driver does not say.
pub(crate) fn channels(name: &str) -> Option<u32> {
    #[repr(C)]
    #[derive(Default)]
    struct Channels {
        command: u32,
        max: [u32; 4],
        rx: u32,
        tx: u32,
        other: u32,
        combined: u32,
    }
    let mut c = Channels { command: ETHTOOL_GCHANNELS, ..Channels::default() };
    // SAFETY: struct ethtool_channels.
    unsafe { ethtool(name, &mut c) }.ok()?;
    Some(c.combined.saturating_add(c.rx)).filter(|n| *n > 0)
}

/// Whether interface `name` is made of software alone (veth, a bridge, ...): frames come from this
/// host itself, and may lack what hardware would have filled in.
pub(crate) fn is_virtual(name: &str) -> bool {
    #[repr(C)]
    struct DriverInfo {
        command: u32,
        names: [[u8; 32]; 3],
        bus_info: [u8; 32],
        rest: [u8; 32 + 12 + 5 * 4],
    }
    let mut d = DriverInfo {
        command: ETHTOOL_GDRVINFO,
        names: [[0; 32]; 3],
        bus_info: [0; 32],
        rest: [0; 64],
    };
    // SAFETY: struct ethtool_drvinfo.
    unsafe { ethtool(name, &mut d) }.is_err() || d.bus_info[0] == 0
}

#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Whether interface `name` takes VLAN tags out of the frames that it receives (`ethtool -k`, rxvlan).
pub fn strips_tags(name: &str) -> bool {
    let mut v = Value { command: ETHTOOL_GFLAGS, data: 0 };
    // SAFETY: struct ethtool_value.
    unsafe { ethtool(name, &mut v) }.is_ok() && v.data & ETH_FLAG_RXVLAN != 0
}

/// Lets interface `name` take tags out, or leave them in.
pub(crate) fn set_strips_tags(name: &str, on: bool) -> io::Result<()> {
    let mut v = Value { command: ETHTOOL_GFLAGS, data: 0 };
    // SAFETY: struct ethtool_value, twice.
    unsafe {
        ethtool(name, &mut v)?;
        v.data = if on { v.data | ETH_FLAG_RXVLAN } else { v.data & !ETH_FLAG_RXVLAN };
        v.command = ETHTOOL_SFLAGS;
        ethtool(name, &mut v)
    }
}
