//! A port as the control thread has it: its configuration, what is behind it, and its history.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::Level;
use vhost_user::Connection;

use crate::capture::Capture;
use crate::config::{Mode, PortSpec};
use crate::counters::{QueueCounters, Totals};
use crate::interface_port::InterfacePort;
use crate::limit::Limiter;
use crate::socket_listener::SocketListener;
use crate::table::{PortId, PortView};
use crate::vhost_port::VhostDevice;
use crate::{Error, Result, sys};

/// How soon a lost peer is tried again: while the loss is fresh, later, and when it is old.
pub const RETRY: Duration = Duration::from_millis(10);
const LATER: Duration = Duration::from_millis(25);
const SELDOM: Duration = Duration::from_millis(200);
const FRESH: Duration = Duration::from_secs(10);
const OLD: Duration = Duration::from_secs(60);
/// A port has at most so many lines in the log in so long.
const LOG_BURST: u32 = 4;
const LOG_EVERY: Duration = Duration::from_secs(1);

/// The socket side of a vhost-user port.
pub enum Link {
    /// The switch listens, nobody is there.
    Listening,
    /// The switch tries to connect.
    Connecting { since: Instant, next: Instant },
    /// There is a front end.
    Connected(Box<Connection<VhostDevice>>),
}

/// What a vhost-user port keeps.
pub struct VhostPort {
    pub(crate) listener: Option<SocketListener>,
    pub link: Link,
    /// The device, while no connection has it.
    pub device: Option<VhostDevice>,
    /// Why it could not connect when it last tried.
    pub refused: Option<String>,
}

/// What is behind a port.
pub enum Kind {
    Vhost(VhostPort),
    Interface(InterfacePort),
}

/// One port.
pub struct Port {
    pub id: PortId,
    pub spec: PortSpec,
    pub kind: Kind,
    /// The poll thread of each queue.
    pub threads: Vec<u16>,
    pub counters: Vec<Arc<QueueCounters>>,
    pub rate: Option<Arc<Limiter>>,
    pub storm: Option<Arc<Limiter>>,
    pub captures: Vec<Capture>,
    /// Connections made, and how often the port was reset because the other side broke rules.
    pub connections: u64,
    pub resets: u64,
    pub last_reset: Option<String>,
    /// The beginning of the second that lines are counted in, how many it had, and how many were
    /// left out since the last.
    last_log: Option<Instant>,
    logged: u32,
    hushed: u64,
}

impl Port {
    /// A port that is not yet connected to anything.
    pub fn new(id: PortId, spec: PortSpec, kind: Kind, threads: Vec<u16>) -> Self {
        let counters = threads.iter().map(|_| Arc::default()).collect();
        let mut port = Self {
            id,
            spec,
            kind,
            threads,
            counters,
            rate: None,
            storm: None,
            captures: Vec::new(),
            connections: 0,
            resets: 0,
            last_reset: None,
            last_log: None,
            logged: 0,
            hushed: 0,
        };
        port.apply_limits();
        port
    }

    /// Makes its limiters anew from its configuration.
    pub fn apply_limits(&mut self) {
        // As deep as 10 ms, and at least a large segment; a storm's as a tenth of a second.
        let rate = |r: u64| Arc::new(Limiter::new(r, (r / 100).max(8 * 65_550)));
        let storm = |r: u64| Arc::new(Limiter::new(r, (r / 10).max(1)));
        self.rate = self.spec.rate.map(rate);
        self.storm = self.spec.storm.map(storm);
    }

    /// As poll threads see it; mirrors are filled in by the caller.
    pub fn view(&self) -> PortView {
        let tx_owners = match &self.kind {
            Kind::Vhost(v) => v.device().map(VhostDevice::tx_owners).unwrap_or_default(),
            Kind::Interface(i) if i.down.is_some() => Vec::new(),
            Kind::Interface(_) => {
                self.threads.iter().enumerate().map(|(i, t)| (*t, i as u16)).collect()
            }
        };
        PortView {
            name: self.spec.name.clone(),
            vlans: self.spec.vlans(),
            max_frame: self.spec.mtu.map_or(u32::MAX - 4, |m| u32::from(m) + 14),
            rate: self.rate.clone(),
            storm: self.storm.clone(),
            captures: self.captures.iter().map(|c| c.tap.clone()).collect(),
            tx_owners,
            ..PortView::default()
        }
    }

    /// Sums over its queues.
    pub fn totals(&self) -> Totals {
        let mut t = Totals::default();
        self.counters.iter().for_each(|c| t.add(&c.snapshot()));
        t
    }

    /// Whether there is somebody at the other end.
    pub fn is_connected(&self) -> bool {
        match &self.kind {
            Kind::Vhost(v) => matches!(v.link, Link::Connected(_)),
            Kind::Interface(i) => i.down.is_none(),
        }
    }

    /// Notes that the other side broke the rules.
    pub fn note_reset(&mut self, reason: String) {
        self.resets += 1;
        self.log(Level::WARN, &format!("is reset: {reason}"));
        self.last_reset = Some(reason);
    }

