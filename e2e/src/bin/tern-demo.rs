//! The main job, shown: a guest at work is live-migrated to a second VMM and back, again and
//! again, and everything that it does meanwhile is checked.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Parser;
use e2e::guest::control::{Order, Status};
use e2e::link::{Control, Stream};
use e2e::loss::{self, Loss};
use e2e::migration::{self, Report as Migration};
use e2e::network::{self, Network, Tap};
use e2e::ping::Pinger;
use e2e::report::{self, Report, Row};
use e2e::vmm::{Config, Vmm};
use e2e::{Error, Result, svg};
use serde_json::json;

#[derive(Parser)]
struct Args {
    /// The VMM: tern, or a program that takes QEMU's command line
    #[arg(long)]
    vmm: PathBuf,
    /// The guest's kernel
    #[arg(long)]
    kernel: PathBuf,
    /// The guest's initramfs
    #[arg(long)]
    initrd: PathBuf,
    /// Where report.json and timeline.svg go
    #[arg(long)]
    out: PathBuf,
    /// `native` or `lab`: what the report says of this host
    #[arg(long, default_value = "native")]
    host: String,
    /// Times there and back
    #[arg(long, default_value_t = 3)]
    trips: u32,
    /// Guest memory, MiB
    #[arg(long, default_value_t = 256)]
    memory: u32,
    /// Of it, dirtied by the guest's work, MiB
    #[arg(long, default_value_t = 128)]
    working_set: u32,
    /// Pages dirtied a second
    #[arg(long, default_value_t = 1000)]
    rate: u32,
    /// Has the guest triple-fault after so many migrations, to try what is done then
    #[arg(long, hide = true)]
    lose_after: Option<u32>,
}

/// Time at work between two migrations.
const WORK: Duration = Duration::from_millis(1500);
/// KiB a second on the stream, each way.
const STREAM_KIB: u32 = 1024;
/// Between two pings.
const PACE: Duration = Duration::from_millis(10);

/// Removed when the demo ends well.
struct Scratch(PathBuf);

struct Demo<'a> {
    args: &'a Args,
    dir: &'a Path,
    network: Network,
    started: u32,
    /// What was seen so far; in a failed demo also what there is to report.
    report: Report,
    migrations: Vec<Migration>,
}

/// What goes on beside the migrations.
struct Traffic {
    stream: Stream,
    pinger: Pinger,
}

/// A VMM with its tap; the VMM goes first.
struct Place {
    vmm: Vmm,
    /// Goes away with the place, after the VMM.
    _tap: Tap,
}

/// Gives an order. When the guest does not follow it, a VMM that ended or stopped is named first.
fn order(guest: &mut Control, vmm: &mut Vmm, order: &Order) -> Result<Status> {
    guest.order(order).or_else(|e| {
        vmm.check()?;
        Err(e)
    })
}

impl Demo<'_> {
    fn start(&mut self, incoming: Option<String>) -> Result<Place> {
        let args = self.args;
        self.started += 1;
        let config = Config {
            program: args.vmm.clone(),
            name: format!("vmm{}", self.started),
            kvm: true,
            memory_mib: args.memory,
            cpus: 1,
            kernel: args.kernel.clone(),
            initrd: args.initrd.clone(),
            append: format!(
                "tern.ip={}/{} tern.mem={} tern.rate={} tern.random=50 tern.disk=4096 tern.tcp={STREAM_KIB}",
                network::GUEST,
                network::PREFIX,
                args.working_set,
                args.rate
            ) + if args.lose_after.is_some() { " reboot=t" } else { "" },
            disk: Some(self.dir.join("disk.raw")),
            incoming,
            extra: Vec::new(),
        };
        let tap = self.network.tap()?;
        Ok(Place { vmm: config.start(self.dir, Some(&tap))?, _tap: tap })
    }

    /// Moves the guest to a new VMM.
    fn hop(
        &mut self,
        mut from: Place,
        guest: &mut Control,
        pinger: &Pinger,
    ) -> Result<(Place, Migration)> {
        let uri = format!("unix:{}", self.dir.join(format!("hop{}", self.started)).display());
        let mut to = self.start(Some(uri.clone()))?;
        order(guest, &mut from.vmm, &Order::Status)?;
        pinger.take_gap();
        let mut report = migration::migrate(&mut from.vmm, &mut to.vmm, &uri)?;
        let status = order(guest, &mut to.vmm, &Order::Status)?;
        self.note(&status);
        report.blackout_ms = status.gap.since_query_ms;
        report.host_gap_ms = pinger.take_gap().as_secs_f64() * 1e3;
        from.vmm.quit()?;
        Ok((to, report))
    }

    /// What the guest itself counted.
    fn note(&mut self, status: &Status) {
        let Report { tcp, disk, memory, .. } = &mut self.report;
        (tcp.bytes, tcp.bad) = (status.tcp_received, status.tcp_bad);
        (disk.blocks, disk.bad) = (status.disk_checked, status.disk_bad);
        memory.pages = status.mem_pages;
        (memory.dirtied, memory.bad) = (status.mem_dirtied, status.mem_bad);
    }

    fn run(&mut self) -> Result<()> {
        let mut place = self.start(None)?;
        place.vmm.wait_ready(Duration::from_secs(60))?;
        println!("the guest is up after {:.1} s", place.vmm.started.elapsed().as_secs_f64());
        let mut guest = Control::connect(network::GUEST)?;
        let stream = Stream::start(network::GUEST, u64::from(STREAM_KIB))?;
        let traffic = Traffic { stream, pinger: Pinger::start(network::GUEST, PACE)? };
        thread::sleep(WORK);
        let moved = self.travel(place, &mut guest, &traffic);
        // The guest's counts are taken when no more goes to it.
        let (pings, streamed) = (traffic.pinger.finish(), traffic.stream.finish());
        self.report.pings = report::Pings { sent: pings.sent, lost: pings.lost };
        let ended = moved.and_then(|place| self.finish(place, &mut guest));
        self.report.tcp.bytes += streamed.received;
        self.report.tcp.bad += streamed.bad;
        ended
    }

    /// Looks at all that the guest did, and powers it off.
    fn finish(&mut self, mut place: Place, guest: &mut Control) -> Result<()> {
        let status = order(guest, &mut place.vmm, &Order::Verify)?;
        self.note(&status);
        guest.order(&Order::Poweroff).ok();
        place.vmm.wait_end(Duration::from_secs(15)).map(drop)
    }

    /// All migrations; where the guest is in the end.
    fn travel(
        &mut self,
        mut place: Place,
        guest: &mut Control,
        traffic: &Traffic,
    ) -> Result<Place> {
        for number in 1..=self.args.trips * 2 {
            let (next, report) = self.hop(place, guest, &traffic.pinger)?;
            place = next;
            println!(
                "migration {number}: {:.0} ms in all, downtime {:.1} ms, the guest felt {:.1} ms",
                report.total_ms, report.downtime_ms, report.blackout_ms
            );
            self.migrations.push(report);
            if !traffic.stream.is_alive() {
                place.vmm.check()?;
                return Err(Error::Protocol(
                    "the TCP connection did not survive the migration".into(),
                ));
            }
            if self.args.lose_after == Some(number) {
                guest.order(&Order::Reboot).ok();
            }
            thread::sleep(WORK);
        }
        Ok(place)
    }
}

