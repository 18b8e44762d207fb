//! One thread a vCPU: they run guest code, stop together, and do work for others while stopped.
//!
//! ```text
//!            run()                    pause() / a request that ends the run
//!   Paused ---------> Running ----------------------------------------------> Paused
//!     |                                                                          |
//!     +-- with(): a closure runs on the vCPU's own thread --+                    +--> Ended
//! ```
//! A vCPU thread never takes the machine's lock: what it wants done (reset, power-off) it sends to
//! the life-cycle driver as a [`Request`], and stands still until that has acted.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::Sender;
use devices::bus::{Access, Effect};
use hv::{Entry, Exit, Kicker, Vcpu};
use parking_lot::{Condvar, Mutex};

use crate::io::IoSpace;

/// Bytes of port input that one exit can ask for (KVM's `ins` moves at most a page).
const MAX_INPUT: usize = 4096;

/// What the life-cycle driver is asked for, by a vCPU, a signal or a monitor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// The guest asked for a reset (or triple-faulted).
    Reset,
    /// The guest powered off.
    Shutdown,
    /// A vCPU cannot go on.
    InternalError { vcpu: u32, reason: String },
    /// The process got a signal that ends it.
    Signal(i32),
    /// A monitor (`quit`) or a failed incoming migration ends the process with this status.
    Quit(i32),
}

type Task = Box<dyn FnOnce(&mut dyn Vcpu) + Send>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    Run,
    Pause,
    End,
}

struct Control {
    want: Want,
    running: bool,
    ended: bool,
    tasks: VecDeque<Task>,
    kicker: Option<Arc<dyn Kicker>>,
}

struct Shared {
    id: u32,
    control: Mutex<Control>,
    changed: Condvar,
    tid: AtomicI32,
}

impl Shared {
    fn set(&self, want: Want) {
        let mut control = self.control.lock();
        if control.want != Want::End {
            control.want = want;
        }
        if want != Want::Run
            && let Some(kicker) = &control.kicker
        {
            kicker.kick();
        }
        drop(control);
        self.changed.notify_all();
    }
}

/// All vCPUs of a machine.
pub struct Vcpus {
    each: Vec<(Arc<Shared>, Option<JoinHandle<()>>)>,
}

impl Vcpus {
    /// Starts a thread for each vCPU, paused.
    pub fn start(
        vcpus: Vec<Box<dyn Vcpu>>,
        io: &Arc<IoSpace>,
        requests: &Sender<Request>,
    ) -> std::io::Result<Self> {
        let mut each = Vec::with_capacity(vcpus.len());
        for vcpu in vcpus {
            let shared = Arc::new(Shared {
                id: vcpu.id(),
                control: Mutex::new(Control {
                    want: Want::Pause,
                    running: false,
                    ended: false,
                    tasks: VecDeque::new(),
                    kicker: None,
                }),
                changed: Condvar::new(),
                tid: AtomicI32::new(0),
            });
            let runner =
                Runner { shared: shared.clone(), vcpu, io: io.clone(), requests: requests.clone() };
            let name = format!("CPU {}/KVM", shared.id);
            let thread = std::thread::Builder::new().name(name).spawn(move || runner.main())?;
            each.push((shared, Some(thread)));
        }
        let this = Self { each };
        for (shared, _) in &this.each {
            let mut control = shared.control.lock();
            while control.kicker.is_none() {
                shared.changed.wait(&mut control);
            }
        }
        Ok(this)
    }

    /// Number of vCPUs.
    pub fn len(&self) -> usize {
        self.each.len()
    }

    /// Thread ids, by vCPU.
    pub fn thread_ids(&self) -> Vec<i32> {
        self.each.iter().map(|(s, _)| s.tid.load(Ordering::Acquire)).collect()
    }

    /// Lets all run.
    pub fn run(&self) {
        self.each.iter().for_each(|(s, _)| s.set(Want::Run));
    }

    /// Stops all; returns when each stands still with its last exit completed.
    ///
    /// # Errors
    /// The vCPU that did not stop before `deadline`; the others are stopped.
    pub fn pause(&self, deadline: Instant) -> Result<(), String> {
        self.each.iter().for_each(|(s, _)| s.set(Want::Pause));
        for (shared, _) in &self.each {
            let mut control = shared.control.lock();
            while control.running {
                if shared.changed.wait_until(&mut control, deadline).timed_out() && control.running
                {
                    return Err(format!("vCPU {} did not stop in time", shared.id));
                }
            }
        }
        Ok(())
    }

    /// Runs `f` for every vCPU, each on its own thread, all at the same time, while paused; returns
    /// the results in order.
    pub fn with_all<T, F>(&self, f: F) -> Vec<T>
    where
        T: Send + 'static,
        F: Fn(usize, &mut dyn Vcpu) -> T + Send + Sync + 'static,
    {
        let f = Arc::new(f);
        let waits: Vec<_> = (0..self.each.len())
            .map(|i| {
                let f = f.clone();
                self.submit(i, move |vcpu| f(i, vcpu))
            })
            .collect();
        waits.into_iter().filter_map(|w| w.recv().ok()).collect()
    }

    fn submit<T: Send + 'static>(
        &self,
        index: usize,
        f: impl FnOnce(&mut dyn Vcpu) -> T + Send + 'static,
    ) -> crossbeam_channel::Receiver<T> {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        let (shared, _) = &self.each[index];
        let task: Task = Box::new(move |vcpu| {
            let _ = sender.send(f(vcpu));
        });
        shared.control.lock().tasks.push_back(task);
        shared.changed.notify_all();
        receiver
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.each.iter().for_each(|(s, _)| s.set(Want::End));
        for (_, thread) in &mut self.each {
            if let Some(thread) = thread.take() {
                let _ = thread.join();
            }
        }
    }
}

