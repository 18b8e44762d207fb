//! The wire: every message, its payload, its descriptors, and whether they can be valid.
//! Source: QEMU's vhost-user specification, "Message Specification", "Front-end message types" and
//! "Back-end message types".
//!
//! A message is a header of three u32 (request, flags, size of the payload) and the payload, all in
//! the host's byte order. Descriptors come beside it as ancillary data.
//!
//! Invariants:
//! - [`decode`] accepts a payload only if its length is right to the byte and every field is
//!   within what the specification allows by itself; sums of addresses and lengths do not
//!   overflow. What depends on what was negotiated, or on what exists, is up to the receiver.
//! - [`encode`] of what [`decode`] gave is the same message again.

use crate::{Error, Result};

/// Bytes of the header.
pub const HEADER_SIZE: usize = 12;
/// Bytes of the largest payload that any known message has, with room for what is new.
pub const MAX_PAYLOAD: usize = 1024;
/// Most descriptors with one message (one a region of SET_MEM_TABLE).
pub const MAX_FDS: usize = MAX_TABLE_REGIONS;
/// Most regions in SET_MEM_TABLE.
pub const MAX_TABLE_REGIONS: usize = 8;
/// Bytes of configuration space that GET_CONFIG and SET_CONFIG reach.
pub const MAX_CONFIG: u32 = 256;
/// Largest ring, in entries (VIRTIO 1.2, sections 2.7 and 2.8.10.1).
pub const MAX_RING_SIZE: u32 = 32768;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// In the u64 of SET_VRING_KICK, CALL and ERR: no descriptor comes with it.
const NO_FD: u64 = 1 << 8;
/// Flag of SET_VRING_ADDR: log writes to the used ring.
pub const VRING_LOG: u32 = 1;

macro_rules! ids {
    ($(#[$doc:meta])* $name:ident { $($id:ident = $n:literal $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        #[allow(missing_docs)]
        pub enum $name { $($id = $n,)* }

        impl $name {
            /// Every message, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$id,)*];

            /// The message with number `n`.
            pub fn from_number(n: u32) -> Option<Self> {
                match n { $($n => Some(Self::$id),)* _ => None }
            }

            /// Its name in the specification, without the prefix.
            pub fn name(self) -> &'static str {
                match self { $(Self::$id => $text,)* }
            }
        }
    };
}

ids! {
    /// Messages from the front end.
    FrontendId {
        GetFeatures = 1 "GET_FEATURES",
        SetFeatures = 2 "SET_FEATURES",
        SetOwner = 3 "SET_OWNER",
        ResetOwner = 4 "RESET_OWNER",
        SetMemTable = 5 "SET_MEM_TABLE",
        SetLogBase = 6 "SET_LOG_BASE",
        SetLogFd = 7 "SET_LOG_FD",
        SetVringNum = 8 "SET_VRING_NUM",
        SetVringAddr = 9 "SET_VRING_ADDR",
        SetVringBase = 10 "SET_VRING_BASE",
        GetVringBase = 11 "GET_VRING_BASE",
        SetVringKick = 12 "SET_VRING_KICK",
        SetVringCall = 13 "SET_VRING_CALL",
        SetVringErr = 14 "SET_VRING_ERR",
        GetProtocolFeatures = 15 "GET_PROTOCOL_FEATURES",
        SetProtocolFeatures = 16 "SET_PROTOCOL_FEATURES",
        GetQueueNum = 17 "GET_QUEUE_NUM",
        SetVringEnable = 18 "SET_VRING_ENABLE",
        SendRarp = 19 "SEND_RARP",
        NetSetMtu = 20 "NET_SET_MTU",
        SetBackendReqFd = 21 "SET_BACKEND_REQ_FD",
        IotlbMsg = 22 "IOTLB_MSG",
        SetVringEndian = 23 "SET_VRING_ENDIAN",
        GetConfig = 24 "GET_CONFIG",
        SetConfig = 25 "SET_CONFIG",
        CreateCryptoSession = 26 "CREATE_CRYPTO_SESSION",
        CloseCryptoSession = 27 "CLOSE_CRYPTO_SESSION",
        PostcopyAdvise = 28 "POSTCOPY_ADVISE",
        PostcopyListen = 29 "POSTCOPY_LISTEN",
        PostcopyEnd = 30 "POSTCOPY_END",
        GetInflightFd = 31 "GET_INFLIGHT_FD",
        SetInflightFd = 32 "SET_INFLIGHT_FD",
        GpuSetSocket = 33 "GPU_SET_SOCKET",
        ResetDevice = 34 "RESET_DEVICE",
        VringKick = 35 "VRING_KICK",
        GetMaxMemSlots = 36 "GET_MAX_MEM_SLOTS",
        AddMemReg = 37 "ADD_MEM_REG",
        RemMemReg = 38 "REM_MEM_REG",
        SetStatus = 39 "SET_STATUS",
        GetStatus = 40 "GET_STATUS",
        GetSharedObject = 41 "GET_SHARED_OBJECT",
        SetDeviceStateFd = 42 "SET_DEVICE_STATE_FD",
        CheckDeviceState = 43 "CHECK_DEVICE_STATE",
    }
}

