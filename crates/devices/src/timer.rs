//! One deadline of one device, on a thread of its own that exists from the first deadline on:
//! most guests never arm most timers.
//!
//! Invariants: the callback runs with no lock of the timer held, so it may arm the timer again.
//! After [`Timer::stop`] returns, the callback does not run until it is armed again.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

#[derive(Default)]
struct State {
    deadline: Option<Instant>,
    in_callback: bool,
    started: bool,
    closed: bool,
}

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

/// A timer of one shot.
pub struct Timer {
    inner: Arc<Inner>,
    callback: Arc<dyn Fn() + Send + Sync>,
    name: &'static str,
}

impl Timer {
    /// `name` is the thread's, at most 15 bytes. The callback holds its device weakly.
    pub fn new(name: &'static str, callback: impl Fn() + Send + Sync + 'static) -> Self {
        Self { inner: Arc::default(), callback: Arc::new(callback), name }
    }

    /// Calls back at `deadline`, instead of what was set before; `None`: not at all.
    pub fn arm(&self, deadline: Option<Instant>) {
        let mut s = self.inner.state.lock();
        s.deadline = deadline;
        if deadline.is_some() && !s.started {
            s.started = self.spawn();
        }
        self.inner.changed.notify_all();
    }

    /// Disarms, and waits for a callback that is running. Not from the callback, nor with a lock
    /// held that the callback takes.
    pub fn stop(&self) {
        let mut s = self.inner.state.lock();
        s.deadline = None;
        while s.in_callback {
            self.inner.changed.wait(&mut s);
            s.deadline = None;
        }
    }

    fn spawn(&self) -> bool {
        let (inner, callback) = (self.inner.clone(), self.callback.clone());
        let thread = std::thread::Builder::new().name(self.name.into());
        let spawned = thread.spawn(move || run(&inner, &*callback));
        if let Err(e) = &spawned {
            tracing::error!("{}: no timer thread: {e}", self.name);
        }
        spawned.is_ok()
    }
}

fn run(inner: &Inner, callback: &dyn Fn()) {
    let mut s = inner.state.lock();
    while !s.closed {
        match s.deadline {
            None => inner.changed.wait(&mut s),
            Some(d) if Instant::now() < d => {
                inner.changed.wait_until(&mut s, d);
            }
            Some(_) => {
                s.deadline = None;
                s.in_callback = true;
                parking_lot::MutexGuard::unlocked(&mut s, callback);
                s.in_callback = false;
                inner.changed.notify_all();
            }
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.inner.state.lock().closed = true;
        self.inner.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn fires_once_and_not_after_stop() {
        let (tx, rx) = std::sync::mpsc::channel();
        let count = Arc::new(AtomicU32::new(0));
        let seen = count.clone();
        let t = Timer::new("test", move || {
            seen.fetch_add(1, Ordering::SeqCst);
            let _ = tx.send(());
        });
        t.arm(Some(Instant::now() + Duration::from_secs(3600)));
        t.arm(Some(Instant::now()));
        rx.recv_timeout(Duration::from_secs(10)).unwrap();
        t.arm(Some(Instant::now() + Duration::from_secs(3600)));
        t.stop();
        assert_eq!(count.load(Ordering::SeqCst), 1);
        assert!(t.inner.state.lock().deadline.is_none());
    }
}
