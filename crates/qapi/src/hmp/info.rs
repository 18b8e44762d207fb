//! `info` and its texts, in QEMU's form.

use std::fmt::Write;

use serde_json::{Value, json};

use super::commands::Context;
use crate::command::Error;

/// One `info` subcommand.
pub struct Info {
    pub name: &'static str,
    pub help: &'static str,
    query: &'static str,
    format: fn(&Value) -> String,
}

const fn info(
    name: &'static str,
    query: &'static str,
    help: &'static str,
    format: fn(&Value) -> String,
) -> Info {
    Info { name, help, query, format }
}

/// All subcommands, in the order of their names.
pub const INFOS: &[Info] = &[
    info("block", "query-block", "show info of one block device or all block devices", block),
    info("chardev", "query-chardev", "show the character devices", chardev),
    info("cpus", "query-cpus-fast", "show infos for each CPU", cpus),
    info("kvm", "query-kvm", "show KVM information", kvm),
    info("migrate", "query-migrate", "show migration status", migrate),
    info(
        "migrate_capabilities",
        "query-migrate-capabilities",
        "show current migration capabilities",
        capabilities,
    ),
    info(
        "migrate_parameters",
        "query-migrate-parameters",
        "show current migration parameters",
        parameters,
    ),
    info("name", "query-name", "show the current VM name", |v| {
        v["name"].as_str().map(|name| format!("{name}\n")).unwrap_or_default()
    }),
    info("network", "x-query-network", "show the network state", network),
    info("pci", "query-pci", "show PCI info", pci),
    info("status", "query-status", "show the current VM status (running|paused)", status),
    info("uuid", "query-uuid", "show the current VM UUID", |v| format!("{}\n", text(&v["UUID"]))),
    info("version", "query-version", "show the version of QEMU", version),
];

pub(super) fn run(c: &Context, words: &[String]) -> Result<String, Error> {
    let Some(name) = words.first() else { return Ok(help()) };
    let Some(info) = INFOS.iter().find(|i| i.name == name) else {
        return Ok(format!("unknown command: 'info {name}'\n"));
    };
    match &words[1..] {
        [] => Ok((info.format)(&c.qmp(info.query, json!({}))?)),
        [device] if info.name == "block" => one_block(&c.qmp(info.query, json!({}))?, device),
        _ => Ok(format!(
            "info {name}: extraneous characters at the end of line\n\
             Try \"help info\" for more information\n"
        )),
    }
}

/// `info block DEVICE`: by the names under which the list shows it.
fn one_block(all: &Value, device: &str) -> Result<String, Error> {
    let names =
        |disk: &Value| [&disk["device"], &disk["inserted"]["node-name"], &disk["qdev"]].map(text);
    let found = list(all).iter().find(|disk| names(disk).iter().any(|name| name == device));
    match found {
        Some(disk) => Ok(block(&json!([disk]))),
        None => Ok(format!("Device '{device}' not found\n")),
    }
}

pub(super) fn help() -> String {
    INFOS.iter().map(|i| format!("info {} -- {}\n", i.name, i.help)).collect()
}

