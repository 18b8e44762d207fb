//! `cargo xtask bench migrate`: how fast a stopped guest's memory moves over loopback TCP.
//!
//! All contestants take turns in one run, in an order that alternates; each is timed from the
//! outside, from the `migrate` command to the event that says it is complete. Before each timed run
//! the machine must be quiet, and as much memory as the run uses is touched and freed.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::load::{self, Process};
use super::picture::{self, Bar};
use super::qmp::Qmp;
use super::{median, out_dir, placement};
use crate::qemu::{self, Qemu};
use crate::{Result, guest, host, setup};

/// Where the guest's data begins; a kernel lies below it.
const DATA_AT: u64 = 64 << 20;
const GIB: u64 = 1 << 30;
/// More of another process's work than this, in processors, and a run is done again.
const DISTURBED: f64 = 0.1;
/// How long the CPUs are waited for to be near each other.
const NEAR_LIMIT: Duration = Duration::from_secs(20);
const LIMIT: Duration = Duration::from_secs(120);

/// `bench migrate`'s arguments.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  cargo xtask bench migrate")]
pub struct MigrateArgs {
    /// Timed runs of each contestant
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// GiB of data in the guest
    #[arg(long, default_value_t = 2)]
    size: u64,
    /// Only contestants whose name contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Leave out the rows on zero pages, max-bandwidth and cancel
    #[arg(long)]
    rates_only: bool,
    /// Seconds that a quiet moment is waited for before each run
    #[arg(long, default_value_t = 30)]
    patience: u64,
    /// Times that a run which other processes disturbed is done again
    #[arg(long, default_value_t = 3)]
    retries: usize,
    /// Another binary of Tern than the one that is built for it
    #[arg(long, value_name = "PATH")]
    tern: Option<PathBuf>,
}

/// Who takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contestant {
    Tern,
    Qemu,
    QemuMultifd,
    Iperf,
}

impl Contestant {
    const ALL: [Self; 4] = [Self::Iperf, Self::Tern, Self::Qemu, Self::QemuMultifd];

    fn name(self) -> &'static str {
        match self {
            Self::Tern => "tern",
            Self::Qemu => "qemu",
            Self::QemuMultifd => "qemu-multifd-2",
            Self::Iperf => "iperf3",
        }
    }
}

/// One timed run.
#[derive(Clone, Debug, Default)]
struct Sample {
    /// Payload bytes that moved.
    bytes: u64,
    seconds: f64,
    /// Of both sides together.
    cpu_seconds: f64,
    /// Processors that others used meanwhile.
    disturbance: f64,
    /// How far apart the CPUs of a machine with two were, before or after it.
    round_trip: Option<Duration>,
}

impl Sample {
    fn is_near(&self) -> bool {
        self.round_trip.is_none_or(|distance| distance <= placement::NEAR)
    }

    fn gbit_s(&self) -> f64 {
        self.bytes as f64 * 8.0 / 1e9 / self.seconds
    }

    fn cpu_per_gib(&self) -> f64 {
        self.cpu_seconds * GIB as f64 / self.bytes as f64
    }

    fn json(&self) -> Value {
        json!({
            "gbit_s": self.gbit_s(),
            "seconds": self.seconds,
            "cpu_s_per_gib": self.cpu_per_gib(),
            "disturbance_cpus": self.disturbance,
            "round_trip_ns": self.round_trip.map(|d| d.as_nanos() as u64),
        })
    }
}

/// What the guests are made of.
struct Setting {
    tern: PathBuf,
    qemu: Qemu,
    kernel: PathBuf,
    random: PathBuf,
    zero: PathBuf,
    data: u64,
    dir: PathBuf,
    patience: Duration,
    retries: usize,
}

/// A pair of VMMs, ready for `migrate`.
struct Pair {
    source: Process,
    destination: Process,
    from: Qmp,
    uri: String,
    _to: Qmp,
}

fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).map_err(|e| e.to_string())?;
    Ok(listener.local_addr().map_err(|e| e.to_string())?.port())
}

