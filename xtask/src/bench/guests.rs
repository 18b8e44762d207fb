//! What the benchmarks with real guests share: `tern-bench` runs where guests can run, on this
//! host's KVM or on the lab host, with Tern and QEMU in turns.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::{load, median, out_dir};
use crate::host::{self, Host};
use crate::{Result, guest, setup};

/// A run of all contestants is over by then.
const LIMIT: Duration = Duration::from_secs(900);

/// How long a quiet moment is waited for.
const QUIET: Duration = Duration::from_secs(60);

/// Arguments of every benchmark with guests.
#[derive(clap::Args)]
pub struct GuestArgs {
    /// Runs of each VMM
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// Always on the lab host, even when this host's KVM could do it
    #[arg(long)]
    lab: bool,
    /// The guest's CPUs
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Another binary of Tern than the one that is built for it
    #[arg(long, value_name = "PATH")]
    tern: Option<PathBuf>,
}

/// One contestant's runs.
pub struct Row {
    /// Its name in the table.
    pub name: String,
    runs: Vec<Value>,
}

impl Row {
    /// A figure of each run.
    pub fn values(&self, figure: &str) -> Vec<f64> {
        let number = |run: &Value| run.get(figure).and_then(Value::as_f64).unwrap_or(f64::NAN);
        self.runs.iter().map(number).collect()
    }

    /// The median of a figure.
    pub fn median(&self, figure: &str) -> f64 {
        median(&self.values(figure))
    }

    /// The largest of a figure.
    pub fn worst(&self, figure: &str) -> f64 {
        self.values(figure).into_iter().fold(f64::NAN, f64::max)
    }
}

/// Measures `what`; rows are Tern, QEMU, in this order, and `host` is `native` or `lab`. The JSON of
/// all runs goes to target/bench/WHAT.json.
pub fn measure(what: &str, args: &GuestArgs, more: &[&str]) -> Result<(Vec<Row>, &'static str)> {
    setup::ensure(&[setup::LAB, setup::DEMO].concat())?;
    let bins = host::build_release(&["tern", "e2e"], &["tern", "tern-bench"])?;
    let guest = guest::ensure()?;
    let built = bins.join("tern");
    let host = if args.lab { Host::Lab } else { Host::choose(&built) };
    let tern = match &args.tern {
        Some(path) => std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))?,
        None => built,
    };
    let qemu = crate::qemu::newest()?;
    let out = out_dir()?.join(format!("{what}.json"));
    let _ = fs::remove_file(&out);
    let command = qemu.command();
    let mut peer = OsString::from(format!("QEMU {}=", qemu.version));
    peer.push(command.get_program());
    for arg in command.get_args() {
        peer.push(",");
        peer.push(arg);
    }
    let mut ours = OsString::from("Tern=");
    ours.push(tern);
    let mut argv: Vec<OsString> = vec![bins.join("tern-bench").into(), what.into()];
    argv.extend(["--runs".into(), args.runs.to_string().into()]);
    argv.extend(["--cpus".into(), args.cpus.to_string().into()]);
    argv.extend(["--vmm".into(), ours, "--vmm".into(), peer]);
    argv.extend([
        "--kernel".into(),
        guest.kernel.into(),
        "--initrd".into(),
        guest.initramfs.into(),
    ]);
    argv.extend(["--out".into(), out.clone().into()]);
    argv.extend(more.iter().map(OsString::from));
    if !load::wait_quiet(QUIET) {
        println!("This machine is busy with other work: figures will be worse than they could be.");
    }
    let code = host.run(&argv, &[], LIMIT)?;
    if code != 0 {
        return Err(format!("tern-bench {what} ended with status {code}"));
    }
    let text = fs::read(&out).map_err(|e| format!("{}: {e}", out.display()))?;
    let mut result: Value =
        serde_json::from_slice(&text).map_err(|e| format!("{}: {e}", out.display()))?;
    result["host"] = host.name().into();
    let text = serde_json::to_string_pretty(&result).unwrap_or_default();
    fs::write(&out, text + "\n").map_err(|e| format!("{}: {e}", out.display()))?;
    let rows = result["vmms"].as_array().cloned().unwrap_or_default().into_iter().map(|row| Row {
        name: row["name"].as_str().unwrap_or_default().to_owned(),
        runs: row["runs"].as_array().cloned().unwrap_or_default(),
    });
    let rows: Vec<Row> = rows.collect();
    if rows.len() < 2 || rows.iter().any(|r| r.runs.is_empty()) {
        return Err(format!("{} lacks runs", out.display()));
    }
    println!("\n({} host; all runs: {})", host.name(), out.display());
    Ok((rows, host.name()))
}

/// `met` or `missed`, for the line below a table.
pub fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "missed" }
}
