//! The `key=value,...` grammar and its JSON form, both into [`Opts`].
//!
//! A comma in a value is written twice. The first word may leave out its key when the option has
//! an implied one. A later word without `=` is a switch: `wait` is on, `nowait` is off. A JSON
//! object gives the same keys, nested ones joined with dots (`cache.direct`).
//!
//! Invariant: every key that was given is either taken by the option's own code or refused by
//! [`Opts::finish`] with the nearest key that the option knows.

use std::cell::RefCell;

use serde_json::Value;

use super::CmdlineError;
use super::suggest::hint;
use super::value;

/// Most keys of one option.
const MAX_KEYS: usize = 4096;

/// A value as it was written.
#[derive(Debug, Clone, PartialEq)]
pub enum Scalar {
    Text(String),
    Bool(bool),
    /// A number, in JSON's spelling.
    Number(String),
    Null,
}

/// The keys of one option.
#[derive(Debug, Clone)]
pub struct Opts {
    /// As it was written, with its dash: for messages.
    option: String,
    items: Vec<(String, Scalar)>,
    asked: RefCell<Vec<String>>,
}

impl Opts {
    /// Parses either form. `implied` is the key of a first word without `=`.
    pub fn parse(option: &str, text: &str, implied: Option<&str>) -> Result<Self, CmdlineError> {
        let mut opts = Self { option: option.into(), items: Vec::new(), asked: RefCell::default() };
        if text.trim_start().starts_with(['{', '[']) {
            let json: Value = serde_json::from_str(text)
                .map_err(|e| opts.error(format!("the JSON does not parse: {e}")))?;
            if !json.is_object() {
                return Err(opts.error("the JSON must be an object ({...})"));
            }
            flatten("", &json, &mut opts.items);
        } else {
            opts.items = keyval(text, implied).map_err(|e| opts.error(e))?;
        }
        if opts.items.len() > MAX_KEYS {
            return Err(opts.error(format!("more than {MAX_KEYS} keys")));
        }
        Ok(opts)
    }

    /// An error of this option.
    pub fn error(&self, message: impl Into<String>) -> CmdlineError {
        CmdlineError::Invalid { option: self.option.clone(), message: message.into() }
    }

    /// An error of one key.
    pub fn bad(&self, key: &str, message: impl std::fmt::Display) -> CmdlineError {
        self.error(format!("parameter '{key}': {message}"))
    }

    /// Whether the key was given.
    pub fn has(&self, key: &str) -> bool {
        self.items.iter().any(|(k, _)| k == key)
    }

    /// Takes a key out; the last one counts, as in QEMU.
    pub fn take(&mut self, key: &str) -> Option<Scalar> {
        self.asked.borrow_mut().push(key.to_string());
        let mut found = None;
        self.items.retain(|(k, v)| {
            if k == key {
                found = Some(v.clone());
            }
            k != key
        });
        found
    }

    /// The text of a key; numbers and switches are text too.
    pub fn str(&mut self, key: &str) -> Option<String> {
        match self.take(key)? {
            Scalar::Text(s) | Scalar::Number(s) => Some(s),
            Scalar::Bool(b) => Some(if b { "on" } else { "off" }.into()),
            Scalar::Null => None,
        }
    }

    /// The text of a key that is a name: JSON must give it as a string.
    pub fn text(&mut self, key: &str) -> Result<Option<String>, CmdlineError> {
        let dotted = format!("{key}.");
        let number = |(k, v): &(String, Scalar)| k == key && matches!(v, Scalar::Number(_));
        if self.items.iter().any(|i| number(i) || i.0.starts_with(&dotted)) {
            return Err(self.bad(key, "expected a string"));
        }
        Ok(self.str(key))
    }

    /// A key that must be there.
    pub fn required(&mut self, key: &str) -> Result<String, CmdlineError> {
        self.str(key).ok_or_else(|| self.error(format!("parameter '{key}' is missing")))
    }

    /// An `id` or `node-name`: a letter, then letters, digits, `-`, `.` and `_`.
    pub fn id(&mut self, key: &str) -> Result<Option<String>, CmdlineError> {
        let Some(id) = self.text(key)? else { return Ok(None) };
        let mut chars = id.chars();
        let good = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
            && chars.all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
        match good {
            true => Ok(Some(id)),
            false => Err(self.bad(
                key,
                format!("'{id}' is not an identifier (a letter, then letters, digits, '-._')"),
            )),
        }
    }

