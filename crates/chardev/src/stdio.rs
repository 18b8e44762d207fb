//! The stdio back end: the process's standard input and output; a terminal is put into raw mode
//! and given back at exit, on a panic's unwinding and on signals that end the process.
//!
//! Invariant: one chardev has stdio at a time. The open files of fds 0 and 1 are shared with the
//! shell, so they are never made non-blocking: a terminal or a pipe is opened a second time;
//! where that does not work (a socket) a write is so small that it does not block after poll
//! said "writable".
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::fs::OpenOptions;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::link::{AtEnd, Link, Medium};
use crate::pump::{Pump, Setup, Source};
use crate::{Chardev, Error, sys};

/// Whether a chardev has stdio.
static TAKEN: AtomicBool = AtomicBool::new(false);

pub(crate) fn open(setup: Setup, signal: bool) -> Result<Arc<dyn Chardev>, Error> {
    let who = setup.who.clone();
    let failed = |source| Error::Setup { who: who.clone(), what: "stdio", source };
    if TAKEN.swap(true, Ordering::AcqRel) {
        return Err(Error::StdioTaken { who });
    }
    // From here on `claim` gives stdio back, whatever fails.
    let claim = Claim;
    // A closed fd 0 is an input without end; a closed fd 1 throws output away.
    let input = sys::duplicate(libc::STDIN_FILENO).ok();
    let output = sys::duplicate(libc::STDOUT_FILENO).ok();
    let mut link = Link {
        input: input.map(Arc::new),
        output: None,
        medium: Medium::Stream,
        at_end: AtEnd::KeepWriting,
        max_write: usize::MAX,
        name: "stdio".into(),
    };
    if let Some(fd) = output {
        (link.output, link.max_write) = nonblocking_output(fd).map_err(failed)?;
    }
    if is_terminal(libc::STDIN_FILENO) {
        raw_mode(signal).map_err(failed)?;
    }
    Ok(Arc::new(Pump::start(setup, Box::new(claim), Some(link))?))
}

/// The holder of stdio; lives in the pump.
struct Claim;

impl Drop for Claim {
    fn drop(&mut self) {
        restore_terminal();
        RAW.store(false, Ordering::Release);
        TAKEN.store(false, Ordering::Release);
    }
}

impl Source for Claim {
    fn waiting_on(&self) -> Option<(RawFd, i16)> {
        None
    }
    fn timeout(&self) -> Option<Duration> {
        None
    }
    fn next(&mut self) -> Option<Link> {
        None
    }
    fn idle_name(&self) -> String {
        "stdio".into()
    }
}

/// The output fd that does not block, and the most bytes a write to it may have.
fn nonblocking_output(fd: OwnedFd) -> io::Result<(Option<Arc<OwnedFd>>, usize)> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let kind = std::fs::metadata(&path)?.file_type();
    if kind.is_fifo() || is_terminal(fd.as_raw_fd()) {
        let again = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&path);
        if let Ok(file) = again {
            return Ok((Some(Arc::new(file.into())), usize::MAX));
        }
        // Linux: a writable terminal takes 256 bytes, a pipe a page.
        return Ok((Some(Arc::new(fd)), 256));
    }
    let max = if kind.is_socket() { 256 } else { usize::MAX };
    Ok((Some(Arc::new(fd)), max))
}

fn is_terminal(fd: RawFd) -> bool {
    // SAFETY: no pointers.
    unsafe { libc::isatty(fd) == 1 }
}

/// The terminal's modes before and while raw; written once before `RAW` is set.
struct Modes(UnsafeCell<MaybeUninit<(libc::termios, libc::termios)>>);

// SAFETY: written only by the holder of TAKEN while RAW is false, read only while RAW is true.
unsafe impl Sync for Modes {}

static MODES: Modes = Modes(UnsafeCell::new(MaybeUninit::uninit()));
/// Whether [`MODES`] holds a terminal's modes to go back to.
static RAW: AtomicBool = AtomicBool::new(false);

/// Puts the terminal of stdin into raw mode. With `signal`, Ctrl-C and friends still signal.
fn raw_mode(signal: bool) -> io::Result<()> {
    // SAFETY: termios is plain data for which all zeroes is valid.
    let mut before: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: a live termios.
    if unsafe { libc::tcgetattr(libc::STDIN_FILENO, &raw mut before) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut raw = before;
    // SAFETY: a live termios.
    unsafe { libc::cfmakeraw(&raw mut raw) };
    raw.c_oflag |= libc::OPOST; // The VMM's own messages end in a bare newline.
    if signal {
        raw.c_lflag |= libc::ISIG;
    }
    // SAFETY: TAKEN is ours and RAW is false, so nobody reads it now.
    unsafe { (*MODES.0.get()).write((before, raw)) };
    RAW.store(true, Ordering::Release);
    install_hooks();
    apply(|modes| &modes.1);
    Ok(())
}

/// Sets the terminal's mode; safe in a signal handler.
fn apply(which: fn(&(libc::termios, libc::termios)) -> &libc::termios) {
    if !RAW.load(Ordering::Acquire) {
        return;
    }
    // SAFETY: RAW says that both were written; sigset_t is plain data; the calls are
    // async-signal-safe. SIGTTOU is blocked, as in the background it would stop the process.
    unsafe {
        let modes = (*MODES.0.get()).assume_init_ref();
        let mut block: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut block);
        libc::sigaddset(&raw mut block, libc::SIGTTOU);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const block, &raw mut before);
        libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, which(modes));
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
    }
}

extern "C" fn restore_terminal() {
    apply(|modes| &modes.0);
}

extern "C" fn on_fatal_signal(signal: i32) {
    restore_terminal();
    // SAFETY: async-signal-safe; the default action ends the process as the signal would have.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

extern "C" fn on_continue(_: i32) {
    apply(|modes| &modes.1);
}

/// Once a process: at exit, and on signals that nobody else handles, the terminal is given back.
fn install_hooks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler is a plain function that lives as long as the process.
        unsafe { libc::atexit(restore_terminal) };
        let fatal = on_fatal_signal as extern "C" fn(i32);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGABRT] {
            handle_if_default(signal, fatal);
        }
        handle_if_default(libc::SIGCONT, on_continue);
    });
}

fn handle_if_default(signal: i32, handler: extern "C" fn(i32)) {
    // SAFETY: sigaction is plain data for which all zeroes is valid; both structs are alive; the
    // handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut action);
        if action.sa_sigaction == libc::SIG_DFL {
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
}
