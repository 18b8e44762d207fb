//! virtio-rng (VIRTIO 1.2, section 5.4): random bytes from a file of the host, on a thread of its
//! own.
#![allow(unsafe_code)] // readv into guest memory

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use minicbor::{Decode, Encode};
use parking_lot::Mutex;
use state::{SavedState, Section};
use virtio::features::{
    VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, mask,
};
use virtio::{
    Chain, ConfigEvents, DeviceTraits, Queue, QueueIndex, RingPos, RingSetup, VirtioDevice,
};

use crate::virtio_worker::{Signal, Worker, pollfd, wait};

const QUEUE_SIZE: u16 = 8;
/// Most bytes given for one request: the driver asks again when it wants more.
const MAX_BYTES: u32 = 64 << 10;

/// How the device is made.
#[derive(Debug, Clone)]
pub struct RngConfig {
    /// Instance name, for threads and messages.
    pub name: String,
    /// Where the bytes come from; usually /dev/urandom.
    pub filename: PathBuf,
    /// Offer packed rings.
    pub packed: bool,
}

type Events = Arc<Mutex<Option<Arc<dyn ConfigEvents>>>>;

/// The device.
pub struct VirtioRng {
    config: RngConfig,
    source: Arc<File>,
    events: Events,
    worker: Option<Worker<Queue>>,
}

impl VirtioRng {
    /// Opens the source.
    ///
    /// # Errors
    /// A sentence that names the file.
    pub fn new(config: RngConfig) -> Result<Self, String> {
        let name = config.filename.display();
        // Non-blocking: a FIFO is refused below instead of being waited for.
        let mut options = File::options();
        let source = options.read(true).custom_flags(libc::O_NONBLOCK).open(&config.filename);
        let source = source.map_err(|e| format!("cannot open '{name}' for random bytes: {e}"))?;
        let kind = source.metadata().map_err(|e| format!("'{name}': {e}"))?.file_type();
        if !kind.is_char_device() && !kind.is_file() {
            return Err(format!(
                "'{name}' gives no random bytes; expected a character device such as /dev/urandom"
            ));
        }
        // From here on a device that has to collect bytes first is waited for.
        // SAFETY: sets the flags of our own fd.
        unsafe { libc::fcntl(source.as_raw_fd(), libc::F_SETFL, 0) };
        Ok(Self { config, source: Arc::new(source), events: Events::default(), worker: None })
    }
}

impl VirtioDevice for VirtioRng {
    fn traits(&self) -> DeviceTraits {
        let packed = if self.config.packed { mask(VIRTIO_F_RING_PACKED) } else { 0 };
        DeviceTraits {
            device_type: virtio::features::device_id::ENTROPY,
            features: mask(VIRTIO_F_VERSION_1)
                | mask(VIRTIO_F_INDIRECT_DESC)
                | mask(VIRTIO_F_EVENT_IDX)
                | packed,
            queue_sizes: vec![QUEUE_SIZE],
            config_len: 0,
        }
    }

