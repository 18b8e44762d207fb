//! [`Editor`]: a line editor that works on bytes, for terminals behind any chardev.
//!
//! Keys: cursor keys, Home, End, Delete, Backspace, Tab, C-a b d e f h k n p u w, history. Lines
//! that come from a pipe need none of it. Invariants: a line has at most [`MAX_LINE`] bytes, the
//! history [`MAX_HISTORY`] lines, an escape sequence [`MAX_ESCAPE`] bytes; what is returned does
//! not depend on how the input was split.

/// Longest line in bytes (QEMU: 4095).
pub const MAX_LINE: usize = 4095;
/// Lines in the history (QEMU: 64).
pub const MAX_HISTORY: usize = 64;
/// Longest escape sequence that is looked at.
const MAX_ESCAPE: usize = 16;

/// What the prompt is.
pub const PROMPT: &str = "(qemu) ";

/// What a byte led to, beside the echo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    Nothing,
    /// A line was entered.
    Line(String),
    /// Tab was pressed; the text up to the cursor.
    Complete(String),
}

/// See the module's header.
#[derive(Debug, Default)]
pub struct Editor {
    line: Vec<u8>,
    cursor: usize,
    history: Vec<Vec<u8>>,
    /// Position in the history; its length when at the line being edited.
    at: usize,
    /// The line being edited, while the history is shown.
    draft: Vec<u8>,
    escape: Option<Vec<u8>>,
    /// The last byte was a CR, so that an LF after it is the same key.
    after_cr: bool,
}

impl Editor {
    /// Forgets a half-typed line.
    pub fn reset(&mut self) {
        self.line.clear();
        self.cursor = 0;
        self.at = self.history.len();
        self.escape = None;
    }

    /// Draws the prompt and the line again, from the start of a row.
    pub fn show(&self, out: &mut Vec<u8>) {
        out.extend(PROMPT.as_bytes());
        out.extend(&self.line);
        back(self.line.len() - self.cursor, out);
    }

    /// One byte of input; what the terminal shall show is added to `out`.
    pub fn byte(&mut self, byte: u8, out: &mut Vec<u8>) -> Key {
        if let Some(mut sequence) = self.escape.take() {
            sequence.push(byte);
            self.escaped(sequence, out);
            return Key::Nothing;
        }
        let after_cr = std::mem::replace(&mut self.after_cr, byte == b'\r');
        match byte {
            b'\n' if after_cr => {}
            b'\r' | b'\n' => return self.enter(out),
            b'\t' => {
                let text = String::from_utf8_lossy(&self.line[..self.cursor]).into_owned();
                return Key::Complete(text);
            }
            0x01 => self.go(0, out),
            0x02 => self.go(self.cursor.saturating_sub(1), out),
            0x04 => self.delete(self.cursor, self.cursor + 1, out),
            0x05 => self.go(self.line.len(), out),
            0x06 => self.go(self.cursor + 1, out),
            0x08 | 0x7f => self.delete(self.cursor.saturating_sub(1), self.cursor, out),
            0x0b => self.delete(self.cursor, self.line.len(), out),
            0x0e => self.recall(self.at + 1, out),
            0x10 => self.recall(self.at.wrapping_sub(1), out),
            0x15 => self.delete(0, self.cursor, out),
            0x17 => {
                let before = &self.line[..self.cursor];
                let end = before.iter().rposition(|b| *b != b' ').map_or(0, |i| i + 1);
                let start = before[..end].iter().rposition(|b| *b == b' ').map_or(0, |i| i + 1);
                self.delete(start, self.cursor, out);
            }
            0x1b => self.escape = Some(Vec::new()),
            b if b < 0x20 => {}
            b => self.insert(&[b], out),
        }
        Key::Nothing
    }

    /// Adds text at the cursor.
    pub fn insert(&mut self, text: &[u8], out: &mut Vec<u8>) {
        if self.line.len() + text.len() > MAX_LINE {
            out.push(0x07);
            return;
        }
        self.line.splice(self.cursor..self.cursor, text.iter().copied());
        out.extend(&self.line[self.cursor..]);
        self.cursor += text.len();
        back(self.line.len() - self.cursor, out);
    }

    fn enter(&mut self, out: &mut Vec<u8>) -> Key {
        out.extend(b"\r\n");
        let line = std::mem::take(&mut self.line);
        self.cursor = 0;
        if !line.iter().all(|b| *b == b' ') && self.history.last() != Some(&line) {
            if self.history.len() == MAX_HISTORY {
                self.history.remove(0);
            }
            self.history.push(line.clone());
        }
        self.at = self.history.len();
        Key::Line(String::from_utf8_lossy(&line).into_owned())
    }

