//! How far apart two CPUs are at the moment. The host of a virtual machine moves its CPUs about: for
//! seconds or minutes they share a cache, and then they do not, and a frame that goes from one to the
//! other costs three times as much. Contestants are only to be compared at the same distance.
#![allow(unsafe_code)] // sched_setaffinity

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::Result;

/// CPUs whose round trip takes no longer share a last level cache, or are neighbours on a mesh:
/// beyond it are other sockets, and other dies of one that consists of several.
pub const NEAR: Duration = Duration::from_nanos(200);
/// Round trips that are timed; under 10 ms.
const TRIPS: u64 = 20_000;
/// A CPU that does not answer is busy with something else.
const PATIENCE: Duration = Duration::from_secs(5);

/// Time for a cache line to go from CPU `a` to CPU `b` and back. Both have to be free.
///
/// # Errors
/// When a CPU is not there, or does not get to it.
pub fn round_trip(a: usize, b: usize) -> Result<Duration> {
    let turn = AtomicU64::new(0);
    let until = Instant::now() + PATIENCE;
    // Each waits for its own numbers, even or odd, and writes the next one.
    let play = |cpu: usize, mine: u64| {
        pin(cpu)?;
        let mut started = Instant::now();
        for trip in 0..TRIPS {
            let mut looks = 0_u32;
            while turn.load(Ordering::Acquire) != 2 * trip + mine {
                looks += 1;
                if looks.is_multiple_of(1 << 16) && Instant::now() > until {
                    return Err(format!("CPU {cpu} waits for the other one in vain"));
                }
            }
            if trip == TRIPS / 10 {
                // Both are there and awake.
                started = Instant::now();
            }
            turn.store(2 * trip + mine + 1, Ordering::Release);
        }
        Ok(started.elapsed() / (TRIPS - TRIPS / 10) as u32)
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| play(b, 1));
        let time = scope.spawn(|| play(a, 0)).join();
        let other = other.join();
        other.map_err(|_| "a thread failed")??;
        time.map_err(|_| "a thread failed")?
    })
}

/// Waits until the two CPUs are near each other, for at most `limit`; how far they are then.
///
/// # Errors
/// As [`round_trip`].
pub fn wait_near(a: usize, b: usize, limit: Duration) -> Result<Duration> {
    let until = Instant::now() + limit;
    loop {
        let distance = round_trip(a, b)?;
        if distance <= NEAR || Instant::now() >= until {
            return Ok(distance);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// How far apart the CPUs of a machine with just two are, after a wait of at most `limit` for them to
/// be near each other; nothing of other machines, where nobody knows which CPUs a program will use.
///
/// # Errors
/// As [`round_trip`].
pub fn of_two(limit: Duration) -> Result<Option<Duration>> {
    let two = std::thread::available_parallelism().is_ok_and(|n| n.get() == 2);
    two.then(|| wait_near(0, 1, limit)).transpose()
}

/// Keeps this thread on one CPU.
fn pin(cpu: usize) -> Result<()> {
    // SAFETY: all zeroes is an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if cpu >= 8 * size_of_val(&set) {
        return Err(format!("CPU {cpu}: there are not so many"));
    }
    // SAFETY: the number was checked; the set is this function's.
    let result = unsafe {
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set)
    };
    if result == 0 {
        return Ok(());
    }
    Err(format!("cannot keep a thread on CPU {cpu}: {}", std::io::Error::last_os_error()))
}
