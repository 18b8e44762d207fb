//! The device's side: one [`Connection`] to one front end.
//!
//! Whoever owns a connection polls [`Connection::fd`] for input and calls
//! [`Connection::process`]. After an error, any error, the connection is over: drop it (its rings
//! are stopped then) and accept, or connect, anew.
//!
//! ```text
//!   messages --> RingState: size, addr, kick, ...  --+
//!            --> MemoryTable, dirty log, in-flight --+--> all there: Backend::start_queue
//!            --> features ---------------------------+    one changes: stop_queue, start_queue
//! ```
//! Invariants:
//! - The device has ring `i` if and only if `rings[i].running`.
//! - Guest memory, as the device's rings hold it, is always that of the current table and log:
//!   whatever changes either stops the rings first.
//! - While VHOST_F_LOG_ALL is negotiated, no ring runs without a log.

mod device;
mod handlers;
mod inflight;
mod memory;
mod ring;

pub use device::{Backend, Postcopy};
pub use memory::MAX_SLOTS;

use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mem::{DirtyAlias, DirtyLog, ForeignMapping, GuestMemory};
use virtio::features::{VIRTIO_F_RING_PACKED, has};
use virtio::{InflightQueue, Ring, RingPos, RingSetup};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::lent_event;
use crate::message::{
    BackendId, FrontendId, Incoming, Kind, Message, Payload, VRING_LOG, VringState,
};
use crate::protocol::{self, F_LOG_ALL, F_PROTOCOL_FEATURES};
use crate::socket::Channel;
use crate::{Error, Result};
use inflight::InflightArea;
use memory::MemoryTable;
use ring::{Kick, RingState, base_of};

/// Messages handled by one call of [`Connection::process`].
const BURST: usize = 64;
/// Rings that messages can name (the u8 of SET_VRING_KICK).
const MAX_RINGS: usize = 256;

/// A connection to a front end, and the device that it drives.
pub struct Connection<B: Backend> {
    channel: Channel,
    /// `None` only once it was given back.
    device: Option<B>,
    session: Session,
}

/// What the front end has said so far.
struct Session {
    /// Acknowledged features, with vhost's own.
    features: Option<u64>,
    protocol: u64,
    table: MemoryTable,
    mem: GuestMemory,
    log: Option<Arc<ForeignMapping>>,
    rings: Vec<RingState>,
    inflight: Option<InflightArea>,
    /// For requests of our own.
    requests: Option<Channel>,
    status: u8,
    postcopy: PostcopyState,
    /// The last refusal that did not end the connection.
    warning: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PostcopyState {
    Off,
    Advised,
    Listening,
    /// SET_MEM_TABLE was answered; the front end has to confirm.
    AwaitConfirmation,
}

/// What came of a message.
enum Outcome {
    Done,
    Reply(Payload, Option<OwnedFd>),
    /// Not done. The front end is told if it asks, and all goes on.
    Failed(String),
    /// Not done, and nothing works without it: the end, if the front end does not ask.
    Refused(String),
}

impl<B: Backend> Connection<B> {
    /// Serves `device` to the front end at the other end of `stream`.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking; the device has no rings, or more than 256.
    pub fn new(stream: UnixStream, device: B) -> Result<Self> {
        let channel = Channel::new(stream, Incoming::Requests)?;
        let count = device.max_queues();
        if count == 0 || count > MAX_RINGS {
            let reason = format!("a device has 1 to {MAX_RINGS} rings, not {count}");
            return Err(Error::Device { message: "device", reason });
        }
        let mem = GuestMemory::from_foreign(&[], None).map_err(host)?;
        let session = Session {
            features: None,
            protocol: 0,
            table: MemoryTable::default(),
            mem,
            log: None,
            rings: (0..count).map(|_| RingState::default()).collect(),
            inflight: None,
            requests: None,
            status: 0,
            postcopy: PostcopyState::Off,
            warning: None,
        };
        Ok(Self { channel, device: Some(device), session })
    }

    /// To poll for input.
    pub fn fd(&self) -> RawFd {
        self.channel.fd()
    }

    /// Handles what has come: a bounded number of messages, the rest at the next call. Never waits
    /// for the front end; it may wait for the device to stop a ring.
    ///
    /// # Errors
    /// [`crate::Error::Disconnected`] when the front end has gone; others say what it did wrong.
    pub fn process(&mut self) -> Result<()> {
        for _ in 0..BURST {
            let Some((message, fds)) = self.channel.receive()? else { break };
            self.handle(message, fds)?;
        }
        self.session.drain_answers()?;
        if let Some(reason) = self.broken() {
            return Err(Error::Protocol { message: "session", reason: reason.into() });
        }
        Ok(())
    }

