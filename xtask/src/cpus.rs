//! Which CPUs a thread runs on.
#![allow(unsafe_code)] // sched_getaffinity, sched_setaffinity

use crate::Result;

/// The CPUs that this thread may use, ascending.
pub fn allowed() -> Result<Vec<usize>> {
    let mut set = empty();
    // SAFETY: the call writes no more than the set's size into it.
    let done = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) };
    if done != 0 {
        return Err(format!("which CPUs may be used: {}", std::io::Error::last_os_error()));
    }
    let is_in = |cpu: &usize| {
        // SAFETY: the number is within the set.
        unsafe { libc::CPU_ISSET(*cpu, &set) }
    };
    Ok((0..8 * size_of_val(&set)).filter(is_in).collect())
}

/// Keeps this thread, and the processes that it starts, on `cpus`.
///
/// # Errors
/// When none of them is there.
pub fn keep_to(cpus: &[usize]) -> Result<()> {
    let mut set = empty();
    for cpu in cpus.iter().copied().filter(|cpu| *cpu < 8 * size_of::<libc::cpu_set_t>()) {
        // SAFETY: the number is within the set.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: the call reads the set.
    let done = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) };
    if done == 0 {
        return Ok(());
    }
    Err(format!("cannot keep to the CPUs {cpus:?}: {}", std::io::Error::last_os_error()))
}

fn empty() -> libc::cpu_set_t {
    // SAFETY: a set of CPUs is plain bits; all zeroes is an empty one.
    unsafe { std::mem::zeroed() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_keeps_to_the_cpus_it_is_told() {
        let all = allowed().unwrap();
        let last = *all.last().unwrap();
        let thread = std::thread::spawn(move || {
            keep_to(&[last]).unwrap();
            allowed().unwrap()
        });
        assert_eq!(thread.join().unwrap(), [last]);
        assert!(keep_to(&[1 << 20]).is_err() && keep_to(&[]).is_err());
        assert_eq!(allowed().unwrap(), all);
    }
}