ids! {
    /// Messages from the back end, over the socket of SET_BACKEND_REQ_FD.
    BackendId {
        IotlbMsg = 1 "BACKEND_IOTLB_MSG",
        ConfigChangeMsg = 2 "BACKEND_CONFIG_CHANGE_MSG",
        VringHostNotifierMsg = 3 "BACKEND_VRING_HOST_NOTIFIER_MSG",
        VringCall = 4 "BACKEND_VRING_CALL",
        VringErr = 5 "BACKEND_VRING_ERR",
        SharedObjectAdd = 6 "BACKEND_SHARED_OBJECT_ADD",
        SharedObjectRemove = 7 "BACKEND_SHARED_OBJECT_REMOVE",
        SharedObjectLookup = 8 "BACKEND_SHARED_OBJECT_LOOKUP",
    }
}

/// Which message, and whether it asks or answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// From the front end.
    Request(FrontendId),
    /// The back end's answer to that.
    Reply(FrontendId),
    /// From the back end.
    BackendRequest(BackendId),
    /// The front end's answer to that.
    BackendReply(BackendId),
}

impl Kind {
    fn number(self) -> u32 {
        match self {
            Self::Request(id) | Self::Reply(id) => id as u32,
            Self::BackendRequest(id) | Self::BackendReply(id) => id as u32,
        }
    }

    /// The message's name in the specification.
    pub fn name(self) -> &'static str {
        match self {
            Self::Request(id) | Self::Reply(id) => id.name(),
            Self::BackendRequest(id) | Self::BackendReply(id) => id.name(),
        }
    }

    fn is_reply(self) -> bool {
        matches!(self, Self::Reply(_) | Self::BackendReply(_))
    }
}

/// A message, decoded. Its descriptors are kept beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub kind: Kind,
    /// The sender wants to be told whether it worked (with REPLY_ACK).
    pub need_reply: bool,
    pub payload: Payload,
}

/// What a message carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    Empty,
    U64(u64),
    /// SET_VRING_KICK, CALL, ERR.
    VringFd(VringFd),
    VringState(VringState),
    VringAddr(VringAddr),
    MemTable(Vec<MemRegion>),
    MemRegion(MemRegion),
    Log(LogArea),
    Config(Config),
    Inflight(Inflight),
    Iotlb(Iotlb),
    VringArea(VringArea),
    DeviceState(DeviceState),
    Uuid([u8; 16]),
}

/// A ring and a number: its size, its position, or whether it is enabled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringState {
    pub index: u32,
    pub num: u32,
}

/// A ring and whether a descriptor comes along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringFd {
    pub index: u8,
    pub has_fd: bool,
}

/// Where a ring lies, in the front end's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringAddr {
    pub index: u32,
    /// 0 or [`VRING_LOG`].
    pub flags: u32,
    pub descriptor: u64,
    pub used: u64,
    pub available: u64,
    /// Guest address that stands for the used ring in the dirty log.
    pub log: u64,
}

/// A piece of guest memory, in a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemRegion {
    pub guest_addr: u64,
    pub size: u64,
    /// Address in the front end.
    pub user_addr: u64,
    /// Offset in the descriptor.
    pub mmap_offset: u64,
}

