//! Capturing a port's frames into a pcap file that tcpdump and Wireshark read.
//!
//! Poll threads copy a frame's first bytes into a [`frame_ring`](crate::frame_ring) a thread, made
//! beforehand; one writer thread empties the rings into the file. What finds its ring full is
//! counted and left out of the file, not of the traffic.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, SystemTime};

use crate::copy::Source;
use crate::frame_ring::{FrameRing, Record};

/// Bytes that wait for the writer, a poll thread.
const RING_BYTES: usize = 4 << 20;
/// How long the writer sleeps when there is nothing to write.
const NAP: Duration = Duration::from_millis(10);
/// Frames that are at most on their way to the file, and lost with it if it cannot be written.
const MOST_UNFLUSHED: u64 = 4096;
/// How long the end of a capture waits for its last frames to be written; a slow disk gets them
/// later.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// Which way a captured frame goes, as the port's other side sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Into the switch.
    FromPort,
    /// Out of the switch.
    ToPort,
}

/// A running capture, as poll threads see it.
#[derive(Debug)]
pub struct Tap {
    rings: Vec<FrameRing>,
    snap: usize,
    from_port: bool,
    to_port: bool,
    lost: AtomicU64,
    written: AtomicU64,
    stop: AtomicBool,
    /// Why nothing more is written.
    failed: OnceLock<String>,
}

