//! Memory files that other processes own can shrink while they are mapped here; the next access
//! past their end is a SIGBUS, which would kill the process. This file catches it.
//!
//! What happens: the handler looks the faulting address up among the guarded mappings. If it lies
//! in one, the *whole* mapping is replaced by anonymous zeroes in one `mmap`, and the mapping is
//! flagged as broken; the access then goes on, and the owner, who finds
//! [`is_broken`](crate::ForeignMapping::is_broken) set, gives the mapping up. If it lies in none,
//! the handler that was there before is called, or the default action taken, so that everything
//! else dies as it always did.
//!
//! Why the whole mapping and not the page: one fault costs a signal, and each page replaced splits
//! the mapping; a peer could so use up time and the process's limit of mappings. A peer that
//! shrinks its memory has broken its word anyway. System calls that meet the hole get EFAULT.
//!
//! Invariants:
//! - The handler is async-signal-safe: it reads a static table of atomics and calls `mmap`. It
//!   allocates nothing, takes no lock and leaves errno alone.
//! - A slot is published by storing its start last and withdrawn by clearing its start first;
//!   `start` read twice around `len` shows whether a slot changed meanwhile. A mapping that a thread
//!   faults on has a live user, so its own slot cannot change under the handler.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, Once};

use crate::{Error, Result};

/// Most mappings guarded at a time, in the whole process.
pub const MAX_GUARDS: usize = 8192;

struct Slot {
    /// Address of the mapping; 0: free.
    start: AtomicUsize,
    len: AtomicUsize,
    broken: AtomicBool,
}

static SLOTS: [Slot; MAX_GUARDS] = [const {
    Slot { start: AtomicUsize::new(0), len: AtomicUsize::new(0), broken: AtomicBool::new(false) }
}; MAX_GUARDS];
/// Slots from here on were never used.
static HIGH_WATER: AtomicUsize = AtomicUsize::new(0);
/// How many mappings broke since the process began.
static BROKEN: AtomicUsize = AtomicUsize::new(0);
/// Held while slots are given out and taken back; never by the handler.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());
static INSTALL: Once = Once::new();
/// The action that was there before; null until known.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(std::ptr::null_mut());

/// How many guarded mappings have broken since the process began: a cheap question for a thread
/// that serves many of them, which looks further only when the answer changes.
#[inline]
pub fn broken_count() -> usize {
    BROKEN.load(Ordering::Acquire)
}

/// A mapping's place in the table, given back when dropped.
#[derive(Debug)]
pub(crate) struct Guard(usize);

impl Guard {
    /// Guards `[start, start + len)`, a whole mapping (of whole pages of its file's kind).
    ///
    /// # Errors
    /// More than [`MAX_GUARDS`] mappings, or a kernel that does not let the handler in.
    pub(crate) fn new(start: usize, len: usize) -> Result<Self> {
        install()?;
        let mut free = FREE.lock().unwrap_or_else(|e| e.into_inner());
        let index = match free.pop() {
            Some(index) => index,
            None => {
                let next = HIGH_WATER.load(Ordering::Relaxed);
                if next == MAX_GUARDS {
                    let what = format!("more than {MAX_GUARDS} mappings of other processes' files");
                    let source = std::io::Error::from_raw_os_error(libc::ENOMEM);
                    return Err(Error::Host { what, source });
                }
                HIGH_WATER.store(next + 1, Ordering::Release);
                next
            }
        };
        let slot = &SLOTS[index];
        slot.broken.store(false, Ordering::Relaxed);
        slot.len.store(len, Ordering::Relaxed);
        slot.start.store(start, Ordering::Release);
        Ok(Self(index))
    }

