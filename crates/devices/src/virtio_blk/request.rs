//! What a descriptor chain asks for (VIRTIO 1.2, section 5.2.6): decoded and checked. Nothing in
//! a chain is trusted.

use std::sync::atomic::Ordering;

use block::stats::Kind;
use block::{Op, SECTOR};
use virtio::Chain;

use super::Shared;
use super::config::{MAX_DISCARD_SECTORS, MAX_ZERO_SECTORS};

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Bytes of the header in front of every request.
pub(super) const HEADER: u32 = 16;
const SEGMENT: u32 = 16;
const FLAG_UNMAP: u32 = 1;

/// The status byte at the end of every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupported = 2,
}

/// What is to be done with a chain.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Todo {
    /// Hand this to the engine.
    Io { op: Op, bytes: u64 },
    /// Answer at once, `written` bytes of data in front of the status.
    Answer { status: Status, written: u32 },
    /// Not even a header or a status byte: the driver broke the rules.
    Broken(&'static str),
}

const fn refuse(status: Status) -> Todo {
    Todo::Answer { status, written: 0 }
}

/// Decodes and checks a chain.
pub(super) fn decode(shared: &Shared, chain: &Chain) -> Todo {
    let (Some(kind), Some(sector)) = (read_u32(chain, 0), read_u64(chain, 8)) else {
        return Todo::Broken("a block request without a whole header");
    };
    if chain.writable_len() < 1 {
        return Todo::Broken("a block request without room for its status");
    }
    let data_in = chain.writable_len() - 1;
    let data_out = chain.readable_len() - HEADER;
    match kind {
        T_IN if data_out > 0 => invalid(shared, Kind::Read),
        T_IN => match range(shared, sector, data_in) {
            Some(offset) => Todo::Io { op: Op::Read { offset }, bytes: data_in.into() },
            None => invalid(shared, Kind::Read),
        },
        T_OUT | T_DISCARD | T_WRITE_ZEROES if shared.disk.read_only() => {
            invalid(shared, Kind::Write)
        }
        T_OUT if data_in > 0 => invalid(shared, Kind::Write),
        T_OUT => match range(shared, sector, data_out) {
            Some(offset) => {
                let durable = !shared.writeback.load(Ordering::Acquire);
                Todo::Io { op: Op::Write { offset, durable }, bytes: data_out.into() }
            }
            None => invalid(shared, Kind::Write),
        },
        T_FLUSH => Todo::Io { op: Op::Flush, bytes: 0 },
        T_GET_ID => get_id(shared, chain, data_in),
        T_DISCARD | T_WRITE_ZEROES => space(shared, chain, kind, data_out),
        _ => refuse(Status::Unsupported),
    }
}

fn invalid(shared: &Shared, kind: Kind) -> Todo {
    shared.disk.live_stats().invalid(kind);
    refuse(Status::IoErr)
}

fn get_id(shared: &Shared, chain: &Chain, room: u32) -> Todo {
    let n = shared.serial.len().min(room as usize);
    chain.write_at(0, &shared.serial[..n]);
    Todo::Answer { status: Status::Ok, written: n as u32 }
}

/// A discard or write-zeroes with its one segment.
fn space(shared: &Shared, chain: &Chain, kind: u32, data_out: u32) -> Todo {
    let discard = kind == T_DISCARD;
    let class = if discard { Kind::Unmap } else { Kind::Write };
    let segment =
        (read_u64(chain, HEADER), read_u32(chain, HEADER + 8), read_u32(chain, HEADER + 12));
    let (Some(sector), Some(count), Some(flags)) = segment else {
        return invalid(shared, class);
    };
    if data_out != SEGMENT {
        return invalid(shared, class);
    }
    if flags & !FLAG_UNMAP != 0 || (discard && flags != 0) {
        return refuse(Status::Unsupported);
    }
    let most = if discard { MAX_DISCARD_SECTORS } else { MAX_ZERO_SECTORS };
    let inside = sector.checked_add(count.into()).is_some_and(|end| end <= shared.sectors());
    if count > most || !inside {
        return invalid(shared, class);
    }
    let (offset, len) = (sector * SECTOR, u64::from(count) * SECTOR);
    if count == 0 || (discard && !shared.disk.unmap()) {
        return refuse(Status::Ok); // nothing to do
    }
    let op = if discard {
        Op::Discard { offset, len }
    } else {
        let unmap = flags & FLAG_UNMAP != 0 && shared.disk.unmap();
        Op::WriteZeroes { offset, len, unmap }
    };
    Todo::Io { op, bytes: len }
}

/// Byte offset of a transfer of `len` bytes at `sector`, if whole and inside the disk.
fn range(shared: &Shared, sector: u64, len: u32) -> Option<u64> {
    let whole = u64::from(len).is_multiple_of(SECTOR);
    let end = sector.checked_add(u64::from(len) / SECTOR)?;
    (whole && end <= shared.sectors()).then_some(sector * SECTOR)
}

fn read_u32(chain: &Chain, at: u32) -> Option<u32> {
    let mut b = [0; 4];
    (chain.read_at(at, &mut b) == b.len()).then(|| u32::from_le_bytes(b))
}

fn read_u64(chain: &Chain, at: u32) -> Option<u64> {
    let mut b = [0; 8];
    (chain.read_at(at, &mut b) == b.len()).then(|| u64::from_le_bytes(b))
}
