//! The VM's side: sets a device in another process up, and sets it up again when that process was
//! restarted.
//!
//! ```text
//!   connect -> negotiate -> set_features -> set_memory -> start_ring ... -> enable_ring ...
//!                                                           stop_ring -> where it stands
//!   the back end went: reconnect = all of that again, from what was noted here
//! ```
//! Calls wait for the back end, up to the timeout given at the start. After an error other than
//! [`Error::Device`], only [`Frontend::reconnect`] makes sense.

mod dirty;
mod replay;

pub use dirty::PageLog;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mem::GuestMemory;
use virtio::features::{VIRTIO_F_RING_PACKED, has};
use virtio::{RingPos, RingSetup};
use vmm_sys_util::eventfd::EventFd;

use crate::message::{
    BackendId, Config, FrontendId, Incoming, Inflight, Kind, LogArea, MAX_TABLE_REGIONS, MemRegion,
    Message, Payload, VRING_LOG, VringAddr, VringFd, VringState,
};
use crate::protocol::{self, F_LOG_ALL, F_PROTOCOL_FEATURES};
use crate::socket::Channel;
use crate::{Error, Result};

/// Protocol features that a front end makes use of.
const USED: u64 = protocol::POSSIBLE;

/// What a back end offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Virtio and ring features, without vhost's own.
    pub features: u64,
    /// Whether it can log what it writes.
    pub can_log: bool,
    /// Protocol features that are in use from now on.
    pub protocol: u64,
    /// What GET_QUEUE_NUM says: queue pairs of a NIC, queues of a disk. 1 without MQ.
    pub queues: u64,
}

/// What the back end tells or asks by itself.
#[derive(Debug)]
pub enum Event {
    /// Configuration space has changed.
    ConfigChanged,
    /// The driver broke the rules of this ring.
    RingFailed(u32),
}

/// A connection to a back end.
pub struct Frontend {
    channel: Channel,
    timeout: Duration,
    /// The back end's own requests.
    requests: Option<Channel>,
    protocol: u64,
    can_log: bool,
    noted: Noted,
}

/// What was set up, to do it again.
#[derive(Default)]
struct Noted {
    wanted_protocol: u64,
    features: Option<u64>,
    mem: Option<GuestMemory>,
    rings: Vec<Option<NotedRing>>,
    inflight: Option<(Inflight, OwnedFd)>,
    log: Option<Arc<PageLog>>,
    mtu: Option<u16>,
    status: Option<u8>,
}

struct NotedRing {
    size: u16,
    addr: VringAddr,
    base: u32,
    kick: EventFd,
    call: Option<EventFd>,
    enabled: bool,
}

