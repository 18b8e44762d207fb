//! A network interface of the host by packet sockets: one [`PacketSocket`] a queue, with the
//! virtio-net header, so that checksums and large segments pass whole. Source: packet(7).
//!
//! The kernel takes VLAN tags out of what it hands up and says them apart; they are put back here.
#![allow(unsafe_code)] // sockets, readv, writev

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::{Backend, Error, HEADER, Offloads, Result, interface};

// linux/if_packet.h
const PACKET_ADD_MEMBERSHIP: libc::c_int = 1;
const PACKET_STATISTICS: libc::c_int = 6;
const PACKET_AUXDATA: libc::c_int = 8;
const PACKET_VNET_HDR: libc::c_int = 15;
const PACKET_FANOUT: libc::c_int = 18;
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
const PACKET_MR_PROMISC: libc::c_ushort = 1;
const PACKET_FANOUT_HASH: u32 = 0;
const TP_STATUS_VLAN_VALID: u32 = 1 << 4;

/// Bytes of frames that may wait in a socket.
const RECEIVE_BUFFER: libc::c_int = 16 << 20;

/// Bytes of the header as packet sockets have it: without the number of buffers.
const SHORT: usize = 10;
/// Where a tag goes: behind header and addresses.
const TAG_AT: usize = HEADER + 12;

#[repr(C)]
#[derive(Default)]
struct Membership {
    index: libc::c_int,
    kind: libc::c_ushort,
    len: libc::c_ushort,
    address: [u8; 8],
}

#[repr(C)]
#[derive(Default, Clone, Copy)]
struct AuxData {
    status: u32,
    len: u32,
    snaplen: u32,
    mac: u16,
    net: u16,
    vlan_tci: u16,
    vlan_tpid: u16,
}

/// One queue of an interface.
pub struct PacketSocket {
    name: String,
    fd: OwnedFd,
    mtu: u16,
    iov: Vec<libc::iovec>,
    bounce: Vec<u8>,
}

// SAFETY: `iov` is only filled and used within one call.
unsafe impl Send for PacketSocket {}

fn failed(name: &str, what: &'static str) -> impl FnOnce(io::Error) -> Error {
    let name = name.to_owned();
    move |source| Error::Interface { name, what, source }
}

fn set<T>(fd: &OwnedFd, option: libc::c_int, value: &T) -> io::Result<()> {
    set_at(fd, libc::SOL_PACKET, option, value)
}

