//! `tern switch`: the virtual switch and the commands that talk to one that runs.

use std::io::{BufRead, BufReader, ErrorKind, IsTerminal, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use vswitch::{Config, PortSpec, Server};

use crate::{Outcome, switch_show, switch_top};

/// How long a switch may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A virtual switch between VMs, taps and interfaces.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  tern switch run --cpus 1 \\\n    \
    --port vm1,type=vhost-user,path=/tmp/vm1.sock --port up,type=tap,ifname=tap0\n  \
    tern switch stats --watch\n\ndocs/switch.md has more.")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Start a switch
    Run(RunArgs),
    /// Add a port: NAME,type=...
    #[command(
        after_help = "Example:\n  tern switch add-port vm2,type=vhost-user,path=/tmp/vm2.sock,vlan=10\n\ndocs/switch.md has all keys."
    )]
    AddPort {
        /// The port: NAME,type=vhost-user|tap|af-packet|af-xdp,key=value,...
        port: String,
        #[command(flatten)]
        to: To,
    },
    /// Remove a port
    #[command(after_help = "Example:\n  tern switch del-port vm2")]
    DelPort {
        /// Name of the port
        name: String,
        #[command(flatten)]
        to: To,
    },
    /// Change keys of a port: key=value, or key= to take it away
    #[command(after_help = "Example:\n  tern switch set-port vm2 rate=1G vlan=")]
    SetPort {
        /// Name of the port
        name: String,
        /// vlan=, trunk=, mtu=, rate= or storm=, each with its new value or nothing
        #[arg(required = true)]
        set: Vec<String>,
        #[command(flatten)]
        to: To,
    },
    /// Show ports and poll threads
    #[command(after_help = "Examples:\n  tern switch show\n  tern switch show --json")]
    Show {
        #[command(flatten)]
        view: View,
        #[command(flatten)]
        to: To,
    },
    /// Show addresses and their ports, flush them, or add one for good
    Fdb(FdbArgs),
    /// Show what was counted, with a reason for every drop
    #[command(
        after_help = "Examples:\n  tern switch stats vm1 --watch\n  tern switch stats --queues"
    )]
    Stats {
        /// Only this port
        port: Option<String>,
        /// Each queue too
        #[arg(long)]
        queues: bool,
        #[command(flatten)]
        view: View,
        #[command(flatten)]
        to: To,
    },
    /// Show mirrors, add one, or remove one
    Mirror(MirrorArgs),
    /// Capture a port's frames into a pcap file, or end that
    Capture(CaptureArgs),
    /// Show the ports live
    #[command(after_help = "Example:\n  tern switch top")]
    Top {
        #[command(flatten)]
        to: To,
    },
    /// Print metrics for Prometheus
    #[command(after_help = "Example:\n  tern switch metrics")]
    Metrics {
        #[command(flatten)]
        to: To,
    },
    /// End a switch
    #[command(after_help = "Example:\n  tern switch quit")]
    Quit {
        #[command(flatten)]
        to: To,
    },
}

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    tern switch run --port vm1,type=vhost-user,path=/tmp/vm1.sock --port up,type=tap,ifname=tap0\n  \
    tern switch run --config switch.toml\n\n\
    Keys of a port: type, path, mode, ifname, xdp-mode, queues, vlan, trunk, mtu, rate, storm;\n\
    docs/switch.md says what they mean.")]
struct RunArgs {
    /// One poll thread on each of these CPUs, as 1,3; without, one thread that runs anywhere
    #[arg(long, value_delimiter = ',')]
    cpus: Vec<usize>,
    /// Control socket
    #[arg(long, value_name = "SOCK")]
    control: Option<PathBuf>,
    /// TOML file; what is said here as well goes first, ports are added
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// When poll threads sleep: adaptive, always (never sleep), interrupt (whenever idle)
    #[arg(long, value_name = "MODE", value_parser = ["adaptive", "always", "interrupt"])]
    poll: Option<String>,
    /// A port: NAME,type=vhost-user|tap|af-packet|af-xdp,key=value,...
    #[arg(long = "port", value_name = "PORT")]
    ports: Vec<String>,
    /// Seconds after which an address is forgotten (300)
    #[arg(long)]
    ageing: Option<u32>,
    /// Addresses that are remembered (8192)
    #[arg(long)]
    macs: Option<usize>,
    /// Serve Prometheus' metrics on this address, as 127.0.0.1:9100
    #[arg(long, value_name = "ADDR")]
    metrics: Option<String>,
}

/// Which switch.
#[derive(clap::Args)]
pub struct To {
    /// The switch's control socket
    #[arg(long, value_name = "SOCK")]
    control: Option<PathBuf>,
}