impl MemRegion {
    /// The guest address of the front end's `user` address, if `len` bytes from there lie in this
    /// region.
    pub fn translate(&self, user: u64, len: u64) -> Option<u64> {
        let offset = user.checked_sub(self.user_addr)?;
        let fits = offset < self.size && len <= self.size - offset;
        fits.then(|| self.guest_addr + offset)
    }
}

/// The dirty log in its descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogArea {
    pub size: u64,
    pub offset: u64,
}

/// A piece of configuration space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub offset: u32,
    pub size: u32,
    /// Bit 0: written by a migration.
    pub flags: u32,
    /// `size` bytes. In a request to read, or an answer that it failed, there may be none.
    pub data: Vec<u8>,
}

/// The in-flight tables of all rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inflight {
    pub mmap_size: u64,
    pub mmap_offset: u64,
    pub num_queues: u16,
    pub queue_size: u16,
}

/// A message of an IOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Iotlb {
    pub iova: u64,
    pub size: u64,
    pub user_addr: u64,
    /// 1 read, 2 write, 3 both.
    pub permission: u8,
    /// 1 miss, 2 update, 3 invalidate, 4 access failed, 5 and 6 begin and end of a batch.
    pub kind: u8,
}

/// A doorbell for a ring: its index and flags, and where it lies in the descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringArea {
    pub index: u64,
    pub size: u64,
    pub offset: u64,
}

/// Which way device state is to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceState {
    /// 0 save, 1 load.
    pub direction: u32,
    /// 0: while the guest is stopped.
    pub phase: u32,
}

/// How a payload is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Empty,
    U64,
    /// Empty, a u64 or the log again: the answer to SET_LOG_BASE, which the specification leaves
    /// open. DPDK sends nothing, libvhost-user a number, rust-vmm the log and expects that, too.
    LogAnswer,
    VringFd,
    State,
    Addr,
    MemTable,
    MemRegion,
    Log,
    Config,
    Inflight,
    Iotlb,
    Area,
    DeviceState,
    Uuid,
}

/// How many descriptors come with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fds {
    Exactly(usize),
    UpTo(usize),
    /// As the payload says.
    Payload,
}

/// Layout and descriptors of a message; `None` for those that this crate does not know to answer.
fn shape(kind: Kind) -> Option<(Shape, Fds)> {
    let none = Fds::Exactly(0);
    let one = Fds::Exactly(1);
    Some(match kind {
        Kind::Request(id) => request_shape(id)?,
        Kind::Reply(id) => match id {
            FrontendId::GetVringBase => (Shape::State, none),
            FrontendId::GetConfig => (Shape::Config, none),
            FrontendId::GetInflightFd => (Shape::Inflight, one),
            FrontendId::SetLogBase => (Shape::LogAnswer, none),
            FrontendId::SetMemTable => (Shape::MemTable, none),
            FrontendId::AddMemReg => (Shape::MemRegion, none),
            FrontendId::PostcopyAdvise => (Shape::U64, Fds::UpTo(1)),
            FrontendId::GetSharedObject | FrontendId::SetDeviceStateFd => {
                (Shape::U64, Fds::UpTo(1))
            }
            _ => (Shape::U64, none),
        },
        Kind::BackendRequest(id) => match id {
            BackendId::IotlbMsg => (Shape::Iotlb, none),
            BackendId::ConfigChangeMsg => (Shape::Empty, none),
            BackendId::VringHostNotifierMsg => (Shape::Area, Fds::UpTo(1)),
            BackendId::VringCall | BackendId::VringErr => (Shape::State, none),
            BackendId::SharedObjectAdd | BackendId::SharedObjectRemove => (Shape::Uuid, none),
            BackendId::SharedObjectLookup => (Shape::Uuid, none),
        },
        Kind::BackendReply(_) => (Shape::U64, Fds::UpTo(1)),
    })
}

