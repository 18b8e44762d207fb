//! The thread behind every back end, with its bounded output queue and log file.
//!
//! ```text
//!  waiting (a Source: listener, reconnect timer, pty without a slave)
//!     | a Link                             ^ end of input, error, disconnect()
//!     v                                    |
//!  connected: queue -> link, link -> front end
//! ```
//!
//! Invariants: only this thread touches a client's fds and calls the front end (with no lock
//! held, so that it may write from there); [`Pump::write`] only appends to a queue and wakes the
//! thread once for all that gathers until it runs, so a vCPU pays one eventfd write a burst.
//! poll(2), not epoll, because stdin may be a file or /dev/null, which epoll refuses.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::link::{AtEnd, Link};
use crate::{Chardev, Error, Frontend, Options, sys};

/// Bytes moved at a time.
const CHUNK: usize = 64 << 10;
/// How long a client that hung up keeps its place for what it sent and nobody read yet.
const GRACE: Duration = Duration::from_secs(1);

/// Where clients come from.
pub(crate) trait Source: Send {
    /// While nobody is connected: the fd and the poll events that announce a client.
    fn waiting_on(&self) -> Option<(RawFd, i16)>;
    /// While nobody is connected: when to try again without an event.
    fn timeout(&self) -> Option<Duration>;
    /// The next client, if there is one now. Must not block.
    fn next(&mut self) -> Option<Link>;
    /// Its name while nobody is connected.
    fn idle_name(&self) -> String;
}

/// The source of a back end whose only client is there from the start.
pub(crate) struct NoMore(pub String);

impl Source for NoMore {
    fn waiting_on(&self) -> Option<(RawFd, i16)> {
        None
    }
    fn timeout(&self) -> Option<Duration> {
        None
    }
    fn next(&mut self) -> Option<Link> {
        None
    }
    fn idle_name(&self) -> String {
        self.0.clone()
    }
}

/// What every back end is opened with.
pub(crate) struct Setup {
    pub label: String,
    /// Its name in errors.
    pub who: String,
    pub options: Options,
    pub log: Option<File>,
    /// `wait=on`.
    pub wait: bool,
}

/// What the callers of [`Chardev`] and the thread share.
struct State {
    out: VecDeque<u8>,
    /// Copy of the output for the log file.
    log: VecDeque<u8>,
    connected: bool,
    frontend: Option<Arc<dyn Frontend>>,
    /// The front end is to hear `opened`.
    announce: bool,
    /// The current client is to go.
    hang_up: bool,
    /// The thread was woken and has not looked yet.
    woken: bool,
    stop: bool,
    /// The thread has ended.
    ended: bool,
    name: String,
}

struct Shared {
    label: String,
    options: Options,
    has_log: bool,
    wait: bool,
    state: Mutex<State>,
    /// Signalled when a client came, a queue ran empty, the thread ended.
    changed: Condvar,
    wake: EventFd,
}

impl Shared {
    fn wake(&self, state: &mut State) {
        if !state.woken {
            state.woken = true;
            // It can only fail when the counter is full, and then the thread is awake.
            let _ = self.wake.write(1);
        }
    }
}

/// A back end: [`Chardev`] for all kinds.
pub(crate) struct Pump {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Pump {
    /// Starts the thread; `first` is a client that is there already.
    pub fn start(
        setup: Setup,
        source: Box<dyn Source>,
        first: Option<Link>,
    ) -> Result<Self, Error> {
        let failed = |what| {
            let who = setup.who.clone();
            move |source| Error::Setup { who, what, source }
        };
        let name = first.as_ref().map_or_else(|| source.idle_name(), |link| link.name.clone());
        let shared = Arc::new(Shared {
            label: setup.label.clone(),
            options: setup.options.clone(),
            has_log: setup.log.is_some(),
            wait: setup.wait,
            state: Mutex::new(State {
                out: VecDeque::new(),
                log: VecDeque::new(),
                connected: first.is_some(),
                frontend: None,
                announce: false,
                hang_up: false,
                woken: false,
                stop: false,
                ended: false,
                name,
            }),
            changed: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK).map_err(failed("its eventfd"))?,
        });
        let worker = Worker {
            shared: shared.clone(),
            source,
            link: first,
            log: setup.log,
            opened: None,
            gone_at: None,
            buffer: vec![0; CHUNK],
        };
        let thread = std::thread::Builder::new()
            .name(thread_name(&setup.label))
            .spawn(move || worker.run())
            .map_err(failed("its thread"))?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }
}

/// Linux shows 15 bytes of a thread's name.
fn thread_name(label: &str) -> String {
    let name: String = label.chars().filter(|c| *c != '\0').take(11).collect();
    format!("chr-{name}")
}

impl Chardev for Pump {
    fn label(&self) -> &str {
        &self.shared.label
    }

    fn filename(&self) -> String {
        self.shared.state.lock().name.clone()
    }

    fn frontend_open(&self) -> bool {
        self.shared.state.lock().frontend.is_some()
    }

