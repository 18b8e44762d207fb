//! The `key=value,...` grammar and its JSON form, both into [`Opts`].
//!
//! A comma in a value is written twice. The first word may leave out its key when the option has
//! an implied one. A later word without `=` is a switch: `wait` is on, `nowait` is off. A JSON
//! object gives the same keys, nested ones joined with dots (`cache.direct`).
//!
//! Invariant: [`Opts::adopt`] refuses what is not in the option's table of keys, and values that
//! are not what the table says; the option's code then reads only keys of the table, whose
//! defaults these are.

use serde_json::Value;

use super::keys::{Fate, Key, Kind, Schema};
use super::value;
use super::{CmdlineError, Stop};
use crate::qmp::strict::Strict;

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

impl Scalar {
    /// As the grammar without JSON would have it.
    fn text(&self) -> String {
        match self {
            Self::Text(s) | Self::Number(s) => s.clone(),
            Self::Bool(true) => "on".into(),
            Self::Bool(false) => "off".into(),
            Self::Null => String::new(),
        }
    }
}

/// The keys of one option.
#[derive(Debug, Clone)]
pub struct Opts {
    /// As it was written, with its dash: for messages.
    option: String,
    items: Vec<(String, Scalar)>,
    /// Set by [`adopt`](Opts::adopt).
    schema: Option<&'static Schema>,
}