    /// Whether the file shrank under the mapping, which is zeroes since.
    #[inline]
    pub(crate) fn is_broken(&self) -> bool {
        SLOTS[self.0].broken.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        SLOTS[self.0].start.store(0, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        FREE.lock().unwrap_or_else(|e| e.into_inner()).push(self.0);
    }
}

/// Puts the handler in place, once in the process.
fn install() -> Result<()> {
    INSTALL.call_once(|| {
        // SAFETY: all zeroes is a valid sigaction.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_sigbus as *const () as usize;
        // On the alternate stack: Rust's threads have one, and others fall back to their own.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: as above.
        let mut previous: Box<libc::sigaction> = Box::new(unsafe { std::mem::zeroed() });
        // SAFETY: both structs are valid; the handler keeps the promises of this file's header.
        // The old action is asked for first, so that the handler never finds it missing.
        unsafe {
            if libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut *previous) == 0 {
                // Leaked: a handler may use it until the process ends.
                PREVIOUS.store(Box::into_raw(previous), Ordering::Release);
                libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
            }
        }
    });
    // SAFETY: a zeroed sigaction is filled by the call, which changes nothing.
    let ours = unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut now) == 0
            && now.sa_sigaction == on_sigbus as *const () as usize
    };
    if ours {
        return Ok(());
    }
    let what = "SIGBUS is handled by other code, so foreign memory cannot be mapped safely".into();
    Err(Error::Host { what, source: std::io::Error::from_raw_os_error(libc::EBUSY) })
}

/// Replaces the guarded mapping that `at` lies in by zeroes; whether there was one.
fn replace(at: usize) -> bool {
    let used = HIGH_WATER.load(Ordering::Acquire).min(MAX_GUARDS);
    for slot in &SLOTS[..used] {
        let start = slot.start.load(Ordering::Acquire);
        let len = slot.len.load(Ordering::Acquire);
        if start == 0 || at < start || at - start >= len {
            continue;
        }
        if slot.start.load(Ordering::Acquire) != start {
            continue;
        }
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: exactly the range of a guarded mapping, whose users only ever copy bytes in and
        // out and hold no Rust references to them.
        let new = unsafe { libc::mmap(start as *mut libc::c_void, len, prot, flags, -1, 0) };
        if new == libc::MAP_FAILED {
            return false;
        }
        // Two threads may fault at once: the second replaces zeroes by zeroes.
        if !slot.broken.swap(true, Ordering::AcqRel) {
            BROKEN.fetch_add(1, Ordering::AcqRel);
        }
        return true;
    }
    false
}

extern "C" fn on_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel gave a valid siginfo; errno's address is this thread's own.
    unsafe {
        let errno = *libc::__errno_location();
        // Only faults of this thread have an address: positive codes are the kernel's own.
        let fault = (*info).si_code > 0 && replace((*info).si_addr() as usize);
        *libc::__errno_location() = errno;
        if !fault {
            chain(signal, info, context);
        }
    }
}

/// Hands the signal to whoever had it before.
///
/// # Safety
/// Called from the handler, with its arguments.
unsafe fn chain(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS.load(Ordering::Acquire);
    // SAFETY: null or a leaked box, never changed.
    let previous = unsafe { previous.as_ref() };
    match previous {
        // A fault cannot be ignored, as the kernel sees it: the access would fault for ever.
        // SAFETY: the handler's own, valid siginfo.
        Some(p) if p.sa_sigaction == libc::SIG_IGN && unsafe { (*info).si_code } <= 0 => {}
        Some(p) if p.sa_sigaction != libc::SIG_DFL && p.sa_sigaction != libc::SIG_IGN => {
            // SAFETY: a handler that somebody installed for this signal, with the signature that
            // its flags say.
            unsafe {
                if p.sa_flags & libc::SA_SIGINFO != 0 {
                    type Full = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
                    std::mem::transmute::<usize, Full>(p.sa_sigaction)(signal, info, context);
                } else {
                    type Short = extern "C" fn(libc::c_int);
                    std::mem::transmute::<usize, Short>(p.sa_sigaction)(signal);
                }
            }
        }
        _ => {
            // SAFETY: sets the default action; the access that faulted is repeated and ends the
            // process as it would have without this file. A signal that was sent is sent again.
            unsafe {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &default, std::ptr::null_mut());
                if (*info).si_code <= 0 {
                    libc::raise(signal);
                }
            }
        }
    }
}
