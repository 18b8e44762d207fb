//! What each message of the front end does.

use std::os::fd::OwnedFd;

use super::inflight::InflightArea;
use super::memory::{MAX_SLOTS, MemoryTable, map_table};
use super::ring::{Kick, RingState};
use super::{
    Backend, Outcome, Postcopy, PostcopyState, Session, broken, driver_features, offered,
    offered_protocol,
};
use crate::message::{
    Config, FrontendId, Incoming, MemRegion, Payload, VringAddr, VringFd, VringState,
};
use crate::protocol::{self, F_LOG_ALL, F_PROTOCOL_FEATURES};
use crate::socket::{Channel, eventfd, unix_stream};
use crate::{Error, Result};

impl Session {
    pub(super) fn dispatch<B: Backend>(
        &mut self,
        device: &mut B,
        id: FrontendId,
        payload: Payload,
        mut fds: Vec<OwnedFd>,
    ) -> Result<Outcome> {
        use FrontendId as Id;
        self.check_negotiated(device, id)?;
        if self.postcopy == PostcopyState::AwaitConfirmation {
            return self.confirm(id, &payload);
        }
        let fd = fds.pop();
        Ok(match (id, payload) {
            (Id::GetFeatures, _) => Outcome::Reply(Payload::U64(offered(device)), None),
            (Id::SetFeatures, Payload::U64(v)) => self.set_features(device, v)?,
            (Id::SetOwner, _) => Outcome::Done,
            (Id::GetProtocolFeatures, _) => {
                Outcome::Reply(Payload::U64(offered_protocol(device)), None)
            }
            (Id::SetProtocolFeatures, Payload::U64(v)) => self.set_protocol(device, v)?,
            (Id::GetQueueNum, _) => Outcome::Reply(Payload::U64(device.queue_num()), None),
            (Id::ResetOwner | Id::ResetDevice, _) => self.reset(device),
            (Id::SetMemTable, Payload::MemTable(t)) => {
                fds.extend(fd);
                self.set_mem_table(device, &t, fds)?
            }
            (Id::AddMemReg, Payload::MemRegion(r)) => self.add_region(device, r, fd)?,
            (Id::RemMemReg, Payload::MemRegion(r)) => self.remove_region(device, &r)?,
            (Id::GetMaxMemSlots, _) => Outcome::Reply(Payload::U64(MAX_SLOTS as u64), None),
            (Id::SetLogBase, Payload::Log(l)) => self.set_log(device, l, fd)?,
            // The eventfd would tell the front end of each logged write; nobody listens to it.
            (Id::SetLogFd, _) => Outcome::Done,
            (_, Payload::VringState(s)) => self.vring_state(device, id, s)?,
            (Id::SetVringAddr, Payload::VringAddr(a)) => self.set_addr(device, a)?,
            (_, Payload::VringFd(v)) => self.vring_fd(device, id, v, fd)?,
            (Id::SendRarp, Payload::U64(v)) => {
                let b = v.to_ne_bytes();
                device.send_rarp([b[0], b[1], b[2], b[3], b[4], b[5]]);
                Outcome::Done
            }
            (Id::NetSetMtu, Payload::U64(v)) => match u16::try_from(v) {
                Ok(mtu) => device.set_mtu(mtu).map_or_else(Outcome::Failed, |()| Outcome::Done),
                Err(_) => return Err(broken(id, format!("MTU {v}: at most 65535"))),
            },
            (Id::SetBackendReqFd, _) => self.set_requests(id, fd)?,
            (Id::GetConfig, Payload::Config(c)) => get_config(device, c),
            (Id::SetConfig, Payload::Config(c)) => {
                let set = device.set_config(c.offset, &c.data, c.flags & 1 != 0);
                set.map_or_else(Outcome::Failed, |()| Outcome::Done)
            }
            (Id::GetInflightFd, Payload::Inflight(i)) => {
                if usize::from(i.num_queues) > self.rings.len() {
                    let (n, most) = (i.num_queues, self.rings.len());
                    return Err(broken(id, format!("num queues {n}: there are {most} rings")));
                }
                let made = InflightArea::allocate(&i, self.packed());
                let (area, fd) =
                    made.map_err(|r| Error::Device { message: id.name(), reason: r })?;
                Outcome::Reply(Payload::Inflight(area), Some(fd))
            }
            (Id::SetInflightFd, Payload::Inflight(i)) => {
                let fd = fd.ok_or_else(|| broken(id, "no descriptor".into()))?;
                let area = InflightArea::new(&i, fd).map_err(|r| broken(id, r))?;
                self.pause(device);
                self.inflight = Some(area);
                self.resume(device, id, true)?;
                Outcome::Done
            }
            (Id::SetStatus, Payload::U64(v)) => {
                let status = u8::try_from(v)
                    .map_err(|_| broken(id, format!("status {v:#x}: it has eight bits")))?;
                self.status = status;
                device.set_status(status);
                if status == 0 { self.reset(device) } else { Outcome::Done }
            }
            (Id::GetStatus, _) => Outcome::Reply(Payload::U64(self.status.into()), None),
            (Id::PostcopyAdvise | Id::PostcopyListen | Id::PostcopyEnd, _) => {
                self.postcopy(device, id)?
            }
            _ => return Err(broken(id, "this message is not supported".into())),
        })
    }

