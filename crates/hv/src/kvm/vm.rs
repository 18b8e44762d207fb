//! The VM: memory slots, interrupt controllers, interrupt routes and doorbells.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::fd::{FromRawFd, IntoRawFd};
use std::path::Path;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_X2APIC_API, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_PIT_SPEAKER_DUMMY, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    KvmIrqRouting, kvm_cpuid_entry2, kvm_enable_cap, kvm_ioeventfd,
    kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio,
    kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_msi, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use mem::{DirtySource, GuestMemory, Region};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use super::dirty::KvmDirty;
use super::vcpu::KvmVcpu;
use super::{io, os, sys};
use crate::{CpuidEntry, Error, IoAddress, Result, Route, Vcpu, Vm};

/// Where KVM's device lies.
pub const DEFAULT_PATH: &str = "/dev/kvm";

/// The only KVM API version there is (Linux documentation, virt/kvm/api, section 4.1).
const API_VERSION: i32 = 12;
/// Three pages below 4 GiB that VT-x needs for real mode, out of the way of firmware; and one
/// page for its identity map, below them.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// Most routes in a table (KVM_MAX_IRQ_ROUTES).
const MAX_ROUTES: usize = 4096;
/// Extra CPUID entries beyond what kvm-bindings expects are refused by it.
const MAX_CPUID: usize = KVM_MAX_CPUID_ENTRIES;

const CPUID_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const CPUID_1_ECX_HYPERVISOR: u32 = 1 << 31;

/// What the VM, its vCPUs and its dirty log share.
pub(super) struct Shared {
    pub(super) fd: VmFd,
    pub(super) kvm: Kvm,
    /// The log is cleared by KVM_CLEAR_DIRTY_LOG instead of by reading it.
    pub(super) manual_clear: bool,
    /// KVM_CAP_XSAVE2's value: bytes of an XSAVE area, or 0.
    pub(super) xsave_size: usize,
    /// Bytes of a vCPU's shared kvm_run mapping.
    pub(super) run_size: usize,
    /// MSRs that save and restore carry; found when the first vCPU is saved.
    pub(super) msrs: Mutex<Option<Arc<[u32]>>>,
    /// Set by restoring the clock, used by restoring vCPUs.
    pub(super) tsc_shift: Mutex<Option<super::clock::TscShift>>,
}

impl Shared {
    /// Sets memory slot `r.index`, with or without dirty logging.
    pub(super) fn set_slot(&self, r: &Region, log: bool) -> std::io::Result<()> {
        let slot = kvm_userspace_memory_region {
            slot: r.index as u32,
            flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: r.gpa,
            memory_size: r.size,
            userspace_addr: r.host as u64,
        };
        // SAFETY: the region is a mapping of a GuestMemory that `KvmVm::mem` (and the dirty log)
        // keeps alive as long as the VM.
        unsafe { self.fd.set_user_memory_region(slot) }
            .map_err(|e| std::io::Error::from_raw_os_error(e.errno()))
    }
}

/// A VM on KVM, with KVM's own PIC, IOAPIC, local APICs and PIT.
pub struct KvmVm {
    pub(super) shared: Arc<Shared>,
    /// The memory behind the slots: it must outlive them.
    mem: Mutex<Option<GuestMemory>>,
}

impl KvmVm {
    /// Opens KVM's device at `path` (normally [`DEFAULT_PATH`]) and makes a VM.
    ///
    /// # Errors
    /// [`Error::Os`] when the device cannot be opened, with what to do; [`Error::Missing`] when
    /// KVM lacks something.
    pub fn new(path: &Path) -> Result<Arc<Self>> {
        let file = std::fs::File::options().read(true).write(true).open(path);
        Self::from_fd(file.map_err(open_error)?.into())
    }

    /// Makes a VM on an open KVM device (one that was handed in).
    pub fn from_fd(fd: OwnedFd) -> Result<Arc<Self>> {
        // SAFETY: the fd is ours and passes to the Kvm, which closes it.
        let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
        if kvm.get_api_version() != API_VERSION {
            return Err(Error::Missing("API version 12 (is it really KVM's device?)"));
        }
        require(&kvm)?;
        let fd = create_vm(&kvm)?;
        set_up_irqchip(&fd)?;
        let manual_clear = enable_manual_clear(&fd);
        let run_size = kvm.get_vcpu_mmap_size().map_err(os("cannot ask KVM for kvm_run's size"))?;
        let xsave_size = fd.check_extension_int(Cap::Xsave2).max(0) as usize;
        let shared = Arc::new(Shared {
            fd,
            kvm,
            manual_clear,
            xsave_size,
            run_size,
            msrs: Mutex::new(None),
            tsc_shift: Mutex::new(None),
        });
        Ok(Arc::new(Self { shared, mem: Mutex::new(None) }))
    }

    /// Most vCPUs that this host's KVM allows in a VM.
    pub fn max_vcpus(&self) -> usize {
        self.shared.kvm.get_max_vcpus()
    }

    /// As [`Vm::create_vcpu_as`], with the concrete type.
    pub fn new_vcpu(&self, id: u32, apic_id: u32) -> Result<KvmVcpu> {
        KvmVcpu::new(self.shared.clone(), id, apic_id)
    }
}

