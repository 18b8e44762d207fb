//! One AF_XDP socket: a queue of an interface. Source: Linux'
//! Documentation/networking/af_xdp.rst, linux/if_xdp.h.
//!
//! Its UMEM is cut into chunks. The first half receives: those chunks are in the fill ring, with the
//! kernel, or held by the frames of the last [`receive`](XdpSocket::receive). The second half sends:
//! those are free, or on their way through transmit and completion ring. A chunk never changes sides,
//! so neither direction can starve the other. Nothing allocates after [`open`](XdpSocket::open), and
//! no system call is made but to wake the kernel.
#![allow(unsafe_code)] // memory that is shared with the kernel

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use libc::{iovec, xdp_desc};

use super::Fault;
use super::ring::{Consumer, Mapping, Producer};

/// Bytes of a chunk of the UMEM: a page, the most that the kernel allows.
pub const CHUNK: usize = 4096;
/// Bytes that the kernel keeps free in front of a received frame (XDP_PACKET_HEADROOM).
const KERNEL_HEADROOM: usize = 256;
/// Longest received frame that is in one chunk, in bytes.
pub const CHUNK_FRAME: usize = CHUNK - KERNEL_HEADROOM;
/// Chunks for each direction, and entries of every ring.
const RING: u32 = 2048;
/// Bytes of a socket's memory.
const UMEM: usize = 2 * RING as usize * CHUNK;
/// Most chunks of a frame: what the kernel puts into an skb (MAX_SKB_FRAGS + 1).
const MAX_PIECES: usize = 18;
/// Most frames taken at once.
pub const MAX_BURST: usize = 32;
/// Bytes that the kernel may have on their way for us.
const SEND_BUFFER: libc::c_int = 32 << 20;
/// Most calls to wake the kernel at once; each sends 32 frames or more.
const KICKS: usize = (RING / 16) as usize;
/// How often a queue that another socket has is tried again, and after how long.
const BIND_TRIES: u32 = 40;
const BIND_PAUSE: Duration = Duration::from_millis(5);
/// Times that a transmit ring that does not move is tried again before it is left alone.
const PATIENCE: u32 = 64;

/// How a socket is bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copying {
    /// Without copies where the driver can do it.
    IfNeeded,
    /// Without copies, or not at all.
    Never,
    /// Always.
    Always,
}

/// Why a frame was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Longer than what can be sent.
    TooLong,
    /// All chunks are on their way.
    Full,
    /// The kernel's rings are broken: the socket is of no use any more.
    Broken,
}

/// What became of the frames that were flushed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// System calls made.
    pub kicks: u64,
    /// Frames that the host dropped.
    pub lost: u64,
}

/// Frames that the kernel lost before they could be received.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lost {
    /// The receive ring was full, or the fill ring empty.
    pub queue: u64,
    /// They were longer than a chunk.
    pub too_long: u64,
}

/// One queue of an interface.
pub struct XdpSocket {
    rx: Consumer<xdp_desc>,
    tx: Producer<xdp_desc>,
    fill: Producer<u64>,
    completion: Consumer<u64>,
    fd: OwnedFd,
    // After the socket: the kernel lets go of it first.
    umem: Mapping,
    zero_copy: bool,
    /// Frames may consist of several chunks.
    pieces: usize,
    /// Chunks of received frames, to be given back.
    held: Vec<u64>,
    /// The last frame's parts.
    iov: Vec<iovec>,
    /// Addresses of free chunks to send from.
    free: Vec<u64>,
    /// Something waits in the transmit ring, and how often it was tried in vain.
    waiting: Option<u32>,
    /// Set for good once the rings are broken, and whether that was told.
    fault: Option<Fault>,
    told: bool,
    known: Lost,
}

// SAFETY: `iov` is only filled and used within one call.
unsafe impl Send for XdpSocket {}

/// The four rings.
struct Rings {
    rx: Consumer<xdp_desc>,
    tx: Producer<xdp_desc>,
    fill: Producer<u64>,
    completion: Consumer<u64>,
}

