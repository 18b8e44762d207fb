//! The table of QMP commands: names, arguments, results. Argument checks, `query-commands`,
//! `query-qmp-schema` and completion are all made from it, so they cannot disagree.

use serde_json::{Map, Value, json};

use crate::command::Error;

/// A JSON type as QAPI knows them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Type {
    Str,
    /// A whole number.
    Int,
    /// Any number.
    Number,
    Bool,
    /// Whatever JSON there is.
    Any,
    /// A name and its values.
    Enum(&'static [&'static str]),
    Array(&'static Type),
    Object(&'static [Arg]),
}

/// A member of an object.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arg {
    pub name: &'static str,
    pub ty: Type,
    pub optional: bool,
}

/// A command.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CommandSpec {
    pub name: &'static str,
    pub args: &'static [Arg],
    pub ret: Type,
    /// Answered by the monitor itself; does not reach [`crate::Commands`].
    pub own: bool,
}

const fn req(name: &'static str, ty: Type) -> Arg {
    Arg { name, ty, optional: false }
}
const fn opt(name: &'static str, ty: Type) -> Arg {
    Arg { name, ty, optional: true }
}
const fn own(name: &'static str, args: &'static [Arg], ret: Type) -> CommandSpec {
    CommandSpec { name, args, ret, own: true }
}
const fn vm(name: &'static str, args: &'static [Arg], ret: Type) -> CommandSpec {
    CommandSpec { name, args, ret, own: false }
}

const NOTHING: Type = Type::Object(&[]);
const ANYS: Type = Type::Array(&Type::Any);
const VERSION_TRIPLE: Type =
    Type::Object(&[req("major", Type::Int), req("minor", Type::Int), req("micro", Type::Int)]);
const CAPABILITY: Type = Type::Object(&[
    req("capability", Type::Enum(crate::params::CAPABILITY_NAMES)),
    req("state", Type::Bool),
]);
/// The states of a VM (QEMU's RunState).
const RUN_STATES: &[&str] = &[
    "debug",
    "inmigrate",
    "internal-error",
    "io-error",
    "paused",
    "postmigrate",
    "prelaunch",
    "finish-migrate",
    "restore-vm",
    "running",
    "save-vm",
    "shutdown",
    "suspended",
    "watchdog",
    "guest-panicked",
    "colo",
];

/// All commands, in the order of their names.
pub const COMMANDS: &[CommandSpec] = &[
    own("closefd", &[req("fdname", Type::Str)], NOTHING),
    vm("cont", &[], NOTHING),
    own("getfd", &[req("fdname", Type::Str)], NOTHING),
    own(
        "human-monitor-command",
        &[req("command-line", Type::Str), opt("cpu-index", Type::Int)],
        Type::Str,
    ),
    vm(
        "migrate",
        &[req("uri", Type::Str), opt("detach", Type::Bool), opt("resume", Type::Bool)],
        NOTHING,
    ),
    vm("migrate-incoming", &[req("uri", Type::Str)], NOTHING),
    vm(
        "migrate-set-capabilities",
        &[req(
            "capabilities",
            Type::Array(&Type::Object(&[req("capability", Type::Str), req("state", Type::Bool)])),
        )],
        NOTHING,
    ),
    vm("migrate-set-parameters", crate::params::ARGUMENTS, NOTHING),
    vm("migrate_cancel", &[], NOTHING),
    own("qmp_capabilities", &[opt("enable", Type::Array(&Type::Str))], NOTHING),
    vm("query-block", &[], ANYS),
    vm(
        "query-chardev",
        &[],
        Type::Array(&Type::Object(&[
            req("label", Type::Str),
            req("filename", Type::Str),
            req("frontend-open", Type::Bool),
        ])),
    ),
    own("query-commands", &[], Type::Array(&Type::Object(&[req("name", Type::Str)]))),
    vm("query-cpus-fast", &[], ANYS),
    vm("query-kvm", &[], Type::Object(&[req("enabled", Type::Bool), req("present", Type::Bool)])),
    vm("query-migrate", &[], Type::Any),
    vm("query-migrate-capabilities", &[], Type::Array(&CAPABILITY)),
    vm("query-migrate-parameters", &[], Type::Object(crate::params::ARGUMENTS)),
    vm("query-name", &[], Type::Object(&[opt("name", Type::Str)])),
    vm("query-pci", &[], ANYS),
    own("query-qmp-schema", &[], ANYS),
    vm(
        "query-status",
        &[],
        Type::Object(&[
            req("running", Type::Bool),
            req("singlestep", Type::Bool),
            req("status", Type::Enum(RUN_STATES)),
        ]),
    ),
    own("query-target", &[], Type::Object(&[req("arch", Type::Enum(&["x86_64"]))])),
    vm("query-uuid", &[], Type::Object(&[req("UUID", Type::Str)])),
    own(
        "query-version",
        &[],
        Type::Object(&[req("qemu", VERSION_TRIPLE), req("package", Type::Str)]),
    ),
    vm("quit", &[], NOTHING),
    vm("set_link", &[req("name", Type::Str), req("up", Type::Bool)], NOTHING),
    vm("stop", &[], NOTHING),
    vm("system_powerdown", &[], NOTHING),
    vm("system_reset", &[], NOTHING),
    vm("x-query-network", &[], ANYS),
];

