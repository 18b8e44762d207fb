//! Signals that end the process become requests to the life-cycle driver; before there is one, they
//! end the process at once.

use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::Sender;

use crate::vcpus::Request;

const ENDING: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Whether requests are acted on.
static STARTED: AtomicBool = AtomicBool::new(false);

/// From now on the driver acts on requests.
pub fn started() {
    STARTED.store(true, Ordering::SeqCst);
}

/// Blocks the ending signals for this thread and all that it will start, so that only the thread
/// of [`watch`] gets them. Call it before any other thread is started.
pub fn block() {
    let set = ending_set();
    // SAFETY: set is an initialised signal set; the old one is not asked for.
    #[allow(unsafe_code)]
    unsafe {
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    }
}

/// Starts the thread that waits for them.
pub fn watch(requests: Sender<Request>) -> std::io::Result<()> {
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let set = ending_set();
        loop {
            let mut signal = 0;
            // SAFETY: both are valid for the call; the signals of the set are blocked.
            #[allow(unsafe_code)]
            let result = unsafe { libc::sigwait(&set, &mut signal) };
            if result == 0 && !STARTED.load(Ordering::SeqCst) {
                // Starting may wait for a client, or touch much memory; nothing runs yet that
                // must be brought to an end.
                crate::tell!("tern: ended by signal {signal} before the machine was up");
                std::process::exit(1);
            }
            if result == 0 && requests.send(Request::Signal(signal)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

#[allow(unsafe_code)]
fn ending_set() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data; sigemptyset initialises it, sigaddset takes valid numbers.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in ENDING {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}
