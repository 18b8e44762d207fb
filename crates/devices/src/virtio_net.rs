//! virtio-net (VIRTIO 1.2, section 5.1) over [`net::Backend`]s: one I/O thread a queue pair, which
//! moves frames straight between guest memory and the back end.
//!
//! - [`config`]: features and configuration space.
//! - [`shared`]: what threads, device and monitor share; [`NetHandle`].
//! - [`filter`]: which frames the driver wants.
//! - [`control`]: the control queue.
//! - [`pair`]: the thread of a queue pair.
//!
//! A pair's thread is stopped and started again whenever one of its queues comes or goes, so no
//! lock is taken while frames flow.

mod config;
mod control;
mod filter;
mod pair;
mod shared;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use minicbor::{Decode, Encode};
use net::{Backend, Mac, Offloads};
use state::{SavedState, Section};
use virtio::features::has;
use virtio::{
    ConfigEvents, DeviceTraits, LateInput, Queue, QueueIndex, RingPos, RingSetup, VirtioDevice,
};

use crate::virtio_worker::{Signal, Worker};
use config::*;
use filter::{Filter, MAX_MACS};
use pair::{PairWorker, Role};
use shared::Shared;
pub use shared::{NetHandle, NetStats};

/// Most queue pairs.
pub const MAX_PAIRS: u16 = 64;

/// What a NIC looks like to the guest.
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// Instance name, for threads and messages.
    pub name: String,
    pub mac: Mac,
    /// Entries of each receive queue; a power of two, 64 to 1024.
    pub rx_queue_size: u16,
    /// Entries of each transmit queue; likewise.
    pub tx_queue_size: u16,
    /// Offered as VIRTIO_NET_F_MTU when set; at least 68.
    pub host_mtu: Option<u16>,
    /// Offer packed rings.
    pub packed: bool,
}

/// Most late frames that wait for the guest's buffers.
const MAX_LATE: usize = 16384;

/// A pair's thread, or what it owns while it stands.
enum Pair {
    Halted(Box<PairWorker>),
    Running(Worker<Box<PairWorker>>),
    /// Its thread died; there is nothing to serve the pair with.
    Lost,
}

/// The device.
pub struct VirtioNet {
    shared: Arc<Shared>,
    config: NetConfig,
    capabilities: Offloads,
    features: u64,
    pairs: Vec<Pair>,
}

impl VirtioNet {
    /// Makes the device with one back end a queue pair.
    ///
    /// # Errors
    /// A sentence that names the option that cannot be.
    pub fn new(config: NetConfig, backends: Vec<Box<dyn Backend>>) -> Result<Self, String> {
        let count = u16::try_from(backends.len()).unwrap_or(u16::MAX);
        if !(1..=MAX_PAIRS).contains(&count) {
            return Err(format!("{}: needs 1 to {MAX_PAIRS} network queues", config.name));
        }
        let sizes =
            [("rx_queue_size", config.rx_queue_size), ("tx_queue_size", config.tx_queue_size)];
        for (option, size) in sizes {
            if !size.is_power_of_two() || !(64..=1024).contains(&size) {
                return Err(format!("{option}={size}: must be a power of two from 64 to 1024"));
            }
        }
        if config.host_mtu.is_some_and(|m| m < 68) {
            return Err("host_mtu: must be at least 68".into());
        }
        if config.mac[0] & 1 != 0 {
            return Err("mac: must not be a multicast address".into());
        }
        let signals = backends.iter().map(|_| Signal::new()).collect::<Result<Vec<_>, _>>()?;
        let shared = Arc::new(Shared::new(config.name.clone(), config.mac, signals));
        let mut capabilities = Offloads::ALL;
        let mut pairs = Vec::new();
        for (index, mut backend) in backends.into_iter().enumerate() {
            let c = backend.capabilities();
            capabilities = Offloads {
                csum: capabilities.csum && c.csum,
                tso4: capabilities.tso4 && c.tso4,
                tso6: capabilities.tso6 && c.tso6,
                ecn: capabilities.ecn && c.ecn,
                ufo: capabilities.ufo && c.ufo,
            };
            backend
                .set_enabled(index == 0)
                .map_err(|e| format!("{}: cannot set up queue {index}: {e}", backend.name()))?;
            let worker = PairWorker::new(index, shared.clone(), backend);
            pairs.push(Pair::Halted(Box::new(worker)));
        }
        Ok(Self { shared, config, capabilities, features: 0, pairs })
    }

