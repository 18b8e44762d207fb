//! [`Monitor`]: a QMP or HMP server on a chardev.
//!
//! ```text
//! chardev thread --bytes, fds--> inbox --> worker thread --commands--> Commands
//! any thread -------events-----> inbox --> worker thread ---replies--> chardev
//! ```
//!
//! Invariants: commands run on the monitor's own worker, under no lock; replies are in the order
//! of the commands, and an event that a command caused goes out before its reply, as in QEMU. The
//! inbox is bounded: input beyond it stays in the chardev; a QMP client that falls behind by more
//! than [`MAX_EVENTS`] events, or reads nothing for [`WRITE_PATIENCE`], loses its connection.

use std::cell::Cell;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use chardev::{Chardev, Frontend};
use parking_lot::{Condvar, Mutex};
use serde_json::{Map, Value};

use crate::command::{ClientFds, Commands, Error};
use crate::event::{EventBus, EventSink};
use crate::hmp::{HmpSession, Output};
use crate::qmp::{QmpSession, Step};

/// Input bytes that wait for the worker.
const MAX_INPUT: usize = 256 << 10;
/// Events that wait for the worker.
pub const MAX_EVENTS: usize = 1024;
/// How long a client may read nothing while something waits to be sent to it.
pub const WRITE_PATIENCE: Duration = Duration::from_secs(10);
/// Commands of a client that has left that are still run: somebody may say a few words and go, but
/// nobody may leave work behind that keeps the next one waiting.
const MAX_LEFT_BEHIND: usize = 64;
/// How often a full client is tried again.
const RETRY: Duration = Duration::from_millis(5);
/// How often a synchronous `migrate` looks at its progress.
const TICK: Duration = Duration::from_millis(100);

/// A monitor on a chardev; dropping it ends its thread once the running command has returned.
pub struct Monitor {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

struct Shared {
    inbox: Mutex<Inbox>,
    wake: Condvar,
    wants_events: bool,
}

#[derive(Default)]
struct Inbox {
    items: VecDeque<Item>,
    /// Bytes in `items`.
    waiting: usize,
    /// The chardev was told that there is no room.
    full: bool,
    events: VecDeque<Arc<Value>>,
    overflow: bool,
    open: bool,
    /// Counts connections, so that what was meant for a client that left is not sent.
    client: u64,
    stop: bool,
    /// The worker has taken work and not come back for more.
    busy: bool,
    /// When the client last came or said something.
    heard: Option<Instant>,
}

impl Inbox {
    fn idle(&self) -> bool {
        !self.busy && self.items.is_empty() && self.events.is_empty()
    }
}

enum Item {
    /// With the client's number.
    Opened(u64),
    /// The client sends no more, and may still read.
    InputEnded,
    Closed,
    Focus(bool),
    Data(Vec<u8>, Vec<OwnedFd>),
}

impl Monitor {
    /// Serves QMP on `chardev`, to one client after another. `pretty` indents replies. Errors:
    /// no thread can be started.
    pub fn qmp(
        chardev: Arc<dyn Chardev>,
        commands: Arc<dyn Commands>,
        events: &EventBus,
        pretty: bool,
    ) -> std::io::Result<Self> {
        let shared = Shared::new(true);
        let sink: Weak<dyn EventSink> = Arc::downgrade(&shared) as Weak<dyn EventSink>;
        events.subscribe(sink);
        let mut session = QmpSession::new(pretty);
        Self::start(shared, chardev, "qmp", move |link| {
            let step = |link: &Link, item| qmp_item(&mut session, link, &*commands, item);
            link.run(step);
        })
    }

    /// Serves HMP on `chardev`. Errors: no thread can be started.
    pub fn hmp(chardev: Arc<dyn Chardev>, commands: Arc<dyn Commands>) -> std::io::Result<Self> {
        Self::start_hmp(HmpSession::new(), chardev, commands)
    }

    /// Serves HMP on a chardev that it shares with others (`mux=on`): says nothing before it gets
    /// the keys. Errors: no thread can be started.
    pub fn hmp_on_mux(
        chardev: Arc<dyn Chardev>,
        commands: Arc<dyn Commands>,
    ) -> std::io::Result<Self> {
        Self::start_hmp(HmpSession::on_mux(), chardev, commands)
    }

