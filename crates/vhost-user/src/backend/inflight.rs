//! The memory that keeps the rings' in-flight tables while no back end runs.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use mem::ForeignMapping;
use virtio::{InflightQueue, RingPos, RingSetup};

use super::memory::map_table;
use crate::message::Inflight;
use crate::socket::memfd;

/// The tables of all rings, as SET_INFLIGHT_FD gave them.
#[derive(Debug)]
pub struct InflightArea {
    mapping: Arc<ForeignMapping>,
    num_queues: u16,
    queue_size: u16,
}

impl InflightArea {
    /// Makes memory for `wish.num_queues` rings of `wish.queue_size` entries: what GET_INFLIGHT_FD
    /// is answered with.
    ///
    /// # Errors
    /// A sentence: no memory.
    pub fn allocate(wish: &Inflight, packed: bool) -> Result<(Inflight, OwnedFd), String> {
        let each = InflightQueue::bytes(wish.queue_size, packed) as u64;
        let mmap_size = each * u64::from(wish.num_queues);
        let file = memfd(c"vhost-inflight", mmap_size);
        let file = file.map_err(|e| format!("no memory for the in-flight tables: {e}"))?;
        Ok((Inflight { mmap_size, mmap_offset: 0, ..*wish }, file.into()))
    }

    /// Maps what SET_INFLIGHT_FD gives.
    ///
    /// # Errors
    /// A sentence: not mappable.
    pub fn new(area: &Inflight, fd: OwnedFd) -> Result<Self, String> {
        let (offset, size) = (area.mmap_offset, area.mmap_size);
        let mapping = map_table("the in-flight tables", fd, offset, size)?;
        Ok(Self { mapping, num_queues: area.num_queues, queue_size: area.queue_size })
    }

    pub fn is_broken(&self) -> bool {
        self.mapping.is_broken()
    }

    /// The table of ring `index`, and where the ring goes on.
    ///
    /// # Errors
    /// A sentence: no such table, or one that makes no sense.
    pub fn open(
        &self,
        index: usize,
        packed: bool,
        setup: &RingSetup,
    ) -> Result<(InflightQueue, RingPos), String> {
        if index >= usize::from(self.num_queues) {
            return Err(format!("there are in-flight tables for {} rings only", self.num_queues));
        }
        let offset = index * InflightQueue::bytes(self.queue_size, packed);
        InflightQueue::open(&self.mapping, offset, self.queue_size, setup)
    }
}