    /// A handle for the monitor.
    pub fn handle(&self) -> NetHandle {
        NetHandle(self.shared.clone())
    }

    fn offered(&self) -> u64 {
        offered(&self.config, self.capabilities, self.pairs.len())
    }

    /// Which pair serves queue `index`, and as what (section 5.1.2).
    fn role(&self, index: QueueIndex) -> Option<(usize, Role)> {
        let multi = has(self.features, VIRTIO_NET_F_MQ);
        let pairs = if multi { self.pairs.len() } else { 1 };
        match index {
            i if i == 2 * pairs => Some((0, Role::Control)),
            i if i > 2 * pairs => None,
            i if i % 2 == 0 => Some((i / 2, Role::Receive)),
            i => Some((i / 2, Role::Transmit)),
        }
    }

    /// Stops the pair's thread and gives what it owns.
    fn halt(&mut self, pair: usize) -> Option<Box<PairWorker>> {
        match std::mem::replace(self.pairs.get_mut(pair)?, Pair::Lost) {
            Pair::Halted(w) => Some(w),
            Pair::Running(w) => w.stop(),
            Pair::Lost => None,
        }
    }

    /// Puts the pair back, running if it has a queue to serve.
    fn resume(&mut self, pair: usize, worker: Box<PairWorker>) -> Result<(), String> {
        if !worker.has_queues() {
            self.pairs[pair] = Pair::Halted(worker);
            return Ok(());
        }
        let name = format!("{}-io{pair}", self.config.name);
        let signal = self.shared.signals[pair].clone();
        let run = move || {
            let mut worker = worker;
            worker.run();
            worker
        };
        self.pairs[pair] = Pair::Running(Worker::spawn(name, signal, run)?);
        Ok(())
    }

    /// Tells every back end what the guest can take. No queue runs.
    fn apply_features(&mut self) {
        let offloads = guest_offloads(self.features);
        let mergeable = has(self.features, VIRTIO_NET_F_MRG_RXBUF);
        let least = usize::from(self.config.host_mtu.unwrap_or(0));
        for pair in &mut self.pairs {
            if let Pair::Halted(w) = pair {
                w.negotiated(offloads, mergeable, least);
            }
        }
    }
}