    fn start_hmp(
        mut session: HmpSession,
        chardev: Arc<dyn Chardev>,
        commands: Arc<dyn Commands>,
    ) -> std::io::Result<Self> {
        Self::start(Shared::new(false), chardev, "hmp", move |link| {
            let step = |link: &Link, item| hmp_item(&mut session, link, &*commands, item);
            link.run(step);
        })
    }

    fn start(
        shared: Arc<Shared>,
        chardev: Arc<dyn Chardev>,
        name: &str,
        run: impl FnOnce(&Link) + Send + 'static,
    ) -> std::io::Result<Self> {
        let link = Link {
            shared: shared.clone(),
            chardev: chardev.clone(),
            serving: Cell::new(0),
            input_ended: Cell::new(false),
            left_behind: Cell::new(0),
        };
        let worker = std::thread::Builder::new()
            .name(format!("{name}-{}", chardev.label()))
            .spawn(move || run(&link))?;
        chardev.connect(shared.clone());
        Ok(Self { shared, worker: Some(worker) })
    }

    /// Blocks until what came in so far is answered and every event has gone to the chardev, or
    /// until `deadline`. Not for the monitor's own thread.
    pub fn flush(&self, deadline: Instant) {
        let mut inbox = self.shared.inbox.lock();
        while !inbox.idle() {
            if self.shared.wake.wait_until(&mut inbox, deadline).timed_out() {
                return;
            }
        }
    }

    /// Whether its client has left and nothing is left to do for it.
    pub fn finished(&self) -> bool {
        let inbox = self.shared.inbox.lock();
        inbox.client > 0 && !inbox.open && inbox.idle()
    }