fn request_shape(id: FrontendId) -> Option<(Shape, Fds)> {
    use FrontendId::*;
    let none = Fds::Exactly(0);
    let one = Fds::Exactly(1);
    Some(match id {
        GetFeatures | SetOwner | ResetOwner | GetProtocolFeatures | GetQueueNum
        | PostcopyAdvise | PostcopyListen | PostcopyEnd | ResetDevice | GetMaxMemSlots
        | GetStatus | CheckDeviceState => (Shape::Empty, none),
        SetFeatures | SetProtocolFeatures | SendRarp | NetSetMtu | SetStatus => (Shape::U64, none),
        SetMemTable => (Shape::MemTable, Fds::Payload),
        SetLogBase => (Shape::Log, Fds::UpTo(1)),
        SetLogFd | SetBackendReqFd | GpuSetSocket => (Shape::Empty, one),
        SetVringNum | SetVringBase | GetVringBase | SetVringEnable | SetVringEndian | VringKick => {
            (Shape::State, none)
        }
        SetVringAddr => (Shape::Addr, none),
        SetVringKick | SetVringCall | SetVringErr => (Shape::VringFd, Fds::Payload),
        IotlbMsg => (Shape::Iotlb, none),
        GetConfig | SetConfig => (Shape::Config, none),
        GetInflightFd => (Shape::Inflight, none),
        SetInflightFd => (Shape::Inflight, one),
        AddMemReg => (Shape::MemRegion, one),
        RemMemReg => (Shape::MemRegion, Fds::UpTo(1)),
        GetSharedObject => (Shape::Uuid, none),
        SetDeviceStateFd => (Shape::DeviceState, one),
        CreateCryptoSession | CloseCryptoSession => return None,
    })
}

/// Which side's messages come in on a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incoming {
    /// Requests of a front end, at the back end.
    Requests,
    /// A back end's answers, at the front end.
    Replies,
    /// Requests of a back end, at the front end.
    BackendRequests,
    /// The front end's answers to those.
    BackendReplies,
}

/// A header, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub need_reply: bool,
    /// Bytes of payload that follow; at most [`MAX_PAYLOAD`].
    pub size: usize,
}

/// Decodes a header.
///
/// # Errors
/// An unknown message, a wrong version or direction, a payload that is too large.
pub fn decode_header(bytes: &[u8; HEADER_SIZE], incoming: Incoming) -> Result<Header> {
    let mut r = Reader(bytes);
    let (number, flags, size) = (r.u32(), r.u32(), r.u32());
    let kind = match incoming {
        Incoming::Requests => FrontendId::from_number(number).map(Kind::Request),
        Incoming::Replies => FrontendId::from_number(number).map(Kind::Reply),
        Incoming::BackendRequests => BackendId::from_number(number).map(Kind::BackendRequest),
        Incoming::BackendReplies => BackendId::from_number(number).map(Kind::BackendReply),
    };
    let unknown = || Error::Protocol {
        message: "header",
        reason: format!("request {number} is not known in this direction"),
    };
    let kind = kind.ok_or_else(unknown)?;
    let wrong = |reason| Err(Error::Protocol { message: kind.name(), reason });
    if flags & VERSION_MASK != VERSION {
        return wrong(format!("header flags {flags:#x}: the version must be {VERSION}"));
    }
    if (flags & FLAG_REPLY != 0) != kind.is_reply() {
        let expected = if kind.is_reply() { "an answer" } else { "a request" };
        return wrong(format!("header flags {flags:#x}: {expected} was expected"));
    }
    if size as usize > MAX_PAYLOAD {
        return wrong(format!("header size {size}: at most {MAX_PAYLOAD} bytes are allowed"));
    }
    Ok(Header { kind, need_reply: flags & FLAG_NEED_REPLY != 0, size: size as usize })
}

/// Decodes the `payload` that came with `header` and `fds` descriptors.
///
/// # Errors
/// [`Error::Protocol`], which names message and field.
pub fn decode(header: Header, payload: &[u8], fds: usize) -> Result<Message> {
    let kind = header.kind;
    let wrong = |reason| Error::Protocol { message: kind.name(), reason };
    let mut known = shape(kind).ok_or_else(|| wrong("this message is not supported".into()))?;
    // What else goes by the same name as memory regions: the plain answer, whether it worked; and,
    // during post-copy, the front end's confirmation of the other kind of answer. (A confirmation
    // of SET_MEM_TABLE reads as a table without regions.)
    let double = matches!(
        kind,
        Kind::Request(FrontendId::AddMemReg)
            | Kind::Reply(FrontendId::AddMemReg | FrontendId::SetMemTable)
    );
    if double && payload.len() == 8 {
        known = (Shape::U64, Fds::Exactly(0));
    }
    let payload = decode_payload(kind, known.0, payload).map_err(wrong)?;
    let (least, most) = match known.1 {
        Fds::Exactly(n) => (n, n),
        Fds::UpTo(n) => (0, n),
        Fds::Payload => match &payload {
            Payload::MemTable(regions) => (regions.len(), regions.len()),
            Payload::VringFd(v) => (v.has_fd.into(), v.has_fd.into()),
            _ => (0, 0),
        },
    };
    if fds < least || fds > most {
        let expected =
            if least == most { format!("{least}") } else { format!("{least} to {most}") };
        return Err(wrong(format!("{fds} descriptors came along, expected {expected}")));
    }
    Ok(Message { kind, need_reply: header.need_reply, payload })
}

