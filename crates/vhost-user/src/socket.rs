//! Messages over a UNIX socket, with the descriptors that come beside them.
//!
//! Invariants:
//! - At most one message is held in part, at most [`MAX_PAYLOAD`] bytes and [`MAX_FDS`] descriptors;
//!   more of either is an error.
//! - Every descriptor that the kernel installs is owned at once, and closed if nobody takes it.
#![allow(unsafe_code)] // sendmsg and recvmsg have no safe form in std

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::message::{
    self, HEADER_SIZE, Header, Incoming, MAX_FDS, MAX_PAYLOAD, Message, decode, decode_header,
};
use crate::{Error, Result};

/// Room for the kernel's framing of descriptors, aligned as it wants it. One descriptor more than
/// allowed fits, so that too many are seen instead of being cut off.
const CMSG_WORDS: usize =
    (size_of::<libc::cmsghdr>() + (MAX_FDS + 1) * size_of::<RawFd>()).div_ceil(8) + 2;

/// How long the rest of a message may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A socket that messages of one direction come in on.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    incoming: Incoming,
    buf: Vec<u8>,
    header: Option<Header>,
    fds: Vec<OwnedFd>,
    /// When the message began that is held in part.
    begun: Option<Instant>,
}

impl Channel {
    /// Wraps `stream` and makes it non-blocking.
    pub fn new(stream: UnixStream, incoming: Incoming) -> Result<Self> {
        stream.set_nonblocking(true).map_err(|source| Error::Host { what: "socket", source })?;
        let buf = Vec::with_capacity(HEADER_SIZE + MAX_PAYLOAD);
        Ok(Self { stream, incoming, buf, header: None, fds: Vec::new(), begun: None })
    }

    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// The next message, or `None` when it has not come whole yet.
    ///
    /// # Errors
    /// [`Error::Disconnected`], or what is wrong with the message.
    pub fn receive(&mut self) -> Result<Option<(Message, Vec<OwnedFd>)>> {
        loop {
            let need = match self.header {
                None => HEADER_SIZE,
                Some(h) => HEADER_SIZE + h.size,
            };
            if self.buf.len() < need && !self.fill(need)? {
                if !self.buf.is_empty() {
                    self.begun.get_or_insert_with(Instant::now);
                }
                return Ok(None);
            }
            let Some(header) = self.header else {
                let mut head = [0; HEADER_SIZE];
                head.copy_from_slice(&self.buf[..HEADER_SIZE]);
                self.header = Some(decode_header(&head, self.incoming)?);
                continue;
            };
            let message = decode(header, &self.buf[HEADER_SIZE..], self.fds.len());
            (self.header, self.begun) = (None, None);
            self.buf.clear();
            let fds = std::mem::take(&mut self.fds);
            return message.map(|m| Some((m, fds)));
        }
    }

    /// Whether the rest of a message does not come. A descriptor beside its beginning may be the
    /// other side's own end of this socket, and then it never closes.
    pub fn is_stalled(&self) -> bool {
        self.begun.is_some_and(|at| at.elapsed() > PATIENCE)
    }

    /// Waits for the next message until `deadline`.
    ///
    /// # Errors
    /// As [`receive`](Self::receive), and when the time is over.
    pub fn receive_until(&mut self, deadline: Instant) -> Result<(Message, Vec<OwnedFd>)> {
        loop {
            if let Some(message) = self.receive()? {
                return Ok(message);
            }
            wait(self.fd(), libc::POLLIN, deadline)?;
        }
    }

