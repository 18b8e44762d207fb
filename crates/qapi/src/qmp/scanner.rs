//! [`Scanner`]: cuts an unframed stream of bytes into JSON values.
//!
//! Invariants: it holds at most [`MAX_SIZE`] bytes; what it returns does not depend on how the
//! stream was split into pieces; after an error it skips to the end of the line, so that a client
//! can go on (QEMU's parser gets back in step in a similar way). Strings in single quotes are
//! taken too, as QEMU does.

use serde_json::Value;

use super::strict::Strict;

/// Largest value in bytes.
pub const MAX_SIZE: usize = 10 << 20;
/// Deepest nesting of arrays and objects.
pub const MAX_DEPTH: usize = 100;

/// What the scanner found.
#[derive(Debug, Clone, PartialEq)]
pub enum Scanned {
    /// A whole value.
    Value(Value),
    /// Something that is not JSON, with a description.
    Error(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Between values.
    Idle,
    /// In an array or object, not in a string.
    Nested,
    /// In a string that began with this quote; the flag: after a backslash.
    Text(u8, bool),
    /// In a number or literal at the top.
    Bare,
    /// After an error, to the end of the line.
    Skip,
}

/// The state between two pieces of input.
#[derive(Debug)]
pub struct Scanner {
    mode: Mode,
    depth: usize,
    single_quotes: bool,
    buffer: Vec<u8>,
}

impl Default for Scanner {
    fn default() -> Self {
        Self { mode: Mode::Idle, depth: 0, single_quotes: false, buffer: Vec::new() }
    }
}

impl Scanner {
    /// Takes `input` up to the end of the first value or error in it. Returns how many bytes it
    /// took and what they completed; call again with the rest.
    pub fn feed(&mut self, input: &[u8]) -> (usize, Option<Scanned>) {
        let mut at = 0;
        while at < input.len() {
            let byte = input[at];
            if self.mode == Mode::Skip {
                at += 1;
                if byte == b'\n' {
                    self.mode = Mode::Idle;
                }
                continue;
            }
            let (took, found) = self.byte(byte);
            at += usize::from(took);
            if found.is_some() {
                return (at, found);
            }
        }
        (at, None)
    }

    /// Forgets a half-read value (the client went away).
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// One byte; the flag says whether it was taken (a bare word ends before its delimiter).
    fn byte(&mut self, byte: u8) -> (bool, Option<Scanned>) {
        if byte >= 0xf5 || byte == 0xc0 || byte == 0xc1 {
            return (true, self.fail("JSON parse error, invalid UTF-8"));
        }
        match self.mode {
            Mode::Idle => match byte {
                b' ' | b'\t' | b'\r' | b'\n' => (true, None),
                b'{' | b'[' => {
                    self.mode = Mode::Nested;
                    self.depth = 1;
                    (true, self.push(byte))
                }
                b'"' | b'\'' => {
                    self.mode = Mode::Text(byte, false);
                    self.single_quotes |= byte == b'\'';
                    (true, self.push(byte))
                }
                b'}' | b']' | b',' | b':' => (true, self.fail("JSON parse error, expecting value")),
                _ => {
                    self.mode = Mode::Bare;
                    (true, self.push(byte))
                }
            },
            Mode::Bare => match byte {
                b' ' | b'\t' | b'\r' | b'\n' | b'{' | b'}' | b'[' | b']' | b',' | b':' | b'"'
                | b'\'' => (false, self.complete()),
                _ => (true, self.push(byte)),
            },
            Mode::Text(quote, escaped) => {
                if byte < 0x20 {
                    return (true, self.fail("JSON parse error, control character in string"));
                }
                if escaped {
                    self.mode = Mode::Text(quote, false);
                } else if byte == b'\\' {
                    self.mode = Mode::Text(quote, true);
                } else if byte == quote {
                    self.mode = Mode::Nested;
                    if let Some(error) = self.push(byte) {
                        return (true, Some(error));
                    }
                    return (true, if self.depth == 0 { self.complete() } else { None });
                }
                (true, self.push(byte))
            }
            Mode::Nested => (true, self.nested(byte)),
            Mode::Skip => (true, None),
        }
    }

    fn nested(&mut self, byte: u8) -> Option<Scanned> {
        match byte {
            b'{' | b'[' => {
                self.depth += 1;
                if self.depth > MAX_DEPTH {
                    return self.fail("JSON parse error, nesting depth limit exceeded");
                }
            }
            b'}' | b']' => {
                self.depth -= 1;
                if self.depth == 0 {
                    let full = self.push(byte);
                    return if full.is_some() { full } else { self.complete() };
                }
            }
            b'"' | b'\'' => {
                self.mode = Mode::Text(byte, false);
                self.single_quotes |= byte == b'\'';
            }
            _ => {}
        }
        self.push(byte)
    }

