//! The text of docs/qemu-compat.md, made from the tables that the code works by; a test compares
//! the file with it.

use std::fmt::Write;

use crate::cmdline::device::keys::{DEVICES, HARMLESS_DRIVERS};
use crate::cmdline::keys::{Family, Fate, Key, Schema};
use crate::cmdline::options::OPTIONS;
use crate::cmdline::{block, chardev, net, object};
use crate::hmp::commands::HMP_COMMANDS;
use crate::hmp::info::INFOS;
use crate::params::{ARGUMENTS, CAPABILITY_NAMES};
use crate::schema::{COMMANDS, EVENTS, Type};

/// The whole page.
pub fn page() -> String {
    let mut out = String::from(
        "# What of QEMU's languages works\n\n\
         This page is made from the tables that the code works by; a test of the `qapi` crate \
         compares it with them, and writes it anew with `TERN_BLESS=1`.\n\n\
         ## Command line\n\n\
         An option that is not here is refused by name, with the nearest known one; so is a key \
         or a device that is not known.\n\n| option | argument | |\n| --- | --- | --- |\n",
    );
    for option in OPTIONS {
        let argument = option.argument.map(|a| format!("`{}`", a.replace('|', "\\|")));
        let status = option.status().replace('|', "\\|");
        let _ =
            writeln!(out, "| `-{}` | {} | {status} |", option.name, argument.unwrap_or_default());
    }
    devices(&mut out);
    out += "\n## QMP\n\nEvery line ends in CR LF. Arguments in brackets may be left out.\n\n\
            | command | arguments |\n| --- | --- |\n";
    for command in COMMANDS {
        let args: Vec<String> = command
            .args
            .iter()
            .map(|a| {
                let text = format!("{}: {}", a.name, type_name(&a.ty));
                if a.optional { format!("[{text}]") } else { text }
            })
            .collect();
        let _ = writeln!(out, "| `{}` | {} |", command.name, args.join(", "));
    }
    let events: Vec<String> = EVENTS.iter().map(|(name, _)| format!("`{name}`")).collect();
    let _ = writeln!(out, "\nEvents: {}.", events.join(", "));
    let names =
        |list: &[&str]| list.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    let _ = writeln!(
        out,
        "\nMigration capabilities: {}. Others are refused by name.\n\n\
         Migration parameters that can be set: `max-bandwidth`, `downtime-limit`. The others of {} \
         are reported with their defaults, and setting them to anything else is refused by name.",
        names(CAPABILITY_NAMES),
        names(&ARGUMENTS.iter().map(|a| a.name).collect::<Vec<_>>()),
    );
    out += "\n## HMP\n\n| command | arguments | |\n| --- | --- | --- |\n";
    for command in HMP_COMMANDS {
        let alias = command.alias.map(|a| format!(", `{a}`")).unwrap_or_default();
        let args = command.args.replace('|', "\\|");
        let _ = writeln!(out, "| `{}`{alias} | {args} | {} |", command.name, command.help);
    }
    let _ = writeln!(
        out,
        "\n`info` knows {}.",
        names(&INFOS.iter().map(|i| i.name).collect::<Vec<_>>())
    );
    out
}

fn devices(out: &mut String) {
    let harmless: Vec<String> = HARMLESS_DRIVERS.iter().map(|d| format!("`{d}`")).collect();
    family(out, "-device", &DEVICES);
    let _ = writeln!(out, "\nTaken with a warning and left out: {}.", harmless.join(", "));
    family(out, "-blockdev", &block::NODES);
    family(out, "-netdev", &net::BACKENDS);
    *out += "\nNo script is run unless `script=` names one.\n";
    family(out, "-chardev", &chardev::BACKENDS);
    family(out, "-object", &object::OBJECTS);
}

/// The members of an option, and their keys by what becomes of each.
fn family(out: &mut String, option: &str, family: &Family) {
    let _ = write!(
        out,
        "\n### `{option}`\n\n`{option} help` lists these, `{option} NAME,help` what each key means.\n\n\
         | | other names | keys | taken, change nothing |\n| --- | --- | --- | --- |\n"
    );
    for member in family.members {
        let aliases: Vec<String> = member.aliases.iter().map(|a| format!("`{a}`")).collect();
        let keys = |wanted: fn(&Key) -> bool| key_names(member.schema, wanted);
        let _ = writeln!(
            out,
            "| `{}` | {} | {} | {} |",
            member.name(),
            aliases.join(", "),
            keys(|k| matches!(k.fate, Fate::Taken | Fate::Only(..))),
            keys(|k| matches!(k.fate, Fate::Quiet | Fate::Ignored(_))),
        );
    }
}

fn key_names(schema: &Schema, wanted: fn(&Key) -> bool) -> String {
    let mut names: Vec<String> = schema
        .keys()
        .filter(|k| wanted(k))
        .map(|k| match k.fate {
            Fate::Only(values, _) => format!("`{}={}`", k.name, values.join("\\|")),
            _ => format!("`{}`", k.name),
        })
        .collect();
    names.sort();
    names.join(", ")
}

fn type_name(ty: &Type) -> &'static str {
    match ty {
        Type::Str => "string",
        Type::Int => "integer",
        Type::Number => "number",
        Type::Bool => "boolean",
        Type::Any => "any",
        Type::Enum(_) => "name",
        Type::Array(_) => "list",
        Type::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_page_says_what_the_code_does() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/qemu-compat.md");
        if std::env::var_os("TERN_BLESS").is_some() {
            std::fs::write(path, super::page()).unwrap();
        }
        let file = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            file == super::page(),
            "docs/qemu-compat.md is old: run the test with TERN_BLESS=1"
        );
    }
}
