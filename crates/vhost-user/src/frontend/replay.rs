//! A back end that was restarted, or that logs from now on: told all over again what was noted.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mem::GuestMemory;
use virtio::features::{VIRTIO_F_RING_PACKED, has};

use super::{Frontend, PageLog, log_area, unexpected};
use crate::message::{FrontendId, Incoming, MemRegion, Payload, VRING_LOG, VringAddr};
use crate::protocol;
use crate::socket::Channel;
use crate::{Error, Result};

/// Memory as a table and its files.
pub(super) fn table_of(mem: &GuestMemory) -> Result<(Vec<MemRegion>, Vec<Arc<File>>)> {
    let mut table = (Vec::new(), Vec::new());
    for r in mem.regions() {
        let (file, mmap_offset) = r.file.clone().ok_or_else(|| Error::Device {
            message: FrontendId::SetMemTable.name(),
            reason: "guest memory is not shareable; use a memory backend with share=on".into(),
        })?;
        let (guest_addr, size, user_addr) = (r.gpa, r.size, r.host as u64);
        table.0.push(MemRegion { guest_addr, size, user_addr, mmap_offset });
        table.1.push(file);
    }
    Ok(table)
}

impl Frontend {
    /// Sets a back end that has come (back) at the other end of `stream` up as the last one was.
    /// Rings go on from the in-flight tables if there are any; else from the used ring, which is
    /// right for a device that uses buffers in order, as NICs do.
    ///
    /// A packed ring without in-flight tables goes on where it was started: its device's position
    /// is nowhere in memory. Use in-flight tables with packed rings.
    ///
    /// # Errors
    /// [`Error::Device`] if the back end lacks a feature that the driver was promised.
    pub fn reconnect(&mut self, stream: UnixStream) -> Result<()> {
        self.channel = Channel::new(stream, Incoming::Replies)?;
        let offer = self.negotiate(self.noted.wanted_protocol)?;
        let missing = self.noted.features.unwrap_or(0) & !offer.features;
        let refuse = |reason: String| Err(Error::Device { message: "GET_FEATURES", reason });
        if missing != 0 {
            return refuse(format!("the new back end lacks features {missing:#x}, now in use"));
        }
        if self.noted.log.is_some() && !offer.can_log {
            return refuse("the new back end cannot log what it writes, now needed".into());
        }
        self.send_log()?;
        self.send_features()?;
        if let Some(mtu) = self.noted.mtu {
            self.set_mtu(mtu)?;
        }
        if self.noted.inflight.is_some() {
            let id = FrontendId::SetInflightFd;
            self.need(protocol::INFLIGHT_SHMFD, id, "INFLIGHT_SHMFD")?;
            self.send_inflight()?;
        }
        if let Some(mem) = self.noted.mem.take() {
            self.set_memory(&mem)?;
        }
        for index in 0..self.noted.rings.len().min(256) {
            self.restart_ring(index)?;
        }
        if let Some(status) = self.noted.status {
            self.set_status(status)?;
        }
        Ok(())
    }

    fn restart_ring(&mut self, index: usize) -> Result<()> {
        let packed = has(self.noted.features.unwrap_or(0), VIRTIO_F_RING_PACKED);
        let Some(Some(ring)) = self.noted.rings.get_mut(index) else { return Ok(()) };
        if !packed && let Some(mem) = &self.noted.mem {
            // The log address is the used ring's guest address.
            let used = mem.load_u16(ring.addr.log + 2, Ordering::Acquire);
            ring.base = used.unwrap_or(ring.base as u16).into();
        }
        let enabled = ring.enabled;
        self.send_ring(index as u8)?;
        if enabled { self.enable_ring(index as u8, true) } else { Ok(()) }
    }

    /// From now on the back end records what it writes, in the log returned.
    ///
    /// # Errors
    /// [`Error::Device`] if it cannot; no memory was set; or it is gone.
    pub fn start_log(&mut self) -> Result<Arc<PageLog>> {
        let refuse =
            |reason: &str| Error::Device { message: "SET_LOG_BASE", reason: reason.into() };
        if !self.can_log {
            return Err(refuse("the back end cannot log what it writes"));
        }
        let mem = self.noted.mem.as_ref().ok_or_else(|| refuse("there is no memory yet"))?;
        let log = PageLog::new(mem)?;
        self.noted.log = Some(log.clone());
        self.send_log()?;
        self.send_features()?;
        self.send_addresses()?;
        Ok(log)
    }

    /// No longer records.
    ///
    /// # Errors
    /// The back end is gone.
    pub fn stop_log(&mut self) -> Result<()> {
        self.noted.log = None;
        self.send_features()?;
        self.send_addresses()
    }

    fn send_log(&mut self) -> Result<()> {
        let Some(log) = self.noted.log.clone() else { return Ok(()) };
        let id = FrontendId::SetLogBase;
        self.transmit(id, Payload::Log(log_area(&log)), false, &[log.file().as_fd()])?;
        match self.answer(id)?.0 {
            Payload::Empty | Payload::Log(_) | Payload::U64(0) => Ok(()),
            Payload::U64(n) => {
                let reason = format!("the back end failed to do it (code {n})");
                Err(Error::Device { message: id.name(), reason })
            }
            _ => Err(unexpected(id)),
        }
    }

    /// Tells the rings' addresses again, for the flag in them.
    fn send_addresses(&mut self) -> Result<()> {
        let flags = if self.noted.log.is_some() { VRING_LOG } else { 0 };
        let addrs: Vec<_> = self.noted.rings.iter().flatten().map(|r| r.addr).collect();
        for addr in addrs {
            let addr = VringAddr { flags, ..addr };
            self.tell(FrontendId::SetVringAddr, Payload::VringAddr(addr), &[])?;
        }
        Ok(())
    }
}
