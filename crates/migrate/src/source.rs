//! The sending side's driver: does what [`session::Source`](crate::session::Source) says, with
//! sockets, clocks and threads.
//!
//! Threads: `migration` runs the session and calls the machine; `mig-control` reads the control
//! connection; `mig-ram.N` sends on RAM connection N. [`Handle`] only sets flags, puts events into
//! the migration's queue, and ends connections, so nothing that a monitor calls blocks, except
//! [`Handle::insist`].

mod inquiry;

use std::collections::VecDeque;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

use mem::DirtySource;
use parking_lot::Mutex;

use crate::channel::{self, Address, Channel};
use crate::control::{self, Outcome, spawn};
use crate::info::{DowntimePhases, Round};
use crate::pace::Pacer;
use crate::pending::Pending;
use crate::planner::{Observation, Policy, Precopy};
use crate::populated::populated;
use crate::sender::{Sender, Shared};
use crate::session::source::{Input, Output, Plan};
use crate::session::{self, HELLO_PATIENCE, LAST_ASK};
use crate::stats::{Stats, micros};
use crate::wire::{Hello, Msg, Role, SessionId};
use crate::{Endpoint, Error, Events, LateFrame, MigrationInfo, Parameters, Result, Status, Uri};

/// How long connecting may take.
const CONNECT_PATIENCE: Duration = Duration::from_secs(30);
/// How long the machine may take to stand still.
const QUIESCE_PATIENCE: Duration = Duration::from_secs(10);
/// How long a write on the control connection may block.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);
/// How long a cancel waits for the abort message to be written before it ends the connection.
const CANCEL_PATIENCE: Duration = Duration::from_millis(60);
/// Bandwidth that is assumed until one was measured: a 1 Gbit/s network's.
const ASSUMED_BANDWIDTH: u64 = 125_000_000;
/// Bytes that a round must have sent for its rate to be taken as the connection's.
const ENOUGH_TO_MEASURE: u64 = 4 << 20;
/// What the switchover costs beside pages and round trips, until measured.
const ASSUMED_FIXED: Duration = Duration::from_millis(5);

enum Event {
    Control { epoch: u64, msg: Result<Msg> },
    RoundSent,
    RamLost(Error),
    Cancel,
    Insist,
}

struct Inner {
    uri: Uri,
    endpoint: Arc<dyn Endpoint>,
    events: Arc<dyn Events>,
    shared: Shared,
    status: Mutex<Status>,
    cancelled: AtomicBool,
    past_go: AtomicBool,
    insisted: AtomicBool,
    queue: Mutex<mpsc::Sender<Event>>,
    ram: Mutex<Vec<Arc<Channel>>>,
    control: Mutex<Option<Arc<Channel>>>,
    /// What was told first: a doubt may be cleared later.
    outcome: Outcome,
    /// What it came to.
    settled: Outcome,
}

