//! Virtio over PCI: hosts any [`virtio::VirtioDevice`] as a modern (non-transitional) PCI function.
//! Source: VIRTIO 1.2, section 4.1.
//!
//! ```text
//!   vCPU --config, BAR accesses--> VirtioPci --start_queue, stop_queue--> VirtioDevice (threads)
//!   vCPU --ioeventfd (or BAR write)--> kick eventfd ----------------------^   |
//!   irqfd/MSI-X or INTx <-- Shared <--------- Interrupt, ConfigEvents --------+
//! ```
//! - [`layout`]: where registers are, capabilities, ids.
//! - [`shared`]: what the device's threads reach: interrupts, status, configuration space.
//! - [`core`]: the registers, queues and the status machine, with the device.
//! - [`saved`]: saved state and the [`state::Unit`].
//!
//! Invariants:
//! - Lock order: core, then configuration space, then one MSI-X vector. The device is called with
//!   the core locked, never with the configuration space locked; so its threads may interrupt at
//!   any time, also while `stop_queue` waits for them.
//! - `Shared` does not own the function, so a device that keeps its interrupts makes no cycle.
//! - A queue is started exactly while DRIVER_OK is set, the queue is enabled, and the function is
//!   neither paused (quiesced) nor broken. Kick eventfds live as long as the function: a kick is
//!   never lost, whoever serves the queue.

mod core;
pub mod layout;
mod saved;
mod shared;

pub use saved::VirtioPciUnit;

use std::sync::Arc;

use mem::GuestMemory;
use parking_lot::Mutex;
use virtio::VirtioDevice;
use virtio::features::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, has, mask};

use self::core::Core;
use self::shared::Shared;
use crate::bus::{Access, Effect};
use crate::irq::{Doorbells, IrqLine, MsiAllocator};
use crate::pci::{BarInfo, BarKind, ConfigSpace, Msix, PciDevice};

/// Why a function cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    #[error("{name}: packed=on, but its back end does not know packed rings")]
    NoPacked { name: String },
    #[error("{name}: {queues} queues, at most {max} are possible")]
    TooManyQueues { name: String, queues: usize, max: usize },
    #[error("{name}: vectors={vectors}, at most {max} are possible")]
    TooManyVectors { name: String, vectors: u16, max: u16 },
    #[error("{name}: cannot have interrupt vectors: {reason}")]
    Vectors { name: String, reason: String },
    #[error("{name}: cannot make an eventfd: {source}")]
    EventFd { name: String, source: std::io::Error },
}

/// How a function is made.
#[derive(Debug, Clone, Default)]
pub struct VirtioPciConfig {
    /// MSI-X vectors; `None`: one a queue and one for configuration changes; 0: INTx only.
    pub vectors: Option<u16>,
    /// Offer `VIRTIO_F_RING_PACKED` (the device must know it too).
    pub packed: bool,
    /// It sits behind a PCIe port: 4 KiB of configuration space and an Express capability.
    pub express: bool,
    /// Features of the device that are not offered.
    pub without: u64,
}

/// Most queues: one doorbell each in the notify region.
const MAX_QUEUES: usize = (layout::REGION / layout::NOTIFY_MULTIPLIER as u64) as usize;
/// Most vectors; the table and its pending bits must fit the BAR's 32-bit size comfortably.
const MAX_VECTORS: u16 = 2048;

/// A virtio PCI function. On the bus it is an `Arc` of this, in the machine's unit set a
/// [`VirtioPciUnit`] of the same.
pub struct VirtioPci {
    name: String,
    device_type: u16,
    shared: Arc<Shared>,
    core: Mutex<Core>,
    /// Offset of the capability for access through configuration space.
    cfg_window: usize,
}

impl VirtioPci {
    /// Makes the function called `name` around `device`.
    ///
    /// # Errors
    /// [`VirtioPciError`]: options that the device cannot have, or the host refuses resources.
    #[allow(clippy::too_many_arguments)] // all needed, each of another kind
    pub fn new(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        config: VirtioPciConfig,
        msi: Arc<dyn MsiAllocator>,
        doorbells: Arc<dyn Doorbells>,
        intx: Option<Arc<dyn IrqLine>>,
        mem: GuestMemory,
    ) -> Result<Arc<Self>, VirtioPciError> {
        let name = name.into();
        let traits = device.traits();
        let queues = traits.queue_sizes.len();
        if queues > MAX_QUEUES {
            return Err(VirtioPciError::TooManyQueues { name, queues, max: MAX_QUEUES });
        }
        if config.packed && !has(traits.features, VIRTIO_F_RING_PACKED) {
            return Err(VirtioPciError::NoPacked { name });
        }
        let mut offered = (traits.features & !config.without) | mask(VIRTIO_F_VERSION_1);
        if !config.packed {
            offered &= !mask(VIRTIO_F_RING_PACKED);
        }

        let mut space = ConfigSpace::endpoint(layout::ident(traits.device_type), config.express);
        let cfg_window = layout::add_capabilities(&mut space, &traits);
        let vectors = config.vectors.unwrap_or(queues as u16 + 1);
        if vectors > MAX_VECTORS {
            return Err(VirtioPciError::TooManyVectors { name, vectors, max: MAX_VECTORS });
        }
        let msix = if vectors == 0 {
            None
        } else {
            let irqs = msi
                .allocate(vectors)
                .map_err(|reason| VirtioPciError::Vectors { name: name.clone(), reason })?;
            let (place, size) = layout::msix(vectors);
            space.add_bar(place.bar, BarKind::Mem32, size);
            Some(Msix::new(&mut space, place, irqs))
        };
        space.add_bar(layout::BAR, BarKind::Mem64Prefetch, layout::BAR_SIZE);
        if intx.is_some() {
            space.set_interrupt_pin(1);
        }
        if config.express {
            layout::add_express(&mut space);
        }
        let shared = Shared::new(&name, space, msix, intx, queues)
            .map_err(|source| VirtioPciError::EventFd { name: name.clone(), source })?;
        let shared = Arc::new(shared);
        let core = Core::new(device, traits.clone(), offered, mem, doorbells, Arc::clone(&shared));
        Ok(Arc::new(Self {
            name,
            device_type: traits.device_type,
            shared,
            core: Mutex::new(core),
            cfg_window,
        }))
    }

