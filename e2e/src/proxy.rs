//! A path between two VMMs that breaks when it is told to: it stands between the source and the
//! destination of a migration, knows the frames of the control connection (16 bytes of header:
//! magic `TnMC`, kind, length, checksum; then the payload), and does one fault at one message.
//!
//! It knows the frames' layout by itself, not from the code under test.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::Result;
use crate::error::Context;

const HEADER: usize = 16;
/// More than any frame of a guest in these tests has.
const MAX_PAYLOAD: usize = 64 << 20;

/// The kinds of control messages.
pub mod kind {
    #![allow(missing_docs)]
    pub const HELLO: u16 = 0;
    pub const PREAMBLE: u16 = 1;
    pub const SECTION: u16 = 2;
    pub const STATE_END: u16 = 3;
    pub const GO: u16 = 4;
    pub const RELEASE: u16 = 5;
    pub const BYE: u16 = 7;
    pub const HELLO_ACK: u16 = 32;
    pub const ACCEPT: u16 = 33;
    pub const ROUND_ACK: u16 = 35;
    pub const READY: u16 = 36;
    pub const RUNNING: u16 = 37;
    pub const RELEASED: u16 = 39;
}

/// Where the fault happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// At the first message of a kind, which does not pass any more.
    Before(u16),
    /// At the first message of a kind, which still passes.
    After(u16),
    /// When so many bytes of memory have passed.
    Memory(u64),
}

/// What the fault is.
pub enum Fault {
    /// The control connection breaks; new ones pass at once.
    Cut,
    /// It breaks, and for so long connections are taken and closed again.
    Down(Duration),
    /// Something is done to one of the two while the message waits, and then it breaks.
    Do(Box<dyn FnOnce() + Send>),
}

struct Shared {
    to: PathBuf,
    point: Option<Point>,
    fault: Mutex<Option<Fault>>,
    down: AtomicBool,
    closed: AtomicBool,
    memory: AtomicU64,
    done: AtomicBool,
}

/// The path; it goes when it is dropped.
pub struct Proxy {
    shared: Arc<Shared>,
    at: PathBuf,
}

impl Proxy {
    /// Listens at `at` and connects to `to` for each connection that comes.
    ///
    /// # Errors
    /// When `at` cannot be listened at.
    pub fn start(at: &Path, to: &Path, fault: Option<(Point, Fault)>) -> Result<Self> {
        let listener =
            UnixListener::bind(at).context(|| format!("cannot listen at {}", at.display()))?;
        let (point, fault) = fault.unzip();
        let shared = Arc::new(Shared {
            to: to.to_path_buf(),
            point,
            fault: Mutex::new(fault),
            down: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            memory: AtomicU64::new(0),
            done: AtomicBool::new(false),
        });
        let inner = Arc::clone(&shared);
        thread::spawn(move || accept(&inner, &listener));
        Ok(Self { shared, at: at.to_path_buf() })
    }

    /// Whether the fault has happened.
    pub fn fault_is_done(&self) -> bool {
        self.shared.done.load(Ordering::SeqCst)
    }

    /// The address for `migrate`.
    pub fn uri(&self) -> String {
        format!("unix:{}", self.at.display())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        let _ = UnixStream::connect(&self.at);
        let _ = std::fs::remove_file(&self.at);
    }
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    while let Ok((source, _)) = listener.accept() {
        if shared.closed.load(Ordering::SeqCst) {
            return;
        }
        if shared.down.load(Ordering::SeqCst) {
            continue;
        }
        // As a real path does: refused there is refused here, from now on.
        let Ok(dest) = UnixStream::connect(&shared.to) else { return };
        let shared = Arc::clone(shared);
        thread::spawn(move || connection(&shared, source, dest));
    }
}

/// One frame, header and payload.
fn frame(from: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; HEADER];
    from.read_exact(&mut frame)?;
    let len = u32::from_le_bytes([frame[8], frame[9], frame[10], frame[11]]) as usize;
    if frame[0..4] != *b"TnMC" || len > MAX_PAYLOAD {
        return Err(io::Error::other("not a frame of the control connection"));
    }
    frame.resize(HEADER + len, 0);
    from.read_exact(&mut frame[HEADER..])?;
    Ok(frame)
}

fn connection(shared: &Arc<Shared>, mut source: UnixStream, mut dest: UnixStream) {
    let Ok(first) = frame(&mut source) else { return };
    // A greeting's last field is its role: 0 (control) or 2 (asks again) without fields, or 1 with
    // the number of the memory connection.
    let memory = !first.ends_with(&[0x82, 0, 0x80]) && !first.ends_with(&[0x82, 2, 0x80]);
    let (Ok(source2), Ok(dest2)) = (source.try_clone(), dest.try_clone()) else { return };
    if memory {
        if dest.write_all(&first).is_err() {
            return;
        }
        thread::spawn(move || copy(None, dest2, source2));
        let shared = Arc::clone(shared);
        copy(Some(&shared), source, dest);
    } else {
        let back = Arc::clone(shared);
        thread::spawn(move || pass(&back, None, dest2, source2));
        pass(shared, Some(first), source, dest);
    }
}

/// Passes memory on.
fn copy(count: Option<&Arc<Shared>>, mut from: UnixStream, mut to: UnixStream) {
    let mut buf = vec![0; 256 << 10];
    while let Ok(n) = from.read(&mut buf) {
        if n == 0 || to.write_all(&buf[..n]).is_err() {
            break;
        }
        let Some(shared) = count else { continue };
        let passed = shared.memory.fetch_add(n as u64, Ordering::SeqCst) + n as u64;
        if matches!(shared.point, Some(Point::Memory(limit)) if passed >= limit) && happen(shared) {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// Passes control messages on until the connection ends or is cut.
fn pass(
    shared: &Arc<Shared>,
    mut first: Option<Vec<u8>>,
    mut from: UnixStream,
    mut to: UnixStream,
) {
    while let Some(message) = first.take().or_else(|| frame(&mut from).ok()) {
        let kind = u16::from_le_bytes([message[4], message[5]]);
        let cut = shared.point == Some(Point::Before(kind)) && happen(shared);
        if cut || to.write_all(&message).is_err() {
            break;
        }
        if shared.point == Some(Point::After(kind)) && happen(shared) {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// Does the fault; this connection is cut by it. False when that was done earlier.
fn happen(shared: &Arc<Shared>) -> bool {
    let fault = shared.fault.lock().unwrap_or_else(PoisonError::into_inner).take();
    match fault {
        None => return false,
        Some(Fault::Cut) => {}
        Some(Fault::Down(time)) => {
            shared.down.store(true, Ordering::SeqCst);
            let again = Arc::clone(shared);
            thread::spawn(move || {
                thread::sleep(time);
                again.down.store(false, Ordering::SeqCst);
            });
        }
        Some(Fault::Do(act)) => act(),
    }
    shared.done.store(true, Ordering::SeqCst);
    true
}
