//! Who switches: Tern, Open vSwitch-DPDK in two configurations, and testpmd's net_vhost, which does
//! not switch at all and shows what the rings alone cost. Each has CPU 1 (and more, where several
//! poll threads are asked for) to itself.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::stage::Stage;
use crate::Result;
use crate::bench::load::Process;

const OVS_VSWITCHD: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
const OVS_SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
/// A contestant is up by then.
const PATIENCE: Duration = Duration::from_secs(30);

/// Who takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    /// `--poll always`, as a PMD thread does.
    Tern,
    /// `--poll adaptive`, the default.
    TernAdaptive,
    /// One OpenFlow rule a port.
    OvsRule,
    /// The learning switch.
    OvsNormal,
    /// testpmd, io forwarding between net_vhost ports.
    RawVhost,
}

impl Contestant {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Tern, Self::TernAdaptive, Self::OvsRule, Self::OvsNormal, Self::RawVhost];

    /// In reports, and for `--who`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tern => "tern",
            Self::TernAdaptive => "tern-adaptive",
            Self::OvsRule => "ovs-rule",
            Self::OvsNormal => "ovs-normal",
            Self::RawVhost => "raw-vhost",
        }
    }

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Tern => "Tern, --poll always",
            Self::TernAdaptive => "Tern, --poll adaptive",
            Self::OvsRule => "OVS-DPDK, one rule a port",
            Self::OvsNormal => "OVS-DPDK, NORMAL",
            Self::RawVhost => "net_vhost, no switching",
        }
    }

    /// Whether it is Tern.
    pub fn is_ours(self) -> bool {
        matches!(self, Self::Tern | Self::TernAdaptive)
    }
}

/// A switch that runs; it ends with this.
pub struct Running {
    who: Contestant,
    /// Before the database, so that it ends first.
    process: Process,
    _database: Option<Process>,
    tern: std::path::PathBuf,
    control: std::path::PathBuf,
}

/// What is wanted of a switch.
pub struct Wanted<'a> {
    /// Tern's binary.
    pub tern: &'a Path,
    /// Sockets on which the other side listens.
    pub sockets: &'a [std::path::PathBuf],
    /// Queues of each port.
    pub queues: usize,
    /// CPUs of poll threads.
    pub cpus: &'a [usize],
    /// Addresses to remember.
    pub macs: usize,
}

impl Running {
    /// Starts `who`, which connects to all sockets as soon as somebody listens.
    pub fn start(who: Contestant, stage: &Stage, wanted: &Wanted<'_>) -> Result<Self> {
        match who {
            Contestant::Tern => Self::tern(who, "always", stage, wanted),
            Contestant::TernAdaptive => Self::tern(who, "adaptive", stage, wanted),
            Contestant::OvsRule | Contestant::OvsNormal => Self::ovs(who, stage, wanted),
            Contestant::RawVhost => Self::raw_vhost(stage, wanted),
        }
    }

    /// Lets it stand still or go on.
    pub fn stand_still(&self, still: bool) {
        self.process.stand_still(still);
    }

    /// Processor seconds that the switch has used.
    pub fn used(&self) -> f64 {
        self.process.used()
    }

