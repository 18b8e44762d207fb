//! `tern stop`: presses the guest's power button and waits until the VM has ended.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::runtime_dir::{self, Entry};
use crate::{Outcome, client};

#[derive(clap::Args)]
#[command(after_help = "Example:\n  tern stop vm1 --timeout 30")]
pub struct Args {
    /// Name of the VM
    name: String,
    /// Seconds that the guest gets to shut down
    #[arg(long, default_value_t = 60)]
    timeout: u64,
}

pub fn run(args: &Args) -> Outcome {
    let vm = runtime_dir::find(&args.name)?;
    let name = &vm.name;
    let status = status(&vm)?;
    if status != "running" {
        let cure = match status.as_str() {
            "postmigrate" => "its guest was migrated away; ",
            "inmigrate" => "its guest has not come yet; ",
            _ => "its guest cannot shut down; continue it with `tern monitor NAME cont`, or ",
        };
        return Err(format!(
            "VM {name} is not running but '{status}': {}end it with `tern kill {name}`",
            cure.replace("NAME", name)
        )
        .into());
    }
    client::execute(&vm, "system_powerdown", json!({}))?;
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    let mut ask_at = Instant::now() + Duration::from_secs(1);
    while vm.alive() {
        if Instant::now() >= deadline {
            return Err(format!(
                "the guest of VM {name} has not shut down within {} s; \
                 `tern kill {name}` ends it at once",
                args.timeout
            )
            .into());
        }
        if Instant::now() >= ask_at {
            ask_at = Instant::now() + Duration::from_secs(1);
            // With -no-shutdown the process stays when the guest is off.
            if self::status(&vm).is_ok_and(|status| status == "shutdown") {
                crate::say::say!(
                    "VM {name}: the guest has shut down; the VM stays, as it was started with \
                     -no-shutdown (`tern kill {name}` ends it)."
                );
                return Ok(0);
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    crate::say::say!("VM {name} has shut down.");
    Ok(0)
}

fn status(vm: &Entry) -> Result<String, client::Error> {
    let answer = client::execute(vm, "query-status", json!({}))?;
    Ok(answer.get("status").and_then(Value::as_str).unwrap_or("unknown").into())
}
