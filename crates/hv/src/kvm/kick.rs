//! Kicks: making KVM_RUN return from another thread, without losing one.
//!
//! A kick sets `immediate_exit` in the shared kvm_run page and then sends a signal to the vCPU's
//! thread. A thread in the guest leaves it by the signal; a thread that is about to enter sees
//! the flag. Only [`take`](Shared::take), on the vCPU's thread, clears the flag, right before it
//! reports the interruption: so a kick at any moment leads to at least one `Interrupted` after it.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, Once};

use kvm_bindings::kvm_run;

use crate::Kicker;

/// What a vCPU and its kickers share: a mapping of kvm_run of its own (so that a kicker may
/// outlive the vCPU), and the thread that runs it.
pub struct Shared {
    run: NonNull<kvm_run>,
    size: usize,
    /// Thread id, 0 when none is known.
    tid: AtomicI32,
}

// SAFETY: `run` is only used for the atomic access to `immediate_exit`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Maps the kvm_run page of `vcpu`; `size` is KVM_GET_VCPU_MMAP_SIZE's.
    pub fn new(vcpu: &impl AsRawFd, size: usize) -> io::Result<Arc<Self>> {
        install_handler();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let run = unsafe {
            libc::mmap(std::ptr::null_mut(), size, prot, libc::MAP_SHARED, vcpu.as_raw_fd(), 0)
        };
        if run == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let run = NonNull::new(run.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Arc::new(Self { run, size, tid: AtomicI32::new(0) }))
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the mapping lives as long as self; the byte is written by user space only, and
        // by us only through this atomic.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.run.as_ptr()).immediate_exit) }
    }

    /// Makes the calling thread the vCPU's.
    pub fn own(&self) {
        let tid = TID.with(|t| *t);
        if self.tid.load(Ordering::Relaxed) != tid {
            unblock_signal();
            self.tid.store(tid, Ordering::SeqCst);
        }
    }

    /// Asks for the next KVM_RUN to return at once (on the vCPU's own thread).
    pub fn request(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Takes the flag back; the caller reports an interruption.
    pub fn take(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }

    /// The vCPU is gone: kicks do nothing from now on.
    pub fn disown(&self) {
        self.tid.store(0, Ordering::SeqCst);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: our own mapping, no longer used.
        unsafe { libc::munmap(self.run.as_ptr().cast(), self.size) };
    }
}

impl Kicker for Shared {
    fn kick(&self) {
        self.request();
        let tid = self.tid.load(Ordering::SeqCst);
        if tid != 0 {
            // SAFETY: plain numbers. Should the thread have ended meanwhile, the call fails or
            // another thread of ours is interrupted once, which is harmless.
            unsafe {
                libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, libc::SIGRTMIN());
            }
        }
    }
}

thread_local! {
    // SAFETY: gettid has no preconditions.
    static TID: i32 = unsafe { libc::gettid() };
}

extern "C" fn on_signal(_: libc::c_int) {}

/// Installs, once, a handler that does nothing for SIGRTMIN: the signal's work is to make
/// KVM_RUN fail with EINTR (so no SA_RESTART).
fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: sigaction is plain data, for which zeroes are valid.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_signal as *const () as usize;
        // SAFETY: a valid action; the handler is async-signal-safe as it does nothing.
        unsafe { libc::sigaction(libc::SIGRTMIN(), &action, std::ptr::null_mut()) };
    });
}

fn unblock_signal() {
    // SAFETY: sigset_t is plain data; all calls write only into it or this thread's mask.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGRTMIN());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
}