    fn handle(&mut self, message: Message, fds: Vec<OwnedFd>) -> Result<()> {
        let Kind::Request(id) = message.kind else { return Ok(()) };
        let Some(device) = &mut self.device else { return Err(Error::Disconnected) };
        let outcome = self.session.dispatch(device, id, message.payload, fds)?;
        let ack = message.need_reply && self.session.protocol & protocol::REPLY_ACK != 0;
        let (payload, fd) = match outcome {
            Outcome::Reply(payload, fd) => (payload, fd),
            Outcome::Done if ack => (Payload::U64(0), None),
            Outcome::Done => return Ok(()),
            Outcome::Refused(reason) if !ack => {
                return Err(Error::Device { message: id.name(), reason });
            }
            Outcome::Failed(reason) | Outcome::Refused(reason) => {
                self.session.warning = Some(format!("{}: {reason}", id.name()));
                if !ack {
                    return Ok(());
                }
                (Payload::U64(1), None)
            }
        };
        let reply = Message { kind: Kind::Reply(id), need_reply: false, payload };
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        self.channel.send(&reply, &fds)
    }

    /// The device.
    ///
    /// # Panics
    /// Never: it is there until [`into_device`](Self::into_device).
    pub fn device(&self) -> &B {
        self.device.as_ref().expect("given back only with the connection")
    }

    /// The device.
    ///
    /// # Panics
    /// Never: it is there until [`into_device`](Self::into_device).
    pub fn device_mut(&mut self) -> &mut B {
        self.device.as_mut().expect("given back only with the connection")
    }

    /// What the front end did wrong without a word, if it did: drop the connection then. Cheap, and
    /// to be asked now and then.
    pub fn broken(&self) -> Option<&'static str> {
        let s = &self.session;
        let shrunk = s.table.is_broken()
            || s.log.as_ref().is_some_and(|l| l.is_broken())
            || s.inflight.as_ref().is_some_and(InflightArea::is_broken);
        if shrunk {
            Some("memory that it lent has gone: its file was made shorter, or its disk is full")
        } else if s.rings.iter().any(|ring| ring.call.is_blocked()) {
            Some("a call eventfd was made to block while it was in use")
        } else if self.channel.is_stalled() {
            Some("it began a message and did not end it within 5 s")
        } else {
            None
        }
    }

    /// Negotiated virtio features, without vhost's own; `None` before SET_FEATURES.
    pub fn features(&self) -> Option<u64> {
        self.session.features.map(driver_features)
    }

    /// Negotiated protocol features, [`protocol`] bits.
    pub fn protocol_features(&self) -> u64 {
        self.session.protocol
    }

    /// Whether what is written into guest memory is being logged.
    pub fn is_logging(&self) -> bool {
        self.session.is_logging()
    }

    /// Whether ring `index` is with the device.
    pub fn is_running(&self, index: usize) -> bool {
        self.session.rings.get(index).is_some_and(|r| r.running)
    }

    /// Why the last request failed that was answered with a failure; once.
    pub fn take_warning(&mut self) -> Option<String> {
        self.session.warning.take()
    }

    /// Tells the front end that configuration space has changed, if it listens (BACKEND_REQ).
    ///
    /// # Errors
    /// The front end does not read its messages, or has gone.
    pub fn config_changed(&mut self) -> Result<()> {
        self.session.request(BackendId::ConfigChangeMsg, Payload::Empty)
    }

    /// Tells the front end that its driver broke the rules of ring `index`.
    ///
    /// # Errors
    /// The front end does not read its messages, or has gone.
    pub fn ring_failed(&mut self, index: usize) -> Result<()> {
        let Some(ring) = self.session.rings.get_mut(index) else { return Ok(()) };
        if let Some(err) = &ring.err {
            if lent_event::signal(err).is_err() {
                ring.err = None;
            }
            return Ok(());
        }
        if self.session.protocol & protocol::INBAND_NOTIFICATIONS == 0 {
            return Ok(());
        }
        let state = VringState { index: index as u32, num: 0 };
        self.session.request(BackendId::VringErr, Payload::VringState(state))
    }