    /// Logs what became of the port, but not at any rate that its other side likes.
    pub fn log(&mut self, level: Level, what: &str) {
        let name = &self.spec.name;
        if self.last_log.is_some_and(|at| at.elapsed() < LOG_EVERY) && self.logged >= LOG_BURST {
            self.hushed += 1;
            return;
        }
        if self.last_log.is_none_or(|at| at.elapsed() >= LOG_EVERY) {
            (self.last_log, self.logged) = (Some(Instant::now()), 0);
        }
        self.logged += 1;
        let more = match std::mem::take(&mut self.hushed) {
            0 => String::new(),
            n => format!(" ({n} lines before this one were left out)"),
        };
        match level {
            Level::WARN => tracing::warn!("port '{name}' {what}{more}"),
            _ => tracing::info!("port '{name}' {what}{more}"),
        }
    }
}

impl VhostPort {
    /// Opens the port's socket; in server mode it listens from now on.
    ///
    /// # Errors
    /// When the socket's path cannot be used.
    pub fn new(spec: &PortSpec, device: VhostDevice) -> Result<Self> {
        let now = Instant::now();
        let server = spec.mode.unwrap_or_default() == Mode::Server;
        let listener = match &spec.path {
            Some(path) if server => Some(SocketListener::bind(path).map_err(|e| Error::Port {
                port: spec.name.clone(),
                reason: format!("cannot listen on '{}': {e}", path.display()),
            })?),
            _ => None,
        };
        let link =
            if server { Link::Listening } else { Link::Connecting { since: now, next: now } };
        Ok(Self { listener, link, device: Some(device), refused: None })
    }

    /// The device, whoever has it.
    pub fn device(&self) -> Option<&VhostDevice> {
        match &self.link {
            Link::Connected(c) => Some(c.device()),
            _ => self.device.as_ref(),
        }
    }

    /// The device, whoever has it.
    pub fn device_mut(&mut self) -> Option<&mut VhostDevice> {
        match &mut self.link {
            Link::Connected(c) => Some(c.device_mut()),
            _ => self.device.as_mut(),
        }
    }

    /// The fd to wait for: the connection's, or the listener's while there is none.
    pub fn wait_fd(&self) -> Option<RawFd> {
        match &self.link {
            Link::Connected(c) => Some(c.fd()),
            Link::Listening => self.listener.as_ref().map(AsRawFd::as_raw_fd),
            Link::Connecting { .. } => None,
        }
    }

    /// Takes a stream up. `Err` gives no connection, with a sentence.
    pub fn attach(&mut self, stream: UnixStream) -> std::result::Result<(), String> {
        let Some(device) = self.device.take() else { return Err("it has a connection".into()) };
        let (shared, port, threads) = device.parts();
        match Connection::new(stream, device) {
            Ok(c) => {
                self.link = Link::Connected(Box::new(c));
                Ok(())
            }
            Err(e) => {
                self.device = Some(VhostDevice::new(shared, port, threads));
                Err(e.to_string())
            }
        }
    }

    /// Ends the connection: its rings are stopped when this returns.
    pub fn detach(&mut self) {
        let now = Instant::now();
        let next = if self.listener.is_some() {
            Link::Listening
        } else {
            Link::Connecting { since: now, next: now + RETRY }
        };
        if let Link::Connected(c) = std::mem::replace(&mut self.link, next) {
            let mut device = c.into_device();
            device.changed = true;
            self.device = Some(device);
        }
    }

    /// Tries to connect, if it is time. `None`: nothing came of it.
    pub fn try_connect(&mut self, path: &Path) -> Option<UnixStream> {
        let Link::Connecting { since, next } = &mut self.link else { return None };
        let now = Instant::now();
        if now < *next {
            return None;
        }
        *next = now
            + match now - *since {
                lost if lost < FRESH => RETRY,
                lost if lost < OLD => LATER,
                _ => SELDOM,
            };
        let connected = sys::connect_now(path);
        self.refused = connected.as_ref().err().map(ToString::to_string);
        connected.ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use tracing::span::{Attributes, Id, Record};
    use tracing::{Event, Metadata, Subscriber};

    use super::*;

    /// Counts lines.
    #[derive(Clone, Default)]
    struct Lines(Arc<AtomicU32>);

    impl Subscriber for Lines {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }

        fn new_span(&self, _: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }

        fn record(&self, _: &Id, _: &Record<'_>) {}

        fn record_follows_from(&self, _: &Id, _: &Id) {}

        fn event(&self, _: &Event<'_>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }

        fn enter(&self, _: &Id) {}

        fn exit(&self, _: &Id) {}
    }

    #[test]
    fn the_other_side_does_not_decide_how_long_the_log_is() {
        let spec = PortSpec::parse("x,type=vhost-user,path=/none,mode=client").unwrap();
        let link = Link::Listening;
        let vhost = VhostPort { listener: None, link, device: None, refused: None };
        let mut port = Port::new(0, spec, Kind::Vhost(vhost), vec![0]);
        let lines = Lines::default();
        tracing::subscriber::with_default(lines.clone(), || {
            let start = Instant::now();
            for _ in 0..1000 {
                port.log(Level::INFO, "connected");
                port.note_reset("it lied".into());
            }
            let seconds = start.elapsed().as_secs() as u32 + 1;
            assert!(lines.0.load(Ordering::Relaxed) <= seconds * LOG_BURST);
        });
        assert!(port.hushed >= 1000);
        assert_eq!(port.resets, 1000);
    }
}
