//! What a connection makes of messages in the orders that front ends really use.

mod common;

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use common::{Copier, Shared};
use mem::ForeignMapping;
use vhost_user::message::{
    FrontendId, HEADER_SIZE, Kind, LogArea, MemRegion, Message, Payload, VRING_LOG, VringAddr,
    VringFd, VringState, encode,
};
use vhost_user::protocol::{self, F_LOG_ALL, F_PROTOCOL_FEATURES};
use vhost_user::testing::{memfd, send_raw};
use vhost_user::{Connection, Error};
use virtio::features::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, mask};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const USER: u64 = 0x7f00_0000_0000;
const V1: u64 = mask(VIRTIO_F_VERSION_1);

struct Peer {
    stream: UnixStream,
    connection: Connection<Copier>,
    shared: Arc<Shared>,
    ram: std::fs::File,
}

fn state(num: u32) -> Payload {
    Payload::VringState(VringState { index: 0, num })
}

fn fd_of(fd: &EventFd) -> OwnedFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: a duplicate that is given up just here.
    #[allow(unsafe_code)]
    unsafe {
        OwnedFd::from_raw_fd(fd.try_clone().unwrap().into_raw_fd())
    }
}

impl Peer {
    fn new() -> Self {
        let (stream, theirs) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let shared = Arc::new(Shared::default());
        let connection = Connection::new(theirs, Copier::new(&shared)).unwrap();
        Self { stream, connection, shared, ram: memfd(0x10000) }
    }

    fn try_say(&mut self, id: FrontendId, payload: Payload, fds: &[OwnedFd]) -> Result<(), Error> {
        let mut bytes = Vec::new();
        encode(&Message { kind: Kind::Request(id), need_reply: false, payload }, &mut bytes);
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send_raw(&self.stream, &bytes, &fds).unwrap();
        self.connection.process()
    }

    fn say(&mut self, id: FrontendId, payload: Payload, fds: &[OwnedFd]) {
        self.try_say(id, payload, fds).unwrap();
    }

    /// The payload of the answer that has come.
    fn answer(&mut self) -> Vec<u32> {
        let mut bytes = [0; 300];
        let n = self.stream.read(&mut bytes).unwrap();
        let word = |c: &[u8]| u32::from_ne_bytes(c.try_into().unwrap());
        bytes[HEADER_SIZE..n].chunks(4).map(word).collect()
    }

    fn memory(&mut self) {
        let region = MemRegion { guest_addr: 0, size: 0x10000, user_addr: USER, mmap_offset: 0 };
        let fds = [self.ram.try_clone().unwrap().into()];
        self.say(FrontendId::SetMemTable, Payload::MemTable(vec![region]), &fds);
    }

    fn addr(&mut self, flags: u32, log: u64) {
        let addr = VringAddr {
            index: 0,
            flags,
            descriptor: USER,
            available: USER + 0x1000,
            used: USER + 0x2000,
            log,
        };
        self.say(FrontendId::SetVringAddr, Payload::VringAddr(addr), &[]);
    }

    /// All of ring 0 but its kick.
    fn ring(&mut self, base: u32) {
        self.say(FrontendId::SetVringNum, state(16), &[]);
        self.say(FrontendId::SetVringBase, state(base), &[]);
        self.addr(0, 0x2000);
    }

    fn kick(&mut self) {
        let kick = fd_of(&EventFd::new(EFD_NONBLOCK).unwrap());
        self.say(FrontendId::SetVringKick, has_fd(true), &[kick]);
    }

    fn log(&mut self) -> Arc<ForeignMapping> {
        let bits = memfd(0x1000);
        let fds = [bits.try_clone().unwrap().into()];
        let area = LogArea { size: 0x1000, offset: 0 };
        self.say(FrontendId::SetLogBase, Payload::Log(area), &fds);
        ForeignMapping::map(bits, 0, 0x1000).unwrap()
    }

    fn calls(&self) -> Vec<String> {
        self.shared.calls()
    }
}

fn has_fd(has_fd: bool) -> Payload {
    Payload::VringFd(VringFd { index: 0, has_fd })
}

