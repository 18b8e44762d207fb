//! A driver that writes nonsense: the body of the rings' fuzz targets and of a property test.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{CountingInterrupt, DriverRing, ram};
use crate::device::RingPos;
use crate::features::{VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_RING_PACKED, mask};
use crate::ring::{Chain, Ring};

const RAM: u64 = 0x10000;

/// Interprets `input` as a ring of nonsense and a list of steps of device and driver.
///
/// # Panics
/// If the device's side breaks one of its promises.
pub fn hostile(packed: bool, input: &[u8]) {
    let mut input = input.iter().copied();
    let mut byte = || input.next();
    let (Some(shape), Some(a), Some(b), Some(c)) = (byte(), byte(), byte(), byte()) else { return };
    let size = if packed { u16::from(shape >> 3) + 1 } else { 1 << (shape >> 5) };
    let mut features = if packed { mask(VIRTIO_F_RING_PACKED) } else { 0 };
    if shape & 1 != 0 {
        features |= mask(VIRTIO_F_EVENT_IDX);
    }
    if shape & 2 != 0 {
        features |= mask(VIRTIO_F_INDIRECT_DESC);
    }
    let pos = (shape & 4 != 0).then(|| RingPos {
        avail: u16::from_le_bytes([a, c & 0x80]),
        used: u16::from_le_bytes([b, c << 1 & 0x80]),
    });
    let mem = ram(RAM);
    let driver = DriverRing::new(&mem, 0, size, features);
    // Addresses are mostly plausible, or nothing but addresses would be tested.
    for i in 0..u64::from(size) + 16 {
        let at = if i < u64::from(size) { 16 * i } else { 0x8000 + 16 * (i - u64::from(size)) };
        let Some(kind) = byte() else { break };
        let addr = match kind >> 6 {
            0 => u64::from(kind) << 58,
            1 => RAM - u64::from(kind & 0x3f),
            2 => 0x8000 + 16 * u64::from(kind & 3),
            _ => u64::from(kind) << 6,
        };
        let len = match byte().unwrap_or(0) {
            255 => u32::MAX,
            n if n & 1 == 0 => 16 * u32::from(n & 0xf),
            n => u32::from(n),
        };
        let (x, y) = (byte().unwrap_or(0), byte().unwrap_or(0));
        let flags = u16::from(x & 7) | u16::from(x & 8) << 4 | u16::from(x & 16) << 11;
        let (p, q) = if packed { (u16::from(y), flags) } else { (flags, u16::from(y)) };
        driver.put(at, &DriverRing::encode((addr, len), p, q));
    }
    let call = Arc::new(CountingInterrupt::default());
    if let Ok(ring) = Ring::new(&driver.setup(pos, call)) {
        play(ring, &driver, &mut byte);
    }
}

/// Steps until the input ends.
fn play(mut ring: Ring, driver: &DriverRing, byte: &mut dyn FnMut() -> Option<u8>) {
    let mut taken: Vec<Chain> = Vec::new();
    let mut spare: Vec<Chain> = Vec::new();
    let limit = usize::from(ring.size());
    let before = usize::from(ring.taken());
    while let Some(op) = byte() {
        match op & 7 {
            0 | 1 => {
                let mut chain = spare.pop().unwrap_or_default();
                if matches!(ring.pop(&mut chain), Ok(true)) {
                    touch(&chain);
                    taken.push(chain);
                }
            }
            2 => {
                if let Some(chain) = taken.pop() {
                    // Fails when it is not the last one popped, which chains used in between and
                    // restored positions make so.
                    if ring.unpop(&chain).is_err() {
                        ring.push(&chain, u32::from(op));
                    }
                    spare.push(chain);
                }
            }
            3 if !taken.is_empty() => {
                let chain = taken.swap_remove(usize::from(op >> 3) % taken.len());
                ring.push(&chain, chain.writable_len());
                spare.push(chain);
            }
            4 => {
                ring.publish();
                ring.needs_notification();
            }
            5 => {
                ring.enable_kicks();
                ring.disable_kicks();
            }
            // The driver goes on writing nonsense: flags and indexes, then anything.
            6 => driver.put_u16(driver.avail + 2, u16::from(byte().unwrap_or(0))),
            _ => {
                let at = u64::from(byte().unwrap_or(0)) * 2 * u64::from(op >> 3 | 1);
                let v = u16::from_le_bytes([byte().unwrap_or(0), byte().unwrap_or(0)]);
                driver.put_u16((at % 0xf000) & !1, v);
            }
        }
        assert!(taken.len() + before.min(limit) <= limit.max(before), "more taken than entries");
    }
    ring.position();
}

/// Reads and writes everything that the chain shows.
fn touch(chain: &Chain) {
    let mut sum = 0_u64;
    for v in chain.readable().iter().chain(chain.writable()) {
        assert!(v.iov_len as u64 <= RAM, "a buffer larger than memory");
        sum += v.iov_len as u64;
    }
    assert_eq!(sum, u64::from(chain.readable_len()) + u64::from(chain.writable_len()));
    let mut buf = [0; 64];
    chain.read_at(0, &mut buf);
    chain.write_at(chain.writable_len().saturating_sub(8), &buf[..8]);
    std::sync::atomic::fence(Ordering::SeqCst);
}
