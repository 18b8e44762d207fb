//! `cargo xtask bench footprint`.

use crate::Result;

/// `bench footprint`'s arguments.
#[derive(clap::Args)]
pub struct FootprintArgs {}

/// Measures; the exit status.
pub fn run(_: &FootprintArgs) -> Result<u8> {
    Err("bench footprint is not built yet".into())
}