const STATUS: &[Arg] = &[req("status", Type::Str)];
const PASS: &[Arg] = &[req("pass", Type::Int)];
const CAUSE: &[Arg] = &[req("guest", Type::Bool), req("reason", Type::Str)];
const OFFSET: &[Arg] = &[req("offset", Type::Int), req("qom-path", Type::Str)];

/// Events that a client may get and their data, in the order of their names.
pub const EVENTS: &[(&str, &[Arg])] = &[
    ("MIGRATION", STATUS),
    ("MIGRATION_PASS", PASS),
    ("POWERDOWN", &[]),
    ("RESET", CAUSE),
    ("RESUME", &[]),
    ("RTC_CHANGE", OFFSET),
    ("SHUTDOWN", CAUSE),
    ("STOP", &[]),
];

/// The command of that name.
pub fn command(name: &str) -> Option<&'static CommandSpec> {
    COMMANDS.iter().find(|c| c.name == name)
}

impl CommandSpec {
    /// Checks an object of arguments: names, presence and types.
    pub fn check(&self, arguments: &Value) -> Result<(), Error> {
        match arguments {
            Value::Object(object) => check_object(self.args, object, ""),
            _ => Err(Error::generic("QMP input member 'arguments' must be an object")),
        }
    }
}

fn check_object(args: &[Arg], object: &Map<String, Value>, path: &str) -> Result<(), Error> {
    for arg in args {
        let name = format!("{path}{}", arg.name);
        match object.get(arg.name) {
            Some(value) => check_type(&arg.ty, value, &name)?,
            None if arg.optional => {}
            None => return Err(Error::generic(format!("Parameter '{name}' is missing"))),
        }
    }
    match object.keys().find(|key| !args.iter().any(|a| a.name == key.as_str())) {
        Some(key) => Err(Error::generic(format!("Parameter '{path}{key}' is unexpected"))),
        None => Ok(()),
    }
}

fn check_type(ty: &Type, value: &Value, name: &str) -> Result<(), Error> {
    let wrong = |expected: &str| {
        Err(Error::generic(format!("Invalid parameter type for '{name}', expected: {expected}")))
    };
    match (ty, value) {
        (Type::Any, _)
        | (Type::Str, Value::String(_))
        | (Type::Number, Value::Number(_))
        | (Type::Bool, Value::Bool(_)) => Ok(()),
        (Type::Int, Value::Number(n)) if n.is_i64() || n.is_u64() => Ok(()),
        (Type::Enum(values), Value::String(s)) => {
            if values.contains(&s.as_str()) {
                return Ok(());
            }
            Err(Error::generic(format!("Parameter '{name}' does not accept value '{s}'")))
        }
        (Type::Array(element), Value::Array(items)) => items
            .iter()
            .enumerate()
            .try_for_each(|(i, item)| check_type(element, item, &format!("{name}[{i}]"))),
        (Type::Object(args), Value::Object(o)) => check_object(args, o, &format!("{name}.")),
        (Type::Str | Type::Enum(_), _) => wrong("string"),
        (Type::Int, _) => wrong("integer"),
        (Type::Number, _) => wrong("number"),
        (Type::Bool, _) => wrong("boolean"),
        (Type::Array(_), _) => wrong("array"),
        (Type::Object(_), _) => wrong("object"),
    }
}

