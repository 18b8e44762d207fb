//! A poll thread: it owns queues, takes bursts from them and sends them on.
//!
//! ```text
//!   round: messages -> for every queue: fetch (of the next one already), receive, classify, send,
//!          give back -> frames of other threads
//!   nothing for a while: ask for kicks, look once more, sleep until a kick, a frame or a message
//! ```
//! Invariants: only this thread touches its queues. Nothing between `receive` and `done` locks or
//! allocates (buffers that grow do so once), and no system call is made but to interrupt a sleeping
//! receiver, once a burst, and what a file descriptor's port needs.
#![allow(unsafe_code)] // injected frames are put into a burst

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use virtio::RingPos;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::burst::{Burst, MIN_FRAME};
use crate::counters::{Drop, QueueCounters};
use crate::forward::{Forwarder, Ingress};
use crate::header::VnetHeader;
use crate::queue::{Io, Queue};
use crate::shared::{Mailbox, Message, PollMode, Shared};
use crate::table::{PortId, Table};

/// How long a thread in adaptive mode spins without work before it sleeps.
const SPIN: Duration = Duration::from_micros(60);
/// Most pauses after a round without work; there is one more after each such round. Every look at a
/// ring takes its index away from the driver, which is about to write it, and a thread that spins
/// slows a sibling that shares its core: a driver that is slower than the switch gets on faster if it
/// is looked at less often. 16 pauses are below a microsecond.
const PAUSES: u32 = 15;
/// Rounds without work between two looks at the clock.
const ROUNDS_A_LOOK: u32 = 16;
/// Wake-ups taken at once.
const EVENTS: usize = 64;
/// What `epoll` says of the letter box; others are places of queues.
const WAKE: u64 = u64::MAX;

/// A queue that frames are taken from.
struct Polled {
    place: usize,
    port: PortId,
    index: u16,
    enabled: bool,
    counters: Arc<QueueCounters>,
}

/// A poll thread's state.
pub struct Worker {
    shared: Arc<Shared>,
    thread: usize,
    table: Arc<Table>,
    version: u32,
    forward: Forwarder,
    polled: Vec<Polled>,
    burst: Burst,
    epoll: Epoll,
    /// A ring was given up: what is polled has to be worked out anew, between two rounds.
    changed: bool,
    stopping: bool,
}

impl Worker {
    /// Poll thread `thread` of `shared`; [`run`](Self::run) is its life.
    ///
    /// # Errors
    /// When the host gives no epoll.
    pub fn new(shared: Arc<Shared>, thread: usize) -> std::io::Result<Self> {
        let epoll = Epoll::new()?;
        let wake = shared.mailboxes[thread].wake.as_raw_fd();
        epoll.ctl(ControlOperation::Add, wake, EpollEvent::new(EventSet::IN, WAKE))?;
        Ok(Self {
            table: shared.table.load_full(),
            version: 0,
            forward: Forwarder::new(thread),
            polled: Vec::new(),
            burst: Burst::new(),
            epoll,
            changed: false,
            stopping: false,
            thread,
            shared,
        })
    }

    /// Runs until [`Message::Stop`].
    pub fn run(mut self) {
        let shared = self.shared.clone();
        let mailbox = &shared.mailboxes[self.thread];
        let (mut idle_rounds, mut idle_since) = (0u32, None);
        let (mut rounds, mut busy) = (0, 0);
        while !self.stopping {
            let work = self.round(mailbox);
            rounds += 1;
            if work > 0 {
                busy += 1;
                (idle_rounds, idle_since) = (0, None);
                if rounds & 0xff == 0 {
                    mailbox.rounds.store(rounds, Ordering::Relaxed);
                    mailbox.busy_rounds.store(busy, Ordering::Relaxed);
                }
                continue;
            }
            for _ in 0..=idle_rounds.min(PAUSES) {
                std::hint::spin_loop();
            }
            idle_rounds += 1;
            let sleepy = match shared.poll {
                PollMode::Always => false,
                PollMode::Interrupt => true,
                PollMode::Adaptive => {
                    idle_rounds.is_multiple_of(ROUNDS_A_LOOK)
                        && idle_since.get_or_insert_with(Instant::now).elapsed() >= SPIN
                }
            };
            if sleepy {
                mailbox.rounds.store(rounds, Ordering::Relaxed);
                mailbox.busy_rounds.store(busy, Ordering::Relaxed);
                self.sleep(mailbox);
                (idle_rounds, idle_since) = (0, None);
            }
        }
    }

