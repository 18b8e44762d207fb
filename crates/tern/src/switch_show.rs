//! What the switch says, as tables for people.

use serde_json::Value;

/// Rows of cells as text, columns aligned; the first row is the heading.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, w)| format!("{cell:<w$}")).collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

fn heading(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}

/// A value without quotes; "-" for none.
fn cell(v: &Value) -> String {
    match v {
        Value::Null => "-".into(),
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

fn list(v: &Value) -> impl Iterator<Item = &Value> {
    v.as_array().into_iter().flatten()
}

/// `tern switch show`.
pub fn ports(v: &Value) -> String {
    let mut rows = vec![heading(&["PORT", "TYPE", "STATE", "QUEUES", "VLAN", "WHERE", "RESETS"])];
    for p in list(&v["ports"]) {
        let trunk: Vec<String> = list(&p["trunk"]).map(cell).collect();
        let vlan = match (&p["vlan"], trunk.is_empty()) {
            (Value::Null, true) => "all".into(),
            (Value::Null, false) => format!("trunk {}", trunk.join("+")),
            (v, true) => v.to_string(),
            (v, false) => format!("{v}, trunk {}", trunk.join("+")),
        };
        let place = if p["path"].is_null() { &p["ifname"] } else { &p["path"] };
        rows.push(vec![
            cell(&p["name"]),
            cell(&p["type"]),
            cell(&p["state"]),
            cell(&p["queues"]),
            vlan,
            cell(place),
            cell(&p["resets"]),
        ]);
    }
    let mut out = table(&rows);
    for p in list(&v["ports"]) {
        let (name, xdp) = (cell(&p["name"]), &p["xdp"]);
        if !p["down"].is_null() {
            out.push_str(&format!("{name}: down: {}\n", cell(&p["down"])));
        }
        if p["state"] == "connecting" && !p["refused"].is_null() {
            out.push_str(&format!("{name}: cannot connect yet: {}\n", cell(&p["refused"])));
        }
        for c in list(&p["captures"]) {
            let (file, frames, lost) = (cell(&c["file"]), cell(&c["frames"]), cell(&c["left-out"]));
            let end = match &c["failed"] {
                Value::Null => String::new(),
                why => format!("; nothing more is written: {}", cell(why)),
            };
            out.push_str(&format!(
                "{name}: capture to {file}: {frames} frames, {lost} left out{end}\n"
            ));
        }
        if !xdp.is_null() {
            let why = match &xdp["why-generic"] {
                Value::Null => String::new(),
                why => format!(" ({})", cell(why)),
            };
            out.push_str(&format!("{name}: XDP mode {}{why}\n", cell(&xdp["mode"])));
        }
    }
    for p in list(&v["ports"]).filter(|p| !p["last-reset"].is_null()) {
        out.push_str(&format!("{}: last reset: {}\n", cell(&p["name"]), cell(&p["last-reset"])));
    }
    for m in list(&v["mirrors"]) {
        let select: Vec<String> = list(&m["select"]).map(cell).collect();
        let (name, output) = (cell(&m["name"]), cell(&m["output"]));
        out.push_str(&format!("mirror {name}: {} to {output}\n", select.join(", ")));
    }
    for (i, t) in list(&v["threads"]).enumerate() {
        let of = |key: &str| t[key].as_u64().unwrap_or(0);
        let busy = 100 * of("busy-rounds") / of("rounds").max(1);
        out.push_str(&format!(
            "poll thread {i}: {busy} % of rounds busy, slept {} times\n",
            of("sleeps")
        ));
    }
    out.push_str(&format!("poll mode {}, {} addresses known\n", cell(&v["poll"]), v["macs"]));
    out
}

/// `tern switch fdb`.
pub fn fdb(v: &Value) -> String {
    let mut rows = vec![heading(&["MAC", "VLAN", "PORT", "AGE"])];
    for e in list(v) {
        let age = if e["static"] == true { "static".into() } else { format!("{} s", e["age"]) };
        rows.push(vec![cell(&e["mac"]), cell(&e["vlan"]), cell(&e["port"]), age]);
    }
    table(&rows)
}

pub fn mirrors(v: &Value) -> String {
    let mut rows = vec![heading(&["MIRROR", "FROM", "TO", "DIRECTION"])];
    for m in list(v) {
        let from: Vec<String> = list(&m["select"]).map(cell).collect();
        let direction = match (m["rx"] == true, m["tx"] == true) {
            (true, false) => "rx",
            (false, true) => "tx",
            _ => "both",
        };
        rows.push(vec![cell(&m["name"]), from.join(","), cell(&m["output"]), direction.into()]);
    }
    table(&rows)
}

fn stats_row(name: String, state: String, t: &Value) -> Vec<String> {
    let reasons: Vec<String> = t["drops"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(reason, n)| format!("{reason} {n}"))
        .collect();
    vec![
        name,
        state,
        cell(&t["rx-frames"]),
        cell(&t["rx-bytes"]),
        cell(&t["tx-frames"]),
        cell(&t["tx-bytes"]),
        if reasons.is_empty() { "-".into() } else { reasons.join(", ") },
    ]
}

/// `tern switch stats`.
pub fn stats(v: &Value, queues: bool) -> String {
    let head = ["PORT", "STATE", "RX FRAMES", "RX BYTES", "TX FRAMES", "TX BYTES", "DROPS"];
    let mut rows = vec![heading(&head)];
    for p in list(&v["ports"]) {
        rows.push(stats_row(cell(&p["name"]), cell(&p["state"]), p));
        for (i, q) in list(&p["queues"]).enumerate().filter(|_| queues) {
            rows.push(stats_row(format!("  queue {i}"), String::new(), q));
        }
    }
    table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tables_are_aligned_and_name_reasons() {
        let v = json!({ "ports": [{
            "name": "a", "state": "up", "rx-frames": 12, "rx-bytes": 720, "tx-frames": 1,
            "tx-bytes": 60, "drops": { "vlan": 3, "runt": 1 }, "queues": [{ "rx-frames": 12 }],
        }]});
        let text = stats(&v, true);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0].find("DROPS"), lines[1].find("vlan 3, runt 1"));
        assert!(lines[2].contains("queue 0"));
        assert!(
            ports(&json!({ "ports": [{ "name": "x", "trunk": [1, 2] }] })).contains("trunk 1+2")
        );
        let capture = json!({ "file": "/f", "frames": 8, "left-out": 3, "failed": "No space" });
        let text = ports(&json!({ "ports": [{ "name": "x", "captures": [capture] }] }));
        let expected =
            "x: capture to /f: 8 frames, 3 left out; nothing more is written: No space\n";
        assert!(text.contains(expected), "{text}");
    }
}
