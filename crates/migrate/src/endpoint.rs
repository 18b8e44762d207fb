//! What a migration needs of the machine at either end. `vmm` implements it; tests have their own.

use std::sync::Arc;
use std::time::Instant;

use mem::{DirtySource, GuestMemory};
use minicbor::{Decode, Encode};
use state::Sections;

/// What a machine is, as far as the other end must agree: sent before any memory moves.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct Preamble {
    /// Version of the machine type ("q35-1").
    #[n(0)]
    pub machine: String,
    /// CPU model as configured.
    #[n(1)]
    pub cpu_model: String,
    /// What CPUID says to the guest: (function, index, eax, ebx, ecx, edx).
    #[n(2)]
    pub cpuid: Vec<(u32, u32, u32, u32, u32, u32)>,
    /// vCPUs that exist.
    #[n(3)]
    pub vcpus: u32,
    /// RAM: (guest address, bytes), ascending.
    #[n(4)]
    pub ram: Vec<(u64, u64)>,
    /// Devices by section name, with kind, version and where they sit ("virtio-net-pci at 00:02.0,
    /// queues 2, features 0x..."). Whatever must be equal at both ends is in the text.
    #[n(5)]
    pub devices: Vec<DeviceSpec>,
    /// How the vCPUs are arranged ("sockets=1,dies=1,cores=2,threads=1"), as the guest sees it.
    #[n(6)]
    pub topology: Option<String>,
    /// NUMA nodes with their vCPUs and memory, as the guest's tables say; "none" without.
    #[n(7)]
    pub numa: Option<String>,
}

/// A device as the other end must have it too.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct DeviceSpec {
    /// Section name.
    #[n(0)]
    pub name: String,
    /// Section kind.
    #[n(1)]
    pub kind: String,
    /// Section version that the source writes.
    #[n(2)]
    pub version: u16,
    /// Versions that this end reads.
    #[n(3)]
    pub reads: Vec<u16>,
    /// Properties that must be equal, as (name, value).
    #[n(4)]
    pub properties: Vec<(String, String)>,
}

/// A frame that came to the source's NIC after the guest had stopped there.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct LateFrame {
    /// Section name of the NIC.
    #[n(0)]
    pub nic: String,
    /// The frame, with the header that the NIC's back end puts in front.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub frame: Vec<u8>,
}

/// The machine, to a migration. Calls come from the migration's own thread. Errors are sentences
/// for the user.
pub trait Endpoint: Send + Sync {
    /// What this machine is.
    fn preamble(&self) -> Result<Preamble, String>;
    /// Why `remote` (the source's) does not fit this machine (the destination): one sentence a
    /// difference, naming both sides' values. Empty when it fits.
    fn differences(&self, remote: &Preamble) -> Vec<String>;
    /// Why this machine cannot be migrated now, if so.
    fn blockers(&self) -> Vec<String>;
    /// Guest RAM.
    fn memory(&self) -> GuestMemory;
    /// Everything that writes to it.
    fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>>;
    /// Whether the guest runs now (a paused guest migrates too and stays paused).
    fn is_running(&self) -> bool;
    /// Source: stops vCPUs and drains devices, until `deadline`. Emits STOP if it ran.
    fn quiesce(&self, deadline: Instant) -> Result<(), String>;
    /// Source: saves all device and vCPU state. Quiesced.
    fn save(&self) -> Result<Sections, String>;
    /// Source: gives up the disk locks, just before go.
    fn release_locks(&self) -> Result<(), String>;
    /// Source after an abort before go, or after a refusal: takes the locks back if they were
    /// released and goes on (if it ran before). Emits RESUME. It ends an
    /// [`undecided`](Self::undecided).
    fn resume(&self) -> Result<(), String>;
    /// Source: the guest runs elsewhere for good. It never runs here again. It ends an
    /// [`undecided`](Self::undecided).
    fn handed_over(&self);
    /// Source, in a migration after go of which nobody knows whether the guest runs at the
    /// destination: it stays stopped here, and only the operator may let it go on, unless the
    /// destination answers after all.
    fn undecided(&self);
    /// Destination: everything that can be done before the pause (fault in memory, open back ends).
    fn prepare(&self) -> Result<(), String>;
    /// Destination: takes over device and vCPU state.
    fn load(&self, sections: Sections) -> Result<(), String>;
    /// Destination, on go: takes the disk locks. If that fails, the guest must not run here.
    fn acquire_locks(&self) -> Result<(), String>;
    /// Destination, on go with the locks held: runs vCPUs, but device output (frames, disk
    /// requests) is still held back, so that until [`release_output`](Self::release_output)
    /// nothing outside this process can have seen this guest run here.
    fn run_held(&self) -> Result<(), String>;
    /// Destination: the source has acknowledged. Lets devices do I/O, announces NICs, emits RESUME.
    fn release_output(&self);
    /// Source, after the destination's output flows: frames that came for the guest after it had
    /// stopped here, and whether the network has shown that it knows its new place. Called until
    /// a little after that is so, but not for long. `None`: there is no NIC.
    fn late_frames(&self) -> Option<(Vec<LateFrame>, bool)> {
        None
    }
    /// Destination: delivers such frames.
    fn deliver_late(&self, frames: Vec<LateFrame>) {
        drop(frames);
    }
    /// Destination: the migration ended without go: this machine never runs.
    fn discard(&self);
}