    /// Looks everywhere once. Returns how much there was to do.
    fn round(&mut self, mailbox: &Mailbox) -> usize {
        let mut work = 0;
        if mailbox.flag.load(Ordering::Relaxed) {
            work += self.messages(mailbox);
        }
        if std::mem::take(&mut self.changed) {
            self.rebuild();
        }
        let version = self.shared.version.load(Ordering::Acquire);
        if version != self.version {
            self.version = version;
            self.table = self.shared.table.load_full();
        }
        // Each queue's frames are on their way while those of the one before are worked on.
        self.fetch(0);
        for i in 0..self.polled.len() {
            self.fetch(i + 1);
            work += self.poll(i);
        }
        for other in 0..mailbox.incoming.len() {
            work += self.forward.receive_from(other, &mut self.burst, &self.table, &self.shared);
        }
        work
    }

    fn fetch(&mut self, i: usize) {
        if let Some(p) = self.polled.get(i)
            && let Some(q) = &mut self.forward.queues[p.place]
        {
            q.fetch();
        }
    }

    fn poll(&mut self, i: usize) -> usize {
        let p = &self.polled[i];
        let Some(q) = &mut self.forward.queues[p.place] else { return 0 };
        let result = q.receive(&mut self.burst);
        let n = self.burst.frames().len();
        if n > 0 {
            if p.enabled {
                let from = Ingress { port: p.port, queue: p.index, counters: &p.counters };
                self.forward.forward(&mut self.burst, from, &self.table, &self.shared);
            } else {
                p.counters.rx_frames.add(n as u64);
                p.counters.dropped(Drop::PortDown, n as u64);
            }
            self.burst.clear();
        }
        let Some(q) = &mut self.forward.queues[p.place] else { return n };
        q.done();
        if let Err(e) = result {
            // The ring is left alone from here on: its port is reset by the control thread.
            q.rx_broken = true;
            self.changed = true;
            self.shared.report(p.port, format!("transmit ring of queue {}: {e}", p.index));
        }
        n
    }

    /// Puts what is known of queues into the shape that a round needs.
    fn rebuild(&mut self) {
        self.polled.clear();
        for (place, q) in self.forward.queues.iter().enumerate() {
            if let Some(q) = q.as_ref().filter(|q| q.receives()) {
                self.polled.push(Polled {
                    place,
                    port: q.port,
                    index: q.index,
                    enabled: q.rx_enabled,
                    counters: q.counters.clone(),
                });
            }
        }
        self.forward.rebuild();
    }

    fn find(&mut self, port: PortId, index: u16) -> Option<(usize, &mut Queue)> {
        let mut all = self.forward.queues.iter_mut().enumerate();
        all.find_map(|(i, q)| {
            q.as_mut().filter(|q| q.port == port && q.index == index).map(|q| (i, q))
        })
    }