    /// Stops all rings and gives the device back.
    ///
    /// # Panics
    /// Never.
    pub fn into_device(mut self) -> B {
        let mut device = self.device.take().expect("given back only here");
        self.session.stop_all(&mut device);
        device
    }
}

impl<B: Backend> Drop for Connection<B> {
    fn drop(&mut self) {
        if let Some(device) = &mut self.device {
            self.session.stop_all(device);
        }
    }
}

fn host(e: mem::Error) -> Error {
    Error::Host { what: "guest memory", source: std::io::Error::other(e.to_string()) }
}

/// Features without those that are vhost's own.
fn driver_features(features: u64) -> u64 {
    features & !(F_LOG_ALL | F_PROTOCOL_FEATURES)
}

/// The features that are offered for `device`.
fn offered<B: Backend>(device: &B) -> u64 {
    let log = offered_protocol(device) & protocol::LOG_SHMFD != 0;
    driver_features(device.features()) | F_PROTOCOL_FEATURES | if log { F_LOG_ALL } else { 0 }
}

fn offered_protocol<B: Backend>(device: &B) -> u64 {
    device.protocol_features() & protocol::POSSIBLE
}

fn broken(id: FrontendId, reason: String) -> Error {
    Error::Protocol { message: id.name(), reason }
}

impl Session {
    fn packed(&self) -> bool {
        has(self.features.unwrap_or(0), VIRTIO_F_RING_PACKED)
    }

    fn wants_log(&self) -> bool {
        self.features.unwrap_or(0) & F_LOG_ALL != 0
    }

    fn is_logging(&self) -> bool {
        self.wants_log() && self.log.is_some()
    }

    /// Stops the running rings and remembers where they stood.
    fn pause<B: Backend>(&mut self, device: &mut B) {
        for (index, ring) in self.rings.iter_mut().enumerate() {
            if std::mem::take(&mut ring.running) {
                ring.resume = device.stop_queue(index);
            }
        }
    }

    /// Stops all rings for good.
    fn stop_all<B: Backend>(&mut self, device: &mut B) {
        for index in 0..self.rings.len() {
            if self.rings[index].running {
                self.stop(device, index);
            }
        }
        self.rings.iter_mut().for_each(RingState::reset);
    }

    /// Makes guest memory of the current table and log. No ring runs.
    fn rebuild(&mut self, id: FrontendId) -> Result<()> {
        let log = self.log.clone().filter(|_| self.wants_log());
        let log = log.map(|mapping| DirtyLog::new(mapping, self.aliases()));
        let mem = GuestMemory::from_foreign(&self.table.regions(), log);
        self.mem = mem.map_err(|e| broken(id, e.to_string()))?;
        Ok(())
    }

    /// Used rings whose log address is not their guest address.
    fn aliases(&self) -> Vec<DirtyAlias> {
        let alias = |ring: &RingState| {
            let (addr, size) = (ring.addr?, ring.size?);
            let gpa = self.table.translate(addr.used)?;
            let len = if self.packed() { 4 } else { 6 + 8 * u64::from(size) };
            let other = addr.flags & VRING_LOG != 0 && addr.log != gpa;
            other.then_some(DirtyAlias { gpa, len, log: addr.log })
        };
        self.rings.iter().filter_map(alias).collect()
    }

    /// Starts every ring that is wanted and has all it needs. `strict`: one whose addresses are not
    /// in memory is an error, else it waits.
    fn resume<B: Backend>(&mut self, device: &mut B, id: FrontendId, strict: bool) -> Result<()> {
        for index in 0..self.rings.len() {
            self.start(device, index, id, strict)?;
        }
        Ok(())
    }

    fn start<B: Backend>(
        &mut self,
        device: &mut B,
        index: usize,
        id: FrontendId,
        strict: bool,
    ) -> Result<()> {
        let ring = &self.rings[index];
        let there = ring.is_wanted() && !ring.running && !self.table.is_empty();
        if !there || self.features.is_none() || self.wants_log() && self.log.is_none() {
            return Ok(());
        }
        let mut setup = match self.setup(index) {
            Ok(Some(setup)) => setup,
            Ok(None) => return Ok(()),
            Err(_) if !strict => return Ok(()),
            Err(reason) => return Err(broken(id, format!("ring {index}: {reason}"))),
        };
        let ring_error = |reason: String| broken(id, format!("ring {index}: {reason}"));
        let packed = self.packed();
        let inflight = match &self.inflight {
            Some(area) => {
                let (table, pos) = area.open(index, packed, &setup).map_err(ring_error)?;
                setup.pos = Some(pos);
                Some(table)
            }
            None => None,
        };
        // Sizes, alignments and positions are wrong here, where the front end can be told.
        Ring::new(&setup).map_err(|e| ring_error(e.to_string()))?;
        self.hand_over(device, index, setup, inflight, id)
    }

