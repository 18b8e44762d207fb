//! The snapshot container: sections in a file or pipe, bounded and checked.
//!
//! ```text
//!   "TERNSTAT"  version u16  0 u16  number of sections u32  CRC-32C of these 16 bytes u32
//!   per section: length u32  CRC-32C of the bytes u32  bytes (CBOR of a Section)
//! ```
//! All numbers are little-endian. What is read is untrusted: lengths are bounded, and memory is
//! taken only as bytes really arrive.

use std::io::{self, Read, Write};

use crate::section::{MAX_SECTION_BYTES, MAX_SECTIONS};
use crate::{Error, Result, Section, Sections};

const MAGIC: &[u8; 8] = b"TERNSTAT";
/// The container's own version; sections have versions of theirs.
pub const VERSION: u16 = 1;
/// Name, kind and CBOR's framing beside the payload.
const OVERHEAD: usize = 4096;
/// Most bytes of all sections together.
pub const MAX_TOTAL_BYTES: u64 = 1 << 30;

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| match source.kind() {
        io::ErrorKind::UnexpectedEof => Error::Container(format!("{what}: it ends too early")),
        _ => Error::Io { what, source },
    }
}

/// Writes all of `sections` to `out`.
///
/// # Errors
/// Too many or too large sections, or what `out` says.
pub fn write(out: &mut impl Write, sections: &Sections) -> Result<()> {
    let list = &sections.0;
    if list.len() > MAX_SECTIONS {
        return Err(Error::TooLarge(format!("{} sections, at most {MAX_SECTIONS}", list.len())));
    }
    let mut head = MAGIC.to_vec();
    head.extend(VERSION.to_le_bytes());
    head.extend([0; 2]);
    head.extend((list.len() as u32).to_le_bytes());
    head.extend(crc32c::crc32c(&head).to_le_bytes());
    out.write_all(&head).map_err(io_error("the snapshot's head"))?;
    let mut total = 0;
    for s in list {
        let bytes = minicbor::to_vec(s)
            .map_err(|e| Error::Encode { section: s.name.clone(), reason: e.to_string() })?;
        check_len(&s.name, bytes.len(), &mut total)?;
        out.write_all(&(bytes.len() as u32).to_le_bytes())
            .and_then(|()| out.write_all(&crc32c::crc32c(&bytes).to_le_bytes()))
            .and_then(|()| out.write_all(&bytes))
            .map_err(io_error("a snapshot's section"))?;
    }
    out.flush().map_err(io_error("the snapshot's end"))
}

fn check_len(what: &str, len: usize, total: &mut u64) -> Result<()> {
    let max = MAX_SECTION_BYTES + OVERHEAD;
    *total += len as u64;
    if len > max || *total > MAX_TOTAL_BYTES {
        return Err(Error::TooLarge(format!(
            "section {what}: {len} bytes, at most {max}, and {MAX_TOTAL_BYTES} in all"
        )));
    }
    Ok(())
}

/// Reads what [`write`] wrote; leaves `input` right behind it.
///
/// # Errors
/// [`Error::Container`] for what is no snapshot, or a damaged one; [`Error::TooLarge`];
/// [`Error::Decode`]; what `input` says.
pub fn read(input: &mut impl Read) -> Result<Sections> {
    let mut head = [0; 20];
    input.read_exact(&mut head).map_err(io_error("the snapshot's head"))?;
    if head[..8] != *MAGIC {
        return Err(Error::Container("this is not a saved machine state".into()));
    }
    let version = u16::from_le_bytes([head[8], head[9]]);
    if version != VERSION {
        return Err(Error::Container(format!("version {version}, this build reads {VERSION}")));
    }
    if crc32c::crc32c(&head[..16]).to_le_bytes() != head[16..] {
        return Err(Error::Container("the head's checksum is wrong".into()));
    }
    let count = u32::from_le_bytes([head[12], head[13], head[14], head[15]]) as usize;
    if count > MAX_SECTIONS {
        return Err(Error::TooLarge(format!("{count} sections, at most {MAX_SECTIONS}")));
    }
    let mut sections = Sections::default();
    let mut names = std::collections::HashSet::new();
    let mut total = 0;
    for i in 0..count {
        let s = read_section(input, i, &mut total)?;
        if !names.insert(s.name.clone()) {
            return Err(Error::Container(format!("two sections are called {}", s.name)));
        }
        sections.0.push(s);
    }
    Ok(sections)
}

fn read_section(input: &mut impl Read, index: usize, total: &mut u64) -> Result<Section> {
    let mut head = [0; 8];
    input.read_exact(&mut head).map_err(io_error("a snapshot's section"))?;
    let [a, b, c, d, crc @ ..] = head;
    let len = u32::from_le_bytes([a, b, c, d]) as usize;
    let name = format!("number {index}");
    check_len(&name, len, total)?;
    let mut bytes = Vec::new();
    // Grows with what arrives, not with what the length promises.
    let got = input.take(len as u64).read_to_end(&mut bytes);
    if got.map_err(io_error("a snapshot's section"))? != len {
        return Err(Error::Container(format!("section {name}: it ends too early")));
    }
    if crc32c::crc32c(&bytes) != u32::from_le_bytes(crc) {
        return Err(Error::Container(format!("section {name}: its checksum is wrong")));
    }
    minicbor::decode(&bytes).map_err(|e| Error::Decode { section: name, reason: e.to_string() })
}