impl Setting {
    fn new(args: &MigrateArgs) -> Result<Self> {
        setup::ensure(&[setup::LAB, &["iperf3"]].concat())?;
        let tern = match &args.tern {
            Some(path) => std::path::absolute(path).map_err(|e| e.to_string())?,
            None => host::build_release(&["tern"], &["tern"])?.join("tern"),
        };
        let dir = out_dir()?;
        let data = args.size.clamp(1, 8) * GIB;
        let (random, zero) = (dir.join("random.bin"), dir.join("zero.bin"));
        fill(&random, data)?;
        let sparse = File::create(&zero).and_then(|f| f.set_len(data));
        sparse.map_err(|e| format!("{}: {e}", zero.display()))?;
        let kernel = guest::ensure()?.kernel;
        let (patience, retries) = (Duration::from_secs(args.patience), args.retries);
        Ok(Self { tern, qemu: qemu::newest()?, kernel, random, zero, data, dir, patience, retries })
    }

    fn vmm(&self, who: Contestant, role: &str, socket: &Path) -> Command {
        let mut command = match who {
            Contestant::Tern => {
                let mut c = Command::new(&self.tern);
                c.arg("qemu").arg("-kernel").arg(&self.kernel);
                c.args(["-accel", "kvm", "-cpu", "host"]);
                c
            }
            // Nothing runs in it, and so it works on hosts whose KVM lacks what QEMU wants.
            _ => {
                let mut c = self.qemu.command();
                c.args(["-accel", "tcg"]);
                c
            }
        };
        let memory = format!("{}M", (DATA_AT + self.data) >> 20);
        let words = "-machine q35 -nodefaults -display none -S";
        command.args(words.split(' ')).args(["-m", &memory, "-qmp"]);
        command.arg(format!("unix:{},server=on,wait=off", socket.display()));
        let log = File::create(self.dir.join(format!("{}-{role}.log", who.name())));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(log.map_or_else(|_| Stdio::null(), Stdio::from));
        command
    }

    /// Starts source and destination, and sets what is to be set.
    fn pair(&self, who: Contestant, data: &Path, bandwidth: u64) -> Result<Pair> {
        let socket = |role: &str| self.dir.join(format!("{}-{role}.sock", who.name()));
        let (at_source, at_destination) = (socket("source"), socket("destination"));
        for s in [&at_source, &at_destination] {
            let _ = std::fs::remove_file(s);
        }
        let loader = format!("loader,file={},addr={DATA_AT:#x},force-raw=on", data.display());
        let mut source = self.vmm(who, "source", &at_source);
        let mut destination = self.vmm(who, "destination", &at_destination);
        let source = Process::start(source.args(["-device", &loader]))?;
        let destination = Process::start(destination.args(["-incoming", "defer"]))?;
        let named =
            |e: String| format!("{}: {e} (its messages: {})", who.name(), self.dir.display());
        let mut from = Qmp::connect(&at_source, LIMIT).map_err(named)?;
        let mut to = Qmp::connect(&at_destination, LIMIT).map_err(named)?;
        let uri = format!("tcp:127.0.0.1:{}", free_port()?);
        for qmp in [&mut from, &mut to] {
            let multifd = who == Contestant::QemuMultifd;
            let mut capabilities = vec![json!({"capability": "events", "state": true})];
            if multifd {
                capabilities.push(json!({"capability": "multifd", "state": true}));
            }
            let capabilities = json!({"capabilities": capabilities});
            qmp.command("migrate-set-capabilities", capabilities)?;
            let mut parameters = json!({"max-bandwidth": bandwidth});
            if multifd {
                parameters["multifd-channels"] = 2.into();
            }
            qmp.command("migrate-set-parameters", parameters)?;
        }
        to.command("migrate-incoming", json!({"uri": uri}))?;
        Ok(Pair { source, destination, from, uri, _to: to })
    }