impl Rings {
    /// Maps the rings that `fd` has made.
    fn of(fd: &OwnedFd) -> Result<Self, Step> {
        let offsets: libc::xdp_mmap_offsets =
            get(fd, libc::XDP_MMAP_OFFSETS).map_err(step("find its rings"))?;
        let map = || {
            let (fill, completion) =
                (libc::XDP_UMEM_PGOFF_FILL_RING, libc::XDP_UMEM_PGOFF_COMPLETION_RING);
            let (rx, tx) = (libc::XDP_PGOFF_RX_RING as u64, libc::XDP_PGOFF_TX_RING as u64);
            io::Result::Ok(Self {
                rx: Consumer::map(fd, rx, &offsets.rx, RING)?,
                tx: Producer::map(fd, tx, &offsets.tx, RING)?,
                fill: Producer::map(fd, fill, &offsets.fr, RING)?,
                completion: Consumer::map(fd, completion, &offsets.cr, RING)?,
            })
        };
        map().map_err(step("map its rings"))
    }
}

/// What was tried when it failed, for a message.
pub type Step = (&'static str, io::Error);

fn step(what: &'static str) -> impl FnOnce(io::Error) -> Step {
    move |e| (what, e)
}

fn set<T>(fd: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    let size = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads `size` bytes of `value`.
    let result = unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), size)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads an option; `T` is one that any bytes are a value of.
