//! The receiving side's driver: does what [`session::Dest`](crate::session::Dest) says, with
//! sockets, clocks and threads.
//!
//! Threads: `mig-incoming` runs the session and calls the machine; `mig-accept` accepts connections
//! and hears their greetings, so that whoever connects and stays silent disturbs nobody;
//! `mig-control` and `mig-ram.N` read.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::channel::{Channel, Listener, socket_file};
use crate::control::{self, Outcome, spawn};
use crate::greeter::Greeter;
use crate::receiver::{Receiver, Sync};
use crate::session::dest::{Input, Output};
use crate::stats::{Stats, micros};
use crate::wire::{Hello, HelloAck, Msg, Resolution, Role};
use crate::{Endpoint, Error, Events, MigrationInfo, Result, Status, Uri, session};

/// How often the acceptor looks whether it is still wanted.
const SLICE: Duration = Duration::from_millis(50);
/// How long a write on the control connection may block.
const WRITE_PATIENCE: Duration = Duration::from_secs(10);
/// How long the control connection may take to say why a memory connection ended.
const CAUSE_PATIENCE: Duration = Duration::from_millis(500);
/// Who has greeted and not said for so long what machine it has makes room for the next who greets:
/// a source says both at once.
const STRANGER_PATIENCE: Duration = Duration::from_secs(1);

/// How a destination behaves.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// After a refusal (nothing of memory has moved) wait for the next source instead of ending.
    pub keep_listening: bool,
}

enum Event {
    Greeted { hello: Hello, channel: Channel },
    Control { epoch: u64, msg: Result<Msg> },
    Synced { channel: usize, sync: Sync },
    RamLost(Error),
    Stop,
    ForceRelease,
}

struct Inner {
    endpoint: Arc<dyn Endpoint>,
    events: Arc<dyn Events>,
    options: Options,
    uri: Uri,
    stats: Stats,
    receiver: Mutex<Option<Arc<Receiver>>>,
    status: Mutex<Status>,
    /// Nobody but the operator releases the guest that runs held.
    stranded: AtomicBool,
    closed: AtomicBool,
    /// The socket file, if there is one and it was not taken away yet.
    file: Mutex<Option<PathBuf>>,
    queue: Mutex<mpsc::Sender<Event>>,
    outcome: Outcome,
}

impl Inner {
    /// Takes the socket file away, once. Not done when a migration ends badly after memory moved: a
    /// file that refuses connections tells the source that this process is gone, a missing one
    /// tells nothing.
    fn remove_file(&self) {
        if let Some(path) = self.file.lock().take() {
            let _ = std::fs::remove_file(path);
        }
    }

    fn set_status(&self, status: Status) {
        let mut now = self.status.lock();
        if *now != status && (*now == Status::None || !now.is_final()) {
            *now = status;
            drop(now);
            tracing::debug!(%status, "incoming migration");
            self.events.migration(status);
        }
    }
}

/// A destination that waits for, or receives, a migration.
#[derive(Clone)]
pub struct Incoming(Arc<Inner>);

impl Incoming {
    /// The address that is listened on, with the real port where 0 was asked for.
    pub fn uri(&self) -> Uri {
        self.0.uri.clone()
    }

    /// The status now (`setup` until a source has been accepted).
    pub fn status(&self) -> Status {
        *self.0.status.lock()
    }

    /// What `query-migrate` says.
    pub fn info(&self) -> MigrationInfo {
        self.count();
        self.0.stats.info(self.status(), 0)
    }

    /// Takes the receiver's counters over.
    fn count(&self) {
        if let Some(r) = &*self.0.receiver.lock() {
            let (bytes, zero, normal) = r.counters.read();
            let c = &self.0.stats.counters;
            c.bytes.store(bytes, Ordering::Relaxed);
            c.zero.store(zero, Ordering::Relaxed);
            c.normal.store(normal, Ordering::Relaxed);
        }
    }

    /// Ends waiting or receiving if go has not come yet; the machine is discarded. Returns at
    /// once.
    pub fn stop(&self) {
        let _ = self.0.queue.lock().send(Event::Stop);
    }

    /// The operator's decision for a guest that runs here with its output held and whose source
    /// was not heard for [`session::ASKED_PATIENCE`]: release it. Only right when the guest does
    /// not run at the source. Tells whether there is anything to release.
    pub fn force_release(&self) -> bool {
        let stranded = self.0.stranded.load(Ordering::Acquire);
        stranded && self.0.queue.lock().send(Event::ForceRelease).is_ok()
    }

