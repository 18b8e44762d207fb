//! For tests and fuzzing (feature `testing`): peers that lie, in both directions.
//!
//! [`hostile_frontend`] and [`hostile_backend`] take any bytes for a list of steps of the peer. They
//! panic if this side breaks a promise; whatever else, they return.

mod device;

pub use device::Echo;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use mem::{Backing, GuestMemory, RegionSpec};
use virtio::testing::CountingInterrupt;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::message::{
    Config, FrontendId, HEADER_SIZE, Inflight, Kind, LogArea, MemRegion, Message, Payload,
    VringAddr, VringFd, VringState, encode,
};
use crate::protocol::{F_LOG_ALL, F_PROTOCOL_FEATURES};
use crate::{Connection, Frontend};

/// Sends bytes and descriptors as they are.
///
/// # Errors
/// The socket's.
pub fn send_raw(
    stream: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> std::io::Result<usize> {
    crate::socket::send_some(stream, bytes, fds)
}

/// A memfd of `size` bytes.
///
/// # Panics
/// If the host has none.
pub fn memfd(size: u64) -> File {
    crate::socket::memfd(c"test", size).expect("a memfd")
}

/// Numbers off the front of the input; zeroes at its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn u64(&mut self) -> u64 {
        (0..8).fold(0, |v, _| v << 8 | u64::from(self.byte()))
    }

    /// Mostly what could make sense.
    fn number(&mut self) -> u64 {
        match self.byte() {
            b @ 0..=199 => u64::from(b & 7) * 0x1000 + u64::from(b >> 6) * 16,
            b @ 200..=239 => u64::from(b - 200),
            240..=247 => u64::MAX - u64::from(self.byte()),
            _ => self.u64(),
        }
    }
}

const RAM: u64 = 0x1_0000;
const USER: u64 = 0x7000_0000;

/// A front end that does what `input` says.
///
/// # Panics
/// If the back end breaks a promise.
pub fn hostile_frontend(input: &[u8]) {
    let mut input = Input(input);
    let (mut ours, theirs) = UnixStream::pair().expect("a socket pair");
    ours.set_nonblocking(true).expect("non-blocking");
    let mut connection = Connection::new(theirs, Echo::default()).expect("a connection");
    let ram = memfd(RAM);
    let mut answers = [0; 4096];
    if input.byte() & 1 == 0 {
        let features = connection.device().features_in_use() | F_PROTOCOL_FEATURES;
        for message in set_up(features, input.byte()) {
            if !send(&ours, &message, &ram) || connection.process().is_err() {
                return;
            }
        }
    }
    while !input.0.is_empty() {
        match input.byte() {
            0..=15 => {
                // Any bytes at all.
                let len = usize::from(input.byte()).min(input.0.len());
                let (now, later) = input.0.split_at(len);
                input.0 = later;
                let _ = send_raw(&ours, now, &[]);
            }
            16..=63 => {
                // The guest goes on writing.
                let at = input.number() % RAM;
                let v = input.number().to_le_bytes();
                let _ = std::os::unix::fs::FileExt::write_at(&ram, &v, at);
            }
            64..=66 => {
                let _ = ram.set_len(u64::from(input.byte()) * 0x400);
            }
            flags => {
                let message = message(&mut input, flags);
                if !send(&ours, &message, &ram) {
                    return;
                }
            }
        }
        if connection.process().is_err() {
            return;
        }
        connection.device_mut().step();
        while ours.read(&mut answers).is_ok_and(|n| n > 0) {}
    }
    let device = connection.into_device();
    assert!(device.is_idle(), "a ring was left with the device");
}

/// A whole set-up of ring 0.
fn set_up(features: u64, choice: u8) -> Vec<Message> {
    use FrontendId::*;
    let packed = choice & 1 != 0;
    let features = if packed { features } else { features & !(1 << 34) };
    let features = if choice & 2 != 0 { features | F_LOG_ALL } else { features };
    let of = |id, payload| Message { kind: Kind::Request(id), need_reply: false, payload };
    let state = |num| Payload::VringState(VringState { index: 0, num });
    let region = MemRegion { guest_addr: 0, size: RAM, user_addr: USER, mmap_offset: 0 };
    let mut list = vec![
        of(SetProtocolFeatures, Payload::U64(crate::protocol::COMMON)),
        of(SetLogBase, Payload::Log(LogArea { size: 0x1000, offset: 0xf000 })),
        of(SetFeatures, Payload::U64(features)),
        of(SetMemTable, Payload::MemTable(vec![region])),
    ];
    if choice & 4 != 0 {
        let area =
            Inflight { mmap_size: 0x4000, mmap_offset: 0xb000, num_queues: 2, queue_size: 64 };
        list.push(of(SetInflightFd, Payload::Inflight(area)));
    }
    list.extend([
        of(SetVringNum, state(if choice & 8 != 0 { 16 } else { 4 })),
        of(SetVringBase, state(if packed { 0x8000_8000 } else { 0 })),
        of(
            SetVringAddr,
            Payload::VringAddr(VringAddr {
                index: 0,
                flags: 1,
                descriptor: USER,
                used: USER + 0x2000,
                available: USER + 0x1000,
                log: 0x2000,
            }),
        ),
        of(SetVringKick, Payload::VringFd(VringFd { index: 0, has_fd: true })),
        of(SetVringCall, Payload::VringFd(VringFd { index: 0, has_fd: true })),
        of(SetVringEnable, state(1)),
    ]);
    list
}