    fn messages(&mut self, mailbox: &Mailbox) -> usize {
        mailbox.flag.store(false, Ordering::Relaxed);
        // What was sent before the flag was cleared is seen now.
        fence(Ordering::SeqCst);
        let mut n = 0;
        while let Ok(message) = mailbox.receiver.try_recv() {
            self.handle(message);
            n += 1;
        }
        self.rebuild();
        n
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Add(queue) => self.add(*queue),
            Message::Remove { port, index, done } => {
                if let Some((place, _)) = self.find(port, index) {
                    self.unwatch(place);
                    if let Some(queue) = self.forward.queues[place].take() {
                        // Nobody waits any more: it ends here.
                        let _ = done.send(queue);
                    }
                }
            }
            Message::StartRx { port, index, ring } => {
                if let Some((place, q)) = self.find(port, index)
                    && let Io::Vhost { rx, .. } = &mut q.io
                {
                    *rx = Some(ring);
                    (q.rx_enabled, q.rx_broken) = (false, false);
                    self.watch(place);
                }
            }
            Message::StartTx { port, index, ring } => {
                if let Some((_, q)) = self.find(port, index)
                    && let Io::Vhost { tx, .. } = &mut q.io
                {
                    *tx = Some(ring);
                    q.tx_enabled = false;
                }
            }
            Message::StopRing { port, index, tx, done } => self.stop_ring(port, index, tx, &done),
            Message::Enable { port, index, tx, on } => {
                if let Some((_, q)) = self.find(port, index) {
                    *(if tx { &mut q.tx_enabled } else { &mut q.rx_enabled }) = on;
                }
            }
            Message::Inject { port, frame } => self.inject(port, &frame),
            Message::Stop => self.stopping = true,
        }
    }

    fn add(&mut self, queue: Queue) {
        let queues = &mut self.forward.queues;
        let place = queues.iter().position(Option::is_none).unwrap_or_else(|| {
            queues.push(None);
            queues.len() - 1
        });
        queues[place] = Some(queue);
        self.watch(place);
    }

    fn stop_ring(&mut self, port: PortId, index: u16, tx: bool, done: &Sender<Option<RingPos>>) {
        let mut position = None;
        if let Some((place, _)) = self.find(port, index) {
            if !tx {
                self.unwatch(place);
            }
            if let Some(q) = &mut self.forward.queues[place]
                && let Io::Vhost { rx, tx: transmit } = &mut q.io
            {
                position = if tx {
                    transmit.take().map(|ring| ring.stop())
                } else {
                    rx.take().map(|ring| ring.stop())
                };
            }
        }
        // The other end may have given up waiting; the ring is stopped all the same.
        let _ = done.send(position);
    }

    fn watch(&mut self, place: usize) {
        let Some(queue) = &self.forward.queues[place] else { return };
        let Some(fd) = queue.wait_fd() else { return };
        let event = EpollEvent::new(queue.wait_set(), place as u64);
        if let Err(e) = self.epoll.ctl(ControlOperation::Add, fd, event) {
            tracing::warn!("poll thread {}: cannot wait for fd {fd}: {e}", self.thread);
        }
    }

    fn unwatch(&mut self, place: usize) {
        if let Some(fd) = self.forward.queues[place].as_ref().and_then(Queue::wait_fd) {
            // One that was never added is no harm.
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }

    fn inject(&mut self, port: PortId, frame: &[u8]) {
        if frame.len() < MIN_FRAME as usize {
            return;
        }
        self.table = self.shared.table.load_full();
        self.forward.rebuild();
        // SAFETY: `frame` outlives the use of the burst, which is cleared below.
        unsafe { self.burst.push_bytes(VnetHeader::default(), frame) };
        let counters = &self.shared.mailboxes[self.thread].strays;
        let from = Ingress { port, queue: 0, counters };
        self.forward.forward(&mut self.burst, from, &self.table, &self.shared);
        self.burst.clear();
    }

    /// Sleeps until there is something to do, unless there is already.
    fn sleep(&mut self, mailbox: &Mailbox) {
        mailbox.sleeping.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let mut more = mailbox.flag.load(Ordering::SeqCst)
            || mailbox.incoming.iter().flatten().any(|r| !r.is_empty());
        for p in &self.polled {
            if let Some(q) = &mut self.forward.queues[p.place] {
                more |= q.enable_kicks();
            }
        }
        let mut events = [EpollEvent::default(); EVENTS];
        let mut woken = 0;
        if !more {
            mailbox.sleeps.fetch_add(1, Ordering::Relaxed);
            // Interrupted by a signal: look around and come back.
            woken = self.epoll.wait(-1, &mut events).unwrap_or(0);
        }
        mailbox.sleeping.store(false, Ordering::Relaxed);
        for e in &events[..woken] {
            if e.data() == WAKE {
                let _ = mailbox.wake.read();
            }
        }
        for p in &self.polled {
            if let Some(q) = &mut self.forward.queues[p.place] {
                q.disable_kicks();
            }
        }
    }
}
