//! [`Greeter`]: connections to a destination that have not said yet what they are for.
//!
//! Invariants: no thread a connection, and no more than [`MAX_SILENT`] of them are kept: one more
//! puts out the oldest that has said nothing. Each has [`HELLO_PATIENCE`] for its whole greeting.
//! What came is read before a new one is taken, so a source, which greets at once, is heard however
//! many others connect and stay silent. Of a greeting no byte too many is read: the rest of the
//! stream belongs to whoever gets the connection.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use crate::channel::{Channel, Listener, readable};
use crate::session::HELLO_PATIENCE;
use crate::wire::{Hello, Msg};
use crate::{Error, Result};

/// Most connections whose greeting has not come yet.
const MAX_SILENT: usize = 32;
/// Bytes that are read at a time.
const CHUNK: usize = 512;
/// Least time between two warnings.
const WARN_EVERY: Duration = Duration::from_secs(5);

/// See the module's header.
#[derive(Default)]
pub(crate) struct Greeter {
    /// In the order in which they came.
    waiting: VecDeque<Waiting>,
    warnings: Warnings,
}

/// Warnings of who is no source: whoever can connect must not fill the log.
#[derive(Default)]
struct Warnings {
    last: Option<Instant>,
    /// Left out since then.
    hushed: u64,
}

impl Warnings {
    fn warn(&mut self, from: &str, why: &Error) {
        if self.last.is_some_and(|last| last.elapsed() < WARN_EVERY) {
            self.hushed += 1;
            return;
        }
        let more = match std::mem::take(&mut self.hushed) {
            0 => String::new(),
            n => format!(" ({n} more were not told)"),
        };
        tracing::warn!(
            "incoming migration: {from} connected and is no Tern source: {why}; still waiting{more}"
        );
        self.last = Some(Instant::now());
    }
}

struct Waiting {
    channel: Channel,
    from: String,
    since: Instant,
    heard: Vec<u8>,
}

impl Greeter {
    /// Waits for at most `limit`; the connections whose greeting is whole now.
    ///
    /// # Errors
    /// The system's, of accepting.
    pub fn turn(
        &mut self,
        listener: &Listener,
        limit: Duration,
    ) -> io::Result<Vec<(Hello, Channel)>> {
        self.waiting.retain(|w| w.since.elapsed() < HELLO_PATIENCE);
        let ready = readable(listener, self.waiting.iter().map(|w| &w.channel), limit);
        let mut greeted = Vec::new();
        let mut silent = VecDeque::with_capacity(self.waiting.len());
        for (waiting, ready) in self.waiting.drain(..).zip(ready.channels) {
            match ready {
                true => sort(waiting, &mut silent, &mut greeted, &mut self.warnings),
                false => silent.push_back(waiting),
            }
        }
        self.waiting = silent;
        // An error of accepting comes again; those who have greeted must not be lost to it.
        if ready.listener
            && greeted.is_empty()
            && let Some((channel, from)) = listener.accept()?
        {
            let new = Waiting { channel, from, since: Instant::now(), heard: Vec::new() };
            sort(new, &mut self.waiting, &mut greeted, &mut self.warnings);
            self.bound();
        }
        Ok(greeted)
    }

    fn bound(&mut self) {
        if self.waiting.len() > MAX_SILENT {
            let oldest = self.waiting.iter().position(|w| w.heard.is_empty()).unwrap_or(0);
            self.waiting.remove(oldest);
            tracing::debug!("too many silent connections; the oldest is closed");
        }
    }
}

/// Hears what came on `from`, and puts it where it belongs; one that says anything else is closed.
fn sort(
    mut from: Waiting,
    silent: &mut VecDeque<Waiting>,
    greeted: &mut Vec<(Hello, Channel)>,
    warnings: &mut Warnings,
) {
    match from.hear() {
        Ok(Some(hello)) => greeted.push((hello, from.channel)),
        Ok(None) => silent.push_back(from),
        // One that only looks whether somebody listens is no news.
        Err(e) if from.heard.is_empty() => tracing::debug!("a connection without a greeting: {e}"),
        Err(e) => warnings.warn(&from.from, &e),
    }
}

impl Waiting {
    /// Reads what is there of the greeting; `None` until all of it is.
    fn hear(&mut self) -> Result<Option<Hello>> {
        loop {
            let missing = Hello::missing(&self.heard)?;
            if missing == 0 {
                return match Msg::read(&mut &self.heard[..])? {
                    Some(Msg::Hello(hello)) => Ok(Some(hello)),
                    _ => Err(Error::Protocol("the first frame is no greeting".into())),
                };
            }
            let mut chunk = [0; CHUNK];
            let chunk = &mut chunk[..missing.min(CHUNK)];
            match self.channel.read_now(chunk) {
                Ok(Some(0)) => return Err(Error::Lost("it was closed".into())),
                Ok(Some(n)) => self.heard.extend(&chunk[..n]),
                Ok(None) => return Ok(None),
                Err(e) => return Err(Error::Lost(e.to_string())),
            }
        }
    }
}
