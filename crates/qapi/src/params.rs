//! Migration parameters and capabilities under QEMU's names: one table each, with types, ranges
//! and defaults.
//!
//! A parameter or capability that the engine does not have is *fixed*: it is reported with its
//! default, setting it to that changes nothing and is taken, and any other value is refused by
//! name. libvirt sets whole lists of them to their defaults.

use serde_json::{Map, Value, json};

use crate::command::Error;
use crate::schema::{Arg, Type};

/// Capabilities in QEMU's spelling that are reported.
pub const CAPABILITY_NAMES: &[&str] = &["events", "return-path"];

const fn int(name: &'static str) -> Arg {
    Arg { name, ty: Type::Int, optional: true }
}
const fn text(name: &'static str) -> Arg {
    Arg { name, ty: Type::Str, optional: true }
}

const fn flag(name: &'static str) -> Arg {
    Arg { name, ty: Type::Bool, optional: true }
}

/// The arguments of `migrate-set-parameters` and the members of `query-migrate-parameters`.
pub const ARGUMENTS: &[Arg] = &[
    int("announce-initial"),
    int("announce-max"),
    int("announce-rounds"),
    int("announce-step"),
    int("compress-level"),
    int("compress-threads"),
    flag("compress-wait-thread"),
    int("decompress-threads"),
    int("throttle-trigger-threshold"),
    int("cpu-throttle-initial"),
    int("cpu-throttle-increment"),
    flag("cpu-throttle-tailslow"),
    text("tls-creds"),
    text("tls-hostname"),
    text("tls-authz"),
    int("max-bandwidth"),
    int("downtime-limit"),
    int("x-checkpoint-delay"),
    flag("block-incremental"),
    int("multifd-channels"),
    int("xbzrle-cache-size"),
    int("max-postcopy-bandwidth"),
    int("max-cpu-throttle"),
    text("multifd-compression"),
    int("multifd-zlib-level"),
    int("multifd-zstd-level"),
];

/// Values of the fixed parameters.
fn fixed() -> Vec<(&'static str, Value)> {
    vec![
        ("announce-initial", json!(50)),
        ("announce-max", json!(550)),
        ("announce-rounds", json!(5)),
        ("announce-step", json!(100)),
        ("compress-level", json!(1)),
        ("compress-threads", json!(8)),
        ("compress-wait-thread", json!(true)),
        ("decompress-threads", json!(2)),
        ("throttle-trigger-threshold", json!(50)),
        ("cpu-throttle-initial", json!(20)),
        ("cpu-throttle-increment", json!(10)),
        ("cpu-throttle-tailslow", json!(false)),
        ("tls-creds", json!("")),
        ("tls-hostname", json!("")),
        ("tls-authz", json!("")),
        ("x-checkpoint-delay", json!(20_000)),
        ("block-incremental", json!(false)),
        ("multifd-channels", json!(2)),
        ("xbzrle-cache-size", json!(67_108_864)),
        ("max-postcopy-bandwidth", json!(0)),
        ("max-cpu-throttle", json!(99)),
        ("multifd-compression", json!("none")),
        ("multifd-zlib-level", json!(1)),
        ("multifd-zstd-level", json!(1)),
    ]
}

/// Largest `downtime-limit` in milliseconds (QEMU's MAX_MIGRATE_DOWNTIME).
pub const MAX_DOWNTIME_LIMIT: u64 = 2_000_000;

/// The parameters that the engine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters {
    /// Bytes a second; 0 is no limit.
    pub max_bandwidth: u64,
    /// Milliseconds.
    pub downtime_limit: u64,
}

impl Default for Parameters {
    /// QEMU's: 128 MiB/s, 300 ms.
    fn default() -> Self {
        Self { max_bandwidth: 128 << 20, downtime_limit: 300 }
    }
}