#[test]
fn rings_are_enabled_from_the_start_without_protocol_features() {
    let mut peer = Peer::new();
    peer.say(FrontendId::SetFeatures, Payload::U64(V1), &[]);
    peer.memory();
    peer.ring(0);
    assert_eq!(peer.calls(), ["activate 0x100000000"]);
    peer.kick();
    assert_eq!(peer.calls(), ["start 0", "enable 0 true"]);
    let e = peer.try_say(FrontendId::SetVringEnable, state(0), &[]).unwrap_err();
    assert!(e.to_string().contains("SET_VRING_ENABLE"));
}

#[test]
fn a_ring_starts_when_its_last_piece_is_there_whatever_the_order() {
    let mut peer = Peer::new();
    peer.kick();
    peer.ring(0);
    peer.say(FrontendId::SetFeatures, Payload::U64(V1 | F_PROTOCOL_FEATURES), &[]);
    assert!(!peer.connection.is_running(0));
    peer.memory();
    assert_eq!(peer.calls(), ["activate 0x100000000", "start 0"]);
    peer.say(FrontendId::SetVringEnable, state(1), &[]);
    peer.say(FrontendId::SetVringEnable, state(1), &[]);
    assert_eq!(peer.calls(), ["enable 0 true"]);
    // The same memory under the same ring: it goes on.
    peer.memory();
    assert_eq!(peer.calls(), ["stop 0", "start 0", "enable 0 true"]);
    // Dropped with a ring running: the device gets it stopped.
    let shared = peer.shared.clone();
    drop(peer);
    assert_eq!(shared.calls(), ["stop 0"]);
}

#[test]
fn a_ring_without_a_kick_is_polled_and_its_call_may_change() {
    let mut peer = Peer::new();
    peer.say(FrontendId::SetFeatures, Payload::U64(V1 | F_PROTOCOL_FEATURES), &[]);
    peer.memory();
    peer.ring(0);
    peer.say(FrontendId::SetVringKick, has_fd(false), &[]);
    assert_eq!(peer.calls(), ["activate 0x100000000", "polled 0", "start 0"]);
    let call = EventFd::new(EFD_NONBLOCK).unwrap();
    peer.say(FrontendId::SetVringCall, has_fd(true), &[fd_of(&call)]);
    // What was used just before may have been told to the old one.
    assert_eq!(call.read().unwrap(), 1);
    peer.say(FrontendId::SetVringCall, has_fd(false), &[]);
    assert!(peer.connection.is_running(0));
    assert!(peer.calls().is_empty());
    let err = EventFd::new(EFD_NONBLOCK).unwrap();
    peer.say(FrontendId::SetVringErr, has_fd(true), &[fd_of(&err)]);
    peer.connection.ring_failed(0).unwrap();
    assert_eq!(err.read().unwrap(), 1);
}

#[test]
fn where_a_ring_goes_on() {
    for (packed, base, used, expected) in [
        (false, 0, 0, 0),
        // The used index says how far the last back end came.
        (false, 9, 7, 7),
        (false, 0xffff, 0xffff, 0xffff),
        // Both halves, or only the lower one.
        (true, 0x8003_8003, 0, 0x8003_8003),
        (true, 0x8000, 0, 0x8000_8000),
    ] {
        let mut peer = Peer::new();
        let ring = if packed { mask(VIRTIO_F_RING_PACKED) } else { 0 };
        let features = V1 | ring | F_PROTOCOL_FEATURES;
        peer.say(FrontendId::SetFeatures, Payload::U64(features), &[]);
        let at = 0x2002;
        std::os::unix::fs::FileExt::write_at(&peer.ram, &u16::to_le_bytes(used), at).unwrap();
        peer.memory();
        peer.ring(base);
        peer.kick();
        peer.say(FrontendId::GetVringBase, state(0), &[]);
        assert_eq!(peer.answer(), [0, expected], "{packed} {base:#x} {used:#x}");
        assert!(!peer.connection.is_running(0));
    }
}

