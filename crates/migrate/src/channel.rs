//! Sockets: connecting and listening by [`Uri`], and the byte stream under both kinds of frames.
//!
//! To add a kind of channel (fd, exec, file): one more variant of [`Address`] or [`Listener`] that
//! ends in a [`Channel`], which is only a file descriptor that is read and written.
#![allow(unsafe_code)] // socket calls with time-outs, and readv/writev on guest memory

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::{Error, Result, Uri};

/// How often a wait looks whether it is still wanted.
const SLICE: Duration = Duration::from_millis(20);
/// Socket buffer asked for on unix sockets; TCP's grow by themselves.
const BUFFER: libc::c_int = 4 << 20;
/// Receive buffer, half of what the kernel makes of it, for TCP from this very host. Left alone it grows
/// to 32 MiB (Linux 6.18), though there is no path to fill, and what waits there has left the
/// processor's cache when it is read.
const HERE: libc::c_int = 3 << 20;

/// A connected byte stream. Reading and writing work through `&self`, from different threads.
#[derive(Debug)]
pub struct Channel {
    fd: OwnedFd,
}

impl Channel {
    fn new(fd: OwnedFd) -> Self {
        let c = Self { fd };
        c.option(libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
        c.option(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
        c.option(libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 5);
        c.option(libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 2);
        c.option(libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 5);
        c
    }

    /// Sets an integer option; one that this kind of socket does not have is no loss.
    fn option(&self, level: libc::c_int, name: libc::c_int, value: libc::c_int) {
        // SAFETY: value outlives the call, and its size is given.
        unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
    }

    /// Bounds how long a single write may block.
    pub fn set_write_timeout(&self, limit: Duration) {
        self.set_timeout(libc::SO_SNDTIMEO, limit);
    }

    /// Bounds how long a single read may block; zero is for ever.
    pub fn set_read_timeout(&self, limit: Duration) {
        self.set_timeout(libc::SO_RCVTIMEO, limit);
    }

    fn set_timeout(&self, name: libc::c_int, limit: Duration) {
        let tv = libc::timeval {
            tv_sec: limit.as_secs() as libc::time_t,
            tv_usec: libc::suseconds_t::from(limit.subsec_micros()),
        };
        // SAFETY: tv outlives the call, and its size is given.
        unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                name,
                (&raw const tv).cast(),
                size_of_val(&tv) as libc::socklen_t,
            )
        };
    }

    /// Reads what is there; `None` when nothing is.
    pub fn read_now(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let fd = self.fd.as_raw_fd();
        // SAFETY: buf is ours and writable.
        let n = unsafe { libc::recv(fd, buf.as_mut_ptr().cast(), buf.len(), libc::MSG_DONTWAIT) };
        match check(n) {
            Err(e) if e.kind() == io::ErrorKind::TimedOut => Ok(None),
            other => other,
        }
    }

    /// Ends both directions at once: whoever is blocked in it returns.
    pub fn shutdown(&self) {
        // SAFETY: the fd is open while self lives.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_RDWR) };
    }

    /// Writes all of `iov`, which is used up.
    ///
    /// # Safety
    /// Every iovec must be readable memory for the whole call.
    pub unsafe fn writev_all(&self, mut iov: &mut [libc::iovec]) -> io::Result<()> {
        while !iov.is_empty() {
            let n = iov.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
            // SAFETY: the caller vouches for the memory; n iovecs are there.
            let done = unsafe { libc::writev(self.fd.as_raw_fd(), iov.as_ptr(), n) };
            match check(done)? {
                Some(0) => return Err(io::ErrorKind::WriteZero.into()),
                Some(done) => iov = advance(iov, done),
                None => {}
            }
        }
        Ok(())
    }

    /// Fills all of `iov`, which is used up.
    ///
    /// # Safety
    /// Every iovec must be writable memory for the whole call.
    pub unsafe fn readv_all(&self, mut iov: &mut [libc::iovec]) -> io::Result<()> {
        while !iov.is_empty() {
            let n = iov.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
            // SAFETY: the caller vouches for the memory; n iovecs are there.
            let done = unsafe { libc::readv(self.fd.as_raw_fd(), iov.as_ptr(), n) };
            match check(done)? {
                Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(done) => iov = advance(iov, done),
                None => {}
            }
        }
        Ok(())
    }
}

