//! What a device has to do to be served to a vhost-user front end.

use std::os::fd::OwnedFd;

use mem::GuestMemory;
use virtio::{InflightQueue, RingPos, RingSetup};

/// A device behind a [`Connection`](super::Connection), which calls it from whichever thread calls
/// [`process`](super::Connection::process), one call at a time. A device that does its I/O on
/// other threads hands rings over to them and takes them back.
///
/// "Ring" and "queue" are the same here, and `index` counts them one by one: ring 0 of a NIC is its
/// first receive queue (filled by the device), ring 1 its first transmit queue.
pub trait Backend: Send {
    /// Virtio and ring features offered, by bit. The connection adds VHOST_USER_F_PROTOCOL_FEATURES
    /// and, with LOG_SHMFD among the protocol features, VHOST_F_LOG_ALL; it does the logging.
    fn features(&self) -> u64;

    /// Protocol features offered, a set of [`protocol`](crate::protocol) bits. The connection takes
    /// out what it cannot do, and what needs a method that says it is not there is up to the
    /// device. [`protocol::COMMON`](crate::protocol::COMMON) is a good beginning.
    fn protocol_features(&self) -> u64;

    /// Number of rings.
    fn max_queues(&self) -> usize;

    /// The answer to GET_QUEUE_NUM. For a NIC that is the number of queue *pairs*.
    fn queue_num(&self) -> u64 {
        self.max_queues() as u64
    }

    /// The features that the driver accepted, without vhost's own bits. Called before rings start,
    /// and again whenever they change; no ring runs then.
    ///
    /// # Errors
    /// A sentence why the device cannot work like that; the connection ends with it.
    fn activate(&mut self, features: u64) -> Result<(), String>;

    /// Says whether the front end gives no kicks for ring `index`, which then has to be polled.
    /// Called before [`start_queue`](Self::start_queue).
    fn set_polled(&mut self, index: usize, polled: bool) {
        let _ = (index, polled);
    }

    /// Hands ring `index` over, disabled. The first look at it must not wait for a kick. With
    /// `inflight`, give that to [`virtio::Ring::track`] before the first pop, so that what an
    /// earlier process took and did not use comes again, and what is taken is noted.
    ///
    /// # Errors
    /// A sentence; the connection ends with it.
    fn start_queue(
        &mut self,
        index: usize,
        ring: RingSetup,
        inflight: Option<InflightQueue>,
    ) -> Result<(), String>;

    /// Takes ring `index` back: returns when nothing touches it or its memory any more, and nothing
    /// is in flight. `None` if it was not started, or went wrong: the position is then taken from
    /// the used ring.
    ///
    /// Also called, with a start right after it, when the memory or its dirty log changes.
    fn stop_queue(&mut self, index: usize) -> Option<RingPos>;

    /// Enables or disables ring `index`, which is started. A disabled one is served without effect:
    /// a NIC drops what is sent, and receives nothing.
    fn set_enabled(&mut self, index: usize, enabled: bool);

    /// The guest's new place is to be announced: send a RARP from `mac` (protocol feature RARP).
    fn send_rarp(&mut self, mac: [u8; 6]) {
        let _ = mac;
    }

    /// The MTU that the front end told the guest, bytes (protocol feature MTU).
    ///
    /// # Errors
    /// A sentence; the front end is told of the failure, and the connection lives on.
    fn set_mtu(&mut self, mtu: u16) -> Result<(), String> {
        Err(format!("an MTU of {mtu} cannot be set on this device"))
    }

    /// Reads configuration space (protocol feature CONFIG). `None`: there is none at this place.
    fn get_config(&self, offset: u32, data: &mut [u8]) -> Option<()> {
        let _ = (offset, data);
        None
    }

    /// Writes configuration space (protocol feature CONFIG); `migration` if it comes from a
    /// migration rather than from the driver.
    ///
    /// # Errors
    /// A sentence; the front end is told of the failure, and the connection lives on.
    fn set_config(&mut self, offset: u32, data: &[u8], migration: bool) -> Result<(), String> {
        let _ = (offset, data, migration);
        Err("this device's configuration space cannot be written".into())
    }

    /// The virtio device status as the driver set it (protocol feature STATUS); 0 is a reset, for
    /// which [`reset`](Self::reset) is called as well.
    fn set_status(&mut self, status: u8) {
        let _ = status;
    }

    /// Device reset (RESET_DEVICE, RESET_OWNER, status 0). All rings were stopped before.
    fn reset(&mut self) {}

    /// A step of post-copy (protocol feature PAGEFAULT). Offered by nobody who leaves this out.
    ///
    /// # Errors
    /// A sentence; the connection ends with it.
    fn postcopy(&mut self, step: Postcopy<'_>) -> Result<Option<OwnedFd>, String> {
        let _ = step;
        Err("post-copy is not supported by this device".into())
    }
}

/// What post-copy asks of a device, in this order.
#[derive(Debug)]
pub enum Postcopy<'a> {
    /// Open a userfaultfd and return it: it goes to the front end.
    Advise,
    /// From now on memory is registered with the userfaultfd.
    Listen,
    /// Register this memory, which the front end knows by our addresses; it is ready for faults.
    Memory(&'a GuestMemory),
    /// All pages are there: close the userfaultfd.
    End,
}
