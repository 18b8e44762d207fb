//! The mux: several front ends on one back end, of which one has the keys. C-a is the escape:
//! `c` switches to the next front end, `h` shows help, `x` asks to end the VM, `b` (break) is
//! taken and ignored, C-a sends a C-a.
//!
//! Output of all front ends goes to the client. Input waits in a small buffer a front end, so
//! that the escape works while the front end that has the keys takes nothing; when that is full,
//! the client is held back.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use crate::{Chardev, Frontend, QuitCallback};

const ESCAPE: u8 = 0x01;
/// Input that waits for a front end, in bytes.
const BUFFER: usize = 4096;
/// Most front ends on a mux.
const MAX_FRONTENDS: usize = 8;

const HELP: &str = "\r\n\
    C-a h    this help\r\n\
    C-a x    end the VM\r\n\
    C-a b    break (ignored)\r\n\
    C-a c    switch between the console and the monitor\r\n\
    C-a C-a  send C-a\r\n";

/// A back end shared by several front ends. The first that is connected has the keys at first.
pub struct Mux {
    inner: Arc<dyn Chardev>,
    keys: Arc<Keys>,
}

struct Seat {
    frontend: Arc<dyn Frontend>,
    buffer: VecDeque<u8>,
    /// It was told `opened`.
    open: bool,
}

struct State {
    seats: Vec<Seat>,
    focus: usize,
    escaped: bool,
    client: bool,
}

/// The mux's own front end on the back end.
struct Keys {
    state: Mutex<State>,
    inner: std::sync::Weak<dyn Chardev>,
    on_quit: Option<QuitCallback>,
}

impl Mux {
    /// A mux on `inner`, which is connected to it from now on.
    pub fn new(inner: Arc<dyn Chardev>, on_quit: Option<QuitCallback>) -> Self {
        let state = State { seats: Vec::new(), focus: 0, escaped: false, client: false };
        let keys =
            Arc::new(Keys { state: Mutex::new(state), inner: Arc::downgrade(&inner), on_quit });
        inner.connect(keys.clone());
        Self { inner, keys }
    }
}

impl Chardev for Mux {
    fn label(&self) -> &str {
        self.inner.label()
    }

    fn filename(&self) -> String {
        self.inner.filename()
    }

    fn frontend_open(&self) -> bool {
        !self.keys.state.lock().seats.is_empty()
    }

    fn connect(&self, frontend: Arc<dyn Frontend>) {
        let mut state = self.keys.state.lock();
        if state.seats.len() >= MAX_FRONTENDS {
            tracing::warn!(
                "chardev '{}': a mux takes {MAX_FRONTENDS} front ends, this one gets no input",
                self.label()
            );
            return;
        }
        state.seats.push(Seat { frontend, buffer: VecDeque::new(), open: false });
        drop(state);
        self.inner.resume_input(); // The thread tells it `opened`.
    }

    fn write(&self, data: &[u8]) -> usize {
        self.inner.write(data)
    }

    fn resume_input(&self) {
        self.inner.resume_input();
    }

    fn disconnect(&self) {
        self.inner.disconnect();
    }

    fn wait_connected(&self) {
        self.inner.wait_connected();
    }

    fn drain(&self, deadline: Instant) {
        self.inner.drain(deadline);
    }

    fn close(&self) {
        self.inner.close();
        let seats = std::mem::take(&mut self.keys.state.lock().seats);
        drop(seats);
    }
}

impl Drop for Mux {
    fn drop(&mut self) {
        self.close();
    }
}

impl Keys {
    /// Tells front ends that came after the client that it is there.
    fn announce(&self) {
        let mut state = self.state.lock();
        if !state.client {
            return;
        }
        let focus = state.focus;
        let mut fresh = Vec::new();
        for (i, seat) in state.seats.iter_mut().enumerate() {
            if !std::mem::replace(&mut seat.open, true) {
                fresh.push((i, seat.frontend.clone()));
            }
        }
        drop(state);
        for (i, frontend) in fresh {
            frontend.opened();
            frontend.focus(i == focus);
        }
    }

    /// Gives the front end that has the keys what waits for it.
    fn deliver(&self) {
        loop {
            let Some(frontend) = self.focused() else { return };
            let room = frontend.can_receive();
            let mut state = self.state.lock();
            let focus = state.focus;
            let buffer = &mut state.seats[focus].buffer;
            let n = room.min(buffer.len());
            if n == 0 {
                return;
            }
            let data: Vec<u8> = buffer.drain(..n).collect();
            drop(state);
            frontend.receive(&data, Vec::new());
        }
    }

    fn focused(&self) -> Option<Arc<dyn Frontend>> {
        let state = self.state.lock();
        state.seats.get(state.focus).map(|seat| seat.frontend.clone())
    }

    /// Takes the key after the escape.
    fn command(&self, key: u8) {
        match key {
            b'c' => self.switch(),
            b'h' | b'?' => self.say(HELP),
            b'x' => {
                if let Some(quit) = &self.on_quit {
                    self.say("\r\nTern: terminated\r\n");
                    quit();
                }
            }
            _ => {}
        }
    }

    fn say(&self, text: &str) {
        if let Some(inner) = self.inner.upgrade() {
            inner.write(text.as_bytes());
        }
    }

    fn switch(&self) {
        let mut state = self.state.lock();
        if state.seats.len() < 2 {
            return;
        }
        let from = state.seats[state.focus].frontend.clone();
        state.focus = (state.focus + 1) % state.seats.len();
        let to = state.seats[state.focus].frontend.clone();
        drop(state);
        from.focus(false);
        to.focus(true);
    }

    /// Sorts the bytes of a client: escapes here, the rest into the buffer of who has the keys.
    fn sort(&self, byte: u8) {
        let mut state = self.state.lock();
        if std::mem::take(&mut state.escaped) {
            if byte != ESCAPE {
                drop(state);
                // What was typed before the switch is for who had the keys then.
                self.deliver();
                return self.command(byte);
            }
        } else if byte == ESCAPE {
            state.escaped = true;
            return;
        }
        let focus = state.focus;
        if let Some(seat) = state.seats.get_mut(focus)
            && seat.buffer.len() < BUFFER
        {
            seat.buffer.push_back(byte);
        }
    }
}

impl Frontend for Keys {
    /// The back end's thread asks before every wait, so late news is passed on here.
    fn can_receive(&self) -> usize {
        self.announce();
        self.deliver();
        let state = self.state.lock();
        state.seats.get(state.focus).map_or(0, |seat| BUFFER - seat.buffer.len())
    }

    fn receive(&self, data: &[u8], fds: Vec<OwnedFd>) {
        drop(fds); // Front ends that share a client with others have no use for them.
        data.iter().for_each(|byte| self.sort(*byte));
        self.deliver();
    }

    fn opened(&self) {
        self.state.lock().client = true;
        self.announce();
    }

    fn closed(&self) {
        let mut state = self.state.lock();
        state.client = false;
        state.escaped = false;
        let mut open = Vec::new();
        for seat in &mut state.seats {
            seat.buffer.clear();
            if std::mem::take(&mut seat.open) {
                open.push(seat.frontend.clone());
            }
        }
        drop(state);
        open.iter().for_each(|frontend| frontend.closed());
    }
}
