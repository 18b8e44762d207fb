//! What benchmarks need beside the harness: contestants, memory that is touched beforehand, and
//! what a process has resident.
#![allow(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Serialize;
use serde_json::Value;

use crate::error::Context;
use crate::{Error, Result};

/// A VMM to be measured.
#[derive(Clone, Debug)]
pub struct Contestant {
    /// What tables call it.
    pub name: String,
    /// Its program.
    pub program: PathBuf,
    /// Arguments that only it gets.
    pub arguments: Vec<String>,
}

impl FromStr for Contestant {
    type Err = String;

    /// `NAME=PROGRAM[,ARGUMENT...]`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (name, rest) =
            text.split_once('=').ok_or("expected NAME=PROGRAM[,ARGUMENT...]".to_owned())?;
        let mut words = rest.split(',').map(str::to_owned);
        let program = words.next().unwrap_or_default().into();
        Ok(Self { name: name.to_owned(), program, arguments: words.collect() })
    }
}

/// Touches and frees `mib` MiB. Memory that was never used, or was given back to what is below
/// this host, is slow at first touch; nobody shall pay for that in a timed run.
pub fn warm_up(mib: u64) {
    let len = (mib << 20) as usize;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    // SAFETY: a fresh anonymous mapping, which nobody else knows, is made and taken away again.
    unsafe {
        let at =
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if at != libc::MAP_FAILED {
            libc::munmap(at, len);
        }
    }
}

/// Resident memory of a VMM, in KiB.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Footprint {
    /// All that is resident.
    pub rss_kib: u64,
    /// Of it, the guest's memory.
    pub guest_kib: u64,
    /// All but the guest's memory.
    pub beyond_kib: u64,
    /// Of that, what no other process can share: what one more VM costs.
    pub private_kib: u64,
    /// Of that, what is anonymous: heaps and stacks.
    pub anonymous_kib: u64,
}

/// What process `pid` has resident beyond the guest's memory of `guest` bytes. The guest's memory
/// is the mappings of exactly that size, or of that with a huge page's alignment.
///
/// # Errors
/// When the process is gone or may not be looked at.
pub fn footprint(pid: u32, guest: u64) -> Result<Footprint> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).context(|| path.clone())?;
    let found = parse_smaps(&text, guest);
    if found.guest_kib == 0 {
        return Err(Error::Protocol(format!("{path}: no mapping is the guest's memory")));
    }
    Ok(found)
}

fn parse_smaps(text: &str, guest: u64) -> Footprint {
    let mut sum = Footprint::default();
    let mut is_guest = false;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-') {
            let at = |hex| u64::from_str_radix(hex, 16).unwrap_or(0);
            is_guest = at(to).saturating_sub(at(from)) == guest;
            continue;
        }
        let kib: u64 = words.next().and_then(|w| w.parse().ok()).unwrap_or(0);
        match first {
            "Rss:" if is_guest => {
                (sum.rss_kib, sum.guest_kib) = (sum.rss_kib + kib, sum.guest_kib + kib)
            }
            "Rss:" => (sum.rss_kib, sum.beyond_kib) = (sum.rss_kib + kib, sum.beyond_kib + kib),
            "Private_Clean:" | "Private_Dirty:" if !is_guest => sum.private_kib += kib,
            "Anonymous:" if !is_guest => sum.anonymous_kib += kib,
            _ => {}
        }
    }
    sum
}

/// The numbers of a result, in a line.
pub fn brief(result: &Value) -> String {
    let Some(map) = result.as_object() else { return result.to_string() };
    let numbers = map.iter().filter_map(|(k, v)| Some(format!("{k} {:.2}", v.as_f64()?)));
    numbers.collect::<Vec<_>>().join("  ")
}

/// Copies what VMMs and guests said.
pub fn keep_logs(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
        let into = to.join(entry.file_name());
        if fs::create_dir_all(&into).is_ok() {
            for log in ["serial.log", "stderr.log"] {
                let _ = fs::copy(entry.path().join(log), into.join(log));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_mapping_is_told_by_its_size() {
        let smaps = "\
5500-5600 r-xp 00000000 fe:00 1 /bin/vmm\nSize: 1 kB\nRss: 100 kB\nPrivate_Clean: 60 kB\nAnonymous: 0 kB\n\
7f0000000000-7f0010000000 rw-s 00000000 00:01 2 /memfd:ram\nRss: 5000 kB\nPrivate_Dirty: 5000 kB\n\
7f1000000000-7f1000100000 rw-p 00000000 00:00 0\nRss: 40 kB\nPrivate_Dirty: 40 kB\nAnonymous: 40 kB\n";
        let f = parse_smaps(smaps, 256 << 20);
        assert_eq!((f.rss_kib, f.guest_kib, f.beyond_kib), (5140, 5000, 140));
        assert_eq!((f.private_kib, f.anonymous_kib), (100, 40));
    }

    #[test]
    fn a_contestant_has_a_name_a_program_and_arguments() {
        let c: Contestant = "QEMU=/x/qemu,-L,/y".parse().unwrap();
        assert_eq!((c.name.as_str(), c.arguments.len()), ("QEMU", 2));
        assert!("tern".parse::<Contestant>().is_err());
    }
}
