//! The machine's run state, under QEMU's names.

/// What the machine does now (QEMU's RunState).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// Built, never run (`-S`).
    Prelaunch,
    /// Waits for, or receives, an incoming migration.
    Inmigrate,
    Running,
    Paused,
    /// Stopped for the end of an outgoing migration.
    FinishMigrate,
    /// The guest runs elsewhere now.
    Postmigrate,
    /// The guest powered off (`-no-shutdown`).
    Shutdown,
    /// A vCPU cannot go on.
    InternalError,
}

impl RunState {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prelaunch => "prelaunch",
            Self::Inmigrate => "inmigrate",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::FinishMigrate => "finish-migrate",
            Self::Postmigrate => "postmigrate",
            Self::Shutdown => "shutdown",
            Self::InternalError => "internal-error",
        }
    }
}
