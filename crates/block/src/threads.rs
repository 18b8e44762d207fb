//! The engine of blocking system calls on helper threads: for hosts that do not permit io_uring,
//! and for what io_uring leaves over.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use crate::sync_io::Target;
use crate::uring::wait_readable;
use crate::{Completion, Engine, Request};

/// Most helper threads of one engine.
const MAX_THREADS: usize = 8;

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Request>,
    done: Vec<Completion>,
    idle: usize,
    closing: bool,
}

struct Shared {
    target: Arc<Target>,
    state: Mutex<State>,
    work: Condvar,
    event: EventFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if let Some(request) = state.waiting.pop_front() {
                drop(state);
                let result = self.target.run(request.op, &request.buffer);
                state = self.lock();
                state.done.push(Completion { request, result });
                // Cannot fail: the counter is far from its limit and the fd is open.
                let _ = self.event.write(1);
            } else if state.closing {
                return;
            } else {
                state.idle += 1;
                state = self.work.wait(state).unwrap_or_else(|e| e.into_inner());
                state.idle -= 1;
            }
        }
    }
}

/// See the module.
pub struct ThreadEngine {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    in_flight: usize,
    capacity: usize,
}

impl ThreadEngine {
    /// An engine whose completions are told through `event`; threads are made when needed.
    pub fn new(target: Arc<Target>, capacity: usize, event: EventFd) -> Self {
        let shared = Shared { target, state: Mutex::default(), work: Condvar::new(), event };
        Self { shared: Arc::new(shared), threads: Vec::new(), in_flight: 0, capacity }
    }

    fn spawn_if_busy(&mut self) {
        let (idle, waiting) = {
            let state = self.shared.lock();
            (state.idle, state.waiting.len())
        };
        if waiting <= idle || self.threads.len() >= MAX_THREADS {
            return;
        }
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name("blk-worker".into());
        match thread.spawn(move || shared.serve()) {
            Ok(t) => self.threads.push(t),
            // With no thread at all the request is carried out right here.
            Err(_) if self.threads.is_empty() => self.run_here(),
            Err(_) => {}
        }
    }

    fn run_here(&mut self) {
        let Some(request) = self.shared.lock().waiting.pop_front() else { return };
        let result = self.shared.target.run(request.op, &request.buffer);
        self.shared.lock().done.push(Completion { request, result });
        let _ = self.shared.event.write(1);
    }

    /// Moves completions into `done`; leaves the eventfd alone.
    pub(crate) fn take_done(&mut self, done: &mut Vec<Completion>) {
        if self.in_flight > 0 {
            let mut state = self.shared.lock();
            self.in_flight -= state.done.len();
            done.append(&mut state.done);
        }
    }
}

impl Engine for ThreadEngine {
    fn queue(&mut self, request: Request) {
        self.in_flight += 1;
        self.shared.lock().waiting.push_back(request);
        self.shared.work.notify_one();
        self.spawn_if_busy();
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let _ = self.shared.event.read();
        self.take_done(done);
    }

    fn wait(&mut self) -> io::Result<()> {
        if self.in_flight == 0 { Ok(()) } else { wait_readable(self.event()) }
    }

    fn event(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn name(&self) -> &'static str {
        "threads"
    }
}

impl Drop for ThreadEngine {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_all();
        for t in self.threads.drain(..) {
            let _ = t.join();
        }
    }
}