fn set_at<T>(fd: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the kernel reads size_of::<T>() bytes of `value`.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl PacketSocket {
    /// Opens `queues` (1 to 64) sockets on interface `name`, which then hears everything (it is
    /// promiscuous while they are open). What comes in is spread over them by flow.
    ///
    /// # Errors
    /// Each names the interface and what was tried.
    pub fn open(name: &str, queues: u16) -> Result<Vec<Self>> {
        if !(1..=64).contains(&queues) {
            return Err(Error::Option(format!("queues={queues}: must be 1 to 64")));
        }
        let index = interface::index_of(name).map_err(failed(name, "find it"))?;
        let mtu = interface::get_mtu(name).unwrap_or(1500);
        let mut all = Vec::new();
        for _ in 0..queues {
            let fd = open_one(name, index)?;
            if queues > 1 {
                // One group for each process and interface: other users' are left alone.
                let group = (std::process::id() ^ index << 8) & 0xffff;
                set(&fd, PACKET_FANOUT, &(group | PACKET_FANOUT_HASH << 16))
                    .map_err(failed(name, "spread it over queues"))?;
            }
            let (iov, bounce) = (Vec::with_capacity(64), Vec::new());
            all.push(Self { name: name.to_owned(), fd, mtu, iov, bounce });
        }
        Ok(all)
    }

    /// Puts the tag that the kernel took out back into a frame of `n` bytes with its header.
    fn restore_tag(&mut self, iov: &[libc::iovec], n: usize, aux: AuxData) -> usize {
        if n < TAG_AT {
            return n;
        }
        let room: usize = iov.iter().map(|v| v.iov_len).sum();
        self.bounce.clear();
        for v in iov {
            let take = v.iov_len.min(n - self.bounce.len());
            // SAFETY: the caller of `recv` promised valid buffers; u8 has no invalid values. A guest
            // may write at the same time: the bytes are only copied.
            unsafe {
                let at = self.bounce.len();
                self.bounce.resize(at + take, 0);
                let to = self.bounce.as_mut_ptr().add(at);
                std::ptr::copy_nonoverlapping(v.iov_base.cast::<u8>(), to, take);
            }
        }
        let tpid = if aux.vlan_tpid == 0 { 0x8100 } else { aux.vlan_tpid };
        let tag = [tpid.to_be_bytes(), aux.vlan_tci.to_be_bytes()].concat();
        self.bounce.splice(TAG_AT..TAG_AT, tag);
        // The checksum's place moves with what follows the tag.
        if self.bounce[0] & 1 != 0 {
            let start = u16::from_le_bytes([self.bounce[6], self.bounce[7]]).saturating_add(4);
            self.bounce[6..8].copy_from_slice(&start.to_le_bytes());
        }
        let mut done = 0;
        for v in iov {
            let give = v.iov_len.min(self.bounce.len() - done);
            // SAFETY: as above, the other way round.
            unsafe {
                let from = self.bounce.as_ptr().add(done);
                std::ptr::copy_nonoverlapping(from, v.iov_base.cast::<u8>(), give);
            }
            done += give;
        }
        done.min(room)
    }
}

/// A packet socket that receives nothing yet: it has no protocol.
fn open_silent(name: &str) -> Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: only numbers are passed.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    if fd < 0 {
        return Err(failed(name, "open a packet socket (it needs CAP_NET_RAW)")(
            io::Error::last_os_error(),
        ));
    }
    // SAFETY: just opened and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn hear_everything(fd: &OwnedFd, name: &str, index: u32) -> Result<()> {
    let index = index as libc::c_int;
    let promiscuous = Membership { index, kind: PACKET_MR_PROMISC, len: 0, address: [0; 8] };
    set(fd, PACKET_ADD_MEMBERSHIP, &promiscuous).map_err(failed(name, "hear everything"))
}

/// Makes interface `index` hear everything until the result is closed.
pub(crate) fn promiscuous(name: &str, index: u32) -> Result<OwnedFd> {
    let fd = open_silent(name)?;
    hear_everything(&fd, name, index)?;
    Ok(fd)
}

fn open_one(name: &str, index: u32) -> Result<OwnedFd> {
    let fd = open_silent(name)?;
    let on: libc::c_int = 1;
    // As much as is allowed, where more than that is not.
    if set_at(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &RECEIVE_BUFFER).is_err() {
        set_at(&fd, libc::SOL_SOCKET, libc::SO_RCVBUF, &RECEIVE_BUFFER)
            .map_err(failed(name, "give it a buffer"))?;
    }
    set(&fd, PACKET_VNET_HDR, &on).map_err(failed(name, "get offload headers"))?;
    set(&fd, PACKET_AUXDATA, &on).map_err(failed(name, "get VLAN tags"))?;
    set(&fd, PACKET_IGNORE_OUTGOING, &on).map_err(failed(name, "leave out what leaves"))?;
    hear_everything(&fd, name, index)?;
    // SAFETY: all zeroes is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as libc::c_ushort;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index as libc::c_int;
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is a sockaddr_ll of that length.
    let bound = unsafe { libc::bind(fd.as_raw_fd(), std::ptr::from_ref(&address).cast(), len) };
    if bound != 0 {
        return Err(failed(name, "bind to it")(io::Error::last_os_error()));
    }
    Ok(fd)
}