/// How something is shown.
#[derive(clap::Args)]
pub struct View {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Show it again every second
    #[arg(long)]
    watch: bool,
}

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  tern switch fdb --port vm1\n  \
    tern switch fdb --add 52:54:00:12:34:56 --port vm1")]
struct FdbArgs {
    /// Only of this port
    #[arg(long)]
    port: Option<String>,
    /// Forget what was learned
    #[arg(long, conflicts_with_all = ["json", "watch"])]
    flush: bool,
    /// Tie this address to --port for good
    #[arg(long, value_name = "MAC", requires = "port", conflicts_with_all = ["flush", "json", "watch"])]
    add: Option<String>,
    /// VLAN of --add
    #[arg(long, default_value_t = 0, requires = "add")]
    vlan: u16,
    #[command(flatten)]
    view: View,
    #[command(flatten)]
    to: To,
}

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  tern switch mirror --add m1 --select vm1,vm2 --output probe\n  \
    tern switch mirror\n  tern switch mirror --del m1"
)]
struct MirrorArgs {
    /// Add a mirror of this name
    #[arg(long, value_name = "NAME", requires_all = ["select", "output"])]
    add: Option<String>,
    /// Ports whose frames are copied, as a,b
    #[arg(long, value_delimiter = ',', requires = "add")]
    select: Vec<String>,
    /// The port that gets the copies
    #[arg(long, requires = "add")]
    output: Option<String>,
    /// Only frames that come in from them (rx), or leave to them (tx)
    #[arg(long, value_parser = ["rx", "tx", "both"], default_value = "both", requires = "add")]
    direction: String,
    /// Remove the mirror of this name
    #[arg(long, value_name = "NAME", conflicts_with = "add")]
    del: Option<String>,
    #[command(flatten)]
    view: View,
    #[command(flatten)]
    to: To,
}

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  tern switch capture vm1 vm1.pcap\n  tern switch capture vm1      (ends it)"
)]
struct CaptureArgs {
    /// Name of the port
    port: String,
    /// The file to write; without, captures of the port end
    file: Option<PathBuf>,
    /// Bytes of each frame that are kept, 64 at least
    #[arg(long, default_value_t = 65_553, requires = "file", value_parser = clap::value_parser!(u32).range(64..))]
    snaplen: u32,
    /// Only frames that come in from the port (rx), or leave to it (tx)
    #[arg(long, value_parser = ["rx", "tx", "both"], default_value = "both", requires = "file")]
    direction: String,
    #[command(flatten)]
    to: To,
}

pub fn run(args: &Args) -> Outcome {
    match &args.command {
        Command::Run(a) => serve(a),
        Command::AddPort { port, to } => to.plain("add-port", json!({ "port": port })),
        Command::DelPort { name, to } => to.plain("del-port", json!({ "name": name })),
        Command::SetPort { name, set, to } => {
            to.plain("set-port", json!({ "name": name, "set": set }))
        }
        Command::Show { view, to } => to.show(view, "show", json!({}), switch_show::ports),
        Command::Fdb(a) => fdb(a),
        Command::Stats { port, queues, view, to } => {
            let queues = *queues;
            to.show(view, "stats", json!({ "port": port }), |v| switch_show::stats(v, queues))
        }
        Command::Mirror(a) => mirror(a),
        Command::Capture(a) => capture(a),
        Command::Top { to } => switch_top::run(&mut to.connect()?),
        Command::Metrics { to } => {
            let text = to.connect()?.ask("metrics", &json!({}))?;
            crate::say::text(format_args!("{}", text.as_str().unwrap_or_default()));
            Ok(0)
        }
        Command::Quit { to } => to.plain("quit", json!({})),
    }
}

fn fdb(a: &FdbArgs) -> Outcome {
    if let Some(mac) = &a.add {
        return a.to.plain("fdb-add", json!({ "mac": mac, "vlan": a.vlan, "port": a.port }));
    }
    if a.flush {
        let v = a.to.connect()?.ask("fdb-flush", &json!({ "port": a.port }))?;
        crate::say::say!("{} addresses forgotten", v["flushed"]);
        return Ok(0);
    }
    a.to.show(&a.view, "fdb", json!({ "port": a.port }), switch_show::fdb)
}

/// (rx, tx) of a direction.
fn directions(word: &str) -> (bool, bool) {
    (word != "tx", word != "rx")
}

fn mirror(a: &MirrorArgs) -> Outcome {
    if let Some(name) = &a.add {
        let (rx, tx) = directions(&a.direction);
        let m = json!({ "name": name, "select": a.select, "output": a.output, "rx": rx, "tx": tx });
        return a.to.plain("add-mirror", m);
    }
    if let Some(name) = &a.del {
        return a.to.plain("del-mirror", json!({ "name": name }));
    }
    a.to.show(&a.view, "mirrors", json!({}), switch_show::mirrors)
}