    /// Reads up to `need` bytes in all; whether they are there.
    fn fill(&mut self, need: usize) -> Result<bool> {
        while self.buf.len() < need {
            let have = self.buf.len();
            self.buf.resize(need, 0);
            let got = receive_some(&self.stream, &mut self.buf[have..], &mut self.fds);
            let n = *got.as_ref().unwrap_or(&0);
            self.buf.truncate(have + n);
            match got {
                Ok(0) => return Err(Error::Disconnected),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(Error::Disconnected);
                }
                Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                    let message = self.header.map_or("header", |h| h.kind.name());
                    return Err(Error::Protocol { message, reason: e.to_string() });
                }
                Err(source) => return Err(Error::Host { what: "cannot read the socket", source }),
            }
            if self.fds.len() > MAX_FDS {
                let message = self.header.map_or("header", |h| h.kind.name());
                let reason = format!("more than {MAX_FDS} descriptors came along");
                return Err(Error::Protocol { message, reason });
            }
        }
        Ok(true)
    }

    /// Sends a message whole, without waiting.
    ///
    /// # Errors
    /// [`Error::Disconnected`]; or the other side does not read what it is sent.
    pub fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.send_until(message, fds, None)
    }

    /// Sends a message whole, waiting until `deadline` if there is one.
    pub fn send_until(
        &self,
        message: &Message,
        fds: &[BorrowedFd<'_>],
        deadline: Option<Instant>,
    ) -> Result<()> {
        let mut bytes = Vec::with_capacity(64);
        message::encode(message, &mut bytes);
        let mut at = 0;
        while at < bytes.len() {
            let fds = if at == 0 { fds } else { &[] };
            match send_some(&self.stream, &bytes[at..], fds) {
                Ok(n) => at += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => match deadline {
                    Some(deadline) => wait(self.fd(), libc::POLLOUT, deadline)?,
                    None => {
                        let reason = "the other side does not read what it is sent".into();
                        return Err(Error::Protocol { message: message.kind.name(), reason });
                    }
                },
                Err(e) if matches!(e.raw_os_error(), Some(libc::EPIPE | libc::ECONNRESET)) => {
                    return Err(Error::Disconnected);
                }
                Err(source) => return Err(Error::Host { what: "cannot write the socket", source }),
            }
        }
        Ok(())
    }
}

/// Waits for `events` on `fd`.
fn wait(fd: RawFd, events: i16, deadline: Instant) -> Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left == Duration::ZERO {
            let source = io::Error::from(io::ErrorKind::TimedOut);
            return Err(Error::Host { what: "no answer from the other side in time", source });
        }
        let mut poll = libc::pollfd { fd, events, revents: 0 };
        let ms = left.as_millis().clamp(1, i32::MAX as u128) as i32;
        // SAFETY: one valid pollfd.
        if unsafe { libc::poll(&mut poll, 1, ms) } > 0 {
            return Ok(());
        }
    }
}

