//! The `tern` command.
//!
//! Called under a name that begins with `qemu-system-` or `qemu-kvm` it takes QEMU's command
//! line, as `tern qemu` does; otherwise the first word is one of the commands below. Exit status:
//! 0, 1 for what failed, 2 for a command line that is wrong.

mod client;
mod console;
mod doctor;
mod info;
mod kill;
mod launch;
mod migrate;
mod monitor;
mod ps;
mod qemu;
mod run;
mod runtime_dir;
mod say;
mod stop;
mod switch;
mod switch_show;
mod switch_top;
mod units;

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::{Parser, Subcommand};

/// What a command ends with: its exit status, or why it failed.
type Outcome = Result<i32, Box<dyn std::error::Error>>;

/// A virtual machine monitor built around live migration.
#[derive(Parser)]
#[command(
    name = "tern",
    version,
    max_term_width = 100,
    after_help = "Example:\n  tern run --name web --kernel bzImage --initrd initrd.img\n  \
                  tern ps\n\nEach command's --help has more. `tern qemu -help` lists QEMU's options."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a VM
    Run(run::Args),
    /// Start a VM with QEMU's command line
    #[command(disable_help_flag = true)]
    Qemu {
        /// QEMU's options; `tern qemu -help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<OsString>,
    },
    /// List the VMs that run
    Ps(ps::Args),
    /// Show what a VM consists of and how it is
    Info(info::Args),
    /// Connect the terminal to a VM's serial console
    Console(console::Args),
    /// Talk to a VM's monitor
    Monitor(monitor::Args),
    /// Shut a VM's guest down
    Stop(stop::Args),
    /// End a VM at once, as if its power were cut
    Kill(kill::Args),
    /// Move a running VM to another process or host
    Migrate(migrate::Args),
    /// Run a virtual switch, or talk to one
    Switch(switch::Args),
    /// Show what this host has of what VMs need
    Doctor(doctor::Args),
}

fn main() {
    let words: Vec<OsString> = std::env::args_os().collect();
    // QEMU's options are not clap's to look at: they begin with one dash.
    let status = if words.first().is_some_and(|word| is_qemu_name(word)) {
        let program = words[0].to_string_lossy().into_owned();
        run_qemu(&program, &words[1..])
    } else if words.get(1).is_some_and(|word| word == "qemu") {
        run_qemu("tern qemu", &words[2..])
    } else {
        dispatch(Cli::parse_from(words).command)
    };
    std::process::exit(status);
}

fn run_qemu(program: &str, options: &[OsString]) -> i32 {
    let mut words = Vec::with_capacity(options.len());
    for option in options {
        match option.to_str() {
            Some(word) => words.push(word.to_owned()),
            None => {
                let of = words.last().filter(|word: &&String| word.starts_with('-'));
                let of = of.map_or(String::new(), |word| format!("{word} "));
                vmm::tell!("{program}: {of}'{}': expected UTF-8", option.to_string_lossy());
                return 1;
            }
        }
    }
    qemu::run(program, &words)
}

fn is_qemu_name(program: &OsStr) -> bool {
    let name = Path::new(program).file_name().and_then(|name| name.to_str()).unwrap_or("");
    name.starts_with("qemu-system-") || name.starts_with("qemu-kvm")
}

fn dispatch(command: Command) -> i32 {
    let outcome = match command {
        Command::Run(args) => run::run(&args),
        Command::Qemu { options } => Ok(run_qemu("tern qemu", &options)),
        Command::Ps(args) => ps::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Console(args) => console::run(&args),
        Command::Monitor(args) => monitor::run(&args),
        Command::Stop(args) => stop::run(&args),
        Command::Kill(args) => kill::run(&args),
        Command::Migrate(args) => migrate::run(&args),
        Command::Switch(args) => switch::run(&args),
        Command::Doctor(args) => Ok(doctor::run(&args)),
    };
    outcome.unwrap_or_else(|error| {
        vmm::tell!("tern: {error}");
        1
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn qemus_names_are_known() {
        for name in ["qemu-system-x86_64", "/usr/bin/qemu-kvm", "qemu-kvm-7"] {
            assert!(is_qemu_name(OsStr::new(name)), "{name}");
        }
        assert!(!is_qemu_name(OsStr::new("/opt/qemu-system-x/tern")));
    }
}