struct Runner {
    shared: Arc<Shared>,
    vcpu: Box<dyn Vcpu>,
    io: Arc<IoSpace>,
    requests: Sender<Request>,
}

impl Runner {
    fn main(mut self) {
        // SAFETY: gettid has no arguments and cannot fail.
        #[allow(unsafe_code)]
        let tid = unsafe { libc::gettid() };
        self.shared.tid.store(tid, Ordering::Release);
        self.shared.control.lock().kicker = Some(self.vcpu.kicker());
        self.shared.changed.notify_all();
        while self.wait_for_run() {
            self.run_until_paused();
        }
        let mut control = self.shared.control.lock();
        control.ended = true;
        control.running = false;
        drop(control);
        self.shared.changed.notify_all();
    }

    /// Stands still, doing tasks, until told to run (true) or to end (false).
    fn wait_for_run(&mut self) -> bool {
        let shared = self.shared.clone();
        let mut control = shared.control.lock();
        loop {
            if control.running {
                control.running = false;
                shared.changed.notify_all();
            }
            if control.want == Want::End {
                return false;
            }
            if let Some(task) = control.tasks.pop_front() {
                drop(control);
                task(self.vcpu.as_mut());
                control = shared.control.lock();
                continue;
            }
            if control.want == Want::Run {
                control.running = true;
                return true;
            }
            shared.changed.wait(&mut control);
        }
    }

    fn wanted(&self) -> Want {
        self.shared.control.lock().want
    }

    /// Runs guest code until something else is wanted, and leaves no exit half done.
    fn run_until_paused(&mut self) {
        let mut buffer = [0u8; MAX_INPUT];
        let mut answer = 0usize;
        loop {
            // A kick that came before KVM_RUN makes the run return at once, after it has completed
            // the last exit: so the state is whole when the thread stops.
            let entry = if answer > 0 { Entry::Data(&buffer[..answer]) } else { Entry::Resume };
            let exit = self.vcpu.run(entry);
            answer = 0;
            match exit {
                Ok(Exit::Interrupted) => {
                    if self.wanted() != Want::Run {
                        return;
                    }
                }
                Ok(exit) => match self.handle(exit, &mut buffer) {
                    Handled::Go => {}
                    Handled::Answer(len) => answer = len,
                    Handled::Ask(request) => return self.ask(request),
                },
                Err(e) => {
                    let vcpu = self.shared.id;
                    return self.ask(Request::InternalError { vcpu, reason: e.to_string() });
                }
            }
        }
    }

    /// Asks the driver and stands still until it decides.
    fn ask(&mut self, request: Request) {
        {
            let mut control = self.shared.control.lock();
            if control.want == Want::Run {
                control.want = Want::Pause;
            }
        }
        self.complete_exit();
        let _ = self.requests.send(request);
    }

    /// Completes the exit that made a request, so that the state can be saved. One instruction can
    /// need several exits (an access over a page's end), but not many.
    fn complete_exit(&mut self) {
        const MOST: usize = 16;
        let mut buffer = [0u8; MAX_INPUT];
        let mut answer = 0;
        for _ in 0..MOST {
            let entry = match answer {
                0 => Entry::CompleteExit,
                len => Entry::Data(&buffer[..len]),
            };
            answer = match self.vcpu.run(entry) {
                Ok(Exit::Interrupted) | Err(_) => return,
                Ok(exit) => match self.handle(exit, &mut buffer) {
                    Handled::Answer(len) => len,
                    Handled::Go | Handled::Ask(_) => 0,
                },
            };
        }
    }

    fn handle(&mut self, exit: Exit, buffer: &mut [u8; MAX_INPUT]) -> Handled {
        match exit {
            Exit::MmioWrite { addr, data } => effect(self.io.mmio_write(addr, data.as_slice())),
            Exit::MmioRead { addr, len } => {
                let len = usize::from(len).min(buffer.len());
                self.io.mmio_read(addr, &mut buffer[..len]);
                Handled::Answer(len)
            }
            Exit::IoOut { port, size, data } => {
                for value in data.as_slice().chunks(usize::from(size).max(1)) {
                    if let Handled::Ask(r) = effect(self.io.port_write(port, value)) {
                        return Handled::Ask(r);
                    }
                }
                Handled::Go
            }
            Exit::IoIn { port, size, count } => {
                let size = usize::from(size).max(1);
                let len = size.saturating_mul(count as usize).min(buffer.len());
                for value in buffer[..len].chunks_mut(size) {
                    self.io.port_read(port, value);
                }
                Handled::Answer(len)
            }
            Exit::Shutdown => {
                tracing::warn!("vCPU {}: triple fault\n{}", self.shared.id, self.vcpu.describe());
                Handled::Ask(Request::Reset)
            }
            Exit::SystemEvent(_) => Handled::Ask(Request::Shutdown),
            Exit::Hlt | Exit::Interrupted => Handled::Go,
            Exit::InternalError(reason) => {
                let registers = self.vcpu.describe();
                tracing::error!("vCPU {}: {reason}\n{registers}", self.shared.id);
                Handled::Ask(Request::InternalError { vcpu: self.shared.id, reason })
            }
        }
    }
}

enum Handled {
    Go,
    Answer(usize),
    Ask(Request),
}

fn effect((_, effect): (Access, Effect)) -> Handled {
    match effect {
        Effect::Reset => Handled::Ask(Request::Reset),
        Effect::Shutdown => Handled::Ask(Request::Shutdown),
        Effect::None | Effect::Relayout => Handled::Go,
    }
}