impl VirtioDevice for VirtioNet {
    fn traits(&self) -> DeviceTraits {
        let mut queue_sizes = Vec::new();
        for _ in &self.pairs {
            queue_sizes.extend([self.config.rx_queue_size, self.config.tx_queue_size]);
        }
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        DeviceTraits {
            device_type: virtio::features::device_id::NET,
            features: self.offered(),
            queue_sizes,
            config_len: CONFIG_LEN as u32,
        }
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let space = config_space(&self.shared, &self.config, self.pairs.len());
        for (i, byte) in data.iter_mut().enumerate() {
            let at = (offset as usize).saturating_add(i);
            *byte = space.get(at).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {
        // All read-only for a modern driver; the MAC is set by the control queue.
    }

    fn activate(&mut self, features: u64, events: Arc<dyn ConfigEvents>) -> Result<(), String> {
        self.features = features;
        self.shared.features.store(features, Ordering::Release);
        self.shared.moved.store(false, Ordering::Release);
        *self.shared.events.lock() = Some(events);
        self.apply_features();
        Ok(())
    }

    fn start_queue(&mut self, index: QueueIndex, ring: RingSetup) -> Result<(), String> {
        let name = self.config.name.clone();
        let (pair, role) = self.role(index).ok_or(format!("{name} has no queue {index}"))?;
        let queue = Queue::new(ring).map_err(|e| format!("queue {index} of {name}: {e}"))?;
        let mut worker = self.halt(pair).ok_or(format!("queue {index} of {name} is lost"))?;
        let result = worker.start(role, queue);
        self.resume(pair, worker)?;
        result.map_err(|()| format!("queue {index} of {name} runs already"))
    }

    fn stop_queue(&mut self, index: QueueIndex) -> Option<RingPos> {
        let (pair, role) = self.role(index)?;
        let mut worker = self.halt(pair)?;
        let pos = worker.stop(role);
        if let Err(e) = self.resume(pair, worker) {
            tracing::error!("{e}");
        }
        pos
    }

    fn start_queues(&mut self, queues: Vec<(QueueIndex, RingSetup)>) -> Vec<Result<(), String>> {
        let name = self.config.name.clone();
        let pairs: BTreeSet<_> =
            queues.iter().filter_map(|(index, _)| Some(self.role(*index)?.0)).collect();
        let mut halted: BTreeMap<_, _> =
            pairs.into_iter().filter_map(|pair| Some((pair, self.halt(pair)?))).collect();
        let mut results = Vec::with_capacity(queues.len());
        let mut started = Vec::new();
        for (index, ring) in queues {
            let start = || {
                let (pair, role) =
                    self.role(index).ok_or(format!("{name} has no queue {index}"))?;
                let queue =
                    Queue::new(ring).map_err(|e| format!("queue {index} of {name}: {e}"))?;
                let worker =
                    halted.get_mut(&pair).ok_or(format!("queue {index} of {name} is lost"))?;
                worker
                    .start(role, queue)
                    .map_err(|()| format!("queue {index} of {name} runs already"))?;
                Ok(pair)
            };
            let result: Result<usize, String> = start();
            started.push(result.as_ref().ok().copied());
            results.push(result.map(drop));
        }
        for (pair, worker) in halted {
            if let Err(e) = self.resume(pair, worker) {
                let of_pair = started.iter().zip(&mut results).filter(|(p, _)| **p == Some(pair));
                of_pair.for_each(|(_, result)| *result = Err(e.clone()));
            }
        }
        results
    }

    fn stop_queues(&mut self, queues: &[QueueIndex]) -> Vec<Option<RingPos>> {
        let mut halted = BTreeMap::new();
        let mut positions = Vec::with_capacity(queues.len());
        for index in queues {
            let Some((pair, role)) = self.role(*index) else {
                positions.push(None);
                continue;
            };
            if !halted.contains_key(&pair)
                && let Some(worker) = self.halt(pair)
            {
                halted.insert(pair, worker);
            }
            positions.push(halted.get_mut(&pair).and_then(|w| w.stop(role)));
        }
        for (pair, worker) in halted {
            if let Err(e) = self.resume(pair, worker) {
                tracing::error!("{e}");
            }
        }
        positions
    }

    fn reset(&mut self) {
        for pair in 0..self.pairs.len() {
            if let Some(mut worker) = self.halt(pair) {
                for role in [Role::Receive, Role::Transmit, Role::Control] {
                    worker.stop(role);
                }
                self.pairs[pair] = Pair::Halted(worker);
            }
        }
        self.features = 0;
        *self.shared.events.lock() = None;
        self.shared.reset(self.config.mac);
        self.apply_features();
    }

    fn state_kind(&self) -> (&'static str, u16) {
        (NetState::KIND, NetState::VERSION)
    }

    fn save(&self) -> state::Result<Vec<u8>> {
        let filter = self.shared.filter.load();
        let state = NetState {
            mac: filter.mac,
            features: self.features,
            pairs: self.shared.active_pairs.load(Ordering::Acquire),
            announce: self.shared.announcing.load(Ordering::Acquire),
            rx_flags: filter.flags(),
            unicast: filter.unicast.concat(),
            multicast: filter.multicast.concat(),
        };
        Ok(Section::encode(&self.config.name, &state)?.payload)
    }

    fn restore(&mut self, kind: &str, version: u16, payload: &[u8]) -> state::Result<()> {
        let name = self.config.name.clone();
        let section = Section { name, kind: kind.into(), version, payload: payload.to_vec() };
        let s: NetState = section.decode()?;
        let invalid = |field, reason: String| Err(state::Error::invalid(field, reason));
        if s.features & !self.offered() != 0 {
            let missing = s.features & !self.offered();
            return invalid("features", format!("negotiated, but not offered here: {missing:#x}"));
        }
        if s.pairs == 0 || usize::from(s.pairs) > self.pairs.len() {
            let here = self.pairs.len();
            return invalid("pairs", format!("{} in use, {here} queue pairs here", s.pairs));
        }
        let (Some(unicast), Some(multicast)) = (macs(&s.unicast), macs(&s.multicast)) else {
            return invalid("MAC tables", format!("not whole addresses, or above {MAX_MACS}"));
        };
        let mut filter = Filter::new(s.mac);
        filter.unicast = unicast;
        filter.multicast = multicast;
        filter.set_flags(s.rx_flags);
        self.features = s.features;
        self.shared.features.store(s.features, Ordering::Release);
        self.shared.filter.store(Arc::new(filter));
        self.shared.announcing.store(s.announce, Ordering::Release);
        self.shared.active_pairs.store(s.pairs, Ordering::Release);
        self.apply_features();
        Ok(())
    }

    fn migration_blocker(&self) -> Option<String> {
        None
    }

    fn arrived(&mut self) {
        self.handle().announce();
    }

    fn late_input(&mut self) -> Option<LateInput> {
        let mut late =
            LateInput { frames: Vec::new(), settled: self.shared.moved.load(Ordering::Acquire) };
        for pair in &mut self.pairs {
            if let Pair::Halted(worker) = pair {
                worker.late_frames(&mut late);
            }
        }
        self.shared.moved.store(late.settled, Ordering::Release);
        Some(late)
    }

    fn deliver_late(&mut self, input: Vec<Vec<u8>>) {
        let mut inbox = self.shared.inbox.lock();
        let room = MAX_LATE.saturating_sub(inbox.len());
        inbox.extend(input.into_iter().filter(|f| f.len() > net::HEADER).take(room));
        drop(inbox);
        self.shared.signals[0].wake();
    }
}

impl Drop for VirtioNet {
    fn drop(&mut self) {
        for pair in 0..self.pairs.len() {
            drop(self.halt(pair));
        }
    }
}

/// Splits a table of addresses; `None` if it is ragged or too long.
fn macs(bytes: &[u8]) -> Option<Vec<Mac>> {
    let (macs, rest) = bytes.as_chunks::<6>();
    (rest.is_empty() && macs.len() <= MAX_MACS).then(|| macs.to_vec())
}

/// What moves.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct NetState {
    /// As the driver may have changed it.
    #[cbor(n(0), with = "minicbor::bytes")]
    mac: Mac,
    /// Negotiated features.
    #[n(1)]
    features: u64,
    /// Queue pairs in use.
    #[n(2)]
    pairs: u16,
    /// VIRTIO_NET_S_ANNOUNCE is set.
    #[n(3)]
    announce: bool,
    /// Receive modes, bit n for command n of VIRTIO_NET_CTRL_RX; bits 8 and 9: a table overflowed.
    #[n(4)]
    rx_flags: u16,
    /// Tables of addresses, 6 bytes each.
    #[cbor(n(5), with = "minicbor::bytes")]
    unicast: Vec<u8>,
    #[cbor(n(6), with = "minicbor::bytes")]
    multicast: Vec<u8>,
}

impl SavedState for NetState {
    const KIND: &'static str = "virtio-net";
    const VERSION: u16 = 1;
}
