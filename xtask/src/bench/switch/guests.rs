//! The row `guests`: iperf3 between two QEMU guests on their software CPU, on Tern's switch and on
//! Open vSwitch-DPDK. The guests may use both CPUs; a poll thread that never sleeps takes one of them.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{ChildStdout, Stdio};

use serde_json::{Value, json};

use super::contestant::{Contestant, Running, Wanted};
use super::stage::Stage;
use super::{Setting, list, turns};
use crate::bench::guests::verdict;
use crate::bench::load::{self, Process};
use crate::bench::median;
use crate::{Result, guest, net_guest};

/// Seconds that iperf3 runs in each direction.
const SECONDS: &str = "8";

/// `iperf3` between two guests, with every contestant in turns.
pub fn measure(setting: &Setting, stage: &Stage) -> Result<Value> {
    let all = [Contestant::TernAdaptive, Contestant::OvsNormal];
    let mut runs: Vec<Vec<Value>> = vec![Vec::new(); all.len()];
    for run in 0..setting.runs {
        for i in turns(run, all.len()) {
            runs[i].push(once(setting, stage, all[i])?);
        }
    }
    println!("\niperf3 between two QEMU guests on software CPUs, Gbit/s, both directions together");
    let mut rows = Vec::new();
    for (who, runs) in all.iter().zip(&runs) {
        let sums: Vec<f64> = runs.iter().map(sum).collect();
        println!("  {:<26} {:>6.2}   runs {}", who.title(), median(&sums), list(&sums));
        rows.push(json!({ "who": who.name(), "gbits": median(&sums), "runs": runs }));
    }
    let of = |i: usize| rows[i]["gbits"].as_f64().unwrap_or(f64::NAN);
    println!("  Tern over OVS-DPDK: {:.2}, wanted 1.0: {}", of(0) / of(1), verdict(of(0) >= of(1)));
    Ok(rows.into())
}

/// The rates of both directions together.
fn sum(run: &Value) -> f64 {
    run["gbits"].as_array().into_iter().flatten().filter_map(Value::as_f64).sum()
}

fn once(setting: &Setting, stage: &Stage, who: Contestant) -> Result<Value> {
    load::wait_quiet(setting.patience);
    let files = guest::ensure()?;
    let mut command = stage.command(&setting.iperf3, "iperf3.log")?;
    command
        .args(["--seconds", SECONDS])
        .env("TERN_E2E", "1")
        .env("TERN_GUEST_KERNEL", files.kernel)
        .env("TERN_NET_INITRD", net_guest::ensure()?)
        .stdout(Stdio::piped());
    let mut process = Process::start(&mut command)?;
    let output = process.0.stdout.take().ok_or("tern-iperf3 has no output")?;
    let mut output = BufReader::new(output);
    let said = || format!("tern-iperf3: {}", stage.log("iperf3.log"));
    let first = line(&mut output).ok_or_else(said)?;
    let sockets = first["sockets"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let sockets: Vec<PathBuf> = sockets.map(PathBuf::from).collect();
    let tern = &setting.tern;
    let wanted = Wanted { tern, sockets: &sockets, queues: 1, cpus: &[1], macs: 8192 };
    let _switch = Running::start(who, stage, &wanted)?;
    line(&mut output).ok_or_else(said)
}

fn line(from: &mut BufReader<ChildStdout>) -> Option<Value> {
    let mut text = String::new();
    from.read_line(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}
