//! [`ControlSocket`]: QMP on a unix socket for several clients at once.
//!
//! A monitor on a chardev serves one client after another, as QEMU's does; whoever connects and
//! says nothing keeps all others out. Here each client has a [`Monitor`] of its own. There are at
//! most [`MAX_CLIENTS`]: one more takes the place of the client that has been silent for longest,
//! and waits when all are at work.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use chardev::{Chardev, ClientListener, Waker};
use parking_lot::Mutex;

use crate::command::Commands;
use crate::event::EventBus;
use crate::monitor::Monitor;

/// Most clients at once.
pub const MAX_CLIENTS: usize = 32;
/// How long the threads of a client that left may stay.
const SWEEP: Duration = Duration::from_secs(1);
/// How often a place is looked for while somebody waits for one.
const CROWDED: Duration = Duration::from_millis(10);

struct Client {
    chardev: Arc<dyn Chardev>,
    monitor: Monitor,
}

/// A socket that listens; nobody is answered before [`serve`](Self::serve).
pub struct ControlSocket(ClientListener);

impl ControlSocket {
    /// Listens on `path`. Errors: it is too long, taken, or cannot be listened on.
    pub fn bind(path: &Path) -> Result<Self, chardev::Error> {
        ClientListener::bind("the control socket", path).map(Self)
    }

    /// Answers the clients. Errors: no thread can be started.
    pub fn serve(
        self,
        commands: Arc<dyn Commands>,
        events: &EventBus,
    ) -> std::io::Result<ControlServer> {
        let waker = self.0.waker();
        let desk = Arc::new(Desk {
            clients: Mutex::default(),
            commands,
            events: events.clone(),
            stop: AtomicBool::new(false),
        });
        let thread = std::thread::Builder::new().name("control".into()).spawn({
            let desk = desk.clone();
            move || desk.run(self.0)
        })?;
        Ok(ControlServer { desk, waker, thread: Some(thread) })
    }
}

/// Serves until it is dropped.
pub struct ControlServer {
    desk: Arc<Desk>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// As [`Monitor::flush`], for every client.
    pub fn flush(&self, deadline: Instant) {
        self.desk.clients.lock().iter().for_each(|client| client.monitor.flush(deadline));
    }

    /// Lets every client read what was meant for it, until `deadline`, and ends.
    pub fn close(mut self, deadline: Instant) {
        self.end();
        self.flush(deadline);
        for client in &*self.desk.clients.lock() {
            client.chardev.drain(deadline);
            client.chardev.close();
        }
    }

    fn end(&mut self) {
        self.desk.stop.store(true, Ordering::SeqCst);
        self.waker.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the control socket panicked");
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.end();
    }
}

struct Desk {
    clients: Mutex<Vec<Client>>,
    commands: Arc<dyn Commands>,
    events: EventBus,
    stop: AtomicBool,
}

impl Desk {
    fn run(&self, mut listener: ClientListener) {
        while !self.stop.load(Ordering::SeqCst) {
            let count = self.sweep();
            let room = count <= MAX_CLIENTS;
            if !room {
                self.make_room();
            }
            let timeout = if !room { Some(CROWDED) } else { (count > 0).then_some(SWEEP) };
            match listener.next(room, timeout) {
                Ok(Some(chardev)) => self.greet(chardev),
                Ok(None) => {}
                Err(e) => {
                    tracing::warn!("a client is turned away: {e}");
                    std::thread::sleep(CROWDED);
                }
            }
        }
    }

    /// Forgets who left; returns how many are there.
    fn sweep(&self) -> usize {
        let mut clients = self.clients.lock();
        let gone: Vec<Client> = clients.extract_if(.., |c| c.monitor.finished()).collect();
        let count = clients.len();
        drop(clients);
        drop(gone); // joins threads that have nothing to do
        count
    }

    /// Lets go of the client that has been silent for longest; of none that is being answered.
    fn make_room(&self) {
        let clients = self.clients.lock();
        let silent = clients.iter().filter_map(|c| Some((c.monitor.silent_since()?, c)));
        if let Some((since, client)) = silent.min_by_key(|(since, _)| *since) {
            tracing::debug!("a client silent for {:?} makes room for another", since.elapsed());
            client.chardev.disconnect();
        }
    }

    fn greet(&self, chardev: Arc<dyn Chardev>) {
        match Monitor::qmp(chardev.clone(), self.commands.clone(), &self.events, false) {
            Ok(monitor) => self.clients.lock().push(Client { chardev, monitor }),
            Err(e) => tracing::warn!("a client is turned away: no thread for it: {e}"),
        }
    }
}
