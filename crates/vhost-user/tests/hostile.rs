//! Front ends that lie: the connection ends with a sentence, nothing hangs, nothing leaks.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use proptest::prelude::*;
use vhost_user::message::{
    FrontendId, HEADER_SIZE, Inflight, Kind, LogArea, MemRegion, Message, Payload, VringAddr,
    VringFd, VringState, encode,
};
use vhost_user::testing::{
    Echo, hostile_backend, hostile_frontend, memfd, open_descriptors, send_raw,
};
use vhost_user::{Connection, Error, protocol};

/// Descriptors are counted: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

struct Peer {
    stream: UnixStream,
    connection: Connection<Echo>,
}

fn bytes_of(id: FrontendId, payload: Payload) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(&Message { kind: Kind::Request(id), need_reply: false, payload }, &mut bytes);
    bytes
}

const USER: u64 = 0x7f00_0000_0000;

fn region() -> MemRegion {
    MemRegion { guest_addr: 0, size: 0x10000, user_addr: USER, mmap_offset: 0 }
}

fn addr() -> VringAddr {
    let (descriptor, available, used) = (USER, USER + 0x1000, USER + 0x2000);
    VringAddr { index: 0, flags: 0, descriptor, used, available, log: 0x2000 }
}

impl Peer {
    fn new() -> Self {
        let (stream, theirs) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        Self { stream, connection: Connection::new(theirs, Echo::default()).unwrap() }
    }

    fn say(&mut self, id: FrontendId, payload: Payload, fds: &[OwnedFd]) -> Result<(), Error> {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send_raw(&self.stream, &bytes_of(id, payload), &fds).unwrap();
        self.connection.process()
    }

    /// What is said is refused with a sentence that names the message and `why`.
    fn refused(&mut self, id: FrontendId, payload: Payload, fds: &[OwnedFd], why: &str) {
        let e = self.say(id, payload, fds).unwrap_err().to_string();
        assert!(e.contains(id.name()) && e.contains(why), "{e:?} should say {why:?}");
    }

    /// Up to the memory.
    fn ready() -> Self {
        use FrontendId::*;
        let mut peer = Self::new();
        peer.say(SetProtocolFeatures, Payload::U64(protocol::COMMON), &[]).unwrap();
        let features = 1 << 32 | protocol::F_PROTOCOL_FEATURES;
        peer.say(SetFeatures, Payload::U64(features), &[]).unwrap();
        let ram = [memfd(0x10000).into()];
        peer.say(SetMemTable, Payload::MemTable(vec![region()]), &ram).unwrap();
        peer.say(SetVringNum, state(0, 8), &[]).unwrap();
        peer.say(SetVringBase, state(0, 0), &[]).unwrap();
        peer
    }
}

fn state(index: u32, num: u32) -> Payload {
    Payload::VringState(VringState { index, num })
}

fn kick(index: u8) -> Payload {
    Payload::VringFd(VringFd { index, has_fd: true })
}

fn eventfd() -> OwnedFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    let fd = vmm_sys_util::eventfd::EventFd::new(libc::EFD_CLOEXEC).unwrap();
    // SAFETY: given up by its owner just here.
    #[allow(unsafe_code)]
    unsafe {
        OwnedFd::from_raw_fd(fd.into_raw_fd())
    }
}

#[test]
fn wrong_memory_is_refused_by_name() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    use FrontendId::*;
    let table = |r| Payload::MemTable(vec![r]);
    let pipe = || vec![OwnedFd::from(std::io::pipe().unwrap().0)];
    let small = || vec![memfd(0x8000).into()];
    Peer::new().refused(SetMemTable, table(region()), &pipe(), "pipe");
    Peer::new().refused(SetMemTable, table(region()), &small(), "shorter");
    Peer::new().refused(SetMemTable, table(region()), &[], "0 descriptors");
    let odd = MemRegion { guest_addr: 0x10, ..region() };
    Peer::new().refused(SetMemTable, table(odd), &[memfd(0x20000).into()], "4 KiB");
    Peer::ready().refused(AddMemReg, Payload::MemRegion(region()), &small(), "overlap");
    let elsewhere = MemRegion { guest_addr: 1 << 40, user_addr: 1 << 41, ..region() };
    Peer::ready().refused(RemMemReg, Payload::MemRegion(elsewhere), &[], "no region");
    let log = Payload::Log(LogArea { size: 0x9000, offset: 0 });
    Peer::ready().refused(SetLogBase, log, &small(), "shorter");
    let inflight = Inflight { mmap_size: 0x9000, mmap_offset: 0, num_queues: 1, queue_size: 8 };
    Peer::ready().refused(SetInflightFd, Payload::Inflight(inflight), &small(), "shorter");
    // Sparse files can be as large as anybody likes; addresses to map them at are few.
    let huge = || vec![memfd(1 << 46).into()];
    let large = MemRegion { size: 1 << 45, ..region() };
    Peer::new().refused(SetMemTable, table(large), &huge(), "at most 0x100000000000");
    let slot = MemRegion { guest_addr: 1 << 40, user_addr: 1 << 46, size: 1 << 44, mmap_offset: 0 };
    Peer::ready().refused(AddMemReg, Payload::MemRegion(slot), &huge(), "at most 0x100000000000");
    let log = Payload::Log(LogArea { size: 1 << 40, offset: 0 });
    Peer::ready().refused(SetLogBase, log, &huge(), "at most 0x2000000000");
    let tables = Payload::Inflight(Inflight { mmap_size: 1 << 40, ..inflight });
    Peer::ready().refused(SetInflightFd, tables, &huge(), "at most 0x2000000000");
    let many = Inflight { num_queues: 1000, ..inflight };
    Peer::ready().refused(GetInflightFd, Payload::Inflight(many), &[], "1000");
}

