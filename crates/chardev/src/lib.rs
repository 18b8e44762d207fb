//! Character devices: a byte stream in and out of the VM, under QEMU's `-chardev` names.
//!
//! A [`Chardev`] is the back end (stdio, pty, file, socket, null, mux); a [`Frontend`] is what in
//! the VM it is connected to (a serial port, a monitor). Each back end has a thread of its own:
//! a client that stalls or dies harms nobody else. [`open`] makes one from its description.
//!
//! - `pump`: the thread, its bounded output queue, the log file; the same for all back ends.
//! - `link`: one client's file descriptors, read and written without blocking.
//! - `socket`, `pty`, `stdio`, `file`, `null`: where clients come from.
//! - `mux`: several front ends on one back end.
//! - `client_listener`: a socket that takes several clients at once, each a chardev.

mod client_listener;
mod error;
mod file;
mod link;
mod mux;
mod null;
mod pty;
mod pump;
mod socket;
mod stdio;
mod sys;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

pub use client_listener::{ClientListener, Waker};
pub use error::Error;
pub use mux::Mux;
use spec::ChardevKind;

/// Most file descriptors taken from one message of a client; what is beyond is closed.
pub const MAX_FDS: usize = 16;

/// What a chardev is connected to. Called on the chardev's thread; must not block for long.
pub trait Frontend: Send + Sync {
    /// How many bytes it takes now; 0 stops reading until [`Chardev::resume_input`].
    fn can_receive(&self) -> usize;
    /// Bytes came in, at most [`can_receive`](Self::can_receive), with any fds passed along.
    fn receive(&self, data: &[u8], fds: Vec<OwnedFd>);
    /// A client connected (for stdio, file, null: once at the start).
    fn opened(&self);
    /// The client sends no more but may still read (`shutdown(2)` of its writing side, as `printf
    /// ... | socat` does). `true`: the front end has answers to give, and calls
    /// [`Chardev::disconnect`] when they are out. `false`: the client is let go at once.
    fn input_ended(&self) -> bool {
        false
    }
    /// The client went away.
    fn closed(&self);
    /// On a mux: this front end gets the keys from now on (`true`), or no longer does. A monitor
    /// shows its prompt when it gets them.
    fn focus(&self, focused: bool) {
        let _ = focused;
    }
}

/// A character back end.
pub trait Chardev: Send + Sync {
    /// Its id.
    fn label(&self) -> &str;
    /// As `query-chardev` shows it: "pty:/dev/pts/3", "unix:/path,server=on", ...
    fn filename(&self) -> String;
    /// Whether a front end is connected and open.
    fn frontend_open(&self) -> bool;
    /// Connects the front end (one; a mux takes several) and begins to read.
    fn connect(&self, frontend: Arc<dyn Frontend>);
    /// Sends bytes to the client. Never blocks: what exceeds the bounded queue of a client that
    /// does not read is not taken. Returns how many bytes were; 0 when nobody is connected.
    fn write(&self, data: &[u8]) -> usize;
    /// The front end has room again.
    fn resume_input(&self);
    /// Closes the current client's connection; a server goes on to listen.
    fn disconnect(&self);
    /// For a server with `wait=on`: blocks until the first client is there. Others return at once.
    fn wait_connected(&self) {}
    /// Blocks until all output has gone out (to the client and the log file), the client is gone,
    /// or `deadline` has passed. For the end of the process.
    fn drain(&self, deadline: Instant) {
        let _ = deadline;
    }
    /// Ends the back end: lets go of the front end, closes the client's connection, removes a
    /// listening socket's file, gives back the terminal. Dropping the chardev does it as well, but
    /// a front end that holds its chardev keeps it from being dropped.
    fn close(&self) {}
}

/// Called when the user asks to end the VM at the mux (C-a x).
pub type QuitCallback = Arc<dyn Fn() + Send + Sync>;

/// How a chardev is to behave for what it will be connected to.
#[derive(Clone)]
pub struct Options {
    /// Most bytes of output waiting for the client.
    pub queue_limit: usize,
    /// Called on the chardev's thread at C-a x of a mux; without it the key does nothing.
    pub on_quit: Option<QuitCallback>,
}

impl Options {
    /// For a serial port: 256 KiB.
    pub fn serial() -> Self {
        Self { queue_limit: 256 << 10, on_quit: None }
    }

    /// For a monitor: 1 MiB.
    pub fn monitor() -> Self {
        Self { queue_limit: 1 << 20, on_quit: None }
    }

    /// Sets what C-a x on a mux calls.
    pub fn with_quit(mut self, quit: QuitCallback) -> Self {
        self.on_quit = Some(quit);
        self
    }
}

impl Default for Options {
    fn default() -> Self {
        Self::serial()
    }
}

/// Opens the back end that `config` describes, a [`Mux`] around it for `mux=on`. A client may be
/// accepted from now on; nothing is read before a front end is connected. It does not wait for a
/// client even with `wait=on`: see [`Chardev::wait_connected`].
pub fn open(config: &spec::Chardev, options: Options) -> Result<Arc<dyn Chardev>, Error> {
    let on_quit = options.on_quit.clone();
    let log = |path| file::open_log(&config.told(), path, config.log_append);
    let log = config.logfile.as_deref().map(log).transpose()?;
    let setup =
        pump::Setup { label: config.id.clone(), who: config.told(), options, log, wait: false };
    let chardev: Arc<dyn Chardev> = match &config.kind {
        ChardevKind::Null => null::open(setup)?,
        ChardevKind::Stdio { signal } => stdio::open(setup, *signal)?,
        ChardevKind::Pty => pty::open(setup)?,
        ChardevKind::File { path, append } => file::open(setup, path, *append)?,
        ChardevKind::Socket { address, server: true, wait, .. } => {
            socket::listen(pump::Setup { wait: *wait, ..setup }, address)?
        }
        ChardevKind::Socket { address, server: false, reconnect, .. } => {
            socket::connect(setup, address, *reconnect)?
        }
    };
    Ok(if config.mux { Arc::new(Mux::new(chardev, on_quit)) } else { chardev })
}
