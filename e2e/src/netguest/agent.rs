//! Process 1: mounts, modules, and a server of commands on the second serial line.
//!
//! A line `{"run":"COMMAND"}` is given to a shell; the answer is a line
//! `{"status":N,"output":"..."}` when it has ended. What is to run on is put into the background with
//! its output redirected.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::guest::init;

/// The line that says that commands are taken.
pub const READY: &str = "TERN-NET READY";
/// The serial line of commands.
const TTY: &str = "/dev/ttyS1";

/// What is to be run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    /// For a shell.
    pub run: String,
}

/// What came of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
    /// Exit status; -1 after a signal.
    pub status: i32,
    /// Standard output and error.
    pub output: String,
}

fn shell(command: &str) -> Answer {
    let out = Command::new("/bin/busybox")
        .args(["sh", "-c", &format!("exec 2>&1; {command}")])
        .env("PATH", "/usr/bin:/bin")
        .stdin(Stdio::null())
        .output();
    match out {
        Ok(out) => Answer {
            status: out.status.code().unwrap_or(-1),
            output: String::from_utf8_lossy(&out.stdout).into_owned(),
        },
        Err(e) => Answer { status: -1, output: e.to_string() },
    }
}

fn answer(line: &str) -> Answer {
    match serde_json::from_str::<Order>(line) {
        Ok(order) => shell(&order.run),
        Err(e) => Answer { status: -1, output: e.to_string() },
    }
}

fn serve(mut tty: File) -> std::io::Result<()> {
    let lines = BufReader::new(tty.try_clone()?).lines();
    writeln!(tty, "{READY}")?;
    for line in lines {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        let answer = serde_json::to_string(&answer(&line)).map_err(std::io::Error::other)?;
        tty.write_all(format!("{answer}\n").as_bytes())?;
    }
    Ok(())
}

/// Runs the guest; never comes back.
pub fn main() -> ! {
    init::prepare();
    let applets = Command::new("/bin/busybox").args(["--install", "-s", "/bin"]).status();
    init::complain("busybox", applets.map(drop));
    shell("ip link set lo up");
    init::complain("serial line", init::serial(TTY).and_then(serve));
    init::stop(false)
}