    fn read_config(&self, _offset: u32, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {}

    fn activate(&mut self, _features: u64, events: Arc<dyn ConfigEvents>) -> Result<(), String> {
        *self.events.lock() = Some(events);
        Ok(())
    }

    fn start_queue(&mut self, index: QueueIndex, ring: RingSetup) -> Result<(), String> {
        let name = self.config.name.clone();
        if index != 0 || self.worker.is_some() {
            return Err(format!("{name} has no queue {index} to start"));
        }
        let queue = Queue::new(ring).map_err(|e| format!("queue 0 of {name}: {e}"))?;
        let signal = Signal::new()?;
        let (source, events, s) = (self.source.clone(), self.events.clone(), signal.clone());
        let run = move || serve(queue, &source, &events, &s);
        self.worker = Some(Worker::spawn(name, signal, run)?);
        Ok(())
    }

    fn stop_queue(&mut self, index: QueueIndex) -> Option<RingPos> {
        if index != 0 {
            return None;
        }
        Some(self.worker.take()?.stop()?.stop())
    }

    fn reset(&mut self) {
        self.stop_queue(0);
        *self.events.lock() = None;
    }

    fn state_kind(&self) -> (&'static str, u16) {
        (RngState::KIND, RngState::VERSION)
    }

    fn save(&self) -> state::Result<Vec<u8>> {
        Ok(Section::encode(&self.config.name, &RngState {})?.payload)
    }

    fn restore(&mut self, kind: &str, version: u16, payload: &[u8]) -> state::Result<()> {
        let name = self.config.name.clone();
        let section = Section { name, kind: kind.into(), version, payload: payload.to_vec() };
        section.decode::<RngState>().map(drop)
    }

    fn migration_blocker(&self) -> Option<String> {
        None
    }
}

impl Drop for VirtioRng {
    fn drop(&mut self) {
        self.stop_queue(0);
    }
}

/// Serves the queue until told to stop.
fn serve(mut queue: Queue, source: &File, events: &Events, signal: &Signal) -> Queue {
    let mut chain = Chain::new();
    let mut iov = Vec::new();
    loop {
        let mut served = true;
        match queue.pop(&mut chain) {
            Ok(true) => match fill(source, &chain, &mut iov) {
                Ok(n) => queue.push(&chain, n),
                // The source failed or ended; the driver gets an empty answer.
                Err(_) => queue.push(&chain, 0),
            },
            Ok(false) => served = false,
            Err(e) => {
                let events = events.lock().clone();
                if let Some(events) = events {
                    events.needs_reset(&format!("virtio-rng: {e}"));
                }
                queue.flush();
                while wait(&mut [pollfd(signal.fd(), libc::POLLIN)], -1).is_ok() {
                    if signal.take() {
                        break;
                    }
                }
                return queue;
            }
        }
        if served {
            // One request at a time is published, so that a large one holds nobody up; looking at
            // the signal in between keeps a greedy driver from holding up a stop.
            queue.flush();
        } else if queue.ring.enable_kicks() {
            continue;
        }
        let mut fds =
            [pollfd(signal.fd(), libc::POLLIN), pollfd(queue.kick.as_raw_fd(), libc::POLLIN)];
        if wait(&mut fds, if served { 0 } else { -1 }).is_err() {
            return queue;
        }
        if fds[0].revents != 0 && signal.take() {
            return queue;
        }
        if fds[1].revents != 0 {
            queue.ack_kick();
        }
    }
}

/// Reads random bytes into the chain; returns how many.
fn fill(source: &File, chain: &Chain, iov: &mut Vec<libc::iovec>) -> io::Result<u32> {
    iov.clear();
    if chain.writable_iovecs(0, MAX_BYTES, iov) == 0 {
        return Ok(0);
    }
    // SAFETY: the iovecs (at most 1024) lie in guest RAM, which the chain keeps alive.
    let n = unsafe { libc::readv(source.as_raw_fd(), iov.as_ptr(), iov.len() as libc::c_int) };
    u32::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// There is nothing to move: the bytes come from wherever the guest is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct RngState {}

impl SavedState for RngState {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u16 = 1;
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use virtio::testing::{CountingInterrupt, DriverRing, ram};

    use super::*;

    #[test]
    fn gives_bytes_within_its_limit_and_stops_in_between() {
        let config =
            |file: &str| RngConfig { name: "rng0".into(), filename: file.into(), packed: false };
        assert!(VirtioRng::new(config("/no/such")).err().is_some_and(|e| e.contains("/no/such")));
        assert!(VirtioRng::new(config("/")).err().is_some_and(|e| e.contains("no random bytes")));
        let mut rng = VirtioRng::new(config("/dev/urandom")).unwrap();
        let mem = ram(4 << 20);
        let mut ring = DriverRing::new(&mem, 0x1000, QUEUE_SIZE, rng.traits().features);
        let mut pos = None;
        for len in [64, 1 << 20, 1] {
            let setup = ring.setup(pos, Arc::new(CountingInterrupt::default()));
            let kick = setup.kick.try_clone().unwrap();
            rng.start_queue(0, setup).unwrap();
            ring.add(&[], &[(0x100000, len)], None).unwrap();
            kick.write(1).unwrap();
            let start = Instant::now();
            let written = loop {
                if let Some((_, n)) = ring.poll_used() {
                    break n;
                }
                assert!(start.elapsed() < Duration::from_secs(10));
                std::thread::yield_now();
            };
            assert!(written >= 1 && written <= len.min(MAX_BYTES));
            pos = rng.stop_queue(0);
            assert!(pos.is_some());
        }
        let mut bytes = [0; 64];
        mem.read(0x100000, &mut bytes).unwrap();
        assert!(bytes.iter().any(|b| *b != 0));
        let (kind, version) = rng.state_kind();
        let saved = rng.save().unwrap();
        rng.restore(kind, version, &saved).unwrap();
        assert!(rng.restore(kind, version + 1, &saved).is_err());
    }
}