impl AsRawFd for KvmVm {
    /// The VM's fd, for kernel devices that attach to it (VFIO).
    fn as_raw_fd(&self) -> RawFd {
        self.shared.fd.as_raw_fd()
    }
}

fn open_error(source: std::io::Error) -> Error {
    let what = match source.raw_os_error() {
        Some(libc::ENOENT) => {
            "KVM's device is not there: enable virtualisation in the firmware and load kvm_intel \
             or kvm_amd (`modprobe kvm_intel`)"
        }
        Some(libc::EACCES | libc::EPERM) => {
            "no access to KVM's device: add this user to the group kvm (`usermod -aG kvm USER`) \
             and log in anew"
        }
        Some(libc::ENODEV | libc::ENXIO) => {
            "KVM's device has no driver: load kvm_intel or kvm_amd, and enable virtualisation in \
             the firmware"
        }
        _ => "cannot open KVM's device",
    };
    Error::Os { what, source }
}

/// Refuses hosts without what every VM here needs.
fn require(kvm: &Kvm) -> Result<()> {
    let needed = [
        (Cap::Irqchip, "an in-kernel interrupt controller (KVM_CAP_IRQCHIP)"),
        (Cap::Pit2, "an in-kernel timer (KVM_CAP_PIT2)"),
        (Cap::UserMemory, "user memory slots (KVM_CAP_USER_MEMORY)"),
        (Cap::Irqfd, "interrupts by eventfd (KVM_CAP_IRQFD)"),
        (Cap::Ioeventfd, "doorbells by eventfd (KVM_CAP_IOEVENTFD)"),
        (Cap::SignalMsi, "MSI by ioctl (KVM_CAP_SIGNAL_MSI)"),
        (Cap::ImmediateExit, "interruptible runs (KVM_CAP_IMMEDIATE_EXIT)"),
        (Cap::ExtCpuid, "CPUID tables (KVM_CAP_EXT_CPUID)"),
        (Cap::VcpuEvents, "vCPU events (KVM_CAP_VCPU_EVENTS)"),
        (Cap::Xsave, "XSAVE state (KVM_CAP_XSAVE)"),
        (Cap::AdjustClock, "a settable guest clock (KVM_CAP_ADJUST_CLOCK)"),
    ];
    match needed.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(Error::Missing(name)),
        None => Ok(()),
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            result => return result.map_err(os("cannot make a VM")),
        }
    }
}

