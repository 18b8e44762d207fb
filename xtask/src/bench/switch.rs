//! `cargo xtask bench switch`: the switch beside Open vSwitch-DPDK, in one run.
//!
//! DPDK's testpmd is the load for rates; for latency, idle ports and many ports or addresses it is
//! `tern-frames`, which speaks to every contestant alike. The switch has CPU 1, the load CPU 0.

mod contestant;
mod guests;
mod own;
mod rates;
mod stage;
mod testpmd;

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use self::contestant::Contestant;
use self::rates::Row;
use self::stage::Stage;
use self::testpmd::Frames;
use super::guests::verdict;
use super::picture::{self, Bar};
use super::{median, out_dir};
use crate::{Result, host, setup};

/// `bench switch`'s arguments.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask bench switch\n  \
    cargo xtask bench switch --only 64 --runs 3\n\nAs root: it sets huge pages for the time that it \
    runs.")]
pub struct SwitchArgs {
    /// Runs of each contestant
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Only this row: 64, 1500, imix, threads, latency, idle, scale, guests (repeatable)
    #[arg(long, value_name = "ROW", value_parser = ROWS)]
    only: Vec<String>,
    /// Rates of this contestant only: tern, tern-adaptive, ovs-rule, ovs-normal, raw-vhost (repeatable)
    #[arg(long, value_name = "NAME", value_parser = Contestant::ALL.map(Contestant::name))]
    who: Vec<String>,
    /// One short run of each, to see that everything works
    #[arg(long)]
    quick: bool,
    /// Seconds that a quiet moment is waited for before each run
    #[arg(long, default_value_t = 10)]
    patience: u64,
    /// Times that a run which other processes disturbed is done again
    #[arg(long, default_value_t = 2)]
    retries: usize,
    /// Another binary of Tern than the one that is built for it
    #[arg(long, value_name = "PATH")]
    tern: Option<PathBuf>,
}

const ROWS: [&str; 8] = ["64", "1500", "imix", "threads", "latency", "idle", "scale", "guests"];

/// How a row is measured that has not testpmd as its load.
type Measure = fn(&Setting, &Stage) -> Result<Value>;

/// These rows, by name.
const MEASURED: [(&str, Measure); 4] = [
    ("latency", own::latency),
    ("idle", own::idle),
    ("scale", own::scale),
    ("guests", guests::measure),
];

/// The order of `count` contestants in a run: there and back, so that none always comes first.
fn turns(run: usize, count: usize) -> Vec<usize> {
    let there = 0..count;
    if run.is_multiple_of(2) { there.collect() } else { there.rev().collect() }
}

/// What all rows share.
struct Setting {
    tern: PathBuf,
    frames: PathBuf,
    iperf3: PathBuf,
    /// Whose rates are measured.
    who: Vec<Contestant>,
    runs: usize,
    /// How long a rate is measured, all windows together.
    window: Duration,
    patience: Duration,
    retries: usize,
}

/// What is to be reached: frames, the peer, and the ratio to it.
const WANTED: [(Frames, Contestant, f64); 5] = [
    (Frames::Size(64), Contestant::OvsRule, 1.0),
    (Frames::Size(64), Contestant::OvsNormal, 1.5),
    (Frames::Size(64), Contestant::RawVhost, 1.0),
    (Frames::Size(1500), Contestant::OvsRule, 1.2),
    (Frames::Imix, Contestant::OvsRule, 1.2),
];

fn list(values: &[f64]) -> String {
    values.iter().map(|v| format!("{v:.2}")).collect::<Vec<_>>().join(" ")
}

/// The processor and how many there are of it.
fn machine() -> Value {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find(|l| l.starts_with("model name"));
    let model = model.and_then(|l| l.split(": ").nth(1)).unwrap_or("unknown");
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    json!({ "processor": model, "cpus": cpus, "kernel": kernel.trim() })
}

fn print_rates(rows: &[Row]) {
    println!("\n{:>6}  {:<26} {:>9}  {:>9}  runs, Mpps", "frames", "", "Mpps", "ns/frame");
    for row in rows {
        let (frames, name, mpps) = (row.frames.name(), row.who.title(), row.mpps());
        println!("{frames:>6}  {name:<26} {mpps:>9.2}  {:>9.1}  {}", 1e3 / mpps, list(&row.runs()));
    }
}

