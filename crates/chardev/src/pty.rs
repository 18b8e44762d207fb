//! The pty back end: a new pseudo-terminal, whose client comes and goes as it opens and closes
//! the other end.
//!
//! Nobody is connected while the other end is closed, which poll shows as a hang-up. There is no
//! poll event for its being opened, so inotify watches for that; a slow timer stands in where
//! inotify cannot be had.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use crate::link::{AtEnd, Link, Medium};
use crate::pump::{Pump, Setup, Source};
use crate::{Chardev, Error, sys};

pub(crate) fn open(setup: Setup) -> Result<Arc<dyn Chardev>, Error> {
    let who = setup.who.clone();
    let source =
        Pty::new().map_err(|source| Error::Setup { who, what: "a pseudo-terminal", source })?;
    tracing::info!("chardev '{}' is {}", setup.label, source.path);
    Ok(Arc::new(Pump::start(setup, Box::new(source), None)?))
}

struct Pty {
    master: Arc<OwnedFd>,
    path: String,
    /// Readable when the other end is opened.
    opens: Option<OwnedFd>,
}

impl Pty {
    fn new() -> io::Result<Self> {
        let (mut master, mut slave) = (-1, -1);
        // SAFETY: the two fds are out parameters; the others may be null.
        let result = unsafe {
            libc::openpty(
                &raw mut master,
                &raw mut slave,
                std::ptr::null_mut(),
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: both were just made, and nobody else owns them.
        let (master, slave) =
            unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        let path = name_of(&master)?;
        make_raw(&slave)?;
        sys::set_nonblocking(&master)?;
        // SAFETY: no pointers.
        if unsafe { libc::fcntl(master.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
        drop(slave); // From now on a closed other end shows as a hang-up.
        let opens = watch_opens(&path);
        Ok(Self { master: Arc::new(master), path, opens })
    }
}

fn name_of(master: &OwnedFd) -> io::Result<String> {
    let mut name = [0 as libc::c_char; 64];
    // SAFETY: the buffer's own length is passed.
    let result = unsafe { libc::ptsname_r(master.as_raw_fd(), name.as_mut_ptr(), name.len()) };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(result));
    }
    let bytes = name.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
    String::from_utf8(bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// No echo, no line editing: the guest does that.
fn make_raw(terminal: &OwnedFd) -> io::Result<()> {
    // SAFETY: termios is plain data for which all zeroes is valid.
    let mut mode: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: mode is a live termios.
    unsafe {
        if libc::tcgetattr(terminal.as_raw_fd(), &raw mut mode) < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::cfmakeraw(&raw mut mode);
        if libc::tcsetattr(terminal.as_raw_fd(), libc::TCSAFLUSH, &raw const mode) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn watch_opens(path: &str) -> Option<OwnedFd> {
    let path = CString::new(path).ok()?;
    // SAFETY: no pointers.
    let fd = unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) };
    if fd < 0 {
        return None;
    }
    // SAFETY: just made, and owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: path is a live C string.
    let watch = unsafe { libc::inotify_add_watch(fd.as_raw_fd(), path.as_ptr(), libc::IN_OPEN) };
    (watch >= 0).then_some(fd)
}

impl Source for Pty {
    fn waiting_on(&self) -> Option<(RawFd, i16)> {
        self.opens.as_ref().map(|fd| (fd.as_raw_fd(), libc::POLLIN))
    }

    fn timeout(&self) -> Option<Duration> {
        // Also with inotify: an open may be seen just before the hang-up state is gone.
        Some(if self.opens.is_some() { Duration::from_secs(1) } else { Duration::from_millis(200) })
    }

    fn next(&mut self) -> Option<Link> {
        if let Some(fd) = &self.opens {
            let mut events = [0; 1024];
            while sys::read(fd.as_raw_fd(), &mut events).is_ok_and(|n| n > 0) {}
        }
        // A client that wrote and left at once (echo x > /dev/pts/N) is still to be heard.
        let state = sys::ready(self.master.as_raw_fd(), libc::POLLIN);
        if state & libc::POLLHUP != 0 && state & libc::POLLIN == 0 {
            return None;
        }
        Some(Link {
            input: Some(self.master.clone()),
            output: Some(self.master.clone()),
            medium: Medium::Stream,
            at_end: AtEnd::Disconnect,
            max_write: usize::MAX,
            name: self.idle_name(),
        })
    }

    fn idle_name(&self) -> String {
        format!("pty:{}", self.path)
    }
}
