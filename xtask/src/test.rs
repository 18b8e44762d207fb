//! `cargo xtask test`: every test, with its set-up.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;

use crate::guest::Guest;
use crate::host::{self, Host};
use crate::{Result, guest, net_guest, paths, python, qemu, setup};

/// The end-to-end tests together.
const LIMIT: Duration = Duration::from_secs(25 * 60);
/// Those of the switch.
const SWITCH_LIMIT: Duration = Duration::from_secs(15 * 60);
/// How the names of their programs begin: they run on this host, on QEMU's software CPU.
const SWITCH: &str = "switch_";

/// `cargo xtask test`'s arguments.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask test\n  cargo xtask test --no-e2e")]
pub struct TestArgs {
    /// Only the end-to-end tests
    #[arg(long, conflicts_with = "no_e2e")]
    e2e: bool,
    /// Of those, only the switch's, which need no KVM
    #[arg(long, conflicts_with_all = ["no_e2e", "lab", "vmm"])]
    switch: bool,
    /// All but the end-to-end tests
    #[arg(long)]
    no_e2e: bool,
    /// End-to-end tests on the lab host even when this host's KVM could do it
    #[arg(long)]
    lab: bool,
    /// Another VMM that takes QEMU's command line, to judge the tests by
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// Arguments for the end-to-end test programs, for example a part of a test's name
    #[arg(last = true)]
    filter: Vec<String>,
}

/// Unit and property tests, and those of the KVM API on this host's /dev/kvm.
fn workspace() -> Result<()> {
    let nextest = host::cargo()
        .args(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success());
    if nextest {
        host::must(
            host::cargo().args(["nextest", "run", "--workspace", "--no-fail-fast"]),
            "cargo nextest",
        )?;
        return host::must(
            host::cargo().args(["test", "--quiet", "--workspace", "--doc"]),
            "the doc tests",
        );
    }
    host::must(host::cargo().args(["test", "--workspace", "--no-fail-fast"]), "cargo test")
}

/// Builds the end-to-end test programs.
fn programs() -> Result<Vec<PathBuf>> {
    let out = host::cargo()
        .args(["test", "-p", "e2e", "--tests", "--no-run", "--message-format=json"])
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| format!("cargo does not start: {e}"))?;
    if !out.status.success() {
        return Err("the end-to-end tests do not build".into());
    }
    let mut programs = Vec::new();
    for line in out.stdout.split(|b| *b == b'\n') {
        let Ok(message) = serde_json::from_slice::<Value>(line) else { continue };
        let is_test = message.pointer("/target/kind/0").and_then(Value::as_str) == Some("test");
        if let (true, Some(path)) = (is_test, message.get("executable").and_then(Value::as_str)) {
            programs.push(path.into());
        }
    }
    programs.sort();
    Ok(programs)
}

fn e2e(args: &TestArgs) -> Result<u8> {
    let bins = host::build_release(&["tern"], &["tern"])?;
    let guest = guest::ensure()?;
    let tern = bins.join("tern");
    let (switch, programs): (Vec<_>, Vec<_>) =
        programs()?.into_iter().partition(|p| test_name(p).starts_with(SWITCH));
    // Another VMM has no switch to be judged.
    let switch_code =
        if args.vmm.is_none() { run_switch(args, &switch, &tern, &guest)? } else { 0 };
    if args.switch {
        return Ok(switch_code);
    }
    Ok(switch_code.max(run_guests(args, programs, tern, &guest)?))
}

/// Runs the switch's tests.
fn run_switch(args: &TestArgs, programs: &[PathBuf], tern: &Path, guest: &Guest) -> Result<u8> {
    println!("The switch's guests run on this host, on QEMU's software CPU.");
    let initrd = net_guest::ensure()?;
    let text = |p: &Path| p.to_string_lossy().into_owned();
    let env = [
        ("TERN_E2E", "1".to_owned()),
        ("TERN_SWITCH", text(tern)),
        ("TERN_GUEST_KERNEL", text(&guest.kernel)),
        ("TERN_NET_INITRD", text(&initrd)),
        ("TERN_E2E_LOGS", text(&paths::target().join("e2e-logs"))),
        ("FILTER", args.filter.join(" ")),
    ]
    .map(|(k, v)| (k.to_owned(), v));
    let mut env = env.to_vec();
    match qemu::newest() {
        Ok(newest) => env.push(("TERN_NEWEST_QEMU".into(), newest.words().join("\n"))),
        Err(e) => println!(
            "{e}: guests migrate under the installed QEMU, which now and then loses one by itself if \
             it is 7.2"
        ),
    }
    run_programs(Host::Native, programs, &env, SWITCH_LIMIT).map(|(code, _)| code)
}

