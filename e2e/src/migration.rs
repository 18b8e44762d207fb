//! One live migration between two VMMs, measured.

use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::vmm::Vmm;
use crate::{Error, Result};

/// The state of a migration at one moment, as the source said.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Sample {
    /// Milliseconds since `migrate`.
    pub ms: f64,
    /// Bytes sent so far.
    pub transferred: u64,
    /// Bytes still to send.
    pub remaining: u64,
    /// Pages dirtied a second.
    pub dirty_pages_rate: u64,
    /// Rounds begun.
    pub round: u64,
}

/// One pass over memory.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Round {
    /// 1, 2, ...
    pub round: u64,
    /// Pages sent in it.
    pub pages: u64,
    /// Bytes sent in it.
    pub bytes: u64,
    /// How long it took.
    pub ms: f64,
    /// Pages dirtied meanwhile.
    pub dirty_pages: u64,
}

/// A piece of the downtime.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Phase {
    /// What was done in it.
    pub name: String,
    /// How long it took, microseconds.
    pub us: u64,
}

/// What a migration came to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// From `migrate` to completed, as the VMM says.
    pub total_ms: f64,
    /// From the source stopped to the destination running, as the VMM says.
    pub downtime_ms: f64,
    /// Of it, by phase; empty when the VMM does not say.
    pub phases: Vec<Phase>,
    /// The VMM's own figure for what the guest felt, when it has one.
    pub vmm_blackout_ms: Option<f64>,
    /// From STOP at the source to RESUME at the destination, on the host's clock.
    pub stop_to_resume_ms: f64,
    /// STOP, in milliseconds since `migrate`.
    pub stopped_at_ms: f64,
    /// The longest gap in the guest's monotonic clock.
    pub blackout_ms: f64,
    /// The longest time between two answers to pings, on the host's clock.
    pub host_gap_ms: f64,
    /// Passes over memory.
    pub rounds: Vec<Round>,
    /// The course of it.
    pub samples: Vec<Sample>,
    /// Frames that came to the source after the stop and that the VMM sent after the guest.
    pub late_frames: u64,
}

fn number(info: &Value, pointer: &str) -> f64 {
    info.pointer(pointer).and_then(Value::as_f64).unwrap_or(0.0)
}

fn sample(info: &Value, since: Instant) -> Sample {
    Sample {
        ms: since.elapsed().as_secs_f64() * 1e3,
        transferred: number(info, "/ram/transferred") as u64,
        remaining: number(info, "/ram/remaining") as u64,
        dirty_pages_rate: number(info, "/ram/dirty-pages-rate") as u64,
        round: number(info, "/ram/dirty-sync-count") as u64,
    }
}

/// Rounds as they follow from samples, for a VMM that does not tell them.
fn rounds_of(samples: &[Sample], page: u64) -> Vec<Round> {
    let mut rounds: Vec<Round> = Vec::new();
    let mut start = Sample::default();
    for (i, sample) in samples.iter().enumerate() {
        let last = samples.get(i + 1).is_none_or(|next| next.round != sample.round);
        if last && sample.round > 0 {
            let bytes = sample.transferred.saturating_sub(start.transferred);
            rounds.push(Round {
                round: sample.round,
                pages: bytes / page,
                bytes,
                ms: sample.ms - start.ms,
                dirty_pages: sample.remaining / page,
            });
            start = *sample;
        }
    }
    rounds
}

/// The rounds of a VMM that tells them.
fn told_rounds(trace: &Value) -> Vec<Round> {
    let one = |r: &Value| Round {
        round: number(r, "/round") as u64,
        pages: number(r, "/pages") as u64,
        bytes: number(r, "/bytes") as u64,
        ms: number(r, "/us") / 1e3,
        dirty_pages: number(r, "/dirty-pages") as u64,
    };
    trace["rounds"].as_array().map(|all| all.iter().map(one).collect()).unwrap_or_default()
}

