//! A guest's network device without a guest: vhost-user front ends whose rings are driven from here,
//! so that a switch can be given frames at chosen moments. Made for measurements: buffers are laid
//! out once, and both rings rely on the device using buffers in the order in which they were made
//! available, as switches do.
//!
//! All ports share one memory of huge pages; each has a slice of it:
//! ```text
//!   transmit ring | receive ring | ENTRIES transmit buffers | ENTRIES receive buffers
//! ```

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use mem::{Backing, BackingKind, GuestMemory, RegionSpec};
use vhost_user::{Frontend, protocol};
use virtio::features::{VIRTIO_F_VERSION_1, mask};
use virtio::{Interrupt, RingSetup};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Error;

/// Entries of every ring.
pub const ENTRIES: u16 = 256;
/// Bytes of a buffer, header included.
const BUFFER: u64 = 256;
/// Bytes of the virtio-net header.
const HEADER: u64 = 12;
/// From the start of a ring to its avail ring, used ring and end.
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const RING: u64 = 0x3000;
/// Bytes of a port's slice.
const SLICE: u64 = 2 * RING + 2 * BUFFER * ENTRIES as u64;
const HUGE_PAGE: u64 = 2 << 20;
/// Feature bit: a frame may be spread over several buffers (VIRTIO 1.2, section 5.1.3).
const MRG_RXBUF: u32 = 15;
const DESC_WRITE: u16 = 2;
/// A switch connects, and answers, in this time.
const PATIENCE: Duration = Duration::from_secs(20);

/// Never interrupts: rings are polled.
struct Silent(EventFd);

impl Interrupt for Silent {
    fn notify(&self) {}

    fn eventfd(&self) -> Option<EventFd> {
        self.0.try_clone().ok()
    }
}

fn failed(what: &str, e: impl std::fmt::Display) -> Error {
    Error::Host(format!("{what}: {e}"))
}

/// One ring of a port, from the driver's side.
struct Ring {
    /// Where it lies.
    at: u64,
    /// Where its buffers lie.
    buffers: u64,
    /// The driver's index, as it was published.
    published: u16,
    /// The device's index, as it was last seen.
    used: u16,
}

/// A network device.
pub struct Port {
    mem: GuestMemory,
    transmit: Ring,
    receive: Ring,
    kick: EventFd,
    _frontend: Frontend,
}

/// Memory for `ports` ports.
///
/// # Errors
/// There are not enough free huge pages of 2 MiB.
pub fn memory(ports: usize) -> Result<GuestMemory, Error> {
    let size = (SLICE * ports as u64).next_multiple_of(HUGE_PAGE);
    let kind = BackingKind::Memfd { hugetlb: Some(HUGE_PAGE) };
    let backing = Backing { kind, share: true, prealloc: true };
    GuestMemory::new(&[RegionSpec { gpa: 0, size }], &backing).map_err(|e| failed("memory", e))
}

/// Listens at all `sockets`, and has a port for each as soon as the switch has connected.
///
/// # Errors
/// A socket cannot be made; the switch does not come, or refuses something.
pub fn ports(mem: &GuestMemory, sockets: &[PathBuf]) -> Result<Vec<Port>, Error> {
    let listen = |path: &PathBuf| {
        let _ = std::fs::remove_file(path);
        UnixListener::bind(path).map_err(|e| failed(&path.display().to_string(), e))
    };
    let listeners = sockets.iter().map(listen).collect::<Result<Vec<_>, _>>()?;
    let mut ports = Vec::new();
    for (i, (listener, path)) in listeners.iter().zip(sockets).enumerate() {
        ports.push(Port::new(mem, i as u64 * SLICE, accept(listener, path)?)?);
    }
    Ok(ports)
}

