//! `tern qemu`, and names that begin with `qemu-system-` or `qemu-kvm`: QEMU's command line.

use qapi::cmdline::{Parsed, parse};

use crate::launch::launch;

/// Runs QEMU's command line `args` (without the program's name); returns the exit status.
pub fn run(program: &str, args: &[String]) -> i32 {
    match parse(args) {
        Ok(Parsed::Print(text)) => {
            crate::say::say!("{}", text.trim_end());
            0
        }
        Ok(Parsed::CpuHelp) => {
            crate::say::text(format_args!("{}", hv::cpu::help()));
            0
        }
        Ok(Parsed::Machine(machine)) => launch(*machine),
        Err(e) => {
            vmm::tell!("{program}: {e}");
            1
        }
    }
}