    fn hand_over<B: Backend>(
        &mut self,
        device: &mut B,
        index: usize,
        setup: RingSetup,
        inflight: Option<InflightQueue>,
        id: FrontendId,
    ) -> Result<()> {
        let ring = &mut self.rings[index];
        device.set_polled(index, matches!(ring.kick, Kick::Polled));
        device.start_queue(index, setup, inflight).map_err(|reason| Error::Device {
            message: id.name(),
            reason: format!("ring {index}: {reason}"),
        })?;
        ring.running = true;
        ring.resume = None;
        if ring.enabled {
            device.set_enabled(index, true);
        }
        Ok(())
    }

    /// The ring as the device wants it; `None` if something was not told yet.
    fn setup(&self, index: usize) -> std::result::Result<Option<RingSetup>, String> {
        let ring = &self.rings[index];
        let (Some(size), Some(addr)) = (ring.size, ring.addr) else { return Ok(None) };
        let find = |what: &str, user: u64| {
            let missing = || format!("the {what} at user address {user:#x} is not in memory");
            self.table.translate(user).ok_or_else(missing)
        };
        let desc = find("descriptor area", addr.descriptor)?;
        let avail = find("available ring", addr.available)?;
        let used = find("used ring", addr.used)?;
        let new = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let kick = match &ring.kick {
            Kick::Fd(fd) => fd.try_clone(),
            Kick::Polled | Kick::Unset => new(),
        };
        let kick = kick.map_err(|e| format!("no descriptor for its kick: {e}"))?;
        let pos = match ring.resume {
            Some(pos) => pos,
            None => self.position(ring.base, used)?,
        };
        Ok(Some(RingSetup {
            mem: self.mem.clone(),
            size,
            desc,
            avail,
            used,
            features: driver_features(self.features.unwrap_or(0)),
            pos: Some(pos),
            kick,
            call: ring.call.clone(),
        }))
    }

    /// Where a ring goes on that SET_VRING_BASE set to `base`.
    ///
    /// A split ring's used index says itself how far the device came; a base ahead of that would
    /// lose what was in flight when an earlier back end died. A packed ring has no such index.
    fn position(&self, base: u32, used: u64) -> std::result::Result<RingPos, String> {
        if self.packed() {
            // Some front ends leave the upper half, the used position, empty.
            return Ok(RingPos { avail: base as u16, used: base as u16 });
        }
        let at = used.checked_add(2);
        let used = at.and_then(|at| self.mem.load_u16(at, Ordering::Acquire).ok());
        let used = used.ok_or("the used ring is not in memory, or not aligned")?;
        Ok(RingPos { avail: used, used })
    }

    /// Stops ring `index` for good; what GET_VRING_BASE is answered with.
    fn stop<B: Backend>(&mut self, device: &mut B, index: usize) -> u32 {
        let packed = self.packed();
        let ring = &mut self.rings[index];
        let stopped =
            if std::mem::take(&mut ring.running) { device.stop_queue(index) } else { None };
        let pos = stopped.or(ring.resume.take());
        let pos = pos.or_else(|| self.setup(index).ok().flatten().and_then(|s| s.pos));
        let ring = &mut self.rings[index];
        ring.kick = Kick::Unset;
        ring.resume = None;
        if let Some(pos) = pos {
            ring.base = base_of(pos, packed);
        }
        ring.base
    }

    /// Sends a request of our own, if the front end listens.
    fn request(&mut self, id: BackendId, payload: Payload) -> Result<()> {
        let Some(channel) = &self.requests else { return Ok(()) };
        let message = Message { kind: Kind::BackendRequest(id), need_reply: false, payload };
        channel.send(&message, &[])
    }

    /// Reads what the front end says to requests that did not ask for an answer: nothing is
    /// expected. A closed channel is given up.
    fn drain_answers(&mut self) -> Result<()> {
        let Some(channel) = &mut self.requests else { return Ok(()) };
        for _ in 0..BURST {
            match channel.receive() {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                Err(Error::Disconnected) => {
                    self.requests = None;
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}
