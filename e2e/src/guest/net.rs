//! The guest's network work: an address, streams with checked content, and an echo.
#![allow(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::{ECHO_PORT, GUEST_SEED, HOST_SEED, STREAM_PORT};
use crate::pattern::Stream;

/// Counters of the streams.
#[derive(Default)]
pub struct Tcp {
    /// Bytes sent.
    pub sent: AtomicU64,
    /// Bytes received and compared.
    pub received: AtomicU64,
    /// Of these, wrong ones.
    pub bad: AtomicU64,
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    request
}

fn ioctl(socket: &OwnedFd, number: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: all numbers used here take an ifreq, which outlives the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), number, request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn address(ip: Ipv4Addr) -> libc::sockaddr {
    let mut addr = libc::sockaddr { sa_family: libc::AF_INET as u16, sa_data: [0; 14] };
    for (to, from) in addr.sa_data[2..6].iter_mut().zip(ip.octets()) {
        *to = from as libc::c_char;
    }
    addr
}

/// Sets interfaces up: loopback, and `name` with `ip`/`prefix`.
///
/// # Errors
/// What the kernel says.
pub fn configure(name: &str, ip: Ipv4Addr, prefix: u32) -> io::Result<()> {
    let socket = control_socket()?;
    let up = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    let mut lo = request("lo");
    lo.ifr_ifru.ifru_flags = up;
    ioctl(&socket, libc::SIOCSIFFLAGS, &mut lo)?;
    let mut card = request(name);
    card.ifr_ifru.ifru_addr = address(ip);
    ioctl(&socket, libc::SIOCSIFADDR, &mut card)?;
    let mask = u32::MAX.checked_shl(32 - prefix.min(32)).unwrap_or(0);
    card.ifr_ifru.ifru_netmask = address(Ipv4Addr::from(mask));
    ioctl(&socket, libc::SIOCSIFNETMASK, &mut card)?;
    card.ifr_ifru.ifru_flags = up;
    ioctl(&socket, libc::SIOCSIFFLAGS, &mut card)
}

/// Stops the card `name`: nothing is sent through it any more.
///
/// # Errors
/// What the kernel says.
pub fn take_down(name: &str) -> io::Result<()> {
    let mut card = request(name);
    card.ifr_ifru.ifru_flags = 0;
    ioctl(&control_socket()?, libc::SIOCSIFFLAGS, &mut card)
}

/// A socket to speak of network cards through.
fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: socket takes no memory.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends the stream `seed` at `kib` KiB a second until the connection or `go_on` ends.
pub fn send(
    mut to: &TcpStream,
    seed: u64,
    kib: u64,
    sent: &AtomicU64,
    go_on: impl Fn() -> bool,
) -> io::Result<()> {
    let mut stream = Stream::new(seed);
    let mut buf = vec![0; 16 * 1024];
    let mut last = Instant::now();
    let mut due = 0.0;
    while go_on() {
        due += last.elapsed().min(Duration::from_millis(100)).as_secs_f64() * kib as f64 * 1024.0;
        last = Instant::now();
        while due >= buf.len() as f64 && go_on() {
            due -= buf.len() as f64;
            stream.fill(&mut buf);
            to.write_all(&buf)?;
            sent.fetch_add(buf.len() as u64, Ordering::Relaxed);
        }
        thread::sleep(Duration::from_millis(4));
    }
    Ok(())
}

/// Takes and checks the stream `seed` until the connection ends.
pub fn receive(
    mut from: &TcpStream,
    seed: u64,
    received: &AtomicU64,
    bad: &AtomicU64,
) -> io::Result<()> {
    let mut stream = Stream::new(seed);
    let mut buf = vec![0; 64 * 1024];
    loop {
        let n = from.read(&mut buf)?;
        if n == 0 {
            return Ok(());
        }
        bad.fetch_add(stream.check(&buf[..n]), Ordering::Relaxed);
        received.fetch_add(n as u64, Ordering::Relaxed);
    }
}

/// Serves streams for ever: what comes is checked, and the guest's own stream is sent.
pub fn serve_streams(tcp: &Arc<Tcp>, kib: u64) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, STREAM_PORT))?;
    for connection in listener.incoming() {
        let Ok(connection) = connection else { continue };
        let Ok(other) = connection.try_clone() else { continue };
        let (sending, receiving) = (Arc::clone(tcp), Arc::clone(tcp));
        thread::spawn(move || send(&connection, GUEST_SEED, kib, &sending.sent, || true));
        thread::spawn(move || {
            let end = receive(&other, HOST_SEED, &receiving.received, &receiving.bad);
            let _ = other.shutdown(std::net::Shutdown::Both);
            end
        });
    }
    Ok(())
}

/// Sends every datagram back, for ever.
pub fn serve_echo() -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ECHO_PORT))?;
    let mut buf = [0; 2048];
    loop {
        if let Ok((n, from)) = socket.recv_from(&mut buf) {
            let _ = socket.send_to(&buf[..n], from);
        }
    }
}
