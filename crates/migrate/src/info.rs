//! What `query-migrate` says: QEMU's fields under QEMU's names, and ours marked `x-tern-`.

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

/// A migration's status, in QEMU's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    None,
    Setup,
    Active,
    PreSwitchover,
    Device,
    Cancelling,
    Cancelled,
    Completed,
    Failed,
}

impl Status {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }

    /// Whether a migration in this status is over (or never was).
    pub fn is_final(self) -> bool {
        matches!(self, Self::None | Self::Cancelled | Self::Completed | Self::Failed)
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The reply to `query-migrate`: empty when there was no migration yet.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
    /// Milliseconds since the start, or from start to end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_time: Option<u64>,
    /// Milliseconds that the guest will stand still, as expected now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime: Option<u64>,
    /// Milliseconds that the guest stood still: VMM stopped to VMM running.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// Milliseconds before the first page was sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setup_time: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<RamInfo>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_desc: Option<String>,
    /// Why this machine cannot be migrated now.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub blocked_reasons: Vec<String>,
    /// Where the downtime went.
    #[serde(rename = "x-tern-downtime", skip_serializing_if = "Option::is_none")]
    pub tern_downtime: Option<DowntimePhases>,
    /// Microseconds from the stop of the vCPUs at the source to the news, on the source's clock,
    /// that the first vCPU runs at the destination.
    #[serde(rename = "x-tern-blackout-us", skip_serializing_if = "Option::is_none")]
    pub tern_blackout_us: Option<u64>,
    /// Frames that came to the source after the guest had stopped there, and were sent after it.
    #[serde(rename = "x-tern-late-frames", skip_serializing_if = "Option::is_none")]
    pub tern_late_frames: Option<u64>,
    /// Round by round.
    #[serde(rename = "x-tern-trace", skip_serializing_if = "Option::is_none")]
    pub tern_trace: Option<Trace>,
}

/// `ram` in `query-migrate`. Bytes unless said otherwise.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RamInfo {
    /// On the wire, headers included.
    pub transferred: u64,
    /// Of guest memory, not acknowledged yet.
    pub remaining: u64,
    /// Guest memory in all.
    pub total: u64,
    /// Zero pages.
    pub duplicate: u64,
    /// Always 0, as in QEMU since 1.5.
    pub skipped: u64,
    /// Pages sent whole.
    pub normal: u64,
    pub normal_bytes: u64,
    /// Pages a second, in the last round.
    pub dirty_pages_rate: u64,
    /// 10^6 bits a second.
    pub mbps: f64,
    /// How often the dirty logs were read.
    pub dirty_sync_count: u64,
    pub page_size: u64,
    pub multifd_bytes: u64,
    pub pages_per_second: u64,
    pub precopy_bytes: u64,
    /// Sent while the guest stood still.
    pub downtime_bytes: u64,
    pub postcopy_bytes: u64,
    pub postcopy_requests: u64,
    pub dirty_sync_missed_zero_copy: u64,
}

/// The downtime by phase, in microseconds on the source's clock.
///
/// On the wire: `phases`, a list of names and microseconds that add up to the downtime, and the
/// parts of them that overlap or that come after it, each under its own name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DowntimePhases {
    /// vCPUs stop, devices drain.
    pub quiesce_us: u64,
    /// Last harvest of the dirty logs, and the last pages handed to the connections.
    pub last_pages_us: u64,
    /// Device and vCPU state is saved (at the same time as the last pages go out).
    pub save_us: u64,
    /// The rest of the pages and the state travel, and the destination loads it.
    pub transfer_load_us: u64,
    /// Part of it that the destination spent in loading, on its own clock.
    pub load_us: u64,
    /// Disk locks given up here, go sent, until the news that it runs there.
    pub go_running_us: u64,
    /// Part of it that the destination spent in taking the locks and starting vCPUs.
    pub start_us: u64,
    /// Release sent until the destination says that its output flows.
    pub release_us: u64,
}

impl DowntimePhases {
    /// What follows one another from the stop here to the start there.
    fn in_turn(&self) -> [(&'static str, u64); 4] {
        [
            ("quiesce", self.quiesce_us),
            ("last-pages-and-save", self.last_pages_us.max(self.save_us)),
            ("transfer-load", self.transfer_load_us),
            ("go-running", self.go_running_us),
        ]
    }
}

impl Serialize for DowntimePhases {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Phase {
            name: &'static str,
            us: u64,
        }
        let phases = self.in_turn().map(|(name, us)| Phase { name, us });
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("phases", &phases)?;
        map.serialize_entry("last-pages-us", &self.last_pages_us)?;
        map.serialize_entry("save-us", &self.save_us)?;
        map.serialize_entry("load-us", &self.load_us)?;
        map.serialize_entry("start-us", &self.start_us)?;
        map.serialize_entry("release-us", &self.release_us)?;
        map.end()
    }
}

/// Every round, with times in microseconds since the start of the migration.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Trace {
    pub rounds: Vec<Round>,
    /// When a phase began: ("setup", 0), ("active", ...), ("stop", ...), ("running", ...).
    pub marks: Vec<Mark>,
}

/// A moment in the trace.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Mark {
    pub name: &'static str,
    pub at_us: u64,
}

/// One round over the pending pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Round {
    /// Counted from 1.
    pub round: u64,
    /// When it began, in microseconds since the start of the migration.
    pub at_us: u64,
    /// Until it was acknowledged.
    pub us: u64,
    /// Pages in it, zero pages among them.
    pub pages: u64,
    pub zero_pages: u64,
    /// On the wire.
    pub bytes: u64,
    /// Pages that were dirtied meanwhile.
    pub dirty_pages: u64,
    /// Bytes a second.
    pub bandwidth: u64,
    /// Whether the guest stood still.
    pub stopped: bool,
}
