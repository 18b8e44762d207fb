//! `tern ps`: lists the VMs that run.

use std::time::Duration;

use serde_json::{Value, json};

use crate::client::Client;
use crate::runtime_dir::{self, Entry};
use crate::{Outcome, units};

#[derive(clap::Args)]
#[command(after_help = "Example:\n  tern ps --json")]
pub struct Args {
    /// Print JSON: [{"name","pid","state","vcpus","memory-bytes","uptime-s"}]
    #[arg(long)]
    json: bool,
}

/// How long a VM may take to say how it is; a hung one must not hold up the list for long.
const PATIENCE: Duration = Duration::from_secs(2);

pub fn run(args: &Args) -> Outcome {
    let vms = runtime_dir::list()?;
    // Side by side: VMs that hang cost the patience only once.
    let rows: Vec<Row> = std::thread::scope(|scope| {
        let rows: Vec<_> = vms.iter().map(|vm| scope.spawn(|| Row::of(vm))).collect();
        rows.into_iter().filter_map(|row| row.join().ok()).collect()
    });
    if args.json {
        let rows: Vec<Value> = rows.iter().map(Row::to_json).collect();
        crate::say::say!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        crate::say::text(format_args!("{}", table(&rows)));
    }
    Ok(0)
}

struct Row {
    name: String,
    pid: i32,
    state: String,
    vcpus: Option<u32>,
    memory: Option<u64>,
    uptime: Option<Duration>,
}

impl Row {
    fn of(vm: &Entry) -> Self {
        let spec = vm.spec();
        Self {
            name: vm.name.clone(),
            pid: vm.pid,
            state: state(vm),
            vcpus: spec.as_ref().map(|spec| spec.smp.cpus),
            memory: spec.as_ref().map(|spec| spec.memory),
            uptime: uptime(vm.pid),
        }
    }

    fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "pid": self.pid,
            "state": self.state,
            "vcpus": self.vcpus,
            "memory-bytes": self.memory,
            "uptime-s": self.uptime.map(|time| time.as_secs()),
        })
    }
}

/// The run state, in QMP's words; "unreachable" when the VM does not say.
fn state(vm: &Entry) -> String {
    Client::connect(vm, PATIENCE)
        .and_then(|mut client| client.execute("query-status", json!({})))
        .ok()
        .and_then(|status| Some(status.get("status")?.as_str()?.to_owned()))
        .unwrap_or_else(|| "unreachable".into())
}

/// Since when the process runs, from proc(5)'s stat and uptime.
pub fn uptime(pid: i32) -> Option<Duration> {
    const TICKS: f64 = 100.0; // USER_HZ, the same on all of Linux's x86-64 and arm64.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command in brackets and may hold anything.
    let fields = stat.rsplit_once(") ")?.1;
    let start: f64 = fields.split(' ').nth(19)?.parse().ok()?;
    let up = std::fs::read_to_string("/proc/uptime").ok()?;
    let now: f64 = up.split(' ').next()?.parse().ok()?;
    Duration::try_from_secs_f64(now - start / TICKS).ok()
}

fn table(rows: &[Row]) -> String {
    let unknown = || "-".to_owned();
    let mut cells = vec![["NAME", "PID", "STATE", "VCPUS", "MEMORY", "UPTIME"].map(String::from)];
    cells.extend(rows.iter().map(|row| {
        [
            row.name.clone(),
            row.pid.to_string(),
            row.state.clone(),
            row.vcpus.map_or_else(unknown, |n| n.to_string()),
            row.memory.map_or_else(unknown, units::size),
            row.uptime.map_or_else(unknown, units::duration),
        ]
    }));
    let width = |i: usize| cells.iter().map(|row| row[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..6).map(width).collect();
    let mut text = String::new();
    for row in &cells {
        let line: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_lines_up() {
        let row = |name: &str, memory| Row {
            name: name.into(),
            pid: 7,
            state: "running".into(),
            vcpus: Some(2),
            memory,
            uptime: None,
        };
        let text = table(&[row("a", Some(512 << 20)), row("longer", None)]);
        assert_eq!(
            text,
            "NAME    PID  STATE    VCPUS  MEMORY   UPTIME\n\
             a       7    running  2      512 MiB  -\n\
             longer  7    running  2      -        -\n"
        );
    }

    #[test]
    fn our_own_uptime_is_known() {
        assert!(uptime(std::process::id() as i32).unwrap() < Duration::from_secs(3600));
    }
}