/// Runs the tests of the VMM, where there is a KVM for their guests.
fn run_guests(args: &TestArgs, programs: Vec<PathBuf>, tern: PathBuf, guest: &Guest) -> Result<u8> {
    let host = if args.lab { Host::Lab } else { Host::choose(&tern) };
    let vmm = args.vmm.clone().unwrap_or(tern);
    let vmm = std::path::absolute(&vmm).map_err(|e| format!("{}: {e}", vmm.display()))?;
    let text = |p: &PathBuf| p.to_string_lossy().into_owned();
    let env = [
        ("TERN_E2E", "1".to_owned()),
        ("TERN_HOST", host.name().to_owned()),
        ("TERN_VMM", text(&vmm)),
        ("TERN_GUEST_KERNEL", text(&guest.kernel)),
        ("TERN_GUEST_ELF", text(&guest.elf)),
        ("TERN_GUEST_INITRD", text(&guest.initramfs)),
        ("TERN_E2E_LOGS", text(&paths::target().join("e2e-logs"))),
    ]
    .map(|(k, v)| (k.to_owned(), v));
    let mut env = env.to_vec();
    if let Some(python) = python::ensure() {
        env.push(("TERN_QMP_PYTHON".into(), text(&python)));
    }
    env.push(("FILTER".into(), args.filter.join(" ")));
    let first = run_programs(host, &programs, &env, LIMIT);
    if host == Host::Native || matches!(first, Ok((0, _))) {
        return first.map(|(code, _)| code);
    }
    let mut left = match first {
        Ok((_, left)) => left,
        Err(e) => {
            println!("xtask: {e}");
            programs
        }
    };
    for run in ["second", "third"] {
        let names = left.iter().map(|p| test_name(p)).collect::<Vec<_>>().join(", ");
        println!(
            "\nxtask: not passed on the lab host: {names}. Its emulated CPU loses a guest now and \
             then (docs/architecture.md, \"The lab\"): these run once more, on a new one. What \
             failed is above."
        );
        match run_programs(host, &left, &env, LIMIT) {
            Ok((0, _)) => {
                println!("xtask: {run} run on the lab host: {names} passed");
                return Ok(0);
            }
            Ok((_, rest)) => left = rest,
            // The lab host itself went down: none of them is known to have passed.
            Err(e) => println!("xtask: {e}"),
        }
    }
    Ok(1)
}

/// A test program's name without Cargo's hash.
fn test_name(program: &Path) -> String {
    let stem = program.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    stem.rsplit_once('-').map_or(stem.clone(), |(name, _)| name.to_owned())
}

/// Runs test programs one after the other; their common exit status, and those that did not pass.
fn run_programs(
    host: Host,
    programs: &[PathBuf],
    env: &[(String, String)],
    limit: Duration,
) -> Result<(u8, Vec<PathBuf>)> {
    let passed = paths::target().join("e2e-logs").join("passed");
    let _ = fs::create_dir_all(passed.parent().unwrap_or(&passed));
    fs::write(&passed, "").map_err(|e| format!("cannot write {}: {e}", passed.display()))?;
    let script = "code=0; for p in \"$@\"; do \
                  if \"$p\" --test-threads=1 $FILTER; then echo \"$p\" >> \"$PASSED\"; \
                  else code=1; fi; done; exit $code";
    let mut argv: Vec<OsString> = ["sh", "-c", script, "e2e"].map(OsString::from).to_vec();
    argv.extend(programs.iter().map(OsString::from));
    let mut env = env.to_vec();
    env.push(("PASSED".into(), passed.to_string_lossy().into_owned()));
    let code = host.run(&argv, &env, limit)?;
    let passed = fs::read_to_string(&passed).unwrap_or_default();
    let left = programs.iter().filter(|p| !passed.lines().any(|l| Path::new(l) == p.as_path()));
    Ok((code, left.cloned().collect()))
}

/// Runs the tests; the exit status.
pub fn run(args: &TestArgs) -> Result<u8> {
    setup::ensure(&[setup::LAB, setup::TEST].concat())?;
    if !args.e2e && !args.switch {
        workspace()?;
    }
    if args.no_e2e {
        return Ok(0);
    }
    e2e(args)
}