    /// `on|off`, `yes|no`, `true|false`, `y|n`.
    pub fn bool(&mut self, key: &str) -> Result<Option<bool>, CmdlineError> {
        self.with(key, value::switch)
    }

    /// A switch with a default.
    pub fn flag(&mut self, key: &str, default: bool) -> Result<bool, CmdlineError> {
        Ok(self.bool(key)?.unwrap_or(default))
    }

    /// `on|off|auto`; `None` is auto or absent.
    pub fn on_off_auto(&mut self, key: &str) -> Result<Option<bool>, CmdlineError> {
        self.with(key, |s| if s == "auto" { Ok(None) } else { value::switch(s).map(Some) })
            .map(Option::flatten)
    }

    /// A size in bytes, with a suffix; `unit` is the one without a suffix.
    pub fn size(&mut self, key: &str, unit: u64) -> Result<Option<u64>, CmdlineError> {
        self.with(key, |s| value::size(s, unit))
    }

    /// A whole number (decimal or 0x) between `min` and `max`.
    pub fn number<T: TryFrom<u64>>(
        &mut self,
        key: &str,
        min: u64,
        max: u64,
    ) -> Result<Option<T>, CmdlineError> {
        self.with(key, |s| {
            let n = value::number(s)?;
            let range = || format!("expected a number from {min} to {max}, not {s}");
            if n < min || n > max {
                return Err(range());
            }
            T::try_from(n).map_err(|_| range())
        })
    }

    /// Parses a key's text with `f`, whose error is told with option and key.
    pub fn with<T>(
        &mut self,
        key: &str,
        f: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, CmdlineError> {
        match self.str(key) {
            None => Ok(None),
            Some(s) => f(&s).map(Some).map_err(|e| self.bad(key, e)),
        }
    }

    /// Takes all keys below `prefix.` out, as options of their own; `None` when there are none.
    pub fn nested(&mut self, prefix: &str) -> Option<Self> {
        let dotted = format!("{prefix}.");
        let (inner, outer): (Vec<_>, Vec<_>) =
            self.items.drain(..).partition(|(k, _)| k.starts_with(&dotted));
        self.items = outer;
        if inner.is_empty() {
            return None;
        }
        let items = inner.into_iter().map(|(k, v)| (k[dotted.len()..].to_string(), v)).collect();
        let option = format!("{} ({prefix})", self.option);
        Some(Self { option, items, asked: RefCell::default() })
    }

    /// Takes all that is left, in order.
    pub fn rest(&mut self) -> Vec<(String, Scalar)> {
        std::mem::take(&mut self.items)
    }

    /// Takes keys that change nothing here out; returns those that were there.
    pub fn ignore(&mut self, keys: &[&str]) -> Vec<String> {
        keys.iter().filter(|k| self.take(k).is_some()).map(ToString::to_string).collect()
    }

    /// Refuses what nobody took.
    pub fn finish(&self) -> Result<(), CmdlineError> {
        let Some((key, _)) = self.items.first() else { return Ok(()) };
        let asked = self.asked.borrow();
        let near = hint(key, asked.iter().map(String::as_str), "");
        Err(self.error(format!("parameter '{key}' is not supported{near}")))
    }
}

/// Writes a value so that the grammar reads it back: commas doubled.
pub fn quote(value: &str) -> String {
    value.replace(',', ",,")
}

fn keyval(text: &str, implied: Option<&str>) -> Result<Vec<(String, Scalar)>, String> {
    let mut items = Vec::new();
    for (i, word) in words(text).into_iter().enumerate() {
        let item = match (word.key, implied) {
            (Some(key), _) if key.is_empty() => {
                return Err("a parameter without a name before '='".into());
            }
            (Some(key), _) => (key, Scalar::Text(word.value)),
            (None, Some(implied)) if i == 0 => (implied.to_string(), Scalar::Text(word.value)),
            (None, _) if word.value.is_empty() => continue,
            (None, _) => match word.value.strip_prefix("no") {
                Some(key) if !key.is_empty() => (key.to_string(), Scalar::Bool(false)),
                _ => (word.value, Scalar::Bool(true)),
            },
        };
        items.push(item);
    }
    Ok(items)
}

struct Word {
    key: Option<String>,
    value: String,
}

/// Splits at single commas; a doubled one is a comma in the word. The first `=` ends the key.
fn words(text: &str) -> Vec<Word> {
    let mut words = Vec::new();
    let mut word = Word { key: None, value: String::new() };
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                word.value.push(',');
            }
            ',' => {
                words.push(std::mem::replace(&mut word, Word { key: None, value: String::new() }));
            }
            '=' if word.key.is_none() => word.key = Some(std::mem::take(&mut word.value)),
            _ => word.value.push(c),
        }
    }
    words.push(word);
    words
}