fn set_up_irqchip(fd: &VmFd) -> Result<()> {
    if fd.check_extension(Cap::SetIdentityMapAddr) {
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(os("cannot set VT-x's identity map address"))?;
    }
    fd.set_tss_address(TSS_ADDRESS).map_err(os("cannot set VT-x's TSS address"))?;
    fd.create_irq_chip().map_err(os("cannot make KVM's interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    fd.create_pit2(pit).map_err(os("cannot make KVM's timer"))?;
    // APIC ids above 254; guests with fewer vCPUs do not need it.
    let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    if !enable(fd, KVM_CAP_X2APIC_API, flags.into()) {
        tracing::debug!("this host's KVM has no 32-bit APIC ids");
    }
    Ok(())
}

fn enable_manual_clear(fd: &VmFd) -> bool {
    let cap = kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
    let has = fd.check_extension_raw(cap.into()).max(0) as u32;
    let both = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    let flags = has & both;
    flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0 && enable(fd, cap, flags.into())
}

fn enable(fd: &VmFd, cap: u32, arg: u64) -> bool {
    let request = kvm_enable_cap { cap, args: [arg, 0, 0, 0], ..Default::default() };
    fd.enable_cap(&request).is_ok()
}

fn ioevent(
    fd: &EventFd,
    address: IoAddress,
    len: u32,
    datamatch: Option<u64>,
    extra: u32,
) -> kvm_ioeventfd {
    let (addr, pio) = match address {
        IoAddress::Port(p) => (u64::from(p), 1 << kvm_ioeventfd_flag_nr_pio),
        IoAddress::Mmio(a) => (a, 0),
    };
    let matched = if datamatch.is_some() { 1 << kvm_ioeventfd_flag_nr_datamatch } else { 0 };
    kvm_ioeventfd {
        datamatch: datamatch.unwrap_or(0),
        addr,
        len,
        fd: fd.as_raw_fd(),
        flags: pio | matched | extra,
        ..Default::default()
    }
}

fn routing_entry(route: &Route) -> kvm_irq_routing_entry {
    let mut e = kvm_irq_routing_entry::default();
    match *route {
        Route::Irqchip { gsi, chip, pin } => {
            e.gsi = gsi;
            e.type_ = KVM_IRQ_ROUTING_IRQCHIP;
            e.u.irqchip = kvm_irq_routing_irqchip { irqchip: chip, pin };
        }
        Route::Msi { gsi, address, data } => {
            e.gsi = gsi;
            e.type_ = KVM_IRQ_ROUTING_MSI;
            e.u.msi = kvm_irq_routing_msi {
                address_lo: address as u32,
                address_hi: (address >> 32) as u32,
                data,
                ..Default::default()
            };
        }
    }
    e
}

impl From<&kvm_cpuid_entry2> for CpuidEntry {
    fn from(e: &kvm_cpuid_entry2) -> Self {
        CpuidEntry {
            function: e.function,
            index: e.index,
            indexed: e.flags & kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
        }
    }
}

impl Vm for KvmVm {
    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>> {
        let table: CpuId = self
            .shared
            .kvm
            .get_supported_cpuid(MAX_CPUID)
            .map_err(os("cannot ask KVM for the CPUID that it supports"))?;
        let mut entries: Vec<_> = table.as_slice().iter().map(CpuidEntry::from).collect();
        let deadline = self.shared.fd.check_extension(Cap::TscDeadlineTimer);
        for e in entries.iter_mut().filter(|e| e.function == 1) {
            // KVM reports the TSC-deadline timer by a capability only, and older ones leave
            // out that there is a hypervisor.
            e.ecx |= CPUID_1_ECX_HYPERVISOR;
            if deadline {
                e.ecx |= CPUID_1_ECX_TSC_DEADLINE;
            }
        }
        Ok(entries)
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>> {
        self.create_vcpu_as(id, id)
    }

    fn create_vcpu_as(&self, id: u32, apic_id: u32) -> Result<Box<dyn Vcpu>> {
        Ok(Box::new(self.new_vcpu(id, apic_id)?))
    }

    fn map_memory(&self, mem: &GuestMemory) -> Result<()> {
        let mut held = self.mem.lock();
        if held.is_some() {
            return Err(Error::State("this VM has its memory already".into()));
        }
        // Held first: should a slot fail, those before it still point into it.
        *held = Some(mem.clone());
        for r in mem.regions() {
            self.shared.set_slot(r, false).map_err(io("cannot map guest memory into the VM"))?;
        }
        Ok(())
    }

    fn dirty(&self, mem: &GuestMemory) -> Arc<dyn DirtySource> {
        Arc::new(KvmDirty::new(self.shared.clone(), mem.clone()))
    }

    fn set_irq_line(&self, gsi: u32, level: bool) -> Result<()> {
        self.shared.fd.set_irq_line(gsi, level).map_err(os("cannot set an interrupt line"))
    }

    fn signal_msi(&self, address: u64, data: u32) -> Result<()> {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        // The number of vCPUs that took it; 0 is a guest that masked it, which is its affair.
        self.shared.fd.signal_msi(msi).map(|_| ()).map_err(os("cannot send an MSI"))
    }

    fn set_routes(&self, routes: &[Route]) -> Result<()> {
        if routes.len() > MAX_ROUTES {
            let n = routes.len();
            return Err(Error::State(format!("{n} interrupt routes, the most is {MAX_ROUTES}")));
        }
        let entries: Vec<_> = routes.iter().map(routing_entry).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|e| Error::State(format!("interrupt routes: {e:?}")))?;
        self.shared.fd.set_gsi_routing(&table).map_err(os("cannot set the interrupt routes"))
    }

    fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<()> {
        self.shared.fd.register_irqfd(fd, gsi).map_err(os("cannot add an interrupt's eventfd"))
    }

    fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<()> {
        self.shared.fd.unregister_irqfd(fd, gsi).map_err(os("cannot remove an interrupt's eventfd"))
    }

    fn register_ioevent(
        &self,
        fd: &EventFd,
        address: IoAddress,
        len: u32,
        datamatch: Option<u64>,
    ) -> Result<()> {
        sys::ioeventfd(&self.shared.fd, &ioevent(fd, address, len, datamatch, 0))
            .map_err(io("cannot add a doorbell"))
    }

    fn unregister_ioevent(
        &self,
        fd: &EventFd,
        address: IoAddress,
        len: u32,
        datamatch: Option<u64>,
    ) -> Result<()> {
        let flag = 1 << kvm_ioeventfd_flag_nr_deassign;
        sys::ioeventfd(&self.shared.fd, &ioevent(fd, address, len, datamatch, flag))
            .map_err(io("cannot remove a doorbell"))
    }

    fn save_irqchip(&self, name: &str) -> state::Result<state::Section> {
        super::irqchip::save(&self.shared, name)
    }

    fn restore_irqchip(&self, section: &state::Section) -> state::Result<()> {
        super::irqchip::restore(&self.shared, section)
    }

    fn clock_ns(&self) -> Result<u64> {
        let data = self.shared.fd.get_clock().map_err(os("cannot read the guest's clock"))?;
        Ok(data.clock)
    }

    fn set_clock_ns(&self, ns: u64) -> Result<()> {
        let data = kvm_bindings::kvm_clock_data { clock: ns, ..Default::default() };
        self.shared.fd.set_clock(&data).map_err(os("cannot set the guest's clock"))
    }

    fn save_clock(&self, name: &str) -> state::Result<state::Section> {
        super::clock::save(&self.shared, name)
    }

    fn restore_clock(&self, section: &state::Section) -> state::Result<()> {
        super::clock::restore(&self.shared, section)
    }
}
