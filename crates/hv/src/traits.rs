//! What the rest of Tern knows of a hypervisor. Nothing here is KVM's own.

use std::sync::Arc;

use mem::{DirtySource, GuestMemory};
use vmm_sys_util::eventfd::EventFd;

/// What a hypervisor call can fail with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call or ioctl failed.
    #[error("{what}: {source}")]
    Os { what: &'static str, source: std::io::Error },
    /// The host lacks something that Tern needs.
    #[error("this host's KVM lacks {0}")]
    Missing(&'static str),
    /// Restored state does not fit this host or machine.
    #[error("{0}")]
    State(String),
}

/// Shorthand for this crate's results.
pub type Result<T> = std::result::Result<T, Error>;

/// One CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuidEntry {
    pub function: u32,
    pub index: u32,
    /// Whether `index` matters for this leaf.
    pub indexed: bool,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// How a vCPU starts, for direct kernel boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootEntry {
    /// Linux's 64-bit boot protocol: long mode with identity-mapped pages that the caller wrote
    /// at `page_table`; rsi = `boot_params`. GDT at `gdt` (4 entries, flat) written by the caller.
    Long { rip: u64, rsi: u64, page_table: u64, gdt: u64 },
    /// PVH: 32-bit protected mode, paging off, ebx = `start_info`.
    Pvh { rip: u64, start_info: u64, gdt: u64 },
    /// The reset vector, real mode (firmware).
    Reset,
}

/// Why a vCPU came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// `in`: answer with [`Entry::Data`] of `size * count` bytes.
    IoIn { port: u16, size: u8, count: u32 },
    /// `out`: `data` holds one or more values of `size` bytes.
    IoOut { port: u16, size: u8, data: IoData },
    /// Memory read of `len` (1..=8) bytes: answer with [`Entry::Data`].
    MmioRead { addr: u64, len: u8 },
    /// Memory write.
    MmioWrite { addr: u64, data: IoData },
    /// `hlt` with no in-kernel irqchip.
    Hlt,
    /// Triple fault.
    Shutdown,
    /// The guest asked for a reset or shutdown through the hypervisor.
    SystemEvent(u32),
    /// Kicked, or a signal: nothing to do.
    Interrupted,
    /// The hypervisor cannot go on; the text says why (suberror, address, bytes).
    InternalError(String),
}

/// Up to [`IoData::MAX`] bytes of an exit, without allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoData {
    len: u16,
    bytes: [u8; IoData::MAX],
}

impl IoData {
    /// Most bytes of one exit that are carried here (string I/O comes in pieces of this size).
    pub const MAX: usize = 64;

    /// Copies `data`, at most [`MAX`](Self::MAX) bytes of it.
    pub fn new(data: &[u8]) -> Self {
        let len = data.len().min(Self::MAX);
        let mut bytes = [0; Self::MAX];
        bytes[..len].copy_from_slice(&data[..len]);
        Self { len: len as u16, bytes }
    }
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len as usize]
    }
}

/// What a vCPU is entered with.
#[derive(Debug, Clone, Copy)]
pub enum Entry<'a> {
    /// Nothing to hand in.
    Resume,
    /// The answer to the last [`Exit::IoIn`] or [`Exit::MmioRead`].
    Data(&'a [u8]),
    /// Only completes the last exit (so that its state can be saved), runs no guest code. Repeat
    /// it (or answer with [`Entry::Data`] what it asks, which then runs no guest code either)
    /// until it gives [`Exit::Interrupted`]: an instruction can need several exits.
    CompleteExit,
}

/// Makes a running vCPU come back soon with [`Exit::Interrupted`]; from any thread.
pub trait Kicker: Send + Sync {
    fn kick(&self);
}