    /// During post-copy: the front end says that it knows our addresses, and sends nothing else
    /// before that.
    fn confirm(&mut self, id: FrontendId, payload: &Payload) -> Result<Outcome> {
        let confirmed = match (id, payload) {
            (FrontendId::SetMemTable, Payload::MemTable(t)) => t.is_empty(),
            (FrontendId::AddMemReg, Payload::U64(v)) => *v == 0,
            _ => false,
        };
        if !confirmed {
            return Err(broken(id, "the new addresses have to be confirmed first".into()));
        }
        self.postcopy = PostcopyState::Listening;
        Ok(Outcome::Done)
    }

    /// Checks that the protocol feature that a message belongs to was negotiated.
    fn check_negotiated<B: Backend>(&self, device: &B, id: FrontendId) -> Result<()> {
        use FrontendId::*;
        let (bit, name) = match id {
            GetQueueNum => (protocol::MQ, "MQ"),
            SetLogBase => (protocol::LOG_SHMFD, "LOG_SHMFD"),
            SendRarp => (protocol::RARP, "RARP"),
            NetSetMtu => (protocol::MTU, "MTU"),
            SetBackendReqFd => (protocol::BACKEND_REQ, "BACKEND_REQ"),
            GetConfig | SetConfig => (protocol::CONFIG, "CONFIG"),
            PostcopyAdvise | PostcopyListen | PostcopyEnd => (protocol::PAGEFAULT, "PAGEFAULT"),
            GetInflightFd | SetInflightFd => (protocol::INFLIGHT_SHMFD, "INFLIGHT_SHMFD"),
            ResetDevice => (protocol::RESET_DEVICE, "RESET_DEVICE"),
            GetMaxMemSlots | AddMemReg | RemMemReg => {
                (protocol::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS")
            }
            SetStatus | GetStatus => (protocol::STATUS, "STATUS"),
            _ => return Ok(()),
        };
        // GET_QUEUE_NUM is asked by some before they say what they negotiate.
        let offered = id == GetQueueNum && offered_protocol(device) & bit != 0;
        if self.protocol & bit != 0 || offered {
            return Ok(());
        }
        Err(broken(id, format!("protocol feature {name} was not negotiated")))
    }

    fn set_features<B: Backend>(&mut self, device: &mut B, features: u64) -> Result<Outcome> {
        let id = FrontendId::SetFeatures;
        let unknown = features & !offered(device);
        if unknown != 0 {
            return Err(broken(id, format!("features {unknown:#x} were not offered")));
        }
        let before = self.features;
        let same = before.is_some_and(|f| driver_features(f) == driver_features(features));
        let running = self.rings.iter().any(|r| r.running);
        if running && !same {
            let changed = before.unwrap_or(0) ^ features;
            return Err(broken(id, format!("features {changed:#x} change while rings run")));
        }
        self.features = Some(features);
        if features & F_PROTOCOL_FEATURES == 0 {
            self.enable_all(device);
        }
        if before == Some(features) {
            return Ok(Outcome::Done);
        }
        if !same {
            let refused = |reason| Error::Device { message: id.name(), reason };
            device.activate(driver_features(features)).map_err(refused)?;
        }
        if before.unwrap_or(0) & F_LOG_ALL != features & F_LOG_ALL {
            self.pause(device);
            self.rebuild(id)?;
        }
        self.resume(device, id, true)?;
        Ok(Outcome::Done)
    }

    /// Without protocol features there is no SET_VRING_ENABLE: rings are enabled from the start.
    fn enable_all<B: Backend>(&mut self, device: &mut B) {
        for (index, ring) in self.rings.iter_mut().enumerate() {
            if !std::mem::replace(&mut ring.enabled, true) && ring.running {
                device.set_enabled(index, true);
            }
        }
    }

    fn set_protocol<B: Backend>(&mut self, device: &B, features: u64) -> Result<Outcome> {
        let unknown = features & !offered_protocol(device);
        if unknown != 0 {
            let reason = format!("protocol features {unknown:#x} were not offered");
            return Err(broken(FrontendId::SetProtocolFeatures, reason));
        }
        self.protocol = features;
        Ok(Outcome::Done)
    }

    /// All rings stop and are disabled, and the device is as new. Memory and negotiation stay.
    fn reset<B: Backend>(&mut self, device: &mut B) -> Outcome {
        self.stop_all(device);
        self.status = 0;
        device.reset();
        if self.features.is_some_and(|f| f & F_PROTOCOL_FEATURES == 0) {
            self.enable_all(device);
        }
        Outcome::Done
    }

    fn set_mem_table<B: Backend>(
        &mut self,
        device: &mut B,
        regions: &[MemRegion],
        fds: Vec<OwnedFd>,
    ) -> Result<Outcome> {
        let id = FrontendId::SetMemTable;
        let table = MemoryTable::new(regions, fds, &self.table).map_err(|r| broken(id, r))?;
        self.pause(device);
        self.table = table;
        self.rebuild(id)?;
        self.resume(device, id, true)?;
        if self.postcopy != PostcopyState::Listening {
            return Ok(Outcome::Done);
        }
        let refused = |reason| Error::Device { message: id.name(), reason };
        device.postcopy(Postcopy::Memory(&self.mem)).map_err(refused)?;
        self.postcopy = PostcopyState::AwaitConfirmation;
        Ok(Outcome::Reply(Payload::MemTable(self.table.with_own_addresses()), None))
    }

    fn add_region<B: Backend>(
        &mut self,
        device: &mut B,
        region: MemRegion,
        fd: Option<OwnedFd>,
    ) -> Result<Outcome> {
        let id = FrontendId::AddMemReg;
        let fd = fd.ok_or_else(|| broken(id, "no descriptor".into()))?;
        if let Err(reason) = self.table.add(region, fd) {
            return Ok(Outcome::Refused(reason));
        }
        self.pause(device);
        self.rebuild(id)?;
        self.resume(device, id, false)?;
        if self.postcopy != PostcopyState::Listening {
            return Ok(Outcome::Done);
        }
        let refused = |reason| Error::Device { message: id.name(), reason };
        device.postcopy(Postcopy::Memory(&self.mem)).map_err(refused)?;
        self.postcopy = PostcopyState::AwaitConfirmation;
        let own = self.table.with_own_addresses();
        let own = own.iter().find(|r| r.guest_addr == region.guest_addr);
        Ok(Outcome::Reply(Payload::MemRegion(*own.unwrap_or(&region)), None))
    }

    fn remove_region<B: Backend>(&mut self, device: &mut B, region: &MemRegion) -> Result<Outcome> {
        let id = FrontendId::RemMemReg;
        let mut table = self.table.clone();
        if let Err(reason) = table.remove(region) {
            return Ok(Outcome::Refused(reason));
        }
        self.pause(device);
        self.table = table;
        self.rebuild(id)?;
        self.resume(device, id, true)?;
        Ok(Outcome::Done)
    }

    fn set_log<B: Backend>(
        &mut self,
        device: &mut B,
        log: crate::message::LogArea,
        fd: Option<OwnedFd>,
    ) -> Result<Outcome> {
        let id = FrontendId::SetLogBase;
        let fd = fd.ok_or_else(|| broken(id, "no descriptor; a log needs one".into()))?;
        let mapping = map_table("the log", fd, log.offset, log.size);
        let mapping = mapping.map_err(|reason| broken(id, reason))?;
        self.log = Some(mapping);
        if self.wants_log() {
            self.pause(device);
            self.rebuild(id)?;
            self.resume(device, id, true)?;
        }
        Ok(Outcome::Reply(Payload::Log(log), None))
    }

    fn ring(&mut self, id: FrontendId, index: u32) -> Result<(usize, &mut RingState)> {
        let count = self.rings.len();
        let ring = self.rings.get_mut(index as usize);
        let ring = ring.ok_or_else(|| {
            broken(id, format!("ring {index}: the device has rings 0 to {}", count - 1))
        })?;
        Ok((index as usize, ring))
    }

    fn vring_state<B: Backend>(
        &mut self,
        device: &mut B,
        id: FrontendId,
        state: VringState,
    ) -> Result<Outcome> {
        let without = self.features.is_some_and(|f| f & F_PROTOCOL_FEATURES == 0);
        let packed = self.packed();
        let (index, ring) = self.ring(id, state.index)?;
        match id {
            FrontendId::SetVringNum | FrontendId::SetVringBase if ring.running => {
                return Err(broken(id, format!("ring {index} runs; it has to be stopped first")));
            }
            FrontendId::SetVringNum => {
                ring.size = u16::try_from(state.num).ok();
                self.start(device, index, id, true)?;
            }
            FrontendId::SetVringBase => {
                if !packed && state.num > 0xffff {
                    let num = state.num;
                    return Err(broken(id, format!("num {num:#x}: a split ring has 16 bits")));
                }
                (ring.base, ring.resume) = (state.num, None);
            }
            FrontendId::GetVringBase => {
                let num = self.stop(device, index);
                let state = VringState { index: state.index, num };
                return Ok(Outcome::Reply(Payload::VringState(state), None));
            }
            FrontendId::SetVringEnable => {
                // DPDK's virtio-user, when its back end has come back, sends this before it says
                // what it negotiates: that is taken.
                let enabled = state.num == 1;
                if without && self.protocol == 0 {
                    let reason = "protocol features were not negotiated".into();
                    return Err(broken(id, reason));
                }
                let (_, ring) = self.ring(id, state.index)?;
                if std::mem::replace(&mut ring.enabled, enabled) != enabled && ring.running {
                    device.set_enabled(index, enabled);
                }
            }
            _ => return Err(broken(id, "this message is not supported".into())),
        }
        Ok(Outcome::Done)
    }

    fn set_addr<B: Backend>(&mut self, device: &mut B, addr: VringAddr) -> Result<Outcome> {
        let id = FrontendId::SetVringAddr;
        let (index, ring) = self.ring(id, addr.index)?;
        if ring.addr == Some(addr) {
            return Ok(Outcome::Done);
        }
        let moved = ring.addr.is_some_and(|old| {
            (old.descriptor, old.available, old.used)
                != (addr.descriptor, addr.available, addr.used)
        });
        if ring.running && moved {
            return Err(broken(id, format!("ring {index} runs; it has to be stopped first")));
        }
        ring.addr = Some(addr);
        // The log address may have changed, which the memory's log has to know.
        if self.is_logging() && !self.aliases().is_empty() {
            self.pause(device);
            self.rebuild(id)?;
            self.resume(device, id, true)?;
        }
        self.start(device, index, id, true)?;
        Ok(Outcome::Done)
    }

    fn vring_fd<B: Backend>(
        &mut self,
        device: &mut B,
        id: FrontendId,
        v: VringFd,
        fd: Option<OwnedFd>,
    ) -> Result<Outcome> {
        let fd = fd.map(eventfd).transpose().map_err(|reason| broken(id, reason))?;
        let (index, ring) = self.ring(id, v.index.into())?;
        match id {
            FrontendId::SetVringCall => ring.call.set(fd),
            FrontendId::SetVringErr => ring.err = fd,
            _ => {
                ring.kick = fd.map_or(Kick::Polled, Kick::Fd);
                if std::mem::take(&mut ring.running) {
                    ring.resume = device.stop_queue(index);
                }
                self.start(device, index, id, true)?;
            }
        }
        Ok(Outcome::Done)
    }

    fn set_requests(&mut self, id: FrontendId, fd: Option<OwnedFd>) -> Result<Outcome> {
        let fd = fd.ok_or_else(|| broken(id, "no descriptor".into()))?;
        let stream = unix_stream(fd).map_err(|reason| broken(id, reason))?;
        self.requests = Some(Channel::new(stream, Incoming::BackendReplies)?);
        Ok(Outcome::Done)
    }

    fn postcopy<B: Backend>(&mut self, device: &mut B, id: FrontendId) -> Result<Outcome> {
        use PostcopyState::*;
        let (from, to, step) = match id {
            FrontendId::PostcopyAdvise => (Off, Advised, Postcopy::Advise),
            FrontendId::PostcopyListen => (Advised, Listening, Postcopy::Listen),
            _ => (Listening, Off, Postcopy::End),
        };
        // It may end at any point.
        if self.postcopy != from && to != Off {
            return Err(broken(id, "out of order: expected ADVISE, LISTEN, END".into()));
        }
        let refused = |reason| Error::Device { message: id.name(), reason };
        let fd = device.postcopy(step).map_err(refused)?;
        self.postcopy = to;
        Ok(match id {
            FrontendId::PostcopyListen => Outcome::Done,
            _ => Outcome::Reply(Payload::U64(0), fd),
        })
    }
}

fn get_config<B: Backend>(device: &B, config: Config) -> Outcome {
    let mut data = vec![0; config.size as usize];
    let data = match device.get_config(config.offset, &mut data) {
        Some(()) => data,
        None => Vec::new(),
    };
    Outcome::Reply(Payload::Config(Config { data, ..config }), None)
}
