//! What a NIC needs of the network behind it. Frames carry the 12-byte virtio-net header in front.
#![allow(unsafe_code)] // iovecs of guest memory go through this trait

use std::io;
use std::os::fd::RawFd;

/// Offloads, as the guest negotiated them for what it receives, or as a back end can do them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Frames with a checksum still to be filled in.
    pub csum: bool,
    /// TCP over IPv4 beyond the MTU.
    pub tso4: bool,
    /// TCP over IPv6 beyond the MTU.
    pub tso6: bool,
    /// The two above with ECN.
    pub ecn: bool,
    /// UDP fragments.
    pub ufo: bool,
}

impl Offloads {
    /// Everything.
    pub const ALL: Self = Self { csum: true, tso4: true, tso6: true, ecn: true, ufo: true };

    /// Whether frames beyond the MTU may come.
    pub fn large(self) -> bool {
        self.tso4 || self.tso6 || self.ufo
    }
}

/// One queue pair of a network back end, owned by one thread.
pub trait Backend: Send {
    /// A name for messages ("tap0").
    fn name(&self) -> &str;
    /// Readable when a frame is there, writable when one can be sent. The same for life.
    fn poll_fd(&self) -> RawFd;
    /// Reads one frame, header first, into the iovecs; the rest of a longer frame is lost.
    /// Returns its bytes.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    ///
    /// # Safety
    /// Every iovec is valid for writes; at most 1024 of them.
    unsafe fn recv(&mut self, iov: &[libc::iovec]) -> io::Result<usize>;
    /// Sends one frame, header first.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room now; others lose the frame.
    ///
    /// # Safety
    /// Every iovec is valid for reads; at most 1024 of them.
    unsafe fn send(&mut self, iov: &[libc::iovec]) -> io::Result<usize>;
    /// What the guest may leave to the back end when it sends, and may be asked to take.
    fn capabilities(&self) -> Offloads;
    /// What the guest can take from now on.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;
    /// Whether this queue takes part (multi-queue).
    fn set_enabled(&mut self, enabled: bool) -> io::Result<()>;
    /// The guest's link goes up or down.
    fn set_link(&mut self, up: bool);
    /// Largest payload of a frame without segmentation, in bytes.
    fn mtu(&self) -> u16;
    /// Frames that were lost on the host's side, before [`recv`](Self::recv) could take them, since
    /// the last call. Costs a system call where it is known at all.
    fn lost(&mut self) -> u64 {
        0
    }
}

/// [`Backend::send`] for bytes of our own.
///
/// # Errors
/// As [`Backend::send`].
pub fn send_bytes(backend: &mut dyn Backend, frame: &[u8]) -> io::Result<usize> {
    let iov = [libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() }];
    // SAFETY: the one iovec is `frame`, which send only reads.
    unsafe { backend.send(&iov) }
}

/// [`Backend::recv`] into bytes of our own.
///
/// # Errors
/// As [`Backend::recv`].
pub fn recv_bytes(backend: &mut dyn Backend, frame: &mut [u8]) -> io::Result<usize> {
    let iov = [libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() }];
    // SAFETY: the one iovec is `frame`, borrowed exclusively.
    unsafe { backend.recv(&iov) }
}
