//! A look at an ELF kernel's program headers before the loader follows them: where its segments
//! go, what they need. Source: System V ABI, "Program Header".

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

const MAGIC: [u8; 4] = *b"\x7fELF";
const CLASS_64: u8 = 2;
const PT_LOAD: u32 = 1;
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// More than any kernel has.
const MAX_PROGRAM_HEADERS: u16 = 256;

/// Whether the file begins as ELF does.
pub fn is_elf(file: &mut File) -> bool {
    let mut magic = [0; 4];
    file.rewind().and_then(|()| file.read_exact(&mut magic)).is_ok() && magic == MAGIC
}

/// The segments that are to be loaded, (address, bytes) each, all of which `ram` takes.
///
/// # Errors
/// Half a sentence on what is wrong with the file.
pub fn segments(
    file: &mut File,
    ram: impl Fn(u64, u64) -> bool,
) -> Result<Vec<(u64, u64)>, String> {
    let length = file.metadata().map_err(|e| e.to_string())?.len();
    let mut header = [0; HEADER];
    read_at(file, 0, &mut header).map_err(|()| "its ELF header is cut off".to_owned())?;
    if header[4] != CLASS_64 {
        return Err("it is not a 64-bit ELF file".into());
    }
    let table = u64_at(&header, 32);
    let (size, count) = (u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(size) != PROGRAM_HEADER || count > MAX_PROGRAM_HEADERS {
        return Err(format!("it has {count} program headers of {size} bytes"));
    }
    let mut headers = vec![0; PROGRAM_HEADER * usize::from(count)];
    read_at(file, table, &mut headers)
        .map_err(|()| "its program headers are cut off".to_owned())?;
    let mut all = Vec::new();
    for h in headers.chunks_exact(PROGRAM_HEADER).filter(|h| u32_at(h, 0) == PT_LOAD) {
        let (offset, address) = (u64_at(h, 8), u64_at(h, 24));
        let (in_file, in_memory) = (u64_at(h, 32), u64_at(h, 40));
        if offset.checked_add(in_file).is_none_or(|end| end > length) {
            return Err("it is cut off: a segment goes on after the file's end".into());
        }
        let need = in_memory.max(in_file);
        if need > 0 && !ram(address, need) {
            return Err(format!(
                "its segment of {need} bytes at {address:#x} is not in the guest's RAM above 1 MiB"
            ));
        }
        all.push((address, need));
    }
    Ok(all)
}

fn read_at(file: &mut File, at: u64, bytes: &mut [u8]) -> Result<(), ()> {
    let read = file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(bytes));
    read.map_err(drop)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with(bytes: &[u8], ram: impl Fn(u64, u64) -> bool) -> Result<Vec<(u64, u64)>, String> {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, bytes).unwrap();
        assert_eq!(is_elf(&mut file), bytes.starts_with(&MAGIC));
        segments(&mut file, ram)
    }

    /// A file with one segment.
    fn one(offset: u64, address: u64, in_file: u64, in_memory: u64) -> Vec<u8> {
        let mut b = vec![0; 4096];
        b[..5].copy_from_slice(b"\x7fELF\x02");
        b[32] = 64;
        b[54] = 56;
        b[56] = 1;
        b[64] = 1;
        for (at, value) in [(8, offset), (24, address), (32, in_file), (40, in_memory)] {
            b[64 + at..72 + at].copy_from_slice(&value.to_le_bytes());
        }
        b
    }

    #[test]
    fn segments_lie_in_the_file_and_in_ram() {
        let ram =
            |at: u64, len: u64| at >= 0x1000 && at.checked_add(len).is_some_and(|e| e < 1 << 30);
        assert_eq!(with(&one(0, 0x1000, 16, 32), ram), Ok(vec![(0x1000, 32)]));
        for (wrong, why) in [
            (one(0, 0, 16, 16), "not in the guest's RAM"),
            (one(0, 0x1000, 16, 1 << 60), "not in the guest's RAM"),
            (one(0, u64::MAX - 8, 16, 16), "not in the guest's RAM"),
            (one(4090, 0x1000, 16, 16), "cut off"),
            (one(u64::MAX, 0x1000, 16, 16), "cut off"),
            (b"\x7fELF".to_vec(), "cut off"),
            (vec![0; 64], "64-bit"),
        ] {
            let said = with(&wrong, ram).unwrap_err();
            assert!(said.contains(why), "{said}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut file = b"\x7fELF\x02".to_vec();
            file.extend(bytes);
            let _ = with(&file, |_, _| true);
        }
    }
}
