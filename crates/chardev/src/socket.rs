//! The socket back end: unix, TCP or an inherited fd; a server that takes one client after
//! another, or a client that connects again when its server comes back.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use spec::SocketAddress;

use crate::error::MAX_UNIX_PATH;
use crate::link::Link;
use crate::pump::{NoMore, Pump, Setup, Source};
use crate::{Chardev, Error, sys};

/// Opens a server.
pub(crate) fn listen(setup: Setup, address: &SocketAddress) -> Result<Arc<dyn Chardev>, Error> {
    let server = Server::new(&setup.who, address)?;
    Ok(Arc::new(Pump::start(setup, Box::new(server), None)?))
}

/// Opens a client. Without `reconnect` (seconds) it connects now or fails; with it, it goes on
/// trying.
pub(crate) fn connect(
    setup: Setup,
    address: &SocketAddress,
    reconnect: u32,
) -> Result<Arc<dyn Chardev>, Error> {
    let who = setup.who.clone();
    let failed = |source| Error::Connect { who: who.clone(), address: describe(address), source };
    check_path(&who, address)?;
    if let SocketAddress::Fd { fd } = address {
        let fd = adopt_socket(&who, *fd, false)?;
        let name = local_name(&fd);
        let link = Link::socket(fd, name.clone());
        let source = Box::new(NoMore(format!("disconnected:{name}")));
        return Ok(Arc::new(Pump::start(setup, source, Some(link))?));
    }
    if reconnect == 0 {
        let (fd, name): (OwnedFd, _) = match address {
            SocketAddress::Unix { path } => {
                let stream = UnixStream::connect(path).map_err(failed)?;
                (stream.into(), describe(address))
            }
            SocketAddress::Inet { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).map_err(failed)?;
                let _ = stream.set_nodelay(true);
                let name = tcp_name(&stream, "");
                (stream.into(), name)
            }
            SocketAddress::Fd { .. } => unreachable!("returned above"),
        };
        let source = Box::new(NoMore(format!("disconnected:{}", describe(address))));
        return Ok(Arc::new(Pump::start(setup, source, Some(Link::socket(fd, name)))?));
    }
    let targets = Dialer::targets(address).map_err(failed)?;
    let dialer = Dialer {
        name: describe(address),
        targets,
        turn: 0,
        pause: Duration::from_secs(reconnect.into()),
        attempt: None,
        next_at: Instant::now(),
    };
    Ok(Arc::new(Pump::start(setup, Box::new(dialer), None)?))
}

/// As `query-chardev` writes an address.
fn describe(address: &SocketAddress) -> String {
    match address {
        SocketAddress::Unix { path } => format!("unix:{}", path.display()),
        SocketAddress::Inet { host, port } => format!("tcp:{}:{port}", bracketed(host)),
        SocketAddress::Fd { fd } => format!("fd:{fd}"),
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.into() }
}

fn tcp_name(stream: &TcpStream, options: &str) -> String {
    let show = |a: io::Result<SocketAddr>| a.map_or_else(|_| "?".into(), |a| a.to_string());
    format!("tcp:{}{options} <-> {}", show(stream.local_addr()), show(stream.peer_addr()))
}

/// The name of an inherited socket, from its own address.
fn local_name(fd: &OwnedFd) -> String {
    if let Some(path) = unix_path(fd) {
        return format!("unix:{}", path.display());
    }
    let tcp = fd.try_clone().map(TcpListener::from).and_then(|l| l.local_addr());
    match tcp {
        Ok(address) => format!("tcp:{address}"),
        Err(_) => format!("fd:{}", fd.as_raw_fd()),
    }
}

fn unix_path(fd: &OwnedFd) -> Option<PathBuf> {
    let address = UnixListener::from(fd.try_clone().ok()?).local_addr().ok()?;
    address.as_pathname().map(Path::to_path_buf)
}

/// Refuses a Unix path that the kernel would not take.
fn check_path(who: &str, address: &SocketAddress) -> Result<(), Error> {
    match address {
        SocketAddress::Unix { path } if path.as_os_str().len() > MAX_UNIX_PATH => {
            Err(Error::LongPath { who: who.into(), path: path.clone() })
        }
        _ => Ok(()),
    }
}

