//! virtio-blk (VIRTIO 1.2, section 5.2) over a [`block::Disk`]: one I/O thread and one engine a
//! queue, requests straight between guest memory and the kernel.
//!
//! - [`config`]: features and configuration space.
//! - [`request`]: what a chain asks for, checked.
//! - [`worker`]: the thread of a queue.

mod config;
mod request;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{BlockStats, Disk, SECTOR};
use minicbor::{Decode, Encode};
use parking_lot::Mutex;
use state::{SavedState, Section};
use virtio::features::{has, mask};
use virtio::{ConfigEvents, DeviceTraits, Queue, QueueIndex, RingPos, RingSetup, VirtioDevice};

use crate::virtio_worker::{Signal, Worker};
use config::*;
use worker::QueueWorker;

/// What a disk looks like to the guest.
#[derive(Debug, Clone)]
pub struct BlkConfig {
    /// Instance name, for threads and messages.
    pub name: String,
    /// Shown by VIRTIO_BLK_T_GET_ID; the first 20 bytes count.
    pub serial: String,
    /// Queues, 1 to 64.
    pub num_queues: u16,
    /// Entries a queue; a power of two, 4 to 1024.
    pub queue_size: u16,
    /// `write-cache`: starts with a volatile write cache, if the disk's cache mode has one.
    pub write_cache: bool,
    /// Offer packed rings.
    pub packed: bool,
}

/// State shared with the queue threads and the handle.
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) disk: Arc<Disk>,
    pub(crate) serial: [u8; 20],
    /// Writes may complete before they are durable.
    pub(crate) writeback: AtomicBool,
    pub(crate) events: Mutex<Option<Arc<dyn ConfigEvents>>>,
    pub(crate) last_log: Mutex<Option<std::time::Instant>>,
}

impl Shared {
    /// Whole sectors; the last may reach past the end of the file and then reads as zero there.
    pub(crate) fn sectors(&self) -> u64 {
        self.disk.len().div_ceil(SECTOR)
    }

    /// Says that the host failed a request; at most once a second.
    pub(crate) fn log_failure(&self, op: &block::Op, e: &std::io::Error) {
        let mut last = self.last_log.lock();
        if last.is_none_or(|t| t.elapsed().as_secs() >= 1) {
            *last = Some(std::time::Instant::now());
            tracing::warn!("{}: {op:?} of '{}' failed: {e}", self.name, self.disk.name());
        }
    }

    pub(crate) fn needs_reset(&self, reason: &str) {
        let events = self.events.lock().clone();
        if let Some(events) = events {
            events.needs_reset(reason);
        }
    }
}

/// What the monitor and the life cycle hold of a disk device.
#[derive(Clone)]
pub struct BlkHandle(Arc<Shared>);

impl BlkHandle {
    /// The disk behind it.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.0.disk
    }

    /// Counters.
    pub fn stats(&self) -> BlockStats {
        self.0.disk.stats()
    }

    /// Whether the guest sees a volatile write cache now.
    pub fn writeback(&self) -> bool {
        self.0.writeback.load(Ordering::Acquire)
    }

    /// Looks the image's length up again and tells the guest if it changed. Returns bytes.
    ///
    /// # Errors
    /// The length cannot be found.
    pub fn refresh_size(&self) -> block::Result<u64> {
        let old = self.0.disk.len();
        let new = self.0.disk.image().refresh_len()?;
        let events = self.0.events.lock().clone();
        if let (true, Some(events)) = (old != new, events) {
            events.config_changed();
        }
        Ok(new)
    }
}

struct RunningQueue {
    worker: Worker<QueueWorker>,
}

/// The device.
pub struct VirtioBlk {
    shared: Arc<Shared>,
    config: BlkConfig,
    features: u64,
    queues: Vec<Option<RunningQueue>>,
}

impl VirtioBlk {
    /// Makes the device.
    ///
    /// # Errors
    /// A sentence that names the option that cannot be.
    pub fn new(config: BlkConfig, disk: Arc<Disk>) -> Result<Self, String> {
        if !(1..=64).contains(&config.num_queues) {
            return Err(format!("num-queues={}: must be 1 to 64", config.num_queues));
        }
        let size = config.queue_size;
        if !size.is_power_of_two() || !(4..=1024).contains(&size) {
            return Err(format!("queue-size={size}: must be a power of two from 4 to 1024"));
        }
        let mut serial = [0; 20];
        for (to, from) in serial.iter_mut().zip(config.serial.bytes()) {
            *to = from;
        }
        let writeback = config.write_cache && disk.cache().writeback;
        let shared = Shared {
            name: config.name.clone(),
            disk,
            serial,
            writeback: AtomicBool::new(writeback),
            events: Mutex::new(None),
            last_log: Mutex::new(None),
        };
        let queues = (0..config.num_queues).map(|_| None).collect();
        Ok(Self { shared: Arc::new(shared), config, features: 0, queues })
    }