    /// Tells the device that the guest now runs here, after a migration: a NIC announces itself.
    pub fn arrived(&self) {
        self.core.lock().device.arrived();
    }

    /// What came in after the queues stopped, for the guest's new place.
    pub fn late_input(&self) -> Option<virtio::LateInput> {
        self.core.lock().device.late_input()
    }

    /// Delivers what came in at the guest's old place after it had stopped there.
    pub fn deliver_late(&self, input: Vec<Vec<u8>>) {
        self.core.lock().device.deliver_late(input);
    }

    /// Why it cannot be migrated, if so.
    pub fn migration_blocker(&self) -> Option<String> {
        self.core.lock().device.migration_blocker()
    }

    /// What `info virtio` and the like show.
    pub fn describe(&self) -> VirtioPciInfo {
        self.core.lock().describe(&self.name)
    }

    /// Access through configuration space (VIRTIO 1.2, section 4.1.4.9): which bytes of the BAR
    /// the window shows, if that makes sense.
    fn window(&self) -> Option<(u64, usize)> {
        let config = self.shared.config.lock();
        let at = self.cfg_window;
        let bar = config.get_u8(at + 4);
        let offset = u64::from(config.get_u32(at + 8));
        let len = config.get_u32(at + 12) as usize;
        let fits = bar == layout::BAR && offset + len as u64 <= layout::BAR_SIZE;
        (fits && matches!(len, 1 | 2 | 4) && offset % len as u64 == 0).then_some((offset, len))
    }

    /// Whether an access to configuration space touches the window's data bytes.
    fn hits_window(&self, offset: u16, len: usize) -> bool {
        let (start, data) = (usize::from(offset), self.cfg_window + 16);
        start < data + 4 && start + len > data
    }
}

/// One queue, as [`VirtioPci::describe`] shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueInfo {
    pub size: u16,
    /// The size that the device offers; the driver may make it smaller.
    pub offered: u16,
    pub enabled: bool,
    pub started: bool,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    /// MSI-X vector; `None`: none.
    pub vector: Option<u16>,
}

/// A virtio function's registers, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtioPciInfo {
    pub name: String,
    pub device_type: u16,
    /// [`virtio::features::status`] bits.
    pub status: u8,
    pub offered: u64,
    pub negotiated: u64,
    pub msix: bool,
    /// MSI-X vectors that there are.
    pub vectors: usize,
    pub queues: Vec<QueueInfo>,
}

impl PciDevice for VirtioPci {
    fn name(&self) -> &str {
        &self.name
    }

    fn type_name(&self) -> &str {
        layout::type_name(self.device_type)
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if self.hits_window(offset, data.len())
            && let Some((at, len)) = self.window()
        {
            let mut bytes = [0; 4];
            self.bar_read(layout::BAR, at, &mut bytes[..len]);
            let mut config = self.shared.config.lock();
            for (i, b) in bytes.iter().enumerate() {
                config.set_u8(self.cfg_window + 16 + i, *b);
            }
        }
        self.shared.config.lock().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Effect {
        let moved = self.shared.config_write(offset, data);
        if self.hits_window(offset, data.len())
            && let Some((at, len)) = self.window()
        {
            let bytes = {
                let config = self.shared.config.lock();
                [0, 1, 2, 3].map(|i| config.get_u8(self.cfg_window + 16 + i))
            };
            let _ = self.bar_write(layout::BAR, at, &bytes[..len]);
        }
        if moved { Effect::Relayout } else { Effect::None }
    }

    fn bars(&self) -> Vec<BarInfo> {
        self.shared.config.lock().bars()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Access {
        data.fill(0);
        if bar != layout::BAR {
            let hit = self.shared.msix.as_ref().is_some_and(|m| m.bar_read(bar, offset, data));
            return if hit || bar == layout::MSIX_BAR { Access::Done } else { Access::Fault };
        }
        let at = offset % layout::REGION;
        match offset - at {
            layout::COMMON => self.core.lock().common_read(at, data),
            layout::ISR if at == 0 && !data.is_empty() => data[0] = self.shared.take_isr(),
            layout::DEVICE => self.core.lock().device.read_config(at as u32, data),
            _ => {}
        }
        Access::Done
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> (Access, Effect) {
        if bar != layout::BAR {
            let hit = self.shared.msix.as_ref().is_some_and(|m| m.bar_write(bar, offset, data));
            let done = hit || bar == layout::MSIX_BAR;
            return (if done { Access::Done } else { Access::Fault }, Effect::None);
        }
        let at = offset % layout::REGION;
        match offset - at {
            layout::COMMON => self.core.lock().common_write(at, data),
            layout::DEVICE => self.core.lock().device.write_config(at as u32, data),
            layout::NOTIFY => {
                self.shared.kick((at / u64::from(layout::NOTIFY_MULTIPLIER)) as usize)
            }
            _ => {}
        }
        (Access::Done, Effect::None)
    }

    fn relayout(&self) {
        self.core.lock().sync_doorbells();
    }
}

impl Drop for VirtioPci {
    /// Unplugged: the device gives its queues back before it goes.
    fn drop(&mut self) {
        self.core.get_mut().reset_device();
    }
}

#[cfg(test)]
mod tests;