impl Opts {
    /// Parses either form. `implied` is the key of a first word without `=`. In JSON a key that
    /// is given twice is an error, in the other form the last one counts, both as in QEMU.
    pub fn parse(option: &str, text: &str, implied: Option<&str>) -> Result<Self, CmdlineError> {
        let mut opts = Self { option: option.into(), items: Vec::new(), schema: None };
        if text.trim_start().starts_with(['{', '[']) {
            let Strict(json) = serde_json::from_str(text)
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

    /// Whether `help` is among the words.
    pub fn asks_help(&self) -> bool {
        self.has("help") || self.has("?")
    }

    /// Takes `schema` as the table of keys and holds what was given against it; what it says of a
    /// key that is not for the option's code is done here. Returns the warnings.
    pub(super) fn adopt(&mut self, schema: &'static Schema) -> Result<Vec<String>, Stop> {
        if schema.implied.is_some_and(|key| self.is(key, "help")) || self.asks_help() {
            return Err(Stop::Print(schema.help(&self.option)));
        }
        self.schema = Some(schema);
        let mut warnings = Vec::new();
        let mut left = Vec::new();
        let items = std::mem::take(&mut self.items);
        for (at, (name, scalar)) in items.iter().enumerate() {
            let key =
                schema.find(name).ok_or_else(|| self.error(schema.unknown(&self.option, name)))?;
            let list = matches!(key.kind, Kind::List);
            if !list && items[at + 1..].iter().any(|(later, _)| later == name) {
                continue;
            }
            if let Fate::Refused(why) = key.fate {
                return Err(self.bad(name, why).into());
            }
            let below = key.name != name && !list;
            let text = match below {
                true => String::new(),
                false => self.check(name, scalar, &key.kind)?,
            };
            match key.fate {
                Fate::Taken => left.push((name.clone(), scalar.clone())),
                Fate::Quiet => {}
                Fate::Only(values, _) if values.iter().any(|v| key.kind.same(v, &text)) => {}
                Fate::Only(values, why) => {
                    let only = values.join("' or '");
                    let message = format!("only '{only}' is supported, not '{text}': {why}");
                    return Err(self.bad(name, message).into());
                }
                Fate::Ignored(_) if !key.default.is_empty() && is_default(key, &text) => {}
                Fate::Ignored(why) => {
                    let subject = [self.option.as_str(), schema.name, name];
                    let subject: Vec<_> = subject.into_iter().filter(|s| !s.is_empty()).collect();
                    warnings.push(format!("{}= is ignored: {why}", subject.join(" ")));
                }
                Fate::Refused(_) => {}
            }
        }
        self.items = left;
        Ok(warnings)
    }

    /// Whether the value is what the table says of it; returns it as text.
    fn check(&self, name: &str, scalar: &Scalar, kind: &Kind) -> Result<String, CmdlineError> {
        let is_text = matches!(kind, Kind::Text | Kind::Id | Kind::Node);
        let text = match scalar {
            Scalar::Null if matches!(kind, Kind::Node) => return Ok(String::new()),
            Scalar::Null => return Err(self.bad(name, "null is no value for it")),
            Scalar::Number(_) | Scalar::Bool(_) if is_text => {
                return Err(self.bad(name, "expected a string"));
            }
            other => other.text(),
        };
        kind.check(&text).map_err(|e| self.bad(name, e))?;
        Ok(text)
    }

    fn last(&self, key: &str) -> Option<&Scalar> {
        self.items.iter().rev().find(|(k, _)| k == key).map(|(_, v)| v)
    }

    /// The option as it was written.
    pub fn option(&self) -> &str {
        &self.option
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

    /// Takes a key out; the last one counts.
    fn take(&mut self, key: &str) -> Option<Scalar> {
        debug_assert!(
            self.schema.is_none_or(|s| s.find(key).is_some()),
            "{key} is not in the table"
        );
        let found = self.last(key).cloned();
        self.items.retain(|(k, _)| k != key);
        found
    }

    /// What the table says that holds when the key is absent.
    fn default(&self, key: &str) -> Option<&'static str> {
        self.schema.and_then(|s| s.find(key)).map(|k| k.default).filter(|d| !d.is_empty())
    }

    /// The text of a key as it was given; numbers and switches are text too.
    pub fn str(&mut self, key: &str) -> Option<String> {
        match self.take(key)? {
            Scalar::Null => None,
            other => Some(other.text()),
        }
    }

    /// The text of a key, or its default.
    pub fn or_default(&mut self, key: &str) -> String {
        let default = self.default(key).unwrap_or_default();
        self.str(key).unwrap_or_else(|| default.into())
    }

    /// All values of a key that may be given several times.
    pub fn list(&mut self, key: &str) -> Vec<String> {
        let dotted = format!("{key}.");
        let (all, left) = std::mem::take(&mut self.items)
            .into_iter()
            .partition(|(k, _)| k == key || k.starts_with(&dotted));
        self.items = left;
        all.iter().map(|(_, v)| v.text()).collect()
    }

    /// Whether the key was given with this text, or "?" for `help`.
    pub fn is(&self, key: &str, text: &str) -> bool {
        let given = self.last(key).map(Scalar::text);
        given.is_some_and(|g| g == text || (text == "help" && g == "?"))
    }

    /// A key that must be there.
    pub fn required(&mut self, key: &str) -> Result<String, CmdlineError> {
        self.str(key).ok_or_else(|| self.error(format!("parameter '{key}' is missing")))
    }

    /// A switch, if it was given.
    pub fn bool(&mut self, key: &str) -> Result<Option<bool>, CmdlineError> {
        self.with(key, value::switch)
    }

    /// A switch, or its default.
    pub fn flag(&mut self, key: &str) -> Result<bool, CmdlineError> {
        let default = self.default(key) == Some("on");
        Ok(self.bool(key)?.unwrap_or(default))
    }

    /// `on|off|auto`; `None` is auto or absent.
    pub fn on_off_auto(&mut self, key: &str) -> Result<Option<bool>, CmdlineError> {
        self.with(key, |s| if s == "auto" { Ok(None) } else { value::switch(s).map(Some) })
            .map(Option::flatten)
    }

    /// A size in bytes, if it was given.
    pub fn size(&mut self, key: &str) -> Result<Option<u64>, CmdlineError> {
        let unit = match self.schema.and_then(|s| s.find(key)).map(|k| k.kind) {
            Some(Kind::Size(unit)) => unit,
            _ => 1,
        };
        self.with(key, |s| value::size(s, unit))
    }

    /// A whole number, if it was given; the table has its range.
    pub fn number_if<T: TryFrom<u64>>(&mut self, key: &str) -> Result<Option<T>, CmdlineError> {
        self.with(key, |s| {
            T::try_from(value::number(s)?).map_err(|_| format!("'{s}' is too large"))
        })
    }

    /// A whole number, or its default.
    pub fn number<T: TryFrom<u64> + Default>(&mut self, key: &str) -> Result<T, CmdlineError> {
        let default = self.default(key).and_then(|d| value::number(d).ok());
        let default = default.and_then(|n| T::try_from(n).ok()).unwrap_or_default();
        Ok(self.number_if(key)?.unwrap_or(default))
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
        Some(Self { option, items, schema: None })
    }

    /// Takes all that is left, in order.
    pub fn rest(&mut self) -> Vec<(String, Scalar)> {
        std::mem::take(&mut self.items)
    }

    /// Refuses what nobody took: keys that mean nothing together with the others.
    pub fn finish(&self) -> Result<(), CmdlineError> {
        match self.items.first() {
            None => Ok(()),
            Some((key, _)) => Err(self.bad(key, "cannot be given together with the others")),
        }
    }
}

/// Whether a switch's or key's text asks for what holds anyway.
fn is_default(key: &Key, text: &str) -> bool {
    text == "auto" || key.kind.same(key.default, text)
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
    use crate::cmdline::keys::key;

    const KEYS: Schema = Schema::of(
        Some("first"),
        &[&[
            key("first", Kind::Text, "", ""),
            key("id", Kind::Id, "", ""),
            key("path", Kind::Text, "", ""),
            key("server", Kind::Switch, "off", ""),
            key("cache.direct", Kind::Switch, "off", ""),
            key("size", Kind::Number(1, 9), "7", ""),
            key("cpus", Kind::List, "", ""),
            key("old", Kind::Switch, "on", "").ignored("it is old"),
            key("one", Kind::Switch, "on", "").only(&["on"], "there is one"),
        ]],
    );

    /// Parsed and held against [`KEYS`], with the warnings.
    fn adopted(text: &str) -> Result<(Opts, Vec<String>), String> {
        let mut o = Opts::parse("-x", text, KEYS.implied).map_err(|e| e.to_string())?;
        match o.adopt(&KEYS) {
            Ok(warnings) => Ok((o, warnings)),
            Err(Stop::Error(e)) => Err(e.to_string()),
            Err(_) => Err("help".into()),
        }
    }

    #[test]
    fn both_forms_give_the_same_keys() {
        let json = r#"{"first":"f","cache":{"direct":true},"id":"a","path":"x,y","cpus":[1,"2"]}"#;
        for text in ["f,cache.direct=on,id=a,path=x,,y,cpus=1,cpus=2", json] {
            let (mut o, _) = adopted(text).unwrap();
            assert_eq!(o.str("first").as_deref(), Some("f"));
            assert_eq!(o.bool("cache.direct").unwrap(), Some(true));
            assert_eq!(o.str("id").as_deref(), Some("a"));
            assert_eq!(o.str("path").as_deref(), Some("x,y"));
            assert_eq!(o.list("cpus"), ["1", "2"]);
            assert_eq!(
                (o.number::<u8>("size").unwrap(), o.number_if::<u8>("size").unwrap()),
                (7, None)
            );
            o.finish().unwrap();
        }
    }

    #[test]
    fn the_last_of_a_key_counts_but_json_has_it_once() {
        let (mut o, _) = adopted("path=a,id=1bad,path=b,id=good,server,noserver").unwrap();
        assert_eq!((o.str("path"), o.str("id")), (Some("b".into()), Some("good".into())));
        assert_eq!(o.bool("server").unwrap(), Some(false));
        let e = adopted(r#"{"path":"a","path":"b"}"#).unwrap_err();
        assert!(e.contains("duplicate key 'path'"), "{e}");
        let e = adopted(r#"{"cache":{"direct":true,"direct":true}}"#).unwrap_err();
        assert!(e.contains("duplicate key 'direct'"), "{e}");
    }

    #[test]
    fn what_the_table_says_of_a_key_is_done() {
        let (_, warnings) = adopted("old=yes,one=on").unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
        let (o, warnings) = adopted("old=no").unwrap();
        assert_eq!(warnings, ["-x old= is ignored: it is old"]);
        o.finish().unwrap();
        for (text, says) in [
            ("one=off", "-x: parameter 'one': only 'on' is supported, not 'off': there is one"),
            ("pathh=1", "-x: parameter 'pathh' is not supported; did you mean 'path'?"),
            ("size=10", "-x: parameter 'size': expected a number from 1 to 9, not 10"),
            ("id=a,path", "-x: parameter 'path': expected a string"),
            (r#"{"size":null}"#, "-x: parameter 'size': null is no value for it"),
            ("help", "help"),
            ("id=a,?", "help"),
        ] {
            let e = adopted(text).err().unwrap_or_default();
            assert!(e.starts_with(says), "{text}: {e}");
        }
    }

    #[test]
    fn json_gives_names_as_strings_and_is_an_object() {
        let e = adopted(r#"{"id":5}"#).unwrap_err();
        assert_eq!(e, "-x: parameter 'id': expected a string");
        for json in [r#"{"id":["a"]}"#, r#"{"id":{"a":1}}"#, "[]"] {
            assert!(adopted(json).is_err(), "{json}");
        }
        let e = adopted(&"[".repeat(100_000)).unwrap_err();
        assert!(e.contains("JSON") && e.len() < 200, "{e}");
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
            let _ = adopted(&text);
        }
    }
}
