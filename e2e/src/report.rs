//! What the demo found: the file report.json and the table.

use std::fmt::Write;

use serde::Serialize;

use crate::migration::{Report as Migration, Round};

/// One migration, in report.json.
#[derive(Debug, Serialize)]
pub struct Row {
    /// From `migrate` to completed.
    pub total_ms: f64,
    /// From the source stopped to the destination running.
    pub downtime_ms: f64,
    /// The longest gap in the guest's own monotonic clock.
    pub blackout_ms: f64,
    /// Passes over memory.
    pub rounds: Vec<Round>,
}

/// Pings.
#[derive(Debug, Default, Serialize)]
pub struct Pings {
    /// Sent.
    pub sent: u64,
    /// Never answered.
    pub lost: u64,
}

/// Streams, both directions together.
#[derive(Debug, Default, Serialize)]
pub struct Tcp {
    /// Compared at their receivers.
    pub bytes: u64,
    /// Wrong.
    pub bad: u64,
}

/// The disk.
#[derive(Debug, Default, Serialize)]
pub struct Disk {
    /// Read again and compared.
    pub blocks: u64,
    /// Wrong.
    pub bad: u64,
}

/// The guest's memory.
#[derive(Debug, Default, Serialize)]
pub struct Memory {
    /// Pages that the guest worked on and looked at in the end.
    pub pages: u64,
    /// Times that a page was changed.
    pub dirtied: u64,
    /// Wrong.
    pub bad: u64,
}

/// The file report.json.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// `native` or `lab`.
    pub host: String,
    /// In order.
    pub migrations: Vec<Row>,
    /// Pings.
    pub pings: Pings,
    /// Streams.
    pub tcp: Tcp,
    /// Disk.
    pub disk: Disk,
    /// Memory.
    pub memory: Memory,
    /// Why the demo ended early; what is above is then what it saw until then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Row {
    /// What report.json tells of a migration.
    pub fn new(migration: &Migration) -> Self {
        Self {
            total_ms: migration.total_ms,
            downtime_ms: migration.downtime_ms,
            blackout_ms: migration.blackout_ms,
            rounds: migration.rounds.clone(),
        }
    }
}

impl Report {
    /// What was lost or wrong, in words; empty when nothing was.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut check = |count: u64, what: &str| {
            if count > 0 {
                faults.push(format!("{count} {what}"));
            }
        };
        check(self.pings.lost, "pings were lost");
        check(self.tcp.bad, "bytes on the TCP stream were wrong");
        check(self.disk.bad, "disk blocks were wrong");
        check(self.memory.bad, "pages of memory were wrong");
        let mut some = |count: u64, what: &str| {
            if count == 0 {
                faults.push(format!("no {what} at all"));
            }
        };
        some(self.pings.sent, "ping was sent");
        some(self.tcp.bytes, "byte went over TCP");
        some(self.disk.blocks, "disk block was checked");
        some(self.memory.dirtied, "page was changed");
        faults
    }
}

/// The table for people.
pub fn table(report: &Report, migrations: &[Migration]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "  #  total ms  rounds  sent MiB  downtime ms  stop..resume ms  blackout ms: guest  host  late frames"
    );
    for (i, m) in migrations.iter().enumerate() {
        let sent = m.samples.last().map_or(0, |s| s.transferred) as f64 / f64::from(1 << 20);
        let _ = writeln!(
            text,
            "{:>3} {:>9.0} {:>7} {:>9.1} {:>12.1} {:>16.1} {:>19.1} {:>5.0} {:>12}",
            i + 1,
            m.total_ms,
            m.rounds.len(),
            sent,
            m.downtime_ms,
            m.stop_to_resume_ms,
            m.blackout_ms,
            m.host_gap_ms,
            m.late_frames
        );
    }
    if migrations.iter().any(|m| !m.phases.is_empty()) {
        let _ = writeln!(text, "\ndowntime by phase, ms");
        for (i, m) in migrations.iter().enumerate() {
            let phases: Vec<String> =
                m.phases.iter().map(|p| format!("{} {:.2}", p.name, p.us as f64 / 1e3)).collect();
            let _ = writeln!(text, "{:>3}  {}", i + 1, phases.join("  "));
        }
    }
    let Report { pings, tcp, disk, memory, .. } = report;
    let _ = writeln!(text, "\npings sent {}, lost {}", pings.sent, pings.lost);
    let _ = writeln!(text, "TCP bytes checked {}, wrong {}", tcp.bytes, tcp.bad);
    let _ = writeln!(text, "disk blocks checked {}, wrong {}", disk.blocks, disk.bad);
    let _ = writeln!(
        text,
        "memory pages {}, changed {} times, wrong {}",
        memory.pages, memory.dirtied, memory.bad
    );
    text
}