/// One message, most of them well-formed.
fn message(input: &mut Input<'_>, flags: u8) -> Message {
    use FrontendId::*;
    let id = FrontendId::ALL[usize::from(input.byte()) % FrontendId::ALL.len()];
    let index = u32::from(input.byte() & 3);
    let region = |input: &mut Input<'_>| MemRegion {
        guest_addr: input.number(),
        size: input.number(),
        user_addr: USER.wrapping_add(input.number()),
        mmap_offset: input.number(),
    };
    let payload = match id {
        SetFeatures | SetProtocolFeatures | SendRarp | NetSetMtu | SetStatus => {
            Payload::U64(input.number())
        }
        SetVringNum | SetVringBase | GetVringBase | SetVringEnable | VringKick => {
            Payload::VringState(VringState { index, num: input.number() as u32 & 0xff })
        }
        SetVringKick | SetVringCall | SetVringErr => {
            Payload::VringFd(VringFd { index: index as u8, has_fd: flags & 1 == 0 })
        }
        SetVringAddr => Payload::VringAddr(VringAddr {
            index,
            flags: u32::from(flags & 1),
            descriptor: USER.wrapping_add(input.number()),
            used: USER.wrapping_add(input.number()),
            available: USER.wrapping_add(input.number()),
            log: input.number(),
        }),
        SetMemTable => {
            let count = input.byte() & 3;
            Payload::MemTable((0..count).map(|_| region(input)).collect())
        }
        AddMemReg | RemMemReg => Payload::MemRegion(region(input)),
        SetLogBase => Payload::Log(LogArea { size: input.number(), offset: input.number() }),
        GetConfig | SetConfig => {
            let data = vec![flags; usize::from(input.byte() & 31)];
            let size = data.len() as u32;
            Payload::Config(Config { offset: input.number() as u32 & 0xff, size, flags: 0, data })
        }
        GetInflightFd | SetInflightFd => Payload::Inflight(Inflight {
            mmap_size: input.number(),
            mmap_offset: input.number(),
            num_queues: input.byte().into(),
            queue_size: input.number() as u16,
        }),
        _ => Payload::Empty,
    };
    Message { kind: Kind::Request(id), need_reply: flags & 2 != 0, payload }
}

/// Sends a message with the descriptors that belong to it; whether the socket took it.
fn send(stream: &UnixStream, message: &Message, ram: &File) -> bool {
    let Kind::Request(id) = message.kind else { return true };
    let mut bytes = Vec::new();
    encode(message, &mut bytes);
    let fds: Vec<OwnedFd> = match (&message.payload, id) {
        (Payload::MemTable(t), _) => t.iter().map(|_| dup(ram)).collect(),
        (Payload::MemRegion(_), FrontendId::AddMemReg)
        | (Payload::Log(_), _)
        | (Payload::Inflight(_), FrontendId::SetInflightFd) => vec![dup(ram)],
        (Payload::VringFd(v), _) if v.has_fd => vec![eventfd()],
        (_, FrontendId::SetBackendReqFd) => {
            UnixStream::pair().map(|(a, _)| vec![a.into()]).unwrap_or_default()
        }
        (_, FrontendId::SetLogFd) => vec![eventfd()],
        _ => Vec::new(),
    };
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    send_raw(stream, &bytes, &fds).is_ok_and(|n| n == bytes.len())
}

fn dup(file: &File) -> OwnedFd {
    file.try_clone().expect("a descriptor").into()
}

fn eventfd() -> OwnedFd {
    let fd = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    crate::socket::borrow_eventfd(&fd).try_clone_to_owned().expect("a descriptor")
}

/// A back end that answers what `input` says, whatever it is asked.
///
/// # Panics
/// If the front end breaks a promise.
pub fn hostile_backend(input: &[u8]) {
    let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
    // All answers at once, with a descriptor here and there; then the end.
    let mut rest = input;
    let null = File::open("/dev/null").expect("/dev/null");
    while let Some((len, more)) = rest.split_first() {
        let len = (usize::from(*len & 0x3f) + HEADER_SIZE).min(more.len());
        let (now, later) = more.split_at(len);
        rest = later;
        let fds = if now.first().is_some_and(|b| b & 1 != 0) { vec![null.as_fd()] } else { vec![] };
        if now.is_empty() || send_raw(&theirs, now, &fds).is_err() {
            break;
        }
    }
    let _ = theirs.flush();
    let _ = theirs.shutdown(std::net::Shutdown::Write);
    let _ = talk(Frontend::new(ours, Duration::from_millis(100)).expect("a front end"));
}

fn talk(mut front: Frontend) -> crate::Result<()> {
    let backing = Backing::default();
    let mem = GuestMemory::new(&[RegionSpec { gpa: 0, size: RAM }], &backing).expect("memory");
    front.negotiate(u64::MAX)?;
    front.set_features(1 << 32)?;
    front.set_memory(&mem)?;
    let _ = front.max_mem_slots();
    let _ = front.track_inflight(2, 8);
    let driver = virtio::testing::DriverRing::new(&mem, 0, 8, 1 << 32);
    front.start_ring(0, &driver.setup(None, std::sync::Arc::new(CountingInterrupt::default())))?;
    front.enable_ring(0, true)?;
    let _ = front.get_config(0, 16);
    let _ = front.get_status();
    if let Ok(log) = front.start_log() {
        log.harvest(0, RAM / 4096, &mem::Bitmap::new(RAM / 4096));
    }
    let _ = front.postcopy_advise();
    let _ = front.next_event();
    front.stop_ring(0).map(drop)
}

/// How many descriptors this process has open.
///
/// # Panics
/// Without /proc.
pub fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc").count()
}
