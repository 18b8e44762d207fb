//! [`spaced`]: JSON on one line, with a space after each `,` and `:`, as QEMU writes it. Scripts look
//! for `"status": "running"` in it.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, Serializer};

struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, to: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { to.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, to: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { to.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, to: &mut W) -> io::Result<()> {
        to.write_all(b": ")
    }
}

/// The text of `value`.
pub fn spaced(value: &Value) -> String {
    let mut text = Vec::new();
    // Neither a Value nor memory fails to be written.
    let _ = value.serialize(&mut Serializer::with_formatter(&mut text, Spaced));
    String::from_utf8(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn spaces_are_where_qemus_are_and_nowhere_else() {
        let value = json!({"a": [1, {"b": "x:y,z"}, []], "c": {}});
        assert_eq!(spaced(&value), r#"{"a": [1, {"b": "x:y,z"}, []], "c": {}}"#);
        assert_eq!(serde_json::from_str::<Value>(&spaced(&value)).unwrap(), value);
    }
}