fn fill(report: &mut Report, info: &Value) {
    report.total_ms = number(info, "/total-time");
    report.downtime_ms = number(info, "/downtime");
    let part = |key: &str| info.get(key).cloned().unwrap_or(Value::Null);
    let phases = part("x-tern-downtime").get("phases").cloned().unwrap_or(Value::Null);
    report.phases = serde_json::from_value(phases).unwrap_or_default();
    if !report.phases.is_empty() {
        // To the microsecond, where QEMU's field has milliseconds.
        report.downtime_ms = report.phases.iter().map(|p| p.us as f64).sum::<f64>() / 1e3;
    }
    report.vmm_blackout_ms =
        info.get("x-tern-blackout-us").and_then(Value::as_f64).map(|us| us / 1e3);
    report.late_frames = number(info, "/x-tern-late-frames") as u64;
    report.rounds = told_rounds(&part("x-tern-trace"));
    if report.rounds.is_empty() {
        let page = (number(info, "/ram/page-size") as u64).max(4096);
        report.rounds = rounds_of(&report.samples, page);
    }
}

/// The two VMMs say STOP and RESUME when they do it, by the same host's clock.
fn stop_to_resume(
    source: &mut Vmm,
    destination: &mut Vmm,
    started: f64,
    report: &mut Report,
) -> Result<()> {
    let patience = Duration::from_secs(10);
    let resume = destination.qmp.wait_event("RESUME", patience)?;
    let stop = source.qmp.wait_event("STOP", patience)?;
    report.stop_to_resume_ms = (resume.stamp - stop.stamp) * 1e3;
    report.stopped_at_ms = (stop.stamp - started) * 1e3;
    Ok(())
}

/// Migrates from `source` to `destination`, which listens at `uri`, and waits until it runs there.
/// What needs the guest (blackout) is left for the caller to fill in.
///
/// # Errors
/// [`Error::Migration`] when it fails; the source's state is then as the VMM left it.
pub fn migrate(source: &mut Vmm, destination: &mut Vmm, uri: &str) -> Result<Report> {
    source.qmp.forget_events();
    let mut report = Report::default();
    let wall = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0.0, |d| d.as_secs_f64());
    let since = Instant::now();
    source.qmp.execute("migrate", json!({ "uri": uri }))?;
    let info = loop {
        let info = source.qmp.execute("query-migrate", Value::Null)?;
        let status = info.get("status").and_then(Value::as_str).unwrap_or_default();
        match status {
            "completed" => break info,
            "failed" | "cancelled" => {
                let why =
                    info.get("error-desc").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(Error::Migration { status: status.to_owned(), why: why.to_owned() });
            }
            "active" | "device" => report.samples.push(sample(&info, since)),
            _ => {}
        }
        if since.elapsed() > Duration::from_secs(120) {
            return Err(Error::Timeout { what: "the end of the migration".into(), seconds: 120 });
        }
        thread::sleep(Duration::from_millis(10));
    };
    report.samples.push(sample(&info, since));
    stop_to_resume(source, destination, wall, &mut report)?;
    fill(&mut report, &info);
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_follow_from_samples() {
        let at = |ms, transferred, remaining, round| Sample {
            ms,
            transferred,
            remaining,
            round,
            dirty_pages_rate: 0,
        };
        let samples = [
            at(1.0, 0, 9, 0),
            at(2.0, 4096, 8192, 1),
            at(5.0, 40960, 4096, 1),
            at(6.0, 45056, 0, 2),
        ];
        let rounds = rounds_of(&samples, 4096);
        assert_eq!(rounds.len(), 2);
        assert_eq!(rounds[0], Round { round: 1, pages: 10, bytes: 40960, ms: 5.0, dirty_pages: 1 });
        assert_eq!(rounds[1], Round { round: 2, pages: 1, bytes: 4096, ms: 1.0, dirty_pages: 0 });
    }

    #[test]
    fn our_own_figures_are_taken() {
        let info = json!({"status": "completed", "total-time": 900, "downtime": 13,
            "x-tern-downtime": {"phases": [{"name": "stop", "us": 2500}, {"name": "state", "us": 9700}]},
            "x-tern-blackout-us": 15000,
            "x-tern-trace": {"rounds": [{"round": 1, "pages": 3, "bytes": 12288, "us": 4000,
                "dirty-pages": 2}]}});
        let mut report = Report::default();
        fill(&mut report, &info);
        assert_eq!(report.downtime_ms, 12.2);
        assert_eq!(report.vmm_blackout_ms, Some(15.0));
        let round = Round { round: 1, pages: 3, bytes: 12288, ms: 4.0, dirty_pages: 2 };
        assert_eq!(report.rounds, [round]);
    }
}
