//! [`SocketListener`]: a unix socket that listens, with the file that it is found by.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::sys;

/// Does not block. The file is removed when it is dropped, if it is still this socket's.
#[derive(Debug)]
pub struct SocketListener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    file: (u64, u64),
}

impl SocketListener {
    /// Listens on `path`, in the place of a socket that nobody listens on any more.
    ///
    /// # Errors
    /// Somebody does, or the path is another kind of file, or cannot be used.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let socket = match UnixListener::bind(path) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                make_room(path)?;
                UnixListener::bind(path)
            }
            other => other,
        }?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, path: std::path::absolute(path)?, file: identity(path)? })
    }

    /// The next client, if one is there.
    ///
    /// # Errors
    /// `WouldBlock` when none is; otherwise the host's.
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().map(|(stream, _)| stream)
    }
}

impl AsRawFd for SocketListener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for SocketListener {
    fn drop(&mut self) {
        // Another process may have taken the path over.
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|data| (data.dev(), data.ino()))
}

fn make_room(path: &Path) -> io::Result<()> {
    // Connecting to an ordinary file is refused just as to a dead socket.
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::other("a file that is no socket is there; name another path"));
    }
    match sys::connect_now(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Ok(_) => Err(io::Error::other("another process listens there")),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_a_dead_sockets_place_and_nothing_elses() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let live = SocketListener::bind(&path).unwrap();
        let e = SocketListener::bind(&path).unwrap_err().to_string();
        assert!(e.contains("another process listens"), "{e}");
        drop(live);
        assert!(!path.exists());

        std::fs::write(&path, "precious").unwrap();
        let e = SocketListener::bind(&path).unwrap_err().to_string();
        assert!(e.contains("no socket"), "{e}");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(SocketListener::bind(&link).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn leaves_a_socket_that_is_anothers_by_now() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = SocketListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = SocketListener::bind(&path).unwrap();
        drop(first);
        assert!(UnixStream::connect(&path).is_ok());
        assert!(second.accept().is_ok());
    }
}
