//! Starting poll threads, each on its CPU.
#![allow(unsafe_code)] // sched_setaffinity

use std::sync::Arc;
use std::thread::JoinHandle;

use crate::shared::Shared;
use crate::worker::Worker;
use crate::{Error, Result};

/// Ties the calling thread to `cpu`.
fn pin(cpu: usize) -> std::io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: an all-zero cpu_set_t is empty; CPU_SET stays inside it (just checked); the kernel only
    // reads it.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Starts poll thread `thread`, on `cpu` if given.
///
/// # Errors
/// When the host refuses the thread or the CPU.
pub fn start(shared: &Arc<Shared>, thread: usize, cpu: Option<usize>) -> Result<JoinHandle<()>> {
    let worker =
        Worker::new(shared.clone(), thread).map_err(Error::host("cannot make an epoll"))?;
    let (tell, told) = crossbeam_channel::bounded(1);
    let handle = std::thread::Builder::new()
        .name(format!("poll {thread}"))
        .spawn(move || {
            let pinned = cpu.map_or(Ok(()), pin);
            let go = pinned.is_ok();
            let _ = tell.send(pinned);
            if !go {
                return;
            }
            let run = std::panic::AssertUnwindSafe(|| worker.run());
            if std::panic::catch_unwind(run).is_err() {
                // Its queues are lost. A new process takes all of them up where they stand; one
                // without this thread would only look as if it ran.
                tracing::error!("poll thread {thread} has failed: the switch ends");
                std::process::abort();
            }
        })
        .map_err(Error::host("cannot start a poll thread"))?;
    if let (Ok(Err(e)), Some(cpu)) = (told.recv(), cpu) {
        return Err(Error::Config(format!("cpus: a poll thread cannot run on CPU {cpu}: {e}")));
    }
    Ok(handle)
}