/// Takes over an inherited stream socket.
fn adopt_socket(who: &str, fd: RawFd, listening: bool) -> Result<OwnedFd, Error> {
    let expected =
        if listening { "a listening stream socket" } else { "a connected stream socket" };
    let bad = || Error::Fd { who: who.into(), fd, expected };
    let socket = sys::adopt(fd).ok_or_else(bad)?;
    let stream = sys::socket_option(&socket, libc::SO_TYPE).is_ok_and(|t| t == libc::SOCK_STREAM);
    let accepts = sys::socket_option(&socket, libc::SO_ACCEPTCONN).is_ok_and(|a| a != 0);
    if stream && accepts == listening { Ok(socket) } else { Err(bad()) }
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A listening socket's file, removed with its server.
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        let data = std::fs::symlink_metadata(path)?;
        Ok(Self { path: std::path::absolute(path)?, device: data.dev(), inode: data.ino() })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Another server may have taken the path over.
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|data| data.dev() == self.device && data.ino() == self.inode);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

pub(crate) struct Server {
    listener: Listener,
    name: String,
    /// accept() failed (out of fds): when to try again.
    retry: bool,
    _file: Option<SocketFile>,
}

impl Server {
    pub fn new(who: &str, address: &SocketAddress) -> Result<Self, Error> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => {
                Error::InUse { who: who.into(), address: describe(address) }
            }
            _ => Error::Listen { who: who.into(), address: describe(address), source },
        };
        check_path(who, address)?;
        let (listener, name, file) = match address {
            SocketAddress::Unix { path } => {
                make_room(who, path)?;
                let listener = UnixListener::bind(path).map_err(failed)?;
                let file = SocketFile::new(path).map_err(failed)?;
                (Listener::Unix(listener), describe(address), Some(file))
            }
            SocketAddress::Inet { host, port } => {
                let listener = bind(host, *port).map_err(failed)?;
                let local = listener.local_addr().map_err(failed)?;
                (Listener::Tcp(listener), format!("tcp:{local}"), None)
            }
            SocketAddress::Fd { fd } => {
                let socket = adopt_socket(who, *fd, true)?;
                let name = local_name(&socket);
                let unix = sys::socket_option(&socket, libc::SO_DOMAIN).map_err(failed)?;
                let listener = if unix == libc::AF_UNIX {
                    Listener::Unix(socket.into())
                } else {
                    Listener::Tcp(socket.into())
                };
                (listener, name, None)
            }
        };
        let server = Self { listener, name, retry: false, _file: file };
        match &server.listener {
            Listener::Unix(l) => l.set_nonblocking(true),
            Listener::Tcp(l) => l.set_nonblocking(true),
        }
        .map_err(failed)?;
        Ok(server)
    }

    fn accept(&self) -> io::Result<Link> {
        match &self.listener {
            Listener::Unix(l) => {
                let (stream, _) = l.accept()?;
                Ok(Link::socket(stream.into(), format!("{},server=on", self.name)))
            }
            Listener::Tcp(l) => {
                let (stream, _) = l.accept()?;
                let _ = stream.set_nodelay(true);
                let name = tcp_name(&stream, ",server=on");
                Ok(Link::socket(stream.into(), name))
            }
        }
    }
}

/// An empty host is every address, IPv6 where there is any.
fn bind(host: &str, port: u16) -> io::Result<TcpListener> {
    match host {
        "" => TcpListener::bind(("::", port)).or_else(|e| match e.kind() {
            io::ErrorKind::AddrInUse => Err(e),
            _ => TcpListener::bind(("0.0.0.0", port)),
        }),
        host => TcpListener::bind((host, port)),
    }
}

/// Removes the socket file of a dead server; refuses where one lives or another file is.
fn make_room(who: &str, path: &Path) -> Result<(), Error> {
    let Ok(data) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !data.file_type().is_socket() {
        return Err(Error::NotASocket { who: who.into(), path: path.into() });
    }
    // Non-blocking: a live server whose backlog is full must not hang us.
    let alive = match unix_address(path).and_then(|a| sys::start_connect(libc::AF_UNIX, &a)) {
        Ok(_) => true,
        Err(e) => e.kind() == io::ErrorKind::WouldBlock,
    };
    let address = || describe(&SocketAddress::Unix { path: path.into() });
    if alive {
        return Err(Error::InUse { who: who.into(), address: address() });
    }
    std::fs::remove_file(path).map_err(|source| Error::Listen {
        who: who.into(),
        address: address(),
        source,
    })
}

impl Source for Server {
    fn waiting_on(&self) -> Option<(RawFd, i16)> {
        let fd = match &self.listener {
            Listener::Unix(l) => l.as_raw_fd(),
            Listener::Tcp(l) => l.as_raw_fd(),
        };
        // After a failed accept the fd stays readable, and polling it would spin.
        (!self.retry).then_some((fd, libc::POLLIN))
    }

