//! The load: DPDK's testpmd with two virtio-user ports. It sends what it receives at one port out of
//! the other, through the switch, for ever; the same frames go round all the time.

use std::io::Write;
use std::path::PathBuf;
use std::process::{ChildStdin, Stdio};
use std::time::{Duration, Instant};

use super::stage::Stage;
use crate::Result;
use crate::bench::load::Process;

/// It is up, and has answered, by then.
const PATIENCE: Duration = Duration::from_secs(40);
const LOG: &str = "testpmd.log";

/// What the frames are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frames {
    /// All of one size, in bytes without the checksum.
    Size(u32),
    /// Simple IMIX: 7 of 64 bytes, 4 of 590, 1 of 1514, in turns.
    Imix,
}

impl Frames {
    /// In tables and reports, and for `--only`.
    pub fn name(self) -> String {
        match self {
            Self::Size(n) => n.to_string(),
            Self::Imix => "imix".into(),
        }
    }
}

/// testpmd, both of whose ports are connected.
pub struct Testpmd {
    process: Process,
    stdin: ChildStdin,
}

/// Its address at port `i`.
fn mac(i: usize) -> String {
    format!("02:00:00:00:00:a{i}")
}

impl Testpmd {
    /// Starts it on the CPUs `cpus`, one for each poll thread of its own; it listens at `sockets` and
    /// waits there for the switch.
    pub fn start(
        stage: &Stage,
        sockets: &[PathBuf],
        queues: usize,
        cpus: &[usize],
    ) -> Result<Self> {
        for socket in sockets {
            let _ = std::fs::remove_file(socket);
        }
        // Lines as they are printed, not when its buffer is full.
        let mut command = stage.command("stdbuf", LOG)?;
        command.args(["-oL", "dpdk-testpmd"]);
        let mut lcores = vec![format!("0@{}", cpus[0])];
        lcores.extend(cpus.iter().enumerate().map(|(i, cpu)| format!("{}@{cpu}", i + 1)));
        command.args(["--lcores", &lcores.join(","), "--in-memory", "--single-file-segments"]);
        command.args(["--no-pci", "-m", "512", "--file-prefix", "load"]);
        for (i, socket) in sockets.iter().enumerate() {
            let (path, mac) = (socket.display(), mac(i));
            command.arg("--vdev").arg(format!(
                "net_virtio_user{i},mac={mac},path={path},server=1,queues={queues},queue_size=1024"
            ));
        }
        command.args(["--", "-i", "--txd=1024", "--rxd=1024", "--no-flush-rx"]);
        command.args([format!("--nb-cores={}", cpus.len())]);
        command.args([format!("--rxq={queues}"), format!("--txq={queues}")]);
        for i in 0..sockets.len() {
            command.arg(format!("--eth-peer={i},{}", mac(i ^ 1)));
        }
        command.stdin(Stdio::piped());
        let mut process = Process::start(&mut command)?;
        let stdin = process.0.stdin.take().ok_or("testpmd has no standard input")?;
        let mut this = Self { process, stdin };
        // It reads commands when both ports have met the switch.
        this.say("show port summary all")?;
        let last = format!("{} ", sockets.len() - 1);
        let up = |log: &str| log.lines().any(|l| l.starts_with(&last) && l.contains("02:00"));
        let until = Instant::now() + PATIENCE;
        while !up(&stage.log(LOG).to_lowercase()) {
            let ended = this.process.0.try_wait().is_ok_and(|s| s.is_some());
            if ended || Instant::now() > until {
                return Err(format!("testpmd does not come up: {}", stage.log(LOG)));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        // The switch takes the rings up a moment after the last message.
        std::thread::sleep(Duration::from_millis(500));
        Ok(this)
    }

    /// Lets it stand still or go on.
    pub fn stand_still(&self, still: bool) {
        self.process.stand_still(still);
    }

    /// Processor seconds so far.
    pub fn used(&self) -> f64 {
        self.process.used()
    }

    fn say(&mut self, line: &str) -> Result<()> {
        writeln!(self.stdin, "{line}").map_err(|e| format!("testpmd is gone: {e}"))
    }

    /// Takes frames that go round away, and puts `frames` on the way: 256 in each direction, or
    /// about so many.
    pub fn load(&mut self, frames: Frames) -> Result<()> {
        self.say("stop\nset fwd rxonly\nstart")?;
        std::thread::sleep(Duration::from_millis(300));
        self.say("stop\nset fwd io\nset burst 32")?;
        match frames {
            Frames::Size(size) => self.say(&format!("set txpkts {size}\nstart tx_first 8"))?,
            Frames::Imix => {
                for _ in 0..21 {
                    for (count, size) in [(7, 64), (4, 590), (1, 1514)] {
                        self.say(&format!("set burst {count}\nset txpkts {size}"))?;
                        self.say("start tx_first 1\nstop")?;
                    }
                }
                self.say("set burst 32\nstart")?;
            }
        }
        Ok(())
    }

    /// Frames a second that its ports received together, over about `time`.
    pub fn rate(&mut self, stage: &Stage, ports: usize, time: Duration) -> Result<f64> {
        let before = self.received(stage, ports)?;
        std::thread::sleep(time);
        let after = self.received(stage, ports)?;
        let seconds = after.1.duration_since(before.1).as_secs_f64();
        Ok(after.0.wrapping_sub(before.0) as f64 / seconds)
    }

    /// Frames received, and when.
    fn received(&mut self, stage: &Stage, ports: usize) -> Result<(u64, Instant)> {
        const MARK: &str = "RX-packets:";
        let seen = stage.log(LOG).matches(MARK).count();
        self.say("show port stats all")?;
        let until = Instant::now() + PATIENCE;
        loop {
            let log = stage.log(LOG);
            let numbers: Vec<u64> = log
                .split(MARK)
                .skip(1 + seen)
                .filter_map(|s| s.split_whitespace().next()?.parse().ok())
                .collect();
            if numbers.len() >= ports {
                return Ok((numbers.iter().take(ports).sum(), Instant::now()));
            }
            if Instant::now() > until {
                return Err(format!("testpmd does not answer: {log}"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        // An orderly end tells the switch; the process is killed in any case.
        if self.say("stop\nquit").is_ok() {
            let until = Instant::now() + Duration::from_secs(3);
            while Instant::now() < until && self.process.0.try_wait().is_ok_and(|s| s.is_none()) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}
