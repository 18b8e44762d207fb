//! What a virtio device is to whoever hosts it: the PCI transport or a vhost-user back end.

use std::sync::Arc;

use mem::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

/// Index of a virtqueue in its device.
pub type QueueIndex = usize;

/// How a device interrupts the driver for one queue, or for a configuration change.
pub trait Interrupt: Send + Sync {
    /// Interrupts now. Never blocks.
    fn notify(&self);
    /// An eventfd that does the same when it is written to, for back ends outside the process
    /// or in the kernel.
    fn eventfd(&self) -> Option<EventFd>;
}

/// What never changes about a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceTraits {
    /// Virtio device type (1 net, 2 block, 4 entropy, ...; VIRTIO 1.2 section 5).
    pub device_type: u16,
    /// Offered device and ring features, by bit (VIRTIO 1.2 section 6). The transport adds
    /// VERSION_1 and withholds RING_PACKED unless that is configured, so a device that knows packed
    /// rings always names it.
    pub features: u64,
    /// Largest size of each queue, in entries; their number is the number of queues.
    pub queue_sizes: Vec<u16>,
    /// Bytes of device-specific configuration space.
    pub config_len: u32,
}

/// Where a ring goes on: what vhost-user calls the vring base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RingPos {
    /// Split: next entry of the avail ring to look at. Packed: index | wrap counter << 15.
    pub avail: u16,
    /// Split: next entry of the used ring to write. Packed: index | wrap counter << 15.
    pub used: u16,
}

impl RingPos {
    /// Where a split ring starts.
    pub const SPLIT_START: Self = Self { avail: 0, used: 0 };
    /// Where a packed ring starts: both wrap counters are 1.
    pub const PACKED_START: Self = Self { avail: 0x8000, used: 0x8000 };
}

/// A virtqueue as the driver set it up, with the ways to kick and to call.
pub struct RingSetup {
    pub mem: GuestMemory,
    /// Entries; at most the device's limit, a power of two when split.
    pub size: u16,
    /// Guest address of the descriptor table (split) or ring (packed).
    pub desc: u64,
    /// Guest address of the avail ring (split) or driver event area (packed).
    pub avail: u64,
    /// Guest address of the used ring (split) or device event area (packed).
    pub used: u64,
    /// All negotiated features, by bit.
    pub features: u64,
    /// Where to go on; `None` at the start.
    pub pos: Option<RingPos>,
    /// Written to when the driver kicks. Non-blocking, and the same for the device's whole life.
    pub kick: EventFd,
    /// Interrupts the driver.
    pub call: Arc<dyn Interrupt>,
}

/// A virtio device. Its owner (a transport) calls these one at a time; the device does its I/O on
/// threads of its own. A device that finds its driver breaking the rules stops that queue and
/// calls [`ConfigEvents::needs_reset`].
pub trait VirtioDevice: Send {
    /// What never changes.
    fn traits(&self) -> DeviceTraits;
    /// Reads configuration space at `offset`; bytes past its end read as zero.
    fn read_config(&self, offset: u32, data: &mut [u8]);
    /// Writes configuration space; writes that mean nothing are ignored.
    fn write_config(&mut self, offset: u32, data: &[u8]);
    /// Tells the negotiated features (before any queue starts) and how to raise events. At a
    /// migration's destination it comes after [`restore`](Self::restore), and keeps what that
    /// restored. It is not called again when queues stop and go on.
    fn activate(&mut self, features: u64, events: Arc<dyn ConfigEvents>) -> Result<(), String>;
    /// Hands queue `index` over. From now on the device serves it. The first look at the ring
    /// must not wait for a kick: kicks may have come while nobody served it.
    fn start_queue(&mut self, index: QueueIndex, ring: RingSetup) -> Result<(), String>;
    /// Takes queue `index` back. Returns with nothing in flight: every descriptor taken is used.
    /// `None` if it was not started.
    fn stop_queue(&mut self, index: QueueIndex) -> Option<RingPos>;
    /// Hands several queues over at once, as [`start_queue`](Self::start_queue) does one; the
    /// results are in the same order. For devices that one thread serves, which then starts once.
    fn start_queues(&mut self, queues: Vec<(QueueIndex, RingSetup)>) -> Vec<Result<(), String>> {
        queues.into_iter().map(|(index, ring)| self.start_queue(index, ring)).collect()
    }
    /// Takes several queues back at once, as [`stop_queue`](Self::stop_queue) does one; the
    /// positions are in the same order.
    fn stop_queues(&mut self, queues: &[QueueIndex]) -> Vec<Option<RingPos>> {
        queues.iter().map(|index| self.stop_queue(*index)).collect()
    }
    /// Device reset: as after power-on. All queues were stopped before.
    fn reset(&mut self);
    /// Device state apart from the transport's (features, rings), as (kind, version).
    fn state_kind(&self) -> (&'static str, u16);
    /// Saves device state as the CBOR bytes of its [`state::SavedState`]; queues are stopped.
    fn save(&self) -> state::Result<Vec<u8>>;
    /// Restores device state; it is untrusted. The device was reset before. Afterwards the
    /// transport calls [`activate`](Self::activate) if the driver had come so far, and then starts
    /// queues.
    fn restore(&mut self, kind: &str, version: u16, payload: &[u8]) -> state::Result<()>;
    /// Why it cannot be migrated, if so.
    fn migration_blocker(&self) -> Option<String>;
    /// Called at the destination when the guest runs there: a NIC announces itself.
    fn arrived(&mut self) {}
    /// Called at the source when the guest runs elsewhere for good: what has come in for it since
    /// its queues stopped and was not delivered (a NIC's frames, oldest first, each with the
    /// header that its back end puts in front). A bounded number each call. `None`: nothing ever
    /// comes in for this kind of device.
    fn late_input(&mut self) -> Option<LateInput> {
        None
    }
    /// Called at the destination with what [`late_input`](Self::late_input) gave at the source:
    /// to be delivered before anything that comes from now on.
    fn deliver_late(&mut self, input: Vec<Vec<u8>>) {
        drop(input);
    }
}

/// What [`VirtioDevice::late_input`] found.
#[derive(Debug, Default)]
pub struct LateInput {
    pub frames: Vec<Vec<u8>>,
    /// Nothing more will come here: the network has shown that it knows the guest's new place.
    pub settled: bool,
}

/// Events of the device as a whole, implemented by the transport.
pub trait ConfigEvents: Send + Sync {
    /// Configuration space changed: bumps the generation and interrupts the driver.
    fn config_changed(&self);
    /// The driver broke the rules: sets DEVICE_NEEDS_RESET and interrupts (VIRTIO 1.2, 2.1.2).
    fn needs_reset(&self, reason: &str);
}
