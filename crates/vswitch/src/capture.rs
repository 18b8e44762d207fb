//! Capturing a port's frames into a pcap file that tcpdump and Wireshark read.
//!
//! Poll threads copy a frame's first bytes into a [`frame_ring`](crate::frame_ring) a thread, made
//! beforehand; one writer thread empties the rings into the file. What finds its ring full is
//! counted and left out of the file, not of the traffic.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use crate::copy::Source;
use crate::frame_ring::{FrameRing, Record};

/// Bytes that wait for the writer, a poll thread.
const RING_BYTES: usize = 4 << 20;
/// How long the writer sleeps when there is nothing to write.
const NAP: Duration = Duration::from_millis(10);

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
}

impl Tap {
    /// Frames written, frames left out because the disk was too slow.
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
    writer: Option<JoinHandle<()>>,
}

impl Capture {
    /// Begins to write to `path`, up to `snap` bytes (at least 64) of each frame.
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
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(&file_header(snap as u32))?;
        let tap = Arc::new(Tap {
            rings: (0..threads).map(|_| FrameRing::new(RING_BYTES)).collect(),
            snap,
            from_port,
            to_port,
            lost: AtomicU64::new(0),
            written: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let theirs = tap.clone();
        let shown = path.display().to_string();
        let writer = std::thread::Builder::new().name("capture".into()).spawn(move || {
            if let Err(e) = write_all(&theirs, file) {
                tracing::warn!("capture to '{shown}' ends: {e}");
            }
        })?;
        Ok(Self { tap, path: path.to_owned(), writer: Some(writer) })
    }
}

impl std::ops::Drop for Capture {
    fn drop(&mut self) {
        self.tap.stop.store(true, Ordering::Release);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
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

fn write_all(tap: &Tap, mut file: BufWriter<File>) -> io::Result<()> {
    loop {
        let ending = tap.stop.load(Ordering::Acquire);
        let mut idle = true;
        for ring in &tap.rings {
            let write = |records: &[Record<'_>]| {
                let one = |(meta, bytes): &Record<'_>| write_record(&mut file, meta, bytes);
                records.iter().try_for_each(one).map(|()| records.len())
            };
            if let Some(written) = ring.pop(write) {
                tap.written.fetch_add(written? as u64, Ordering::Relaxed);
                idle = false;
            }
        }
        if idle {
            file.flush()?;
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