type Checked<T> = std::result::Result<T, String>;

fn decode_payload(kind: Kind, shape: Shape, bytes: &[u8]) -> Checked<Payload> {
    let mut r = Reader(bytes);
    let expect = |len: usize| match bytes.len() {
        n if n == len => Ok(()),
        n => Err(format!("size {n}, expected {len}")),
    };
    Ok(match shape {
        Shape::Empty => {
            expect(0)?;
            Payload::Empty
        }
        Shape::LogAnswer if bytes.is_empty() => Payload::Empty,
        Shape::LogAnswer if bytes.len() == 16 => {
            Payload::Log(LogArea { size: r.u64(), offset: r.u64() })
        }
        Shape::LogAnswer | Shape::U64 => {
            expect(8)?;
            Payload::U64(r.u64())
        }
        Shape::VringFd => {
            expect(8)?;
            Payload::VringFd(vring_fd(r.u64())?)
        }
        Shape::State => {
            expect(8)?;
            Payload::VringState(vring_state(kind, &mut r)?)
        }
        Shape::Addr => {
            expect(40)?;
            Payload::VringAddr(vring_addr(&mut r)?)
        }
        Shape::MemTable => Payload::MemTable(mem_table(bytes)?),
        Shape::MemRegion => {
            expect(40)?;
            r.u64();
            Payload::MemRegion(mem_region(&mut r)?)
        }
        Shape::Log => {
            expect(16)?;
            let log = LogArea { size: r.u64(), offset: r.u64() };
            range("log", log.offset, log.size)?;
            Payload::Log(log)
        }
        Shape::Config => Payload::Config(config(kind, bytes)?),
        Shape::Inflight => Payload::Inflight(inflight(bytes)?),
        Shape::Iotlb => {
            // With or without the padding that a C compiler adds.
            if bytes.len() != 26 {
                expect(32)?;
            }
            let (iova, size, user_addr) = (r.u64(), r.u64(), r.u64());
            let (permission, kind) = (r.u8(), r.u8());
            Payload::Iotlb(Iotlb { iova, size, user_addr, permission, kind })
        }
        Shape::Area => {
            expect(24)?;
            Payload::VringArea(VringArea { index: r.u64(), size: r.u64(), offset: r.u64() })
        }
        Shape::DeviceState => {
            expect(8)?;
            let (direction, phase) = (r.u32(), r.u32());
            if direction > 1 || phase != 0 {
                return Err(format!("direction {direction}, phase {phase}: not known"));
            }
            Payload::DeviceState(DeviceState { direction, phase })
        }
        Shape::Uuid => {
            expect(16)?;
            let mut uuid = [0; 16];
            uuid.copy_from_slice(bytes);
            Payload::Uuid(uuid)
        }
    })
}

/// Checks that `start + len` is an address and `len` is not zero.
fn range(field: &str, start: u64, len: u64) -> Checked<()> {
    match start.checked_add(len) {
        Some(_) if len > 0 => Ok(()),
        _ => Err(format!("{field}: {len:#x} bytes at {start:#x} is not a range")),
    }
}

fn vring_fd(v: u64) -> Checked<VringFd> {
    if v & !(NO_FD | 0xff) != 0 {
        return Err(format!("value {v:#x}: only bits 0 to 8 have a meaning"));
    }
    Ok(VringFd { index: v as u8, has_fd: v & NO_FD == 0 })
}

