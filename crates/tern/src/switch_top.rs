//! `tern switch top`: the ports live in a terminal.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Outcome;
use crate::switch::Client;

const PERIOD: Duration = Duration::from_secs(1);

/// What is shown of a port, a second.
#[derive(Clone, Copy, Default)]
struct Reading {
    rx_frames: u64,
    rx_bytes: u64,
    tx_frames: u64,
    tx_bytes: u64,
    drops: u64,
}

impl Reading {
    fn of(p: &Value) -> Self {
        let n = |key: &str| p[key].as_u64().unwrap_or(0);
        Self {
            rx_frames: n("rx-frames"),
            rx_bytes: n("rx-bytes"),
            tx_frames: n("tx-frames"),
            tx_bytes: n("tx-bytes"),
            drops: n("rx-dropped") + n("tx-dropped"),
        }
    }
}

/// A rate with a unit that keeps it short.
fn rate(now: u64, before: u64, factor: f64, seconds: f64) -> String {
    let r = now.saturating_sub(before) as f64 * factor / seconds.max(1e-3);
    match r {
        r if r >= 1e9 => format!("{:.2} G", r / 1e9),
        r if r >= 1e6 => format!("{:.2} M", r / 1e6),
        r if r >= 1e3 => format!("{:.1} k", r / 1e3),
        r => format!("{r:.0}"),
    }
}

pub fn run(client: &mut Client) -> Outcome {
    let live = std::io::stdout().is_terminal();
    let mut before: HashMap<String, Reading> = HashMap::new();
    let mut at = Instant::now();
    loop {
        let v = client.ask("stats", &json!({}))?;
        let seconds = at.elapsed().as_secs_f64();
        at = Instant::now();
        let mut text = format!(
            "{:<16} {:<10} {:>9} {:>11} {:>9} {:>11} {:>9}\n",
            "PORT", "STATE", "RX pkt/s", "RX bit/s", "TX pkt/s", "TX bit/s", "DROP/s"
        );
        let mut now = HashMap::new();
        for p in v["ports"].as_array().into_iter().flatten() {
            let name = p["name"].as_str().unwrap_or_default().to_owned();
            let n = Reading::of(p);
            let b = before.get(&name).copied().unwrap_or(n);
            text.push_str(&format!(
                "{:<16} {:<10} {:>9} {:>11} {:>9} {:>11} {:>9}\n",
                name,
                p["state"].as_str().unwrap_or_default(),
                rate(n.rx_frames, b.rx_frames, 1.0, seconds),
                rate(n.rx_bytes, b.rx_bytes, 8.0, seconds),
                rate(n.tx_frames, b.tx_frames, 1.0, seconds),
                rate(n.tx_bytes, b.tx_bytes, 8.0, seconds),
                rate(n.drops, b.drops, 1.0, seconds),
            ));
            now.insert(name, n);
        }
        let first = before.is_empty() && !now.is_empty();
        before = now;
        let mut out = std::io::stdout().lock();
        if live {
            // Home, the text, and nothing of what was there below it.
            writeln!(out, "\x1b[H\x1b[J{text}Ctrl-C ends")?;
        } else if !first {
            writeln!(out, "{text}")?;
        }
        out.flush()?;
        drop(out);
        std::thread::sleep(PERIOD);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_short() {
        assert_eq!(rate(1500, 0, 8.0, 1.0), "12.0 k");
        assert_eq!(rate(7_100_000, 0, 1.0, 1.0), "7.10 M");
        assert_eq!(rate(5, 9, 1.0, 1.0), "0");
    }
}
