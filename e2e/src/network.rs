//! A network for guests on one host: a bridge in a network namespace of its own, and a tap for
//! every VMM.
//!
//! The harness opens each tap and hands the descriptor to the VMM.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use crate::error::Context;
use crate::{Error, Result};

/// The host's address on the bridge.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Its Ethernet address. A bridge without one of its own has the lowest of its ports', so that it
/// changes as taps come and go: answers on their way to the old one would be lost.
const HOST_MAC: &str = "52:54:00:77:00:01";
/// The first guest's.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// Of both.
pub const PREFIX: u32 = 24;

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
/// linux/if_tun.h.
const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
/// Frames that a tap holds for a VMM that does not read.
const QUEUE: u32 = 8192;

fn ip(args: &str) -> Result<()> {
    let out = Command::new("ip")
        .args(args.split_whitespace())
        .output()
        .context(|| "the program ip".into())?;
    if out.status.success() {
        return Ok(());
    }
    Err(Error::Host(format!("ip {args}: {}", String::from_utf8_lossy(&out.stderr).trim())))
}

/// The bridge `br0`.
pub struct Network {
    taps: u32,
}

impl Network {
    /// Moves this thread, and what it starts from now on, into a network namespace of its own, and
    /// makes the bridge there.
    ///
    /// # Errors
    /// Without root's rights.
    pub fn new() -> Result<Self> {
        // SAFETY: unshare takes no memory.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Err(io::Error::last_os_error())
                .context(|| "a network namespace needs root's rights".into());
        }
        ip("link set lo up")?;
        ip(&format!(
            "link add br0 address {HOST_MAC} type bridge forward_delay 0 stp_state 0 \
             mcast_snooping 0"
        ))?;
        ip(&format!("addr add {HOST}/{PREFIX} dev br0"))?;
        ip("link set br0 up")?;
        Ok(Self { taps: 0 })
    }

    /// A new tap on the bridge.
    pub fn tap(&mut self) -> Result<Tap> {
        let name = format!("tap{}", self.taps);
        self.taps += 1;
        let tap = Tap::open(name)?;
        ip(&format!("link set {} master br0 txqueuelen {QUEUE} up", tap.name))?;
        Ok(tap)
    }
}

/// A tap that a VMM uses; it goes when the VMM and this value are gone.
pub struct Tap {
    /// The interface.
    pub name: String,
    file: File,
}

impl Tap {
    fn open(name: String) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .context(|| "/dev/net/tun".into())?;
        // SAFETY: ifreq is plain data for which all zeroes is a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        // SAFETY: TUNSETIFF takes an ifreq, which outlives the call.
        if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &mut request) } != 0 {
            return Err(io::Error::last_os_error())
                .context(|| format!("cannot make the tap {name}"));
        }
        Ok(Self { name, file })
    }

    /// The descriptor for a VMM.
    pub fn descriptor(&self) -> Result<OwnedFd> {
        Ok(self.file.try_clone().context(|| format!("tap {}", self.name))?.into())
    }
}
