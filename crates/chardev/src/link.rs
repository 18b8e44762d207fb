//! [`Link`]: one client's file descriptors, read and written without blocking.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use crate::sys;

/// How bytes are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Medium {
    /// A socket: fds may come along.
    Socket,
    /// Anything else.
    Stream,
}

/// What the end of the input means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtEnd {
    /// The client is gone.
    Disconnect,
    /// Only the input is over (stdin from a file); output goes on.
    KeepWriting,
}

/// A connection to a client.
pub(crate) struct Link {
    /// `None`: write-only.
    pub input: Option<Arc<OwnedFd>>,
    /// `None`: it was closed by the other side, output is thrown away.
    pub output: Option<Arc<OwnedFd>>,
    pub medium: Medium,
    pub at_end: AtEnd,
    /// Most bytes a write: where non-blocking mode cannot be had, what never blocks when the fd
    /// polls as writable.
    pub max_write: usize,
    /// Name while connected, as [`crate::Chardev::filename`] gives it.
    pub name: String,
}

impl Link {
    pub fn socket(fd: OwnedFd, name: String) -> Self {
        let fd = Arc::new(fd);
        Self {
            input: Some(fd.clone()),
            output: Some(fd),
            medium: Medium::Socket,
            at_end: AtEnd::Disconnect,
            max_write: usize::MAX,
            name,
        }
    }

    pub fn input_fd(&self) -> RawFd {
        self.input.as_ref().map_or(-1, |fd| fd.as_raw_fd())
    }

    pub fn output_fd(&self) -> RawFd {
        self.output.as_ref().map_or(-1, |fd| fd.as_raw_fd())
    }

    /// Reads what is there. Zero bytes are the end.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        match self.medium {
            Medium::Socket => sys::receive(self.input_fd(), buffer),
            Medium::Stream => match sys::read(self.input_fd(), buffer) {
                // A pty whose last client has closed it.
                Err(e) if e.raw_os_error() == Some(libc::EIO) => Ok((0, Vec::new())),
                other => other.map(|n| (n, Vec::new())),
            },
        }
    }

    /// Writes what fits now; `WouldBlock` when nothing does.
    pub fn write(&self, data: &[u8]) -> io::Result<usize> {
        let data = &data[..data.len().min(self.max_write)];
        match self.medium {
            Medium::Socket => sys::send(self.output_fd(), data),
            Medium::Stream => sys::write(self.output_fd(), data),
        }
    }
}
