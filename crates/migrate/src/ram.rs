//! RAM frames: what goes over a RAM connection.
//!
//! A frame is a 32-byte header, a table of runs, and then the pages of all runs that are not zero,
//! raw, in the table's order:
//!
//! ```text
//!   0  magic "TnRM"     4  kind u8 (0 pages, 1 sync, 2 last sync), 0 u8    6  region u16
//!   8  runs u32 (at most MAX_RUNS)     12 pages of data u32 (at most MAX_DATA_PAGES)
//!   16 sequence u64, from 0 on each connection     24 round u32 (sync frames)
//!   28 CRC-32C over bytes 0..28 and the table      (little-endian)
//!   run: first page u32 in the region, count u31, top bit set for zero pages
//! ```
//!
//! The pages themselves carry no checksum: the guest may change them while they are sent, and then
//! they are dirty and sent again. A sync frame ends a round on its connection.

use crate::{Error, Result};

/// Bytes of a RAM frame's header.
pub const HEADER: usize = 32;
/// Bytes of a run in the table.
pub const RUN: usize = 8;
/// Most runs in a frame; with the header, their iovecs fit one writev.
pub const MAX_RUNS: usize = 512;
/// Most pages of data in a frame: 1 MiB.
pub const MAX_DATA_PAGES: u32 = 256;
/// Most pages in one run, so that a run of zero pages is bounded work too: 8 GiB.
pub const MAX_RUN_PAGES: u32 = 1 << 21;

const MAGIC: [u8; 4] = *b"TnRM";
const ZERO: u32 = 1 << 31;

/// Pages next to each other, all zero or all with data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub first: u32,
    pub count: u32,
    pub zero: bool,
}

impl Run {
    /// Adds its bytes in the table to `to`.
    pub fn put(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.first.to_le_bytes());
        let count = self.count | if self.zero { ZERO } else { 0 };
        to.extend_from_slice(&count.to_le_bytes());
    }

    fn get(b: &[u8]) -> Self {
        let first = u32_at(b, 0);
        let count = u32_at(b, 4);
        Self { first, count: count & !ZERO, zero: count & ZERO != 0 }
    }
}

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Pages of region `region`: `runs` runs, `data` pages with data.
    Pages { region: u16, runs: u32, data: u32 },
    /// The end of round `round` on this connection; `last` when nothing follows.
    Sync { round: u32, last: bool },
}

/// Writes the header into the first [`HEADER`] bytes of `frame`, whose rest is the table.
pub fn seal(frame: &mut [u8], kind: Kind, sequence: u64) {
    let (code, region, runs, data, round) = match kind {
        Kind::Pages { region, runs, data } => (0, region, runs, data, 0),
        Kind::Sync { round, last } => (1 + u8::from(last), 0, 0, 0, round),
    };
    frame[0..4].copy_from_slice(&MAGIC);
    frame[4] = code;
    frame[5] = 0;
    frame[6..8].copy_from_slice(&region.to_le_bytes());
    frame[8..12].copy_from_slice(&runs.to_le_bytes());
    frame[12..16].copy_from_slice(&data.to_le_bytes());
    frame[16..24].copy_from_slice(&sequence.to_le_bytes());
    frame[24..28].copy_from_slice(&round.to_le_bytes());
    let crc = checksum(&frame[..28], &frame[HEADER..]);
    frame[28..32].copy_from_slice(&crc.to_le_bytes());
}