    /// The process ends. If no source came, nobody is told anything by the socket file.
    pub fn forget(&self) {
        if self.status() == Status::Setup {
            self.0.remove_file();
        }
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// Why the guest does not run here.
    pub fn wait(&self) -> Result<()> {
        self.0.outcome.wait()
    }
}

/// Listens on `uri` for one migration into `endpoint`'s machine. When it returns, the listener is
/// up; the rest happens in threads of its own.
///
/// # Errors
/// [`Error::Connect`] when the address cannot be listened on.
pub fn listen(
    endpoint: Arc<dyn Endpoint>,
    uri: &Uri,
    options: Options,
    events: Arc<dyn Events>,
) -> Result<Incoming> {
    let (listener, uri) = Listener::bind(uri)?;
    let file = socket_file(&uri);
    let (tx, rx) = mpsc::channel();
    let stats = Stats::new(endpoint.memory().size());
    let inner = Arc::new(Inner {
        endpoint,
        events,
        options,
        uri,
        stats,
        receiver: Mutex::new(None),
        status: Mutex::new(Status::None),
        stranded: AtomicBool::new(false),
        closed: AtomicBool::new(false),
        file: Mutex::new(file),
        queue: Mutex::new(tx.clone()),
        outcome: Outcome::default(),
    });
    inner.stats.wait();
    inner.set_status(Status::Setup);
    let (for_accept, accept_tx) = (inner.clone(), tx.clone());
    spawn("mig-accept", move || accept(&for_accept, &listener, &accept_tx))?;
    let for_driver = inner.clone();
    spawn("mig-incoming", move || Driver::new(for_driver, tx).run(&rx))?;
    Ok(Incoming(inner))
}

/// Accepts until the migration is closed, and hands on who has greeted.
fn accept(inner: &Inner, listener: &Listener, tx: &mpsc::Sender<Event>) {
    let mut greeter = Greeter::default();
    while !inner.closed.load(Ordering::Acquire) {
        match greeter.turn(listener, SLICE) {
            Ok(greeted) => {
                for (hello, channel) in greeted {
                    let _ = tx.send(Event::Greeted { hello, channel });
                }
            }
            Err(e) => {
                tracing::warn!("incoming migration: cannot accept: {e}");
                std::thread::sleep(SLICE);
            }
        }
    }
    if matches!(inner.outcome.get(), Some(Ok(())) | Some(Err(Error::Refused(_) | Error::Cancelled)))
    {
        inner.remove_file();
    }
}

struct Driver {
    inner: Arc<Inner>,
    tx: mpsc::Sender<Event>,
    session: session::Dest,
    control: Option<Arc<Channel>>,
    epoch: u64,
    ram: Vec<Option<Arc<Channel>>>,
    synced: Vec<u64>,
    inputs: VecDeque<Input>,
    go: Option<Instant>,
    restart: bool,
    close: bool,
    /// When something last came of what happened.
    since: Instant,
    /// A memory connection ended, and until when the control connection may say why.
    ram_lost: Option<(Instant, Error)>,
    /// No memory had moved before the step that is performed now.
    untouched: bool,
}

impl Driver {
    fn new(inner: Arc<Inner>, tx: mpsc::Sender<Event>) -> Self {
        Self {
            inner,
            tx,
            session: session::Dest::new(),
            control: None,
            epoch: 0,
            ram: Vec::new(),
            synced: Vec::new(),
            inputs: VecDeque::new(),
            go: None,
            restart: false,
            close: false,
            since: Instant::now(),
            ram_lost: None,
            untouched: true,
        }
    }

    fn run(mut self, rx: &mpsc::Receiver<Event>) {
        while !self.close {
            if self.restart {
                self.start_over();
            }
            let input = match self.inputs.pop_front() {
                Some(input) => Some(input),
                None => self.wait(rx),
            };
            if input.is_some_and(|input| self.step(input)) {
                self.since = Instant::now();
            }
        }
        self.inner.closed.store(true, Ordering::Release);
        self.hang_up();
    }

    fn hang_up(&mut self) {
        self.control.take().iter().for_each(|c| c.shutdown());
        self.ram.drain(..).flatten().for_each(|c| c.shutdown());
    }

    /// After a refusal, and after one who was no source: the next may come.
    fn start_over(&mut self) {
        self.hang_up();
        self.epoch += 1;
        self.session = session::Dest::new();
        self.inputs.clear();
        self.ram_lost = None;
        self.inner.stats.wait();
        self.restart = false;
    }

