//! The project's own tooling: `cargo xtask COMMAND`.
//!
//! Everything here works on a fresh Debian machine that has a Rust toolchain; what else is needed
//! comes from Debian's packages and is set up by [`setup`].

mod bench;
mod cpio;
mod cpus;
mod demo;
mod guest;
mod host;
mod kernel;
mod lab;
mod net_guest;
mod paths;
mod python;
mod qemu;
mod setup;
mod test;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

/// What the commands here fail with: a sentence for the person at the terminal.
pub type Result<T> = std::result::Result<T, String>;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Set-up, lab, tests and demo of this project",
    after_help = "Examples:\n  cargo xtask demo\n  cargo xtask test\n  cargo xtask lab -- uname -a"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install the missing Debian packages, fetch kernels and build the lab host and the guest
    #[command(after_help = "Example:\n  cargo xtask setup")]
    Setup,
    /// Run a command (or a shell) on a lab host that has a complete /dev/kvm
    Lab(lab::LabArgs),
    /// Build the test guest: target/lab/guest/vmlinuz and target/lab/guest/initramfs.cpio.gz
    #[command(after_help = "Example:\n  cargo xtask guest")]
    Guest,
    /// Live-migrate a working guest back and forth, check everything, and report
    Demo(demo::DemoArgs),
    /// Measure, with the peers beside it
    #[command(subcommand, after_help = "Example:\n  cargo xtask bench boot --runs 3")]
    Bench(bench::Bench),
    /// Run every test
    Test(test::TestArgs),
    /// The part of `lab` that runs on the lab host
    #[command(hide = true)]
    LabAgent { job: std::path::PathBuf },
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Setup => {
            setup::ensure(setup::LAB)?;
            lab::image::ensure()?;
            guest::ensure()?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Lab(args) => {
            let opts = lab::Options {
                timeout: args.timeout.map(Duration::from_secs),
                memory_mib: args.memory,
                cpus: args.cpus,
                qemu_args: args.qemu_arg,
                append: args.append,
                verbose: args.verbose,
                ..lab::Options::default()
            };
            let code = if args.command.is_empty() {
                lab::shell(&opts)?
            } else {
                lab::run(&args.command, &opts)?
            };
            Ok(ExitCode::from(code))
        }
        Command::Guest => {
            let guest = guest::ensure()?;
            println!("{}\n{}", guest.kernel.display(), guest.initramfs.display());
            Ok(ExitCode::SUCCESS)
        }
        Command::Demo(args) => demo::run(args).map(ExitCode::from),
        Command::Bench(bench) => bench::run(bench).map(ExitCode::from),
        Command::Test(args) => test::run(&args).map(ExitCode::from),
        Command::LabAgent { job } => lab::agent::run(&job).map(|()| ExitCode::SUCCESS),
    }
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}