fn vring_state(kind: Kind, r: &mut Reader<'_>) -> Checked<VringState> {
    let (index, num) = (r.u32(), r.u32());
    match kind {
        Kind::Request(FrontendId::SetVringNum) if num == 0 || num > MAX_RING_SIZE => {
            Err(format!("num {num}: a ring has 1 to {MAX_RING_SIZE} entries"))
        }
        Kind::Request(FrontendId::SetVringEnable | FrontendId::SetVringEndian) if num > 1 => {
            Err(format!("num {num}: expected 0 or 1"))
        }
        _ => Ok(VringState { index, num }),
    }
}

fn vring_addr(r: &mut Reader<'_>) -> Checked<VringAddr> {
    let (index, flags) = (r.u32(), r.u32());
    let (descriptor, used, available, log) = (r.u64(), r.u64(), r.u64(), r.u64());
    if flags & !VRING_LOG != 0 {
        return Err(format!("flags {flags:#x}: only bit 0 (log) has a meaning"));
    }
    Ok(VringAddr { index, flags, descriptor, used, available, log })
}

fn mem_region(r: &mut Reader<'_>) -> Checked<MemRegion> {
    let (guest_addr, size, user_addr, mmap_offset) = (r.u64(), r.u64(), r.u64(), r.u64());
    range("guest address", guest_addr, size)?;
    range("user address", user_addr, size)?;
    range("mmap offset", mmap_offset, size)?;
    Ok(MemRegion { guest_addr, size, user_addr, mmap_offset })
}

fn mem_table(bytes: &[u8]) -> Checked<Vec<MemRegion>> {
    if bytes.len() < 8 {
        return Err(format!("size {}, expected at least 8", bytes.len()));
    }
    let mut r = Reader(bytes);
    let count = r.u32() as usize;
    r.u32();
    if count > MAX_TABLE_REGIONS {
        return Err(format!("{count} regions, at most {MAX_TABLE_REGIONS} are allowed"));
    }
    if bytes.len() != 8 + 32 * count {
        return Err(format!(
            "size {}, expected {} for {count} regions",
            bytes.len(),
            8 + 32 * count
        ));
    }
    let regions = (0..count).map(|_| mem_region(&mut r)).collect::<Checked<Vec<_>>>()?;
    for (i, a) in regions.iter().enumerate() {
        for b in &regions[..i] {
            overlap(a, b)?;
        }
    }
    Ok(regions)
}

/// Checks that two regions share neither guest nor user addresses.
pub fn overlap(a: &MemRegion, b: &MemRegion) -> Checked<()> {
    let apart = |x: u64, xl: u64, y: u64, yl: u64| x + xl <= y || y + yl <= x;
    if !apart(a.guest_addr, a.size, b.guest_addr, b.size) {
        let (x, y) = (a.guest_addr, b.guest_addr);
        return Err(format!("regions overlap at guest addresses {x:#x} and {y:#x}"));
    }
    if !apart(a.user_addr, a.size, b.user_addr, b.size) {
        let (x, y) = (a.user_addr, b.user_addr);
        return Err(format!("regions overlap at user addresses {x:#x} and {y:#x}"));
    }
    Ok(())
}

fn config(kind: Kind, bytes: &[u8]) -> Checked<Config> {
    let answer = matches!(kind, Kind::Reply(_));
    if answer && bytes.is_empty() {
        return Ok(Config { offset: 0, size: 0, flags: 0, data: Vec::new() });
    }
    if bytes.len() < 12 {
        return Err(format!("size {}, expected at least 12", bytes.len()));
    }
    let mut r = Reader(bytes);
    let (offset, size, flags) = (r.u32(), r.u32(), r.u32());
    let data = r.0.to_vec();
    if offset.checked_add(size).is_none_or(|end| end > MAX_CONFIG) {
        return Err(format!("{size} bytes at offset {offset}: at most {MAX_CONFIG} in all"));
    }
    let may_be_empty = !matches!(kind, Kind::Request(FrontendId::SetConfig));
    if data.len() != size as usize && !(may_be_empty && data.is_empty()) {
        return Err(format!("{} bytes of data, expected {size}", data.len()));
    }
    Ok(Config { offset, size, flags, data })
}

