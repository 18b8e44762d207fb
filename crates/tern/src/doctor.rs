//! `tern doctor`: what this host has of what Tern needs, and what to do where it is missing.
//! The checks themselves are [`hv::host`]'s; here they are only shown.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::Path;

use hv::host::{Check, Status, checks, worst};
use serde_json::json;

/// Show what this host has of what VMs need, and what to do where something is missing
///
/// Exit status: 1 when a Linux guest cannot run here, else 0.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  tern doctor\n  tern doctor --json | jq .status")]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Only run a tiny guest that needs what Linux needs, and say in one line how it went
    #[arg(long, conflicts_with = "json")]
    probe_kvm: bool,
}

/// Shows every check, as a table or (`--json`) as one JSON object. Exit status: 1 when a guest
/// cannot run here, else 0.
pub fn run(args: &Args) -> i32 {
    if args.probe_kvm {
        return probe_kvm();
    }
    let all = checks();
    let text =
        if args.json { as_json(&all) } else { as_table(&all, std::io::stdout().is_terminal()) };
    crate::say::text(format_args!("{text}"));
    exit_status(&all)
}

/// Says in one line whether KVM here can run Linux. Exit status: 0 if so, else 1.
fn probe_kvm() -> i32 {
    let (line, status) = match hv::probe::can_run_linux(Path::new(hv::kvm::DEFAULT_PATH)) {
        Ok(report) => {
            let ms = report.took.as_secs_f64() * 1000.0;
            (format!("KVM here can run Linux ({} steps in {ms:.1} ms)", report.steps.len()), 0)
        }
        Err(e) => (e.to_string(), 1),
    };
    crate::say::say!("{line}");
    status
}

fn exit_status(all: &[Check]) -> i32 {
    i32::from(worst(all) == Status::Fail)
}

fn word(status: Status) -> &'static str {
    match status {
        Status::Pass => "PASS",
        Status::Warn => "WARN",
        Status::Fail => "FAIL",
    }
}

fn colour(status: Status) -> &'static str {
    match status {
        Status::Pass => "\x1b[32m",
        Status::Warn => "\x1b[33m",
        Status::Fail => "\x1b[31m",
    }
}

fn as_table(all: &[Check], colours: bool) -> String {
    let width = all.iter().map(|c| c.name.len()).max().unwrap_or(0);
    let mut out = String::new();
    for c in all {
        let (on, off) = if colours { (colour(c.status), "\x1b[0m") } else { ("", "") };
        let verdict = word(c.status);
        let _ = writeln!(out, "{:<width$} : {on}{verdict}{off} ({})", c.name, c.found);
        if !c.advice.is_empty() {
            let _ = writeln!(out, "{:<width$}   -> {}", "", c.advice);
        }
    }
    out
}

fn as_json(all: &[Check]) -> String {
    let list: Vec<_> = all
        .iter()
        .map(|c| {
            json!({
                "id": c.id,
                "name": c.name,
                "status": word(c.status),
                "found": c.found,
                "advice": c.advice,
            })
        })
        .collect();
    let linux = all.iter().any(|c| c.id == "kvm-linux" && c.status == Status::Pass);
    let whole = json!({ "runs-linux": linux, "status": word(worst(all)), "checks": list });
    format!("{whole:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<Check> {
        let check = |id, status, advice: &str| Check {
            id,
            name: "a name",
            status,
            found: "found".into(),
            advice: advice.into(),
        };
        vec![check("kvm-linux", Status::Pass, ""), check("tun", Status::Warn, "modprobe tun")]
    }

    #[test]
    fn shows_status_and_advice() {
        let text = as_table(&sample(), false);
        assert!(text.contains("a name : PASS (found)\n"), "{text}");
        assert!(text.contains("-> modprobe tun"));
        assert!(!text.contains('\x1b') && as_table(&sample(), true).contains("\x1b[33mWARN"));
    }

    #[test]
    fn json_has_every_check() {
        let v: serde_json::Value = serde_json::from_str(&as_json(&sample())).unwrap();
        assert_eq!(v["runs-linux"], true);
        assert_eq!(v["status"], "WARN");
        assert_eq!(v["checks"][1]["id"], "tun");
        assert_eq!(exit_status(&sample()), 0);
    }
}
