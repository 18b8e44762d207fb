//! [`HmpSession`]: one terminal with HMP: prompt, editing, completion, and a `migrate` that waits.

use std::collections::VecDeque;

use super::commands::{self, Outcome};
use super::editor::{Editor, Key};
use crate::command::{ClientFds, Commands};

/// Input that is kept while a `migrate` without `-d` runs.
const MAX_TYPED_AHEAD: usize = 64 << 10;

/// Bytes for the terminal.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Output {
    pub bytes: Vec<u8>,
}

/// See the module's header. Input is given to [`receive`](Self::receive) and worked off a command
/// at a time by [`step`](Self::step). No socket, clock or thread inside: the caller calls
/// [`tick`](Self::tick) now and then while [`waiting`](Self::waiting).
#[derive(Default)]
pub struct HmpSession {
    editor: Editor,
    fds: ClientFds,
    /// A migration that this terminal waits for.
    migrating: bool,
    input: VecDeque<u8>,
    /// Nothing is shown before the keys come here.
    mux: bool,
    /// The prompt has been shown since the client came.
    shown: bool,
}

impl HmpSession {
    /// A session that has not shown its prompt yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A session on a chardev that it shares with others.
    pub fn on_mux() -> Self {
        Self { mux: true, ..Self::default() }
    }

    /// A client came: the banner and the prompt.
    pub fn open(&mut self) -> Output {
        self.reset();
        if self.mux { Output::default() } else { self.prompt() }
    }

    /// The keys come here now: the prompt, the first time with the banner.
    pub fn focus(&mut self) -> Output {
        if self.migrating { Output::default() } else { self.prompt() }
    }

    fn prompt(&mut self) -> Output {
        let banner = concat!(
            "QEMU 8.2.0 monitor (tern-",
            env!("CARGO_PKG_VERSION"),
            ") - type 'help' for more information\r\n"
        );
        let first = !std::mem::replace(&mut self.shown, true);
        let mut bytes = if first { banner.as_bytes().to_vec() } else { Vec::new() };
        self.editor.show(&mut bytes);
        Output { bytes }
    }

    /// The client left; the history stays.
    pub fn reset(&mut self) {
        self.editor.reset();
        self.migrating = false;
        self.shown = false;
        self.input.clear();
        self.fds.0.lock().clear();
    }

    /// Whether a `migrate` without `-d` runs.
    pub fn waiting(&self) -> bool {
        self.migrating
    }

    /// Input from the terminal; what exceeds [`MAX_TYPED_AHEAD`] during a `migrate` is dropped.
    pub fn receive(&mut self, bytes: &[u8]) {
        let room = if self.migrating {
            MAX_TYPED_AHEAD.saturating_sub(self.input.len())
        } else {
            bytes.len()
        };
        self.input.extend(&bytes[..bytes.len().min(room)]);
    }

    /// Works off the input up to the end of a command; `None` when nothing is left, or when what is
    /// left waits for a `migrate`.
    pub fn step(&mut self, commands: &dyn Commands) -> Option<Output> {
        if self.migrating || self.input.is_empty() {
            return None;
        }
        let mut out = Vec::new();
        while let Some(byte) = self.input.pop_front() {
            match self.editor.byte(byte, &mut out) {
                Key::Nothing => {}
                Key::Line(line) => {
                    self.execute(&line, commands, &mut out);
                    break;
                }
                Key::Complete(text) => {
                    self.complete(&text, &mut out);
                    break;
                }
            }
        }
        Some(Output { bytes: out })
    }

    fn execute(&mut self, line: &str, commands: &dyn Commands, out: &mut Vec<u8>) {
        match commands::run(line, commands, &self.fds, true) {
            Outcome::Text(text) => {
                out.extend(terminal(&text));
                self.editor.show(out);
            }
            Outcome::Migrating => self.migrating = true,
        }
    }

    /// Drops what has not been worked off.
    pub fn discard_input(&mut self) {
        self.input.clear();
    }

    /// Shows the progress of a `migrate` that is waited for, and the prompt when it is over; what
    /// was typed meanwhile is then for [`step`](Self::step).
    pub fn tick(&mut self, commands: &dyn Commands) -> Output {
        if !self.migrating {
            return Output::default();
        }
        let (text, over) = commands::migrate_progress(commands, &self.fds);
        let mut bytes = terminal(&text);
        if over {
            self.migrating = false;
            self.editor.show(&mut bytes);
        }
        Output { bytes }
    }

    fn complete(&mut self, text: &str, out: &mut Vec<u8>) {
        let (word, candidates) = commands::complete(text);
        match &candidates[..] {
            [] => {}
            [only] => {
                let rest = format!("{} ", &only[word.len()..]);
                self.editor.insert(rest.as_bytes(), out);
            }
            [first, ..] => {
                let common = (word.len()..=first.len())
                    .rev()
                    .find(|n| {
                        first.is_char_boundary(*n)
                            && candidates.iter().all(|c| c.starts_with(&first[..*n]))
                    })
                    .unwrap_or(word.len());
                if common > word.len() {
                    return self.editor.insert(&first.as_bytes()[word.len()..common], out);
                }
                out.extend(b"\r\n");
                for candidate in &candidates {
                    out.extend(format!("{candidate}\r\n").into_bytes());
                }
                self.editor.show(out);
            }
        }
    }
}

fn terminal(text: &str) -> Vec<u8> {
    text.replace('\n', "\r\n").into_bytes()
}