    fn tern(who: Contestant, poll: &str, stage: &Stage, wanted: &Wanted<'_>) -> Result<Self> {
        let control = stage.path("tern.sock");
        let _ = std::fs::remove_file(&control);
        let mut command = stage.command(wanted.tern, "tern.log")?;
        command.args(["switch", "run", "--poll", poll, "--control"]).arg(&control);
        command.args(["--cpus", &numbers(wanted.cpus), "--macs", &wanted.macs.to_string()]);
        for (i, socket) in wanted.sockets.iter().enumerate() {
            let (path, queues) = (socket.display(), wanted.queues);
            command.arg("--port");
            command.arg(format!("p{i},type=vhost-user,path={path},mode=client,queues={queues}"));
        }
        let process = Process::start(&mut command)?;
        let until = Instant::now() + PATIENCE;
        while !control.exists() {
            if Instant::now() > until {
                return Err(format!("tern switch does not come up: {}", stage.log("tern.log")));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let tern = wanted.tern.to_path_buf();
        Ok(Self { who, process, _database: None, tern, control })
    }

    fn raw_vhost(stage: &Stage, wanted: &Wanted<'_>) -> Result<Self> {
        let mut command = stage.command("dpdk-testpmd", "vhost.log")?;
        let cpu = wanted.cpus.first().copied().unwrap_or(1);
        command.args(["--lcores", &format!("0@{cpu},1@{cpu}"), "--in-memory"]);
        command.args(["--single-file-segments", "--no-pci", "-m", "512"]);
        for (i, socket) in wanted.sockets.iter().enumerate() {
            let path = socket.display();
            command.arg("--vdev").arg(format!("net_vhost{i},iface={path},client=1,queues=1"));
        }
        command.args(["--", "--nb-cores=1", "--txd=1024", "--rxd=1024", "--disable-link-check"]);
        // Without -i it forwards until its standard input ends or says something.
        command.stdin(std::process::Stdio::piped());
        let process = Process::start(&mut command)?;
        let tern = wanted.tern.to_path_buf();
        let who = Contestant::RawVhost;
        Ok(Self { who, process, _database: None, tern, control: stage.path("none") })
    }

    fn ovs(who: Contestant, stage: &Stage, wanted: &Wanted<'_>) -> Result<Self> {
        let database = stage.path("ovs.db");
        let _ = std::fs::remove_file(&database);
        let mut create = stage.command("ovsdb-tool", "ovsdb-tool.log")?;
        crate::host::must(create.arg("create").arg(&database).arg(OVS_SCHEMA), "ovsdb-tool")?;
        let (socket, control) = (stage.path("ovsdb.sock"), stage.path("ovs.ctl"));
        // Of the last run: they would be taken for this one's.
        for old in [&socket, &control] {
            let _ = std::fs::remove_file(old);
        }
        let of = |name: &str| format!("{name}:{}", socket.display());
        let mut server = in_dir(stage, stage.command("ovsdb-server", "ovsdb-server.log")?);
        server.arg(&database).arg("--remote").arg(of("punix"));
        server.arg(format!("--unixctl={}", stage.path("ovsdb.ctl").display()));
        let server = Process::start(&mut server)?;
        wait_for(&socket)?;
        let vsctl = |words: &[&str]| -> Result<()> {
            let mut c = stage.command("ovs-vsctl", "ovs-vsctl.log")?;
            c.arg(format!("--db={}", of("unix"))).args(["-t", "20"]).args(words);
            crate::host::must(&mut c, "ovs-vsctl")
                .map_err(|e| format!("{e}: {}", stage.log("ovs-vsctl.log")))
        };
        vsctl(&["--no-wait", "init"])?;
        let mask = wanted.cpus.iter().fold(0u64, |bits, cpu| bits | 1 << cpu);
        let mask = format!("other_config:pmd-cpu-mask={mask:#x}");
        let dpdk = [
            "other_config:dpdk-init=true",
            "other_config:dpdk-lcore-mask=0x1",
            "other_config:dpdk-socket-mem=512",
        ];
        vsctl(&[&["--no-wait", "set", "Open_vSwitch", ".", &mask], &dpdk[..]].concat())?;
        let mut switch = in_dir(stage, stage.command(OVS_VSWITCHD, "ovs-vswitchd.log")?);
        switch.arg(of("unix")).arg(format!("--unixctl={}", control.display()));
        let process = Process::start(&mut switch)?;
        vsctl(&["add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev"])?;
        let macs = format!("other_config:mac-table-size={}", wanted.macs);
        vsctl(&["set", "bridge", "br0", &macs])?;
        for (i, socket) in wanted.sockets.iter().enumerate() {
            let (name, number) = (format!("p{i}"), format!("ofport_request={}", i + 1));
            let path = format!("options:vhost-server-path={}", socket.display());
            let kind = "type=dpdkvhostuserclient";
            let set = ["--", "set", "Interface", &name, kind, &path, &number];
            vsctl(&[&["add-port", "br0", &name], &set[..]].concat())?;
        }
        if who == Contestant::OvsRule {
            let bridge = format!("unix:{}", stage.path("br0.mgmt").display());
            let ofctl = |words: &[&str]| -> Result<()> {
                let mut c = stage.command("ovs-ofctl", "ovs-ofctl.log")?;
                crate::host::must(c.arg(words[0]).arg(&bridge).args(&words[1..]), "ovs-ofctl")
            };
            ofctl(&["del-flows"])?;
            for i in 1..=wanted.sockets.len() {
                // Ports in pairs: 1 and 2, 3 and 4.
                let other = if i % 2 == 1 { i + 1 } else { i - 1 };
                ofctl(&["add-flow", &format!("in_port={i},actions=output:{other}")])?;
            }
        }
        let tern = wanted.tern.to_path_buf();
        Ok(Self { who, process, _database: Some(server), tern, control })
    }

    /// Tern's own answer to a command of its control socket.
    pub fn ask(&self, command: &str) -> Result<Value> {
        let out = Command::new(&self.tern)
            .args(["switch", command, "--json", "--control"])
            .arg(&self.control)
            .output()
            .map_err(|e| format!("tern switch {command}: {e}"))?;
        serde_json::from_slice(&out.stdout).map_err(|e| format!("tern switch {command}: {e}"))
    }

    /// What Tern dropped, by port and reason; `None` of others.
    pub fn drops(&self) -> Result<Option<Value>> {
        if !self.who.is_ours() {
            return Ok(None);
        }
        let stats = self.ask("stats")?;
        let ports = stats["ports"].as_array().into_iter().flatten();
        let dropped = ports.filter(|p| p["drops"].as_object().is_some_and(|d| !d.is_empty()));
        let named = dropped
            .map(|p| (p["name"].as_str().unwrap_or_default().to_owned(), p["drops"].clone()));
        Ok(Some(Value::Object(named.collect())))
    }

    /// Whether frames go to one port each, as learned, instead of to all: checked after a run.
    pub fn check(&self) -> Result<()> {
        match self.who {
            Contestant::Tern | Contestant::TernAdaptive => {
                let stats = self.ask("stats")?;
                let sum = |key: &str| -> u64 {
                    let ports = stats["ports"].as_array().into_iter().flatten();
                    ports.filter_map(|p| p[key].as_u64()).sum()
                };
                let (flooded, all) = (sum("flooded"), sum("rx-frames"));
                // The first frame to each address, which nobody has learned yet.
                if flooded * 100 > all + 1000 {
                    return Err(format!("tern flooded {flooded} of {all} frames"));
                }
                Ok(())
            }
            Contestant::OvsRule | Contestant::OvsNormal => {
                let out = Command::new("ovs-appctl")
                    .arg("-t")
                    .arg(&self.control)
                    .arg("dpctl/dump-flows")
                    .output()
                    .map_err(|e| format!("ovs-appctl: {e}"))?;
                let flows = String::from_utf8_lossy(&out.stdout).into_owned();
                let floods = |line: &str| {
                    line.split("actions:").nth(1).is_none_or(|a| a.contains(',') || a == "drop")
                };
                let bad: Vec<&str> =
                    flows.lines().filter(|l| l.contains("in_port") && floods(l)).collect();
                if bad.is_empty() { Ok(()) } else { Err(format!("OVS floods: {bad:?}")) }
            }
            Contestant::RawVhost => Ok(()),
        }
    }
}

fn numbers(cpus: &[usize]) -> String {
    cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Open vSwitch's own directories.
fn in_dir(stage: &Stage, mut command: Command) -> Command {
    for name in ["OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR", "OVS_SYSCONFDIR"] {
        command.env(name, &stage.dir);
    }
    command
}

fn wait_for(path: &Path) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while !path.exists() {
        if Instant::now() > until {
            return Err(format!("{} does not appear", path.display()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