    /// One timed run of a VMM with what `data` holds as the guest's memory.
    fn migration(&self, who: Contestant, data: &Path, bandwidth: u64) -> Result<Sample> {
        let mut pair = self.pair(who, data, bandwidth)?;
        load::wait_quiet(self.patience);
        load::warm_memory(2 * self.data as usize)?;
        let before = placement::of_two(NEAR_LIMIT)?;
        let cpu = |p: &Pair| p.source.used() + p.destination.used();
        let (busy, used, start) = (load::machine_busy(), cpu(&pair), Instant::now());
        pair.from.command("migrate", json!({"uri": pair.uri}))?;
        let end = |d: &Value| d["status"] == "completed" || d["status"] == "failed";
        let (at, event) = pair.from.wait("MIGRATION", LIMIT, end)?;
        let seconds = (at - start).as_secs_f64();
        let cpu_seconds = cpu(&pair) - used;
        let others = load::machine_busy() - busy - cpu_seconds;
        let round_trip = placement::of_two(Duration::ZERO)?.max(before);
        if event["status"] != "completed" {
            let info = pair.from.command("query-migrate", json!({}))?;
            return Err(format!("{}: the migration failed: {info}", who.name()));
        }
        let disturbance = others / seconds;
        Ok(Sample { bytes: self.data, seconds, cpu_seconds, disturbance, round_trip })
    }

    /// One timed run of iperf3, one stream.
    fn iperf(&self) -> Result<Sample> {
        let port = free_port()?.to_string();
        let mut server = Command::new("iperf3");
        server.args(["-s", "-1", "-J", "-B", "127.0.0.1", "-p", &port]);
        let mut server = Process::start(server.stdout(Stdio::null()).stderr(Stdio::null()))?;
        std::thread::sleep(Duration::from_millis(200));
        load::wait_quiet(self.patience);
        load::warm_memory(2 * self.data as usize)?;
        let before = placement::of_two(NEAR_LIMIT)?;
        let busy = load::machine_busy();
        let out = Command::new("iperf3")
            .args(["-c", "127.0.0.1", "-J", "-p", &port, "-n", &self.data.to_string()])
            .stderr(Stdio::null())
            .output()
            .map_err(|e| format!("iperf3 does not start: {e}"))?;
        let _ = server.0.wait();
        let report: Value = serde_json::from_slice(&out.stdout).map_err(|e| e.to_string())?;
        let end = &report["end"];
        let number = |v: &Value| v.as_f64().filter(|n| *n > 0.0);
        let (Some(bytes), Some(seconds)) =
            (number(&end["sum_received"]["bytes"]), number(&end["sum_received"]["seconds"]))
        else {
            return Err(format!("iperf3 failed: {}", report["error"]));
        };
        let percent = &end["cpu_utilization_percent"];
        let both = ["host_total", "remote_total"].map(|k| number(&percent[k]).unwrap_or(0.0));
        let cpu_seconds = both.iter().sum::<f64>() / 100.0 * seconds;
        let others = load::machine_busy() - busy - cpu_seconds;
        let round_trip = placement::of_two(Duration::ZERO)?.max(before);
        let disturbance = (others / seconds).max(0.0);
        Ok(Sample { bytes: bytes as u64, seconds, cpu_seconds, disturbance, round_trip })
    }

    /// A timed run, done again while others disturb it or the CPUs are far apart.
    fn sample(&self, who: Contestant, data: &Path) -> Result<Sample> {
        let once = || match who {
            Contestant::Iperf => self.iperf(),
            _ => self.migration(who, data, 0),
        };
        let mut best = once()?;
        for _ in 0..self.retries {
            if best.is_near() && best.disturbance <= DISTURBED {
                break;
            }
            let again = once()?;
            // Nearness first: it is what changes a rate most.
            let order = again.is_near().cmp(&best.is_near());
            if order.then(best.disturbance.total_cmp(&again.disturbance)).is_gt() {
                best = again;
            }
        }
        Ok(best)
    }
}

