//! Fair conditions: waiting until the machine is quiet, memory that the host really has, and the
//! processor time of processes.
#![allow(unsafe_code)] // mmap, kill

use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::Result;

/// Kernel clock ticks a second in /proc (USER_HZ, always 100 on x86).
const TICKS: f64 = 100.0;

/// Processor seconds that the whole machine has worked since it started.
pub fn machine_busy() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let words = text.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let ticks: Vec<f64> = words.filter_map(|w| w.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal, ...
    let busy: f64 = ticks.iter().take(8).sum();
    let idle: f64 = ticks.iter().skip(3).take(2).sum();
    (busy - idle) / TICKS
}

/// Processor seconds that process `pid` has used, its ended threads included.
pub fn used_by(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // After the name, which may hold anything: state is the first field, utime the 12th.
    let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|w| w.parse::<f64>().ok()).sum::<f64>() / TICKS
}

/// Waits until less than a tenth of one processor is in use, for at most `limit`; whether it is.
pub fn wait_quiet(limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        let (before, at) = (machine_busy(), Instant::now());
        std::thread::sleep(Duration::from_millis(500));
        if (machine_busy() - before) / at.elapsed().as_secs_f64() < 0.1 {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
    }
}

/// Touches `bytes` of memory and frees them. Where memory that has been free for some seconds is
/// given back to an outer host, its first touch is slow: every contestant gets memory that was
/// touched a moment ago. It is touched as huge pages, so that whoever uses those has them too.
pub fn warm_memory(bytes: usize) -> Result<()> {
    // SAFETY: a new anonymous mapping, nobody else's.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(format!("cannot map {bytes} bytes: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: the mapping made above; advice only.
    unsafe { libc::madvise(at, bytes, libc::MADV_HUGEPAGE) };
    for offset in (0..bytes).step_by(4096) {
        // SAFETY: inside the mapping.
        unsafe { at.cast::<u8>().add(offset).write_volatile(1) };
    }
    // SAFETY: the mapping made above, used by nobody any more.
    unsafe { libc::munmap(at, bytes) };
    Ok(())
}

/// A process that ends with its owner.
pub struct Process(pub Child);

impl Process {
    /// Starts it.
    pub fn start(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.spawn().map(Self).map_err(|e| format!("{name} does not start: {e}"))
    }

    /// Processor seconds so far.
    pub fn used(&self) -> f64 {
        used_by(self.0.id())
    }

    /// Lets it stand still, with all its threads, or go on.
    pub fn stand_still(&self, still: bool) {
        let signal = if still { libc::SIGSTOP } else { libc::SIGCONT };
        // SAFETY: two numbers; the process is our child, which nobody has waited for.
        unsafe { libc::kill(self.0.id() as libc::pid_t, signal) };
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
