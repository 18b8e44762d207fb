//! `cargo xtask demo`: a working guest is live-migrated back and forth, and everything is checked.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::host::{self, Host};
use crate::{Result, guest, paths, setup};

/// A demo that hangs is ended after that.
const LIMIT: Duration = Duration::from_secs(300);

/// `cargo xtask demo`'s arguments.
#[derive(clap::Args)]
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
    let argv: [OsString; 13] = [
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
    let code = host.run(&argv, &[], LIMIT)?;
    if code == 0 {
        println!("report: {0}/report.json  picture: {0}/timeline.svg", out.display());
    }
    println!("({:.0} s on the {} host)", started.elapsed().as_secs_f64(), host.name());
    Ok(code)
}
