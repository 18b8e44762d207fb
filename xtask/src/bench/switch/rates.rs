//! Frames a second, with testpmd as the load: every contestant in every run, in an order that
//! alternates.

use std::time::Duration;

use serde_json::{Value, json};

use super::contestant::{Contestant, Running, Wanted};
use super::stage::Stage;
use super::testpmd::{Frames, Testpmd};
use super::{Setting, list, turns};
use crate::Result;
use crate::bench::{load, median, placement};

/// Until addresses are learned, flows are in place, and all is warm.
const WARM_UP: Duration = Duration::from_millis(1500);
/// Windows of which the fastest counts, for every contestant: what other programs do, and other guests
/// of the machine's own host, can only take from a window.
const WINDOWS: u32 = 5;
/// Windows that are tried until so many were measured with the CPUs near each other.
const TRIES: u32 = 40;
/// Until frames go round again after both have stood still.
const SETTLE: Duration = Duration::from_millis(100);
/// More of another process's work than this, in processors, and a run is done again.
const DISTURBED: f64 = 0.05;

/// What one contestant reached with frames of one kind.
pub struct Row {
    pub frames: Frames,
    pub who: Contestant,
    figures: Vec<Figure>,
}

/// One run of a contestant with frames of one kind.
struct Figure {
    /// Frames a second through the core.
    rate: f64,
    /// Processors that others used meanwhile.
    disturbance: f64,
    /// How far the switch's CPU was from the load's.
    round_trip: Duration,
}

impl Row {
    /// Million frames a second in the median run.
    pub fn mpps(&self) -> f64 {
        median(&self.runs())
    }

    /// Million frames a second of each run.
    pub fn runs(&self) -> Vec<f64> {
        self.figures.iter().map(|f| f.rate / 1e6).collect()
    }

    pub fn json(&self) -> Value {
        let disturbance: Vec<f64> = self.figures.iter().map(|f| f.disturbance).collect();
        let round_trip: Vec<u64> =
            self.figures.iter().map(|f| f.round_trip.as_nanos() as u64).collect();
        json!({
            "frames": self.frames.name(),
            "who": self.who.name(),
            "mpps": self.mpps(),
            "mpps_runs": self.runs(),
            "ns_per_frame": 1e3 / self.mpps(),
            "disturbance_cpus": disturbance,
            "round_trip_ns": round_trip,
        })
    }
}

/// The rate in the fastest of some windows in which the two CPUs are near each other, and how far they
/// were. Where they never are, the fastest window counts.
fn fastest(
    setting: &Setting,
    stage: &Stage,
    (switch, testpmd): (&Running, &mut Testpmd),
    (ports, cpus): (usize, (usize, usize)),
) -> Result<(f64, Duration)> {
    let mut best: Option<(bool, f64, Duration)> = None;
    let mut near_windows = 0;
    let distance = |testpmd: &Testpmd| {
        switch.stand_still(true);
        testpmd.stand_still(true);
        let time = placement::round_trip(cpus.0, cpus.1);
        switch.stand_still(false);
        testpmd.stand_still(false);
        time
    };
    let mut before = distance(testpmd)?;
    for _ in 0..TRIES {
        if before > placement::NEAR {
            std::thread::sleep(setting.window / WINDOWS);
            before = distance(testpmd)?;
        }
        std::thread::sleep(SETTLE);
        let rate = testpmd.rate(stage, ports, setting.window / WINDOWS)?;
        let after = distance(testpmd)?;
        let farthest = before.max(after);
        let near = farthest <= placement::NEAR;
        if best.is_none_or(|(was_near, most, _)| (near, rate) > (was_near, most)) {
            best = Some((near, rate, farthest));
        }
        near_windows += u32::from(near);
        if near_windows == WINDOWS {
            break;
        }
        before = after;
    }
    best.map(|(_, rate, distance)| (rate, distance)).ok_or_else(|| "nothing was measured".into())
}

