//! `cargo xtask bench`: figures beside those of the peers, measured in the same run. What is
//! printed also goes to target/bench/NAME.json; docs/benchmarks.md explains the figures.

pub mod blackout;
pub mod boot;
pub mod footprint;
pub mod guests;
pub mod load;
pub mod migrate;
pub mod picture;
pub mod placement;
pub mod qmp;
pub mod switch;

use std::path::PathBuf;

use clap::Subcommand;

use crate::{Result, paths};

/// What can be measured.
#[derive(Subcommand)]
pub enum Bench {
    /// How fast a stopped guest's memory moves over loopback TCP: Tern, QEMU, iperf3
    Migrate(migrate::MigrateArgs),
    /// How long a guest that dirties memory stands still when it moves: Tern, QEMU
    Blackout(blackout::BlackoutArgs),
    /// From the start of the process to the guest's init: Tern, QEMU
    Boot(boot::BootArgs),
    /// Memory that the VMM takes beyond the guest's
    Footprint(footprint::FootprintArgs),
    /// How fast the switch is per core: Tern, Open vSwitch-DPDK, testpmd as the load
    Switch(switch::SwitchArgs),
}

/// Runs a benchmark; its exit status.
pub fn run(bench: Bench) -> Result<u8> {
    match bench {
        Bench::Migrate(args) => migrate::run(&args),
        Bench::Blackout(args) => blackout::run(&args),
        Bench::Boot(args) => boot::run(&args),
        Bench::Footprint(args) => footprint::run(&args),
        Bench::Switch(args) => switch::run(&args),
    }
}

/// Where results go; made when it is missing.
pub fn out_dir() -> Result<PathBuf> {
    let dir = paths::target().join("bench");
    std::fs::create_dir_all(&dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
    Ok(dir)
}

/// The middle value; the mean of the two middle ones when there is an even number. NaN for none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}
