//! Both formats against a model of the driver; split against the `virtio-queue` crate; nonsense.

mod threads;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mem::{Bitmap, DirtySource, GuestMemory};
use proptest::prelude::*;
use virtio_queue::{Queue as OracleQueue, QueueT};
use vm_memory::{Address, GuestAddress};

use super::*;
use crate::features::{VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, mask};
use crate::testing::{Buffer, CountingInterrupt, DriverRing, hostile, ram};

const RAM: u64 = 1 << 20;
const DATA: u64 = 0x40000;
const TABLES: u64 = 0x20000;
const LONG_TABLE: u64 = 0x80000;

fn features(packed: bool, event: bool) -> u64 {
    let mut f = mask(VIRTIO_F_INDIRECT_DESC);
    if packed {
        f |= mask(VIRTIO_F_RING_PACKED);
    }
    if event {
        f |= mask(VIRTIO_F_EVENT_IDX);
    }
    f
}

fn both(size: u16, features: u64) -> (GuestMemory, DriverRing, Ring) {
    let mem = ram(RAM);
    let driver = DriverRing::new(&mem, 0, size, features);
    let ring = Ring::new(&driver.setup(None, Arc::new(CountingInterrupt::default()))).unwrap();
    (mem, driver, ring)
}

/// Guest addresses and lengths of iovecs, in the one region at address 0.
fn buffers(mem: &GuestMemory, iov: &[libc::iovec]) -> Vec<Buffer> {
    let base = mem.regions()[0].host;
    iov.iter().map(|v| ((v.iov_base as usize - base) as u64, v.iov_len as u32)).collect()
}

fn buffer_list() -> impl Strategy<Value = Vec<Buffer>> {
    prop::collection::vec((DATA..RAM - 0x1000, 1u32..0x1000), 0..4)
}

#[derive(Debug, Clone)]
enum Op {
    Add { readable: Vec<Buffer>, writable: Vec<Buffer>, indirect: bool },
    Pop,
    Unpop,
    Push { which: usize, written: u32 },
    Publish,
    Poll,
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (buffer_list(), buffer_list(), any::<bool>()).prop_map(|(mut readable, writable, indirect)| {
            if readable.is_empty() && writable.is_empty() {
                readable.push((DATA, 1));
            }
            Op::Add { readable, writable, indirect }
        }),
        3 => Just(Op::Pop),
        1 => Just(Op::Unpop),
        3 => (any::<usize>(), any::<u32>()).prop_map(|(which, written)| Op::Push { which, written }),
        2 => Just(Op::Publish),
        2 => Just(Op::Poll),
        1 => Just(Op::Restart),
    ]
}