#[test]
fn wrong_rings_are_refused_by_name() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    use FrontendId::*;
    let with = |addr: VringAddr, why: &str| {
        let mut peer = Peer::ready();
        peer.say(SetVringAddr, Payload::VringAddr(addr), &[]).unwrap();
        peer.refused(SetVringKick, kick(0), &[eventfd()], why);
    };
    with(VringAddr { descriptor: 0x1000, ..addr() }, "descriptor area at user address 0x1000");
    with(VringAddr { used: USER + 0x10000, ..addr() }, "used ring at user address");
    with(VringAddr { available: USER + 0xfffe, ..addr() }, "not wholly in RAM");
    with(VringAddr { descriptor: USER + 0xfff0, ..addr() }, "not wholly in RAM");
    with(VringAddr { descriptor: USER + 8, ..addr() }, "not aligned");
    let mut peer = Peer::ready();
    peer.say(SetVringAddr, Payload::VringAddr(addr()), &[]).unwrap();
    peer.say(SetVringNum, state(0, 7), &[]).unwrap();
    peer.refused(SetVringKick, kick(0), &[eventfd()], "queue size 7");
    Peer::ready().refused(SetVringNum, state(4, 8), &[], "ring 4");
    Peer::ready().refused(GetVringBase, state(u32::MAX, 0), &[], "ring 4294967295");
    Peer::ready().refused(SetVringBase, state(0, 0x1_0000), &[], "16 bits");
    let file = || vec![memfd(16).into()];
    Peer::ready().refused(SetVringKick, kick(0), &file(), "not an eventfd");
    // Whatever it is called.
    let dir = tempfile::tempdir().unwrap();
    let named = std::fs::File::create(dir.path().join("anon_inode:[eventfd]")).unwrap();
    Peer::ready().refused(SetVringKick, kick(0), &[named.into()], "not an eventfd");
    Peer::ready().refused(SetVringCall, kick(0), &file(), "not an eventfd");
    Peer::ready().refused(SetBackendReqFd, Payload::Empty, &file(), "not a UNIX stream socket");
    let mut peer = Peer::ready();
    peer.say(SetVringAddr, Payload::VringAddr(addr()), &[]).unwrap();
    peer.say(SetVringKick, kick(0), &[eventfd()]).unwrap();
    assert!(peer.connection.is_running(0));
    let moved = VringAddr { used: USER + 0x3000, ..addr() };
    peer.refused(SetVringAddr, Payload::VringAddr(moved), &[], "ring 0 runs");
}

#[test]
fn what_was_not_negotiated_is_refused() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    use FrontendId::*;
    Peer::new().refused(SendRarp, Payload::U64(0), &[], "RARP");
    Peer::new().refused(SetFeatures, Payload::U64(1 << 50), &[], "not offered");
    Peer::new().refused(SetProtocolFeatures, Payload::U64(1 << 17), &[], "not offered");
    Peer::new().refused(GetStatus, Payload::Empty, &[], "STATUS");
    Peer::new().refused(PostcopyAdvise, Payload::Empty, &[], "PAGEFAULT");
    let mut peer = Peer::new();
    peer.say(SetProtocolFeatures, Payload::U64(protocol::PAGEFAULT), &[]).unwrap();
    peer.refused(PostcopyAdvise, Payload::Empty, &[], "post-copy is not supported");
    let vring = VringState { index: 0, num: 1 };
    Peer::ready().refused(VringKick, Payload::VringState(vring), &[], "not supported");
}

