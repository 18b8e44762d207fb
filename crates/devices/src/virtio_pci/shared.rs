//! What a function's device may use from its own threads: interrupts, status, kicks. Nothing here
//! waits for the core's lock.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use virtio::features::status;
use virtio::{ConfigEvents, Interrupt};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::layout::NO_VECTOR;
use crate::irq::IrqLine;
use crate::pci::{ConfigSpace, Msix};

/// ISR bits (VIRTIO 1.2, section 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// See the module.
pub struct Shared {
    name: String,
    pub config: Mutex<ConfigSpace>,
    pub msix: Option<Msix>,
    intx: Option<Arc<dyn IrqLine>>,
    pub isr: AtomicU8,
    pub status: AtomicU8,
    pub generation: AtomicU8,
    pub config_vector: AtomicU16,
    pub queue_vectors: Vec<AtomicU16>,
    /// One a queue, for ever.
    pub kicks: Vec<EventFd>,
    /// When (seconds) a broken driver was last written to the log.
    last_complaint: AtomicU64,
}

impl Shared {
    pub fn new(
        name: &str,
        config: ConfigSpace,
        msix: Option<Msix>,
        intx: Option<Arc<dyn IrqLine>>,
        queues: usize,
    ) -> io::Result<Self> {
        let kick = |_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let kicks = (0..queues).map(kick).collect::<Result<_, _>>()?;
        Ok(Self {
            name: name.into(),
            config: Mutex::new(config),
            msix,
            intx,
            isr: AtomicU8::new(0),
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            kicks,
            last_complaint: AtomicU64::new(0),
        })
    }

    pub fn has_status(&self, bits: u8) -> bool {
        self.status.load(Ordering::SeqCst) & bits != 0
    }

    /// The guest's slow kick, where there is no doorbell in the kernel.
    pub fn kick(&self, queue: usize) {
        if let Some(fd) = self.kicks.get(queue) {
            // Can fail only when the count is at its end: then there is a kick already.
            let _ = fd.write(1);
        }
    }

    /// Writes configuration space; whether BARs moved.
    pub fn config_write(&self, offset: u16, data: &[u8]) -> bool {
        let mut config = self.config.lock();
        let moved = config.write(offset, data);
        if let Some(msix) = &self.msix {
            msix.config_changed(&config);
        }
        self.update_line(&mut config);
        moved
    }

    fn msix_enabled(&self) -> bool {
        self.msix.as_ref().is_some_and(Msix::enabled)
    }

    /// Makes the INTx line and its status bit fit the ISR.
    pub fn update_line(&self, config: &mut ConfigSpace) {
        let Some(intx) = &self.intx else { return };
        let asserted = self.isr.load(Ordering::SeqCst) != 0 && !self.msix_enabled();
        config.set_intx_status(asserted);
        intx.set(config.intx_level());
    }

    /// Reads the ISR, which clears it and lowers the line.
    pub fn take_isr(&self) -> u8 {
        let isr = self.isr.swap(0, Ordering::SeqCst);
        if isr != 0 {
            self.update_line(&mut self.config.lock());
        }
        isr
    }

    fn interrupt(&self, vector: &AtomicU16, isr: u8) {
        if let Some(msix) = self.msix.as_ref().filter(|m| m.enabled()) {
            let v = vector.load(Ordering::SeqCst);
            if v != NO_VECTOR {
                msix.trigger(v);
            }
            return;
        }
        self.isr.fetch_or(isr, Ordering::SeqCst);
        self.update_line(&mut self.config.lock());
    }

    pub fn notify_queue(&self, queue: usize) {
        self.interrupt(&self.queue_vectors[queue], ISR_QUEUE);
    }

    /// Writes to the log that the driver broke the rules, at most once a second.
    fn complain(&self, reason: &str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_secs());
        if self.last_complaint.swap(now, Ordering::Relaxed) != now {
            tracing::warn!(device = self.name, "the guest's driver broke the rules: {reason}");
        }
    }
}

impl ConfigEvents for Shared {
    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        if self.has_status(status::DRIVER_OK) {
            self.interrupt(&self.config_vector, ISR_CONFIG);
        }
    }

    fn needs_reset(&self, reason: &str) {
        self.complain(reason);
        let old = self.status.fetch_or(status::NEEDS_RESET, Ordering::SeqCst);
        if old & status::DRIVER_OK != 0 && old & status::NEEDS_RESET == 0 {
            self.interrupt(&self.config_vector, ISR_CONFIG);
        }
    }
}

/// The interrupt of one queue.
pub struct QueueInterrupt {
    pub shared: Arc<Shared>,
    pub queue: usize,
}

impl Interrupt for QueueInterrupt {
    fn notify(&self) {
        self.shared.notify_queue(self.queue);
    }

    /// The eventfd of the vector that the queue has now; drivers choose vectors before they enable
    /// queues. `None` with INTx or without a vector.
    fn eventfd(&self) -> Option<EventFd> {
        let msix = self.shared.msix.as_ref().filter(|m| m.enabled())?;
        let v = self.shared.queue_vectors[self.queue].load(Ordering::SeqCst);
        msix.vector(v)?.eventfd()
    }
}