/// One virtual CPU. Used by one thread at a time: the one that runs it.
pub trait Vcpu: Send {
    /// Its index, 0-based; also its APIC id unless the topology says otherwise.
    fn id(&self) -> u32;
    /// Sets what CPUID says. Before the first run.
    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<()>;
    /// Sets registers for a start at `entry` (vCPU 0), or waiting for SIPI (`None`: the others).
    fn set_boot(&mut self, entry: Option<BootEntry>) -> Result<()>;
    /// Runs guest code until something needs the VMM. The calling thread becomes the vCPU's.
    fn run(&mut self, entry: Entry<'_>) -> Result<Exit>;
    /// Something that interrupts [`run`](Self::run) from other threads. Call it on the thread
    /// that will run the vCPU.
    fn kicker(&self) -> Arc<dyn Kicker>;
    /// All state, as the CBOR bytes of a versioned `SavedState` section called `name`.
    fn save(&self, name: &str) -> state::Result<state::Section>;
    /// Takes over a saved state; it is untrusted.
    fn restore(&mut self, section: &state::Section) -> state::Result<()>;
    /// The guest was stopped for long: no soft-lockup warnings (KVM_KVMCLOCK_CTRL).
    fn notify_paused(&mut self);
    /// Guest registers for `info registers` and crash reports, as text.
    fn describe(&self) -> String;
}

/// Where an ioeventfd listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoAddress {
    Port(u16),
    Mmio(u64),
}

/// An interrupt route: GSI to irqchip pin or MSI message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Pin `pin` of irqchip `chip` (0 PIC master, 1 PIC slave, 2 IOAPIC).
    Irqchip { gsi: u32, chip: u32, pin: u32 },
    /// A message to `address` with `data`.
    Msi { gsi: u32, address: u64, data: u32 },
}

/// A virtual machine: memory slots, interrupts, clock.
pub trait Vm: Send + Sync {
    /// What CPUID can say on this host, to be filtered by the CPU model.
    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>>;
    /// Makes vCPU `id`.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>>;
    /// Makes vCPU `id` with an APIC id that the topology gives it (`cpu::apic_id`).
    fn create_vcpu_as(&self, id: u32, apic_id: u32) -> Result<Box<dyn Vcpu>> {
        if id != apic_id {
            return Err(Error::Missing("APIC ids that differ from the vCPU's index"));
        }
        self.create_vcpu(id)
    }
    /// Maps all of `mem`, slot = region index.
    fn map_memory(&self, mem: &GuestMemory) -> Result<()>;
    /// The log of pages that vCPUs (and the kernel on their behalf) wrote.
    fn dirty(&self, mem: &GuestMemory) -> Arc<dyn DirtySource>;
    /// Sets an irqchip pin's level.
    fn set_irq_line(&self, gsi: u32, level: bool) -> Result<()>;
    /// Sends one MSI.
    fn signal_msi(&self, address: u64, data: u32) -> Result<()>;
    /// Replaces the whole routing table.
    fn set_routes(&self, routes: &[Route]) -> Result<()>;
    /// Raises `gsi` whenever `fd` is written.
    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<()>;
    fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<()>;
    /// Signals `fd` when the guest writes to `address` (`len` 0: any width; `datamatch`: only that
    /// value), without an exit.
    fn register_ioevent(
        &self,
        fd: &EventFd,
        address: IoAddress,
        len: u32,
        datamatch: Option<u64>,
    ) -> Result<()>;
    fn unregister_ioevent(
        &self,
        fd: &EventFd,
        address: IoAddress,
        len: u32,
        datamatch: Option<u64>,
    ) -> Result<()>;
    /// PIC, IOAPIC and PIT, as a section called `name`.
    fn save_irqchip(&self, name: &str) -> state::Result<state::Section>;
    fn restore_irqchip(&self, section: &state::Section) -> state::Result<()>;
    /// Nanoseconds on the guest's clock (kvmclock).
    fn clock_ns(&self) -> Result<u64>;
    /// Sets the guest's clock, while all vCPUs stand still: the guest does not see time that
    /// passed since [`clock_ns`](Self::clock_ns) gave that value.
    fn set_clock_ns(&self, ns: u64) -> Result<()>;
    /// The guest's clock (kvmclock, with the host's real time at that moment), as a section.
    fn save_clock(&self, name: &str) -> state::Result<state::Section>;
    /// Sets the guest's clock so that it goes on by the real time that passed meanwhile.
    fn restore_clock(&self, section: &state::Section) -> state::Result<()>;
}