/// A string as it is, anything else as JSON; nothing for null.
fn text(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn on(value: &Value) -> bool {
    value.as_bool().unwrap_or(false)
}

fn status(v: &Value) -> String {
    match (on(&v["running"]), text(&v["status"])) {
        (true, _) => "VM status: running\n".into(),
        (false, status) if status == "paused" => "VM status: paused\n".into(),
        (false, status) => format!("VM status: paused ({status})\n"),
    }
}

fn version(v: &Value) -> String {
    let q = &v["qemu"];
    format!("{}.{}.{} ({})\n", q["major"], q["minor"], q["micro"], text(&v["package"]))
}

fn kvm(v: &Value) -> String {
    let state = match (on(&v["present"]), on(&v["enabled"])) {
        (true, true) => "enabled",
        (true, false) => "disabled",
        (false, _) => "not compiled",
    };
    format!("kvm support: {state}\n")
}

fn chardev(v: &Value) -> String {
    let line = |c: &Value| format!("{}: filename={}\n", text(&c["label"]), text(&c["filename"]));
    list(v).iter().map(line).collect()
}

fn cpus(v: &Value) -> String {
    let line = |(i, cpu): (usize, &Value)| {
        let mark = if i == 0 { '*' } else { ' ' };
        format!("{mark} CPU #{}: thread_id={}\n", cpu["cpu-index"], cpu["thread-id"])
    };
    list(v).iter().enumerate().map(line).collect()
}

fn capabilities(v: &Value) -> String {
    let line = |c: &Value| {
        format!("{}: {}\n", text(&c["capability"]), if on(&c["state"]) { "on" } else { "off" })
    };
    list(v).iter().map(line).collect()
}

fn parameters(v: &Value) -> String {
    let mut out = String::new();
    for (name, value) in v.as_object().into_iter().flatten() {
        let unit = match name.as_str() {
            "announce-initial" | "announce-max" | "announce-step" | "downtime-limit"
            | "x-checkpoint-delay" => " ms",
            "max-bandwidth" | "max-postcopy-bandwidth" => " bytes/second",
            "xbzrle-cache-size" => " bytes",
            _ => "",
        };
        let value = match value {
            Value::String(s) if name.starts_with("tls-") => format!("'{s}'"),
            Value::String(s) => s.clone(),
            Value::Bool(b) => if *b { "on" } else { "off" }.into(),
            other => other.to_string(),
        };
        let _ = writeln!(out, "{name}: {value}{unit}");
    }
    out
}

/// `query-migrate`'s members that have a line of their own in QEMU's text.
const MIGRATE_TOP: [(&str, &str); 4] = [
    ("total-time", "total time"),
    ("expected-downtime", "expected downtime"),
    ("downtime", "downtime"),
    ("setup-time", "setup"),
];

/// Members of `ram`: name, label, unit, divisor.
const MIGRATE_RAM: [(&str, &str, &str, u64); 17] = [
    ("transferred", "transferred ram", " kbytes", 1024),
    ("mbps", "throughput", " mbps", 0),
    ("remaining", "remaining ram", " kbytes", 1024),
    ("total", "total ram", " kbytes", 1024),
    ("duplicate", "duplicate", " pages", 1),
    ("skipped", "skipped", " pages", 1),
    ("normal", "normal", " pages", 1),
    ("normal-bytes", "normal bytes", " kbytes", 1024),
    ("dirty-sync-count", "dirty sync count", "", 1),
    ("page-size", "page size", " kbytes", 1024),
    ("multifd-bytes", "multifd bytes", " kbytes", 1024),
    ("pages-per-second", "pages-per-second", "", 1),
    ("dirty-pages-rate", "dirty pages rate", " pages", 1),
    ("postcopy-requests", "postcopy request count", "", 1),
    ("precopy-bytes", "precopy ram", " kbytes", 1024),
    ("downtime-bytes", "downtime ram", " kbytes", 1024),
    ("postcopy-bytes", "postcopy ram", " kbytes", 1024),
];

/// Members of `ram` that QEMU leaves out while they are zero.
const SHOWN_UNLESS_ZERO: [&str; 5] =
    ["dirty-pages-rate", "postcopy-requests", "precopy-bytes", "downtime-bytes", "postcopy-bytes"];

fn migrate(v: &Value) -> String {
    let Some(object) = v.as_object() else { return String::new() };
    let mut out = String::new();
    if let Some(status) = object.get("status") {
        let why = object.get("error-desc").map(|e| format!(" ({})", text(e))).unwrap_or_default();
        let _ = writeln!(out, "Migration status: {}{why}", text(status));
    }
    for (name, label) in MIGRATE_TOP {
        if let Some(value) = object.get(name) {
            let _ = writeln!(out, "{label}: {value} ms");
        }
    }
    for (name, label, unit, divisor) in MIGRATE_RAM {
        let value = &v["ram"][name];
        if !value.is_number() || (SHOWN_UNLESS_ZERO.contains(&name) && number(value) == 0) {
            continue;
        }
        let shown = match divisor {
            0 => format!("{:.2}", value.as_f64().unwrap_or(0.0)),
            divisor => (number(value) / divisor).to_string(),
        };
        let _ = writeln!(out, "{label}: {shown}{unit}");
    }
    // What QEMU does not have: downtime by phase, blackout.
    for (name, value) in object {
        let known = ["status", "error-desc", "ram"].contains(&name.as_str())
            || MIGRATE_TOP.iter().any(|(n, _)| n == name);
        if !known {
            extra(name, value, &mut out, 0);
        }
    }
    out
}

fn extra(name: &str, value: &Value, out: &mut String, depth: usize) {
    let indent = "  ".repeat(depth);
    let label = name.replace('-', " ");
    match value {
        Value::Object(members) if depth < 4 => {
            let _ = writeln!(out, "{indent}{label}:");
            members.iter().for_each(|(name, value)| extra(name, value, out, depth + 1));
        }
        // A line each, as of a table: a round and what it cost.
        Value::Array(items) if items.first().is_some_and(Value::is_object) => {
            let _ = writeln!(out, "{indent}{label}:");
            for members in items.iter().filter_map(Value::as_object) {
                let cells = members
                    .iter()
                    .map(|(name, value)| format!("{} {}", name.replace('-', " "), text(value)));
                let _ = writeln!(out, "{indent}  {}", cells.collect::<Vec<_>>().join(", "));
            }
        }
        Value::Array(items) if depth < 4 => {
            let items: Vec<String> = items.iter().map(text).collect();
            let _ = writeln!(out, "{indent}{label}: {}", items.join(", "));
        }
        _ => {
            let _ = writeln!(out, "{indent}{label}: {}", text(value));
        }
    }
}

fn block(v: &Value) -> String {
    let mut out = String::new();
    for (i, disk) in list(v).iter().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        let inserted = &disk["inserted"];
        let node = text(&inserted["node-name"]);
        let name = match text(&disk["device"]) {
            device if device.is_empty() && node.is_empty() => text(&disk["qdev"]),
            device if device.is_empty() => node,
            device if node.is_empty() => device,
            device => format!("{device} ({node})"),
        };
        if inserted.is_object() {
            let read_only = if on(&inserted["ro"]) { ", read-only" } else { "" };
            let (file, driver) = (text(&inserted["file"]), text(&inserted["drv"]));
            let _ = writeln!(out, "{name}: {file} ({driver}{read_only})");
        } else {
            let _ = writeln!(out, "{name}: [not inserted]");
        }
        if let Some(qdev) = disk["qdev"].as_str() {
            let _ = writeln!(out, "    Attached to:      {qdev}");
        }
        if let Some(cache) = inserted["cache"].as_object() {
            let is = |key: &str| cache.get(key).is_some_and(on);
            let mode = if is("writeback") { "writeback" } else { "writethrough" };
            let direct = if is("direct") { ", direct" } else { "" };
            let flush = if is("no-flush") { ", ignore flushes" } else { "" };
            let _ = writeln!(out, "    Cache mode:       {mode}{direct}{flush}");
        }
    }
    out
}