/// Which of the fds that [`readable`] was given have something to read, or an end to tell.
pub(crate) struct Ready {
    pub listener: bool,
    /// In the order in which they were given.
    pub channels: Vec<bool>,
}

/// Waits until a connection or bytes can be taken, for at most `limit`.
pub(crate) fn readable<'a>(
    listener: &Listener,
    channels: impl Iterator<Item = &'a Channel>,
    limit: Duration,
) -> Ready {
    let fds = std::iter::once(listener.raw_fd()).chain(channels.map(|c| c.fd.as_raw_fd()));
    let mut set: Vec<_> =
        fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    // SAFETY: as many pollfds as are said, which outlive the call.
    unsafe { libc::poll(set.as_mut_ptr(), set.len() as libc::nfds_t, limit.as_millis() as i32) };
    let mut ready = set.iter().map(|p| p.revents != 0);
    Ready { listener: ready.next().unwrap_or(false), channels: ready.collect() }
}

/// What a read or write returned; `None` when it was interrupted.
fn check(done: isize) -> io::Result<Option<usize>> {
    if done >= 0 {
        return Ok(Some(done as usize));
    }
    let e = io::Error::last_os_error();
    match e.kind() {
        io::ErrorKind::Interrupted => Ok(None),
        io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
        _ => Err(e),
    }
}

/// What is left of `iov` after `done` bytes.
fn advance(mut iov: &mut [libc::iovec], mut done: usize) -> &mut [libc::iovec] {
    while let Some(first) = iov.first_mut() {
        if done < first.iov_len {
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(done).cast();
            first.iov_len -= done;
            break;
        }
        done -= first.iov_len;
        iov = &mut iov[1..];
    }
    iov
}

impl Read for &Channel {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        // SAFETY: buf is ours and writable.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len()) };
        check(n)?.ok_or_else(|| io::ErrorKind::Interrupted.into())
    }
}

impl Write for &Channel {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        // SAFETY: buf is readable.
        let n = unsafe { libc::write(self.fd.as_raw_fd(), buf.as_ptr().cast(), buf.len()) };
        check(n)?.ok_or_else(|| io::ErrorKind::Interrupted.into())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where a channel leads, after names were looked up: a lost connection is made again to exactly
/// this, and to nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(a) => write!(f, "tcp:{a}"),
            Self::Unix(p) => write!(f, "unix:{}", p.display()),
        }
    }
}

/// Connects to `uri`, until `deadline` or until `cancelled` says so.
///
/// # Errors
/// [`Error::Connect`] with the address and the system's reason, or [`Error::Cancelled`].
pub fn connect(
    uri: &Uri,
    deadline: Instant,
    cancelled: &dyn Fn() -> bool,
) -> Result<(Channel, Address)> {
    let mut why = String::new();
    for address in look_up(uri, deadline, cancelled)? {
        match connect_to(&address, deadline, cancelled) {
            Ok(channel) => return Ok((channel, address)),
            Err(_) if cancelled() => return Err(Error::Cancelled),
            Err(e) => why = format!("cannot connect to {address}: {e}"),
        }
    }
    Err(Error::Connect(why))
}

