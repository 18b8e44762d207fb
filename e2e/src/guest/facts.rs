//! What the guest finds in its machine, said on the serial line at boot when `tern.facts=1`:
//! `TERN-GUEST FACTS {json}`; and its power button.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::thread;

use serde::{Deserialize, Serialize};

use super::init;
use crate::pattern;

/// linux/fs.h.
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKZEROOUT: libc::Ioctl = 0x127f;
/// linux/input-event-codes.h.
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
/// One event: two longs of time, type, code, value.
const EVENT: usize = 24;
/// Bytes of the disk that [`discard`] works on; the first half is discarded, the second zeroed.
pub const DISCARDED: usize = 4 << 20;

/// The facts.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Facts {
    /// CPUs that are online.
    pub cpus: usize,
    /// Block devices and network interfaces.
    pub devices: Vec<String>,
    /// Bytes of /dev/hwrng, in hexadecimal; empty without that.
    pub random: String,
    /// How discard and write-zeroes on the disk went that `tern.discard` names.
    pub discard: Option<String>,
    /// Bytes of memory, as the kernel says.
    pub memory_kib: u64,
    /// What of /proc/interrupts is virtio's: a line an interrupt.
    #[serde(default)]
    pub interrupts: Vec<String>,
}

fn names(dir: &str) -> impl Iterator<Item = String> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
}

fn random() -> io::Result<String> {
    let mut bytes = [0; 32];
    File::open("/dev/hwrng")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// Memory that O_DIRECT takes.
#[repr(C, align(4096))]
struct Page([u8; 4096]);

fn range(disk: &File, number: libc::Ioctl, from: usize, len: usize) -> io::Result<()> {
    let range = [from as u64, len as u64];
    // SAFETY: both ioctls used here take two u64, which outlive the call.
    if unsafe { libc::ioctl(disk.as_raw_fd(), number, &range) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Writes the disk's beginning, discards one half of it and zeroes the other.
fn discard(path: &str) -> io::Result<()> {
    let disk = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?;
    let mut page = Box::new(Page([0; 4096]));
    for at in (0..2 * DISCARDED).step_by(4096) {
        for (i, word) in page.0.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&pattern::word(1, (at + i) as u64).to_le_bytes());
        }
        disk.write_all_at(&page.0, at as u64)?;
    }
    let half = DISCARDED / 2;
    range(&disk, BLKDISCARD, 0, half).map_err(|e| io::Error::other(format!("discard: {e}")))?;
    range(&disk, BLKZEROOUT, half, half)
        .map_err(|e| io::Error::other(format!("write zeroes: {e}")))?;
    disk.sync_data()?;
    for at in (half..DISCARDED).step_by(4096) {
        disk.read_exact_at(&mut page.0, at as u64)?;
        if page.0.iter().any(|b| *b != 0) {
            return Err(io::Error::other(format!("the zeroed block at {at} is not zero")));
        }
    }
    disk.read_exact_at(&mut page.0, DISCARDED as u64)?;
    let word = pattern::word(1, DISCARDED as u64).to_le_bytes();
    if page.0[..8] != word {
        return Err(io::Error::other("the block after the zeroed ones has changed"));
    }
    Ok(())
}

/// Looks at the machine.
pub fn collect(discarded: Option<&str>) -> Facts {
    let online = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:")).unwrap_or_default();
    let mut devices: Vec<_> = names("/sys/block").chain(names("/sys/class/net")).collect();
    devices.sort();
    Facts {
        cpus: online.lines().filter(|l| l.starts_with("processor")).count(),
        devices,
        random: random().unwrap_or_default(),
        discard: discarded
            .map(|path| discard(path).map_or_else(|e| e.to_string(), |()| "good".to_owned())),
        interrupts: fs::read_to_string("/proc/interrupts")
            .unwrap_or_default()
            .lines()
            .filter(|l| l.contains("virtio"))
            .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect(),
        memory_kib: total.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0),
    }
}

/// Powers off when the power button is pressed.
pub fn watch_power_button() {
    for name in names("/dev/input").filter(|n| n.starts_with("event")) {
        let Ok(mut device) = File::open(format!("/dev/input/{name}")) else { continue };
        thread::spawn(move || {
            let mut event = [0; EVENT];
            while device.read_exact(&mut event).is_ok() {
                let field = |at| u16::from_le_bytes([event[at], event[at + 1]]);
                if (field(16), field(18)) == (EV_KEY, KEY_POWER) && event[20] == 1 {
                    init::stop(false);
                }
            }
        });
    }
}