#[test]
fn no_ring_runs_without_the_log_that_it_is_to_write() {
    let mut peer = Peer::new();
    let protocol = Payload::U64(protocol::LOG_SHMFD | protocol::STATUS);
    peer.say(FrontendId::SetProtocolFeatures, protocol, &[]);
    let logging = V1 | F_PROTOCOL_FEATURES | F_LOG_ALL;
    peer.say(FrontendId::SetFeatures, Payload::U64(logging), &[]);
    peer.memory();
    peer.ring(0);
    peer.kick();
    peer.say(FrontendId::SetVringEnable, state(1), &[]);
    assert!(!peer.connection.is_running(0) && !peer.connection.is_logging());
    let log = peer.log();
    assert!(peer.connection.is_running(0) && peer.connection.is_logging());
    assert_eq!(peer.calls(), ["activate 0x100000000", "start 0", "enable 0 true"]);
    // The device asks for kicks: a write to the used ring.
    peer.connection.device_mut().step();
    let used_page = 1 << 2;
    assert_eq!(log.take_bits(0, 0xff), used_page);
    // Another log, and an address in it that is not the used ring's.
    peer.addr(VRING_LOG, 0x9000);
    let other = peer.log();
    peer.connection.device_mut().step();
    assert_eq!((log.take_bits(0, 0xff), log.take_bits(1, 0xff)), (0, 0));
    assert_eq!((other.take_bits(0, 0xff), other.take_bits(1, 0xff)), (used_page, 1 << 1));
    let quiet = Payload::U64(V1 | F_PROTOCOL_FEATURES);
    peer.say(FrontendId::SetFeatures, quiet, &[]);
    assert!(peer.connection.is_running(0) && !peer.connection.is_logging());
    // Features proper stay while a ring runs.
    let e = peer.try_say(FrontendId::SetFeatures, Payload::U64(F_PROTOCOL_FEATURES), &[]);
    assert!(e.unwrap_err().to_string().contains("while rings run"));
}

#[test]
fn a_reset_stops_rings_and_keeps_what_front_ends_set_once() {
    let mut peer = Peer::new();
    peer.say(FrontendId::SetProtocolFeatures, Payload::U64(protocol::STATUS), &[]);
    peer.say(FrontendId::SetFeatures, Payload::U64(V1 | F_PROTOCOL_FEATURES), &[]);
    peer.memory();
    let call = EventFd::new(EFD_NONBLOCK).unwrap();
    peer.say(FrontendId::SetVringCall, has_fd(true), &[fd_of(&call)]);
    peer.ring(0);
    peer.kick();
    peer.say(FrontendId::SetStatus, Payload::U64(0), &[]);
    assert_eq!(peer.calls()[1..], ["start 0", "status 0", "stop 0", "reset"]);
    peer.ring(0);
    peer.kick();
    peer.say(FrontendId::SetVringEnable, state(1), &[]);
    assert_eq!(peer.calls(), ["start 0", "enable 0 true"]);
    assert!(call.read().unwrap() > 0);
    assert!(call.read().is_err());
    // A ring that stops interrupts once more, by the call of before the reset.
    peer.say(FrontendId::GetVringBase, state(0), &[]);
    assert_eq!(call.read().unwrap(), 1);
}

#[test]
fn where_a_ring_stood_is_told_after_a_reset() {
    for (packed, base) in [(false, 7), (true, 0x8003_8003)] {
        let mut peer = Peer::new();
        peer.say(FrontendId::SetProtocolFeatures, Payload::U64(protocol::STATUS), &[]);
        let ring = if packed { mask(VIRTIO_F_RING_PACKED) } else { 0 };
        peer.say(FrontendId::SetFeatures, Payload::U64(V1 | ring | F_PROTOCOL_FEATURES), &[]);
        std::os::unix::fs::FileExt::write_at(&peer.ram, &7u16.to_le_bytes(), 0x2002).unwrap();
        peer.memory();
        peer.ring(base);
        peer.kick();
        // So QEMU 7.2 stops a device.
        peer.say(FrontendId::SetStatus, Payload::U64(0), &[]);
        peer.say(FrontendId::GetVringBase, state(0), &[]);
        assert_eq!(peer.answer(), [0, base], "packed {packed}");
    }
}
