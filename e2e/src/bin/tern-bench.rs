//! The part of `cargo xtask bench` that runs where guests can run: starts VMMs in turns, measures,
//! and writes what it measured as JSON.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use e2e::bench::{self, Contestant};
use e2e::guest::control::Order;
use e2e::link::Control;
use e2e::network::{self, Network};
use e2e::vmm::Config;
use e2e::{Error, Result, migration};
use serde_json::{Value, json};

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
    /// NAME=PROGRAM[,ARGUMENT...]: a VMM that takes QEMU's command line (repeatable)
    #[arg(long = "vmm", global = true)]
    vmms: Vec<Contestant>,
    /// The guest's kernel
    #[arg(long, global = true)]
    kernel: Option<PathBuf>,
    /// The guest's initramfs
    #[arg(long, global = true)]
    initrd: Option<PathBuf>,
    /// The JSON file to write
    #[arg(long, global = true)]
    out: Option<PathBuf>,
    /// Runs of each VMM
    #[arg(long, global = true, default_value_t = 5)]
    runs: u32,
    /// Guest memory, MiB
    #[arg(long, global = true, default_value_t = 256)]
    memory: u32,
    /// The guest's CPUs
    #[arg(long, global = true, default_value_t = 1)]
    cpus: u32,
    /// Keep what VMMs and guests said in this directory
    #[arg(long, global = true)]
    logs: Option<PathBuf>,
}

#[derive(Subcommand)]
enum What {
    /// The gap that a guest at work felt when it was migrated
    Blackout {
        /// Memory that the guest works on, MiB, all of it random data
        #[arg(long, default_value_t = 128)]
        working_set: u32,
        /// Pages dirtied a second
        #[arg(long, default_value_t = 1000)]
        rate: u32,
    },
    /// From the start of the process to the guest's init
    Boot,
    /// The VMM's resident memory beyond the guest's
    Footprint,
}

/// At work before the migration begins, and after it, so that late gaps are seen too.
const WORK: Duration = Duration::from_millis(1500);
/// A guest is up in this time.
const PATIENCE: Duration = Duration::from_secs(60);

/// The guest's monotonic clock at a moment of the host's.
struct GuestClock {
    host: Instant,
    guest_ms: f64,
}

impl GuestClock {
    /// The quickest answer of some; it is wrong by half its time at most.
    fn read(guest: &mut Control) -> Result<Self> {
        let mut best: Option<(Duration, Self)> = None;
        for _ in 0..10 {
            let asked = Instant::now();
            let guest_ms = guest.order(&Order::Status)?.uptime_ms;
            let took = asked.elapsed();
            if best.as_ref().is_none_or(|(shortest, _)| took < *shortest) {
                best = Some((took, Self { host: asked + took / 2, guest_ms }));
            }
        }
        best.map(|(_, clock)| clock).ok_or_else(|| Error::Protocol("no answer".into()))
    }

    /// How much less time passed in the guest than on the host since `earlier`, ms: what a VMM
    /// that stops the guest's clock for a pause hides from it.
    fn behind_ms(&self, earlier: &Self) -> f64 {
        let host_ms = (self.host - earlier.host).as_secs_f64() * 1e3;
        host_ms - (self.guest_ms - earlier.guest_ms)
    }
}

struct Bench<'a> {
    args: &'a Args,
    dir: PathBuf,
    started: u32,
}

