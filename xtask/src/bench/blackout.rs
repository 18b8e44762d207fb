//! `cargo xtask bench blackout`.

use crate::Result;

/// `bench blackout`'s arguments.
#[derive(clap::Args)]
pub struct BlackoutArgs {}

/// Measures; the exit status.
pub fn run(_: &BlackoutArgs) -> Result<u8> {
    Err("bench blackout is not built yet".into())
}