fn flatten(prefix: &str, value: &Value, out: &mut Vec<(String, Scalar)>) {
    let join = |key: &str| {
        if prefix.is_empty() { key.to_string() } else { format!("{prefix}.{key}") }
    };
    let scalar = match value {
        Value::Object(members) => {
            return members.iter().for_each(|(key, v)| flatten(&join(key), v, out));
        }
        Value::Array(items) => {
            let numbered = items.iter().enumerate();
            return numbered.for_each(|(i, v)| flatten(&join(&i.to_string()), v, out));
        }
        Value::String(s) => Scalar::Text(s.clone()),
        Value::Bool(b) => Scalar::Bool(*b),
        Value::Number(n) => Scalar::Number(n.to_string()),
        Value::Null => Scalar::Null,
    };
    out.push((prefix.to_string(), scalar));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_forms_give_the_same_keys() {
        let mut a = Opts::parse(
            "-blockdev",
            "file,cache.direct=on,node-name=a,filename=x,,y",
            Some("driver"),
        )
        .unwrap();
        let json = r#"{"driver":"file","cache":{"direct":true},"node-name":"a","filename":"x,y"}"#;
        let mut b = Opts::parse("-blockdev", json, Some("driver")).unwrap();
        for opts in [&mut a, &mut b] {
            assert_eq!(opts.str("driver").as_deref(), Some("file"));
            assert_eq!(opts.bool("cache.direct").unwrap(), Some(true));
            assert_eq!(opts.id("node-name").unwrap().as_deref(), Some("a"));
            assert_eq!(opts.str("filename").as_deref(), Some("x,y"));
            opts.finish().unwrap();
        }
    }

    #[test]
    fn switches_and_what_is_left_over() {
        let mut o =
            Opts::parse("-chardev", "socket,id=a,server,nowait,pathh=1", Some("t")).unwrap();
        assert_eq!(o.bool("server").unwrap(), Some(true));
        assert_eq!(o.bool("wait").unwrap(), Some(false));
        o.take("t");
        o.take("id");
        o.take("path");
        let e = o.finish().unwrap_err().to_string();
        assert_eq!(e, "-chardev: parameter 'pathh' is not supported; did you mean 'path'?");
    }

    #[test]
    fn json_gives_names_as_strings_and_is_an_object() {
        for json in [r#"{"id":5}"#, r#"{"id":["a"]}"#, r#"{"id":{"a":1}}"#] {
            let mut o = Opts::parse("-device", json, None).unwrap();
            let e = o.id("id").unwrap_err().to_string();
            assert_eq!(e, "-device: parameter 'id': expected a string");
        }
        let e = Opts::parse("-device", &"[".repeat(100_000), None).unwrap_err().to_string();
        assert!(e.contains("JSON") && e.len() < 200, "{e}");
        assert!(Opts::parse("-device", "[]", None).is_err());
    }

    proptest! {
        #[test]
        fn quoted_values_come_back(values in prop::collection::vec("[ -~]{0,20}", 1..6)) {
            let text = values.iter().enumerate().map(|(i, v)| format!("k{i}={}", quote(v)))
                .collect::<Vec<_>>().join(",");
            let mut opts = Opts::parse("-x", &text, None).unwrap();
            for (i, value) in values.iter().enumerate() {
                prop_assert_eq!(opts.str(&format!("k{i}")), Some(value.clone()));
            }
            prop_assert!(opts.finish().is_ok());
        }

        #[test]
        fn any_text_parses_or_is_refused(text in "\\PC{0,60}") {
            let _ = Opts::parse("-x", &text, Some("first"));
        }
    }
}