    fn timeout(&self) -> Option<Duration> {
        self.retry.then_some(Duration::from_millis(500))
    }

    fn next(&mut self) -> Option<Link> {
        self.retry = false;
        match self.accept() {
            Ok(link) => Some(link),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => None,
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => None,
            Err(error) => {
                tracing::debug!("cannot accept on {}: {error}", self.name);
                self.retry = true;
                None
            }
        }
    }

    fn idle_name(&self) -> String {
        format!("disconnected:{},server=on", self.name)
    }
}

/// A socket address as the kernel takes it.
type RawAddress = Vec<u8>;

fn unix_address(path: &Path) -> io::Result<RawAddress> {
    use std::os::unix::ffi::OsStrExt;
    let path = path.as_os_str().as_bytes();
    // One byte of the 108 is for the end.
    if path.len() > 107 || path.contains(&0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a unix socket's path has at most 107 bytes, none of them zero",
        ));
    }
    let mut raw = (libc::AF_UNIX as libc::sa_family_t).to_ne_bytes().to_vec();
    raw.extend(path);
    raw.push(0);
    Ok(raw)
}

fn tcp_address(address: &SocketAddr) -> (i32, RawAddress) {
    match address {
        SocketAddr::V4(a) => {
            let mut raw = (libc::AF_INET as libc::sa_family_t).to_ne_bytes().to_vec();
            raw.extend(a.port().to_be_bytes());
            raw.extend(a.ip().octets());
            raw.extend([0; 8]);
            (libc::AF_INET, raw)
        }
        SocketAddr::V6(a) => {
            let mut raw = (libc::AF_INET6 as libc::sa_family_t).to_ne_bytes().to_vec();
            raw.extend(a.port().to_be_bytes());
            raw.extend(a.flowinfo().to_ne_bytes());
            raw.extend(a.ip().octets());
            raw.extend(a.scope_id().to_ne_bytes());
            (libc::AF_INET6, raw)
        }
    }
}

/// A client that goes on trying.
struct Dialer {
    name: String,
    /// What the name resolved to, tried in turn.
    targets: Vec<(i32, RawAddress)>,
    turn: usize,
    pause: Duration,
    attempt: Option<OwnedFd>,
    next_at: Instant,
}

impl Dialer {
    fn targets(address: &SocketAddress) -> io::Result<Vec<(i32, RawAddress)>> {
        match address {
            SocketAddress::Unix { path } => Ok(vec![(libc::AF_UNIX, unix_address(path)?)]),
            SocketAddress::Inet { host, port } => {
                Ok((host.as_str(), *port).to_socket_addrs()?.map(|a| tcp_address(&a)).collect())
            }
            SocketAddress::Fd { .. } => Ok(Vec::new()),
        }
    }

    fn failed(&mut self, error: &io::Error) {
        tracing::debug!("cannot connect to {}: {error}", self.name);
        self.turn += 1;
    }

    fn start(&mut self) {
        self.next_at = Instant::now() + self.pause;
        let Some((family, address)) = self.targets.get(self.turn % self.targets.len().max(1))
        else {
            return;
        };
        match sys::start_connect(*family, address) {
            Ok(fd) => self.attempt = Some(fd),
            Err(e) => self.failed(&e),
        }
    }
}

impl Source for Dialer {
    fn waiting_on(&self) -> Option<(RawFd, i16)> {
        self.attempt.as_ref().map(|fd| (fd.as_raw_fd(), libc::POLLOUT))
    }

    fn timeout(&self) -> Option<Duration> {
        Some(self.next_at.saturating_duration_since(Instant::now()))
    }

    fn next(&mut self) -> Option<Link> {
        if Instant::now() >= self.next_at {
            self.attempt = None; // Nobody answered: anew.
            self.start();
        }
        let fd = self.attempt.take()?;
        if sys::ready(fd.as_raw_fd(), libc::POLLOUT) == 0 {
            self.attempt = Some(fd);
            return None;
        }
        match sys::socket_option(&fd, libc::SO_ERROR) {
            Ok(0) => {
                self.next_at = Instant::now() + self.pause;
                Some(Link::socket(fd, self.name.clone()))
            }
            Ok(code) => {
                self.failed(&io::Error::from_raw_os_error(code));
                None
            }
            Err(e) => {
                self.failed(&e);
                None
            }
        }
    }

    fn idle_name(&self) -> String {
        format!("disconnected:{}", self.name)
    }
}