fn get<T: Copy>(fd: &OwnedFd, option: libc::c_int) -> io::Result<T> {
    // SAFETY: every caller's type is a struct of integers, for which zeroes are a value.
    let mut value: T = unsafe { std::mem::zeroed() };
    let mut size = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes to `value`.
    let result = unsafe {
        let to = std::ptr::from_mut(&mut value).cast();
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_XDP, option, to, &mut size)
    };
    match result {
        0 if size as usize == size_of::<T>() => Ok(value),
        0 => Err(io::Error::other("this kernel is too old for it: Linux 5.9 or later is needed")),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the socket `fd` its memory, rings and buffer.
fn register(fd: &OwnedFd, umem: &Mapping) -> Result<(), Step> {
    // SAFETY: all zeroes is a valid xdp_umem_reg.
    let mut reg: libc::xdp_umem_reg = unsafe { std::mem::zeroed() };
    reg.addr = umem.start() as u64;
    reg.len = UMEM as u64;
    reg.chunk_size = CHUNK as u32;
    set(fd, libc::SOL_XDP, libc::XDP_UMEM_REG, &reg)
        .map_err(step("register memory for its frames"))?;
    for (option, what) in [
        (libc::XDP_UMEM_FILL_RING, "make its fill ring"),
        (libc::XDP_UMEM_COMPLETION_RING, "make its completion ring"),
        (libc::XDP_RX_RING, "make its receive ring"),
        (libc::XDP_TX_RING, "make its transmit ring"),
    ] {
        set(fd, libc::SOL_XDP, option, &RING).map_err(step(what))?;
    }
    // As much as is allowed, where more than that is not.
    if set(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &SEND_BUFFER).is_err() {
        set(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, &SEND_BUFFER)
            .map_err(step("give it a buffer"))?;
    }
    Ok(())
}

impl XdpSocket {
    /// Opens a socket on queue `queue` of interface `index`. `several`: frames may be longer than a
    /// chunk.
    ///
    /// # Errors
    /// What was tried, and the host's answer.
    pub fn open(index: u32, queue: u32, copying: Copying, several: bool) -> Result<Self, Step> {
        // SAFETY: only numbers are passed.
        let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(("open an AF_XDP socket", io::Error::last_os_error()));
        }
        // SAFETY: just opened and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let umem = Mapping::new(None, 0, UMEM).map_err(step("map memory for its frames"))?;
        register(&fd, &umem)?;
        let rings = Rings::of(&fd)?;
        let mut socket = Self::new(fd, umem, rings, several);
        bind_patiently(&socket.fd, index, queue, copying, several)
            .map_err(step("bind a socket to it"))?;
        let options: libc::xdp_options =
            get(&socket.fd, libc::XDP_OPTIONS).map_err(step("ask how it is bound"))?;
        socket.zero_copy = options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0;
        Ok(socket)
    }

    /// One with all its receive chunks in the fill ring.
    fn new(fd: OwnedFd, umem: Mapping, rings: Rings, several: bool) -> Self {
        let Rings { rx, tx, mut fill, completion } = rings;
        for i in 0..RING {
            fill.push(u64::from(i) * CHUNK as u64);
        }
        fill.publish();
        Self {
            rx,
            tx,
            fill,
            completion,
            fd,
            umem,
            zero_copy: false,
            pieces: if several { MAX_PIECES } else { 1 },
            held: Vec::with_capacity(RING as usize),
            iov: Vec::with_capacity(MAX_PIECES),
            free: (RING..2 * RING).map(|i| u64::from(i) * CHUNK as u64).collect(),
            waiting: None,
            fault: None,
            told: false,
            known: Lost::default(),
        }
    }

    /// Whether the driver puts frames into our memory itself.
    pub fn is_zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// The descriptor, for the map of sockets.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Readable when frames are there.
    pub fn poll_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Takes up to [`MAX_BURST`] frames and gives each, in parts, to `each`. Their bytes stay as they
    /// are until [`done`](Self::done), which has to follow.
    ///
    /// # Errors
    /// The kernel's rings are broken; the socket is of no use any more.
    #[inline]
    pub fn receive(&mut self, mut each: impl FnMut(&[iovec])) -> Result<usize, Fault> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        self.done();
        let available = self.rx.available()?;
        let (mut taken, mut at, mut frames) = (0, 0, 0);
        self.iov.clear();
        while at < available && frames < MAX_BURST {
            let d = self.rx.peek(at);
            let (chunk, bytes) = self.part(&d)?;
            at += 1;
            if self.held.len() == RING as usize {
                return Err(Fault::Chunks);
            }
            self.held.push(chunk);
            self.iov.push(bytes);
            if d.options & libc::XDP_PKT_CONTD != 0 {
                if self.iov.len() == MAX_PIECES {
                    return Err(Fault::Pieces);
                }
                continue;
            }
            each(&self.iov);
            self.iov.clear();
            (taken, frames) = (at, frames + 1);
        }
        // Parts whose end has not come yet are taken with it.
        self.held.truncate(self.held.len() - (at - taken) as usize);
        if taken > 0 {
            self.rx.advance(taken);
        }
        Ok(frames)
    }

    /// The chunk that a received descriptor names, and its bytes in it.
    #[inline]
    fn part(&self, d: &xdp_desc) -> Result<(u64, iovec), Fault> {
        let (size, at) = (CHUNK as u64, d.addr % CHUNK as u64);
        let chunk = d.addr - at;
        if chunk >= u64::from(RING) * size || at + u64::from(d.len) > size {
            return Err(Fault::Descriptor);
        }
        // SAFETY: inside the UMEM (just checked).
        let start = unsafe { self.umem.start().add(d.addr as usize) };
        Ok((chunk, iovec { iov_base: start.cast(), iov_len: d.len as usize }))
    }

    /// Gives the received frames' chunks back, as far as the fill ring has room: the kernel shows
    /// frames before it shows that it has taken their chunks out of that ring. What has no room yet goes
    /// back with the next ones.
    #[inline]
    pub fn done(&mut self) {
        if self.held.is_empty() {
            return;
        }
        match self.fill.room(self.held.len() as u32) {
            Ok(room) => {
                let n = self.held.len().min(room as usize);
                self.held.drain(..n).for_each(|chunk| self.fill.push(chunk));
                self.fill.publish();
            }
            Err(fault) => self.fault = Some(fault),
        }
    }

    /// Takes back the chunks of frames that have been sent.
    pub fn reclaim(&mut self) {
        let n = match self.completion.available() {
            Ok(0) => return,
            Ok(n) => n,
            Err(fault) => return self.fault = Some(fault),
        };
        let half = u64::from(RING) * CHUNK as u64;
        for i in 0..n {
            let chunk = self.completion.peek(i) & !(CHUNK as u64 - 1);
            if !(half..2 * half).contains(&chunk) || self.free.len() == RING as usize {
                return self.fault = Some(Fault::Descriptor);
            }
            self.free.push(chunk);
        }
        self.completion.advance(n);
    }

    /// Puts a frame of `len` bytes, written by `write` into the buffers that it gets; it leaves with
    /// [`flush`](Self::flush).
    ///
    /// # Errors
    /// It was not taken.
    #[inline]
    pub fn put(&mut self, len: usize, write: impl FnOnce(&[iovec])) -> Result<(), Refused> {
        let n = len.div_ceil(CHUNK);
        if n == 0 || n > self.pieces {
            return Err(Refused::TooLong);
        }
        if self.free.len() < n {
            self.make_room()?;
            if self.free.len() < n {
                return Err(Refused::Full);
            }
        }
        match self.tx.room(n as u32) {
            Ok(room) if room >= n as u32 => {}
            Ok(_) => return Err(Refused::Full),
            Err(fault) => {
                self.fault = Some(fault);
                return Err(Refused::Broken);
            }
        }
        self.iov.clear();
        let mut left = len;
        for chunk in self.free.drain(self.free.len() - n..) {
            let part = left.min(CHUNK);
            left -= part;
            let options = if left > 0 { libc::XDP_PKT_CONTD } else { 0 };
            // SAFETY: chunks are inside the UMEM (checked when they came back).
            let start = unsafe { self.umem.start().add(chunk as usize) };
            self.iov.push(iovec { iov_base: start.cast(), iov_len: part });
            self.tx.push(xdp_desc { addr: chunk, len: part as u32, options });
        }
        write(&self.iov);
        self.waiting = Some(0);
        Ok(())
    }

    /// Sends what was put, to have chunks again.
    #[inline(never)]
    fn make_room(&mut self) -> Result<(), Refused> {
        self.reclaim();
        if self.free.is_empty() && self.waiting.is_some() {
            self.tx.publish();
            self.kick(&mut Sent::default());
            self.reclaim();
        }
        if self.fault.is_some() { Err(Refused::Broken) } else { Ok(()) }
    }

    /// Sends what was put.
    #[inline]
    pub fn flush(&mut self) -> Sent {
        let mut sent = Sent::default();
        if self.waiting.is_some() {
            self.tx.publish();
            self.kick(&mut sent);
        }
        sent
    }

    /// Whether something waits to be sent and is worth another [`retry`](Self::retry).
    #[inline]
    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some_and(|tries| tries < PATIENCE)
    }

    /// Tries to send what could not be sent before.
    pub fn retry(&mut self) -> Sent {
        let mut sent = Sent::default();
        if let Some(tries) = self.waiting.filter(|_| self.is_waiting()) {
            self.waiting = Some(tries + 1);
            self.kick(&mut sent);
            self.reclaim();
        }
        sent
    }

    /// Wakes the kernel until it has taken what is in the transmit ring, or does not go on.
    fn kick(&mut self, sent: &mut Sent) {
        let mut before = u32::MAX;
        for _ in 0..KICKS {
            match self.tx.pending() {
                Ok(0) => return self.waiting = None,
                // It does not go on: the interface's own queue is full, say.
                Ok(n) if n == before => return,
                Ok(n) => before = n,
                Err(fault) => return self.fault = Some(fault),
            }
            if !self.tx.wants_wakeup() {
                return;
            }
            sent.kicks += 1;
            // SAFETY: only numbers and a null pointer of length 0 are passed.
            let result = unsafe {
                let (fd, flags) = (self.fd.as_raw_fd(), libc::MSG_DONTWAIT);
                libc::sendto(fd, std::ptr::null(), 0, flags, std::ptr::null(), 0)
            };
            // EBUSY: one frame was taken and dropped by the interface. Others are seen by that the
            // ring does not move.
            if result < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EBUSY) {
                sent.lost += 1;
            }
        }
    }

    /// Wakes the driver if it waits for chunks to receive into.
    #[inline]
    pub fn wake_receiver(&mut self) {
        if self.fill.wants_wakeup() {
            // SAFETY: as in `kick`; nothing is received, the length is 0.
            unsafe {
                let (fd, flags) = (self.fd.as_raw_fd(), libc::MSG_DONTWAIT);
                libc::recv(fd, std::ptr::null_mut(), 0, flags);
            }
        }
    }

    /// How the kernel's rings are broken, once.
    #[inline]
    pub fn take_fault(&mut self) -> Option<Fault> {
        let fault = self.fault?;
        (!std::mem::replace(&mut self.told, true)).then_some(fault)
    }

    /// Frames that were lost since the last call. Costs a system call.
    pub fn lost(&mut self) -> Lost {
        let Ok(s) = get::<libc::xdp_statistics>(&self.fd, libc::XDP_STATISTICS) else {
            return Lost::default();
        };
        // Copying counts a frame that found the fill ring empty as dropped as well; what else it
        // drops is too long.
        let starved = s.rx_fill_ring_empty_descs.min(s.rx_dropped);
        let now = Lost {
            queue: s.rx_ring_full.saturating_add(starved),
            too_long: s.rx_dropped - starved,
        };
        let new = Lost {
            queue: now.queue.saturating_sub(self.known.queue),
            too_long: now.too_long.saturating_sub(self.known.too_long),
        };
        self.known = now;
        new
    }
}

