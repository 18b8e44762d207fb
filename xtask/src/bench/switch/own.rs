//! Rows whose load is `tern-frames`: latency, idle ports, many ports and addresses.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::contestant::{Contestant, Running, Wanted};
use super::stage::Stage;
use super::{Setting, list, turns};
use crate::Result;
use crate::bench::guests::verdict;
use crate::bench::load::{self, Process};
use crate::bench::{median, placement};

/// Frames a second at which latency is measured: about a tenth of what one core forwards.
const TENTH: u32 = 600_000;
/// Seconds without a frame.
const QUIET: u32 = 6;

/// A switch and `tern-frames` at its ports.
struct Pair {
    switch: Running,
    frames: Process,
    output: BufReader<std::process::ChildStdout>,
}

impl Pair {
    fn start(
        setting: &Setting,
        stage: &Stage,
        who: Contestant,
        (ports, macs): (usize, usize),
        what: &[&str],
    ) -> Result<Self> {
        load::wait_quiet(setting.patience);
        let sockets: Vec<PathBuf> = (0..ports).map(|i| stage.path(&format!("p{i}.sock"))).collect();
        for socket in &sockets {
            let _ = std::fs::remove_file(socket);
        }
        let tern = &setting.tern;
        let wanted = Wanted { tern, sockets: &sockets, queues: 1, cpus: &[1], macs };
        let switch = Running::start(who, stage, &wanted)?;
        let mut command = stage.command("taskset", "frames.log")?;
        command.args(["-c", "0"]).arg(&setting.frames).args(what).stdout(Stdio::piped());
        for socket in &sockets {
            command.arg("--socket").arg(socket);
        }
        let mut frames = Process::start(&mut command)?;
        let output = frames.0.stdout.take().ok_or("tern-frames has no output")?;
        Ok(Self { switch, frames, output: BufReader::new(output) })
    }

    /// What it measured, when it ends.
    fn report(mut self, stage: &Stage) -> Result<Value> {
        let mut text = String::new();
        let read = self.output.read_to_string(&mut text);
        let ended = self.frames.0.wait();
        let well = read.is_ok() && ended.is_ok_and(|s| s.success());
        let report = text.lines().last().and_then(|l| serde_json::from_str(l).ok());
        let report: Option<Value> = report.filter(|_| well);
        let said = || format!("tern-frames: {}", stage.log("frames.log"));
        let mut report = report.ok_or_else(said)?;
        self.switch.check()?;
        if let Some(drops) = self.switch.drops()? {
            report["drops"] = drops;
        }
        Ok(report)
    }
}

/// How long the two CPUs are waited for to be near each other.
const NEAR_LIMIT: Duration = Duration::from_secs(30);

/// A run for which the CPUs were near each other, when it began and when it had ended; the last of
/// some if there is none. Where they did not come near, waiting again helps as little.
fn near(setting: &Setting, mut run: impl FnMut() -> Result<Value>) -> Result<Value> {
    let mut report = Value::Null;
    for _ in 0..=2 * setting.retries {
        let before = placement::wait_near(0, 1, NEAR_LIMIT)?;
        report = run()?;
        let farthest = placement::round_trip(0, 1)?.max(before);
        report["round_trip_ns"] = (farthest.as_nanos() as u64).into();
        if farthest <= placement::NEAR {
            break;
        }
        println!("  the CPUs were {} ns apart", farthest.as_nanos());
        if before > placement::NEAR {
            break;
        }
    }
    Ok(report)
}

fn numbers(reports: &[Value], key: &str) -> Vec<f64> {
    reports.iter().map(|r| r[key].as_f64().unwrap_or(f64::NAN)).collect()
}

/// Time from one port to the other at a tenth of what a core forwards.
pub fn latency(setting: &Setting, stage: &Stage) -> Result<Value> {
    let all =
        [Contestant::Tern, Contestant::TernAdaptive, Contestant::OvsRule, Contestant::OvsNormal];
    let mut reports: Vec<Vec<Value>> = vec![Vec::new(); all.len()];
    let rate = TENTH.to_string();
    for run in 0..setting.runs {
        for i in turns(run, all.len()) {
            let what = ["latency", "--rate", &rate];
            let report = near(setting, || {
                Pair::start(setting, stage, all[i], (2, 8192), &what)?.report(stage)
            })?;
            reports[i].push(report);
        }
    }
    println!(
        "\nlatency at {TENTH} frames of 64 bytes a second, ns: median, p99, worst of all runs"
    );
    let mut rows = Vec::new();
    for (who, reports) in all.iter().zip(&reports) {
        let (medians, p99) = (numbers(reports, "median_ns"), numbers(reports, "p99_ns"));
        let worst = numbers(reports, "worst_ns").into_iter().fold(0.0, f64::max);
        let lost: f64 = numbers(reports, "lost").iter().sum();
        println!(
            "  {:<26} {:>8.0} {:>8.0} {worst:>10.0}   lost {lost}",
            who.title(),
            median(&medians),
            median(&p99)
        );
        for drops in reports.iter().filter_map(|r| r["drops"].as_object()) {
            if !drops.is_empty() {
                println!("    dropped: {drops:?}");
            }
        }
        rows.push(json!({
            "who": who.name(), "median_ns": median(&medians), "p99_ns": median(&p99), "worst_ns": worst,
            "lost": lost, "runs": reports,
        }));
    }
    let of = |i: usize, key: &str| rows[i][key].as_f64().unwrap_or(f64::NAN);
    let met = |i| of(i, "median_ns") <= of(2, "median_ns") && of(i, "p99_ns") <= of(2, "p99_ns");
    println!(
        "  not worse than OVS with one rule a port: --poll always {}, --poll adaptive {}",
        verdict(met(0)),
        verdict(met(1))
    );
    Ok(rows.into())
}