/// The addresses that `uri` stands for; at least one.
fn look_up(uri: &Uri, deadline: Instant, cancelled: &dyn Fn() -> bool) -> Result<Vec<Address>> {
    let (host, port) = match uri {
        Uri::Unix { path } => return Ok(vec![Address::Unix(path.clone())]),
        Uri::Tcp { host, port } => (host.clone(), *port),
    };
    let name = if host.is_empty() { "localhost".to_owned() } else { host };
    let (tx, rx) = mpsc::channel();
    let asked = name.clone();
    // The resolver cannot be interrupted: it has a thread of its own, which nobody waits for.
    std::thread::Builder::new()
        .name("mig-resolve".into())
        .spawn(move || {
            let found = (asked.as_str(), port).to_socket_addrs();
            let _ = tx.send(found.map(Iterator::collect::<Vec<_>>));
        })
        .map_err(|e| Error::Machine(format!("cannot start a thread: {e}")))?;
    loop {
        match rx.recv_timeout(SLICE) {
            Ok(Ok(found)) if !found.is_empty() => {
                return Ok(found.into_iter().map(Address::Tcp).collect());
            }
            Ok(Ok(_)) => return Err(Error::Connect(format!("host '{name}' has no address"))),
            Ok(Err(e)) => return Err(Error::Connect(format!("host '{name}': {e}"))),
            Err(_) if cancelled() => return Err(Error::Cancelled),
            Err(_) if Instant::now() >= deadline => {
                return Err(Error::Connect(format!("host '{name}' was not found in time")));
            }
            Err(_) => {}
        }
    }
}

/// Connects to one address, until `deadline` or until `cancelled` says so.
///
/// # Errors
/// The system's; `TimedOut` for the deadline, `Interrupted` when cancelled.
pub fn connect_to(
    address: &Address,
    deadline: Instant,
    cancelled: &dyn Fn() -> bool,
) -> io::Result<Channel> {
    let (family, raw) = raw_address(address)?;
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: plain call; the result is checked.
    let fd = unsafe { libc::socket(family, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fd is new and ours.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    loop {
        // SAFETY: raw holds a socket address of this length.
        let r = unsafe { libc::connect(fd.as_raw_fd(), raw.as_ptr().cast(), raw.len() as u32) };
        let e = io::Error::last_os_error();
        match e.raw_os_error() {
            _ if r == 0 => break,
            Some(libc::EISCONN) => break,
            Some(libc::EINPROGRESS | libc::EALREADY) => wait_connected(&fd, deadline, cancelled)?,
            // A Unix socket whose backlog is full.
            Some(libc::EAGAIN | libc::EINTR) => {
                bounded(deadline, cancelled)?;
                std::thread::sleep(SLICE);
            }
            _ => return Err(e),
        }
    }
    // SAFETY: plain call on our fd; 0 clears O_NONBLOCK and sets nothing else.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, 0) };
    let channel = Channel::new(fd);
    if matches!(address, Address::Unix(_)) {
        channel.option(libc::SOL_SOCKET, libc::SO_SNDBUF, BUFFER);
    }
    Ok(channel)
}

fn bounded(deadline: Instant, cancelled: &dyn Fn() -> bool) -> io::Result<()> {
    if cancelled() {
        return Err(io::ErrorKind::ConnectionAborted.into());
    }
    if Instant::now() >= deadline {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(())
}

fn wait_connected(fd: &OwnedFd, deadline: Instant, cancelled: &dyn Fn() -> bool) -> io::Result<()> {
    while !poll(fd, libc::POLLOUT, SLICE) {
        bounded(deadline, cancelled)?;
    }
    let mut error: libc::c_int = 0;
    let mut len = size_of_val(&error) as libc::socklen_t;
    // SAFETY: error and len outlive the call.
    let r = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ERROR,
            (&raw mut error).cast(),
            &mut len,
        )
    };
    if r == 0 && error != 0 { Err(io::Error::from_raw_os_error(error)) } else { Ok(()) }
}

/// Waits for `events` on `fd`, for at most `limit`.
fn poll(fd: &impl AsFd, events: libc::c_short, limit: Duration) -> bool {
    let mut p = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events, revents: 0 };
    // SAFETY: one pollfd that outlives the call.
    unsafe { libc::poll(&mut p, 1, limit.as_millis() as libc::c_int) > 0 }
}

