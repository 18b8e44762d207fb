//! A vhost-user port as the control thread sees it: the device behind its connection, which hands
//! rings to poll threads and takes them back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::bounded;
use vhost_user::{Backend, protocol};
use virtio::features::{
    VIRTIO_F_EVENT_IDX, VIRTIO_F_IN_ORDER, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_RING_PACKED,
    VIRTIO_F_VERSION_1, has, mask,
};
use virtio::{InflightQueue, RingPos, RingSetup};

use crate::shared::{Message, Shared};
use crate::table::PortId;
use crate::vhost_queue::{RxRing, TxRing, feature};

/// What a port offers, beside what the connection adds.
pub const FEATURES: u64 = mask(VIRTIO_F_VERSION_1)
    | mask(VIRTIO_F_EVENT_IDX)
    | mask(VIRTIO_F_INDIRECT_DESC)
    | mask(VIRTIO_F_RING_PACKED)
    | mask(VIRTIO_F_IN_ORDER)
    | mask(feature::ANY_LAYOUT)
    | mask(feature::CSUM)
    | mask(feature::HOST_TSO4)
    | mask(feature::HOST_TSO6)
    | mask(feature::HOST_ECN)
    | mask(feature::GUEST_CSUM)
    | mask(feature::GUEST_TSO4)
    | mask(feature::GUEST_TSO6)
    | mask(feature::GUEST_ECN)
    | mask(feature::MRG_RXBUF)
    | mask(feature::MTU)
    | mask(feature::CTRL_VQ)
    | mask(feature::CTRL_RX)
    | mask(feature::GUEST_ANNOUNCE)
    | mask(feature::MQ);

/// One ring, as control knows it.
#[derive(Debug, Clone, Copy, Default)]
struct RingState {
    started: bool,
    enabled: bool,
}

/// The device of one port. It outlives connections.
pub struct VhostDevice {
    shared: Arc<Shared>,
    port: PortId,
    /// The poll thread of each queue.
    threads: Vec<u16>,
    rings: Vec<RingState>,
    /// What the driver negotiated with the last connection.
    pub negotiated: u64,
    /// Who may send to this port has changed since this was last cleared.
    pub changed: bool,
    /// What the front end said of the MTU.
    pub peer_mtu: Option<u16>,
}

impl VhostDevice {
    /// For port `port`, whose queue `i` belongs to poll thread `threads[i]`.
    pub fn new(shared: Arc<Shared>, port: PortId, threads: Vec<u16>) -> Self {
        let rings = vec![RingState::default(); 2 * threads.len()];
        Self { shared, port, threads, rings, negotiated: 0, changed: false, peer_mtu: None }
    }

    /// What [`new`](Self::new) was given.
    pub fn parts(&self) -> (Arc<Shared>, PortId, Vec<u16>) {
        (self.shared.clone(), self.port, self.threads.clone())
    }

    /// Queues that can be sent to, with their threads.
    pub fn tx_owners(&self) -> Vec<(u16, u16)> {
        let up = |i: &usize| self.rings[2 * i].started && self.rings[2 * i].enabled;
        (0..self.threads.len()).filter(up).map(|i| (self.threads[i], i as u16)).collect()
    }

    /// Queues whose rings run and are enabled, by direction (the switch's): in, out.
    pub fn running(&self) -> (usize, usize) {
        let count = |first: usize| {
            self.rings.iter().skip(first).step_by(2).filter(|r| r.started && r.enabled).count()
        };
        (count(1), count(0))
    }

    /// Whether its rings are packed.
    pub fn packed(&self) -> bool {
        has(self.negotiated, VIRTIO_F_RING_PACKED)
    }

    fn send(&self, queue: usize, message: Message) {
        self.shared.mailboxes[usize::from(self.threads[queue])].send(message);
    }
}

/// Where a split ring goes on: at what the driver's memory says was used. Front ends that lost their
/// back end do not always know better; as buffers are used in order, everything after it is to be done.
fn resume_at(setup: &RingSetup) -> Option<RingPos> {
    if has(setup.features, VIRTIO_F_RING_PACKED) {
        return setup.pos;
    }
    let used = setup.mem.load_u16(setup.used.checked_add(2)?, Ordering::Acquire).ok()?;
    Some(RingPos { avail: used, used })
}

impl Backend for VhostDevice {
    fn features(&self) -> u64 {
        FEATURES
    }

    fn protocol_features(&self) -> u64 {
        // Without BACKEND_REQ: nothing is asked of the front end, and through the socket that it
        // lends it could keep its own end of the connection open here after it has gone.
        protocol::COMMON & !protocol::BACKEND_REQ | protocol::RARP | protocol::MTU
    }

    fn max_queues(&self) -> usize {
        self.rings.len()
    }

    fn queue_num(&self) -> u64 {
        self.threads.len() as u64
    }

    fn activate(&mut self, features: u64) -> Result<(), String> {
        self.negotiated = features;
        Ok(())
    }

    fn start_queue(
        &mut self,
        index: usize,
        mut setup: RingSetup,
        inflight: Option<InflightQueue>,
    ) -> Result<(), String> {
        let queue = index / 2;
        if queue >= self.threads.len() {
            return Err(format!("ring {index}: this port has {} queues", self.threads.len()));
        }
        if inflight.is_none() {
            setup.pos = resume_at(&setup);
        }
        let failed = |e| format!("ring {index}: {e}");
        let (port, index16) = (self.port, queue as u16);
        let message = if index.is_multiple_of(2) {
            let ring = Box::new(TxRing::new(&setup, inflight).map_err(failed)?);
            Message::StartTx { port, index: index16, ring }
        } else {
            let ring = Box::new(RxRing::new(setup, inflight).map_err(failed)?);
            Message::StartRx { port, index: index16, ring }
        };
        self.send(queue, message);
        self.rings[index] = RingState { started: true, enabled: false };
        Ok(())
    }

    fn stop_queue(&mut self, index: usize) -> Option<RingPos> {
        let state = self.rings.get_mut(index)?;
        if !std::mem::take(state).started {
            return None;
        }
        self.changed = true;
        let (done, answer) = bounded(1);
        let tx = index.is_multiple_of(2);
        let queue = index / 2;
        self.send(queue, Message::StopRing { port: self.port, index: queue as u16, tx, done });
        // The poll thread answers within a round; if it is gone, nothing touches the ring.
        answer.recv().ok().flatten()
    }

    fn set_enabled(&mut self, index: usize, on: bool) {
        let Some(state) = self.rings.get_mut(index) else { return };
        state.enabled = on;
        self.changed = true;
        let (queue, tx) = (index / 2, index.is_multiple_of(2));
        self.send(queue, Message::Enable { port: self.port, index: queue as u16, tx, on });
    }

    fn send_rarp(&mut self, mac: [u8; 6]) {
        let frame = net::announce::rarp(mac).to_vec();
        self.send(0, Message::Inject { port: self.port, frame });
    }

    fn set_mtu(&mut self, mtu: u16) -> Result<(), String> {
        self.peer_mtu = Some(mtu);
        Ok(())
    }
}
