//! `tern migrate`: moves a running VM and shows how it goes. Ctrl-C cancels, and the guest goes on
//! where it is.
#![allow(unsafe_code)]

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::runtime_dir::{self, Entry};
use crate::{Outcome, client, units};

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  tern migrate vm1 tcp:host2:4444\n  tern migrate vm1 unix:/tmp/vm1.sock --max-bandwidth 500M --downtime-limit 100\n\nThe other side waits for it: tern qemu ... -incoming tcp:0:4444\nCtrl-C cancels; the guest goes on where it is."
)]
pub struct Args {
    /// Name of the VM
    name: String,
    /// Where to: tcp:HOST:PORT or unix:PATH
    uri: String,
    /// Most bytes a second, as 500M; 0 is no limit
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    max_bandwidth: Option<u64>,
    /// Longest pause of the guest that is aimed at, in milliseconds
    #[arg(long, value_name = "MS")]
    downtime_limit: Option<u64>,
    /// Return as soon as it has begun; `tern monitor NAME info migrate` shows how it goes
    #[arg(short = 'd', long)]
    detach: bool,
}

const POLL: Duration = Duration::from_millis(200);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_interrupt(_: i32) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

pub fn run(args: &Args) -> Outcome {
    let vm = runtime_dir::find(&args.name)?;
    let mut parameters = serde_json::Map::new();
    if let Some(bytes) = args.max_bandwidth {
        parameters.insert("max-bandwidth".into(), json!(bytes));
    }
    if let Some(ms) = args.downtime_limit {
        parameters.insert("downtime-limit".into(), json!(ms));
    }
    if !parameters.is_empty() {
        client::execute(&vm, "migrate-set-parameters", Value::Object(parameters))?;
    }
    if !args.detach {
        // Before the start: from now on Ctrl-C means "cancel".
        let handler = on_interrupt as extern "C" fn(i32);
        // SAFETY: the handler only stores to an atomic.
        unsafe { libc::signal(libc::SIGINT, handler as *const () as libc::sighandler_t) };
    }
    client::execute(&vm, "migrate", json!({"uri": args.uri}))?;
    if args.detach {
        crate::say::say!("VM {}: the migration to {} has begun.", vm.name, args.uri);
        return Ok(0);
    }
    let outcome = watch(&vm);
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
    finish(&vm, &args.uri, &outcome?)
}

/// Polls until it has ended one way or the other; the last answer of query-migrate.
fn watch(vm: &Entry) -> Result<Value, Box<dyn std::error::Error>> {
    let terminal = std::io::stderr().is_terminal();
    let mut cancelled = false;
    let mut shown_at: Option<Instant> = None;
    loop {
        if INTERRUPTED.load(Ordering::Relaxed) && !cancelled {
            // Once the guest is being handed over it is too late, and it is told so.
            if let Err(error) = client::execute(vm, "migrate_cancel", json!({})) {
                vmm::tell!("{error}");
            }
            cancelled = true;
        }
        let answer = match client::execute(vm, "query-migrate", json!({})) {
            Ok(answer) => answer,
            Err(_) if !vm.alive() => {
                return Err(format!(
                    "VM {} ended before it said how the migration went; see at the destination \
                     whether the guest runs there",
                    vm.name
                )
                .into());
            }
            Err(error) => return Err(error.into()),
        };
        if matches!(status(&answer), "completed" | "failed" | "cancelled") {
            return Ok(answer);
        }
        let line = progress(&answer);
        if terminal {
            eprint!("\r\x1b[K{line}");
            let _ = std::io::stderr().flush();
        } else if shown_at.is_none_or(|at| at.elapsed() >= Duration::from_secs(5)) {
            vmm::tell!("{line}");
            shown_at = Some(Instant::now());
        }
        std::thread::sleep(POLL);
    }
}

fn status(answer: &Value) -> &str {
    answer.get("status").and_then(Value::as_str).unwrap_or("none")
}

fn number(value: &Value, path: &[&str]) -> Option<f64> {
    path.iter().try_fold(value, |value, key| value.get(key))?.as_f64().filter(|n| *n >= 0.0)
}

/// "active 12 s, 512 MiB of 2 GiB remain, 1.1 GiB/s, guest dirties 80 MiB/s, ends in about 1 s".
fn progress(answer: &Value) -> String {
    let ram = |key| number(answer, &["ram", key]);
    let mut line = status(answer).to_owned();
    if let Some(ms) = number(answer, &["total-time"]) {
        line += &format!(" {:.1} s", ms / 1000.0);
    }
    let (Some(remaining), Some(total)) = (ram("remaining"), ram("total")) else { return line };
    line += &format!(", {} of {} remain", units::size(remaining as u64), units::size(total as u64));
    let rate = ram("mbps").unwrap_or(0.0) * 1e6 / 8.0;
    let dirty = ram("dirty-pages-rate").unwrap_or(0.0) * ram("page-size").unwrap_or(4096.0);
    line += &format!(", {}/s", units::size(rate as u64));
    if dirty > 0.0 {
        line += &format!(", guest dirties {}/s", units::size(dirty as u64));
    }
    match end(remaining, rate, dirty) {
        Some(seconds) => line + &format!(", ends in about {seconds:.0} s"),
        None if rate > 0.0 => line + ", does not end at this rate",
        None => line,
    }
}