/// Reads a header; its checksum needs the table and is checked by [`table`].
///
/// # Errors
/// [`Error::Protocol`] when it is not one, or passes a bound.
pub fn header(b: &[u8; HEADER], sequence: u64) -> Result<Kind> {
    let wrong = |why: String| Err(Error::Protocol(format!("memory frame {sequence}: {why}")));
    if b[0..4] != MAGIC {
        return wrong(format!("its magic is {:02x?}", &b[0..4]));
    }
    let came = u64::from_le_bytes(b[16..24].try_into().unwrap_or_default());
    if came != sequence {
        return wrong(format!("it has sequence number {came}"));
    }
    let (runs, data, round) = (u32_at(b, 8), u32_at(b, 12), u32_at(b, 24));
    let region = u16::from_le_bytes([b[6], b[7]]);
    match b[4] {
        0 if runs == 0 || runs as usize > MAX_RUNS || data > MAX_DATA_PAGES => {
            wrong(format!("{runs} runs with {data} pages; at most {MAX_RUNS}, {MAX_DATA_PAGES}"))
        }
        0 => Ok(Kind::Pages { region, runs, data }),
        1 | 2 if runs == 0 && data == 0 => Ok(Kind::Sync { round, last: b[4] == 2 }),
        kind => wrong(format!("unknown kind {kind}")),
    }
}

/// Checks the frame's checksum, and its runs against `pages`, the size of the region in pages.
/// Fills `runs`.
///
/// # Errors
/// [`Error::Protocol`] for a wrong checksum, runs outside the region, or a wrong sum of pages.
pub fn table(
    head: &[u8; HEADER],
    table: &[u8],
    data: u32,
    pages: u64,
    runs: &mut Vec<Run>,
) -> Result<()> {
    check(head, table)?;
    runs.clear();
    let mut sum = 0u64;
    for b in table.chunks_exact(RUN) {
        let run = Run::get(b);
        let end = u64::from(run.first) + u64::from(run.count);
        if run.count == 0 || run.count > MAX_RUN_PAGES || end > pages {
            return Err(Error::Protocol(format!(
                "memory pages {} to {end} are outside their region of {pages} pages",
                run.first
            )));
        }
        sum += if run.zero { 0 } else { u64::from(run.count) };
        runs.push(run);
    }
    if sum != u64::from(data) {
        return Err(Error::Protocol(format!(
            "a memory frame announces {data} pages and lists {sum}"
        )));
    }
    Ok(())
}

/// Checks the checksum of a frame.
///
/// # Errors
/// [`Error::Protocol`] when it is wrong.
pub fn check(head: &[u8; HEADER], table: &[u8]) -> Result<()> {
    if checksum(&head[..28], table) != u32_at(head, 28) {
        return Err(Error::Protocol("a memory frame's checksum is wrong".into()));
    }
    Ok(())
}

fn checksum(head: &[u8], table: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(head), table)
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn reads_what_it_writes(
            list in proptest::collection::vec((0u32..1000, 1u32..8, any::<bool>()), 1..30),
            sequence: u64, region: u16,
        ) {
            let list: Vec<_> = list.into_iter()
                .map(|(first, count, zero)| Run { first, count, zero }).collect();
            let data = list.iter().filter(|r| !r.zero).map(|r| r.count).sum();
            let mut frame = vec![0; HEADER];
            list.iter().for_each(|r| r.put(&mut frame));
            let kind = Kind::Pages { region, runs: list.len() as u32, data };
            seal(&mut frame, kind, sequence);
            let head: [u8; HEADER] = frame[..HEADER].try_into().unwrap();
            prop_assert_eq!(header(&head, sequence).unwrap(), kind);
            prop_assert!(header(&head, sequence.wrapping_add(1)).is_err());
            let mut runs = Vec::new();
            table(&head, &frame[HEADER..], data, 2000, &mut runs).unwrap();
            prop_assert_eq!(&runs, &list);
            prop_assert!(table(&head, &frame[HEADER..], data + 1, 2000, &mut runs).is_err());
            let most = list.iter().map(|r| r.first + r.count).max().unwrap();
            prop_assert!(
                table(&head, &frame[HEADER..], data, u64::from(most) - 1, &mut runs).is_err()
            );
        }

        #[test]
        fn any_header_is_safe(bytes: [u8; HEADER], sequence: u64) {
            let _ = header(&bytes, sequence);
            let mut with_magic = bytes;
            with_magic[0..4].copy_from_slice(&MAGIC);
            let _ = header(&with_magic, u64::from_le_bytes(bytes[16..24].try_into().unwrap()));
        }
    }
}