impl Frontend {
    /// Connects to the back end that listens at `path`; no answer may take longer than `timeout`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self> {
        let stream = UnixStream::connect(path);
        let stream = stream.map_err(|source| Error::Host { what: "cannot connect", source })?;
        Self::new(stream, timeout)
    }

    /// Speaks to the back end at the other end of `stream`, connected or accepted.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking.
    pub fn new(stream: UnixStream, timeout: Duration) -> Result<Self> {
        Ok(Self {
            channel: Channel::new(stream, Incoming::Replies)?,
            timeout,
            requests: None,
            protocol: 0,
            can_log: false,
            noted: Noted::default(),
        })
    }

    /// To poll for the end of the connection.
    pub fn fd(&self) -> RawFd {
        self.channel.fd()
    }

    /// To poll for [`next_event`](Self::next_event), if the back end can send any.
    pub fn events_fd(&self) -> Option<RawFd> {
        self.requests.as_ref().map(Channel::fd)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    fn transmit(
        &self,
        id: FrontendId,
        payload: Payload,
        need_reply: bool,
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        let message = Message { kind: Kind::Request(id), need_reply, payload };
        self.channel.send_until(&message, fds, Some(self.deadline()))
    }

    /// Waits for the answer to `id`.
    fn answer(&mut self, id: FrontendId) -> Result<(Payload, Vec<OwnedFd>)> {
        let deadline = self.deadline();
        let (message, fds) = self.channel.receive_until(deadline)?;
        if message.kind != Kind::Reply(id) {
            let reason = format!("the answer was to {}", message.kind.name());
            return Err(Error::Protocol { message: id.name(), reason });
        }
        Ok((message.payload, fds))
    }

    /// Sends what has an answer of its own.
    fn ask(&mut self, id: FrontendId, payload: Payload) -> Result<(Payload, Vec<OwnedFd>)> {
        self.transmit(id, payload, false, &[])?;
        self.answer(id)
    }

    fn ask_u64(&mut self, id: FrontendId) -> Result<u64> {
        match self.ask(id, Payload::Empty)?.0 {
            Payload::U64(v) => Ok(v),
            _ => Err(unexpected(id)),
        }
    }

    /// Sends what has no answer of its own; with REPLY_ACK waits to hear that it worked.
    fn tell(&mut self, id: FrontendId, payload: Payload, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let ack = self.protocol & protocol::REPLY_ACK != 0;
        self.transmit(id, payload, ack, fds)?;
        if !ack {
            return Ok(());
        }
        match self.answer(id)?.0 {
            Payload::U64(0) => Ok(()),
            Payload::U64(n) => {
                let reason = format!("the back end failed to do it (code {n})");
                Err(Error::Device { message: id.name(), reason })
            }
            _ => Err(unexpected(id)),
        }
    }

    fn need(&self, bit: u64, id: FrontendId, name: &str) -> Result<()> {
        if self.protocol & bit != 0 {
            return Ok(());
        }
        let reason = format!("the back end does not have protocol feature {name}");
        Err(Error::Device { message: id.name(), reason })
    }

    /// Finds out what the back end offers, and settles on those of `wanted` protocol features that
    /// it has. First of all.
    ///
    /// # Errors
    /// The back end does not answer, or nonsense.
    pub fn negotiate(&mut self, wanted: u64) -> Result<Offer> {
        self.noted.wanted_protocol = wanted;
        let offered = self.ask_u64(FrontendId::GetFeatures)?;
        self.transmit(FrontendId::SetOwner, Payload::Empty, false, &[])?;
        let mut queues = 1;
        self.protocol = 0;
        self.requests = None;
        if offered & F_PROTOCOL_FEATURES != 0 {
            let theirs = self.ask_u64(FrontendId::GetProtocolFeatures)?;
            let protocol = theirs & wanted & USED;
            let id = FrontendId::SetProtocolFeatures;
            self.transmit(id, Payload::U64(protocol), false, &[])?;
            self.protocol = protocol;
            if protocol & protocol::MQ != 0 {
                queues = self.ask_u64(FrontendId::GetQueueNum)?;
            }
            if protocol & protocol::BACKEND_REQ != 0 {
                self.open_requests()?;
            }
        }
        self.can_log = offered & F_LOG_ALL != 0 && self.protocol & protocol::LOG_SHMFD != 0;
        Ok(Offer {
            features: offered & !(F_LOG_ALL | F_PROTOCOL_FEATURES),
            can_log: self.can_log,
            protocol: self.protocol,
            queues,
        })
    }

    fn open_requests(&mut self) -> Result<()> {
        let pair = UnixStream::pair();
        let (ours, theirs) = pair.map_err(|source| Error::Host { what: "socket pair", source })?;
        self.tell(FrontendId::SetBackendReqFd, Payload::Empty, &[theirs.as_fd()])?;
        self.requests = Some(Channel::new(ours, Incoming::BackendRequests)?);
        Ok(())
    }

    /// Tells the features that the driver accepted, by bit, before rings start.
    ///
    /// # Errors
    /// The back end is gone or refuses.
    pub fn set_features(&mut self, features: u64) -> Result<()> {
        self.noted.features = Some(features);
        self.send_features()
    }

    fn send_features(&mut self) -> Result<()> {
        let Some(mut features) = self.noted.features else { return Ok(()) };
        if self.protocol != 0 {
            features |= F_PROTOCOL_FEATURES;
        }
        if self.noted.log.is_some() {
            features |= F_LOG_ALL;
        }
        self.tell(FrontendId::SetFeatures, Payload::U64(features), &[])
    }

    /// Lends the guest's memory, all of which has to be shareable.
    ///
    /// # Errors
    /// [`Error::Device`] if it is not, or has too many regions.
    pub fn set_memory(&mut self, mem: &GuestMemory) -> Result<()> {
        let id = FrontendId::SetMemTable;
        let wrong = |reason: String| Error::Device { message: id.name(), reason };
        let mut table = Vec::new();
        let mut files = Vec::new();
        for r in mem.regions() {
            let why = "guest memory is not shareable; use a memory backend with share=on";
            let (file, mmap_offset) = r.file.as_ref().ok_or_else(|| wrong(why.into()))?;
            table.push(MemRegion {
                guest_addr: r.gpa,
                size: r.size,
                user_addr: r.host as u64,
                mmap_offset: *mmap_offset,
            });
            files.push(file.as_fd());
        }
        if table.len() <= MAX_TABLE_REGIONS {
            self.tell(id, Payload::MemTable(table), &files)?;
        } else {
            self.need(protocol::CONFIGURE_MEM_SLOTS, id, "CONFIGURE_MEM_SLOTS")?;
            if self.noted.mem.is_some() {
                return Err(wrong("many regions are added and removed one by one".into()));
            }
            for (region, file) in table.into_iter().zip(files) {
                self.add_region(region, file)?;
            }
        }
        self.noted.mem = Some(mem.clone());
        Ok(())
    }

    /// How many regions of memory the back end can have; 8 without CONFIGURE_MEM_SLOTS.
    ///
    /// # Errors
    /// The back end is gone.
    pub fn max_mem_slots(&mut self) -> Result<u64> {
        if self.protocol & protocol::CONFIGURE_MEM_SLOTS == 0 {
            return Ok(MAX_TABLE_REGIONS as u64);
        }
        self.ask_u64(FrontendId::GetMaxMemSlots)
    }

    /// Lends one more region, whose bytes are in `file`. It is not noted for
    /// [`reconnect`](Self::reconnect): tell the whole memory there.
    ///
    /// # Errors
    /// The back end refuses or has not the protocol feature CONFIGURE_MEM_SLOTS.
    pub fn add_region(&mut self, region: MemRegion, file: BorrowedFd<'_>) -> Result<()> {
        let id = FrontendId::AddMemReg;
        self.need(protocol::CONFIGURE_MEM_SLOTS, id, "CONFIGURE_MEM_SLOTS")?;
        self.tell(id, Payload::MemRegion(region), &[file])
    }

    /// Takes a region back.
    ///
    /// # Errors
    /// As [`add_region`](Self::add_region).
    pub fn remove_region(&mut self, region: MemRegion) -> Result<()> {
        let id = FrontendId::RemMemReg;
        self.need(protocol::CONFIGURE_MEM_SLOTS, id, "CONFIGURE_MEM_SLOTS")?;
        self.tell(id, Payload::MemRegion(region), &[])
    }

    /// Has the back end keep its in-flight tables for `rings` rings of up to `size` entries in
    /// memory that outlives it. After [`set_features`](Self::set_features), before rings start.
    ///
    /// # Errors
    /// The back end has not the protocol feature INFLIGHT_SHMFD, or no memory.
    pub fn track_inflight(&mut self, rings: u16, size: u16) -> Result<()> {
        let id = FrontendId::GetInflightFd;
        self.need(protocol::INFLIGHT_SHMFD, id, "INFLIGHT_SHMFD")?;
        let wish = Inflight { mmap_size: 0, mmap_offset: 0, num_queues: rings, queue_size: size };
        let (payload, fds) = self.ask(id, Payload::Inflight(wish))?;
        let (Payload::Inflight(area), Some(fd)) = (payload, fds.into_iter().next()) else {
            return Err(unexpected(id));
        };
        let area = Inflight { num_queues: rings, queue_size: size, ..area };
        self.noted.inflight = Some((area, fd));
        self.send_inflight()
    }

    fn send_inflight(&mut self) -> Result<()> {
        let Some((area, fd)) = self.noted.inflight.take() else { return Ok(()) };
        let sent = self.tell(FrontendId::SetInflightFd, Payload::Inflight(area), &[fd.as_fd()]);
        self.noted.inflight = Some((area, fd));
        sent
    }

    /// Gives ring `index` over, disabled unless there are no protocol features. `setup.mem` is the
    /// memory of [`set_memory`](Self::set_memory).
    ///
    /// # Errors
    /// The back end refuses or is gone; an address is not in memory.
    pub fn start_ring(&mut self, index: u8, setup: &RingSetup) -> Result<()> {
        let id = FrontendId::SetVringAddr;
        let host = |what: &str, gpa: u64| {
            let slice = setup.mem.slice(gpa, 1);
            slice
                .map(|s| s.as_ptr() as u64)
                .map_err(|e| Error::Device { message: id.name(), reason: format!("{what}: {e}") })
        };
        let addr = VringAddr {
            index: index.into(),
            flags: 0,
            descriptor: host("descriptor area", setup.desc)?,
            used: host("used ring", setup.used)?,
            available: host("available ring", setup.avail)?,
            log: setup.used,
        };
        let packed = has(setup.features, VIRTIO_F_RING_PACKED);
        let start = if packed { RingPos::PACKED_START } else { RingPos::SPLIT_START };
        let pos = setup.pos.unwrap_or(start);
        let base = if packed {
            u32::from(pos.avail) | u32::from(pos.used) << 16
        } else {
            pos.avail.into()
        };
        let kick = setup.kick.try_clone();
        let kick = kick.map_err(|source| Error::Host { what: "a kick's descriptor", source })?;
        let call = setup.call.eventfd();
        let ring = NotedRing { size: setup.size, addr, base, kick, call, enabled: false };
        let at = usize::from(index);
        if self.noted.rings.len() <= at {
            self.noted.rings.resize_with(at + 1, || None);
        }
        self.noted.rings[at] = Some(ring);
        self.send_ring(index)
    }

    fn send_ring(&mut self, index: u8) -> Result<()> {
        use FrontendId::*;
        let logging = self.noted.log.is_some();
        let Some(Some(ring)) = self.noted.rings.get(usize::from(index)) else { return Ok(()) };
        let clone = |fd: &EventFd| {
            fd.try_clone().map_err(|source| Error::Host { what: "a ring's descriptor", source })
        };
        let (kick, call) = (clone(&ring.kick)?, ring.call.as_ref().map(clone).transpose()?);
        let (size, base) = (ring.size, ring.base);
        let addr = VringAddr { flags: if logging { VRING_LOG } else { 0 }, ..ring.addr };
        let state = |num| Payload::VringState(VringState { index: index.into(), num });
        let fd = |has_fd| Payload::VringFd(VringFd { index, has_fd });
        self.tell(SetVringNum, state(size.into()), &[])?;
        self.tell(SetVringBase, state(base), &[])?;
        self.tell(SetVringAddr, Payload::VringAddr(addr), &[])?;
        let calls: Vec<_> = call.iter().map(borrow).collect();
        self.tell(SetVringCall, fd(call.is_some()), &calls)?;
        self.tell(SetVringKick, fd(true), &[borrow(&kick)])
    }

    /// Enables or disables ring `index`. Without protocol features rings are always enabled.
    ///
    /// # Errors
    /// The back end refuses or is gone.
    pub fn enable_ring(&mut self, index: u8, enabled: bool) -> Result<()> {
        if let Some(Some(ring)) = self.noted.rings.get_mut(usize::from(index)) {
            ring.enabled = enabled;
        }
        if self.protocol == 0 {
            return Ok(());
        }
        let state = VringState { index: index.into(), num: enabled.into() };
        self.tell(FrontendId::SetVringEnable, Payload::VringState(state), &[])
    }

    /// Takes ring `index` back: nothing is in flight, and the back end is at the position returned.
    ///
    /// # Errors
    /// The back end is gone.
    pub fn stop_ring(&mut self, index: u8) -> Result<RingPos> {
        let id = FrontendId::GetVringBase;
        let state = VringState { index: index.into(), num: 0 };
        let Payload::VringState(VringState { num, .. }) =
            self.ask(id, Payload::VringState(state))?.0
        else {
            return Err(unexpected(id));
        };
        if let Some(ring) = self.noted.rings.get_mut(usize::from(index)) {
            *ring = None;
        }
        let packed = has(self.noted.features.unwrap_or(0), VIRTIO_F_RING_PACKED);
        // A split ring that stopped has nothing in flight: it used what it took.
        let used = if packed { (num >> 16) as u16 } else { num as u16 };
        Ok(RingPos { avail: num as u16, used })
    }

    /// Asks the device to announce the guest's new place in the network.
    ///
    /// # Errors
    /// The back end has not the protocol feature RARP.
    pub fn send_rarp(&mut self, mac: [u8; 6]) -> Result<()> {
        let id = FrontendId::SendRarp;
        self.need(protocol::RARP, id, "RARP")?;
        let [a, b, c, d, e, f] = mac;
        self.tell(id, Payload::U64(u64::from_ne_bytes([a, b, c, d, e, f, 0, 0])), &[])
    }

    /// Tells the MTU that the guest was told, bytes.
    ///
    /// # Errors
    /// The back end refuses, or has not the protocol feature MTU.
    pub fn set_mtu(&mut self, mtu: u16) -> Result<()> {
        let id = FrontendId::NetSetMtu;
        self.need(protocol::MTU, id, "MTU")?;
        self.tell(id, Payload::U64(mtu.into()), &[])?;
        self.noted.mtu = Some(mtu);
        Ok(())
    }

    /// Reads `len` bytes (at most 256 with the offset) of configuration space.
    ///
    /// # Errors
    /// The back end cannot, or has not the protocol feature CONFIG.
    pub fn get_config(&mut self, offset: u32, len: u32) -> Result<Vec<u8>> {
        let id = FrontendId::GetConfig;
        self.need(protocol::CONFIG, id, "CONFIG")?;
        let len = len.min(crate::message::MAX_CONFIG);
        let wish = Config { offset, size: len, flags: 0, data: vec![0; len as usize] };
        match self.ask(id, Payload::Config(wish))?.0 {
            Payload::Config(c) if c.data.len() == len as usize => Ok(c.data),
            Payload::Config(_) => {
                let reason = "the back end has no configuration there".into();
                Err(Error::Device { message: id.name(), reason })
            }
            _ => Err(unexpected(id)),
        }
    }

    /// Writes configuration space; `migration`: restoring a migrated device's.
    ///
    /// # Errors
    /// The back end refuses, or has not the protocol feature CONFIG.
    pub fn set_config(&mut self, offset: u32, data: &[u8], migration: bool) -> Result<()> {
        let id = FrontendId::SetConfig;
        self.need(protocol::CONFIG, id, "CONFIG")?;
        let (size, flags) = (data.len() as u32, migration.into());
        self.tell(id, Payload::Config(Config { offset, size, flags, data: data.to_vec() }), &[])
    }

    /// Tells the device status that the driver wrote. Nothing without the protocol feature STATUS.
    ///
    /// # Errors
    /// The back end refuses or is gone.
    pub fn set_status(&mut self, status: u8) -> Result<()> {
        self.noted.status = Some(status);
        if self.protocol & protocol::STATUS == 0 {
            return Ok(());
        }
        self.tell(FrontendId::SetStatus, Payload::U64(status.into()), &[])
    }

    /// The device status as the back end sees it.
    ///
    /// # Errors
    /// It has not the protocol feature STATUS, or is gone.
    pub fn get_status(&mut self) -> Result<u8> {
        self.need(protocol::STATUS, FrontendId::GetStatus, "STATUS")?;
        Ok(self.ask_u64(FrontendId::GetStatus)? as u8)
    }

    /// Resets the device; all rings stop.
    ///
    /// # Errors
    /// The back end cannot, or is gone.
    pub fn reset_device(&mut self) -> Result<()> {
        let id = FrontendId::ResetDevice;
        self.need(protocol::RESET_DEVICE, id, "RESET_DEVICE")?;
        self.tell(id, Payload::Empty, &[])?;
        self.noted.rings.clear();
        Ok(())
    }

    /// Begins post-copy; returns the back end's userfaultfd.
    ///
    /// # Errors
    /// The back end has not the protocol feature PAGEFAULT.
    pub fn postcopy_advise(&mut self) -> Result<OwnedFd> {
        let id = FrontendId::PostcopyAdvise;
        self.need(protocol::PAGEFAULT, id, "PAGEFAULT")?;
        let (_, fds) = self.ask(id, Payload::Empty)?;
        fds.into_iter().next().ok_or_else(|| unexpected(id))
    }

    /// Registers memory with the userfaultfd from now on; the next memory table is answered with the
    /// back end's addresses: [`postcopy_memory`](Self::postcopy_memory).
    ///
    /// # Errors
    /// Out of order, or the back end is gone.
    pub fn postcopy_listen(&mut self) -> Result<()> {
        self.need(protocol::PAGEFAULT, FrontendId::PostcopyListen, "PAGEFAULT")?;
        self.tell(FrontendId::PostcopyListen, Payload::Empty, &[])
    }

    /// Lends memory during post-copy; returns the regions with the back end's addresses, once
    /// `ready` has made use of them.
    ///
    /// # Errors
    /// As [`set_memory`](Self::set_memory), and what `ready` says.
    pub fn postcopy_memory(
        &mut self,
        mem: &GuestMemory,
        ready: impl FnOnce(&[MemRegion]) -> Result<()>,
    ) -> Result<()> {
        let id = FrontendId::SetMemTable;
        let (regions, fds) = replay::table_of(mem)?;
        let files: Vec<_> = fds.iter().map(|f| f.as_fd()).collect();
        self.transmit(id, Payload::MemTable(regions), false, &files)?;
        let Payload::MemTable(theirs) = self.answer(id)?.0 else { return Err(unexpected(id)) };
        ready(&theirs)?;
        self.noted.mem = Some(mem.clone());
        self.tell(id, Payload::MemTable(Vec::new()), &[])
    }

    /// Ends post-copy: all pages are there.
    ///
    /// # Errors
    /// The back end is gone.
    pub fn postcopy_end(&mut self) -> Result<()> {
        self.need(protocol::PAGEFAULT, FrontendId::PostcopyEnd, "PAGEFAULT")?;
        self.ask(FrontendId::PostcopyEnd, Payload::Empty).map(drop)
    }

    /// The next thing that the back end tells by itself; `None` for now. Requests that are not
    /// understood are answered with a failure if they ask.
    ///
    /// # Errors
    /// The back end broke the protocol; [`Error::Disconnected`] when it closed this channel.
    pub fn next_event(&mut self) -> Result<Option<Event>> {
        let ack = self.protocol & protocol::REPLY_ACK != 0;
        let Some(channel) = &mut self.requests else { return Ok(None) };
        while let Some((message, _)) = channel.receive()? {
            let Kind::BackendRequest(id) = message.kind else { continue };
            let event = match (id, message.payload) {
                (BackendId::ConfigChangeMsg, _) => Some(Event::ConfigChanged),
                (BackendId::VringErr, Payload::VringState(s)) => Some(Event::RingFailed(s.index)),
                _ => None,
            };
            if message.need_reply && ack {
                let payload = Payload::U64(event.is_none().into());
                let kind = Kind::BackendReply(id);
                channel.send(&Message { kind, need_reply: false, payload }, &[])?;
            }
            if event.is_some() {
                return Ok(event);
            }
        }
        Ok(None)
    }
}

fn unexpected(id: FrontendId) -> Error {
    Error::Protocol { message: id.name(), reason: "the answer is not of the kind expected".into() }
}

fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    crate::socket::borrow_eventfd(fd)
}

/// Where the log lies, as SET_LOG_BASE tells.
fn log_area(log: &PageLog) -> LogArea {
    LogArea { size: log.bytes(), offset: 0 }
}
