//! The control thread: one loop over everything that is not a frame. Ports' sockets, the control
//! socket, Prometheus, faults that poll threads report, time.
//!
//! Control speaks JSON, one object a line: `{"command": "...", "arguments": {...}}`, answered by
//! `{"return": ...}` or `{"error": "a sentence"}`, in order.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use tracing::Level;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::interface_port::LinkMonitor;
use crate::port::{Kind, Link, Port, RETRY, VhostPort};
use crate::socket_listener::SocketListener;
use crate::switch::Switch;
use crate::table::PortId;
use crate::{Config, Error, Result, commands};

/// Longest request line.
const MAX_LINE: usize = 1 << 20;
/// Most clients of the control socket at once, and most that ask for metrics. One more takes the
/// place of the one that has been silent for longest.
const MAX_CLIENTS: usize = 64;
const MAX_SCRAPERS: usize = 16;
/// How long one that asks for metrics may take, from its connection to its last byte.
const HTTP_PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait when no connection can be taken, so as not to spin meanwhile, and how often
/// that is told.
const PAUSE: Duration = Duration::from_millis(20);
const TELL_EVERY: Duration = Duration::from_secs(10);
/// Most ports that try to connect in a turn, about every 10 ms.
const MOST_ATTEMPTS: usize = 128;
/// How often time goes on.
const TICK: Duration = Duration::from_millis(100);
/// Most events, and most new clients, that are handled in a turn.
const EVENTS: usize = 64;

const FAULT: u64 = 1;
const CONTROL: u64 = 2;
const METRICS: u64 = 3;
const STOP: u64 = 4;
const LINKS: u64 = 5;
const PORT: u64 = 1 << 32;
const CLIENT: u64 = 2 << 32;

trait Stream: Read + Write + AsRawFd + Send {}
impl<T: Read + Write + AsRawFd + Send> Stream for T {}

/// One client: of the control socket, or one that asks for metrics by HTTP.
struct Client {
    stream: Box<dyn Stream>,
    http: bool,
    input: Vec<u8>,
    output: Vec<u8>,
    /// When it last said something; one that asks for metrics, when it came.
    heard: Instant,
    /// Nothing more is read; it ends when `output` is written.
    ending: bool,
    writing: bool,
}

/// The switch with its control socket.
pub struct Server {
    pub switch: Switch,
    epoll: Epoll,
    control: SocketListener,
    metrics: Option<TcpListener>,
    links: LinkMonitor,
    clients: HashMap<u32, Client>,
    next_client: u32,
    /// Clients that have said more than was answered in their last turn.
    unfinished: Vec<u32>,
    /// When it was last told that no connection can be taken, and whether one could not this turn.
    told: Option<Instant>,
    pause: bool,
    /// What is watched for each port.
    watched: HashMap<PortId, RawFd>,
    quit: bool,
}

impl Server {
    /// Starts a switch and listens on `control`.
    ///
    /// # Errors
    /// A sentence that names what cannot be.
    pub fn new(config: &Config, control: &Path) -> Result<Self> {
        let shown = control.display();
        let listener = SocketListener::bind(control).map_err(|e| {
            Error::Config(format!("cannot listen on control socket '{shown}': {e}"))
        })?;
        let metrics = match &config.metrics {
            Some(address) => {
                let l = TcpListener::bind(address).map_err(|e| {
                    Error::Config(format!("metrics: cannot listen on '{address}': {e}"))
                })?;
                l.set_nonblocking(true).map_err(Error::host("metrics"))?;
                Some(l)
            }
            None => None,
        };
        let links = LinkMonitor::new().map_err(Error::host("netlink"))?;
        let switch = Switch::start(config)?;
        let mut server = Self {
            epoll: Epoll::new().map_err(Error::host("epoll"))?,
            control: listener,
            metrics,
            links,
            clients: HashMap::new(),
            next_client: 0,
            unfinished: Vec::new(),
            told: None,
            pause: false,
            watched: HashMap::new(),
            quit: false,
            switch,
        };
        server.watch(server.switch.shared.fault_event.as_raw_fd(), FAULT)?;
        server.watch(server.control.as_raw_fd(), CONTROL)?;
        server.watch(server.links.as_raw_fd(), LINKS)?;
        if let Some(fd) = server.metrics.as_ref().map(AsRawFd::as_raw_fd) {
            server.watch(fd, METRICS)?;
        }
        server.follow_ports();
        Ok(server)
    }