    fn connect(&self, frontend: Arc<dyn Frontend>) {
        let mut state = self.shared.state.lock();
        if state.stop {
            return;
        }
        let before = state.frontend.replace(frontend);
        state.announce = true;
        self.shared.wake(&mut state);
        drop(state);
        drop(before); // Not under the lock: it may call us when it is dropped.
    }

    fn write(&self, data: &[u8]) -> usize {
        let limit = self.shared.options.queue_limit;
        let mut state = self.shared.state.lock();
        if state.stop || data.is_empty() {
            return 0;
        }
        if self.shared.has_log {
            let n = data.len().min(limit.saturating_sub(state.log.len()));
            state.log.extend(&data[..n]);
        }
        let room = limit.saturating_sub(state.out.len());
        let listening = state.connected && !state.hang_up;
        let taken = if listening { data.len().min(room) } else { 0 };
        state.out.extend(&data[..taken]);
        if taken > 0 || self.shared.has_log {
            self.shared.wake(&mut state);
        }
        taken
    }

    fn resume_input(&self) {
        self.shared.wake(&mut self.shared.state.lock());
    }

    fn disconnect(&self) {
        let mut state = self.shared.state.lock();
        if state.connected {
            state.hang_up = true;
            self.shared.wake(&mut state);
        }
    }

    fn wait_connected(&self) {
        if self.shared.wait {
            let mut state = self.shared.state.lock();
            while !state.connected && !state.ended {
                self.shared.changed.wait(&mut state);
            }
        }
    }

    fn drain(&self, deadline: Instant) {
        let mut state = self.shared.state.lock();
        while !(state.out.is_empty() && state.log.is_empty() || state.ended) {
            if self.shared.changed.wait_until(&mut state, deadline).timed_out() {
                return;
            }
        }
    }

    fn close(&self) {
        let mut state = self.shared.state.lock();
        state.stop = true;
        self.shared.wake(&mut state);
        drop(state);
        if let Some(thread) = self.thread.lock().take()
            // A front end may hold the last reference and drop it on the thread itself.
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the thread of chardev '{}' panicked", self.shared.label);
        }
        let frontend = self.shared.state.lock().frontend.take();
        drop(frontend);
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.close();
    }
}

/// What the callers asked for since the last look.
struct Requests {
    frontend: Option<Arc<dyn Frontend>>,
    announce: bool,
    hang_up: bool,
    stop: bool,
    output: bool,
}

/// The thread's own side.
struct Worker {
    shared: Arc<Shared>,
    source: Box<dyn Source>,
    link: Option<Link>,
    log: Option<File>,
    /// The front end that was told `opened` for this link.
    opened: Option<Arc<dyn Frontend>>,
    /// When the client hung up while its last bytes could not be read.
    gone_at: Option<Instant>,
    buffer: Vec<u8>,
}

/// Tells those who wait that the thread is gone, also when it panicked.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.ended = true;
        state.connected = false;
        self.0.changed.notify_all();
    }
}

impl Worker {
    fn run(mut self) {
        let _ended = Ended(self.shared.clone());
        loop {
            let asked = self.take_requests();
            self.write_log();
            if asked.stop {
                break;
            }
            // Stdio and files have one client for good: it only loses what did not fit.
            if asked.hang_up && self.link.as_ref().is_some_and(|l| l.at_end == AtEnd::Disconnect) {
                self.flush();
                self.detach();
            }
            if self.link.is_none()
                && let Some(link) = self.source.next()
            {
                self.attach(link);
            }
            if let (true, true, Some(front)) =
                (self.link.is_some(), asked.announce || self.opened.is_none(), &asked.frontend)
                && !self.opened.as_ref().is_some_and(|o| Arc::ptr_eq(o, front))
            {
                self.opened = Some(front.clone());
                front.opened();
            }
            if let Err(error) = self.wait(asked.output) {
                tracing::error!("chardev '{}': cannot poll: {error}", self.shared.label);
                break;
            }
        }
        self.flush();
        self.detach();
        self.write_log();
    }

    fn take_requests(&mut self) -> Requests {
        let mut state = self.shared.state.lock();
        if std::mem::take(&mut state.woken) {
            let _ = self.shared.wake.read();
        }
        Requests {
            frontend: state.frontend.clone(),
            announce: std::mem::take(&mut state.announce),
            hang_up: std::mem::take(&mut state.hang_up) && self.link.is_some(),
            stop: state.stop,
            output: !state.out.is_empty(),
        }
    }