    /// Feeds `input`; tells whether anything came of it.
    fn step(&mut self, input: Input) -> bool {
        // Until memory moves, the machine is as good as new.
        self.untouched = !self.session.receiving();
        // Who has not said what machine it has may be anybody, and ends nothing.
        let stranger = !self.session.has_preamble();
        let keep = (stranger || self.inner.options.keep_listening && self.untouched)
            && !matches!(input, Input::Cancel);
        let lost = matches!(input, Input::ControlLost(_));
        let outputs = self.session.step(input);
        let any = !outputs.is_empty();
        for output in outputs {
            match output {
                Output::Discard if keep => {}
                Output::End(result) if keep => {
                    match result {
                        Err(e) if stranger => tracing::warn!("{e}; still waiting for a source"),
                        result => self.inner.events.ended(&result),
                    }
                    self.restart = true;
                }
                output => self.perform(output),
            }
        }
        // After the last words on it: the source must not wait for more.
        if lost && let Some(control) = &self.control {
            control.shutdown();
        }
        any
    }

    fn wait(&mut self, rx: &mpsc::Receiver<Event>) -> Option<Input> {
        let patience = self.session.patience();
        let left = patience
            .filter(|_| self.control.is_some())
            .map(|limit| limit.saturating_sub(self.since.elapsed()));
        let event = match (&self.ram_lost, left) {
            (Some((until, _)), _) => {
                match rx.recv_timeout(until.saturating_duration_since(Instant::now())) {
                    Ok(event) => event,
                    Err(_) => return self.ram_lost.take().map(|(_, e)| Input::RamLost(e)),
                }
            }
            (None, None) => rx.recv().ok()?,
            (None, Some(left)) => match rx.recv_timeout(left) {
                Ok(event) => event,
                Err(_) => return Some(Input::Timeout),
            },
        };
        match event {
            Event::Greeted { hello, channel } => {
                self.greeted(hello, channel);
                None
            }
            Event::Control { epoch, .. } if epoch != self.epoch => None,
            Event::Control { msg: Ok(m), .. } => Some(Input::Msg(m)),
            Event::Control { msg: Err(e), .. } => Some(Input::ControlLost(e)),
            Event::Synced { channel, sync } => self.synced(channel, sync),
            // A source that cancels or dies takes all connections down: which is seen first is
            // chance, and the control connection knows more.
            Event::RamLost(e @ Error::Lost(_)) => {
                self.ram_lost.get_or_insert((Instant::now() + CAUSE_PATIENCE, e));
                None
            }
            Event::RamLost(e) => Some(Input::RamLost(e)),
            Event::Stop => Some(Input::Cancel),
            Event::ForceRelease => Some(Input::ForceRelease),
        }
    }

    fn greeted(&mut self, hello: Hello, channel: Channel) {
        let known = self.session.session() == Some(hello.session);
        let stalls = !self.session.has_preamble() && self.since.elapsed() >= STRANGER_PATIENCE;
        if hello.role == Role::Control && self.session.session().is_some() && stalls {
            tracing::warn!("incoming migration: one who only greeted makes room for another");
            self.start_over();
        }
        match hello.role {
            Role::Control if self.session.session().is_none() => {
                self.inner.stats.begin();
                self.use_control(channel);
                self.inputs.push_back(Input::Msg(Msg::Hello(hello)));
            }
            Role::Ram(n) if known => self.ram(usize::from(n), channel),
            Role::Resolve if known && self.session.may_be_asked() => {
                self.use_control(channel);
                self.inner.stranded.store(false, Ordering::Release);
                self.step(Input::Resolve);
            }
            Role::Resolve => answer(&channel, &Msg::Resolution(Resolution::Unknown)),
            _ => {
                let why = "another migration is being received here".to_owned();
                answer(&channel, &Msg::Refuse(vec![why]));
            }
        }
    }

    /// Makes `channel` the current control connection; whatever the old one still says is dropped.
    fn use_control(&mut self, channel: Channel) {
        channel.set_write_timeout(WRITE_PATIENCE);
        let channel = Arc::new(channel);
        if let Some(old) = self.control.replace(channel.clone()) {
            old.shutdown();
        }
        self.epoch += 1;
        let (epoch, tx) = (self.epoch, self.tx.clone());
        let tell = move |msg| tx.send(Event::Control { epoch, msg }).is_ok();
        if let Err(e) = control::read(channel, "source", tell) {
            self.inputs.push_back(Input::ControlLost(e));
        }
    }

