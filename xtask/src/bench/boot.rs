//! `cargo xtask bench boot`.

use crate::Result;

/// `bench boot`'s arguments.
#[derive(clap::Args)]
pub struct BootArgs {}

/// Measures; the exit status.
pub fn run(_: &BootArgs) -> Result<u8> {
    Err("bench boot is not built yet".into())
}
