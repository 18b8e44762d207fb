//! The common configuration registers, the queues and the status machine, together with the device
//! (VIRTIO 1.2, sections 2.1, 3.1 and 4.1.4.3).
//!
//! ```text
//!   0 --ACKNOWLEDGE, DRIVER--> --FEATURES_OK (features checked)--> --DRIVER_OK (queues start)-->
//!   write of 0 from anywhere: queues stop, device resets;  rules broken: NEEDS_RESET is set
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;

use mem::GuestMemory;
use virtio::features::{VIRTIO_F_RING_RESET, has, negotiate, status};
use virtio::{ConfigEvents, DeviceTraits, Interrupt, Ring, RingPos, RingSetup, VirtioDevice};

use super::layout::{self, NO_VECTOR, common};
use super::shared::{QueueInterrupt, Shared};
use super::{QueueInfo, VirtioPciInfo};
use crate::irq::{DoorbellAddress, Doorbells};

/// One queue's registers.
#[derive(Debug, Clone)]
pub struct QueueRegs {
    pub size: u16,
    pub enabled: bool,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    /// Where it goes on when it is started again; `None`: at the ring's start.
    pub pos: Option<RingPos>,
    /// The device serves it.
    pub started: bool,
    /// Where its doorbell is registered.
    doorbell: Option<u64>,
}

impl QueueRegs {
    pub fn new(size: u16) -> Self {
        Self {
            size,
            enabled: false,
            desc: 0,
            avail: 0,
            used: 0,
            pos: None,
            started: false,
            doorbell: None,
        }
    }
}

/// See the module.
pub struct Core {
    pub device: Box<dyn VirtioDevice>,
    pub traits: DeviceTraits,
    pub offered: u64,
    /// What the driver wrote; negotiated once FEATURES_OK is set.
    pub accepted: u64,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub queue_select: u16,
    pub queues: Vec<QueueRegs>,
    /// Quiesced: queues are not started.
    pub paused: bool,
    /// State was taken over since the last start.
    pub restored: bool,
    mem: GuestMemory,
    doorbells: Arc<dyn Doorbells>,
    pub shared: Arc<Shared>,
    calls: Vec<Arc<dyn Interrupt>>,
}

impl Core {
    pub fn new(
        device: Box<dyn VirtioDevice>,
        traits: DeviceTraits,
        offered: u64,
        mem: GuestMemory,
        doorbells: Arc<dyn Doorbells>,
        shared: Arc<Shared>,
    ) -> Self {
        let queues: Vec<_> = traits.queue_sizes.iter().map(|s| QueueRegs::new(*s)).collect();
        let call = |queue| {
            let shared = Arc::clone(&shared);
            Arc::new(QueueInterrupt { shared, queue }) as Arc<dyn Interrupt>
        };
        let calls = (0..queues.len()).map(call).collect();
        Self {
            device,
            traits,
            offered,
            accepted: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            queues,
            paused: false,
            restored: false,
            mem,
            doorbells,
            shared,
            calls,
        }
    }

    /// The guest's memory.
    #[cfg(test)]
    pub fn memory(&self) -> GuestMemory {
        self.mem.clone()
    }

    // ---- registers -------------------------------------------------------------------------

    fn selected(&self) -> Option<usize> {
        let i = usize::from(self.queue_select);
        (i < self.queues.len()).then_some(i)
    }

    /// Reads common configuration at `offset`; zeroes beyond it.
    pub fn common_read(&self, offset: u64, data: &mut [u8]) {
        let image = self.common_image();
        for (i, d) in data.iter_mut().enumerate() {
            let at = offset as usize + i;
            *d = image.get(at).copied().unwrap_or(0);
        }
    }