fn io(what: &str) -> impl FnOnce(std::io::Error) -> Error {
    move |e| Error::Host(format!("{what}: {e}"))
}

/// Runs the demo and leaves its report, whatever became of it; its exit status.
fn demo(args: &Args) -> Result<u8> {
    let scratch = Scratch(std::env::temp_dir().join(format!("tern-demo-{}", std::process::id())));
    fs::create_dir_all(&scratch.0).map_err(io("the demo's scratch directory"))?;
    fs::create_dir_all(&args.out).map_err(io("the demo's output directory"))?;
    let disk = fs::File::create(scratch.0.join("disk.raw")).map_err(io("the guest's disk"))?;
    disk.set_len(64 << 20).map_err(io("the guest's disk"))?;
    let network = Network::new()?;
    let report = Report { host: args.host.clone(), ..Report::default() };
    let migrations = Vec::new();
    let mut demo = Demo { args, dir: &scratch.0, network, started: 0, report, migrations };
    let result = demo.run();
    let Demo { mut report, migrations, .. } = demo;
    report.migrations = migrations.iter().map(Row::new).collect();
    let mut lost = None;
    if let Err(e) = &result {
        lost = Loss::find(&scratch.0, e);
        let logs = args.out.join("logs");
        keep_logs(&scratch.0, &logs);
        let why = lost.as_ref().map_or(e.to_string(), |loss| format!("{loss} ({e})"));
        report.error = Some(format!("{why}; what VMMs and guest said is in {}", logs.display()));
    }
    let _ = fs::remove_dir_all(&scratch.0);
    write_out(args, &report, &migrations)?;
    println!("\n{}", report::table(&report, &migrations));
    let wrong = report.tcp.bad + report.disk.bad + report.memory.bad > 0;
    if let Some(error) = &report.error {
        println!("The demo ended after {} migrations: {error}", migrations.len());
        if wrong {
            println!("WRONG: the guest or the host found wrong bytes before that");
        }
        let known = lost.is_some_and(|l| l.is_known_of_the_lab()) && !wrong;
        return Ok(if known { loss::EXIT } else { 1 });
    }
    let faults = report.faults();
    for fault in &faults {
        println!("WRONG: {fault}");
    }
    Ok(u8::from(!faults.is_empty()))
}

fn write_out(args: &Args, report: &Report, migrations: &[Migration]) -> Result<()> {
    let text = serde_json::to_string_pretty(&json!(report)).unwrap_or_default();
    fs::write(args.out.join("report.json"), text + "\n").map_err(io("report.json"))?;
    let title =
        format!("Tern: live migration of a working guest ({} MiB, {})", args.memory, args.host);
    fs::write(args.out.join("timeline.svg"), svg::timeline(&title, migrations))
        .map_err(io("timeline.svg"))
}

/// Copies what the VMMs and the guest said to where it outlives the lab.
fn keep_logs(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    for entry in fs::read_dir(from).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
        let into = to.join(entry.file_name());
        if fs::create_dir_all(&into).is_ok() {
            for log in ["serial.log", "stderr.log"] {
                let _ = fs::copy(entry.path().join(log), into.join(log));
            }
        }
    }
}

fn main() -> ExitCode {
    match demo(&Args::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("demo: {e}");
            ExitCode::FAILURE
        }
    }
}
