//! `tern info`: what a VM consists of and how it is.

use std::fmt::Write;

use serde_json::{Map, Value, json};
use spec::{BlockDriver, DeviceKind, Machine, NetKind};

use crate::client::{Client, PATIENCE};
use crate::runtime_dir::{self, Entry};
use crate::{Outcome, ps, units};

#[derive(clap::Args)]
#[command(after_help = "Example:\n  tern info vm1 --json")]
pub struct Args {
    /// Name of the VM
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Outcome {
    let vm = runtime_dir::find(&args.name)?;
    let facts = gather(&vm);
    if args.json {
        crate::say::say!("{}", serde_json::to_string_pretty(&facts)?);
    } else {
        crate::say::text(format_args!("{}", text(&facts)));
    }
    Ok(0)
}

/// All that is known; what the VM does not say is missing.
fn gather(vm: &Entry) -> Map<String, Value> {
    let mut facts = Map::new();
    let mut put = |key: &str, value: Value| {
        facts.insert(key.into(), value);
    };
    put("name", json!(vm.name));
    put("pid", json!(vm.pid));
    let mut client = Client::connect(vm, PATIENCE);
    let mut ask =
        |command| client.as_mut().ok().and_then(|client| client.execute(command, json!({})).ok());
    let state = ask("query-status").and_then(|v| v.get("status").cloned());
    put("state", state.unwrap_or_else(|| json!("unreachable")));
    put("uptime-s", json!(ps::uptime(vm.pid).map(|time| time.as_secs())));
    if let Some(machine) = vm.spec() {
        put("uuid", json!(machine.uuid));
        put("machine", json!(machine.machine_type));
        put("cpu", json!(machine.cpu.model));
        put("vcpus", json!(machine.smp.cpus));
        put("memory-bytes", json!(machine.memory));
        put("kernel", json!(machine.boot.kernel));
        put("disks", json!(disks(&machine)));
        put("nics", json!(nics(&machine)));
    }
    put("chardevs", ask("query-chardev").unwrap_or_default());
    let migration = ask("query-migrate").filter(|m| m.get("status").is_some());
    put("migration", migration.unwrap_or_default());
    put("qmp", json!(vm.qmp_socket()));
    let console = vm.console_socket();
    put("console", if console.exists() { json!(console) } else { Value::Null });
    facts
}

fn disks(machine: &Machine) -> Vec<Value> {
    let mut disks = Vec::new();
    for device in &machine.devices {
        if let DeviceKind::VirtioBlk(disk) = &device.kind {
            disks.push(json!({
                "node": disk.drive,
                "file": file_of(machine, &disk.drive),
                "read-only": disk.read_only,
            }));
        }
    }
    disks
}

/// The file under a block node.
fn file_of<'a>(machine: &'a Machine, node: &'a str) -> Option<&'a std::path::Path> {
    let mut name = node;
    // A format over a file: no more levels than there are nodes.
    for _ in 0..=machine.blocks.len() {
        match &machine.blocks.iter().find(|block| block.node_name == name)?.driver {
            BlockDriver::File { filename } => return Some(filename),
            BlockDriver::Raw { file } => name = file,
        }
    }
    None
}

fn nics(machine: &Machine) -> Vec<Value> {
    let mut nics = Vec::new();
    for device in &machine.devices {
        if let DeviceKind::VirtioNet(nic) = &device.kind {
            let backend = machine.netdevs.iter().find(|backend| backend.id == nic.netdev);
            let tap = backend.map(|backend| match &backend.kind {
                NetKind::Tap { ifname, .. } => ifname.clone().unwrap_or_else(|| "(fd)".into()),
            });
            nics.push(json!({ "netdev": nic.netdev, "tap": tap, "mac": mac(nic.mac) }));
        }
    }
    nics
}

fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

fn text(facts: &Map<String, Value>) -> String {
    let mut out = String::new();
    for (key, value) in facts {
        let shown = match (key.as_str(), value) {
            (_, Value::Null) => continue,
            ("memory-bytes", v) => units::size(v.as_u64().unwrap_or(0)),
            ("uptime-s", v) => {
                units::duration(std::time::Duration::from_secs(v.as_u64().unwrap_or(0)))
            }
            ("migration", v) => plain(v.get("status").unwrap_or(&Value::Null)),
            ("disks" | "nics" | "chardevs", Value::Array(items)) => {
                for item in items {
                    let key = key.trim_end_matches('s');
                    let _ = writeln!(out, "{:<10} {}", format!("{key}:"), fields(item));
                }
                continue;
            }
            (_, v) => plain(v),
        };
        let key = key.trim_end_matches("-bytes").trim_end_matches("-s");
        let _ = writeln!(out, "{:<10} {shown}", format!("{key}:"));
    }
    out
}

fn fields(item: &Value) -> String {
    let Some(map) = item.as_object() else { return plain(item) };
    let shown: Vec<String> = map
        .iter()
        .filter(|(_, v)| !v.is_null())
        .map(|(k, v)| format!("{k} {}", plain(v)))
        .collect();
    shown.join(", ")
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(flag) => if *flag { "yes" } else { "no" }.into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: run::Args,
    }

    #[test]
    fn disks_and_nics_of_a_machine() {
        let words = ["run", "--kernel", "/k", "--disk", "/d.img,ro", "--net", "tap=t0"];
        let machine = run::machine(&Cli::parse_from(words).args, "a").unwrap();
        assert_eq!(disks(&machine)[0]["file"], json!("/d.img"));
        assert_eq!(disks(&machine)[0]["read-only"], json!(true));
        assert_eq!(nics(&machine)[0]["tap"], json!("t0"));
    }

    #[test]
    fn the_text_has_a_line_a_fact() {
        let facts = json!({
            "name": "a", "memory-bytes": 1 << 30, "kernel": null,
            "disks": [{"node": "disk0", "file": "/x", "read-only": false}],
        });
        assert_eq!(
            text(facts.as_object().unwrap()),
            "name:      a\nmemory:    1 GiB\ndisk:      node disk0, file /x, read-only no\n"
        );
    }
}