impl Parameters {
    /// Applies `migrate-set-parameters`' arguments, all of them or, with an error, none.
    pub fn apply(&mut self, arguments: &Value) -> Result<(), Error> {
        let mut new = *self;
        let fixed = fixed();
        for (name, value) in arguments.as_object().into_iter().flatten() {
            match name.as_str() {
                "max-bandwidth" => new.max_bandwidth = bounded(name, value, i64::MAX as u64)?,
                "downtime-limit" => {
                    new.downtime_limit = bounded(name, value, MAX_DOWNTIME_LIMIT)?;
                }
                _ => match fixed.iter().find(|(n, _)| n == name) {
                    Some((_, default)) if default == value => {}
                    Some((_, default)) => {
                        return Err(Error::generic(format!(
                            "Parameter '{name}' cannot be changed: only {default} is supported"
                        )));
                    }
                    None => {
                        return Err(Error::generic(format!("Parameter '{name}' is unexpected")));
                    }
                },
            }
        }
        *self = new;
        Ok(())
    }

    /// `query-migrate-parameters`' reply.
    pub fn to_json(&self) -> Value {
        let mut object: Map<String, Value> =
            fixed().into_iter().map(|(name, value)| (name.to_string(), value)).collect();
        object.insert("max-bandwidth".into(), json!(self.max_bandwidth));
        object.insert("downtime-limit".into(), json!(self.downtime_limit));
        Value::Object(object)
    }
}

fn bounded(name: &str, value: &Value, max: u64) -> Result<u64, Error> {
    value.as_u64().filter(|v| *v <= max).ok_or_else(|| {
        Error::generic(format!("Parameter '{name}' expects an integer in the range of 0 to {max}"))
    })
}

/// The capabilities that the engine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// MIGRATION and MIGRATION_PASS events are sent.
    pub events: bool,
    /// Always on in effect: the protocol has a way back.
    pub return_path: bool,
}

impl Default for Capabilities {
    /// QEMU's: both off.
    fn default() -> Self {
        Self { events: false, return_path: false }
    }
}

impl Capabilities {
    /// Applies `migrate-set-capabilities`' arguments, all of them or, with an error, none.
    pub fn apply(&mut self, arguments: &Value) -> Result<(), Error> {
        let mut new = *self;
        let list = arguments.get("capabilities").and_then(Value::as_array);
        for item in list.into_iter().flatten() {
            let name = item.get("capability").and_then(Value::as_str).unwrap_or_default();
            let state = item.get("state").and_then(Value::as_bool).unwrap_or_default();
            match name {
                "events" => new.events = state,
                "return-path" => new.return_path = state,
                _ => {
                    return Err(Error::generic(format!(
                        "Parameter 'capability' does not accept value '{name}'"
                    )));
                }
            }
        }
        *self = new;
        Ok(())
    }

    /// `query-migrate-capabilities`' reply.
    pub fn to_json(&self) -> Value {
        json!([
            { "capability": "events", "state": self.events },
            { "capability": "return-path", "state": self.return_path },
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_list_changes_nothing() {
        let mut p = Parameters::default();
        let e = p.apply(&json!({"downtime-limit": 5, "multifd-channels": 4})).unwrap_err();
        assert!(e.desc.contains("multifd-channels"));
        assert_eq!(p, Parameters::default());
        p.apply(&json!({"downtime-limit": 5, "multifd-channels": 2, "tls-creds": ""})).unwrap();
        assert_eq!(p.downtime_limit, 5);
        p.apply(&json!({"max-bandwidth": 9_223_372_036_853_727_232u64})).unwrap();
        assert!(p.apply(&json!({"downtime-limit": -1})).is_err());
    }

    #[test]
    fn every_argument_is_reported_and_unknown_capabilities_are_refused() {
        let json = Parameters::default().to_json();
        assert_eq!(json.as_object().unwrap().len(), ARGUMENTS.len());
        assert!(ARGUMENTS.iter().all(|a| json.get(a.name).is_some()));
        let mut c = Capabilities::default();
        let set = |n: &str| json!({"capabilities": [{"capability": n, "state": true}]});
        c.apply(&set("events")).unwrap();
        assert!(c.events);
        assert!(c.apply(&set("xbzrle")).unwrap_err().desc.contains("'xbzrle'"));
        assert!(CAPABILITY_NAMES.iter().all(|n| c.to_json().to_string().contains(n)));
    }
}
