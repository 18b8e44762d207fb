//! `tern kill`: ends a VM at once.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use serde_json::json;

use crate::Outcome;
use crate::client::Client;
use crate::runtime_dir::{self, Entry};

#[derive(clap::Args)]
#[command(after_help = "Example:\n  tern kill vm1")]
pub struct Args {
    /// Name of the VM
    name: String,
}

/// How long the VM gets to end by itself, so that its disks are closed well.
const PATIENCE: Duration = Duration::from_secs(3);

pub fn run(args: &Args) -> Outcome {
    let vm = runtime_dir::find(&args.name)?;
    // It may hang up before it answers; whether it ends is what counts.
    let asked = Client::connect(&vm, PATIENCE)
        .and_then(|mut client| client.execute("quit", json!({})))
        .is_ok();
    if !(asked && ended_within(&vm, PATIENCE)) && vm.alive() {
        // SAFETY: no pointers. The lock says that the process of this id is still the VM.
        if unsafe { libc::kill(vm.pid, libc::SIGKILL) } < 0 && vm.alive() {
            let error = std::io::Error::last_os_error();
            return Err(format!("cannot kill VM {} (pid {}): {error}", vm.name, vm.pid).into());
        }
        if !ended_within(&vm, Duration::from_secs(10)) {
            return Err(format!(
                "VM {} (pid {}) was killed and is not gone: it waits in the kernel, see dmesg",
                vm.name, vm.pid
            )
            .into());
        }
        runtime_dir::purge();
    }
    crate::say::say!("VM {} has ended.", vm.name);
    Ok(0)
}

fn ended_within(vm: &Entry, time: Duration) -> bool {
    let deadline = Instant::now() + time;
    while vm.alive() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}