/// One recvmsg. Descriptors are appended to `fds`. `InvalidData`: more than fit came along.
fn receive_some(stream: &UnixStream, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut control = [MaybeUninit::<u64>::zeroed(); CMSG_WORDS];
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: a msghdr of zeroes is valid.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.as_mut_ptr().cast();
    msg.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: msg describes buf and control, which outlive the call.
    let n = unsafe { libc::recvmsg(stream.as_raw_fd(), &mut msg, flags) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel filled msg_controllen bytes of well-formed headers; the descriptors in them
    // are new and owned by nobody else.
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(&msg);
        while let Some(c) = cmsg.as_ref() {
            if c.cmsg_level == libc::SOL_SOCKET && c.cmsg_type == libc::SCM_RIGHTS {
                let len = c.cmsg_len - libc::CMSG_LEN(0) as usize;
                let data = libc::CMSG_DATA(c).cast::<RawFd>();
                for i in 0..len / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            cmsg = libc::CMSG_NXTHDR(&msg, c);
        }
    }
    if msg.msg_flags & libc::MSG_CTRUNC != 0 {
        let why = format!("more than {MAX_FDS} descriptors came along, or some were refused");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(n as usize)
}

/// One sendmsg.
pub fn send_some(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut control = [0_u64; CMSG_WORDS];
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: a msghdr of zeroes is valid.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    let fds = &fds[..fds.len().min(MAX_FDS)];
    if !fds.is_empty() {
        let len = size_of_val(fds) as u32;
        msg.msg_control = control.as_mut_ptr().cast();
        // SAFETY: control has room for a header and MAX_FDS descriptors, and is aligned for them.
        unsafe {
            msg.msg_controllen = libc::CMSG_SPACE(len) as usize;
            let c = libc::CMSG_FIRSTHDR(&msg);
            (*c).cmsg_level = libc::SOL_SOCKET;
            (*c).cmsg_type = libc::SCM_RIGHTS;
            (*c).cmsg_len = libc::CMSG_LEN(len) as usize;
            let data = libc::CMSG_DATA(c).cast::<RawFd>();
            for (i, fd) in fds.iter().enumerate() {
                data.add(i).write_unaligned(fd.as_raw_fd());
            }
        }
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: msg describes bytes and control, which outlive the call and are only read.
    let n = unsafe { libc::sendmsg(stream.as_raw_fd(), &msg, flags) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
}

/// Takes `fd` for an eventfd, made non-blocking, so that a peer who fills it up cannot have us wait
/// on it. The flag belongs to both ends, so writes go through [`lent_event`](crate::lent_event).
///
/// # Errors
/// A sentence if it is something else.
pub fn eventfd(fd: OwnedFd) -> std::result::Result<vmm_sys_util::eventfd::EventFd, String> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let is_eventfd = match link {
        // Exactly: a file can have any name, but its path begins with a slash.
        Ok(target) => target.as_os_str() == "anon_inode:[eventfd]",
        // Without /proc: anonymous inodes have no file type.
        Err(_) => {
            // SAFETY: stat is plain data, written by the call.
            unsafe {
                let mut stat: libc::stat = std::mem::zeroed();
                libc::fstat(fd.as_raw_fd(), &mut stat) == 0 && stat.st_mode & libc::S_IFMT == 0
            }
        }
    };
    if !is_eventfd {
        return Err("the descriptor is not an eventfd".into());
    }
    // SAFETY: plain flag calls on a descriptor that is ours.
    unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        if flags < 0 || libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) < 0 {
            return Err("the descriptor cannot be made non-blocking".into());
        }
    }
    use std::os::fd::IntoRawFd;
    // SAFETY: the descriptor is open and given up by its owner.
    Ok(unsafe { vmm_sys_util::eventfd::EventFd::from_raw_fd(fd.into_raw_fd()) })
}

/// `fd`, to be sent.
pub fn borrow_eventfd(fd: &vmm_sys_util::eventfd::EventFd) -> BorrowedFd<'_> {
    // SAFETY: open for as long as the EventFd that the result borrows from.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// Takes `fd` for a connected UNIX stream socket.
///
/// # Errors
/// A sentence if it is something else.
pub fn unix_stream(fd: OwnedFd) -> std::result::Result<UnixStream, String> {
    let option = |name| {
        let (mut v, mut len) = (0_i32, size_of::<i32>() as libc::socklen_t);
        // SAFETY: v and len are valid for the call, which writes at most len bytes.
        let r = unsafe {
            let p = std::ptr::from_mut(&mut v).cast();
            libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, p, &mut len)
        };
        (r == 0).then_some(v)
    };
    if option(libc::SO_DOMAIN) != Some(libc::AF_UNIX)
        || option(libc::SO_TYPE) != Some(libc::SOCK_STREAM)
    {
        return Err("the descriptor is not a UNIX stream socket".into());
    }
    Ok(UnixStream::from(fd))
}

/// An anonymous file in memory of `size` zero bytes.
pub fn memfd(name: &std::ffi::CStr, size: u64) -> io::Result<std::fs::File> {
    // SAFETY: a valid name; the kernel returns a new descriptor or -1.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: new, and owned by nobody else.
    let file = unsafe { std::fs::File::from_raw_fd(fd) };
    file.set_len(size)?;
    Ok(file)
}