impl Bench<'_> {
    fn config(&mut self, vmm: &Contestant, append: String, incoming: Option<String>) -> Config {
        self.started += 1;
        Config {
            program: vmm.program.clone(),
            name: format!("{}-{}", vmm.name, self.started),
            kvm: true,
            memory_mib: self.args.memory,
            cpus: self.args.cpus,
            kernel: self.args.kernel.clone().unwrap_or_default(),
            initrd: self.args.initrd.clone().unwrap_or_default(),
            append,
            disk: None,
            incoming,
            extra: vmm.arguments.clone(),
        }
    }

    fn blackout(
        &mut self,
        vmm: &Contestant,
        network: &mut Network,
        set: u32,
        rate: u32,
    ) -> Result<Value> {
        let append = format!(
            "tern.ip={}/{} tern.mem={set} tern.random=100 tern.rate={rate}",
            network::GUEST,
            network::PREFIX
        );
        bench::warm_up(u64::from(self.args.memory) * 2 + 256);
        let config = self.config(vmm, append.clone(), None);
        let tap = network.tap()?;
        let mut source = config.start(&self.dir, Some(&tap))?;
        source.wait_ready(PATIENCE)?;
        let mut guest = Control::connect(network::GUEST)?;
        let uri = format!("unix:{}", self.dir.join(format!("move{}", self.started)).display());
        let to = self.config(vmm, append, Some(uri.clone()));
        let other = network.tap()?;
        let mut destination = to.start(&self.dir, Some(&other))?;
        thread::sleep(WORK);
        let clock = GuestClock::read(&mut guest)?;
        let before = guest.order(&Order::Status)?;
        let mut report = migration::migrate(&mut source, &mut destination, &uri)?;
        thread::sleep(WORK);
        let gap = guest.order(&Order::Status)?.gap;
        let stood_ms = GuestClock::read(&mut guest)?.behind_ms(&clock);
        report.blackout_ms = gap.since_query_ms;
        let wrong = guest.order(&Order::Verify)?.mem_bad;
        if wrong > 0 {
            return Err(Error::Protocol(format!("{}: {wrong} pages were wrong", vmm.name)));
        }
        report.samples.clear();
        Ok(json!({
            "gap_ms": gap.since_query_ms + stood_ms.max(0.0),
            "guest_gap_ms": gap.since_query_ms,
            "clock_stood_ms": stood_ms,
            "gaps": gap.last.iter().map(|g| json!({"after_ms": g.at_ms - before.uptime_ms, "ms": g.ms}))
                .collect::<Vec<_>>(),
            "total_ms": report.total_ms,
            "downtime_ms": report.downtime_ms,
            "stop_to_resume_ms": report.stop_to_resume_ms,
            "phases": report.phases,
            "rounds": report.rounds,
        }))
    }

    fn boot(&mut self, vmm: &Contestant) -> Result<Value> {
        bench::warm_up(u64::from(self.args.memory) + 64);
        let config = self.config(vmm, String::new(), None);
        let mut vm = config.start(&self.dir, None)?;
        let monitor_s = vm.started.elapsed().as_secs_f64();
        let ready = vm.wait_ready(PATIENCE)?;
        let ready_s = vm.started.elapsed().as_secs_f64();
        let number = |key: &str| ready.get(key).and_then(Value::as_f64).unwrap_or(0.0);
        // What init itself did until it said so is not the boot.
        let init_s = ready_s - (number("ready") - number("uptime"));
        Ok(json!({"init_s": init_s, "ready_s": ready_s, "monitor_s": monitor_s,
            "kernel_s": number("uptime")}))
    }

    fn footprint(&mut self, vmm: &Contestant) -> Result<Value> {
        bench::warm_up(u64::from(self.args.memory) + 64);
        let config = self.config(vmm, String::new(), None);
        let mut vm = config.start(&self.dir, None)?;
        vm.wait_ready(PATIENCE)?;
        thread::sleep(WORK);
        let memory = bench::footprint(vm.pid(), u64::from(self.args.memory) << 20)?;
        Ok(json!(memory))
    }

    fn run(&mut self) -> Result<Value> {
        let args = self.args;
        let mut network = match args.what {
            What::Blackout { .. } => Some(Network::new()?),
            _ => None,
        };
        let mut results: Vec<Vec<Value>> = vec![Vec::new(); args.vmms.len()];
        for run in 0..args.runs {
            let mut order: Vec<usize> = (0..args.vmms.len()).collect();
            if run % 2 == 1 {
                order.reverse();
            }
            for index in order {
                let vmm = &args.vmms[index];
                let result = match (&args.what, &mut network) {
                    (What::Blackout { working_set, rate }, Some(network)) => {
                        self.blackout(vmm, network, *working_set, *rate)?
                    }
                    (What::Footprint, _) => self.footprint(vmm)?,
                    _ => self.boot(vmm)?,
                };
                println!("run {} {:<12} {}", run + 1, vmm.name, bench::brief(&result));
                results[index].push(result);
            }
        }
        let rows: Vec<Value> = args
            .vmms
            .iter()
            .zip(results)
            .map(|(vmm, runs)| json!({"name": vmm.name, "runs": runs}))
            .collect();
        Ok(json!({"memory_mib": args.memory, "cpus": args.cpus, "vmms": rows}))
    }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |e| Error::Host(format!("{}: {e}", path.display()))
}

fn measure(args: &Args) -> Result<()> {
    let dir = std::env::temp_dir().join(format!("tern-bench-{}", std::process::id()));
    fs::create_dir_all(&dir).map_err(io(&dir))?;
    let result = Bench { args, dir: dir.clone(), started: 0 }.run();
    if let Some(logs) = &args.logs {
        bench::keep_logs(&dir, logs);
    }
    let _ = fs::remove_dir_all(&dir);
    let text = serde_json::to_string_pretty(&result?).unwrap_or_default();
    match &args.out {
        Some(out) => fs::write(out, text + "\n").map_err(io(out)),
        None => {
            println!("{text}");
            Ok(())
        }
    }
}

fn main() -> ExitCode {
    match measure(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench: {e}");
            ExitCode::FAILURE
        }
    }
}