    /// Makes the loop end when `fd` becomes readable (a signal's, say).
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn stop_on(&self, fd: RawFd) -> Result<()> {
        self.watch(fd, STOP)
    }

    fn watch(&self, fd: RawFd, token: u64) -> Result<()> {
        let event = EpollEvent::new(EventSet::IN, token);
        self.epoll.ctl(ControlOperation::Add, fd, event).map_err(Error::host("epoll"))
    }

    /// Runs until asked to stop.
    pub fn run(&mut self) {
        let mut next_tick = Instant::now();
        while !self.quit {
            let now = Instant::now();
            if now >= next_tick {
                next_tick = now + TICK;
                self.tick();
            }
            self.connect_clients();
            let mut wait = next_tick.saturating_duration_since(now);
            if let Some(next) = self.next_attempt() {
                // No sooner than that, for the sake of many ports that wait.
                wait = wait.min(next.saturating_duration_since(now).max(RETRY));
            }
            let mut events = [EpollEvent::default(); EVENTS];
            // Rounded up: a wait of 0 ms would spin until the time has come.
            let ms = if self.unfinished.is_empty() { wait.as_millis() as i32 + 1 } else { 0 };
            let n = self.epoll.wait(ms, &mut events).unwrap_or(0);
            for e in &events[..n] {
                self.event(e.data());
            }
            // One request of each a turn: nobody's many keep others waiting.
            for id in std::mem::take(&mut self.unfinished) {
                self.client(id);
            }
            self.follow_ports();
            if std::mem::take(&mut self.pause) {
                std::thread::sleep(PAUSE);
            }
        }
    }

    fn event(&mut self, token: u64) {
        match token {
            FAULT => {
                for f in self.switch.shared.take_faults() {
                    self.unwatch_port(f.port);
                    self.switch.disconnect(f.port, Some(f.reason));
                }
            }
            CONTROL => self.accept("the control socket", false),
            METRICS => self.accept("the metrics address", true),
            STOP => self.quit = true,
            LINKS => {
                self.links.drain();
                self.switch.look_for_lost_interfaces();
            }
            t if t & CLIENT != 0 => self.client(t as u32),
            t if t & PORT != 0 => self.port(t as u32 as PortId),
            _ => {}
        }
    }

    fn tick(&mut self) {
        self.clients.retain(|_, c| !c.http || c.heard.elapsed() < HTTP_PATIENCE);
        self.switch.tick();
        self.switch.reopen();
        let broken = |p: &Port| match &p.kind {
            Kind::Vhost(VhostPort { link: Link::Connected(c), .. }) => c.broken(),
            _ => None,
        };
        let lost: Vec<_> = self.switch.ports().filter_map(|p| Some((p.id, broken(p)?))).collect();
        for (id, reason) in lost {
            self.unwatch_port(id);
            self.switch.disconnect(id, Some(reason.to_owned()));
        }
    }

    /// When the first of the ports that have nobody to connect to tries again.
    fn next_attempt(&self) -> Option<Instant> {
        let next = |p: &Port| match &p.kind {
            Kind::Vhost(VhostPort { link: Link::Connecting { next, .. }, .. }) => Some(*next),
            _ => None,
        };
        self.switch.ports().filter_map(next).min()
    }

