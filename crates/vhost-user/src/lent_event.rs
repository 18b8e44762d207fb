//! Writing to an eventfd that the other side lent, without standing still for it.
//!
//! Such an eventfd is made non-blocking when it comes, but that flag belongs to both ends: a peer can
//! take it back and fill the counter, and then write(2) waits for as long as the peer likes. No call
//! writes to an eventfd without that risk, and asking before each write would be a race that costs a
//! system call. So each thread notes that it writes, and a watchdog interrupts one whose write lasts
//! for more than a look of its; the peer is then found out by the flag that it took back.
//!
//! A peer that comes again and again would still hold everybody up most of the time. So once one was
//! found out, nothing is written any more: [`AioSignal`] costs more, but cannot wait.
#![allow(unsafe_code)] // signals, and a write that they interrupt

use std::cell::OnceCell;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once, Weak};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::aio_signal::AioSignal;

/// How often the watchdog looks. A write that it finds twice is interrupted.
const LOOK: Duration = Duration::from_millis(100);
/// Ignored by default, and used by nothing else here: one that comes late does no harm.
const SIGNAL: libc::c_int = libc::SIGURG;

/// How many writes were found to block since the process began.
static BLOCKED: AtomicUsize = AtomicUsize::new(0);
static WRITERS: Mutex<Vec<Weak<Writer>>> = Mutex::new(Vec::new());
static WATCHDOG: Once = Once::new();

thread_local! {
    static WRITER: OnceCell<Arc<Writer>> = const { OnceCell::new() };
    /// `None`: the host has none to give, and the watchdog has to do.
    static AIO: OnceCell<Option<AioSignal>> = const { OnceCell::new() };
}

/// The other side made the eventfd block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocked;

/// A thread that writes to lent eventfds.
struct Writer {
    thread: libc::pid_t,
    /// Counts beginnings and ends of writes: odd during one.
    writes: AtomicU64,
}

/// Adds one to `fd`'s counter; a full counter is fine, for then the other side has yet to look.
///
/// # Errors
/// The other side made it block, which held the thread up for at most a few looks of the watchdog.
#[inline]
pub fn signal(fd: &EventFd) -> Result<(), Blocked> {
    if BLOCKED.load(Ordering::Relaxed) != 0 && signal_by_aio(fd) {
        return Ok(());
    }
    WRITER.with(|writer| {
        let writer = writer.get_or_init(enroll);
        let n = writer.writes.load(Ordering::Relaxed);
        loop {
            writer.writes.store(n + 1, Ordering::Relaxed);
            let result = add_one(fd);
            writer.writes.store(n + 2, Ordering::Relaxed);
            match result {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                    if blocks(fd) {
                        BLOCKED.fetch_add(1, Ordering::Release);
                        return Err(Blocked);
                    }
                }
                _ => return Ok(()),
            }
        }
    })
}

/// Whether that went well.
#[cold]
fn signal_by_aio(fd: &EventFd) -> bool {
    let new = || match AioSignal::new() {
        Ok(aio) => Some(aio),
        Err(e) => {
            tracing::warn!(
                "peers whose eventfds block can hold the process up again: no AIO context: {e}; \
                 see that the kernel has CONFIG_AIO, and fs.aio-nr is below fs.aio-max-nr"
            );
            None
        }
    };
    AIO.with(|aio| aio.get_or_init(new).as_ref().is_some_and(|aio| aio.signal(fd).is_ok()))
}

/// Unlike [`EventFd::write`], returns when it is interrupted.
fn add_one(fd: &EventFd) -> io::Result<()> {
    let one = 1u64.to_ne_bytes();
    // SAFETY: the kernel reads the 8 bytes of `one`.
    let n = unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the other side has taken back what [`eventfd`](crate::socket::eventfd) set.
fn blocks(fd: &EventFd) -> bool {
    // SAFETY: only asks for the flags of a descriptor that is open.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    flags >= 0 && flags & libc::O_NONBLOCK == 0
}

fn enroll() -> Arc<Writer> {
    // SAFETY: no arguments, cannot fail.
    let thread = unsafe { libc::gettid() };
    let writer = Arc::new(Writer { thread, writes: AtomicU64::new(0) });
    WRITERS.lock().unwrap_or_else(|e| e.into_inner()).push(Arc::downgrade(&writer));
    WATCHDOG.call_once(start);
    writer
}

extern "C" fn on_signal(_: libc::c_int) {}

fn start() {
    // SAFETY: all zeroes is a valid sigaction, without SA_RESTART, which is what interrupts; the
    // handler does nothing.
    let installed = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        libc::sigaction(SIGNAL, &action, std::ptr::null_mut()) == 0
    };
    let spawned = std::thread::Builder::new().name("eventfd watch".into()).spawn(watch);
    if !installed || spawned.is_err() {
        tracing::warn!("a peer whose eventfd blocks could hold the process up: no watchdog for it");
    }
}

fn watch() {
    let mut seen: Vec<(libc::pid_t, u64)> = Vec::new();
    loop {
        std::thread::sleep(LOOK);
        let mut writers = WRITERS.lock().unwrap_or_else(|e| e.into_inner());
        writers.retain(|w| w.strong_count() > 0);
        let now: Vec<_> = writers
            .iter()
            .filter_map(Weak::upgrade)
            .map(|w| (w.thread, w.writes.load(Ordering::Relaxed)))
            .collect();
        drop(writers);
        for stuck in now.iter().filter(|(_, n)| n % 2 == 1).filter(|w| seen.contains(w)) {
            // SAFETY: only numbers are passed; a thread that has just ended is an error without
            // effect.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), stuck.0, SIGNAL) };
        }
        seen = now;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    /// How signals go depends on what the process has seen: one test at a time.
    static ALONE: Mutex<()> = Mutex::new(());

    #[test]
    fn a_full_counter_is_fine() {
        let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        fd.write(u64::MAX - 1).unwrap();
        assert_eq!(signal(&fd), Ok(()));
        assert_eq!(fd.read().unwrap(), u64::MAX - 1);
        assert_eq!(signal(&fd), Ok(()));
        assert_eq!(fd.read().unwrap(), 1);
    }

    #[test]
    fn an_eventfd_that_blocks_is_found_out_and_no_other_holds_anybody_up() {
        let _alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
        let full = || {
            let fd = EventFd::new(0).unwrap();
            fd.write(u64::MAX - 1).unwrap();
            fd
        };
        let start = Instant::now();
        assert_eq!(signal(&full()), Err(Blocked));
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        assert_eq!(BLOCKED.load(Ordering::Relaxed), 1);

        // The watchdog would take more than 10 s for these.
        let start = Instant::now();
        for _ in 0..100 {
            assert_eq!(signal(&full()), Ok(()));
        }
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        assert_eq!(BLOCKED.load(Ordering::Relaxed), 1);
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        assert_eq!(signal(&fd), Ok(()));
        assert_eq!(fd.read().unwrap(), 1);
        BLOCKED.store(0, Ordering::Relaxed);
    }
}