    /// Since when its client has said nothing; `None` while it is being answered, and when there is
    /// none.
    pub fn silent_since(&self) -> Option<Instant> {
        let inbox = self.shared.inbox.lock();
        inbox.heard.filter(|_| inbox.open && inbox.idle())
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.shared.inbox.lock().stop = true;
        self.shared.wake.notify_all();
        // The last reference may be dropped by a command (quit) that this worker runs.
        if let Some(worker) = self.worker.take()
            && worker.thread().id() != std::thread::current().id()
        {
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn new(wants_events: bool) -> Arc<Self> {
        Arc::new(Self { inbox: Mutex::default(), wake: Condvar::new(), wants_events })
    }

    fn push(&self, item: Item) {
        let mut inbox = self.inbox.lock();
        match &item {
            Item::Opened(client) => {
                inbox.open = true;
                inbox.client = *client;
                inbox.events.clear();
                inbox.overflow = false;
                inbox.heard = Some(Instant::now());
            }
            Item::Closed => {
                inbox.open = false;
                inbox.events.clear();
            }
            Item::Focus(_) | Item::InputEnded => {}
            Item::Data(bytes, _) => {
                inbox.waiting += bytes.len();
                inbox.heard = Some(Instant::now());
            }
        }
        inbox.items.push_back(item);
        drop(inbox);
        self.wake.notify_all();
    }
}

impl Frontend for Shared {
    fn can_receive(&self) -> usize {
        let mut inbox = self.inbox.lock();
        let room = MAX_INPUT.saturating_sub(inbox.waiting);
        inbox.full |= room == 0;
        room
    }

    fn receive(&self, data: &[u8], fds: Vec<OwnedFd>) {
        self.push(Item::Data(data.to_vec(), fds));
    }

    fn opened(&self) {
        let client = self.inbox.lock().client + 1;
        self.push(Item::Opened(client));
    }

    fn input_ended(&self) -> bool {
        self.push(Item::InputEnded);
        true
    }

    fn closed(&self) {
        self.push(Item::Closed);
    }

    fn focus(&self, focused: bool) {
        self.push(Item::Focus(focused));
    }
}

impl EventSink for Shared {
    fn event(&self, event: &Arc<Value>) {
        let mut inbox = self.inbox.lock();
        if !inbox.open || !self.wants_events {
            return;
        }
        if inbox.events.len() >= MAX_EVENTS {
            inbox.overflow = true;
        } else {
            inbox.events.push_back(event.clone());
        }
        drop(inbox);
        self.wake.notify_all();
    }
}

/// What the worker has to do with the world.
struct Link {
    shared: Arc<Shared>,
    chardev: Arc<dyn Chardev>,
    /// The client whose input is being worked on; the connected one may be another by now.
    serving: Cell<u64>,
    /// That client sends no more: it is let go when it has its last answer.
    input_ended: Cell<bool>,
    /// Commands of that client that were run when it had left.
    left_behind: Cell<usize>,
}

/// What woke the worker.
enum Work {
    Item(Item),
    Event(Arc<Value>),
    /// Events were lost.
    Overflow,
    /// Nothing came within [`TICK`]; only for who asked for ticks.
    Tick,
}

impl Link {
    /// Hands work to `step` until the monitor is dropped; `step` says whether it wants ticks.
    fn run(&self, mut step: impl FnMut(&Self, Work) -> bool) {
        let mut ticking = false;
        while let Some(work) = self.next(ticking) {
            ticking = step(self, work);
            if self.input_ended.get() && !ticking {
                self.let_go();
            }
        }
    }

    /// Ends the connection of a client that sends no more, once it has read what it was sent.
    fn let_go(&self) {
        self.input_ended.set(false);
        let until = Instant::now() + WRITE_PATIENCE;
        while self.connected() && Instant::now() < until && !self.shared.inbox.lock().stop {
            // In slices, so that a client that does not read cannot hold up the end of the VM.
            let slice = Instant::now() + TICK;
            self.chardev.drain(slice);
            if Instant::now() < slice {
                break; // all is out
            }
        }
        if self.connected() {
            self.chardev.disconnect();
        }
    }

    fn next(&self, ticking: bool) -> Option<Work> {
        let mut inbox = self.shared.inbox.lock();
        inbox.busy = false;
        loop {
            if inbox.stop {
                return None;
            }
            if std::mem::take(&mut inbox.overflow) {
                inbox.busy = true;
                return Some(Work::Overflow);
            }
            if let Some(event) = inbox.events.pop_front() {
                inbox.busy = true;
                return Some(Work::Event(event));
            }
            if let Some(item) = inbox.items.pop_front() {
                inbox.busy = true;
                if let Item::Data(bytes, _) = &item {
                    inbox.waiting -= bytes.len();
                }
                match &item {
                    Item::Opened(client) => {
                        self.serving.set(*client);
                        self.input_ended.set(false);
                        self.left_behind.set(0);
                    }
                    Item::InputEnded => self.input_ended.set(true),
                    Item::Closed => self.input_ended.set(false),
                    Item::Focus(_) | Item::Data(..) => {}
                }
                let resume = inbox.full && inbox.waiting < MAX_INPUT / 2;
                if resume {
                    inbox.full = false;
                }
                drop(inbox);
                if resume {
                    self.chardev.resume_input();
                }
                return Some(Work::Item(item));
            }
            self.shared.wake.notify_all(); // who waits in `flush`
            if !ticking {
                self.shared.wake.wait(&mut inbox);
            } else if self.shared.wake.wait_for(&mut inbox, TICK).timed_out() {
                return Some(Work::Tick);
            }
        }
    }

    /// Events that are waiting, in order.
    fn events(&self) -> VecDeque<Arc<Value>> {
        std::mem::take(&mut self.shared.inbox.lock().events)
    }

    /// Whether the client that is being served is still there.
    fn connected(&self) -> bool {
        let inbox = self.shared.inbox.lock();
        inbox.open && inbox.client == self.serving.get()
    }

    /// Whether what is left of the client's input is still to be worked on; if not, what waits of
    /// it is dropped.
    fn goes_on(&self) -> bool {
        if self.connected() {
            return true;
        }
        self.left_behind.set(self.left_behind.get() + 1);
        if self.left_behind.get() <= MAX_LEFT_BEHIND {
            return true;
        }
        let mut inbox = self.shared.inbox.lock();
        while let Some(Item::Data(bytes, _)) = inbox.items.front() {
            inbox.waiting -= bytes.len();
            inbox.items.pop_front();
        }
        let resume = std::mem::take(&mut inbox.full);
        drop(inbox);
        if resume {
            self.chardev.resume_input();
        }
        false
    }

    /// Sends all of `bytes` to the client that is being served, waiting for a slow one; one that
    /// reads nothing for [`WRITE_PATIENCE`] is disconnected.
    fn send(&self, bytes: &[u8]) {
        let mut rest = bytes;
        let mut since = Instant::now();
        while !rest.is_empty() && self.connected() {
            let taken = self.chardev.write(rest).min(rest.len());
            rest = &rest[taken..];
            if taken > 0 {
                since = Instant::now();
                continue;
            }
            if since.elapsed() > WRITE_PATIENCE {
                tracing::warn!("monitor {}: the client reads nothing", self.chardev.label());
                self.chardev.disconnect();
                return;
            }
            let mut inbox = self.shared.inbox.lock();
            if inbox.stop {
                return;
            }
            self.shared.wake.wait_for(&mut inbox, RETRY);
        }
    }
}

fn qmp_item(session: &mut QmpSession, link: &Link, commands: &dyn Commands, work: Work) -> bool {
    match work {
        Work::Item(Item::Opened(_)) => {
            session.reset();
            link.send(&session.greeting());
        }
        Work::Item(Item::Closed) => session.reset(),
        Work::Item(Item::Data(bytes, fds)) => {
            session.receive(&bytes, fds);
            qmp_steps(session, link, commands);
        }
        Work::Event(event) => {
            if let Some(line) = session.event(&event) {
                link.send(&line);
            }
        }
        Work::Overflow => {
            tracing::warn!("monitor {}: too many events wait", link.chardev.label());
            link.chardev.disconnect();
        }
        Work::Item(Item::Focus(_) | Item::InputEnded) | Work::Tick => {}
    }
    false
}

fn qmp_steps(session: &mut QmpSession, link: &Link, commands: &dyn Commands) {
    while let Some(step) = session.step() {
        let reply = match step {
            Step::Send(bytes) => bytes,
            Step::Execute(request) => {
                let result = if request.name == "human-monitor-command" {
                    hmp_command(&request.arguments, commands, session.fds())
                } else {
                    commands.execute(&request.name, request.arguments, session.fds())
                };
                let lines = link.events().into_iter().filter_map(|e| session.event(&e));
                let mut bytes: Vec<u8> = lines.flatten().collect();
                bytes.extend(session.reply(request.id, result));
                bytes
            }
        };
        link.send(&reply);
        if !link.goes_on() {
            session.discard_input();
            return;
        }
        if link.shared.inbox.lock().stop {
            return;
        }
    }
}

/// `human-monitor-command`. A CPU that is named must be there, though no command here is of one CPU.
fn hmp_command(
    arguments: &Value,
    commands: &dyn Commands,
    fds: &ClientFds,
) -> Result<Value, Error> {
    if let Some(index) = arguments["cpu-index"].as_i64() {
        let cpus = commands.execute("query-cpus-fast", Value::Object(Map::new()), fds)?;
        let count = cpus.as_array().map_or(0, Vec::len);
        if !usize::try_from(index).is_ok_and(|index| index < count) {
            return Err(Error::generic("Parameter 'cpu-index' expects a CPU number"));
        }
    }
    let line = arguments["command-line"].as_str().unwrap_or_default();
    Ok(Value::String(crate::hmp::execute(line, commands, fds)))
}

fn hmp_item(session: &mut HmpSession, link: &Link, commands: &dyn Commands, work: Work) -> bool {
    match work {
        Work::Item(Item::Opened(_)) => link.send(&session.open().bytes),
        Work::Item(Item::Closed) => session.reset(),
        Work::Item(Item::Focus(true)) => link.send(&session.focus().bytes),
        Work::Item(Item::Data(bytes, _)) => {
            session.receive(&bytes);
            hmp_steps(session, link, commands);
        }
        Work::Tick => {
            link.send(&session.tick(commands).bytes);
            hmp_steps(session, link, commands);
        }
        Work::Item(Item::Focus(false) | Item::InputEnded) | Work::Event(_) | Work::Overflow => {}
    }
    session.waiting()
}

fn hmp_steps(session: &mut HmpSession, link: &Link, commands: &dyn Commands) {
    while let Some(Output { bytes }) = session.step(commands) {
        link.send(&bytes);
        if !link.goes_on() {
            session.discard_input();
            return;
        }
        if link.shared.inbox.lock().stop {
            return;
        }
    }
}