/// The address as the system wants it.
fn raw_address(address: &Address) -> io::Result<(libc::c_int, Vec<u8>)> {
    let mut raw = Vec::new();
    Ok(match address {
        Address::Tcp(SocketAddr::V4(a)) => {
            raw.extend((libc::AF_INET as u16).to_ne_bytes());
            raw.extend(a.port().to_be_bytes());
            raw.extend(a.ip().octets());
            raw.extend([0; 8]);
            (libc::AF_INET, raw)
        }
        Address::Tcp(SocketAddr::V6(a)) => {
            raw.extend((libc::AF_INET6 as u16).to_ne_bytes());
            raw.extend(a.port().to_be_bytes());
            raw.extend(a.flowinfo().to_be_bytes());
            raw.extend(a.ip().octets());
            raw.extend(a.scope_id().to_ne_bytes());
            (libc::AF_INET6, raw)
        }
        Address::Unix(path) => {
            let path = path.as_os_str().as_bytes();
            if path.len() > 107 {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            raw.extend((libc::AF_UNIX as u16).to_ne_bytes());
            raw.extend(path);
            raw.push(0);
            (libc::AF_UNIX, raw)
        }
    })
}

/// A bound and listening socket.
#[derive(Debug)]
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Listens on `uri`; returns the URI with the real port.
    ///
    /// # Errors
    /// [`Error::Connect`] with the address and the system's reason.
    pub fn bind(uri: &Uri) -> Result<(Self, Uri)> {
        let wrong = |e: io::Error| Error::Connect(format!("cannot listen on {uri}: {e}"));
        match uri {
            Uri::Tcp { host, port } => {
                let bound = if host.is_empty() {
                    TcpListener::bind(("::", *port))
                        .or_else(|_| TcpListener::bind((std::net::Ipv4Addr::UNSPECIFIED, *port)))
                } else {
                    TcpListener::bind((host.as_str(), *port))
                };
                let l = bound.map_err(wrong)?;
                l.set_nonblocking(true).map_err(wrong)?;
                let port = l.local_addr().map_err(wrong)?.port();
                Ok((Self::Tcp(l), Uri::Tcp { host: host.clone(), port }))
            }
            Uri::Unix { path } => {
                remove_stale(path).map_err(wrong)?;
                let l = UnixListener::bind(path).map_err(wrong)?;
                l.set_nonblocking(true).map_err(wrong)?;
                Ok((Self::Unix(l, path.clone()), uri.clone()))
            }
        }
    }

    fn raw_fd(&self) -> RawFd {
        match self {
            Self::Tcp(l) => l.as_raw_fd(),
            Self::Unix(l, _) => l.as_raw_fd(),
        }
    }

    /// The next connection, if there is one now, and who it is from.
    pub fn accept(&self) -> io::Result<Option<(Channel, String)>> {
        let accepted = match self {
            Self::Tcp(l) => l.accept().map(|(s, from)| {
                let is_here = s.local_addr().is_ok_and(|here| here.ip() == from.ip());
                (OwnedFd::from(s), from.to_string(), is_here)
            }),
            Self::Unix(l, path) => l.accept().map(|(s, _)| {
                (OwnedFd::from(s), format!("a process on {}", path.display()), false)
            }),
        };
        match accepted {
            Ok((fd, from, is_here)) => {
                // SAFETY: plain call on our fd; 0 clears O_NONBLOCK and sets nothing else.
                unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, 0) };
                let channel = Channel::new(fd);
                if is_here {
                    // Refused to those without CAP_NET_ADMIN.
                    channel.option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, HERE);
                }
                Ok(Some((channel, from)))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            // The one that connected is gone again.
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Where the socket file of `uri` is, if it has one, also for a process that goes to another
/// directory.
pub fn socket_file(uri: &Uri) -> Option<PathBuf> {
    match uri {
        Uri::Unix { path } => Some(std::path::absolute(path).unwrap_or_else(|_| path.clone())),
        Uri::Tcp { .. } => None,
    }
}

/// Removes a socket file on which nobody listens.
fn remove_stale(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(m) if m.file_type().is_socket() => {}
        Ok(_) => {
            let why = "there is a file of this name already, and it is no socket";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
        }
        Err(_) => return Ok(()),
    }
    match UnixStream::connect(path) {
        Ok(_) => {
            Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens on this socket"))
        }
        Err(_) => std::fs::remove_file(path),
    }
}
