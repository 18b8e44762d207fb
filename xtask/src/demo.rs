//! `cargo xtask demo`: a working guest is live-migrated back and forth, and everything is checked.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::host::{self, Host};
use crate::{Result, guest, paths, setup};

/// A demo that hangs is ended after that.
const LIMIT: Duration = Duration::from_secs(300);

/// tern-demo's exit status when the guest was lost as an emulated host is known to lose one: by a
/// triple fault, or so that it no longer answers. `e2e::loss::EXIT`.
const GUEST_LOST: u8 = 75;
/// Set to a number, it has the first run lose its guest after so many migrations, to try what is
/// done then.
const LOSE: &str = "TERN_DEMO_LOSE";

/// `cargo xtask demo`'s arguments.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  cargo xtask demo --trips 1")]
pub struct DemoArgs {
    /// Another VMM that takes QEMU's command line, to compare with
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// Times there and back
    #[arg(long, default_value_t = 3)]
    trips: u32,
    /// Always on the lab host, even when this host's KVM could do it
    #[arg(long)]
    lab: bool,
    /// Where report.json and timeline.svg go [default: target/demo]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

fn absolute(path: PathBuf) -> Result<PathBuf> {
    std::path::absolute(&path).map_err(|e| format!("{}: {e}", path.display()))
}

/// Runs the demo; its exit status.
pub fn run(args: DemoArgs) -> Result<u8> {
    setup::ensure(&[setup::LAB, setup::DEMO].concat())?;
    let bins = host::build_release(&["tern", "e2e"], &["tern", "tern-demo"])?;
    let guest = guest::ensure()?;
    let tern = bins.join("tern");
    let host = if args.lab { Host::Lab } else { Host::choose(&tern) };
    let out = absolute(args.out.unwrap_or_else(|| paths::target().join("demo")))?;
    if host == Host::Lab && !out.starts_with(paths::target()) {
        return Err(format!("the lab host can write below {} only", paths::target().display()));
    }
    let vmm = args.vmm.map_or(Ok(tern), absolute)?;
    let argv = vec![
        bins.join("tern-demo").into(),
        "--vmm".into(),
        vmm.into(),
        "--kernel".into(),
        guest.kernel.into(),
        "--initrd".into(),
        guest.initramfs.into(),
        "--out".into(),
        out.clone().into(),
        "--host".into(),
        host.name().into(),
        "--trips".into(),
        args.trips.to_string().into(),
    ];
    let started = Instant::now();
    for old in ["report.json", "report-1.json", "timeline.svg"] {
        let _ = fs::remove_file(out.join(old));
    }
    let mut first: Vec<OsString> = argv.clone();
    if let Some(number) = std::env::var_os(LOSE) {
        first.extend(["--lose-after".into(), number]);
    }
    let mut code = host.run(&first, &[], LIMIT)?;
    if code == GUEST_LOST && host == Host::Lab {
        keep_first(&out);
        println!(
            "\nxtask: the lab host's emulated CPU is known to lose a guest now and then \
             (docs/architecture.md, \"The lab\"): the demo runs once more, on a new one. \
             The first run's report is {}, its logs are in {}.",
            out.join("report-1.json").display(),
            out.join("logs-1").display()
        );
        code = host.run(&argv, &[], LIMIT)?;
    }
    if out.join("report.json").exists() {
        println!("report: {0}/report.json  picture: {0}/timeline.svg", out.display());
    }
    println!("({:.0} s on the {} host)", started.elapsed().as_secs_f64(), host.name());
    // What tern-demo tells this program is not for its caller: a demo that lost its guest failed.
    Ok(if code == GUEST_LOST { 1 } else { code })
}

/// Keeps what the first run left.
fn keep_first(out: &Path) {
    let _ = fs::remove_dir_all(out.join("logs-1"));
    for (from, to) in [("report.json", "report-1.json"), ("logs", "logs-1")] {
        let _ = fs::rename(out.join(from), out.join(to));
    }
}