    fn connect_clients(&mut self) {
        let now = Instant::now();
        let due = |(at, port): (usize, &Option<Port>)| match &port.as_ref()?.kind {
            Kind::Vhost(VhostPort { link: Link::Connecting { next, .. }, .. }) if *next <= now => {
                Some((*next, at))
            }
            _ => None,
        };
        let mut due: Vec<_> = self.switch.ports.iter().enumerate().filter_map(due).collect();
        // Those that have waited for longest first: all have their turn.
        due.sort_unstable();
        due.truncate(MOST_ATTEMPTS);
        let mut connected = false;
        for (_, at) in due {
            let Some(p) = &mut self.switch.ports[at] else { continue };
            let Kind::Vhost(v) = &mut p.kind else { continue };
            let Some(stream) = p.spec.path.as_deref().and_then(|path| v.try_connect(path)) else {
                continue;
            };
            match v.attach(stream) {
                Ok(()) => {
                    p.connections += 1;
                    connected = true;
                    p.log(Level::INFO, "connected");
                }
                Err(e) => p.note_reset(e),
            }
        }
        if connected {
            self.follow_ports();
        }
    }

    fn port(&mut self, id: PortId) {
        let Some(port) = self.switch.by_id(id) else { return };
        let Kind::Vhost(v) = &mut port.kind else { return };
        let over = match &mut v.link {
            Link::Connected(c) => {
                let result = c.process();
                let changed = std::mem::take(&mut c.device_mut().changed);
                match result {
                    Ok(()) if changed => {
                        self.switch.publish();
                        None
                    }
                    Ok(()) => None,
                    Err(vhost_user::Error::Disconnected) => Some(None),
                    Err(e) => Some(Some(e.to_string())),
                }
            }
            Link::Listening => {
                let accepted = v.listener.as_ref().map(SocketListener::accept);
                if let Some(Err(e)) = &accepted
                    && e.kind() != io::ErrorKind::WouldBlock
                {
                    let what = format!("port '{}'", port.spec.name);
                    self.cannot_accept(&what, e);
                } else if let Some(Ok(stream)) = accepted {
                    match v.attach(stream) {
                        Ok(()) => {
                            port.connections += 1;
                            port.log(Level::INFO, "connected");
                        }
                        Err(e) => port.note_reset(e),
                    }
                }
                None
            }
            Link::Connecting { .. } => None,
        };
        if let Some(reason) = over {
            self.unwatch_port(id);
            self.switch.disconnect(id, reason);
        }
    }

