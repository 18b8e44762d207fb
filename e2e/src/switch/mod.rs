//! `tern switch` as a process that a test starts, asks, and kills.

pub mod guest;
pub mod traffic;

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::Context;
use crate::testbed::Bed;
use crate::vmm::prepare_child;
use crate::{Error, Result};

/// How long the switch may take to start or to answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often its state is asked for.
const LOOK: Duration = Duration::from_millis(1);

/// A bed for a test of the switch, or why it does not run here.
pub fn bed(name: &str) -> Option<Bed> {
    if program().is_none() {
        println!(
            "skipped: {name} needs guests; `cargo xtask test` runs it (TERN_SWITCH is not set)"
        );
        return None;
    }
    Bed::new(name)
}

/// The `tern` whose switch is tested.
fn program() -> Option<PathBuf> {
    std::env::var_os("TERN_SWITCH").map(PathBuf::from)
}

/// Who listens on a vhost-user port's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listens {
    /// The port's `mode` is `server`.
    Switch,
    /// The port's `mode` is `client`.
    Peer,
}

/// A vhost-user port's description, with its socket in the bed.
pub fn port(bed: &Bed, name: &str, listens: Listens, more: &str) -> String {
    let mode = match listens {
        Listens::Switch => "server",
        Listens::Peer => "client",
    };
    format!("{name},type=vhost-user,path={},mode={mode}{more}", socket(bed, name).display())
}

/// The socket of a port.
pub fn socket(bed: &Bed, name: &str) -> PathBuf {
    bed.dir.join(format!("{name}.sock"))
}

/// A switch that runs. Dropping it kills it.
pub struct Switch {
    dir: PathBuf,
    ports: Vec<String>,
    child: Child,
}

impl Switch {
    /// Starts one with its files in the bed, and waits until it answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn start(bed: &Bed, ports: &[String]) -> Result<Self> {
        let dir = bed.dir.join("switch");
        fs::create_dir_all(&dir).context(|| format!("{}", dir.display()))?;
        let child = spawn(&dir, ports)?;
        let mut switch = Self { dir, ports: ports.to_vec(), child };
        switch.wait_for_answer()?;
        Ok(switch)
    }

    /// Ends it as a crash would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again as it was started, and waits until it answers.
    ///
    /// # Errors
    /// When it does not.
    pub fn start_again(&mut self) -> Result<()> {
        self.child = spawn(&self.dir, &self.ports)?;
        self.wait_for_answer()
    }

    fn wait_for_answer(&mut self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while self.ask("show", Value::Null).is_err() {
            if let Ok(Some(status)) = self.child.try_wait() {
                let said = fs::read_to_string(self.dir.join("stderr.log")).unwrap_or_default();
                return Err(Error::Host(format!("the switch ended ({status}): {said}")));
            }
            if Instant::now() > until {
                return Err(timeout("the switch's answer", PATIENCE));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs a command of its control socket.
    ///
    /// # Errors
    /// Nobody answers, or it is refused.
    pub fn ask(&self, command: &str, arguments: Value) -> Result<Value> {
        let what = || format!("the switch's {command}");
        let mut stream = UnixStream::connect(self.dir.join("control")).context(what)?;
        stream.set_read_timeout(Some(PATIENCE)).context(what)?;
        let request = json!({ "command": command, "arguments": arguments });
        stream.write_all(format!("{request}\n").as_bytes()).context(what)?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).context(what)?;
        let mut answer: Value = serde_json::from_str(&line)
            .map_err(|e| Error::Protocol(format!("{}: {line:?}: {e}", what())))?;
        match answer.get("error") {
            Some(e) => Err(Error::Protocol(format!("{}: {e}", what()))),
            None => Ok(answer["return"].take()),
        }
    }

    /// What was counted at a port.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn stats(&self, port: &str) -> Result<Counted> {
        let all = self.ask("stats", json!({ "port": port }))?;
        Ok(Counted(all["ports"][0].clone()))
    }

    /// The port that an address was last seen at.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn port_of(&self, mac: &str) -> Result<Option<String>> {
        let fdb = self.ask("fdb", Value::Null)?;
        let entry = fdb.as_array().into_iter().flatten().find(|e| e["mac"] == mac);
        Ok(entry.and_then(|e| e["port"].as_str()).map(str::to_owned))
    }

    /// Waits until something is so, looked at each millisecond.
    ///
    /// # Errors
    /// When that takes longer than `patience`.
    pub fn wait(
        &self,
        what: &str,
        patience: Duration,
        is_so: impl Fn(&Self) -> Result<bool>,
    ) -> Result<()> {
        let until = Instant::now() + patience;
        while !is_so(self)? {
            if Instant::now() > until {
                let stands = self.ask("stats", Value::Null)?;
                return Err(timeout(&format!("{what} (the switch counted {stands:#})"), patience));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.kill();
    }
}

fn timeout(what: &str, patience: Duration) -> Error {
    Error::Timeout { what: what.to_owned(), seconds: patience.as_secs() }
}

fn spawn(dir: &Path, ports: &[String]) -> Result<Child> {
    let log = dir.join("stderr.log");
    let log: File = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .context(|| format!("{}", log.display()))?;
    let program = program().unwrap_or_else(|| "tern".into());
    let mut command = Command::new(&program);
    command.args(["switch", "run", "--control"]).arg(dir.join("control"));
    for port in ports {
        command.args(["--port", port]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    prepare_child(&mut command, None);
    command.spawn().context(|| format!("cannot start {}", program.display()))
}

/// A port's counters.
#[derive(Clone, Debug)]
pub struct Counted(Value);

impl Counted {
    /// One of them, as the switch names it.
    pub fn get(&self, name: &str) -> u64 {
        self.0[name].as_u64().unwrap_or(0)
    }

    /// Frames dropped for a reason.
    pub fn drops(&self, reason: &str) -> u64 {
        self.0["drops"][reason].as_u64().unwrap_or(0)
    }

    /// Mean length of the frames that came in since `before`.
    pub fn mean_length_since(&self, before: &Self) -> u64 {
        let since = |name| self.get(name) - before.get(name);
        since("rx-bytes") / since("rx-frames").max(1)
    }
}

impl std::fmt::Display for Counted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.0)
    }
}