fn accept(listener: &UnixListener, path: &Path) -> Result<UnixStream, Error> {
    let what = path.display().to_string();
    listener.set_nonblocking(true).map_err(|e| failed(&what, e))?;
    let until = Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Ok((stream, _)) => return Ok(stream),
            Err(e) if Instant::now() > until => return Err(failed(&what, e)),
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

impl Ring {
    /// Lays the ring and its buffers out; `writable` ones are the device's to fill.
    fn new(mem: &GuestMemory, at: u64, buffers: u64, writable: bool) -> Result<Self, Error> {
        for i in 0..ENTRIES {
            let mut desc = [0; 16];
            let flags = if writable { DESC_WRITE } else { 0 };
            desc[..8].copy_from_slice(&(buffers + u64::from(i) * BUFFER).to_le_bytes());
            desc[8..12].copy_from_slice(&(BUFFER as u32).to_le_bytes());
            desc[12..14].copy_from_slice(&flags.to_le_bytes());
            let entry = at + AVAIL + 4 + 2 * u64::from(i);
            mem.write(at + 16 * u64::from(i), &desc).map_err(|e| failed("descriptor", e))?;
            mem.write(entry, &i.to_le_bytes()).map_err(|e| failed("avail ring", e))?;
        }
        // No interrupts.
        mem.store_u16(at + AVAIL, 1, Ordering::Relaxed).map_err(|e| failed("avail ring", e))?;
        Ok(Self { at, buffers, published: 0, used: 0 })
    }

    fn setup(&self, mem: &GuestMemory, features: u64) -> Result<RingSetup, Error> {
        let eventfd = || EventFd::new(EFD_NONBLOCK).map_err(|e| failed("eventfd", e));
        Ok(RingSetup {
            mem: mem.clone(),
            size: ENTRIES,
            desc: self.at,
            avail: self.at + AVAIL,
            used: self.at + USED,
            features,
            pos: None,
            kick: eventfd()?,
            call: Arc::new(Silent(eventfd()?)),
        })
    }

    fn buffer(&self, index: u16) -> u64 {
        self.buffers + u64::from(index % ENTRIES) * BUFFER
    }

    /// Makes `n` more buffers available.
    fn publish(&mut self, mem: &GuestMemory, n: u16) {
        self.published = self.published.wrapping_add(n);
        let at = self.at + AVAIL + 2;
        mem.store_u16(at, self.published.to_le(), Ordering::Release).expect("inside memory");
    }

    /// Looks how far the device is.
    fn look(&mut self, mem: &GuestMemory) -> u16 {
        let used = mem.load_u16(self.at + USED + 2, Ordering::Acquire).expect("inside memory");
        u16::from_le(used)
    }
}

impl Port {
    fn new(mem: &GuestMemory, at: u64, stream: UnixStream) -> Result<Self, Error> {
        let buffers = at + 2 * RING;
        let transmit = Ring::new(mem, at, buffers, false)?;
        let mut receive = Ring::new(mem, at + RING, buffers + BUFFER * u64::from(ENTRIES), true)?;
        receive.publish(mem, ENTRIES);
        let set_up = |e| failed("vhost-user", e);
        let mut frontend = Frontend::new(stream, PATIENCE).map_err(set_up)?;
        let features = mask(VIRTIO_F_VERSION_1) | mask(MRG_RXBUF);
        let offer = frontend.negotiate(protocol::REPLY_ACK | protocol::MQ).map_err(set_up)?;
        if offer.features & features != features {
            return Err(failed("vhost-user", "VERSION_1 or mergeable buffers are not offered"));
        }
        frontend.set_features(features).map_err(set_up)?;
        frontend.set_memory(mem).map_err(set_up)?;
        let (rx, tx) = (receive.setup(mem, features)?, transmit.setup(mem, features)?);
        let kick = tx.kick.try_clone().map_err(|e| failed("eventfd", e))?;
        frontend.start_ring(0, &rx).map_err(set_up)?;
        frontend.start_ring(1, &tx).map_err(set_up)?;
        frontend.enable_ring(0, true).map_err(set_up)?;
        frontend.enable_ring(1, true).map_err(set_up)?;
        Ok(Self { mem: mem.clone(), transmit, receive, kick, _frontend: frontend })
    }

    /// Frames of `len` bytes, header not counted, in all transmit buffers from now on: all zero but
    /// for what [`write`](Self::write) puts there.
    pub fn frames_of(&mut self, len: u32) {
        for i in 0..ENTRIES {
            let (desc, buffer) = (self.transmit.at + 16 * u64::from(i), self.transmit.buffer(i));
            let len = len.min(BUFFER as u32 - HEADER as u32) + HEADER as u32;
            self.mem.write(desc + 8, &len.to_le_bytes()).expect("inside memory");
            self.mem.write(buffer, &[0; BUFFER as usize]).expect("inside memory");
        }
    }

    /// How many frames can be sent now.
    pub fn room(&mut self) -> u16 {
        self.transmit.used = self.transmit.look(&self.mem);
        ENTRIES - self.transmit.published.wrapping_sub(self.transmit.used)
    }

    /// Writes into the frame that will be sent `ahead` frames after the next one, from byte `offset`.
    pub fn write(&mut self, ahead: u16, offset: u64, bytes: &[u8]) {
        let buffer = self.transmit.buffer(self.transmit.published.wrapping_add(ahead));
        self.mem.write(buffer + HEADER + offset, bytes).expect("inside a buffer");
    }

    /// Sends `n` frames, no more than there is room for; kicks the switch if it sleeps.
    pub fn send(&mut self, n: u16) {
        self.transmit.publish(&self.mem, n);
        // The index must be visible before the switch's wish is read.
        fence(Ordering::SeqCst);
        let flags = self.mem.load_u16(self.transmit.at + USED, Ordering::Relaxed);
        if flags.is_ok_and(|f| u16::from_le(f) & 1 == 0) {
            // A full counter is a kick too.
            let _ = self.kick.write(1);
        }
    }

    /// How many frames have come that were not given back.
    pub fn received(&mut self) -> u16 {
        self.receive.look(&self.mem).wrapping_sub(self.receive.used)
    }

    /// Reads received frame `i` (0 is the oldest) from byte `offset`.
    pub fn read(&self, i: u16, offset: u64, bytes: &mut [u8]) {
        let buffer = self.receive.buffer(self.receive.used.wrapping_add(i));
        self.mem.read(buffer + HEADER + offset, bytes).expect("inside a buffer");
    }

    /// Gives the buffers of the `n` oldest frames back.
    pub fn give_back(&mut self, n: u16) {
        self.receive.used = self.receive.used.wrapping_add(n);
        self.receive.publish(&self.mem, n);
    }
}
