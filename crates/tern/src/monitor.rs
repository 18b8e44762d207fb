//! `tern monitor`: HMP commands to a running VM, one or as many as are typed.

use std::io::{BufRead, IsTerminal, Write};

use crate::runtime_dir::{self, Entry};
use crate::{Outcome, client};

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  tern monitor vm1 info status\n  tern monitor vm1        (then type commands; Ctrl-D ends)"
)]
pub struct Args {
    /// Name of the VM
    name: String,
    /// The command; without one, commands are read from the standard input
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

pub fn run(args: &Args) -> Outcome {
    let vm = runtime_dir::find(&args.name)?;
    if args.command.is_empty() {
        return interactive(&vm);
    }
    let text = client::hmp(&vm, &args.command.join(" "))?;
    show(&text);
    Ok(if failed(&text) { 1 } else { 0 })
}

/// Whether a command's answer says that it was not done. HMP has no other sign of it.
fn failed(answer: &str) -> bool {
    answer.starts_with("unknown command: ")
        || answer.starts_with("Error: ")
        || answer.contains("\nTry \"help ")
}

fn show(text: &str) {
    crate::say::text(format_args!("{text}"));
    if !text.is_empty() && !text.ends_with('\n') {
        crate::say::say!();
    }
}

fn interactive(vm: &Entry) -> Outcome {
    let stdin = std::io::stdin();
    let prompt = stdin.is_terminal();
    let mut line = String::new();
    loop {
        if prompt {
            crate::say::text(format_args!("({}) ", vm.name));
            std::io::stdout().flush()?;
        }
        line.clear();
        if stdin.lock().read_line(&mut line)? == 0 {
            if prompt {
                crate::say::say!();
            }
            return Ok(0);
        }
        let command = line.trim();
        if command.is_empty() {
            continue;
        }
        match client::hmp(vm, command) {
            Ok(text) => show(&text),
            Err(error) if vm.alive() => vmm::tell!("tern: {error}"),
            // `quit` hangs up instead of answering.
            Err(_) => {
                crate::say::say!("VM {} has ended.", vm.name);
                return Ok(0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::failed;

    #[test]
    fn what_was_not_done_is_told_by_the_exit_status() {
        assert!(failed("unknown command: 'foo'\n"));
        assert!(failed("Error: Resetting the Virtual Machine is required\n"));
        assert!(failed("stop|s: extraneous characters\nTry \"help stop\" for more information\n"));
        assert!(!failed("") && !failed("VM status: running\n"));
    }
}