/// Tern's rate over a peer's for everything that is wanted, of the same frames and the same runs.
fn ratios(rows: &[Row]) -> Vec<Value> {
    let of = |frames, who| rows.iter().find(|r: &&Row| r.frames == frames && r.who == who);
    let mut out = Vec::new();
    for (frames, peer, least) in WANTED {
        let (Some(tern), Some(other)) = (of(frames, Contestant::Tern), of(frames, peer)) else {
            continue;
        };
        let ratio = tern.mpps() / other.mpps();
        // Run by run the ratio is worth more than that of two medians on a machine that changes.
        let pairs = tern.runs().into_iter().zip(other.runs());
        let each: Vec<f64> = pairs.map(|(t, o)| t / o).collect();
        let (name, title) = (frames.name(), peer.title());
        println!(
            "{name} bytes, Tern over {title}: {ratio:.2} (runs: {}), wanted {least:.1}: {}",
            list(&each),
            verdict(ratio >= least)
        );
        out.push(json!({
            "frames": name, "peer": peer.name(), "ratio": ratio, "wanted": least,
            "median_of_runs": median(&each),
        }));
    }
    out
}

fn draw(rows: &[Row]) -> String {
    let bars: Vec<Bar> = rows
        .iter()
        .map(|row| Bar {
            label: format!("{} B: {}", row.frames.name(), row.who.title()),
            value: row.mpps(),
            samples: row.runs(),
            ours: row.who.is_ours(),
        })
        .collect();
    let title = "Frames through one core: two vhost-user ports, testpmd as the load";
    picture::bars(title, "million frames a second; dots are single runs", "Mpps", &bars)
}

/// Measures and reports.
pub fn run(args: &SwitchArgs) -> Result<u8> {
    setup::ensure(setup::SWITCH)?;
    let bins = host::build_release(&["e2e"], &["tern-frames", "tern-iperf3"])?;
    let tern = match &args.tern {
        Some(path) => std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))?,
        None => host::build_release(&["tern"], &["tern"])?.join("tern"),
    };
    let is_wanted =
        |c: &Contestant| args.who.is_empty() || args.who.iter().any(|name| name == c.name());
    let setting = Setting {
        tern,
        who: Contestant::ALL.into_iter().filter(is_wanted).collect(),
        frames: bins.join("tern-frames"),
        iperf3: bins.join("tern-iperf3"),
        runs: if args.quick { 1 } else { args.runs.max(1) },
        window: Duration::from_millis(if args.quick { 700 } else { 2500 }),
        patience: Duration::from_secs(args.patience),
        retries: if args.quick { 0 } else { args.retries },
    };
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        return Err("bench switch needs two CPUs: one for the switch, one for the load".into());
    }
    let wanted = |row: &str| args.only.is_empty() || args.only.iter().any(|o| o == row);
    let out = out_dir()?;
    let stage = Stage::new(out.join("switch"))?;
    let kinds: Vec<Frames> = [Frames::Size(64), Frames::Size(1500), Frames::Imix]
        .into_iter()
        .filter(|k| wanted(&k.name()))
        .collect();
    let mut report = json!({ "machine": machine(), "runs": setting.runs });
    if !kinds.is_empty() {
        let rows = rates::measure(&setting, &stage, &kinds)?;
        print_rates(&rows);
        report["rates"] = rows.iter().map(Row::json).collect();
        report["ratios"] = ratios(&rows).into();
        let picture = out.join("switch.svg");
        std::fs::write(&picture, draw(&rows)).map_err(|e| format!("{}: {e}", picture.display()))?;
    }
    if wanted("threads") {
        report["two_threads"] = rates::two_threads(&setting, &stage)?;
    }
    for (name, measure) in MEASURED {
        if wanted(name) {
            report[name] = measure(&setting, &stage)?;
        }
    }
    let path = out.join("switch.json");
    std::fs::write(&path, format!("{report:#}\n"))
        .map_err(|e| format!("{}: {e}", path.display()))?;
    println!("\n{}", path.display());
    Ok(0)
}
