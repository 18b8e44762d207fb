//! `tern switch top`: the ports live in a terminal.
#![allow(unsafe_code)] // the terminal's size

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

/// Columns of a row: 79, for terminals of 80.
fn row(cells: [&str; 7]) -> String {
    let [name, state, rx, rx_bits, tx, tx_bits, drops] = cells;
    let name = match name.char_indices().nth(16) {
        Some(_) => format!("{}…", name.chars().take(15).collect::<String>()),
        None => name.into(),
    };
    format!("{name:<16} {state:<10} {rx:>9} {rx_bits:>11} {tx:>9} {tx_bits:>11} {drops:>7}\n")
}

/// A row of `p`, which was `before` some `seconds` ago.
fn port_row(p: &Value, now: Reading, before: Reading, seconds: f64) -> String {
    row([
        p["name"].as_str().unwrap_or_default(),
        p["state"].as_str().unwrap_or_default(),
        &rate(now.rx_frames, before.rx_frames, 1.0, seconds),
        &rate(now.rx_bytes, before.rx_bytes, 8.0, seconds),
        &rate(now.tx_frames, before.tx_frames, 1.0, seconds),
        &rate(now.tx_bytes, before.tx_bytes, 8.0, seconds),
        &rate(now.drops, before.drops, 1.0, seconds),
    ])
}

/// What fits into `height` lines of `heading` and `rows`, with a last line that says what does not.
fn fit(heading: &str, rows: &[String], height: usize) -> String {
    const LAST: &str = "Ctrl-C ends";
    let room = height.saturating_sub(2);
    if rows.len() <= room {
        return format!("{heading}{}{LAST}", rows.concat());
    }
    let more = rows.len() - room;
    format!("{heading}{}{more} ports more; {LAST}", rows[..room].concat())
}

/// Lines of the terminal on the standard output; 24 where it does not say.
fn height() -> usize {
    // SAFETY: winsize is plain data, written by the call.
    let size = unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &mut size);
        size
    };
    if size.ws_row == 0 { 24 } else { size.ws_row.into() }
}

pub fn run(client: &mut Client) -> Outcome {
    let live = std::io::stdout().is_terminal();
    let heading = row(["PORT", "STATE", "RX pkt/s", "RX bit/s", "TX pkt/s", "TX bit/s", "DROP/s"]);
    let mut before: HashMap<String, Reading> = HashMap::new();
    let mut at = Instant::now();
    loop {
        let v = client.ask("stats", &json!({}))?;
        let seconds = at.elapsed().as_secs_f64();
        at = Instant::now();
        let mut rows = Vec::new();
        let mut now = HashMap::new();
        for p in v["ports"].as_array().into_iter().flatten() {
            let name = p["name"].as_str().unwrap_or_default().to_owned();
            let n = Reading::of(p);
            let b = before.get(&name).copied().unwrap_or(n);
            rows.push(port_row(p, n, b, seconds));
            now.insert(name, n);
        }
        let first = before.is_empty() && !now.is_empty();
        before = now;
        let mut out = std::io::stdout().lock();
        if live {
            // Home, the text, and nothing of what was there below it.
            write!(out, "\x1b[H\x1b[J{}", fit(&heading, &rows, height()))?;
        } else if !first {
            writeln!(out, "{heading}{}", rows.concat())?;
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
    fn rows_fit_into_a_terminal() {
        let p = json!({ "name": "a-name-of-more-than-sixteen", "state": "connecting" });
        let most = Reading { rx_frames: u64::MAX, ..Reading::default() };
        let text = port_row(&p, most, Reading::default(), 1e9);
        assert!(text.starts_with("a-name-of-more-… connecting"), "{text}");
        assert_eq!(text.trim_end().chars().count(), 79, "{text}");
        let rows = vec![text; 33];
        let shown = fit("heading\n", &rows, 10);
        assert_eq!(shown.lines().count(), 10);
        assert!(shown.ends_with("25 ports more; Ctrl-C ends"), "{shown}");
        assert_eq!(fit("heading\n", &rows, 40).lines().count(), 35);
    }

    #[test]
    fn rates_are_short() {
        assert_eq!(rate(1500, 0, 8.0, 1.0), "12.0 k");
        assert_eq!(rate(7_100_000, 0, 1.0, 1.0), "7.10 M");
        assert_eq!(rate(5, 9, 1.0, 1.0), "0");
    }
}