    fn common_image(&self) -> [u8; common::LEN] {
        let mut image = [0; common::LEN];
        let mut put = |at: u64, bytes: &[u8]| {
            image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        };
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let s = &self.shared;
        put(common::DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        let offered = half(self.offered, self.device_feature_select);
        put(common::DEVICE_FEATURE, &offered.to_le_bytes());
        put(common::DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        let accepted = half(self.accepted, self.driver_feature_select);
        put(common::DRIVER_FEATURE, &accepted.to_le_bytes());
        put(common::CONFIG_VECTOR, &s.config_vector.load(Ordering::SeqCst).to_le_bytes());
        put(common::NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(common::STATUS, &[s.status.load(Ordering::SeqCst)]);
        put(common::GENERATION, &[s.generation.load(Ordering::SeqCst)]);
        put(common::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        let Some(i) = self.selected() else {
            put(common::QUEUE_VECTOR, &NO_VECTOR.to_le_bytes());
            return image;
        };
        let q = &self.queues[i];
        put(common::QUEUE_SIZE, &q.size.to_le_bytes());
        put(common::QUEUE_VECTOR, &s.queue_vectors[i].load(Ordering::SeqCst).to_le_bytes());
        put(common::QUEUE_ENABLE, &u16::from(q.enabled).to_le_bytes());
        put(common::QUEUE_NOTIFY_OFF, &(i as u16).to_le_bytes());
        put(common::QUEUE_DESC, &q.desc.to_le_bytes());
        put(common::QUEUE_DRIVER, &q.avail.to_le_bytes());
        put(common::QUEUE_DEVICE, &q.used.to_le_bytes());
        image
    }

    /// Writes common configuration. Accesses of another width than the register's (halves of the
    /// 64-bit ones apart) do nothing.
    pub fn common_write(&mut self, offset: u64, data: &[u8]) {
        match *data {
            [v] if offset == common::STATUS => self.write_status(v),
            [a, b] => self.write_u16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_u32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if offset >= common::QUEUE_DESC => {
                self.write_u32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_u32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn write_u16(&mut self, offset: u64, v: u16) {
        let vectors = self.shared.msix.as_ref().map_or(0, |m| m.len());
        let vector = if usize::from(v) < vectors { v } else { NO_VECTOR };
        match offset {
            common::CONFIG_VECTOR => self.shared.config_vector.store(vector, Ordering::SeqCst),
            common::QUEUE_SELECT => self.queue_select = v,
            _ => {}
        }
        let Some(i) = self.selected() else { return };
        match offset {
            common::QUEUE_SIZE
                if !self.queues[i].enabled && (1..=self.traits.queue_sizes[i]).contains(&v) =>
            {
                self.queues[i].size = v;
            }
            common::QUEUE_VECTOR => self.shared.queue_vectors[i].store(vector, Ordering::SeqCst),
            common::QUEUE_ENABLE if v == 1 && !self.queues[i].enabled => {
                self.queues[i].enabled = true;
                self.start_queues();
            }
            common::QUEUE_RESET if v == 1 && has(self.negotiated(), VIRTIO_F_RING_RESET) => {
                self.reset_queue(i);
                self.sync_doorbells();
            }
            _ => {}
        }
    }

    fn write_u32(&mut self, offset: u64, v: u32) {
        match offset {
            common::DEVICE_FEATURE_SELECT => self.device_feature_select = v,
            common::DRIVER_FEATURE_SELECT => self.driver_feature_select = v,
            common::DRIVER_FEATURE if !self.shared.has_status(status::FEATURES_OK) => {
                set_half(&mut self.accepted, self.driver_feature_select, v);
            }
            _ => {}
        }
        let Some(q) = self.selected().map(|i| &mut self.queues[i]).filter(|q| !q.enabled) else {
            return;
        };
        let register = match offset & !4 {
            common::QUEUE_DESC => &mut q.desc,
            common::QUEUE_DRIVER => &mut q.avail,
            common::QUEUE_DEVICE => &mut q.used,
            _ => return,
        };
        if offset.is_multiple_of(4) {
            set_half(register, (offset & 4) as u32 / 4, v);
        }
    }

    // ---- status ----------------------------------------------------------------------------

    /// The features that device and driver agreed on; none before FEATURES_OK.
    pub fn negotiated(&self) -> u64 {
        if self.shared.has_status(status::FEATURES_OK) { self.accepted } else { 0 }
    }

    fn write_status(&mut self, v: u8) {
        if v == 0 {
            self.reset_device();
            return;
        }
        let old = self.shared.status.load(Ordering::SeqCst);
        // Drivers may only add bits.
        let mut new = v & status::DRIVER_BITS & !old;
        if new & status::FEATURES_OK != 0
            && let Err(e) = negotiate(self.offered, self.accepted)
        {
            tracing::debug!("features refused: {e}");
            new &= !status::FEATURES_OK;
        }
        if new & status::DRIVER_OK != 0 && (old | new) & status::FEATURES_OK == 0 {
            self.shared.needs_reset("DRIVER_OK before FEATURES_OK");
            new &= !status::DRIVER_OK;
        }
        self.shared.status.fetch_or(new, Ordering::SeqCst);
        if new & status::DRIVER_OK != 0 {
            if let Err(reason) = self.activate() {
                self.shared.needs_reset(&reason);
            }
            self.start_queues();
        }
    }

    /// Tells the device what was negotiated.
    pub fn activate(&mut self) -> Result<(), String> {
        let events = Arc::clone(&self.shared) as Arc<dyn ConfigEvents>;
        self.device.activate(self.negotiated(), events)
    }

    /// Starts every queue that is to run and does not, as long as nothing is broken.
    pub fn start_queues(&mut self) {
        let mut due = Vec::new();
        for i in 0..self.queues.len() {
            let q = &self.queues[i];
            if q.started || !q.enabled || self.paused || !self.is_live() {
                continue;
            }
            match self.checked_setup(i) {
                Ok(setup) => due.push((i, setup)),
                Err(reason) => self.shared.needs_reset(&format!("queue {i}: {reason}")),
            }
        }
        // A queue that is broken stops all of them.
        if !due.is_empty() && self.is_live() {
            let queues: Vec<_> = due.iter().map(|(i, _)| *i).collect();
            for (i, result) in queues.into_iter().zip(self.device.start_queues(due)) {
                match result {
                    Ok(()) => self.queues[i].started = true,
                    Err(reason) => self.shared.needs_reset(&format!("queue {i}: {reason}")),
                }
            }
        }
        self.sync_doorbells();
    }

    fn is_live(&self) -> bool {
        self.shared.has_status(status::DRIVER_OK) && !self.shared.has_status(status::NEEDS_RESET)
    }

    /// Queue `i`, whose ring was looked at: also for devices that hand it on without.
    fn checked_setup(&self, i: usize) -> Result<RingSetup, String> {
        let setup = self.ring_setup(i)?;
        Ring::new(&setup).map_err(|e| e.to_string())?;
        Ok(setup)
    }

    /// Queue `i` as the driver set it up.
    pub fn ring_setup(&self, i: usize) -> Result<RingSetup, String> {
        let q = &self.queues[i];
        let kick = self.shared.kicks[i].try_clone().map_err(|e| format!("its eventfd: {e}"))?;
        Ok(RingSetup {
            mem: self.mem.clone(),
            size: q.size,
            desc: q.desc,
            avail: q.avail,
            used: q.used,
            features: self.negotiated(),
            pos: q.pos,
            kick,
            call: Arc::clone(&self.calls[i]),
        })
    }

    /// Stops every queue and keeps where it stood.
    pub fn stop_queues(&mut self) {
        let running: Vec<_> = (0..self.queues.len()).filter(|i| self.queues[*i].started).collect();
        if running.is_empty() {
            return;
        }
        for (i, pos) in running.iter().zip(self.device.stop_queues(&running)) {
            let q = &mut self.queues[*i];
            q.started = false;
            q.pos = pos.or(q.pos);
        }
    }

    fn reset_queue(&mut self, i: usize) {
        let q = &mut self.queues[i];
        if q.started {
            self.device.stop_queue(i);
        }
        let doorbell = q.doorbell;
        *q = QueueRegs { doorbell, ..QueueRegs::new(self.traits.queue_sizes[i]) };
        self.shared.queue_vectors[i].store(NO_VECTOR, Ordering::SeqCst);
    }

    /// Device reset (VIRTIO 1.2, section 2.4): queues stop first, the status reads 0 last.
    pub fn reset_device(&mut self) {
        self.stop_queues();
        self.device.reset();
        (0..self.queues.len()).for_each(|i| self.reset_queue(i));
        (self.accepted, self.queue_select) = (0, 0);
        (self.device_feature_select, self.driver_feature_select) = (0, 0);
        self.restored = false;
        let s = &self.shared;
        s.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        s.take_isr();
        s.status.store(0, Ordering::SeqCst);
        self.sync_doorbells();
    }

    // ---- doorbells -------------------------------------------------------------------------

    /// Registers, moves or removes doorbells so that they fit BAR and queues. They stay while the
    /// function is paused: kicks then wait in the eventfd.
    pub fn sync_doorbells(&mut self) {
        let bar = self.shared.config.lock().bar(layout::BAR).and_then(|b| b.address);
        let live = self.shared.has_status(status::DRIVER_OK);
        for (i, q) in self.queues.iter_mut().enumerate() {
            let offset = layout::NOTIFY + i as u64 * u64::from(layout::NOTIFY_MULTIPLIER);
            let want = bar.filter(|_| live && q.enabled).map(|b| b + offset);
            if want == q.doorbell {
                continue;
            }
            let fd = &self.shared.kicks[i];
            if let Some(old) = q.doorbell.take() {
                self.doorbells.unregister(fd, DoorbellAddress::Mmio(old), None);
            }
            let Some(at) = want else { continue };
            match self.doorbells.register(fd, DoorbellAddress::Mmio(at), None) {
                Ok(()) => q.doorbell = Some(at),
                // The slow path serves the kicks all the same.
                Err(e) => tracing::debug!("no doorbell at {at:#x}: {e}"),
            }
        }
    }

    // ---- for people ------------------------------------------------------------------------

    pub fn describe(&self, name: &str) -> VirtioPciInfo {
        let s = &self.shared;
        let vector = |i: usize| {
            let v = s.queue_vectors[i].load(Ordering::SeqCst);
            (v != NO_VECTOR).then_some(v)
        };
        let queues = self.queues.iter().enumerate().map(|(i, q)| QueueInfo {
            size: q.size,
            offered: self.traits.queue_sizes[i],
            enabled: q.enabled,
            started: q.started,
            desc: q.desc,
            avail: q.avail,
            used: q.used,
            vector: vector(i),
        });
        VirtioPciInfo {
            name: name.into(),
            device_type: self.traits.device_type,
            status: s.status.load(Ordering::SeqCst),
            offered: self.offered,
            negotiated: self.negotiated(),
            msix: s.msix.as_ref().is_some_and(|m| m.enabled()),
            vectors: s.msix.as_ref().map_or(0, |m| m.len()),
            queues: queues.collect(),
        }
    }
}

fn set_half(register: &mut u64, half: u32, v: u32) {
    match half {
        0 => *register = *register & !0xffff_ffff | u64::from(v),
        1 => *register = *register & 0xffff_ffff | u64::from(v) << 32,
        _ => {}
    }
}
