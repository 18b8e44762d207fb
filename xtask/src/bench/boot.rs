//! `cargo xtask bench boot`: from the start of the VMM's process to the first line of the guest's
//! init, with 256 MiB and Debian's cloud kernel.

use super::guests::{self, GuestArgs};
use crate::Result;

/// `bench boot`'s arguments.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  cargo xtask bench boot")]
pub struct BootArgs {
    #[command(flatten)]
    guests: GuestArgs,
}

/// Measures; the exit status.
pub fn run(args: &BootArgs) -> Result<u8> {
    let (rows, host) = guests::measure("boot", &args.guests, &[])?;
    println!(
        "{:<14} {:>26} {:>18} {:>24}",
        host, "to init, s: median/worst", "to the monitor, s", "of it in the kernel, s"
    );
    for row in &rows {
        println!(
            "{:<14} {:>16.2} / {:<7.2} {:>18.2} {:>24.2}",
            row.name,
            row.median("init_s"),
            row.worst("init_s"),
            row.median("monitor_s"),
            row.median("kernel_s")
        );
    }
    let ratio = rows[0].median("init_s") / rows[1].median("init_s");
    println!(
        "median: {ratio:.2} of QEMU's; wanted 0.50 or less: {}",
        guests::verdict(ratio <= 0.5)
    );
    Ok(0)
}