impl Backend for PacketSocket {
    fn name(&self) -> &str {
        &self.name
    }

    fn poll_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    unsafe fn recv(&mut self, iov: &[libc::iovec]) -> io::Result<usize> {
        let Some((first, rest)) = iov.split_first().filter(|(f, _)| f.iov_len > HEADER) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let base = first.iov_base.cast::<u8>();
        self.iov.clear();
        self.iov.push(libc::iovec { iov_base: first.iov_base, iov_len: SHORT });
        self.iov.push(libc::iovec {
            iov_base: base.wrapping_add(HEADER).cast(),
            iov_len: first.iov_len - HEADER,
        });
        self.iov.extend_from_slice(rest);
        let mut control = [0u64; 8];
        // SAFETY: all zeroes is a valid msghdr.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.iov.as_mut_ptr();
        message.msg_iovlen = self.iov.len();
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: the caller's iovecs are valid for writes; the first is longer than a header.
        let n = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &mut message, 0) };
        let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        // SAFETY: the first buffer has 12 bytes. No more than one buffer is used.
        unsafe { std::ptr::write_bytes(base.add(SHORT), 0, HEADER - SHORT) };
        let n = if n < SHORT { 0 } else { n - SHORT + HEADER };
        match aux_data(&message) {
            Some(aux) if aux.status & TP_STATUS_VLAN_VALID != 0 => {
                Ok(self.restore_tag(iov, n, aux))
            }
            _ => Ok(n),
        }
    }

    unsafe fn send(&mut self, iov: &[libc::iovec]) -> io::Result<usize> {
        let Some((first, rest)) = iov.split_first().filter(|(f, _)| f.iov_len >= HEADER) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        self.iov.clear();
        self.iov.push(libc::iovec { iov_base: first.iov_base, iov_len: SHORT });
        if first.iov_len > HEADER {
            self.iov.push(libc::iovec {
                iov_base: first.iov_base.cast::<u8>().wrapping_add(HEADER).cast(),
                iov_len: first.iov_len - HEADER,
            });
        }
        self.iov.extend_from_slice(rest);
        let (fd, count) = (self.fd.as_raw_fd(), self.iov.len() as libc::c_int);
        // SAFETY: the caller's iovecs are valid for reads.
        let n = unsafe { libc::writev(fd, self.iov.as_ptr(), count) };
        match usize::try_from(n) {
            Ok(n) => Ok(n),
            // The interface's queue is full.
            Err(_) => Err(match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::ENOBUFS) => io::ErrorKind::WouldBlock.into(),
                e => e,
            }),
        }
    }

    fn capabilities(&self) -> Offloads {
        Offloads { ufo: false, ..Offloads::ALL }
    }

    /// The host decides what it hands up: whoever receives has to be able to finish it.
    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_enabled(&mut self, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn set_link(&mut self, _: bool) {}

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn lost(&mut self) -> u64 {
        // struct tpacket_stats: packets, drops; reading them sets them to zero.
        let mut stats = [0u32; 2];
        let mut len = size_of_val(&stats) as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes to `stats`.
        let result = unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                PACKET_STATISTICS,
                stats.as_mut_ptr().cast(),
                &mut len,
            )
        };
        if result == 0 { stats[1].into() } else { 0 }
    }
}

/// What the kernel says beside the frame.
fn aux_data(message: &libc::msghdr) -> Option<AuxData> {
    // SAFETY: recvmsg has filled the control buffer; the macros stay inside it.
    unsafe {
        let c = libc::CMSG_FIRSTHDR(message).as_ref()?;
        let fits = c.cmsg_len >= libc::CMSG_LEN(size_of::<AuxData>() as u32) as usize;
        (c.cmsg_level == libc::SOL_PACKET && c.cmsg_type == PACKET_AUXDATA && fits)
            .then(|| libc::CMSG_DATA(c).cast::<AuxData>().read_unaligned())
    }
}
