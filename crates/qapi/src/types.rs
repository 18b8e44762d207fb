//! Results of QMP commands as types, in QEMU's names (qapi/*.json): what `vmm` fills in.
//! `serde_json::to_value` of them is the reply.

use serde::{Deserialize, Serialize};

/// States of a VM (RunState), as `query-status` tells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    Inmigrate,
    InternalError,
    IoError,
    Paused,
    Postmigrate,
    Prelaunch,
    FinishMigrate,
    Running,
    Shutdown,
    GuestPanicked,
}

/// `query-status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusInfo {
    pub running: bool,
    /// Always false.
    pub singlestep: bool,
    pub status: RunState,
}

impl StatusInfo {
    /// The reply for a state.
    pub fn new(status: RunState) -> Self {
        Self { running: status == RunState::Running, singlestep: false, status }
    }
}

/// `query-name`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameInfo {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// `query-uuid`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UuidInfo {
    #[serde(rename = "UUID")]
    pub uuid: uuid::Uuid,
}

/// `query-kvm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmInfo {
    pub enabled: bool,
    pub present: bool,
}

/// One of `query-cpus-fast`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuInfo {
    /// The real thread: libvirt pins it.
    pub thread_id: i32,
    pub props: CpuProps,
    /// "/machine/unattached/device[N]".
    pub qom_path: String,
    pub cpu_index: u32,
    /// "x86_64".
    pub target: String,
}

/// A vCPU's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuProps {
    pub core_id: u32,
    pub thread_id: u32,
    pub socket_id: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub die_id: Option<u32>,
}

/// One of `query-chardev`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChardevInfo {
    pub label: String,
    pub filename: String,
    pub frontend_open: bool,
}

/// One of `x-query-network`: a NIC and its back end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkInfo {
    pub name: String,
    /// "nic" or "tap".
    #[serde(rename = "type")]
    pub kind: String,
    /// "model=virtio-net-pci,macaddr=52:54:00:12:34:56", "ifname=tap0".
    pub info: String,
    /// Whether the link is up.
    pub up: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<Box<NetworkInfo>>,
}

/// One of `query-pci`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciInfo {
    pub bus: u8,
    pub devices: Vec<PciDeviceInfo>,
}

/// A PCI function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciDeviceInfo {
    pub bus: u8,
    pub slot: u8,
    pub function: u8,
    pub class_info: PciClass,
    pub id: PciId,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub irq: Option<u8>,
    /// 0 is none, 1 is INTA.
    pub irq_pin: u8,
    /// The user's id, or empty.
    pub qdev_id: String,
    pub regions: Vec<PciRegion>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_bridge: Option<PciBridge>,
}

/// Class code and its name ("Ethernet controller").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciClass {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desc: Option<String>,
    pub class: u16,
}

/// Identifiers of a PCI function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PciId {
    pub device: u16,
    pub vendor: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subsystem_vendor: Option<u16>,
}

/// A BAR that the guest has placed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciRegion {
    pub bar: u8,
    /// "io" or "memory".
    #[serde(rename = "type")]
    pub kind: String,
    pub address: u64,
    pub size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefetch: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_type_64: Option<bool>,
}

/// What is behind a bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciBridge {
    pub bus: PciBus,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<PciDeviceInfo>,
}

/// A bridge's numbers and windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciBus {
    pub number: u8,
    pub secondary: u8,
    pub subordinate: u8,
    pub io_range: PciRange,
    pub memory_range: PciRange,
    pub prefetchable_range: PciRange,
}

/// First and last address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciRange {
    pub base: u64,
    pub limit: u64,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_names_are_qemus() {
        let status = serde_json::to_value(StatusInfo::new(RunState::FinishMigrate)).unwrap();
        assert_eq!(
            status,
            json!({"running": false, "singlestep": false, "status": "finish-migrate"})
        );
        let cpu = CpuInfo {
            thread_id: 9,
            props: CpuProps { core_id: 0, thread_id: 0, socket_id: 1, die_id: None },
            qom_path: "/machine/unattached/device[0]".into(),
            cpu_index: 1,
            target: "x86_64".into(),
        };
        assert_eq!(
            serde_json::to_value(cpu).unwrap(),
            json!({"thread-id": 9, "props": {"core-id": 0, "thread-id": 0, "socket-id": 1},
                   "qom-path": "/machine/unattached/device[0]", "cpu-index": 1,
                   "target": "x86_64"})
        );
    }
}
