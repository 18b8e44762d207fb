//! `cargo xtask bench blackout`: what a guest at work feels when it is live-migrated: the longest
//! time between two wake-ups of a thread that wakes every millisecond, from the moment before
//! `migrate` until 1.5 s after its end.
//!
//! The guest sees it in its own monotonic clock. A VMM may stop that clock for a part of the pause;
//! so what the clock lost against the host's in the migration is added, and the gap is one of the
//! host's clock. The guest's own figure is printed beside it.

use super::guests::{self, GuestArgs};
use crate::Result;

/// `bench blackout`'s arguments.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  cargo xtask bench blackout")]
pub struct BlackoutArgs {
    #[command(flatten)]
    guests: GuestArgs,
    /// Memory that the guest works on, MiB, all of it random data
    #[arg(long, default_value_t = 128)]
    working_set: u32,
    /// Pages dirtied a second
    #[arg(long, default_value_t = 1000)]
    rate: u32,
}

/// Measures; the exit status.
pub fn run(args: &BlackoutArgs) -> Result<u8> {
    let (set, rate) = (args.working_set.to_string(), args.rate.to_string());
    let more = ["--working-set", &set, "--rate", &rate];
    let (rows, host) = guests::measure("blackout", &args.guests, &more)?;
    println!(
        "{:<14} {:>26} {:>20} {:>12} {:>20} {:>10}",
        host,
        "gap felt, ms: median/worst",
        "in the guest's clock",
        "its loss",
        "reported downtime",
        "total, ms"
    );
    for row in &rows {
        println!(
            "{:<14} {:>16.0} / {:<7.0} {:>20.0} {:>12.0} {:>20.0} {:>10.0}",
            row.name,
            row.median("gap_ms"),
            row.worst("gap_ms"),
            row.median("guest_gap_ms"),
            row.median("clock_stood_ms"),
            row.median("downtime_ms"),
            row.median("total_ms")
        );
    }
    let ratio = rows[0].median("gap_ms") / rows[1].median("gap_ms");
    println!(
        "median gap: {ratio:.2} of QEMU's; wanted 0.50 or less: {}",
        guests::verdict(ratio <= 0.5)
    );
    Ok(0)
}