    /// Waits for something to do, and moves bytes.
    fn wait(&mut self, output: bool) -> io::Result<()> {
        // A client's end must not be noticed with nobody to deliver its last bytes to.
        let room = self.opened.as_ref().map_or(0, |front| front.can_receive());
        let mut set = [
            sys::pollfd(self.shared.wake.as_raw_fd(), libc::POLLIN),
            sys::pollfd(-1, 0),
            sys::pollfd(-1, 0),
        ];
        let mut timeout = None;
        match &self.link {
            Some(link) => {
                if room > 0 {
                    set[1] = sys::pollfd(link.input_fd(), libc::POLLIN);
                } else if self.gone_at.is_none() && link.at_end == AtEnd::Disconnect {
                    set[1] = sys::pollfd(link.input_fd(), 0);
                }
                match link.output_fd() {
                    -1 => self.discard_output(),
                    fd if output => set[2] = sys::pollfd(fd, libc::POLLOUT),
                    // Nothing is read any more that would tell of the client's end.
                    fd if link.input.is_none() && link.at_end == AtEnd::Disconnect => {
                        set[2] = sys::pollfd(fd, 0);
                    }
                    _ => {}
                }
                timeout = self.gone_at.map(|at| GRACE.saturating_sub(at.elapsed()));
            }
            None => {
                if let Some((fd, events)) = self.source.waiting_on() {
                    set[1] = sys::pollfd(fd, events);
                }
                timeout = self.source.timeout().or(timeout);
            }
        }
        sys::poll(&mut set, timeout)?;
        if self.link.is_none() {
            return Ok(()); // The loop asks the source.
        }
        if set[2].revents != 0 && output {
            self.flush();
        } else if set[2].revents != 0 {
            self.detach();
        }
        if set[1].revents != 0 {
            self.input(room, set[1].revents);
        } else if self.gone_at.is_some_and(|at| at.elapsed() >= GRACE) {
            self.detach();
        }
        Ok(())
    }

    /// The client's fd has something to say.
    fn input(&mut self, room: usize, events: i16) {
        if room == 0 {
            // It hung up, and its last bytes cannot be delivered yet.
            self.gone_at = Some(Instant::now());
            return;
        }
        let Some(link) = &self.link else { return };
        let size = room.min(self.buffer.len());
        match link.read(&mut self.buffer[..size]) {
            Ok((0, _)) => self.end_of_input(events & libc::POLLHUP != 0),
            Ok((n, fds)) => {
                if let Some(front) = &self.opened {
                    front.receive(&self.buffer[..n], fds);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if events & libc::POLLIN == 0 {
                    self.end_of_input(true);
                }
            }
            Err(e) => {
                tracing::debug!("chardev '{}': cannot read: {e}", self.shared.label);
                self.end_of_input(true);
            }
        }
    }

    /// `gone`: the client does not read any more either.
    fn end_of_input(&mut self, gone: bool) {
        let front = &self.opened;
        match &mut self.link {
            Some(link) if link.at_end == AtEnd::KeepWriting => link.input = None,
            Some(link) if !gone && front.as_ref().is_some_and(|f| f.input_ended()) => {
                link.input = None;
            }
            _ => {
                self.flush();
                self.detach();
            }
        }
    }

    fn attach(&mut self, link: Link) {
        let mut state = self.shared.state.lock();
        state.name = link.name.clone();
        state.connected = true;
        state.hang_up = false;
        self.link = Some(link);
        self.gone_at = None;
        self.shared.changed.notify_all();
    }

    /// Lets go of the client.
    fn detach(&mut self) {
        self.gone_at = None;
        if self.link.take().is_none() {
            return;
        }
        let mut state = self.shared.state.lock();
        state.connected = false;
        state.hang_up = false;
        state.out = VecDeque::new();
        state.name = self.source.idle_name();
        self.shared.changed.notify_all();
        drop(state);
        if let Some(front) = self.opened.take() {
            front.closed();
        }
    }

    /// Writes of the queue what the client takes now.
    fn flush(&mut self) {
        loop {
            let Some(link) = &mut self.link else { return };
            if link.output.is_none() {
                return self.discard_output();
            }
            let n = {
                let state = self.shared.state.lock();
                let head = state.out.as_slices().0;
                let n = head.len().min(CHUNK).min(link.max_write);
                self.buffer[..n].copy_from_slice(&head[..n]);
                n
            };
            if n == 0 {
                return;
            }
            match link.write(&self.buffer[..n]) {
                Ok(written) => {
                    let mut state = self.shared.state.lock();
                    state.out.drain(..written);
                    if state.out.is_empty() {
                        self.shared.changed.notify_all();
                    }
                    if written == 0 || link.max_write != usize::MAX {
                        return; // Without non-blocking mode: one write a poll.
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    tracing::debug!("chardev '{}': cannot write: {e}", self.shared.label);
                    match link.at_end {
                        AtEnd::KeepWriting => link.output = None,
                        AtEnd::Disconnect => return self.detach(),
                    }
                }
            }
        }
    }

    fn discard_output(&self) {
        let mut state = self.shared.state.lock();
        state.out = VecDeque::new();
        self.shared.changed.notify_all();
    }

    fn write_log(&mut self) {
        let Some(file) = &mut self.log else { return };
        let data = std::mem::take(&mut self.shared.state.lock().log);
        if !data.is_empty() {
            let (a, b) = data.as_slices();
            if let Err(error) = file.write_all(a).and_then(|()| file.write_all(b)) {
                tracing::warn!(
                    "chardev '{}': no longer writes its log file: {error}",
                    self.shared.label
                );
                self.log = None;
            }
        }
        self.shared.changed.notify_all();
    }
}