impl Inner {
    fn set_status(&self, status: Status) {
        let mut now = self.status.lock();
        let over = *now != Status::None && now.is_final();
        // A cancel comes from another thread: what the migration's own thread was about to say
        // must not follow it.
        let late = *now == Status::Cancelling && !status.is_final();
        if *now != status && !over && !late {
            *now = status;
            tracing::debug!(%status, "outgoing migration");
            // With the lock held: events go out in the order of the changes.
            self.events.migration(status);
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// How it ended, to all who want to know; once more when a doubt was cleared.
    fn tell(&self, result: Result<()>) {
        let status = match &result {
            Ok(()) => Status::Completed,
            Err(Error::Cancelled) => Status::Cancelled,
            Err(_) => Status::Failed,
        };
        let error = result.as_ref().err().filter(|e| **e != Error::Cancelled);
        if let Some(e) = error {
            tracing::warn!("migration to {}: {e}", self.uri);
        }
        self.shared.stats.mark(status.as_str());
        self.shared.stats.end(error.map(ToString::to_string));
        match self.outcome.get() {
            None => self.set_status(status),
            Some(_) => self.correct_status(status),
        }
        self.events.ended(&result);
        self.outcome.set(result);
    }

    /// What was told to have failed in doubt may have been completed.
    fn correct_status(&self, status: Status) {
        let mut now = self.status.lock();
        if *now != status {
            *now = status;
            self.events.migration(status);
        }
    }
}

/// A running or finished outgoing migration.
#[derive(Clone)]
pub struct Handle(Arc<Inner>);

impl Handle {
    /// Ends the migration if the guest has not been handed over yet; the guest goes on here.
    /// Returns at once; the status is `cancelling`, then `cancelled`. After go, or when it is
    /// over, it does nothing.
    pub fn cancel(&self) {
        let inner = &self.0;
        if self.status().is_final() || inner.past_go.load(Ordering::Acquire) {
            return;
        }
        if inner.cancelled.swap(true, Ordering::AcqRel) {
            return;
        }
        inner.set_status(Status::Cancelling);
        // The event goes first, so that a connection that ends now does not look like a failure.
        let _ = inner.queue.lock().send(Event::Cancel);
        inner.ram.lock().iter().for_each(|c| c.shutdown());
        let inner = inner.clone();
        // Should the migration's thread hang in a write to a peer that stalls, this frees it.
        let watch = move || {
            let over = inner.outcome.comes_within(CANCEL_PATIENCE);
            if !over && !inner.past_go.load(Ordering::Acquire) {
                inner.control.lock().iter().for_each(|c| c.shutdown());
            }
        };
        let _ = std::thread::Builder::new().name("mig-cancel".into()).spawn(watch);
    }

    /// The status now.
    pub fn status(&self) -> Status {
        *self.0.status.lock()
    }

    /// What `query-migrate` says.
    pub fn info(&self) -> MigrationInfo {
        let pending = &self.0.shared.pending;
        self.0.shared.stats.info(self.status(), pending.pages() + pending.unsent())
    }

    /// Whether the guest was given to a destination that does not say whether it has it. It is asked
    /// on, though the status says `failed`.
    pub fn in_doubt(&self) -> bool {
        let inner = &self.0;
        matches!(inner.outcome.get(), Some(Err(Error::Unknown(_)))) && inner.settled.get().is_none()
    }

    /// Whether it is too late for [`cancel`](Self::cancel), though it is not over.
    pub fn is_past_cancel(&self) -> bool {
        self.0.past_go.load(Ordering::Acquire) && self.0.settled.get().is_none()
    }

    /// The operator wants the guest here: asks a destination that is in doubt once more, and tells
    /// what is known then. Blocks for some seconds if it does not answer.
    ///
    /// # Errors
    /// What speaks against letting the guest go on here: it runs there, or is about to.
    pub fn insist(&self) -> std::result::Result<(), String> {
        let inner = &self.0;
        if !self.in_doubt() {
            return Ok(());
        }
        inner.insisted.store(true, Ordering::Release);
        let _ = inner.queue.lock().send(Event::Insist);
        inner.settled.comes_within(LAST_ASK * 4);
        match inner.settled.get() {
            Some(Ok(())) => Err("The destination has just answered: the guest runs there".into()),
            Some(Err(_)) => Ok(()),
            None => Err("The destination has just answered, and is about to run the guest; \
                         query-migrate says how it goes on"
                .into()),
        }
    }

    /// Waits for the end, or until it is in doubt.
    ///
    /// # Errors
    /// Why the guest was not handed over.
    pub fn wait(&self) -> Result<()> {
        self.0.outcome.wait()
    }
}

/// Starts to migrate `endpoint`'s machine to `uri`, in threads of its own.
///
/// # Errors
/// At once when the machine cannot be migrated ([`Error::Blocked`]). Everything later, failing to
/// connect among it, is in the status, in `error-desc`, and in [`Events::ended`].
pub fn start(
    endpoint: Arc<dyn Endpoint>,
    uri: Uri,
    params: Arc<Parameters>,
    events: Arc<dyn Events>,
) -> Result<Handle> {
    let blockers = endpoint.blockers();
    if !blockers.is_empty() {
        return Err(Error::Blocked(blockers));
    }
    let memory = endpoint.memory();
    let (tx, rx) = mpsc::channel();
    let shared = Shared {
        pending: Pending::new(&memory),
        stats: Stats::new(memory.size()),
        memory,
        params,
        pacer: Pacer::default(),
        populated: OnceLock::new(),
    };
    let inner = Arc::new(Inner {
        uri,
        endpoint,
        events,
        shared,
        status: Mutex::new(Status::None),
        cancelled: AtomicBool::new(false),
        past_go: AtomicBool::new(false),
        insisted: AtomicBool::new(false),
        queue: Mutex::new(tx.clone()),
        ram: Mutex::new(Vec::new()),
        control: Mutex::new(None),
        outcome: Outcome::default(),
        settled: Outcome::default(),
    });
    inner.set_status(Status::Setup);
    inner.shared.stats.mark("setup");
    let for_thread = inner.clone();
    std::thread::Builder::new()
        .name("migration".into())
        .spawn(move || Driver::run(for_thread, tx, &rx))
        .map_err(|e| Error::Machine(format!("cannot start the migration's thread: {e}")))?;
    Ok(Handle(inner))
}

/// Moments of the switchover.
#[derive(Default)]
struct Moments {
    stop: Option<Instant>,
    quiesced: Option<Instant>,
    pages_sent: Option<Instant>,
    saved: Option<Instant>,
    go: Option<Instant>,
    running: Option<Instant>,
}

/// The figures of the round that is under way.
struct RoundStart {
    number: u64,
    at: Instant,
    at_us: u64,
    counted: (u64, u64, u64),
    scan_ns: u64,
    pages: u64,
    last: bool,
    sent: Option<Instant>,
}

struct Driver {
    inner: Arc<Inner>,
    session: session::Source,
    id: SessionId,
    address: Address,
    epoch: u64,
    tx: mpsc::Sender<Event>,
    jobs: Vec<mpsc::Sender<(u64, bool)>>,
    unsent: usize,
    sources: Vec<Arc<dyn DirtySource>>,
    started: usize,
    policy: Box<dyn Policy>,
    inputs: VecDeque<Input>,
    round: Option<RoundStart>,
    bandwidth: u64,
    round_trip: Duration,
    moments: Moments,
    phases: DowntimePhases,
    first_loss: Option<Instant>,
    reconnects: u32,
    resume_failed: Option<String>,
    result: Option<Result<()>>,
}

impl Driver {
    fn run(inner: Arc<Inner>, tx: mpsc::Sender<Event>, rx: &mpsc::Receiver<Event>) {
        let result = match Self::connect(&inner, tx) {
            Ok(mut driver) => driver.drive(rx),
            Err(e) => Err(e),
        };
        inner.control.lock().take().iter().for_each(|c| c.shutdown());
        inner.ram.lock().drain(..).for_each(|c| c.shutdown());
        inner.tell(result.clone());
        inner.settled.set(result);
    }

    fn connect(inner: &Arc<Inner>, tx: mpsc::Sender<Event>) -> Result<Self> {
        let preamble = inner.endpoint.preamble().map_err(Error::Machine)?;
        let deadline = Instant::now() + CONNECT_PATIENCE;
        let (control, address) = channel::connect(&inner.uri, deadline, &|| inner.is_cancelled())?;
        let id = uuid::Uuid::new_v4().into_bytes();
        let mut driver = Self {
            session: session::Source::new(id, preamble, 1),
            id,
            address,
            epoch: 0,
            tx,
            jobs: Vec::new(),
            unsent: 0,
            sources: inner.endpoint.dirty_sources(),
            started: 0,
            policy: Box::new(Precopy::default()),
            inputs: VecDeque::from([Input::Connected]),
            round: None,
            bandwidth: 0,
            round_trip: Duration::from_secs(1),
            moments: Moments::default(),
            phases: DowntimePhases::default(),
            first_loss: None,
            reconnects: 0,
            resume_failed: None,
            result: None,
            inner: inner.clone(),
        };
        driver.use_control(control)?;
        Ok(driver)
    }

    /// Makes `control` the current connection and reads it in a thread.
    fn use_control(&mut self, control: Channel) -> Result<()> {
        control.set_write_timeout(WRITE_PATIENCE);
        let control = Arc::new(control);
        *self.inner.control.lock() = Some(control.clone());
        self.epoch += 1;
        let (epoch, tx) = (self.epoch, self.tx.clone());
        let tell = move |msg| tx.send(Event::Control { epoch, msg }).is_ok();
        control::read(control, "destination", tell)
    }

    fn drive(&mut self, rx: &mpsc::Receiver<Event>) -> Result<()> {
        let mut since = Instant::now();
        loop {
            if let Some(result) = self.result.take() {
                self.stop_sources();
                return self.conclude(result);
            }
            let input = match self.inputs.pop_front() {
                Some(input) => Some(input),
                None => self.wait(rx, since),
            };
            let Some(input) = input else { continue };
            self.note(&input);
            let outputs = self.session.step(input);
            if !outputs.is_empty() {
                since = Instant::now();
            }
            let mut outputs = outputs.into_iter().peekable();
            while let Some(output) = outputs.next() {
                let Output::Send(msg) = output else {
                    self.perform(output);
                    continue;
                };
                // What is sent together goes out in one write: the device state is many messages.
                let mut msgs = vec![msg];
                while let Some(Output::Send(_)) = outputs.peek() {
                    if let Some(Output::Send(msg)) = outputs.next() {
                        msgs.push(msg);
                    }
                }
                let lost = self.send(&msgs);
                self.inputs.extend(lost);
            }
        }
    }

    /// Waits for the next event, as long as the session's state may last.
    fn wait(&mut self, rx: &mpsc::Receiver<Event>, since: Instant) -> Option<Input> {
        let event = match self.session.patience() {
            None => rx.recv().ok(),
            Some(patience) => {
                // A long limit means a long last round.
                let limit = patience + self.inner.shared.params.downtime_limit() * 2;
                match rx.recv_timeout(limit.saturating_sub(since.elapsed())) {
                    Ok(event) => Some(event),
                    Err(_) => return Some(Input::Timeout),
                }
            }
        };
        match event? {
            Event::Control { epoch, .. } if epoch != self.epoch => None,
            Event::Control { msg: Ok(m), .. } => Some(Input::Msg(m)),
            Event::Control { msg: Err(e), .. } => Some(Input::ControlLost(e)),
            Event::RamLost(e) => Some(Input::RamLost(e)),
            Event::Cancel => Some(Input::Cancel),
            Event::Insist => Some(Input::Insist),
            Event::RoundSent => {
                self.unsent = self.unsent.saturating_sub(1);
                (self.unsent == 0).then_some(Input::RoundSent)
            }
        }
    }

    /// Takes the time of what matters for the figures.
    fn note(&mut self, input: &Input) {
        let now = Instant::now();
        let since = |then: Option<Instant>| then.map_or(0, |t| micros(now - t));
        match input {
            Input::RoundSent => {
                if let Some(round) = &mut self.round {
                    round.sent = Some(now);
                    if round.last {
                        self.moments.pages_sent = Some(now);
                        self.phases.last_pages_us = since(self.moments.quiesced);
                    }
                }
            }
            Input::Msg(Msg::Ready(load_us)) => {
                self.phases.load_us = *load_us;
                let m = &self.moments;
                self.phases.transfer_load_us = since(m.saved.max(m.pages_sent));
                self.inner.shared.stats.mark("ready");
            }
            Input::Msg(Msg::Running(us)) => {
                self.phases.start_us = *us;
                self.running(now);
            }
            Input::Msg(Msg::Resolution(crate::wire::Resolution::Running)) => self.running(now),
            Input::Msg(Msg::Released) => {
                self.phases.release_us = since(self.moments.running);
                let downtime = self.moments.stop.map(|t| now - t);
                let mut slow = self.inner.shared.stats.slow.lock();
                slow.downtime = downtime;
                slow.phases = Some(self.phases);
            }
            _ => {}
        }
    }

    fn running(&mut self, now: Instant) {
        if self.moments.running.is_some() {
            return;
        }
        self.moments.running = Some(now);
        self.phases.go_running_us = self.moments.go.map_or(0, |t| micros(now - t));
        let stats = &self.inner.shared.stats;
        stats.mark("running");
        let mut slow = stats.slow.lock();
        slow.blackout = self.moments.stop.map(|t| now - t);
        slow.downtime = slow.blackout;
        slow.phases = Some(self.phases);
    }

    fn perform(&mut self, output: Output) {
        let input = match output {
            Output::Send(msg) => self.send(&[msg]),
            Output::OpenRam => Some(match self.open_ram() {
                Ok(()) => Input::RamUp,
                Err(e) => Input::RamLost(e),
            }),
            Output::Round { number, last } => self.begin_round(number, last),
            Output::Acked => {
                self.end_round();
                None
            }
            Output::Plan => Some(match self.plan() {
                Ok(plan) => Input::Plan(plan),
                Err(e) => Input::MachineFailed(e),
            }),
            Output::Quiesce => Some(Input::Quiesced(self.quiesce())),
            Output::Save => {
                let start = Instant::now();
                let saved = self.inner.endpoint.save();
                self.moments.saved = Some(Instant::now());
                self.phases.save_us = micros(start.elapsed());
                self.inner.shared.stats.mark("saved");
                Some(Input::Saved(saved))
            }
            Output::ReleaseLocks => {
                self.moments.go = Some(Instant::now());
                // From here on a cancel would come too late.
                Some(Input::LocksReleased(self.inner.endpoint.release_locks()))
            }
            Output::Reconnect => Some(self.reconnect()),
            Output::Resume => {
                self.resume_failed = self.inner.endpoint.resume().err();
                self.inner.shared.stats.mark("resume");
                None
            }
            Output::HandOver => {
                self.inner.endpoint.handed_over();
                None
            }
            Output::ForwardFrames => {
                self.forward_frames();
                None
            }
            Output::Doubt(why) => {
                self.inner.endpoint.undecided();
                self.inner.tell(Err(why));
                None
            }
            Output::End(result) => {
                if matches!(result, Err(Error::Unknown(_))) {
                    self.inner.endpoint.undecided();
                }
                self.result = Some(result);
                None
            }
        };
        self.inputs.extend(input);
    }

    /// Sends the frames that came for the guest since it stopped here, until the network has shown
    /// that it knows the new place. Not every network shows it to the old one.
    fn forward_frames(&mut self) {
        const QUIET: Duration = Duration::from_millis(2);
        const MOST: Duration = Duration::from_secs(1);
        /// A bridge may have looked up the old port for a frame just before it learnt the new one,
        /// and puts it there after the announcement.
        const GRACE: Duration = Duration::from_millis(50);
        let mut until = Instant::now() + MOST;
        let mut sent = 0;
        while let Some((frames, settled)) = self.inner.endpoint.late_frames() {
            sent += frames.len() as u64;
            self.inner.shared.stats.slow.lock().late_frames = Some(sent);
            for batch in batches(frames) {
                // The guest has moved; a frame that cannot follow is lost as on any network.
                if self.send(&[Msg::Frames(batch)]).is_some() {
                    return;
                }
            }
            if settled {
                until = until.min(Instant::now() + GRACE);
            }
            if Instant::now() > until {
                return;
            }
            std::thread::sleep(QUIET);
        }
    }

    fn send(&mut self, msgs: &[Msg]) -> Option<Input> {
        if msgs.contains(&Msg::Go) {
            self.inner.past_go.store(true, Ordering::Release);
        }
        let control = self.inner.control.lock().clone()?;
        control::write(&control, msgs).err().map(Input::ControlLost)
    }

    /// Connects RAM channels, begins to log dirty pages, and starts the senders.
    fn open_ram(&mut self) -> Result<()> {
        let inner = self.inner.clone();
        let deadline = Instant::now() + HELLO_PATIENCE;
        let channel = channel::connect_to(&self.address, deadline, &|| inner.is_cancelled())
            .map_err(|e| Error::Connect(format!("memory connection to {}: {e}", self.address)))?;
        let channel = Arc::new(channel);
        inner.ram.lock().push(channel.clone());
        if inner.is_cancelled() {
            return Err(Error::Cancelled);
        }
        greet_ram(&channel, self.id)?;
        for source in &self.sources {
            source.start().map_err(|e| {
                Error::Machine(format!("cannot log dirty pages of {}: {e}", source.name()))
            })?;
            self.started += 1;
        }
        // KVM's log begins with every page set (KVM_DIRTY_LOG_INITIALLY_SET) and protects pages as
        // it is read: read now, so that the second round holds only what was really dirtied. All
        // is pending already, and what was touched until here is in the populated maps below.
        inner.shared.pending.harvest(&self.sources).map_err(Error::Machine)?;
        // After the logs began: what is touched from now on is in them.
        let maps = inner.shared.memory.regions().iter().map(populated).collect();
        let _ = inner.shared.populated.set(maps);
        let (jobs, work) = mpsc::channel();
        self.jobs.push(jobs);
        let tx = self.tx.clone();
        spawn("mig-ram.0", move || send_rounds(&inner, &channel, &work, &tx))?;
        let stats = &self.inner.shared.stats;
        stats.slow.lock().setup = Some(stats.start.elapsed());
        Ok(())
    }

    fn begin_round(&mut self, number: u64, last: bool) -> Option<Input> {
        let shared = &self.inner.shared;
        if last && let Err(e) = shared.pending.harvest_last(&self.sources) {
            return Some(Input::MachineFailed(e));
        }
        let stats = &shared.stats;
        self.round = Some(RoundStart {
            number,
            at: Instant::now(),
            at_us: stats.now_us(),
            counted: stats.counters.read(),
            scan_ns: stats.counters.scan_ns.load(Ordering::Relaxed),
            pages: shared.pending.begin_round(),
            last,
            sent: None,
        });
        stats.slow.lock().syncs = number;
        self.inner.events.pass(number);
        if number == 1 {
            stats.mark("active");
            // Until it was measured, what is allowed, as in QEMU.
            stats.slow.lock().expected_downtime = Some(shared.params.downtime_limit());
            self.inner.set_status(Status::Active);
        }
        self.unsent = self.jobs.len();
        for jobs in &self.jobs {
            if jobs.send((number, last)).is_err() {
                return Some(Input::RamLost(Error::Lost("a memory connection ended".into())));
            }
        }
        None
    }

    /// The round was acknowledged.
    fn end_round(&mut self) {
        let Some(round) = self.round.take() else {
            return;
        };
        let shared = &self.inner.shared;
        shared.pending.acked();
        let took = round.at.elapsed();
        let (bytes, zero, _) = shared.stats.counters.read();
        let bytes = bytes - round.counted.0;
        let scan_ns = shared.stats.counters.scan_ns.load(Ordering::Relaxed) - round.scan_ns;
        let scan = Duration::from_nanos(scan_ns / self.jobs.len().max(1) as u64);
        let sending = took.saturating_sub(scan).as_secs_f64().max(1e-6);
        let rate = (bytes as f64 / sending) as u64;
        if bytes >= ENOUGH_TO_MEASURE {
            self.bandwidth = rate;
        }
        if let Some(sent) = round.sent {
            self.round_trip = self.round_trip.min(sent.elapsed());
        }
        shared.stats.round(Round {
            round: round.number,
            at_us: round.at_us,
            us: micros(took),
            pages: round.pages,
            zero_pages: zero - round.counted.1,
            bytes,
            dirty_pages: 0,
            bandwidth: rate,
            stopped: round.last,
        });
        let mut slow = shared.stats.slow.lock();
        slow.pages_per_second = (round.pages as f64 / took.as_secs_f64().max(1e-6)) as u64;
    }

    /// Reads the dirty logs and asks the policy.
    fn plan(&mut self) -> std::result::Result<Plan, String> {
        let shared = &self.inner.shared;
        shared.pending.harvest(&self.sources)?;
        let pending_pages = shared.pending.pages();
        let mut slow = shared.stats.slow.lock();
        let (round, took) = match slow.trace.rounds.last_mut() {
            Some(last) => {
                last.dirty_pages = pending_pages;
                (last.round, Duration::from_micros(last.us))
            }
            None => (0, Duration::ZERO),
        };
        slow.dirty_pages_rate = (pending_pages as f64 / took.as_secs_f64().max(1e-3)) as u64;
        let seen = Observation {
            round,
            pending_pages,
            took,
            bandwidth: if self.bandwidth > 0 { self.bandwidth } else { ASSUMED_BANDWIDTH },
            fixed: ASSUMED_FIXED + self.round_trip * 3,
            limit: shared.params.downtime_limit(),
            running: self.inner.endpoint.is_running(),
        };
        slow.expected_downtime = Some(seen.expected_downtime());
        drop(slow);
        Ok(self.policy.decide(&seen))
    }

    fn quiesce(&mut self) -> std::result::Result<(), String> {
        let stats = &self.inner.shared.stats;
        let now = Instant::now();
        self.moments.stop = Some(now);
        stats.mark("stop");
        stats.slow.lock().bytes_at_stop = Some(stats.counters.read().0);
        self.inner.endpoint.quiesce(now + QUIESCE_PATIENCE)?;
        self.moments.quiesced = Some(Instant::now());
        self.phases.quiesce_us = micros(now.elapsed());
        self.inner.set_status(Status::Device);
        Ok(())
    }

    fn stop_sources(&mut self) {
        for source in self.sources.drain(..self.started) {
            if let Err(e) = source.stop() {
                tracing::warn!("cannot end the dirty log of {}: {e}", source.name());
            }
        }
    }

    /// The result, with what else went wrong.
    fn conclude(&mut self, result: Result<()>) -> Result<()> {
        if result.is_err() {
            self.inner.shared.pending.failed();
        }
        match (result, self.resume_failed.take()) {
            (Err(e), Some(also)) => Err(Error::Machine(format!(
                "{e}; and the guest could not be resumed here, it stays paused: {also}"
            ))),
            // A connection that a cancel ended is the cancel's doing.
            (Err(_), None) if self.inner.is_cancelled() && !self.past_go() => Err(Error::Cancelled),
            (result, _) => result,
        }
    }

    fn past_go(&self) -> bool {
        self.inner.past_go.load(Ordering::Acquire)
    }
}

/// Tells the destination what the connection is for, and waits for its consent.
fn greet_ram(channel: &Channel, id: SessionId) -> Result<()> {
    let lost = |e| Error::Lost(format!("memory connection: {e}"));
    channel.set_read_timeout(HELLO_PATIENCE);
    let mut to = channel;
    to.write_all(&Msg::Hello(Hello::new(id, Role::Ram(0))).encode()?).map_err(lost)?;
    match Msg::read(&mut &*channel)? {
        Some(Msg::HelloAck(_)) => Ok(()),
        Some(Msg::Refuse(why)) => Err(Error::Refused(why)),
        Some(m) => Err(Error::Protocol(format!("'{}' on a memory connection", m.name()))),
        None => Err(Error::Lost("the destination closed the memory connection".into())),
    }
}

fn send_rounds(
    inner: &Inner,
    channel: &Channel,
    work: &mpsc::Receiver<(u64, bool)>,
    tx: &mpsc::Sender<Event>,
) {
    let cancelled = || inner.is_cancelled();
    let mut sender = Sender::new(&inner.shared, channel, &cancelled);
    while let Ok((number, last)) = work.recv() {
        let event = match sender.round(number, last) {
            Ok(()) => Event::RoundSent,
            Err(e) => Event::RamLost(e),
        };
        let stop = matches!(event, Event::RamLost(_));
        if tx.send(event).is_err() || stop {
            return;
        }
    }
}

/// Late frames in messages well below a control frame's bound.
fn batches(frames: Vec<LateFrame>) -> Vec<Vec<LateFrame>> {
    const BYTES: usize = 256 << 10;
    let mut all: Vec<Vec<LateFrame>> = Vec::new();
    let mut room = 0;
    for frame in frames {
        let bytes = frame.frame.len() + frame.nic.len() + 32;
        if bytes > room || all.is_empty() {
            all.push(Vec::new());
            room = BYTES;
        }
        room = room.saturating_sub(bytes);
        if let Some(last) = all.last_mut() {
            last.push(frame);
        }
    }
    all
}