/// Microseconds in which this machine wakes a process that sleeps on the switch's CPU: what the first
/// frame after idle cannot be quicker than.
fn wake_up(setting: &Setting, stage: &Stage) -> Result<Vec<f64>> {
    let mut command = stage.command("taskset", "wake.log")?;
    command.args(["-c", "0"]).arg(&setting.frames).arg("wake").stdout(Stdio::piped());
    let out = command.output().map_err(|e| format!("tern-frames: {e}"))?;
    let report: Value = serde_json::from_slice(&out.stdout)
        .map_err(|e| format!("tern-frames wake: {e}: {}", stage.log("wake.log")))?;
    Ok(microseconds(&report["wake_ns"]))
}

fn microseconds(list: &Value) -> Vec<f64> {
    list.as_array().into_iter().flatten().filter_map(|v| Some(v.as_f64()? / 1e3)).collect()
}

/// Ports at which nothing happens, and what comes first afterwards.
pub fn idle(setting: &Setting, stage: &Stage) -> Result<Value> {
    const PORTS: usize = 8;
    let mut rows = Vec::new();
    let wake = wake_up(setting, stage)?;
    println!("\nto wake a sleeping process on CPU 1, without a switch: {:.1} µs", median(&wake));
    for who in [Contestant::TernAdaptive, Contestant::OvsRule] {
        let seconds = QUIET.to_string();
        let what = ["idle", "--seconds", &seconds];
        let mut pair = Pair::start(setting, stage, who, (PORTS, 8192), &what)?;
        let mut line = String::new();
        let read = pair.output.read_line(&mut line);
        if read.is_err() || line.trim() != "connected" {
            return Err(format!("tern-frames: {}", stage.log("frames.log")));
        }
        std::thread::sleep(Duration::from_secs(1));
        let (before, start) = (pair.switch.used(), Instant::now());
        std::thread::sleep(Duration::from_secs(u64::from(QUIET) - 2));
        let cpu = (pair.switch.used() - before) / start.elapsed().as_secs_f64();
        let report = pair.report(stage)?;
        let empty = Vec::new();
        let singles = microseconds(&report["single_ns"]);
        let ramps = report["ramps"].as_array().unwrap_or(&empty);
        let (sent, lost) = (numbers(ramps, "sent"), numbers(ramps, "lost"));
        let worst = singles.iter().copied().fold(0.0, f64::max);
        let (sent, lost) = (sent.iter().sum::<f64>(), lost.iter().sum::<f64>());
        println!(
            "idle, {PORTS} ports, {}: {:.1} % of a core; first frame after idle {:.1} µs, worst \
             {worst:.1} of {}; idle to full {} times: {lost} of {sent} frames lost",
            who.title(),
            100.0 * cpu,
            median(&singles),
            singles.len(),
            ramps.len()
        );
        if who.is_ours() {
            println!(
                "  under 2 % of a core: {}; first frame under 100 µs: {} (worst: {}); none lost: {}",
                verdict(cpu < 0.02),
                verdict(median(&singles) < 100.0),
                verdict(worst < 100.0),
                verdict(lost == 0.0)
            );
        }
        rows.push(json!({
            "who": who.name(), "ports": PORTS, "cpu_of_a_core": cpu, "first_frame_us": median(&singles),
            "first_frame_worst_us": worst, "sent": sent, "lost": lost, "report": report,
        }));
    }
    Ok(json!({ "wake_us": wake, "switches": rows }))
}

/// Many ports, many addresses.
pub fn scale(setting: &Setting, stage: &Stage) -> Result<Value> {
    /// Ports and addresses. More ports are held against two with as many addresses, 100,000
    /// addresses against 1,000 at as many ports.
    const LAYOUTS: [(usize, usize); 6] =
        [(2, 256), (8, 256), (64, 256), (256, 256), (2, 1000), (2, 100_000)];
    /// Of each layout, the one that it is held against.
    const BASE: [usize; 6] = [0, 0, 0, 0, 4, 4];
    let mut rates: Vec<Vec<f64>> = vec![Vec::new(); LAYOUTS.len()];
    for run in 0..setting.runs {
        for i in turns(run, LAYOUTS.len()) {
            let (ports, macs) = LAYOUTS[i];
            let count = macs.to_string();
            let what = ["flood", "--macs", &count];
            let room = (ports, macs.max(8192));
            let report = near(setting, || {
                Pair::start(setting, stage, Contestant::Tern, room, &what)?.report(stage)
            })?;
            rates[i].push(report["mpps"].as_f64().unwrap_or(f64::NAN));
        }
    }
    println!(
        "\nTern, ports in pairs, 64 bytes; cost of a frame beside two ports, and beside 1,000 addresses"
    );
    let mut rows = Vec::new();
    for (i, (ports, macs)) in LAYOUTS.into_iter().enumerate() {
        let cost = median(&rates[BASE[i]]) / median(&rates[i]);
        println!(
            "  {ports:>4} ports {macs:>7} addresses: {:>6.2} Mpps, {cost:.2} times: {}   {}",
            median(&rates[i]),
            verdict(cost <= 1.3),
            list(&rates[i])
        );
        rows.push(json!({ "ports": ports, "macs": macs, "mpps": rates[i], "cost": cost }));
    }
    Ok(rows.into())
}