/// A ring runs, and the file that it lies in is cut off.
#[test]
fn memory_that_shrinks_ends_the_connection_and_not_the_process() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    use FrontendId::*;
    let mut peer = Peer::ready();
    let ram = memfd(0x10000);
    let fds = [ram.try_clone().unwrap().into()];
    peer.say(SetMemTable, Payload::MemTable(vec![region()]), &fds).unwrap();
    peer.say(SetVringAddr, Payload::VringAddr(addr()), &[]).unwrap();
    peer.say(SetVringKick, kick(0), &[eventfd()]).unwrap();
    peer.say(SetVringEnable, state(0, 1), &[]).unwrap();
    peer.connection.device_mut().step();
    assert_eq!(peer.connection.broken(), None);
    ram.set_len(0).unwrap();
    peer.connection.device_mut().step();
    assert!(peer.connection.broken().is_some());
    let e = peer.connection.process().unwrap_err().to_string();
    assert!(e.contains("made shorter"), "{e}");
}

#[test]
fn a_socket_closed_at_every_byte_of_every_message_leaks_nothing() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    use FrontendId::*;
    let messages: Vec<(FrontendId, Payload, usize)> = vec![
        (GetFeatures, Payload::Empty, 0),
        (SetFeatures, Payload::U64(1 << 32 | protocol::F_PROTOCOL_FEATURES), 0),
        (SetProtocolFeatures, Payload::U64(protocol::COMMON), 0),
        (SetMemTable, Payload::MemTable(vec![region()]), 1),
        (SetVringNum, state(0, 8), 0),
        (SetVringAddr, Payload::VringAddr(addr()), 0),
        (SetVringCall, kick(0), 1),
        (SetVringKick, kick(0), 1),
        (SetVringEnable, state(0, 1), 0),
        (GetVringBase, state(0, 0), 0),
    ];
    let run = |which: usize, cut: usize, one_by_one: bool| {
        let mut peer = Peer::new();
        for (i, (id, payload, fds)) in messages.iter().enumerate() {
            let fds: Vec<OwnedFd> = match (fds, id) {
                (0, _) => Vec::new(),
                (_, SetMemTable) => vec![memfd(0x10000).into()],
                _ => vec![eventfd()],
            };
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let mut bytes = bytes_of(*id, payload.clone());
            if i == which {
                bytes.truncate(cut);
            }
            if bytes.is_empty() {
                break;
            }
            let first = if one_by_one { 1 } else { bytes.len() };
            send_raw(&peer.stream, &bytes[..first], &borrowed).unwrap();
            for b in &bytes[first..] {
                peer.connection.process().unwrap();
                peer.stream.write_all(&[*b]).unwrap();
            }
            peer.connection.process().unwrap();
            if i == which {
                break;
            }
        }
        let mut rest = Vec::new();
        let _ = peer.stream.read_to_end(&mut rest);
        let Peer { stream, mut connection } = peer;
        drop(stream);
        assert!(matches!(connection.process(), Err(Error::Disconnected)));
        assert!(connection.into_device().is_idle());
    };
    run(0, 1, false);
    let before = open_descriptors();
    for (which, (id, payload, _)) in messages.iter().enumerate() {
        let len = bytes_of(*id, payload.clone()).len();
        assert!(len >= HEADER_SIZE);
        for cut in 0..=len {
            run(which, cut, false);
        }
        run(which, len - 1, true);
    }
    assert_eq!(open_descriptors(), before);
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    Peer::new().refused(FrontendId::GetFeatures, Payload::Empty, &[eventfd()], "1 descriptors");
    let before = open_descriptors();
    for count in [1, 2, 7, 8] {
        let mut peer = Peer::new();
        let files: Vec<_> = (0..count).map(|_| memfd(16)).collect();
        // With each byte of a header, until it is more than any message has.
        let mut end = None;
        for b in 0..HEADER_SIZE as u8 {
            let fds: Vec<_> = files.iter().take(8).map(AsFd::as_fd).collect();
            send_raw(&peer.stream, &[b], &fds).unwrap();
            end = peer.connection.process().err();
            if end.is_some() {
                break;
            }
        }
        assert!(end.unwrap().to_string().contains("descriptors came along"));
    }
    assert_eq!(open_descriptors(), before);
}

/// A front end that never reads its answers.
#[test]
fn answers_that_nobody_reads_end_the_connection() {
    let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    let mut peer = Peer::new();
    let question = bytes_of(FrontendId::GetFeatures, Payload::Empty);
    let mut end = None;
    for _ in 0..100_000 {
        send_raw(&peer.stream, &question, &[]).unwrap();
        if let Err(e) = peer.connection.process() {
            end = Some(e.to_string());
            break;
        }
    }
    assert!(end.unwrap().contains("does not read"));
}

proptest! {
    #[test]
    fn any_front_end_is_survived(input in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
        hostile_frontend(&input);
    }

    #[test]
    fn any_back_end_is_survived(input in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
        hostile_backend(&input);
    }
}
