//! Every message there and back; every length that is not right; nonsense.

use proptest::prelude::*;

use super::*;

fn kinds() -> Vec<Kind> {
    let front = FrontendId::ALL.iter().flat_map(|id| [Kind::Request(*id), Kind::Reply(*id)]);
    let back =
        BackendId::ALL.iter().flat_map(|id| [Kind::BackendRequest(*id), Kind::BackendReply(*id)]);
    front.chain(back).collect()
}

fn incoming(kind: Kind) -> Incoming {
    match kind {
        Kind::Request(_) => Incoming::Requests,
        Kind::Reply(_) => Incoming::Replies,
        Kind::BackendRequest(_) => Incoming::BackendRequests,
        Kind::BackendReply(_) => Incoming::BackendReplies,
    }
}

/// A valid payload for `kind` out of some numbers, and how many descriptors belong to it.
fn payload(kind: Kind, n: [u64; 4], count: usize) -> Option<(Payload, usize)> {
    let (layout, fds) = shape(kind)?;
    let small = |v: u64| v % 0x1_0000_0000;
    let region = |i: u64| MemRegion {
        guest_addr: i << 40 | small(n[0]),
        size: small(n[1]) + 1,
        user_addr: i << 41 | small(n[2]),
        mmap_offset: small(n[3]),
    };
    let payload = match layout {
        Shape::Empty => Payload::Empty,
        Shape::LogAnswer if count.is_multiple_of(3) => Payload::Empty,
        Shape::LogAnswer if count % 3 == 1 => Payload::Log(LogArea { size: n[0], offset: n[1] }),
        Shape::LogAnswer | Shape::U64 => Payload::U64(n[0]),
        Shape::VringFd => {
            Payload::VringFd(VringFd { index: n[0] as u8, has_fd: n[1].is_multiple_of(2) })
        }
        Shape::State => {
            let num = match kind {
                Kind::Request(FrontendId::SetVringNum) => n[1] as u32 % MAX_RING_SIZE + 1,
                Kind::Request(FrontendId::SetVringEnable | FrontendId::SetVringEndian) => {
                    n[1] as u32 % 2
                }
                _ => n[1] as u32,
            };
            Payload::VringState(VringState { index: n[0] as u32, num })
        }
        Shape::Addr => Payload::VringAddr(VringAddr {
            index: n[0] as u32,
            flags: n[1] as u32 & 1,
            descriptor: n[1],
            used: n[2],
            available: n[3],
            log: n[0],
        }),
        Shape::MemTable => {
            Payload::MemTable((0..count.min(MAX_TABLE_REGIONS) as u64).map(region).collect())
        }
        Shape::MemRegion => Payload::MemRegion(region(1)),
        Shape::Log => Payload::Log(LogArea { size: small(n[0]) + 1, offset: small(n[1]) }),
        Shape::Config => {
            let size = n[0] as u32 % (MAX_CONFIG - 1) + 1;
            let offset = n[1] as u32 % (MAX_CONFIG - size + 1);
            let (flags, data) = (n[2] as u32, vec![n[3] as u8; size as usize]);
            Payload::Config(Config { offset, size, flags, data })
        }
        Shape::Inflight => Payload::Inflight(Inflight {
            mmap_size: small(n[0]),
            mmap_offset: small(n[1]),
            num_queues: (n[2] as u16).max(1),
            queue_size: n[3] as u16 % 0x8000 + 1,
        }),
        Shape::Iotlb => Payload::Iotlb(Iotlb {
            iova: n[0],
            size: n[1],
            user_addr: n[2],
            permission: n[3] as u8,
            kind: (n[3] >> 8) as u8,
        }),
        Shape::Area => Payload::VringArea(VringArea { index: n[0], size: n[1], offset: n[2] }),
        Shape::DeviceState => {
            Payload::DeviceState(DeviceState { direction: n[0] as u32 & 1, phase: 0 })
        }
        Shape::Uuid => Payload::Uuid([n[0] as u8; 16]),
    };
    let fds = match fds {
        Fds::Exactly(n) | Fds::UpTo(n) => n,
        Fds::Payload => match &payload {
            Payload::MemTable(t) => t.len(),
            Payload::VringFd(v) => v.has_fd.into(),
            _ => 0,
        },
    };
    Some((payload, fds))
}

fn parse(bytes: &[u8], from: Incoming, fds: usize) -> Result<Message> {
    let head = bytes.first_chunk().ok_or(Error::Disconnected)?;
    let header = decode_header(head, from)?;
    decode(header, &bytes[HEADER_SIZE..], fds)
}

