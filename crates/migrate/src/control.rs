//! What both drivers do alike: reading and writing a control connection, and keeping how it ended.

use std::io::{BufReader, Write};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::channel::Channel;
use crate::wire::Msg;
use crate::{Error, Result};

/// Bytes that are read from a control connection at a time: the device state is many messages.
const READ_AHEAD: usize = 64 << 10;

/// Reads `channel` to its end in a thread: `tell` gets every message and, as the last, why it
/// ended; it says whether anybody still listens. `peer` names the other side to the operator.
///
/// # Errors
/// [`Error::Machine`] when no thread can be started.
pub(crate) fn read(
    channel: Arc<Channel>,
    peer: &'static str,
    tell: impl Fn(Result<Msg>) -> bool + Send + 'static,
) -> Result<()> {
    spawn("mig-control", move || {
        let mut from = BufReader::with_capacity(READ_AHEAD, &*channel);
        loop {
            let msg = match Msg::read(&mut from) {
                Ok(Some(msg)) => Ok(msg),
                Ok(None) => Err(Error::Lost(format!("the {peer} closed the connection"))),
                Err(e) => Err(e),
            };
            let over = msg.is_err();
            if !tell(msg) || over {
                return;
            }
        }
    })
}

/// Writes `msgs` in one go.
///
/// # Errors
/// [`Error::Lost`] when the connection fails, [`Error::Machine`] when a message is too large.
pub(crate) fn write(channel: &Channel, msgs: &[Msg]) -> Result<()> {
    let frames = msgs.iter().map(Msg::encode).collect::<Result<Vec<_>>>()?;
    let mut to = channel;
    to.write_all(&frames.concat())
        .map_err(|e| Error::Lost(format!("the migration's control connection was lost: {e}")))
}

/// How a migration ended, once it has.
#[derive(Default)]
pub(crate) struct Outcome {
    result: Mutex<Option<Result<()>>>,
    changed: Condvar,
}

impl Outcome {
    /// The end.
    pub fn set(&self, result: Result<()>) {
        *self.result.lock() = Some(result);
        self.changed.notify_all();
    }

    /// The result so far.
    pub fn get(&self) -> Option<Result<()>> {
        self.result.lock().clone()
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// The migration's own.
    pub fn wait(&self) -> Result<()> {
        let mut result = self.result.lock();
        loop {
            if let Some(result) = &*result {
                return result.clone();
            }
            self.changed.wait(&mut result);
        }
    }

    /// Waits for the end, at most `limit`; whether it has come.
    pub fn comes_within(&self, limit: Duration) -> bool {
        let mut result = self.result.lock();
        self.changed.wait_while_for(&mut result, |r| r.is_none(), limit);
        result.is_some()
    }
}

/// Starts a thread.
pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(work)
        .map(drop)
        .map_err(|e| Error::Machine(format!("cannot start thread {name}: {e}")))
}
