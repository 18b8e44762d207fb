//! What the tests of the back ends share.
#![allow(unsafe_code, dead_code)]

use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use chardev::{Chardev, Frontend};

/// A front end that keeps what it gets, up to a limit.
pub struct Recorder {
    limit: AtomicUsize,
    data: Mutex<Vec<u8>>,
    seen: AtomicUsize,
    fds: Mutex<Vec<OwnedFd>>,
    opened: AtomicUsize,
    closed: AtomicUsize,
    focused: AtomicBool,
    held: Mutex<Option<Arc<dyn Chardev>>>,
}

impl Recorder {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicUsize::new(limit),
            data: Mutex::default(),
            seen: AtomicUsize::new(0),
            fds: Mutex::default(),
            opened: AtomicUsize::new(0),
            closed: AtomicUsize::new(0),
            focused: AtomicBool::new(false),
            held: Mutex::default(),
        })
    }

    pub fn allow(&self, limit: usize) {
        self.limit.store(limit, Ordering::SeqCst);
    }

    pub fn hold(&self, chardev: Arc<dyn Chardev>) {
        *self.held.lock().unwrap() = Some(chardev);
    }

    /// Waits until `expected` has come, and takes it; more or other than that is a failure.
    pub fn expect(&self, expected: &[u8]) {
        eventually(&expected.escape_ascii().to_string(), || {
            self.data.lock().unwrap().len() >= expected.len()
        });
        let got = std::mem::take(&mut *self.data.lock().unwrap());
        assert_eq!(got.escape_ascii().to_string(), expected.escape_ascii().to_string());
    }

    pub fn take_fds(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds.lock().unwrap())
    }

    pub fn seen(&self) -> usize {
        self.seen.load(Ordering::SeqCst)
    }

    pub fn opened(&self) -> usize {
        self.opened.load(Ordering::SeqCst)
    }

    pub fn closed(&self) -> usize {
        self.closed.load(Ordering::SeqCst)
    }

    pub fn focused(&self) -> bool {
        self.focused.load(Ordering::SeqCst)
    }
}

impl Frontend for Recorder {
    fn can_receive(&self) -> usize {
        self.limit.load(Ordering::SeqCst).saturating_sub(self.data.lock().unwrap().len())
    }

    fn receive(&self, data: &[u8], fds: Vec<OwnedFd>) {
        assert!(data.len() <= self.can_receive());
        self.data.lock().unwrap().extend(data);
        self.fds.lock().unwrap().extend(fds);
        self.seen.fetch_add(data.len(), Ordering::SeqCst);
    }

    fn opened(&self) {
        self.opened.fetch_add(1, Ordering::SeqCst);
    }

    fn closed(&self) {
        self.closed.fetch_add(1, Ordering::SeqCst);
    }

    fn focus(&self, focused: bool) {
        self.focused.store(focused, Ordering::SeqCst);
    }
}

/// Waits for something that another thread does.
pub fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !check() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Gives an fd away, as a parent process would.
pub fn leak(fd: impl Into<OwnedFd>) -> RawFd {
    fd.into().into_raw_fd()
}

/// Sends bytes with fds in one message.
pub fn send_fds(socket: &impl AsRawFd, data: &[u8], fds: &[RawFd]) {
    let bytes = size_of_val(fds) as u32;
    let mut control = vec![0u64; 64];
    let mut part = libc::iovec { iov_base: data.as_ptr() as *mut _, iov_len: data.len() };
    // SAFETY: all pointers are to live buffers that are long enough for the fds of a test.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(bytes) as _;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(bytes) as _;
        let to = libc::CMSG_DATA(header).cast::<RawFd>();
        std::ptr::copy_nonoverlapping(fds.as_ptr(), to, fds.len());
        let sent = libc::sendmsg(socket.as_raw_fd(), &message, 0);
        assert_eq!(sent, data.len() as isize);
    }
}