    fn unwatch_port(&mut self, id: PortId) {
        if let Some(fd) = self.watched.remove(&id) {
            // Closed ones have left by themselves.
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }

    /// Watches what each port waits for now.
    fn follow_ports(&mut self) {
        let wanted: HashMap<PortId, RawFd> = self
            .switch
            .ports()
            .filter_map(|p| match &p.kind {
                Kind::Vhost(v) => v.wait_fd().map(|fd| (p.id, fd)),
                Kind::Interface(_) => None,
            })
            .collect();
        if wanted == self.watched {
            return;
        }
        let old: Vec<PortId> = self.watched.keys().copied().collect();
        for id in old {
            if wanted.get(&id) != self.watched.get(&id) {
                self.unwatch_port(id);
            }
        }
        for (id, fd) in wanted {
            if self.watched.contains_key(&id) {
                continue;
            }
            match self.watch(fd, PORT | u64::from(id)) {
                Ok(()) => {
                    self.watched.insert(id, fd);
                }
                Err(e) => tracing::warn!("port {id}: {e}"),
            }
        }
    }

    /// Takes connections that wait; those that come faster than that have to wait for others' turn.
    fn accept(&mut self, what: &str, http: bool) {
        for _ in 0..EVENTS {
            let accepted = match (&self.metrics, http) {
                (Some(metrics), true) => metrics.accept().and_then(|(s, _)| {
                    s.set_nonblocking(true)?;
                    Ok(Box::new(s) as Box<dyn Stream>)
                }),
                _ => self.control.accept().and_then(|s| {
                    s.set_nonblocking(true)?;
                    Ok(Box::new(s) as Box<dyn Stream>)
                }),
            };
            match accepted {
                Ok(stream) => self.add_client(stream, http),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => return self.cannot_accept(what, &e),
            }
        }
    }

    /// Out of descriptors, most likely: the connection stays in the kernel's queue.
    fn cannot_accept(&mut self, what: &str, e: &io::Error) {
        if self.told.is_none_or(|at| at.elapsed() >= TELL_EVERY) {
            self.told = Some(Instant::now());
            tracing::error!(
                "cannot take a connection on {what}: {e}; a limit on open files (ulimit -n) is \
                 raised before the switch is started"
            );
        }
        self.pause = true;
    }

    fn add_client(&mut self, stream: Box<dyn Stream>, http: bool) {
        let most = if http { MAX_SCRAPERS } else { MAX_CLIENTS };
        let alike = || self.clients.iter().filter(|(_, c)| c.http == http);
        if alike().count() >= most
            && let Some(silent) = alike().min_by_key(|(_, c)| c.heard).map(|(id, _)| *id)
        {
            self.clients.remove(&silent);
        }
        self.next_client = self.next_client.wrapping_add(1);
        let id = self.next_client;
        if self.watch(stream.as_raw_fd(), CLIENT | u64::from(id)).is_ok() {
            self.clients.insert(id, Client::new(stream, http));
        }
    }

    fn client(&mut self, id: u32) {
        let Some(mut client) = self.clients.remove(&id) else { return };
        let alive = self.serve(&mut client) && client.write();
        if !alive {
            return; // closing it takes it off the epoll
        }
        let writing = !client.output.is_empty();
        if writing != client.writing {
            client.writing = writing;
            let set = if writing { EventSet::OUT } else { EventSet::IN };
            let event = EpollEvent::new(set, CLIENT | u64::from(id));
            if self.epoll.ctl(ControlOperation::Modify, client.stream.as_raw_fd(), event).is_err() {
                return;
            }
        }
        if client.has_request() && !client.writing {
            self.unfinished.push(id);
        }
        self.clients.insert(id, client);
    }

    /// Reads, and answers one request. `false`: it has gone, or is not to be listened to.
    fn serve(&mut self, client: &mut Client) -> bool {
        if client.ending || client.writing {
            return true;
        }
        if !client.has_request() {
            let mut chunk = [0; 65_536];
            match client.stream.read(&mut chunk) {
                Ok(0) => return false,
                Ok(n) => client.input.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Err(_) => return false,
            }
            // Who asks for metrics has its time in all, not for each byte.
            if !client.http {
                client.heard = Instant::now();
            }
        }
        if client.http {
            if client.has_request() {
                client.output = commands::http(&self.switch, &client.input);
                client.ending = true;
            }
        } else if let Some(end) = client.input.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = client.input.drain(..=end).collect();
            let (answer, quit) = commands::run(&mut self.switch, &line[..end]);
            self.quit |= quit;
            self.follow_ports();
            client.output.extend_from_slice(answer.as_bytes());
            client.output.push(b'\n');
        }
        client.input.len() <= MAX_LINE
    }
}

impl Client {
    fn new(stream: Box<dyn Stream>, http: bool) -> Self {
        let (input, output, heard) = (Vec::new(), Vec::new(), Instant::now());
        Self { stream, http, input, output, heard, ending: false, writing: false }
    }

    /// Whether what it said holds a whole request.
    fn has_request(&self) -> bool {
        match self.http {
            true => self.input.windows(4).any(|w| w == b"\r\n\r\n"),
            false => self.input.contains(&b'\n'),
        }
    }

    /// Writes what waits, as far as it goes. `false`: the client is done with, or gone.
    fn write(&mut self) -> bool {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(0) => return false,
                Ok(n) => drop(self.output.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        !self.ending
    }
}