/// A contestant with queues and CPUs, through all kinds of frames.
fn once(
    setting: &Setting,
    stage: &Stage,
    who: Contestant,
    kinds: &[Frames],
    queues: usize,
    (cpus, load_cpus): (&[usize], &[usize]),
) -> Result<Vec<Figure>> {
    let sockets = [stage.path("p0.sock"), stage.path("p1.sock")];
    let tern = &setting.tern;
    let wanted = Wanted { tern, sockets: &sockets, queues, cpus, macs: 8192 };
    let switch = Running::start(who, stage, &wanted)?;
    let mut testpmd = Testpmd::start(stage, &sockets, queues, load_cpus)?;
    let mut figures = Vec::new();
    for frames in kinds {
        testpmd.load(*frames)?;
        std::thread::sleep(WARM_UP);
        // The probe of the distance is this process's work, which is none of others.
        let others = |testpmd: &Testpmd| {
            load::machine_busy()
                - switch.used()
                - testpmd.used()
                - load::used_by(std::process::id())
        };
        let before = others(&testpmd);
        let started = std::time::Instant::now();
        let ends = (load_cpus[0], cpus[0]);
        let (rate, round_trip) =
            fastest(setting, stage, (&switch, &mut testpmd), (sockets.len(), ends))?;
        let others = others(&testpmd) - before;
        if rate < 1000.0 {
            return Err(format!("{}: no frames go round", who.title()));
        }
        switch.check()?;
        let disturbance = others.max(0.0) / started.elapsed().as_secs_f64();
        figures.push(Figure { rate, disturbance, round_trip });
    }
    Ok(figures)
}

/// `once`, again while others disturb it or the CPUs are far apart.
fn undisturbed(
    setting: &Setting,
    stage: &Stage,
    who: Contestant,
    kinds: &[Frames],
    queues: usize,
    cpus: (&[usize], &[usize]),
) -> Result<Vec<Figure>> {
    let mut tries = 0;
    loop {
        load::wait_quiet(setting.patience);
        let figures = once(setting, stage, who, kinds, queues, cpus)?;
        tries += 1;
        let worst = figures.iter().map(|f| f.disturbance).fold(0.0, f64::max);
        let farthest = figures.iter().map(|f| f.round_trip).max().unwrap_or_default();
        let fair = worst < DISTURBED && farthest <= placement::NEAR;
        if fair || tries > setting.retries {
            return Ok(figures);
        }
        let (who, farthest) = (who.title(), farthest.as_nanos());
        println!(
            "  {who}: others used {worst:.2} processors, the CPUs were {farthest} ns apart: once more"
        );
    }
}

/// All contestants with all `kinds` of frames, one poll thread, one queue.
pub fn measure(setting: &Setting, stage: &Stage, kinds: &[Frames]) -> Result<Vec<Row>> {
    let mut rows: Vec<Row> = Vec::new();
    for frames in kinds {
        rows.extend(setting.who.iter().map(|who| Row {
            frames: *frames,
            who: *who,
            figures: Vec::new(),
        }));
    }
    for run in 0..setting.runs {
        for who in turns(run, setting.who.len()).into_iter().map(|i| setting.who[i]) {
            let figures = undisturbed(setting, stage, who, kinds, 1, (&[1], &[0]))?;
            let show = |(kind, f): (&Frames, &Figure)| {
                let far = if f.round_trip > placement::NEAR { ", CPUs far apart" } else { "" };
                let (kind, mpps) = (kind.name(), f.rate / 1e6);
                format!("{kind} {mpps:.2} Mpps ({} ns{far})", f.round_trip.as_nanos())
            };
            let shown: Vec<String> = kinds.iter().zip(&figures).map(show).collect();
            println!("  run {}: {:<26} {}", run + 1, who.title(), shown.join(", "));
            for (frames, figure) in kinds.iter().zip(figures) {
                let mut all = rows.iter_mut();
                if let Some(row) = all.find(|r| r.frames == *frames && r.who == who) {
                    row.figures.push(figure);
                }
            }
        }
    }
    Ok(rows)
}

/// CPUs that two poll threads and a load that does not hold them up take.
const CPUS_FOR_TWO: usize = 4;

/// Two poll threads with four queues against one: the ratio, or why it cannot be said here.
pub fn two_threads(setting: &Setting, stage: &Stage) -> Result<Value> {
    let have = std::thread::available_parallelism().map_or(1, usize::from);
    if have < CPUS_FOR_TWO {
        let why = format!(
            "not measured: two poll threads and their load take {CPUS_FOR_TWO} CPUs, this machine \
             has {have}"
        );
        println!("two poll threads: {why}");
        return Ok(json!({ "skipped": why }));
    }
    let (mut one, mut two) = (Vec::new(), Vec::new());
    let kinds = [Frames::Size(64)];
    for _ in 0..setting.runs {
        for (cpus, rates) in [(&[2][..], &mut one), (&[2, 3][..], &mut two)] {
            let cpus = (cpus, &[0, 1][..]);
            let figures = undisturbed(setting, stage, Contestant::Tern, &kinds, 4, cpus)?;
            rates.push(figures[0].rate / 1e6);
        }
    }
    let ratio = median(&two) / median(&one);
    println!("two poll threads: {} Mpps, one: {} Mpps: {ratio:.2}", list(&two), list(&one));
    Ok(json!({ "one_mpps": one, "two_mpps": two, "ratio": ratio }))
}
