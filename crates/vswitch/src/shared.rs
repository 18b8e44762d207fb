//! What poll threads and the control thread share.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, Sender};
use virtio::RingPos;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::counters::QueueCounters;
use crate::fdb::Fdb;
use crate::frame_ring::FrameRing;
use crate::queue::Queue;
use crate::table::{PortId, Table};
use crate::vhost_queue::{RxRing, TxRing};

/// When poll threads sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PollMode {
    /// They spin under load and sleep when there was nothing for a while.
    #[default]
    Adaptive,
    /// They never sleep.
    Always,
    /// They sleep whenever there is nothing.
    Interrupt,
}

/// To a poll thread.
pub enum Message {
    /// A new queue.
    Add(Box<Queue>),
    /// Ends the use of a queue, which is handed back: closing what is behind it may take a while.
    /// Nothing is sent where there is none.
    Remove {
        port: PortId,
        index: u16,
        done: Sender<Queue>,
    },
    /// A ring for a queue that was added.
    StartRx {
        port: PortId,
        index: u16,
        ring: Box<RxRing>,
    },
    StartTx {
        port: PortId,
        index: u16,
        ring: Box<TxRing>,
    },
    /// Takes a ring back; the answer is where it stands.
    StopRing {
        port: PortId,
        index: u16,
        tx: bool,
        done: Sender<Option<RingPos>>,
    },
    /// A ring is enabled or disabled.
    Enable {
        port: PortId,
        index: u16,
        tx: bool,
        on: bool,
    },
    /// Forwards a frame as if it came from `port`.
    Inject {
        port: PortId,
        frame: Vec<u8>,
    },
    /// Ends the thread.
    Stop,
}

/// To the control thread: a port whose other side broke the rules.
#[derive(Debug)]
pub struct PortFault {
    pub port: PortId,
    pub reason: String,
}

/// A poll thread's letter box and what others see of it.
pub struct Mailbox {
    sender: Sender<Message>,
    pub(crate) receiver: Receiver<Message>,
    /// Set when there may be something in the letter box.
    pub(crate) flag: AtomicBool,
    /// The thread sleeps, or is about to.
    pub(crate) sleeping: AtomicBool,
    pub(crate) wake: EventFd,
    /// Frames from other poll threads, by thread; empty for itself.
    pub(crate) incoming: Vec<Option<FrameRing>>,
    /// Drops of frames whose port has gone while they were on their way here.
    pub strays: QueueCounters,
    /// Rounds of the loop, and those in which there was work.
    pub rounds: AtomicU64,
    pub busy_rounds: AtomicU64,
    /// Times that it went to sleep.
    pub sleeps: AtomicU64,
}

/// Bytes that wait from one poll thread for another.
const HAND_OFF_BYTES: usize = 1 << 20;

impl Mailbox {
    fn new(thread: usize, threads: usize) -> std::io::Result<Self> {
        let (sender, receiver) = crossbeam_channel::unbounded();
        Ok(Self {
            sender,
            receiver,
            flag: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            wake: EventFd::new(EFD_NONBLOCK)?,
            incoming: (0..threads)
                .map(|t| (t != thread).then(|| FrameRing::new(HAND_OFF_BYTES)))
                .collect(),
            strays: QueueCounters::default(),
            rounds: AtomicU64::new(0),
            busy_rounds: AtomicU64::new(0),
            sleeps: AtomicU64::new(0),
        })
    }

    /// Sends a message and wakes the thread. Messages are handled in order.
    pub fn send(&self, message: Message) {
        // The receiver is ours too, so there always is one.
        let _ = self.sender.send(message);
        self.flag.store(true, Ordering::Release);
        let _ = self.wake.write(1);
    }

    /// Wakes the thread if it sleeps, after something was put into `incoming`.
    #[inline]
    pub(crate) fn nudge(&self) {
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) {
            let _ = self.wake.write(1);
        }
    }
}

/// Everything that is shared.
pub struct Shared {
    pub table: ArcSwap<Table>,
    /// Changes after `table` does, so that a look at it is cheap.
    pub version: AtomicU32,
    pub fdb: Fdb,
    /// Seconds since the switch started, for ages in the FDB.
    pub now: AtomicU32,
    pub mailboxes: Vec<Mailbox>,
    pub poll: PollMode,
    faults: Mutex<Vec<PortFault>>,
    /// Wakes the control thread for `faults`.
    pub fault_event: EventFd,
}

impl Shared {
    /// For `threads` poll threads and about `macs` addresses.
    ///
    /// # Errors
    /// When eventfds cannot be had.
    pub fn new(threads: usize, macs: usize, poll: PollMode) -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            table: ArcSwap::from_pointee(Table { ports: Vec::new(), ageing: 300 }),
            version: AtomicU32::new(1),
            fdb: Fdb::new(macs),
            now: AtomicU32::new(0),
            mailboxes: (0..threads)
                .map(|t| Mailbox::new(t, threads))
                .collect::<std::io::Result<_>>()?,
            poll,
            faults: Mutex::default(),
            fault_event: EventFd::new(EFD_NONBLOCK)?,
        }))
    }

    /// Replaces the table.
    pub fn publish(&self, table: Table) {
        self.table.store(Arc::new(table));
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Reports a port whose other side broke the rules. Its ring is not touched any more, so this
    /// happens once a ring, not once a frame.
    pub fn report(&self, port: PortId, reason: String) {
        if let Ok(mut faults) = self.faults.lock() {
            faults.push(PortFault { port, reason });
        }
        let _ = self.fault_event.write(1);
    }

    /// What was reported.
    pub fn take_faults(&self) -> Vec<PortFault> {
        let _ = self.fault_event.read();
        self.faults.lock().map(|mut f| std::mem::take(&mut *f)).unwrap_or_default()
    }
}