/// Makes `path` a file of `size` random bytes, unless it is one.
fn fill(path: &Path, size: u64) -> Result<()> {
    if path.metadata().is_ok_and(|m| m.len() == size) {
        return Ok(());
    }
    let mut random = File::open("/dev/urandom").map_err(|e| e.to_string())?.take(size);
    let mut file = File::create(path).map_err(|e| format!("{}: {e}", path.display()))?;
    std::io::copy(&mut random, &mut file).map_err(|e| format!("{}: {e}", path.display()))?;
    file.flush().map_err(|e| e.to_string())
}

/// A contestant's runs.
struct Row {
    who: Contestant,
    samples: Vec<Sample>,
}

impl Row {
    fn rates(&self) -> Vec<f64> {
        self.samples.iter().map(Sample::gbit_s).collect()
    }

    fn cpu(&self) -> f64 {
        median(&self.samples.iter().map(Sample::cpu_per_gib).collect::<Vec<_>>())
    }

    fn json(&self) -> Value {
        json!({
            "name": self.who.name(),
            "median_gbit_s": median(&self.rates()),
            "median_cpu_s_per_gib": self.cpu(),
            "runs": self.samples.iter().map(Sample::json).collect::<Vec<_>>(),
        })
    }
}

fn race(setting: &Setting, who: &[Contestant], data: &Path, runs: usize) -> Result<Vec<Row>> {
    let mut rows: Vec<Row> = who.iter().map(|w| Row { who: *w, samples: Vec::new() }).collect();
    let count = rows.len();
    for run in 0..runs {
        for i in 0..count {
            let row = &mut rows[if run % 2 == 0 { i } else { count - 1 - i }];
            let sample = setting.sample(row.who, data)?;
            eprintln!(
                "run {}: {:<15} {:6.2} Gbit/s  {:.2} CPU s/GiB  (others used {:.2} CPUs)",
                run + 1,
                row.who.name(),
                sample.gbit_s(),
                sample.cpu_per_gib(),
                sample.disturbance
            );
            row.samples.push(sample);
        }
    }
    Ok(rows)
}

fn print(title: &str, rows: &[Row]) {
    println!("\n{title}");
    println!("{:<16} {:>14} {:>16} {:>14}", "", "median Gbit/s", "from - to", "CPU s per GiB");
    for row in rows {
        let rates = row.rates();
        let low = rates.iter().copied().fold(f64::INFINITY, f64::min);
        let high = rates.iter().copied().fold(0.0, f64::max);
        println!(
            "{:<16} {:>14.2} {:>16} {:>14.2}",
            row.who.name(),
            median(&rates),
            format!("{low:.2} - {high:.2}"),
            row.cpu()
        );
    }
}

/// Tern's median rate over `who`'s.
fn ratio(rows: &[Row], who: Contestant) -> Option<f64> {
    let rate = |w| rows.iter().find(|r| r.who == w).map(|r| median(&r.rates()));
    Some(rate(Contestant::Tern)? / rate(who)?)
}

/// How well `max-bandwidth` is kept: (limit, bytes a second that came out).
fn limited(setting: &Setting) -> Result<(u64, f64)> {
    let limit = 500 << 20;
    let sample = setting.migration(Contestant::Tern, &setting.random, limit)?;
    Ok((limit, sample.bytes as f64 / sample.seconds))
}

/// Milliseconds from `migrate_cancel` to the event that says so, half a second into a migration that
/// takes longer than that: it has a limit.
fn cancel(setting: &Setting) -> Result<f64> {
    let mut pair = setting.pair(Contestant::Tern, &setting.random, 500 << 20)?;
    pair.from.command("migrate", json!({"uri": pair.uri}))?;
    std::thread::sleep(Duration::from_millis(500));
    let start = Instant::now();
    pair.from.command("migrate_cancel", json!({}))?;
    let end = |d: &Value| ["cancelled", "completed", "failed"].iter().any(|s| d["status"] == *s);
    let (at, event) = pair.from.wait("MIGRATION", LIMIT, end)?;
    if event["status"] != "cancelled" {
        return Err(format!("the migration to be cancelled has ended: {event}"));
    }
    Ok((at - start).as_secs_f64() * 1e3)
}

