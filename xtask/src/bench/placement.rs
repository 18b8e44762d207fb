//! How far apart two CPUs are at the moment. The host of a virtual machine moves its CPUs about: for
//! seconds or minutes they share a cache, and then they do not, and what one hands to the other costs
//! several times as much. Contestants are only to be compared at the same distance.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::{Result, cpus};

/// CPUs whose round trip takes no longer share a last level cache, or are neighbours on a mesh:
/// beyond it are other sockets, and other dies of one that consists of several.
pub const NEAR: Duration = Duration::from_nanos(200);
/// Round trips that are timed; under 10 ms.
const TRIPS: u64 = 20_000;
/// For how long at most.
const PATIENCE: Duration = Duration::from_secs(2);
/// No more trips.
const OVER: u64 = u64::MAX;

/// Time for a cache line to go from CPU `a` to CPU `b` and back. Both have to be free: one that has
/// something else to do looks far away.
///
/// # Errors
/// When one of them may not be used.
pub fn round_trip(a: usize, b: usize) -> Result<Duration> {
    let turn = AtomicU64::new(0);
    let begin = Instant::now();
    // Each waits for its own numbers, even or odd, and writes the next one.
    let play = |cpu: usize, mine: u64| {
        let pinned = cpus::keep_to(&[cpu]);
        if pinned.is_err() {
            turn.store(OVER, Ordering::Release);
        }
        pinned?;
        let mut started = begin;
        for trip in 0..TRIPS {
            let mut looks = 0_u32;
            loop {
                match turn.load(Ordering::Acquire) {
                    now if now == 2 * trip + mine => break,
                    OVER => return Ok(begin.elapsed() / (trip as u32 + 1)),
                    _ => looks += 1,
                }
                if looks.is_multiple_of(1 << 16) && begin.elapsed() > PATIENCE {
                    turn.store(OVER, Ordering::Release);
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
        let (time, other): (Result<Duration>, Result<Duration>) =
            (time.map_err(|_| "a thread failed")?, other.map_err(|_| "a thread failed")?);
        Ok(time?.max(other?))
    })
}

/// Waits until the two CPUs are near each other, for at most `limit`; how far they are then.
///
/// # Errors
/// As [`round_trip`].
pub fn wait_near(a: usize, b: usize, limit: Duration) -> Result<Duration> {
    let until = Instant::now() + limit;
    let mut told = limit.is_zero();
    loop {
        let distance = round_trip(a, b)?;
        if distance <= NEAR || Instant::now() >= until {
            return Ok(distance);
        }
        if !std::mem::replace(&mut told, true) {
            let (far, most) = (distance.as_nanos(), limit.as_secs());
            println!(
                "  the CPUs are {far} ns apart: waiting for at most {most} s until they are near"
            );
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// How far apart the CPUs are where just two may be used, after a wait of at most `limit` for them to
/// be near each other; nothing of other machines, where nobody knows which CPUs a program will use.
///
/// # Errors
/// As [`round_trip`].
pub fn of_two(limit: Duration) -> Result<Option<Duration>> {
    match cpus::allowed()?[..] {
        [a, b] => wait_near(a, b, limit).map(Some),
        _ => Ok(None),
    }
}