    /// A handle for the monitor.
    pub fn handle(&self) -> BlkHandle {
        BlkHandle(self.shared.clone())
    }

    fn offered(&self) -> u64 {
        offered(self.config.num_queues, self.shared.disk.read_only(), self.config.packed)
    }

    fn default_writeback(&self) -> bool {
        self.config.write_cache && self.shared.disk.cache().writeback
    }
}

impl VirtioDevice for VirtioBlk {
    fn traits(&self) -> DeviceTraits {
        DeviceTraits {
            device_type: virtio::features::device_id::BLOCK,
            features: self.offered(),
            queue_sizes: vec![self.config.queue_size; self.config.num_queues.into()],
            config_len: CONFIG_LEN as u32,
        }
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let space = config_space(&self.shared, &self.config);
        for (i, byte) in data.iter_mut().enumerate() {
            let at = (offset as usize).saturating_add(i);
            *byte = space.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        let at = WRITEBACK_OFFSET.checked_sub(offset as usize);
        let Some(value) = at.and_then(|i| data.get(i)) else { return };
        if has(self.features, VIRTIO_BLK_F_CONFIG_WCE) {
            self.shared.writeback.store(*value & 1 != 0, Ordering::Release);
        }
    }

    fn activate(&mut self, features: u64, events: Arc<dyn ConfigEvents>) -> Result<(), String> {
        self.features = features;
        *self.shared.events.lock() = Some(events);
        // A driver that knows neither flushes nor the switch relies on every write being durable
        // (section 5.2.6.2).
        if features & (mask(VIRTIO_BLK_F_FLUSH) | mask(VIRTIO_BLK_F_CONFIG_WCE)) == 0 {
            self.shared.writeback.store(false, Ordering::Release);
        }
        Ok(())
    }

    fn start_queue(&mut self, index: QueueIndex, ring: RingSetup) -> Result<(), String> {
        let name = &self.config.name;
        let slot = self.queues.get_mut(index).ok_or(format!("{name} has no queue {index}"))?;
        if slot.is_some() {
            return Err(format!("queue {index} of {name} runs already"));
        }
        let mem = ring.mem.clone();
        let queue = Queue::new(ring).map_err(|e| format!("queue {index} of {name}: {e}"))?;
        let signal = Signal::new()?;
        let worker = QueueWorker::new(self.shared.clone(), queue, mem, signal.clone())?;
        let thread = format!("{name}-q{index}");
        let worker = Worker::spawn(thread, signal, move || worker.run())?;
        *slot = Some(RunningQueue { worker });
        Ok(())
    }

    fn stop_queue(&mut self, index: QueueIndex) -> Option<RingPos> {
        let running = self.queues.get_mut(index)?.take()?;
        Some(running.worker.stop()?.into_position())
    }

    fn reset(&mut self) {
        for i in 0..self.queues.len() {
            self.stop_queue(i);
        }
        self.features = 0;
        *self.shared.events.lock() = None;
        self.shared.writeback.store(self.default_writeback(), Ordering::Release);
    }

    fn state_kind(&self) -> (&'static str, u16) {
        (BlkState::KIND, BlkState::VERSION)
    }

    fn save(&self) -> state::Result<Vec<u8>> {
        let state = BlkState {
            writeback: self.shared.writeback.load(Ordering::Acquire),
            sectors: self.shared.sectors(),
            features: self.features,
        };
        Ok(Section::encode(&self.config.name, &state)?.payload)
    }

    fn restore(&mut self, kind: &str, version: u16, payload: &[u8]) -> state::Result<()> {
        let name = self.config.name.clone();
        let section = Section { name, kind: kind.into(), version, payload: payload.to_vec() };
        let s: BlkState = section.decode()?;
        let here = self.shared.sectors();
        if s.sectors != here {
            return Err(state::Error::invalid(
                "sectors",
                format!(
                    "the disk of {} has {} sectors at the source, but '{}' has {here}",
                    self.config.name,
                    s.sectors,
                    self.shared.disk.name(),
                ),
            ));
        }
        if s.features & !self.offered() != 0 {
            let missing = s.features & !self.offered();
            let reason = format!("negotiated, but not offered here: {missing:#x}");
            return Err(state::Error::invalid("features", reason));
        }
        self.features = s.features;
        self.shared.writeback.store(s.writeback, Ordering::Release);
        Ok(())
    }

    fn migration_blocker(&self) -> Option<String> {
        None
    }
}

impl Drop for VirtioBlk {
    fn drop(&mut self) {
        for i in 0..self.queues.len() {
            self.stop_queue(i);
        }
    }
}

/// What moves: the rest follows from the disk and the options.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct BlkState {
    #[n(0)]
    writeback: bool,
    /// Length of the disk, to be the same on both sides.
    #[n(1)]
    sectors: u64,
    /// Negotiated features.
    #[n(2)]
    features: u64,
}

impl SavedState for BlkState {
    const KIND: &'static str = "virtio-blk";
    const VERSION: u16 = 1;
}
