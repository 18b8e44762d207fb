//! `cargo xtask bench footprint`: what the VMM's process has resident beyond the guest's memory,
//! once the guest is up, from the kernel's smaps.

use super::guests::{self, GuestArgs};
use crate::Result;

/// `bench footprint`'s arguments.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  cargo xtask bench footprint")]
pub struct FootprintArgs {
    #[command(flatten)]
    guests: GuestArgs,
}

/// What is wanted at most, MiB.
const WANTED: f64 = 8.0;

/// Measures; the exit status.
pub fn run(args: &FootprintArgs) -> Result<u8> {
    let (rows, host) = guests::measure("footprint", &args.guests, &[])?;
    println!(
        "{:<14} {:>26} {:>16} {:>16}",
        host, "beyond the guest's, MiB", "private, MiB", "anonymous, MiB"
    );
    for row in &rows {
        let mib = |figure| row.median(figure) / 1024.0;
        println!(
            "{:<14} {:>26.1} {:>16.1} {:>16.1}",
            row.name,
            mib("beyond_kib"),
            mib("private_kib"),
            mib("anonymous_kib")
        );
    }
    let beyond = rows[0].median("beyond_kib") / 1024.0;
    println!(
        "{beyond:.1} MiB; wanted {WANTED:.0} MiB or less: {}",
        guests::verdict(beyond <= WANTED)
    );
    Ok(0)
}
