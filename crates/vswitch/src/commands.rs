//! The commands of the control socket, and what they answer.

use std::path::PathBuf;
use std::sync::atomic::Ordering;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::capture::Capture;
use crate::config::{PortSpec, nearest};
use crate::counters::{Drop, Totals};
use crate::fdb::{Key, Learned};
use crate::port::{Kind, Link, Port};
use crate::switch::{Mirror, Switch};
use crate::table::PortId;
use crate::vlan::MAX_VLAN;
use crate::{Error, Result};

/// All commands.
const COMMANDS: &[&str] = &[
    "add-port",
    "del-port",
    "set-port",
    "show",
    "fdb",
    "fdb-flush",
    "fdb-add",
    "stats",
    "mirrors",
    "add-mirror",
    "del-mirror",
    "capture",
    "end-capture",
    "metrics",
    "quit",
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    command: String,
    #[serde(default)]
    arguments: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AddPort {
    /// `NAME,type=...`, or an object.
    port: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Name {
    name: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct MaybePort {
    port: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetPort {
    name: String,
    /// `key=value`, each.
    set: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FdbAdd {
    mac: String,
    #[serde(default)]
    vlan: u16,
    port: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StartCapture {
    port: String,
    file: PathBuf,
    #[serde(default = "whole")]
    snaplen: u32,
    #[serde(default)]
    rx: bool,
    #[serde(default)]
    tx: bool,
}

fn whole() -> u32 {
    crate::burst::MAX_FRAME
}

fn arguments<T: for<'a> Deserialize<'a>>(command: &str, v: Value) -> Result<T> {
    let v = if v.is_null() { json!({}) } else { v };
    serde_json::from_value(v).map_err(|e| Error::Config(format!("{command}: {e}")))
}

/// Runs one request; returns the answer, and whether the switch is to end.
pub fn run(switch: &mut Switch, line: &[u8]) -> (String, bool) {
    let request: Request = match serde_json::from_slice(line) {
        Ok(r) => r,
        Err(e) => return (json!({ "error": format!("not a request: {e}") }).to_string(), false),
    };
    let quit = request.command == "quit";
    let answer = match dispatch(switch, &request.command, request.arguments) {
        Ok(v) => json!({ "return": v }),
        Err(e) => json!({ "error": e.to_string() }),
    };
    (answer.to_string(), quit)
}

fn dispatch(s: &mut Switch, command: &str, a: Value) -> Result<Value> {
    match command {
        "add-port" => {
            let AddPort { port } = arguments(command, a)?;
            let spec = match port {
                Value::String(text) => PortSpec::parse(&text)?,
                other => arguments(command, other)?,
            };
            s.add_port(spec)?;
        }
        "del-port" => s.del_port(&arguments::<Name>(command, a)?.name)?,
        "set-port" => {
            let SetPort { name, set } = arguments(command, a)?;
            let pair = |t: &String| {
                let missing = || Error::Config(format!("'{t}': expected key=value"));
                t.split_once('=').map(|(k, v)| (k.into(), v.into())).ok_or_else(missing)
            };
            s.set_port(&name, &set.iter().map(pair).collect::<Result<Vec<_>>>()?)?;
        }
        "show" => return Ok(show(s)),
        "stats" => {
            let MaybePort { port } = arguments(command, a)?;
            return stats(s, port.as_deref());
        }
        "fdb" => {
            let MaybePort { port } = arguments(command, a)?;
            return fdb(s, port.as_deref());
        }
        "fdb-flush" => {
            let MaybePort { port } = arguments(command, a)?;
            let id = port.map(|p| s.port(&p).map(|p| p.id)).transpose()?;
            return Ok(json!({ "flushed": s.shared.fdb.flush(id) }));
        }
        "fdb-add" => {
            let FdbAdd { mac, vlan, port } = arguments(command, a)?;
            let id = s.port(&port)?.id;
            if vlan > MAX_VLAN {
                let wrong = format!("fdb-add: VLAN {vlan}: expected 0 (none) to {MAX_VLAN}");
                return Err(Error::Config(wrong));
            }
            if s.shared.fdb.set_static(Key::new(parse_mac(&mac)?, vlan), id) == Learned::Full {
                return Err(Error::Config(format!(
                    "fdb-add: no room for {mac} beside other addresses that are there for good; a \
                     switch started with a larger --macs has more"
                )));
            }
        }
        "mirrors" => return Ok(json!(s.mirrors.values().collect::<Vec<_>>())),
        "add-mirror" => s.add_mirror(arguments::<Mirror>(command, a)?)?,
        "del-mirror" => s.del_mirror(&arguments::<Name>(command, a)?.name)?,
        "capture" => {
            let StartCapture { port, file, snaplen, rx, tx } = arguments(command, a)?;
            s.capture(&port, &file, snaplen, rx, tx)?;
        }
        "end-capture" => {
            let (written, lost, failed) = s.end_captures(&arguments::<Name>(command, a)?.name)?;
            return Ok(json!({ "frames": written, "left-out": lost, "failed": failed }));
        }
        "metrics" => return Ok(json!(metrics(s))),
        "quit" => {}
        _ => {
            let hint = match nearest(command, COMMANDS) {
                Some(k) => format!("did you mean '{k}'?"),
                None => format!("known are {}", COMMANDS.join(", ")),
            };
            return Err(Error::Config(format!("unknown command '{command}'; {hint}")));
        }
    }
    Ok(json!({}))
}

/// A unicast address.
fn parse_mac(text: &str) -> Result<u64> {
    let bad = || {
        Error::Config(format!(
            "'{text}' is not one interface's MAC address: expected such as 52:54:00:12:34:56"
        ))
    };
    let parts: Vec<&str> = text.split(':').collect();
    // What parses a number takes a sign as well.
    let hex = |p: &&str| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit());
    if parts.len() != 6 || !parts.iter().all(hex) {
        return Err(bad());
    }
    let mac = parts.iter().try_fold(0u64, |mac, p| {
        u64::from_str_radix(p, 16).map(|b| mac << 8 | b).map_err(|_| bad())
    })?;
    let group = mac >> 40 & 1 != 0;
    if mac == 0 || group { Err(bad()) } else { Ok(mac) }
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

fn state(p: &Port) -> &'static str {
    match &p.kind {
        Kind::Interface(i) if i.down.is_some() => "down",
        Kind::Interface(_) => "up",
        Kind::Vhost(v) => match &v.link {
            Link::Listening => "listening",
            Link::Connecting { .. } => "connecting",
            Link::Connected(c) => match c.device().running() {
                (0, 0) => "connected",
                _ => "up",
            },
        },
    }
}

fn capture_value(c: &Capture) -> Value {
    let (written, lost) = c.tap.progress();
    json!({ "file": c.path, "frames": written, "left-out": lost, "failed": c.tap.failure() })
}

fn port_value(p: &Port) -> Value {
    let mut v = json!(p.spec);
    v["state"] = json!(state(p));
    v["threads"] = json!(p.threads);
    v["connections"] = json!(p.connections);
    v["resets"] = json!(p.resets);
    v["last-reset"] = json!(p.last_reset);
    v["captures"] = p.captures.iter().map(capture_value).collect();
    match &p.kind {
        Kind::Vhost(port) => {
            v["refused"] = json!(port.refused);
            if let Some(d) = port.device() {
                let (rx, tx) = d.running();
                v["rings"] = json!({ "receive": rx, "transmit": tx, "packed": d.packed() });
                v["features"] = json!(format!("{:#x}", d.negotiated));
                v["peer-mtu"] = json!(d.peer_mtu);
            }
        }
        Kind::Interface(i) => {
            v["down"] = json!(i.down);
            if let Some(x) = &i.xdp {
                v["xdp"] = json!({ "mode": x.mode, "why-generic": x.why_generic, "mtu": x.mtu });
            }
        }
    }
    v
}

fn show(s: &Switch) -> Value {
    let threads: Vec<Value> = s
        .shared
        .mailboxes
        .iter()
        .map(|m| {
            json!({
                "rounds": m.rounds.load(Ordering::Relaxed),
                "busy-rounds": m.busy_rounds.load(Ordering::Relaxed),
                "sleeps": m.sleeps.load(Ordering::Relaxed),
            })
        })
        .collect();
    json!({
        "poll": s.shared.poll,
        "threads": threads,
        "macs": s.shared.fdb.entries(0).len(),
        "ports": s.ports().map(port_value).collect::<Vec<_>>(),
        "mirrors": s.mirrors.values().collect::<Vec<_>>(),
    })
}

fn totals(t: &Totals) -> Value {
    let (dropped_in, dropped_out) = t.dropped();
    let reasons: serde_json::Map<String, Value> =
        t.reasons().map(|(r, n)| (r.name().into(), json!(n))).collect();
    json!({
        "rx-frames": t.rx_frames, "rx-bytes": t.rx_bytes, "rx-bursts": t.rx_bursts,
        "tx-frames": t.tx_frames, "tx-bytes": t.tx_bytes, "tx-bursts": t.tx_bursts,
        "flooded": t.flooded, "segmented": t.segmented, "checksummed": t.checksummed,
        "calls": t.calls,
        "rx-dropped": dropped_in, "tx-dropped": dropped_out, "drops": reasons,
    })
}

fn stats(s: &Switch, only: Option<&str>) -> Result<Value> {
    if let Some(name) = only {
        s.port(name)?;
    }
    let mut ports = Vec::new();
    for p in s.ports().filter(|p| only.is_none_or(|n| n == p.spec.name)) {
        let mut v = totals(&p.totals());
        v["name"] = json!(p.spec.name);
        v["state"] = json!(state(p));
        v["resets"] = json!(p.resets);
        v["last-reset"] = json!(p.last_reset);
        v["queues"] = json!(p.counters.iter().map(|c| totals(&c.snapshot())).collect::<Vec<_>>());
        ports.push(v);
    }
    let mut strays = Totals::default();
    s.shared.mailboxes.iter().for_each(|m| strays.add(&m.strays.snapshot()));
    Ok(json!({ "ports": ports, "no-port": totals(&strays) }))
}

fn fdb(s: &Switch, only: Option<&str>) -> Result<Value> {
    let only = only.map(|n| s.port(n).map(|p| p.id)).transpose()?;
    let name = |id: PortId| s.ports().find(|p| p.id == id).map(|p| p.spec.name.clone());
    let mut all = s.shared.fdb.entries(s.shared.now.load(Ordering::Relaxed));
    all.retain(|e| only.is_none_or(|id| e.port == id));
    all.sort_by_key(|e| (e.key.vlan(), e.key.mac()));
    let entry = |e: &crate::fdb::Entry| {
        json!({
            "mac": mac_text(e.key.mac()), "vlan": e.key.vlan(), "port": name(e.port),
            "age": e.age, "static": e.fixed,
        })
    };
    Ok(json!(all.iter().map(entry).collect::<Vec<_>>()))
}

/// One number of a port's totals.
type Reading = fn(&Totals) -> u64;

/// Prometheus' text format, version 0.0.4.
pub fn metrics(s: &Switch) -> String {
    use std::fmt::Write;
    let counters: &[(&str, &str, Reading)] = &[
        ("rx_frames_total", "Frames that the port sent into the switch", |t| t.rx_frames),
        ("rx_bytes_total", "Bytes that the port sent into the switch", |t| t.rx_bytes),
        ("tx_frames_total", "Frames that the switch sent to the port", |t| t.tx_frames),
        ("tx_bytes_total", "Bytes that the switch sent to the port", |t| t.tx_bytes),
        ("flooded_total", "Frames from the port that were flooded", |t| t.flooded),
        ("segmented_total", "Large segments cut for the port", |t| t.segmented),
        ("calls_total", "Interrupts sent to the port", |t| t.calls),
    ];
    let all: Vec<(&Port, Totals)> = s.ports().map(|p| (p, p.totals())).collect();
    let mut out = String::new();
    // Writing to a String cannot fail.
    for (name, help, read) in counters {
        let _ = writeln!(out, "# HELP tern_switch_port_{name} {help}.");
        let _ = writeln!(out, "# TYPE tern_switch_port_{name} counter");
        for (p, t) in &all {
            let _ =
                writeln!(out, "tern_switch_port_{name}{{port=\"{}\"}} {}", p.spec.name, read(t));
        }
    }
    let _ = writeln!(out, "# HELP tern_switch_port_dropped_total Frames dropped, by reason.");
    let _ = writeln!(out, "# TYPE tern_switch_port_dropped_total counter");
    for (p, t) in &all {
        for r in Drop::ALL {
            let _ = writeln!(
                out,
                "tern_switch_port_dropped_total{{port=\"{}\",reason=\"{}\"}} {}",
                p.spec.name,
                r.name(),
                t.drops[r as usize]
            );
        }
    }
    for (name, kind, help, read) in [
        (
            "up",
            "gauge",
            "Whether the other side is there",
            (|p| p.is_connected().into()) as fn(&Port) -> u64,
        ),
        ("resets_total", "counter", "Resets because the other side broke rules", |p| p.resets),
        ("connections_total", "counter", "Connections made", |p| p.connections),
    ] {
        let _ = writeln!(out, "# HELP tern_switch_port_{name} {help}.");
        let _ = writeln!(out, "# TYPE tern_switch_port_{name} {kind}");
        for (p, _) in &all {
            let _ =
                writeln!(out, "tern_switch_port_{name}{{port=\"{}\"}} {}", p.spec.name, read(p));
        }
    }
    let macs = s.shared.fdb.entries(0).len();
    let _ =
        writeln!(out, "# HELP tern_switch_macs Addresses known.\n# TYPE tern_switch_macs gauge");
    let _ = writeln!(out, "tern_switch_macs {macs}");
    out
}

/// Answers an HTTP request for metrics.
pub fn http(s: &Switch, request: &[u8]) -> Vec<u8> {
    let found = request.starts_with(b"GET /metrics ") || request.starts_with(b"GET / ");
    let (status, body) =
        if found { ("200 OK", metrics(s)) } else { ("404 Not Found", "see /metrics\n".into()) };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}