/// Runs `ops`, with every chain checked against what the driver added, and every used one against
/// what the device pushed.
fn run_model(packed: bool, event: bool, size: u16, ops: Vec<Op>) {
    let (mem, mut driver, mut ring) = both(size, features(packed, event));
    let mut added: HashMap<u16, (Vec<Buffer>, Vec<Buffer>)> = HashMap::new();
    let mut waiting = 0_usize;
    let mut taken: Vec<Chain> = Vec::new();
    let mut pushed: Vec<(u16, u32)> = Vec::new();
    let mut published = 0;
    let mut table = 0;
    for op in ops {
        match op {
            Op::Add { readable, writable, indirect } => {
                table = (table + 1) % 256;
                let at = indirect.then_some(TABLES + table * 0x100);
                if let Some(id) = driver.add(&readable, &writable, at) {
                    added.insert(id, (readable, writable));
                    waiting += 1;
                }
            }
            Op::Pop => {
                let mut chain = Chain::new();
                assert_eq!(ring.has_work(), waiting > 0);
                assert_eq!(ring.pop(&mut chain), Ok(waiting > 0));
                if waiting > 0 {
                    waiting -= 1;
                    let (readable, writable) = &added[&chain.id()];
                    assert_eq!(&buffers(&mem, chain.readable()), readable);
                    assert_eq!(&buffers(&mem, chain.writable()), writable);
                    taken.push(chain);
                }
            }
            // Only the last one popped can go back, which is the last in the list unless that
            // was pushed.
            Op::Unpop => {
                if let Some(chain) = taken.pop() {
                    match ring.unpop(&chain) {
                        Ok(()) => waiting += 1,
                        Err(e) => {
                            assert_eq!(e, RingError::Unpop);
                            taken.push(chain);
                        }
                    }
                }
            }
            Op::Push { which, written } if !taken.is_empty() => {
                let chain = taken.remove(which % taken.len());
                let written = written.min(chain.writable_len());
                ring.push(&chain, written);
                pushed.push((chain.id(), written));
            }
            Op::Push { .. } => {}
            Op::Publish => {
                ring.publish();
                published = pushed.len();
            }
            Op::Poll => {
                while let Some(used) = driver.poll_used() {
                    assert!(published > 0, "the driver sees what was not published");
                    published -= 1;
                    assert_eq!(used, pushed.remove(0));
                }
                assert_eq!(published, 0);
            }
            Op::Restart if taken.is_empty() => {
                let pos = ring.position();
                published = pushed.len();
                let call = Arc::new(CountingInterrupt::default());
                ring = Ring::new(&driver.setup(Some(pos), call)).unwrap();
            }
            Op::Restart => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn split_serves_a_correct_driver(
        event: bool, bits in 0u32..6, ops in prop::collection::vec(op(), 0..200),
    ) {
        run_model(false, event, 1 << bits, ops);
    }

    #[test]
    fn packed_serves_a_correct_driver(
        event: bool, size in 1u16..40, ops in prop::collection::vec(op(), 0..200),
    ) {
        run_model(true, event, size, ops);
    }

    #[test]
    fn nonsense_is_survived(packed: bool, input in prop::collection::vec(any::<u8>(), 0..600)) {
        hostile(packed, &input);
    }

    /// The same avail ring served by both; the other crate's used ring lies elsewhere.
    #[test]
    fn split_agrees_with_virtio_queue(
        event: bool,
        chains in prop::collection::vec((buffer_list(), buffer_list(), any::<bool>(), any::<u32>()), 1..60),
        batch in 1usize..8,
    ) {
        let (mem, mut driver, mut ring) = both(16, features(false, event));
        let mut oracle = OracleQueue::new(16).unwrap();
        let theirs = 0x10000;
        oracle.set_desc_table_address(Some(driver.desc as u32), Some(0));
        oracle.set_avail_ring_address(Some(driver.avail as u32), Some(0));
        oracle.set_used_ring_address(Some(theirs), Some(0));
        oracle.set_event_idx(event);
        oracle.set_ready(true);
        let vm = mem.mmap();
        prop_assert!(oracle.is_valid(vm));
        for (n, group) in chains.chunks(batch).enumerate() {
            for (i, (r, w, indirect, _)) in group.iter().enumerate() {
                let table = indirect.then_some(TABLES + 0x100 * i as u64);
                if !(r.is_empty() && w.is_empty()) {
                    driver.add(r, w, table);
                }
            }
            if n % 2 == 0 { driver.enable_interrupts() } else { driver.disable_interrupts() }
            let mut chain = Chain::new();
            for (_, _, _, written) in group {
                let ours = ring.pop(&mut chain).unwrap();
                let other = oracle.pop_descriptor_chain(vm);
                prop_assert_eq!(ours, other.is_some());
                let Some(other) = other else { continue };
                prop_assert_eq!(chain.id(), other.head_index());
                let list = |c: virtio_queue::DescriptorChain<_>, write: bool| -> Vec<Buffer> {
                    c.filter(|d: &virtio_queue::desc::split::Descriptor| d.is_write_only() == write)
                        .map(|d| (d.addr().raw_value(), d.len()))
                        .collect()
                };
                prop_assert_eq!(buffers(&mem, chain.readable()), list(other.clone(), false));
                prop_assert_eq!(buffers(&mem, chain.writable()), list(other.clone(), true));
                ring.push(&chain, *written);
                oracle.add_used(vm, other.head_index(), *written).unwrap();
            }
            ring.publish();
            prop_assert_eq!(oracle.used_idx(vm, Ordering::Relaxed).unwrap().0, ring.position().used);
            // At the first time, and without anything new, ours is free to differ.
            let any_used = ring.position().used != 0;
            let (a, b) = (ring.needs_notification(), oracle.needs_notification(vm).unwrap());
            if event && any_used && n > 0 {
                prop_assert!(!a || b, "an interrupt that the driver did not ask for");
            }
            let mut used = [[0; 4 + 8 * 16]; 2];
            mem.read(driver.used, &mut used[0]).unwrap();
            mem.read(GuestAddress(theirs.into()).raw_value(), &mut used[1]).unwrap();
            prop_assert_eq!(&used[0][2..], &used[1][2..]);
            while driver.poll_used().is_some() {}
            let (a, b) = (ring.enable_kicks(), oracle.enable_notification(vm).unwrap());
            prop_assert_eq!(a, b);
            prop_assert_eq!(!event || driver.kick_event() == oracle.next_avail(), true);
        }
    }
}

/// Whether the driver is interrupted exactly when it asked for it.
#[test]
fn interrupts_follow_the_drivers_wish() {
    for (packed, event) in [(false, false), (false, true), (true, false), (true, true)] {
        let (_mem, mut driver, mut ring) = both(4, features(packed, event));
        let mut chain = Chain::new();
        let mut one = |driver: &mut DriverRing, ring: &mut Ring| {
            driver.add(&[(DATA, 8)], &[], None).unwrap();
            assert!(ring.pop(&mut chain).unwrap());
            ring.push(&chain, 0);
            ring.publish();
            ring.needs_notification()
        };
        driver.enable_interrupts();
        assert!(one(&mut driver, &mut ring));
        assert!(!ring.needs_notification(), "nothing new");
        for round in 0..20 {
            while driver.poll_used().is_some() {}
            driver.enable_interrupts();
            assert!(one(&mut driver, &mut ring), "{packed} {event} {round}");
            if event {
                // Not asked for again.
                assert!(!one(&mut driver, &mut ring), "{packed} {event} {round}");
            }
            while driver.poll_used().is_some() {}
            driver.disable_interrupts();
            assert!(!one(&mut driver, &mut ring), "{packed} {event} {round}");
        }
    }
}

#[test]
fn kicks_are_asked_for_and_not() {
    for (packed, event) in [(false, false), (false, true), (true, false), (true, true)] {
        let (_mem, mut driver, mut ring) = both(4, features(packed, event));
        assert!(!ring.enable_kicks());
        assert!(!driver.kicks_disabled());
        if event {
            assert_eq!(driver.kick_event(), ring.position().avail);
        }
        ring.disable_kicks();
        assert_eq!(driver.kicks_disabled(), packed || !event);
        driver.add(&[(DATA, 8)], &[], None).unwrap();
        assert!(ring.enable_kicks(), "work came while kicks were off");
    }
}

#[test]
fn what_is_written_is_dirty_when_published() {
    for packed in [false, true] {
        let (mem, mut driver, mut ring) = both(8, features(packed, false));
        driver.add(&[(DATA, 8)], &[(DATA + 0x1ff0, 0x20), (DATA + 0x8000, 0x1000)], None).unwrap();
        mem.start().unwrap();
        let mut chain = Chain::new();
        assert!(ring.pop(&mut chain).unwrap());
        // 0x30 bytes by some other means (readv), one byte at the end by hand.
        assert_eq!(chain.write_at(0x101f, &[1]), 1);
        ring.push(&chain, 0x30);
        ring.publish();
        let map = Bitmap::new(RAM / 4096);
        mem.harvest(0, &map).unwrap();
        let dirty: Vec<u64> = (0..map.len()).filter(|b| map.test(*b)).collect();
        let data = DATA / 4096;
        assert_eq!(dirty, [0, data + 1, data + 2, data + 8], "packed: {packed}");
    }
}

#[test]
fn copies_go_across_buffers() {
    let (mem, mut driver, mut ring) = both(8, features(false, false));
    mem.write(DATA, b"abcdef").unwrap();
    driver.add(&[(DATA, 2), (DATA + 2, 4)], &[(DATA + 0x100, 3), (DATA + 0x200, 3)], None).unwrap();
    let mut chain = Chain::new();
    assert!(ring.pop(&mut chain).unwrap());
    let mut buf = [0; 8];
    assert_eq!(chain.read_at(1, &mut buf), 5);
    assert_eq!(&buf[..5], b"bcdef");
    assert_eq!(chain.read_obj::<u32>(1), Some(u32::from_le_bytes(*b"bcde")));
    assert_eq!(chain.read_obj::<u32>(3), None);
    assert_eq!(chain.write_at(2, b"wxyz"), 4);
    assert_eq!(chain.write_at(7, b"q"), 0);
    mem.read(DATA + 0x200, &mut buf[..3]).unwrap();
    assert_eq!(&buf[..3], b"xyz");
    let mut iov = Vec::new();
    assert_eq!(chain.writable_iovecs(1, 3, &mut iov), 3);
    assert_eq!(buffers(&mem, &iov), [(DATA + 0x101, 2), (DATA + 0x200, 1)]);
    assert_eq!(chain.fill_zero_at(1, 100), 5);
}

/// The reason, and what the driver does.
type Broken<'a> = (RingError, &'a dyn Fn(&DriverRing));

/// Every rule that a driver can break, with the reason that is given.
#[test]
fn broken_rules_are_named() {
    let desc = |addr: u64, len: u32, a: u16, b: u16| -> [u8; 16] {
        let mut d = [0; 16];
        d[..8].copy_from_slice(&addr.to_le_bytes());
        d[8..12].copy_from_slice(&len.to_le_bytes());
        d[12..14].copy_from_slice(&a.to_le_bytes());
        d[14..].copy_from_slice(&b.to_le_bytes());
        d
    };
    let set = |d: &DriverRing, at: u64, bytes: [u8; 16]| d.mem.write(at, &bytes).unwrap();
    let cases: &[Broken<'_>] = &[
        (RingError::ChainTooLong, &|d| set(d, 0, desc(DATA, 1, 1, 0))),
        (RingError::DescriptorIndex { index: 9, size: 8 }, &|d| set(d, 0, desc(DATA, 1, 1, 9))),
        (RingError::IndirectNested, &|d| set(d, 0, desc(TABLES, 16, 5, 0))),
        (RingError::IndirectLength(17), &|d| set(d, 0, desc(TABLES, 17, 4, 0))),
        (RingError::IndirectLength(0), &|d| set(d, 0, desc(TABLES, 0, 4, 0))),
        (RingError::Buffer { addr: RAM - 4, len: 8 }, &|d| set(d, 0, desc(RAM - 4, 8, 0, 0))),
        (RingError::Buffer { addr: u64::MAX, len: 8 }, &|d| set(d, 0, desc(u64::MAX, 8, 0, 0))),
        (RingError::TooManyAvailable, &|d| d.mem.write(d.avail + 2, &[9, 0]).unwrap()),
        (RingError::Order, &|d| {
            set(d, 0, desc(DATA, 1, 3, 1));
            set(d, 16, desc(DATA, 1, 0, 0));
        }),
        (RingError::IndirectNested, &|d| {
            set(d, 0, desc(TABLES, 16, 4, 0));
            set(d, TABLES, desc(TABLES, 16, 4, 0));
        }),
        (RingError::ChainTooLong, &|d| {
            set(d, 0, desc(TABLES, 32, 4, 0));
            set(d, TABLES, desc(DATA, 1, 1, 1));
            set(d, TABLES + 16, desc(DATA, 1, 1, 0));
        }),
        (RingError::ChainTooLong, &|d| {
            // Empty buffers take no room, but time.
            set(d, 0, desc(LONG_TABLE, 16 * 1100, 4, 0));
            for i in 0..1100 {
                let next = u16::from(i < 1099);
                set(d, LONG_TABLE + 16 * u64::from(i), desc(DATA, 0, next, i + 1));
            }
        }),
        (RingError::DescriptorIndex { index: 2, size: 2 }, &|d| {
            set(d, 0, desc(TABLES, 32, 4, 0));
            set(d, TABLES, desc(DATA, 1, 1, 2));
        }),
    ];
    for (want, breaks) in cases {
        let (_mem, mut driver, mut ring) = both(8, features(false, false));
        assert_eq!(driver.add(&[(DATA, 1)], &[], None), Some(0));
        breaks(&driver);
        let mut chain = Chain::new();
        assert_eq!(ring.pop(&mut chain), Err(*want));
        assert_eq!(ring.pop(&mut chain), Err(*want), "it stays where it is");
    }
}

/// Found by fuzzing: an avail index that goes back is not work.
#[test]
fn an_index_that_goes_back_is_refused() {
    let (mem, mut driver, mut ring) = both(8, features(false, false));
    let mut chain = Chain::new();
    for _ in 0..3 {
        driver.add(&[(DATA, 1)], &[], None).unwrap();
        assert!(ring.pop(&mut chain).unwrap());
    }
    mem.store_u16(driver.avail + 2, 2, Ordering::Release).unwrap();
    assert_eq!(ring.pop(&mut chain), Err(RingError::TooManyAvailable));
    assert_eq!(ring.taken(), 3);
}

#[test]
fn set_up_is_checked() {
    let mem = ram(RAM);
    let call = Arc::new(CountingInterrupt::default());
    for packed in [false, true] {
        let driver = DriverRing::new(&mem, 0, 8, features(packed, false));
        let make = |change: &dyn Fn(&mut crate::RingSetup)| {
            let mut s = driver.setup(None, Arc::clone(&call) as _);
            change(&mut s);
            Ring::new(&s).map(|_| ())
        };
        assert!(make(&|_| ()).is_ok());
        assert!(matches!(make(&|s| s.size = 0), Err(RingError::Size(0))));
        assert!(matches!(make(&|s| s.size = 32769), Err(RingError::Size(_))));
        assert_eq!(make(&|s| s.size = 7).is_ok(), packed);
        assert!(matches!(make(&|s| s.desc = RAM - 16), Err(RingError::Address { .. })));
        assert!(matches!(make(&|s| s.used = u64::MAX - 3), Err(RingError::Address { .. })));
        assert!(matches!(make(&|s| s.desc = 8), Err(RingError::Unaligned { .. })));
        assert!(matches!(make(&|s| s.avail += 1), Err(RingError::Unaligned { .. })));
        let far = crate::RingPos { avail: 9, used: 0 };
        assert!(matches!(make(&|s| s.pos = Some(far)), Err(RingError::Position(_))));
    }
}