impl Tap {
    /// Why it writes no more, if it does not.
    pub fn failure(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// Frames written, frames left out because the disk was too slow or failed.
    pub fn progress(&self) -> (u64, u64) {
        (self.written.load(Ordering::Relaxed), self.lost.load(Ordering::Relaxed))
    }

    /// Notes a frame. Only poll thread `thread` may call it with its number.
    pub fn frame(&self, thread: usize, direction: Direction, prefix: &[u8], rest: Source<'_>) {
        let wanted = match direction {
            Direction::FromPort => self.from_port,
            Direction::ToPort => self.to_port,
        };
        if !wanted {
            return;
        }
        if self.failed.get().is_some() {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let total = prefix.len() + rest.len();
        let prefix = &prefix[..prefix.len().min(self.snap)];
        let rest_len = rest.len().min(self.snap - prefix.len());
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut meta = [0; 16];
        meta[..8].copy_from_slice(&(now.as_nanos() as u64).to_le_bytes());
        meta[8..12].copy_from_slice(&(total as u32).to_le_bytes());
        let Some(ring) = self.rings.get(thread) else { return };
        if !ring.push(&meta, prefix, rest.first(rest_len)) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A running capture, as control sees it; dropping it ends it.
#[derive(Debug)]
pub struct Capture {
    pub tap: Arc<Tap>,
    pub path: PathBuf,
    /// Device and inode of the file.
    pub file: (u64, u64),
    /// Ends with the writer.
    done: mpsc::Receiver<()>,
}

/// Opens `path` for a capture, and changes nothing there; its device and inode.
///
/// # Errors
/// It cannot be, or is something that could make the writer wait for somebody (a pipe, a terminal).
pub fn open(path: &Path) -> io::Result<(File, (u64, u64))> {
    let mut options = File::options();
    // Without O_NONBLOCK, opening a pipe waits for its reader.
    options.write(true).create(true).truncate(false).custom_flags(libc::O_NONBLOCK);
    let no_file = || io::Error::other("it is no regular file");
    let file = options.open(path).map_err(|e| match e.raw_os_error() {
        Some(libc::ENXIO) => no_file(), // a pipe that nobody reads
        _ => e,
    })?;
    let data = file.metadata()?;
    if !data.is_file() {
        return Err(no_file());
    }
    Ok((file, (data.dev(), data.ino())))
}

impl Capture {
    /// Begins to write to `path` anew, up to `snap` bytes (at least 64) of each frame.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn start(
        path: &Path,
        snap: u32,
        threads: usize,
        from_port: bool,
        to_port: bool,
    ) -> io::Result<Self> {
        let snap = snap.clamp(64, crate::burst::MAX_FRAME) as usize;
        let (file, identity) = open(path)?;
        file.set_len(0)?;
        let mut output = Output::new(file);
        output.to.write_all(&file_header(snap as u32))?;
        output.flush()?;
        let tap = Arc::new(Tap {
            rings: (0..threads).map(|_| FrameRing::new(RING_BYTES)).collect(),
            snap,
            from_port,
            to_port,
            lost: AtomicU64::new(0),
            written: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            failed: OnceLock::new(),
        });
        let theirs = tap.clone();
        let shown = path.display().to_string();
        let (ended, done) = mpsc::channel();
        std::thread::Builder::new().name("capture".into()).spawn(move || {
            if let Err(e) = write_all(&theirs, &mut output) {
                tracing::warn!("capture to '{shown}' ends: {e}");
                let _ = theirs.failed.set(e.to_string());
                output.give_up(&theirs);
            }
            drop((output, ended));
        })?;
        Ok(Self { tap, path: path.to_owned(), file: identity, done })
    }
}

impl std::ops::Drop for Capture {
    fn drop(&mut self) {
        self.tap.stop.store(true, Ordering::Release);
        // Nothing is sent: the end of the sender ends it.
        let _ = self.done.recv_timeout(END_PATIENCE);
    }
}

/// The file, with what is on the way to it.
struct Output {
    to: BufWriter<File>,
    /// Bytes that are in the file, whole frames.
    bytes: u64,
    /// Bytes and frames that were given to `to` since.
    unflushed: (u64, u64),
}

impl Output {
    fn new(file: File) -> Self {
        Self { to: BufWriter::with_capacity(256 << 10, file), bytes: 0, unflushed: (24, 0) }
    }

    /// Returns how many frames are in the file by it.
    fn flush(&mut self) -> io::Result<u64> {
        self.to.flush()?;
        let (bytes, frames) = std::mem::take(&mut self.unflushed);
        self.bytes += bytes;
        Ok(frames)
    }

    fn record(&mut self, meta: &[u8; 16], bytes: &[u8]) -> io::Result<()> {
        self.unflushed.1 += 1;
        self.unflushed.0 += 16 + bytes.len() as u64;
        write_record(&mut self.to, meta, bytes)
    }

    /// After an error: counts what does not get into the file, and leaves whole frames in it.
    fn give_up(&mut self, tap: &Tap) {
        let mut lost = self.unflushed.1;
        for ring in &tap.rings {
            while let Some(n) = ring.pop(|records| records.len()) {
                lost += n as u64;
            }
        }
        tap.lost.fetch_add(lost, Ordering::Relaxed);
        let _ = self.to.get_ref().set_len(self.bytes);
    }
}

/// The pcap file header with nanosecond times, Ethernet (draft-ietf-opsawg-pcap, section 4).
fn file_header(snap: u32) -> [u8; 24] {
    let mut h = [0; 24];
    h[..4].copy_from_slice(&0xa1b2_3c4du32.to_le_bytes());
    h[4..6].copy_from_slice(&2u16.to_le_bytes());
    h[6..8].copy_from_slice(&4u16.to_le_bytes());
    h[16..20].copy_from_slice(&snap.to_le_bytes());
    h[20..].copy_from_slice(&1u32.to_le_bytes());
    h
}

fn write_all(tap: &Tap, output: &mut Output) -> io::Result<()> {
    loop {
        let ending = tap.stop.load(Ordering::Acquire);
        let mut idle = true;
        for ring in &tap.rings {
            let mut write = |records: &[Record<'_>]| {
                // All of a batch, or the count of what is left out would be wrong.
                let each = records.iter().map(|(meta, bytes)| output.record(meta, bytes));
                each.fold(Ok(()), io::Result::and)
            };
            if let Some(result) = ring.pop(&mut write) {
                result?;
                idle = false;
            }
        }
        if idle || output.unflushed.1 >= MOST_UNFLUSHED {
            tap.written.fetch_add(output.flush()?, Ordering::Relaxed);
        }
        if idle {
            if ending {
                return Ok(());
            }
            std::thread::sleep(NAP);
        }
    }
}

fn write_record(file: &mut impl Write, meta: &[u8; 16], bytes: &[u8]) -> io::Result<()> {
    let ns = u64::from_le_bytes(meta[..8].try_into().unwrap_or_default());
    let mut head = [0; 16];
    head[..4].copy_from_slice(&((ns / 1_000_000_000) as u32).to_le_bytes());
    head[4..8].copy_from_slice(&((ns % 1_000_000_000) as u32).to_le_bytes());
    head[8..12].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
    head[12..].copy_from_slice(&meta[8..12]);
    file.write_all(&head)?;
    file.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::with_bytes;

    #[test]
    fn a_full_disk_is_told_and_every_frame_counted() {
        let full = Path::new("/dev/full");
        assert!(Capture::start(full, 64, 1, true, true).is_err(), "it is no regular file");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pcap");
        let c = Capture::start(&path, 64, 1, true, false).unwrap();
        // From here on every write fails.
        let tap = c.tap.clone();
        let mut output = Output::new(File::options().write(true).open(full).unwrap());
        drop(c);
        for _ in 0..10 {
            with_bytes(&[7; 100], |s| tap.frame(0, Direction::FromPort, &[], s));
        }
        let e = write_all(&tap, &mut output).unwrap_err();
        tap.failed.set(e.to_string()).unwrap();
        output.give_up(&tap);
        with_bytes(&[7; 100], |s| tap.frame(0, Direction::FromPort, &[], s));
        assert_eq!(tap.progress(), (0, 11));
        assert!(tap.failure().is_some_and(|why| why.contains("No space")), "{:?}", tap.failure());
    }

    #[test]
    fn a_pipe_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: the name ends with a zero and outlives the call.
        #[allow(unsafe_code)]
        let made = unsafe { libc::mkfifo(name.as_ptr(), 0o600) };
        assert_eq!(made, 0);
        assert!(Capture::start(&path, 64, 1, true, true).is_err());
    }

    #[test]
    fn writes_what_it_was_given() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pcap");
        let c = Capture::start(&path, 64, 2, true, false).unwrap();
        with_bytes(&[7; 100], |s| c.tap.frame(0, Direction::FromPort, &[1, 2], s));
        with_bytes(&[9; 20], |s| c.tap.frame(1, Direction::FromPort, &[], s));
        with_bytes(&[9; 20], |s| c.tap.frame(1, Direction::ToPort, &[], s));
        drop(c);
        let f = std::fs::read(&path).unwrap();
        assert_eq!(f.len(), 24 + 16 + 64 + 16 + 20);
        assert_eq!(f[24 + 8..24 + 16], [64, 0, 0, 0, 102, 0, 0, 0]);
        assert_eq!(f[24 + 16..24 + 19], [1, 2, 7]);
        assert_eq!(f[24 + 80 + 8..24 + 80 + 16], [20, 0, 0, 0, 20, 0, 0, 0]);
    }
}