    fn escaped(&mut self, sequence: Vec<u8>, out: &mut Vec<u8>) {
        let last = sequence.last().copied().unwrap_or_default();
        let introducer = matches!(sequence[..], [b'['] | [b'O']);
        let unfinished =
            introducer || (sequence.len() > 1 && (last.is_ascii_digit() || last == b';'));
        if unfinished && sequence.len() < MAX_ESCAPE {
            self.escape = Some(sequence);
            return;
        }
        match &sequence[..] {
            [b'[' | b'O', b'A'] => self.recall(self.at.wrapping_sub(1), out),
            [b'[' | b'O', b'B'] => self.recall(self.at + 1, out),
            [b'[' | b'O', b'C'] => self.go(self.cursor + 1, out),
            [b'[' | b'O', b'D'] => self.go(self.cursor.saturating_sub(1), out),
            [b'[' | b'O', b'H'] | [b'[', b'1' | b'7', b'~'] => self.go(0, out),
            [b'[' | b'O', b'F'] | [b'[', b'4' | b'8', b'~'] => self.go(self.line.len(), out),
            [b'[', b'3', b'~'] => self.delete(self.cursor, self.cursor + 1, out),
            _ => {}
        }
    }

    fn go(&mut self, to: usize, out: &mut Vec<u8>) {
        let to = to.min(self.line.len());
        if to < self.cursor {
            back(self.cursor - to, out);
        } else {
            out.extend(&self.line[self.cursor..to]);
        }
        self.cursor = to;
    }

    fn delete(&mut self, start: usize, end: usize, out: &mut Vec<u8>) {
        let end = end.min(self.line.len());
        if start >= end {
            return;
        }
        self.go(start, out);
        self.line.drain(start..end);
        out.extend(&self.line[start..]);
        out.extend(b"\x1b[K");
        back(self.line.len() - start, out);
    }

    fn recall(&mut self, to: usize, out: &mut Vec<u8>) {
        // Going up from the first line wraps to a huge number.
        if to > self.history.len() {
            return;
        }
        if self.at == self.history.len() {
            self.draft = self.line.clone();
        }
        self.at = to;
        self.go(0, out);
        self.line = self.history.get(to).unwrap_or(&self.draft).clone();
        self.cursor = self.line.len();
        out.extend(&self.line);
        out.extend(b"\x1b[K");
    }
}

/// Moves the terminal's cursor left.
fn back(columns: usize, out: &mut Vec<u8>) {
    if columns > 0 {
        out.extend(format!("\x1b[{columns}D").into_bytes());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(editor: &mut Editor, input: &[u8]) -> Vec<String> {
        let mut out = Vec::new();
        input
            .iter()
            .filter_map(|b| match editor.byte(*b, &mut out) {
                Key::Line(line) => Some(line),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn keys_edit_the_line() {
        let mut e = Editor::default();
        assert_eq!(lines(&mut e, b"inof\x7f\x7ffo status\r\n"), ["info status"]);
        assert_eq!(lines(&mut e, b"status\x01info \x05!\x08\r"), ["info status"]);
        assert_eq!(lines(&mut e, b"a b  \x17c\n"), ["a c"]);
        assert_eq!(lines(&mut e, b"xyz\x1b[D\x1b[D\x0b\n"), ["x"]);
        assert_eq!(lines(&mut e, b"junk\x15ok\x1b[H\x1b[3~\x1b[F!\n"), ["k!"]);
    }

    #[test]
    fn history_goes_up_and_comes_back_to_the_draft() {
        let mut e = Editor::default();
        lines(&mut e, b"one\ntwo\n");
        assert_eq!(lines(&mut e, b"\x1b[A\x1b[A\n"), ["one"]);
        assert_eq!(lines(&mut e, b"draft\x1b[A\x1b[B\n"), ["draft"]);
    }

    proptest! {
        #[test]
        fn any_bytes_keep_the_bounds(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut e = Editor::default();
            let mut out = Vec::new();
            for b in bytes {
                e.byte(b, &mut out);
                prop_assert!(e.cursor <= e.line.len() && e.line.len() <= MAX_LINE);
                prop_assert!(e.at <= e.history.len());
            }
        }
    }
}