fn network(v: &Value) -> String {
    let line = |end: &Value| {
        let (name, kind, info) = (text(&end["name"]), text(&end["type"]), text(&end["info"]));
        let comma = if info.is_empty() { "" } else { "," };
        format!("{name}: index=0,type={kind}{comma}{info}\n")
    };
    let mut out = String::new();
    for end in list(v) {
        out += &line(end);
        if end["peer"].is_object() {
            out += &format!(" \\ {}", line(&end["peer"]));
        }
    }
    out
}

fn pci(v: &Value) -> String {
    let mut out = String::new();
    for bus in list(v) {
        pci_devices(&bus["devices"], &mut out, 0);
    }
    out
}

fn pci_devices(devices: &Value, out: &mut String, depth: usize) {
    for d in list(devices) {
        let place = (number(&d["bus"]), number(&d["slot"]), number(&d["function"]));
        let _ = writeln!(out, "  Bus {:2}, device {:3}, function {}:", place.0, place.1, place.2);
        let class = match d["class_info"]["desc"].as_str() {
            Some(desc) => desc.to_string(),
            None => format!("Class {:04}", number(&d["class_info"]["class"])),
        };
        let id = &d["id"];
        let _ = writeln!(
            out,
            "    {class}: PCI device {:04x}:{:04x}",
            number(&id["vendor"]),
            number(&id["device"])
        );
        if let (Some(vendor), Some(sub)) =
            (id["subsystem-vendor"].as_u64(), id["subsystem"].as_u64())
        {
            let _ = writeln!(out, "      PCI subsystem {vendor:04x}:{sub:04x}");
        }
        if let Some(irq) = d["irq"].as_u64() {
            let pin = (b'A' + (number(&d["irq_pin"]).clamp(1, 4) - 1) as u8) as char;
            let _ = writeln!(out, "      IRQ {irq}, pin {pin}");
        }
        let bridge = &d["pci_bridge"];
        if bridge.is_object() {
            pci_bridge(&bridge["bus"], out);
        }
        for region in list(&d["regions"]) {
            pci_region(region, out);
        }
        let _ = writeln!(out, "      id \"{}\"", text(&d["qdev_id"]));
        if depth < 8 {
            pci_devices(&bridge["devices"], out, depth + 1);
        }
    }
}

fn pci_bridge(bus: &Value, out: &mut String) {
    let _ = writeln!(out, "      BUS {}.", number(&bus["number"]));
    let _ = writeln!(out, "      secondary bus {}.", number(&bus["secondary"]));
    let _ = writeln!(out, "      subordinate bus {}.", number(&bus["subordinate"]));
    for (key, label, width) in [
        ("io_range", "IO range", 4),
        ("memory_range", "memory range", 8),
        ("prefetchable_range", "prefetchable memory range", 8),
    ] {
        let (base, limit) = (number(&bus[key]["base"]), number(&bus[key]["limit"]));
        let _ = writeln!(out, "      {label} [{base:#0w$x}, {limit:#0w$x}]", w = width + 2);
    }
}

fn pci_region(region: &Value, out: &mut String) {
    let (bar, at) = (number(&region["bar"]), number(&region["address"]));
    let end = at.wrapping_add(number(&region["size"])).wrapping_sub(1);
    if region["type"] == "io" {
        let _ = writeln!(out, "      BAR{bar}: I/O at {at:#06x} [{end:#06x}].");
        return;
    }
    let bits = if on(&region["mem_type_64"]) { 64 } else { 32 };
    let prefetch = if on(&region["prefetch"]) { " prefetchable" } else { "" };
    let _ =
        writeln!(out, "      BAR{bar}: {bits} bit{prefetch} memory at {at:#010x} [{end:#010x}].");
}