fn capture(a: &CaptureArgs) -> Outcome {
    let Some(file) = &a.file else {
        let v = a.to.connect()?.ask("end-capture", &json!({ "name": a.port }))?;
        crate::say::say!("{} frames, {} left out", v["frames"], v["left-out"]);
        return match v["failed"].as_str() {
            Some(why) => Err(format!("the file could not be written to the end: {why}").into()),
            None => Ok(0),
        };
    };
    // The switch has a working directory of its own.
    let file = std::path::absolute(file)?;
    let (rx, tx) = directions(&a.direction);
    let arguments =
        json!({ "port": a.port, "file": file, "snaplen": a.snaplen, "rx": rx, "tx": tx });
    a.to.plain("capture", arguments)
}

fn serve(a: &RunArgs) -> Outcome {
    let filter = tracing_subscriber::EnvFilter::try_from_env("TERN_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // A log that cannot be written is no reason to stop: telling of it would panic.
        .log_internal_errors(false)
        .init();
    let mut config = match &a.config {
        Some(file) => Config::load(file)?,
        None => Config::default(),
    };
    if !a.cpus.is_empty() {
        config.cpus.clone_from(&a.cpus);
    }
    if let Some(mode) = &a.poll {
        config.poll = serde_json::from_value(json!(mode))?;
    }
    config.ageing = a.ageing.or(config.ageing);
    config.macs = a.macs.or(config.macs);
    config.metrics = a.metrics.clone().or(config.metrics);
    for port in &a.ports {
        config.port.push(PortSpec::parse(port)?);
    }
    let control = a.control.clone().or(config.control.clone()).unwrap_or_else(default_control);
    if let Some(parent) = control.parent().filter(|_| a.control.is_none()) {
        std::fs::create_dir_all(parent)?;
    }
    vswitch::sys::raise_open_files();
    let signals = vswitch::sys::stop_signals()?;
    let mut server = Server::new(&config, &control)?;
    server.stop_on(signals.as_raw_fd())?;
    server.run();
    Ok(0)
}

fn default_control() -> PathBuf {
    crate::runtime_dir::base().join("switch.sock")
}

/// A connection to a running switch.
pub struct Client {
    stream: BufReader<UnixStream>,
    path: PathBuf,
}

impl Client {
    fn connect(path: &Path) -> Result<Self, Box<dyn std::error::Error>> {
        let stream = UnixStream::connect(path).map_err(|e| {
            format!("no switch answers on '{}': {e}; --control names another", path.display())
        })?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream: BufReader::new(stream), path: path.into() })
    }

    /// Sends a command and waits for its answer.
    pub fn ask(
        &mut self,
        command: &str,
        arguments: &Value,
    ) -> Result<Value, Box<dyn std::error::Error>> {
        let request = json!({ "command": command, "arguments": arguments });
        let mut line = String::new();
        let said = self.stream.get_mut().write_all(format!("{request}\n").as_bytes());
        let heard = said.and_then(|()| self.stream.read_line(&mut line));
        let path = self.path.display();
        match heard {
            Ok(0) => return Err(format!("the switch on '{path}' has gone").into()),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                let seconds = PATIENCE.as_secs();
                return Err(format!(
                    "the switch on '{path}' did not answer within {seconds} s; look whether its \
                     process was stopped"
                )
                .into());
            }
            Err(e) => return Err(format!("the switch on '{path}' hung up: {e}").into()),
        }
        let mut answer: Value = serde_json::from_str(&line)?;
        match answer["error"].as_str() {
            Some(e) => Err(e.into()),
            None => Ok(answer["return"].take()),
        }
    }
}

impl To {
    fn connect(&self) -> Result<Client, Box<dyn std::error::Error>> {
        Client::connect(&self.control.clone().unwrap_or_else(default_control))
    }

    fn plain(&self, command: &str, arguments: Value) -> Outcome {
        self.connect()?.ask(command, &arguments)?;
        Ok(0)
    }

    fn show(
        &self,
        view: &View,
        command: &str,
        arguments: Value,
        text: impl Fn(&Value) -> String,
    ) -> Outcome {
        let mut client = self.connect()?;
        loop {
            let v = client.ask(command, &arguments)?;
            let shown = if view.json { format!("{v}\n") } else { text(&v) };
            let mut out = std::io::stdout().lock();
            out.write_all(shown.as_bytes())?;
            out.flush()?;
            if !view.watch {
                return Ok(0);
            }
            std::thread::sleep(Duration::from_secs(1));
            if !view.json {
                writeln!(out)?;
            }
        }
    }
}