proptest! {
    #[test]
    fn every_message_there_and_back_and_no_other_length(
        n in any::<[u64; 4]>(), count in 0usize..9, need_reply: bool,
    ) {
        for kind in kinds() {
            let Some((payload, fds)) = payload(kind, n, count) else { continue };
            let message = Message { kind, need_reply, payload };
            let layout = shape(kind).unwrap().0;
            let mut bytes = Vec::new();
            encode(&message, &mut bytes);
            let answer = kind == Kind::Reply(FrontendId::SetMemTable);
            if answer && message.payload == Payload::MemTable(Vec::new()) {
                continue; // the same bytes as "it worked"
            }
            prop_assert_eq!(parse(&bytes, incoming(kind), fds).unwrap(), message.clone());
            // Every truncation, and a byte too many; but for what is allowed to be shorter.
            let body = &bytes[HEADER_SIZE..];
            for len in (0..body.len()).chain([body.len() + 1, body.len() + 9]) {
                let mut other = bytes.clone();
                other.resize(HEADER_SIZE + len, 0);
                other[8..12].copy_from_slice(&(len as u32).to_ne_bytes());
                let short = parse(&other, incoming(kind), fds);
                let optional = match &message.payload {
                    Payload::Inflight(_) => len == 20,
                    Payload::Iotlb(_) => len == 26,
                    Payload::MemRegion(_) => len == 8,
                    Payload::MemTable(_) => answer && len == 8,
                    Payload::U64(_) => len == 0,
                    Payload::Log(_) => layout == Shape::LogAnswer && (len == 0 || len == 8),
                    Payload::Config(_) => len == 12 || len == 0,
                    // Fewer whole regions are a table too, with another number of them.
                    _ => false,
                };
                prop_assert!(optional || short.is_err(), "{} {len} {short:?}", kind.name());
            }
            prop_assert!(parse(&bytes, incoming(kind), fds + 1).is_err());
        }
    }

    #[test]
    fn any_bytes_are_survived(
        number in 0u32..60, flags in 0u32..16, body in proptest::collection::vec(any::<u8>(), 0..300),
        fds in 0usize..10,
    ) {
        let mut bytes = Vec::new();
        put32(&mut bytes, &[number, flags, body.len() as u32]);
        bytes.extend_from_slice(&body);
        for from in [
            Incoming::Requests, Incoming::Replies, Incoming::BackendRequests, Incoming::BackendReplies,
        ] {
            if let Ok(message) = parse(&bytes, from, fds) {
                // What was understood can be said again.
                let mut again = Vec::new();
                encode(&message, &mut again);
                prop_assert_eq!(parse(&again, from, fds).unwrap(), message);
            }
        }
    }
}

#[test]
fn numbers_are_those_of_the_specification() {
    assert_eq!(FrontendId::SetInflightFd as u32, 32);
    assert_eq!(FrontendId::GetStatus as u32, 40);
    assert_eq!(BackendId::VringErr as u32, 5);
    let message = Message {
        kind: Kind::Request(FrontendId::SetVringNum),
        need_reply: true,
        payload: Payload::VringState(VringState { index: 1, num: 256 }),
    };
    let mut bytes = Vec::new();
    encode(&message, &mut bytes);
    let words: Vec<u32> =
        bytes.chunks(4).map(|c| u32::from_ne_bytes(c.try_into().unwrap())).collect();
    assert_eq!(words, [8, 1 | 8, 8, 1, 256]);
}

#[test]
fn what_is_wrong_is_named() {
    let refused = |id: FrontendId, body: &[u64], fds: usize, why: &str| {
        let mut bytes = Vec::new();
        put32(&mut bytes, &[id as u32, 1, 8 * body.len() as u32]);
        put64(&mut bytes, body);
        let e = parse(&bytes, Incoming::Requests, fds).unwrap_err().to_string();
        assert!(e.contains(id.name()) && e.contains(why), "{e}");
    };
    use FrontendId::*;
    refused(SetMemTable, &[9], 0, "9 regions");
    refused(SetMemTable, &[1, 0x1000, 0, 0x1000, 0], 1, "not a range");
    refused(SetMemTable, &[1, u64::MAX, 2, 0, 0], 1, "guest address");
    refused(SetMemTable, &[1, 0, 2, u64::MAX, 0], 1, "user address");
    refused(SetMemTable, &[1, 0, 2, 0, u64::MAX], 1, "mmap offset");
    refused(SetMemTable, &[2, 0, 0x2000, 0, 0, 0x1000, 0x1000, 0x9000, 0], 2, "overlap at guest");
    refused(SetMemTable, &[2, 0, 0x2000, 0, 0, 0x8000, 0x1000, 0x1fff, 0], 2, "overlap at user");
    refused(SetMemTable, &[1, 0, 0x2000, 0, 0], 2, "2 descriptors came along, expected 1");
    refused(SetVringNum, &[0], 0, "num 0");
    refused(SetVringKick, &[0x100], 1, "descriptors");
    refused(SetVringKick, &[0x200], 0, "bits 0 to 8");
    refused(SetVringEnable, &[2 << 32], 0, "expected 0 or 1");
    refused(SetFeatures, &[], 0, "size 0, expected 8");
    refused(AddMemReg, &[0, 0, 0x1000, 0, 0], 0, "0 descriptors");
    refused(CreateCryptoSession, &[], 0, "not supported");
    let head = |words: [u32; 3]| {
        let mut bytes = Vec::new();
        put32(&mut bytes, &words);
        decode_header(bytes.first_chunk().unwrap(), Incoming::Requests).unwrap_err().to_string()
    };
    assert!(head([99, 1, 0]).contains("request 99"));
    assert!(head([1, 2, 0]).contains("version"));
    assert!(head([1, 5, 0]).contains("request was expected"));
    assert!(head([1, 1, u32::MAX]).contains("at most"));
}