/// Seconds until nothing remains, when the guest goes on to dirty as it does.
fn end(remaining: f64, rate: f64, dirty: f64) -> Option<f64> {
    (rate > dirty).then(|| remaining / (rate - dirty)).filter(|seconds| *seconds < 1e6)
}

fn finish(vm: &Entry, uri: &str, answer: &Value) -> Outcome {
    match status(answer) {
        "completed" => {
            crate::say::say!("{}", summary(vm, uri, answer));
            Ok(0)
        }
        "cancelled" => {
            crate::say::say!(
                "VM {}: the migration was cancelled; the guest goes on here.",
                vm.name
            );
            Ok(1)
        }
        _ => {
            let why = answer.get("error-desc").and_then(Value::as_str).unwrap_or("no reason given");
            let here = client::execute(vm, "query-status", json!({})).map_or_else(
                |_| String::new(),
                |state| stands(&vm.name, status(&state), why.contains("with cont")),
            );
            Err(format!("VM {}: the migration failed: {why}{here}", vm.name).into())
        }
    }
}

/// How the VM stands here after a migration that failed, and the command for what `why` leaves to
/// the operator.
fn stands(name: &str, state: &str, left_to_operator: bool) -> String {
    if left_to_operator {
        return format!(". Here it is {state}; cont is: tern monitor {name} cont");
    }
    format!(". Here it is {state}")
}

fn summary(vm: &Entry, uri: &str, answer: &Value) -> String {
    let ms = |key| number(answer, &[key]).map_or_else(|| "?".into(), |n| format!("{n} ms"));
    let mut text = format!("VM {} has moved to {uri}.\n  total     {}", vm.name, ms("total-time"));
    if let Some(bytes) = number(answer, &["ram", "transferred"]) {
        text += &format!("\n  sent      {}", units::size(bytes as u64));
        if let Some(rounds) = number(answer, &["ram", "dirty-sync-count"]) {
            text += &format!(" in {rounds} rounds");
        }
    }
    text += &format!("\n  downtime  {}", ms("downtime"));
    let phases = answer.pointer("/x-tern-downtime/phases").and_then(Value::as_array);
    let phases: Vec<String> = phases
        .into_iter()
        .flatten()
        .filter_map(|phase| {
            let us = number(phase, &["us"])?;
            Some(format!("{} {:.1} ms", phase.get("name")?.as_str()?, us / 1000.0))
        })
        .collect();
    if !phases.is_empty() {
        text += &format!(" ({})", phases.join(", "));
    }
    if let Some(us) = number(answer, &["x-tern-blackout-us"]) {
        text += &format!("\n  blackout  {:.1} ms (what the guest felt)", us / 1000.0);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_progress_line_predicts_the_end() {
        let mut answer = json!({"status": "active", "total-time": 1500, "ram": {
            "remaining": 1u64 << 30, "total": 2u64 << 30, "mbps": 8589.934592,
            "dirty-pages-rate": 131072, "page-size": 4096}});
        assert_eq!(
            progress(&answer),
            "active 1.5 s, 1 GiB of 2 GiB remain, 1 GiB/s, guest dirties 512 MiB/s, ends in about 2 s"
        );
        answer["ram"]["dirty-pages-rate"] = json!(300_000);
        assert!(progress(&answer).ends_with("does not end at this rate"));
        assert_eq!(progress(&json!({"status": "setup"})), "setup");
        assert_eq!(progress(&json!([])), "none");
    }

    #[test]
    fn the_summary_says_all_times() {
        let vm = Entry { name: "a".into(), pid: 1, path: "/x".into() };
        let answer = json!({"status": "completed", "total-time": 900, "downtime": 12,
            "ram": {"transferred": 3 << 20, "dirty-sync-count": 4},
            "x-tern-downtime": {"phases": [{"name": "stop", "us": 400}, {"name": "ram", "us": 11_000}]},
            "x-tern-blackout-us": 13_500});
        assert_eq!(
            summary(&vm, "tcp:b:1", &answer),
            "VM a has moved to tcp:b:1.\n  total     900 ms\n  sent      3 MiB in 4 rounds\n  \
             downtime  12 ms (stop 0.4 ms, ram 11.0 ms)\n  blackout  13.5 ms (what the guest felt)"
        );
    }
}