fn inflight(bytes: &[u8]) -> Checked<Inflight> {
    // With or without the padding that a C compiler adds.
    if bytes.len() != 20 && bytes.len() != 24 {
        return Err(format!("size {}, expected 20 or 24", bytes.len()));
    }
    let mut r = Reader(bytes);
    let i = Inflight {
        mmap_size: r.u64(),
        mmap_offset: r.u64(),
        num_queues: r.u16(),
        queue_size: r.u16(),
    };
    if i.num_queues == 0 || i.queue_size == 0 || u32::from(i.queue_size) > MAX_RING_SIZE {
        let (n, size) = (i.num_queues, i.queue_size);
        return Err(format!("{n} queues of {size} entries: there is at least one of each"));
    }
    if i.mmap_offset.checked_add(i.mmap_size).is_none() {
        return Err(format!("mmap size {:#x} at {:#x}", i.mmap_size, i.mmap_offset));
    }
    Ok(i)
}

/// Appends a message to `out`.
pub fn encode(message: &Message, out: &mut Vec<u8>) {
    let mut flags = VERSION;
    if message.kind.is_reply() {
        flags |= FLAG_REPLY;
    }
    if message.need_reply {
        flags |= FLAG_NEED_REPLY;
    }
    let start = out.len();
    put32(out, &[message.kind.number(), flags, 0]);
    encode_payload(message.kind, &message.payload, out);
    let size = (out.len() - start - HEADER_SIZE) as u32;
    out[start + 8..start + 12].copy_from_slice(&size.to_ne_bytes());
}

fn encode_payload(kind: Kind, payload: &Payload, out: &mut Vec<u8>) {
    match payload {
        Payload::Empty => {}
        Payload::U64(v) => put64(out, &[*v]),
        Payload::VringFd(v) => {
            put64(out, &[u64::from(v.index) | if v.has_fd { 0 } else { NO_FD }]);
        }
        Payload::VringState(v) => put32(out, &[v.index, v.num]),
        Payload::VringAddr(a) => {
            put32(out, &[a.index, a.flags]);
            put64(out, &[a.descriptor, a.used, a.available, a.log]);
        }
        Payload::MemTable(regions) => {
            put32(out, &[regions.len() as u32, 0]);
            regions.iter().for_each(|r| put_region(out, r));
        }
        Payload::MemRegion(r) => {
            put64(out, &[0]);
            put_region(out, r);
        }
        Payload::Log(l) => put64(out, &[l.size, l.offset]),
        // An answer without data: reading failed.
        Payload::Config(c) if matches!(kind, Kind::Reply(_)) && c.data.is_empty() => {}
        Payload::Config(c) => {
            put32(out, &[c.offset, c.size, c.flags]);
            out.extend_from_slice(&c.data);
        }
        Payload::Inflight(i) => {
            put64(out, &[i.mmap_size, i.mmap_offset]);
            out.extend_from_slice(&i.num_queues.to_ne_bytes());
            out.extend_from_slice(&i.queue_size.to_ne_bytes());
            put32(out, &[0]);
        }
        Payload::Iotlb(m) => {
            put64(out, &[m.iova, m.size, m.user_addr]);
            out.extend_from_slice(&[m.permission, m.kind, 0, 0, 0, 0, 0, 0]);
        }
        Payload::VringArea(a) => put64(out, &[a.index, a.size, a.offset]),
        Payload::DeviceState(s) => put32(out, &[s.direction, s.phase]),
        Payload::Uuid(uuid) => out.extend_from_slice(uuid),
    }
}

fn put_region(out: &mut Vec<u8>, r: &MemRegion) {
    put64(out, &[r.guest_addr, r.size, r.user_addr, r.mmap_offset]);
}

fn put32(out: &mut Vec<u8>, values: &[u32]) {
    values.iter().for_each(|v| out.extend_from_slice(&v.to_ne_bytes()));
}

fn put64(out: &mut Vec<u8>, values: &[u64]) {
    values.iter().for_each(|v| out.extend_from_slice(&v.to_ne_bytes()));
}

/// Takes numbers off the front. Past the end they are zero: lengths are checked before.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => [0; N],
        }
    }

    fn u8(&mut self) -> u8 {
        u8::from_ne_bytes(self.take())
    }

    fn u16(&mut self) -> u16 {
        u16::from_ne_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }
}

#[cfg(test)]
mod tests;