    /// A RAM connection: receives on it in a thread.
    fn ram(&mut self, n: usize, channel: Channel) {
        let receiver = self.inner.receiver.lock().clone();
        let (Some(receiver), Some(slot)) = (receiver, self.ram.get_mut(n)) else {
            let why = format!("memory connection {n} was not announced");
            return answer(&channel, &Msg::Refuse(vec![why]));
        };
        if slot.is_some() {
            let why = format!("memory connection {n} is there already");
            return answer(&channel, &Msg::Refuse(vec![why]));
        }
        let ack = HelloAck { version: 1, capabilities: vec![] };
        answer(&channel, &Msg::HelloAck(ack));
        let channel = Arc::new(channel);
        *slot = Some(channel.clone());
        let tx = self.tx.clone();
        let receive = move || {
            let mut synced = |sync| {
                let _ = tx.send(Event::Synced { channel: n, sync });
            };
            if let Err(e) = receiver.run(&*channel, &mut synced) {
                let _ = tx.send(Event::RamLost(e));
            }
        };
        if let Err(e) = spawn(&format!("mig-ram.{n}"), receive) {
            self.inputs.push_back(Input::RamLost(e));
        }
    }

    /// A round ended on one connection; when it did on all, the session hears of it.
    fn synced(&mut self, channel: usize, sync: Sync) -> Option<Input> {
        *self.synced.get_mut(channel)? = sync.round;
        if self.synced.iter().any(|r| *r < sync.round) {
            return None;
        }
        if sync.last {
            let receiver = self.inner.receiver.lock().clone();
            if let Some((at, pages)) = receiver.and_then(|r| r.missing()) {
                return Some(Input::RamLost(Error::Protocol(format!(
                    "{pages} pages of memory never came, the first at {at:#x}"
                ))));
            }
        }
        self.inner.stats.slow.lock().syncs = sync.round;
        Some(Input::RamSynced { round: sync.round, last: sync.last })
    }

    fn perform(&mut self, output: Output) {
        let endpoint = self.inner.endpoint.clone();
        let input = match output {
            Output::Send(msg) => self.send(&msg),
            Output::Check(preamble) => Some(Input::Checked(endpoint.differences(&preamble))),
            Output::Prepare { channels } => Some(Input::Prepared(self.prepare(channels.into()))),
            Output::Load(sections) => {
                let start = Instant::now();
                Some(Input::Loaded(endpoint.load(sections).map(|()| micros(start.elapsed()))))
            }
            Output::AcquireLocks => {
                self.go = Some(Instant::now());
                Some(Input::Locked(endpoint.acquire_locks()))
            }
            Output::RunHeld => {
                let go = self.go.unwrap_or_else(Instant::now);
                let started = endpoint.run_held().map(|()| micros(go.elapsed()));
                Some(Input::Started(started))
            }
            Output::ReleaseOutput => {
                self.inner.stranded.store(false, Ordering::Release);
                endpoint.release_output();
                None
            }
            Output::Deliver(frames) => {
                endpoint.deliver_late(frames);
                None
            }
            Output::Discard => {
                // The process may end at once after it.
                if self.untouched {
                    self.inner.remove_file();
                }
                endpoint.discard();
                None
            }
            Output::Stranded => {
                let why = "the guest runs here with its output held, and the source that must \
                           release it cannot be heard. If it does not run at the source, let it \
                           go on here with cont";
                tracing::error!("{why}");
                self.inner.stranded.store(true, Ordering::Release);
                self.inner.stats.slow.lock().error = Some(why.into());
                None
            }
            Output::End(result) => {
                self.end(result);
                None
            }
            Output::Close => {
                self.close = true;
                None
            }
        };
        self.inputs.extend(input);
    }

    fn prepare(&mut self, channels: usize) -> std::result::Result<(), String> {
        self.inner.set_status(Status::Active);
        self.inner.endpoint.prepare()?;
        // After it, for that may touch memory.
        let receiver = Receiver::new(&self.inner.endpoint.memory());
        *self.inner.receiver.lock() = Some(Arc::new(receiver));
        self.ram = vec![None; channels];
        self.synced = vec![0; channels];
        Ok(())
    }

    fn send(&mut self, msg: &Msg) -> Option<Input> {
        let control = self.control.as_ref()?;
        control::write(control, std::slice::from_ref(msg)).err().map(Input::ControlLost)
    }

    fn end(&mut self, result: Result<()>) {
        let status = match &result {
            Ok(()) => Status::Completed,
            Err(_) => Status::Failed,
        };
        if let Err(e) = &result {
            tracing::debug!("incoming migration: {e}");
        }
        self.ram_lost = None;
        self.inner.stats.end(result.as_ref().err().map(ToString::to_string));
        self.inner.set_status(status);
        self.inner.events.ended(&result);
        // Only a source that may have sent go comes back with questions.
        self.close |= !self.session.may_be_asked();
        self.inner.outcome.set(result);
    }
}

/// Writes one message on a connection that is not the current one.
fn answer(channel: &Channel, msg: &Msg) {
    channel.set_write_timeout(Duration::from_secs(1));
    if let Err(e) = control::write(channel, std::slice::from_ref(msg)) {
        tracing::debug!("{e}");
    }
}
