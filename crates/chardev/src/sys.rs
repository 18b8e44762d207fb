//! The system calls that the standard library lacks: poll, messages with fds, non-blocking mode.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::MAX_FDS;

/// One fd of a poll set; a negative fd is skipped.
pub(crate) fn pollfd(fd: RawFd, events: i16) -> libc::pollfd {
    libc::pollfd { fd, events, revents: 0 }
}

/// Waits for an event or the time-out. An interrupted wait is an empty one.
pub(crate) fn poll(set: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<usize> {
    // Rounded up, or a wait of less than a millisecond would spin.
    let ms = timeout.map_or(-1, |t| t.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i32);
    // SAFETY: the pointer and the length are those of a live, exclusively borrowed slice.
    let n = unsafe { libc::poll(set.as_mut_ptr(), set.len() as libc::nfds_t, ms) };
    match n {
        0.. => Ok(n as usize),
        _ => {
            set.iter_mut().for_each(|p| p.revents = 0);
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted { Ok(0) } else { Err(error) }
        }
    }
}

/// Whether `fd` has one of `events` (or an error, or a hang-up) now: those that it has.
pub(crate) fn ready(fd: RawFd, events: i16) -> i16 {
    let mut set = [pollfd(fd, events)];
    match poll(&mut set, Some(Duration::ZERO)) {
        Ok(_) => set[0].revents,
        Err(_) => libc::POLLNVAL,
    }
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

pub(crate) fn read(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `len` bytes into the exclusively borrowed buffer.
    check(unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) })
}

pub(crate) fn write(fd: RawFd, data: &[u8]) -> io::Result<usize> {
    // SAFETY: the kernel reads at most `len` bytes of the borrowed slice.
    check(unsafe { libc::write(fd, data.as_ptr().cast(), data.len()) })
}

/// Sends on a socket without blocking and without SIGPIPE.
pub(crate) fn send(fd: RawFd, data: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads at most `len` bytes of the borrowed slice.
    check(unsafe { libc::send(fd, data.as_ptr().cast(), data.len(), flags) })
}

/// Room for the control message of [`MAX_FDS`] fds, aligned as `cmsghdr` must be.
#[repr(C, align(8))]
struct Control([u8; 128]);

const FDS_BYTES: u32 = (MAX_FDS * size_of::<RawFd>()) as u32;
// SAFETY: CMSG_SPACE only computes.
const CONTROL_BYTES: usize = unsafe { libc::CMSG_SPACE(FDS_BYTES) } as usize;
const _: () = assert!(CONTROL_BYTES <= 128);

/// Receives from a socket without blocking: bytes, and at most [`MAX_FDS`] fds that came along
/// (the kernel closes what is beyond). Zero bytes are the end of the stream.
pub(crate) fn receive(fd: RawFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = Control([0; 128]);
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is plain data for which all zeroes is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = CONTROL_BYTES as _;
    // SAFETY: the header points at a live iovec, buffer and control area with their lengths.
    let n = check(unsafe {
        libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC)
    })?;
    Ok((n, collect_fds(&message)))
}

fn collect_fds(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the header was filled in by recvmsg and its control area is alive; the macros walk
    // only within msg_controllen.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: not null, and inside the control area.
        let (level, kind, length) =
            unsafe { ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len as usize) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: only computes.
            let count = (length - unsafe { libc::CMSG_LEN(0) } as usize) / size_of::<RawFd>();
            for i in 0..count {
                // SAFETY: the kernel put `count` new fds there, which nobody else owns.
                fds.push(unsafe {
                    let at = libc::CMSG_DATA(header).cast::<RawFd>().add(i);
                    OwnedFd::from_raw_fd(at.read_unaligned())
                });
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    fds
}

/// Takes over an inherited fd; `None` when it is not open.
pub(crate) fn adopt(fd: RawFd) -> Option<OwnedFd> {
    // SAFETY: F_SETFD on any number is harmless.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return None;
    }
    // SAFETY: it is open, and the user handed it to this chardev on the command line.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A second fd for the same open file, closed on exec.
pub(crate) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: borrowed only for the call; a number that is not open makes the call fail.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}

/// An integer socket option.
pub(crate) fn socket_option(fd: &impl AsRawFd, option: i32) -> io::Result<i32> {
    let mut value = 0i32;
    let mut size = size_of::<i32>() as libc::socklen_t;
    // SAFETY: value and size live through the call and size is that of value.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut size,
        )
    };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// Switches non-blocking mode of the open file on.
pub(crate) fn set_nonblocking(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: no pointers.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no pointers.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Starts to connect a new non-blocking stream socket. The fd becomes writable when it is done;
/// `SO_ERROR` then says how it went.
pub(crate) fn start_connect(family: i32, address: &[u8]) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(family, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, and owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: the address is a live slice whose length is passed; the kernel checks its contents.
    let result = unsafe {
        libc::connect(fd.as_raw_fd(), address.as_ptr().cast(), address.len() as libc::socklen_t)
    };
    if result == 0 {
        return Ok(fd);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EINPROGRESS) { Ok(fd) } else { Err(error) }
}