/// Rows beside the race: zero pages, the bandwidth limit, cancel.
fn beside(setting: &Setting, runs: usize) -> Result<Value> {
    let who = [Contestant::Tern, Contestant::Qemu];
    let zero = race(setting, &who, &setting.zero, runs)?;
    let gb_s = |row: &Row| median(&row.rates()) / 8.0;
    println!("\nA guest of touched zero pages, GB of guest memory a second:");
    zero.iter().for_each(|row| println!("{:<16} {:>14.2}", row.who.name(), gb_s(row)));
    let (limit, came) = limited(setting)?;
    let off = (came / limit as f64 - 1.0) * 100.0;
    println!("max-bandwidth of {} MiB/s: kept to {off:+.1} %", limit >> 20);
    let cancels = (0..runs).map(|_| cancel(setting)).collect::<Result<Vec<_>>>()?;
    let worst = cancels.iter().copied().fold(0.0, f64::max);
    println!("cancel: median {:.1} ms, worst {worst:.1} ms", median(&cancels));
    Ok(json!({
        "zero_pages": zero.iter().map(|r| json!({
            "name": r.who.name(), "median_gb_s": gb_s(r), "median_cpu_s_per_gib": r.cpu(),
        })).collect::<Vec<_>>(),
        "max_bandwidth": {"limit_bytes_s": limit, "bytes_s": came, "off_percent": off},
        "cancel_ms": {"median": median(&cancels), "worst": worst},
    }))
}

fn draw(setting: &Setting, rows: &[Row]) -> String {
    let label = |who| match who {
        Contestant::Iperf => "iperf3, 1 stream".to_owned(),
        Contestant::Tern => "Tern, 1 connection".to_owned(),
        Contestant::Qemu => format!("QEMU {}, 1 channel", setting.qemu.version),
        Contestant::QemuMultifd => format!("QEMU {}, multifd 2", setting.qemu.version),
    };
    let bar = |row: &Row| Bar {
        label: label(row.who),
        value: median(&row.rates()),
        samples: row.rates(),
        ours: row.who == Contestant::Tern,
    };
    let subtitle = format!(
        "stopped guest with {} GiB of random memory, loopback TCP; medians, dots are runs",
        setting.data / GIB
    );
    let bars: Vec<_> = rows.iter().map(bar).collect();
    picture::bars("Live migration: memory transfer rate", &subtitle, "Gbit/s", &bars)
}

/// Runs it; its exit status.
pub fn run(args: &MigrateArgs) -> Result<u8> {
    let setting = Setting::new(args)?;
    let wanted = |w: &Contestant| args.only.as_ref().is_none_or(|o| w.name().contains(o.as_str()));
    let who: Vec<_> = Contestant::ALL.into_iter().filter(wanted).collect();
    let rows = race(&setting, &who, &setting.random, args.runs)?;
    let title = format!(
        "A stopped guest with {} GiB of random memory, loopback TCP (QEMU {}):",
        setting.data / GIB,
        setting.qemu.version
    );
    print(&title, &rows);
    let mut ratios = serde_json::Map::new();
    for other in [Contestant::Iperf, Contestant::Qemu, Contestant::QemuMultifd] {
        if let Some(r) = ratio(&rows, other) {
            println!("tern / {:<15} {r:.2}", other.name());
            ratios.insert(format!("tern_over_{}", other.name()), r.into());
        }
    }
    let mut report = json!({
        "qemu": setting.qemu.version,
        "data_bytes": setting.data,
        "rows": rows.iter().map(Row::json).collect::<Vec<_>>(),
        "ratios": ratios,
    });
    if !args.rates_only && args.only.is_none() {
        report["beside"] = beside(&setting, args.runs)?;
    }
    let write = |name: &str, text: String| {
        let path = setting.dir.join(name);
        std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))
    };
    write("migrate.json", format!("{report:#}\n"))?;
    write("migrate.svg", draw(&setting, &rows))?;
    println!("\n{0}/migrate.json  {0}/migrate.svg", setting.dir.display());
    Ok(0)
}
