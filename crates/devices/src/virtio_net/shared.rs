//! What the threads, the device and the monitor share.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use net::{HEADER, Mac, announce};
use parking_lot::Mutex;
use virtio::ConfigEvents;
use virtio::features::has;

use super::config::VIRTIO_NET_F_GUEST_ANNOUNCE;
use super::filter::Filter;
use crate::virtio_worker::Signal;

/// Waits between the announcements after a move, in milliseconds.
const ANNOUNCE_STEPS: [u64; 4] = [50, 150, 250, 350];
/// Most frames of our own that wait to be sent.
const MAX_OUTBOX: usize = 256;

/// Counters of a NIC, from the guest's side.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetStats {
    pub rx_packets: u64,
    pub rx_bytes: u64,
    /// Frames not wanted by the driver, or that came while the link was down.
    pub rx_dropped: u64,
    pub tx_packets: u64,
    pub tx_bytes: u64,
    /// Frames that the back end refused, malformed ones, and those sent with the link down.
    pub tx_dropped: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub rx_packets: AtomicU64,
    pub rx_bytes: AtomicU64,
    pub rx_dropped: AtomicU64,
    pub tx_packets: AtomicU64,
    pub tx_bytes: AtomicU64,
    pub tx_dropped: AtomicU64,
}

pub(super) struct Shared {
    pub name: String,
    pub filter: ArcSwap<Filter>,
    pub link: AtomicBool,
    /// VIRTIO_NET_S_ANNOUNCE: the driver has been asked to announce itself.
    pub announcing: AtomicBool,
    pub features: AtomicU64,
    /// Queue pairs that the driver uses.
    pub active_pairs: AtomicU16,
    /// One a pair: wakes its thread to look at the settings here.
    pub signals: Vec<Signal>,
    /// Frames of our own, header first, that pair 0 sends.
    pub outbox: Mutex<Vec<Vec<u8>>>,
    /// Frames that came to the source of a migration after the guest had stopped there, header
    /// first: pair 0 delivers them before its back end's.
    pub inbox: Mutex<VecDeque<Vec<u8>>>,
    /// The guest has left, and its announcement from the new place was seen here.
    pub moved: AtomicBool,
    pub counters: Counters,
    pub events: Mutex<Option<Arc<dyn ConfigEvents>>>,
}

impl Shared {
    pub fn new(name: String, mac: Mac, signals: Vec<Signal>) -> Self {
        Self {
            name,
            filter: ArcSwap::from_pointee(Filter::new(mac)),
            link: AtomicBool::new(true),
            announcing: AtomicBool::new(false),
            features: AtomicU64::new(0),
            active_pairs: AtomicU16::new(1),
            signals,
            outbox: Mutex::default(),
            inbox: Mutex::default(),
            moved: AtomicBool::new(false),
            counters: Counters::default(),
            events: Mutex::new(None),
        }
    }

    /// As after power-on; the link stays as the user set it.
    pub fn reset(&self, mac: Mac) {
        self.filter.store(Arc::new(Filter::new(mac)));
        self.announcing.store(false, Ordering::Release);
        self.features.store(0, Ordering::Release);
        self.active_pairs.store(1, Ordering::Release);
        self.inbox.lock().clear();
        self.wake_all();
    }

    pub fn wake_all(&self) {
        self.signals.iter().for_each(Signal::wake);
    }

    pub fn config_changed(&self) {
        let events = self.events.lock().clone();
        if let Some(events) = events {
            events.config_changed();
        }
    }

    pub fn needs_reset(&self, reason: &str) {
        let events = self.events.lock().clone();
        if let Some(events) = events {
            events.needs_reset(&format!("{}: {reason}", self.name));
        }
    }

    /// Has pair 0 send a RARP for every address of the guest.
    fn send_rarp(&self) {
        let filter = self.filter.load();
        let mut outbox = self.outbox.lock();
        for mac in std::iter::once(filter.mac).chain(filter.unicast.iter().copied()) {
            if outbox.len() < MAX_OUTBOX {
                let mut frame = vec![0; HEADER];
                frame.extend_from_slice(&announce::rarp(mac));
                outbox.push(frame);
            }
        }
        drop(outbox);
        self.signals[0].wake();
    }

    /// Asks the driver to announce its addresses itself, if it can.
    fn ask_driver(&self) {
        if has(self.features.load(Ordering::Acquire), VIRTIO_NET_F_GUEST_ANNOUNCE) {
            self.announcing.store(true, Ordering::Release);
            self.config_changed();
        }
    }
}

/// What the monitor and the life cycle hold of a NIC.
#[derive(Clone)]
pub struct NetHandle(pub(super) Arc<Shared>);

impl NetHandle {
    /// The device's instance name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The MAC address, as the driver may have changed it.
    pub fn mac(&self) -> Mac {
        self.0.filter.load().mac
    }

    /// Pulls or plugs the cable; the driver is told.
    pub fn set_link(&self, up: bool) {
        if self.0.link.swap(up, Ordering::AcqRel) != up {
            self.0.wake_all();
            self.0.config_changed();
        }
    }

    /// Whether the cable is in.
    pub fn link(&self) -> bool {
        self.0.link.load(Ordering::Acquire)
    }

    /// Queue pairs that the driver uses now.
    pub fn active_pairs(&self) -> u16 {
        self.0.active_pairs.load(Ordering::Acquire)
    }

    /// Counters now.
    pub fn stats(&self) -> NetStats {
        let c = &self.0.counters;
        NetStats {
            rx_packets: c.rx_packets.load(Ordering::Relaxed),
            rx_bytes: c.rx_bytes.load(Ordering::Relaxed),
            rx_dropped: c.rx_dropped.load(Ordering::Relaxed),
            tx_packets: c.tx_packets.load(Ordering::Relaxed),
            tx_bytes: c.tx_bytes.load(Ordering::Relaxed),
            tx_dropped: c.tx_dropped.load(Ordering::Relaxed),
        }
    }

    /// Tells the network where the guest is: RARPs now and four times more within a second, and
    /// the driver, if it can, announces its IP addresses. Returns at once.
    pub fn announce(&self) {
        self.0.send_rarp();
        self.0.ask_driver();
        let shared = Arc::downgrade(&self.0);
        let again = move || {
            for ms in ANNOUNCE_STEPS {
                std::thread::sleep(Duration::from_millis(ms));
                let Some(shared) = shared.upgrade() else { return };
                shared.send_rarp();
            }
        };
        if let Err(e) = std::thread::Builder::new().name("announce".into()).spawn(again) {
            tracing::warn!("{}: announced once only: {e}", self.0.name);
        }
    }
}
