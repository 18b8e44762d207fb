//! What a monitor needs of the machine: one entry point for all commands.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use parking_lot::Mutex;
use serde_json::Value;

/// QMP's error classes (QEMU's qapi/error.json).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub enum ErrorClass {
    GenericError,
    CommandNotFound,
    DeviceNotActive,
    DeviceNotFound,
    KVMMissingCap,
    /// libvirt tries `cont` again on this one.
    MigrationExpected,
}

/// A command's failure, as QMP sends it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct Error {
    pub class: ErrorClass,
    pub desc: String,
}

impl Error {
    /// A GenericError.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::GenericError, desc: desc.into() }
    }
    /// A DeviceNotFound error in QEMU's words.
    pub fn device_not_found(id: &str) -> Self {
        Self { class: ErrorClass::DeviceNotFound, desc: format!("Device '{id}' not found") }
    }
}

/// File descriptors that one monitor client passed by `getfd`, by name.
#[derive(Debug, Default)]
pub struct ClientFds(pub Mutex<HashMap<String, OwnedFd>>);

/// The machine, to a monitor. Called from monitor threads, several at a time; a command that takes
/// long (migrate) starts its work elsewhere and returns.
pub trait Commands: Send + Sync {
    /// Runs command `name`. `arguments` is an object; the server has checked its shape against
    /// the command's schema. Commands that the server answers itself (qmp_capabilities,
    /// query-version, query-commands, human-monitor-command, getfd, closefd, query-qmp-schema) do
    /// not come here. `fds` are the client's named fds: `fd:NAME` takes one out.
    fn execute(&self, name: &str, arguments: Value, fds: &ClientFds) -> Result<Value, Error>;
}