    fn push(&mut self, byte: u8) -> Option<Scanned> {
        if self.buffer.len() >= MAX_SIZE {
            return self.fail("JSON parse error, size limit exceeded");
        }
        self.buffer.push(byte);
        None
    }

    fn fail(&mut self, message: &str) -> Option<Scanned> {
        self.reset();
        self.mode = Mode::Skip;
        Some(Scanned::Error(message.to_string()))
    }

    fn complete(&mut self) -> Option<Scanned> {
        let whole = std::mem::take(self);
        let text = if whole.single_quotes { requote(&whole.buffer) } else { whole.buffer };
        Some(match serde_json::from_slice(&text) {
            Ok(Strict(value)) => Scanned::Value(value),
            Err(e) => Scanned::Error(format!("JSON parse error, {e}")),
        })
    }
}

/// Turns strings in single quotes into strings in double quotes.
fn requote(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + 16);
    let mut quote = 0u8;
    let mut bytes = text.iter().copied();
    while let Some(byte) = bytes.next() {
        match (quote, byte) {
            (0, b'"' | b'\'') => {
                quote = byte;
                out.push(b'"');
            }
            (0, _) => out.push(byte),
            (_, b'\\') => match bytes.next() {
                Some(b'\'') => out.push(b'\''),
                Some(next) => out.extend([b'\\', next]),
                None => out.push(b'\\'),
            },
            (q, b) if q == b => {
                quote = 0;
                out.push(b'"');
            }
            (b'\'', b'"') => out.extend(*b"\\\""),
            _ => out.push(byte),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn scan(pieces: &[&[u8]]) -> Vec<Scanned> {
        let mut scanner = Scanner::default();
        let mut found = Vec::new();
        for piece in pieces {
            let mut rest = *piece;
            while !rest.is_empty() {
                let (took, item) = scanner.feed(rest);
                rest = &rest[took..];
                found.extend(item);
            }
        }
        found
    }

    #[test]
    fn values_need_no_delimiter_between_them() {
        assert_eq!(
            scan(&[b"{\"a\":1}{'b': 'it\"s \\' }'}[1] 7 "]),
            [
                Scanned::Value(json!({"a": 1})),
                Scanned::Value(json!({"b": "it\"s ' }"})),
                Scanned::Value(json!([1])),
                Scanned::Value(json!(7)),
            ]
        );
    }

    #[test]
    fn it_is_in_step_again_on_the_line_after_an_error() {
        let found = scan(&[b"}}} {\"a\":1}\n{\"b\":2}"]);
        assert!(matches!(found[0], Scanned::Error(_)));
        assert_eq!(found[1], Scanned::Value(json!({"b": 2})));
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn depth_and_size_are_bounded() {
        let deep = vec![b'['; 1_000_000];
        assert!(matches!(&scan(&[&deep])[..], [Scanned::Error(e)] if e.contains("depth")));
        let mut long = vec![b'"'];
        long.resize(MAX_SIZE + 10, b'x');
        assert!(matches!(&scan(&[&long])[..], [Scanned::Error(e)] if e.contains("size")));
    }

    #[test]
    fn a_key_given_twice_is_refused_at_any_depth() {
        for text in [r#"{"a":1,"a":2}"#, r#"[{"b":{"a":1.5,"a":null}}]"#] {
            let found = scan(&[text.as_bytes()]);
            assert!(
                matches!(&found[..], [Scanned::Error(e)] if e.contains("duplicate key 'a'")),
                "{found:?}"
            );
        }
        let text = r#"{"a":{"a":[-1,2.5,true,null,"x"]}}"#;
        assert_eq!(
            scan(&[text.as_bytes()]),
            [Scanned::Value(json!({"a":{"a":[-1,2.5,true,null,"x"]}}))]
        );
    }

    #[test]
    fn the_deepest_allowed_value_parses() {
        let text = [vec![b'['; MAX_DEPTH], vec![b']'; MAX_DEPTH]].concat();
        assert!(matches!(&scan(&[&text])[..], [Scanned::Value(_)]));
    }

    proptest! {
        #[test]
        fn random_bytes_split_anywhere_give_equal_results(
            bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0usize..200,
        ) {
            let at = at.min(bytes.len());
            prop_assert_eq!(scan(&[&bytes]), scan(&[&bytes[..at], &bytes[at..]]));
        }

        #[test]
        fn json_like_bytes_one_at_a_time_give_equal_results(
            text in "[\\[\\]{}\"':,0-9a-z\\\\ \n]{0,80}",
        ) {
            let bytes = text.as_bytes();
            let single: Vec<&[u8]> = bytes.chunks(1).collect();
            prop_assert_eq!(scan(&[bytes]), scan(&single));
        }
    }
}