/// `query-commands`' reply.
pub fn query_commands() -> Value {
    COMMANDS.iter().map(|c| json!({ "name": c.name })).collect()
}

/// `query-qmp-schema`'s reply: SchemaInfo entries (QEMU's qapi/introspect.json). Types other than
/// the built-in ones have numbers for names, as QEMU's have.
pub fn query_qmp_schema() -> Value {
    let mut types = Types::default();
    let mut entries = Vec::new();
    for command in COMMANDS {
        let arg_type = types.name(&Type::Object(command.args));
        let ret_type = types.name(&command.ret);
        entries.push(json!({
            "name": command.name, "ret-type": ret_type, "meta-type": "command",
            "arg-type": arg_type,
        }));
    }
    for (name, data) in EVENTS {
        let arg_type = types.name(&Type::Object(data));
        entries.push(json!({ "name": name, "meta-type": "event", "arg-type": arg_type }));
    }
    entries.extend(types.entries);
    Value::Array(entries)
}

#[derive(Default)]
struct Types {
    known: Vec<(Type, String)>,
    entries: Vec<Value>,
}

impl Types {
    fn name(&mut self, ty: &Type) -> String {
        if let Some((_, name)) = self.known.iter().find(|(t, _)| t == ty) {
            return name.clone();
        }
        let numbered = self.known.len().to_string();
        match ty {
            Type::Str => self.builtin(ty, "str", "string"),
            Type::Int => self.builtin(ty, "int", "int"),
            Type::Number => self.builtin(ty, "number", "number"),
            Type::Bool => self.builtin(ty, "bool", "boolean"),
            Type::Any => self.builtin(ty, "any", "value"),
            Type::Enum(values) => {
                self.known.push((*ty, numbered.clone()));
                let members: Vec<Value> = values.iter().map(|v| json!({ "name": v })).collect();
                self.entries.push(json!({
                    "name": numbered, "meta-type": "enum", "values": values, "members": members,
                }));
                numbered
            }
            Type::Array(element) => {
                let element = self.name(element);
                let name = format!("[{element}]");
                self.known.push((*ty, name.clone()));
                self.entries
                    .push(json!({ "name": name, "meta-type": "array", "element-type": element }));
                name
            }
            Type::Object(args) => {
                self.known.push((*ty, numbered.clone()));
                let members: Vec<Value> = args
                    .iter()
                    .map(|arg| {
                        let mut member = json!({ "name": arg.name, "type": self.name(&arg.ty) });
                        if arg.optional {
                            member["default"] = Value::Null;
                        }
                        member
                    })
                    .collect();
                self.entries
                    .push(json!({ "name": numbered, "meta-type": "object", "members": members }));
                numbered
            }
        }
    }

    fn builtin(&mut self, ty: &Type, name: &str, json_type: &str) -> String {
        self.known.push((*ty, name.to_string()));
        self.entries.push(json!({ "name": name, "meta-type": "builtin", "json-type": json_type }));
        name.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_are_in_order_and_every_type_named_is_defined() {
        assert!(COMMANDS.windows(2).all(|w| w[0].name < w[1].name));
        assert!(EVENTS.windows(2).all(|w| w[0].0 < w[1].0));
        let schema = query_qmp_schema();
        let entries = schema.as_array().unwrap();
        let mut names: Vec<&str> = entries.iter().map(|e| e["name"].as_str().unwrap()).collect();
        let uses = |key: &str| entries.iter().filter_map(|e| e[key].as_str()).collect::<Vec<_>>();
        for key in ["arg-type", "ret-type", "element-type"] {
            for used in uses(key) {
                assert!(names.contains(&used), "{used}");
            }
        }
        for entry in entries {
            for member in entry["members"].as_array().into_iter().flatten() {
                if let Some(ty) = member["type"].as_str() {
                    assert!(names.contains(&ty), "{ty}");
                }
            }
        }
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all, "names are unique");
    }
}