/// Binds, also to a queue whose last socket was closed a moment ago: the kernel lets go of it later.
fn bind_patiently(
    fd: &OwnedFd,
    index: u32,
    queue: u32,
    copying: Copying,
    several: bool,
) -> io::Result<()> {
    for _ in 0..BIND_TRIES {
        match bind(fd, index, queue, copying, several) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => std::thread::sleep(BIND_PAUSE),
            other => return other,
        }
    }
    bind(fd, index, queue, copying, several)
}

fn bind(fd: &OwnedFd, index: u32, queue: u32, copying: Copying, several: bool) -> io::Result<()> {
    let copy = match copying {
        Copying::IfNeeded => 0,
        Copying::Never => libc::XDP_ZEROCOPY,
        Copying::Always => libc::XDP_COPY,
    };
    let several = if several { libc::XDP_USE_SG } else { 0 };
    let address = libc::sockaddr_xdp {
        sxdp_family: libc::AF_XDP as u16,
        sxdp_flags: libc::XDP_USE_NEED_WAKEUP | copy | several,
        sxdp_ifindex: index,
        sxdp_queue_id: queue,
        sxdp_shared_umem_fd: 0,
    };
    let len = size_of::<libc::sockaddr_xdp>() as libc::socklen_t;
    // SAFETY: the address is a sockaddr_xdp of that length.
    let result = unsafe { libc::bind(fd.as_raw_fd(), std::ptr::from_ref(&address).cast(), len) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A socket whose kernel is played by the test.
    struct Played {
        socket: XdpSocket,
        rx: Producer<xdp_desc>,
        fill: Consumer<u64>,
        tx: Consumer<xdp_desc>,
        completion: Producer<u64>,
    }

    const OFFSETS: libc::xdp_ring_offset =
        libc::xdp_ring_offset { producer: 0, consumer: 64, flags: 128, desc: 192 };
    const SIZE: u64 = CHUNK as u64;
    /// Where the chunks to send from begin.
    const HALF: u64 = RING as u64 * SIZE;

    fn played(several: bool) -> Played {
        // SAFETY: a C string and no flags; the descriptor is nobody else's.
        let fd = unsafe {
            let fd = libc::memfd_create(c"rings".as_ptr(), 0);
            assert!(fd >= 0 && libc::ftruncate(fd, 4 << 16) == 0);
            OwnedFd::from_raw_fd(fd)
        };
        let (rx, tx, fill, completion) = (0, 1 << 16, 2 << 16, 3 << 16);
        let rings = Rings {
            rx: Consumer::map(&fd, rx, &OFFSETS, RING).unwrap(),
            tx: Producer::map(&fd, tx, &OFFSETS, RING).unwrap(),
            fill: Producer::map(&fd, fill, &OFFSETS, RING).unwrap(),
            completion: Consumer::map(&fd, completion, &OFFSETS, RING).unwrap(),
        };
        let (rx, tx) =
            (Producer::map(&fd, rx, &OFFSETS, RING), Consumer::map(&fd, tx, &OFFSETS, RING));
        let fill = Consumer::map(&fd, fill, &OFFSETS, RING);
        let completion = Producer::map(&fd, completion, &OFFSETS, RING);
        let umem = Mapping::new(None, 0, UMEM).unwrap();
        Played {
            socket: XdpSocket::new(fd, umem, rings, several),
            rx: rx.unwrap(),
            fill: fill.unwrap(),
            tx: tx.unwrap(),
            completion: completion.unwrap(),
        }
    }

    impl Played {
        fn give(&mut self, all: &[(u64, u32, u32)]) {
            for &(addr, len, options) in all {
                self.rx.push(xdp_desc { addr, len, options });
            }
            self.rx.publish();
        }

        /// Lengths of the parts of the frames that come.
        fn take(&mut self) -> Result<Vec<Vec<usize>>, Fault> {
            let mut got = Vec::new();
            self.socket.receive(|parts| got.push(parts.iter().map(|p| p.iov_len).collect()))?;
            self.socket.done();
            Ok(got)
        }
    }

    #[test]
    fn received_chunks_go_round() {
        let mut k = played(true);
        let more = libc::XDP_PKT_CONTD;
        for _ in 0..1000 {
            // Parts whose end has not come yet wait.
            let chunks: Vec<u64> = (0..4).map(|i| k.fill.peek(i)).collect();
            k.fill.advance(4);
            k.give(&[(chunks[0] + 256, 100, 0), (chunks[1] + 256, 3840, more)]);
            assert_eq!(k.take().unwrap(), [vec![100]]);
            k.give(&[(chunks[2] + 256, 3840, more), (chunks[3], 1, 0)]);
            assert_eq!(k.take().unwrap(), [vec![3840, 3840, 1]]);
            assert_eq!(k.fill.available(), Ok(RING));
        }
    }

    #[test]
    fn descriptors_outside_the_receive_chunks_are_refused() {
        for (addr, len) in [
            (HALF, 1),
            (u64::MAX, 1),
            (u64::MAX - 4095, 1),
            (HALF - 1, 2),
            (256, 3841),
            (0, u32::MAX),
            (1 << 48 | 256, 60),
        ] {
            let mut k = played(false);
            k.give(&[(256, 60, 0), (addr, len, 0)]);
            assert_eq!(k.take(), Err(Fault::Descriptor), "{addr:#x} {len}");
        }
        let mut k = played(true);
        k.give(&[(256, 10, libc::XDP_PKT_CONTD); 40]);
        assert_eq!(k.take(), Err(Fault::Pieces));
    }

    #[test]
    fn chunks_wait_until_the_fill_ring_shows_room() {
        let mut k = played(false);
        // The kernel has taken chunks out of the fill ring, and has not shown it yet.
        for i in 0..u64::from(RING) {
            k.give(&[(i * SIZE + 256, 60, 0)]);
            assert_eq!(k.take().unwrap(), [vec![60]]);
        }
        assert_eq!(k.socket.held.len(), RING as usize);
        k.fill.advance(100);
        assert_eq!(k.take().unwrap().len(), 0);
        assert_eq!((k.socket.held.len(), k.fill.available()), (RING as usize - 100, Ok(RING)));
        // More than there are.
        k.give(&[(256, 60, 0); 101]);
        let fault = (0..4).find_map(|_| k.take().err());
        assert_eq!(fault, Some(Fault::Chunks));
    }

    #[test]
    fn sent_chunks_go_round() {
        let mut k = played(true);
        for i in 0..3 * RING {
            let len = [60, 4096, 4097, 9000][i as usize % 4];
            let put = k.socket.put(len, |parts| {
                assert_eq!(parts.iter().map(|p| p.iov_len).sum::<usize>(), len);
            });
            assert_eq!(put, Ok(()));
            k.socket.flush();
            let n = k.tx.available().unwrap();
            assert_eq!(n as usize, len.div_ceil(CHUNK));
            for j in 0..n {
                let d = k.tx.peek(j);
                assert!((HALF..2 * HALF).contains(&d.addr) && d.addr.is_multiple_of(SIZE));
                assert_eq!(d.options, if j + 1 < n { libc::XDP_PKT_CONTD } else { 0 });
                k.completion.push(d.addr);
            }
            k.tx.advance(n);
            k.completion.publish();
            k.socket.reclaim();
            assert_eq!(k.socket.free.len(), RING as usize);
        }
        assert_eq!(k.socket.put(MAX_PIECES * CHUNK + 1, |_| {}), Err(Refused::TooLong));
        assert_eq!(k.socket.put(0, |_| {}), Err(Refused::TooLong));
        while k.socket.put(60, |_| {}).is_ok() {}
        assert_eq!((k.socket.free.len(), k.socket.put(60, |_| {})), (0, Err(Refused::Full)));
    }

    #[test]
    fn completions_of_what_was_not_sent_are_refused() {
        for addr in [0, HALF - SIZE, 2 * HALF, u64::MAX, HALF] {
            let mut k = played(false);
            k.completion.push(addr);
            k.completion.publish();
            k.socket.reclaim();
            assert_eq!(k.socket.take_fault(), Some(Fault::Descriptor), "{addr:#x}");
        }
    }
}
