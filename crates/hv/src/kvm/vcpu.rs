//! One vCPU: values in, values out.
//!
//! ```text
//!   run(Resume) ----> IoIn/MmioRead: `awaiting` = bytes wanted ----> run(Data) ----> ...
//!        |             IoOut longer than IoData::MAX: `pieces` ----> run(Resume): next piece
//!        +----------> anything else: nothing open
//! ```
//! Invariant: KVM_RUN is never entered while an answer is wanted or a piece is left.

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT,
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_IRQ_WINDOW_OPEN,
    KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT,
    KVM_EXIT_UNKNOWN, kvm_cpuid_entry2,
};
use kvm_ioctls::VcpuFd;

use super::state::VcpuState;
use super::{boot, io, kick, os, sys, vm};
use crate::{BootEntry, CpuidEntry, Entry, Error, Exit, IoData, Kicker, Result, Vcpu};

/// Where the answer to the last exit goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Open {
    Nothing,
    /// Port input: this many bytes at this offset in the kvm_run mapping.
    Io {
        offset: usize,
        len: usize,
    },
    /// MMIO read of this many bytes.
    Mmio {
        len: usize,
    },
    /// Port output: bytes `done..len` at `offset` are still to be reported.
    Pieces {
        offset: usize,
        len: usize,
        done: usize,
        port: u16,
        size: u8,
    },
}

/// A vCPU on KVM.
pub struct KvmVcpu {
    pub(super) fd: VcpuFd,
    pub(super) vm: Arc<vm::Shared>,
    kick: Arc<kick::Shared>,
    id: u32,
    open: Open,
    /// Since the last [`Entry::CompleteExit`] no guest code may run: answers only complete too.
    completing: bool,
    /// CPUID as it was set, to compare at restore.
    pub(super) cpuid: Vec<CpuidEntry>,
    /// The state at power-on, taken at the first [`Vcpu::set_boot`]: what a reset goes back to.
    power_on: Option<Box<VcpuState>>,
}

impl KvmVcpu {
    pub(super) fn new(vm: Arc<vm::Shared>, id: u32, apic_id: u32) -> Result<Self> {
        let fd = vm.fd.create_vcpu(apic_id.into()).map_err(os("cannot make a vCPU"))?;
        let kick =
            kick::Shared::new(&fd, vm.run_size).map_err(io("cannot map a vCPU's shared page"))?;
        let (open, cpuid) = (Open::Nothing, Vec::new());
        Ok(Self { fd, vm, kick, id, open, completing: false, cpuid, power_on: None })
    }

    /// `len` bytes at `offset` of the kvm_run mapping.
    fn area(&mut self, offset: usize, len: usize) -> Result<&mut [u8]> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.vm.run_size);
        if !inside {
            return Err(Error::State(format!("KVM names {len} bytes at {offset} of its page")));
        }
        let base = std::ptr::from_mut(self.fd.get_kvm_run()).cast::<u8>();
        // SAFETY: kvm_run is mapped with run_size bytes (checked above), as long as the fd lives;
        // the kernel touches it only inside KVM_RUN, which needs &mut self.
        Ok(unsafe { std::slice::from_raw_parts_mut(base.add(offset), len) })
    }

    /// Puts `data` where the last exit wants it.
    fn answer(&mut self, data: &[u8]) -> Result<()> {
        let wanted = match self.open {
            Open::Io { len, .. } | Open::Mmio { len } => len,
            _ => return Err(Error::State("an answer to an exit that wants none".into())),
        };
        if data.len() != wanted {
            let n = data.len();
            return Err(Error::State(format!("{n} bytes answer an exit that wants {wanted}")));
        }
        match self.open {
            Open::Io { offset, len } => self.area(offset, len)?.copy_from_slice(data),
            _ => {
                let run = self.fd.get_kvm_run();
                // SAFETY: an MMIO exit is open, so the union holds mmio; its data are plain bytes.
                unsafe { run.__bindgen_anon_1.mmio.data[..wanted].copy_from_slice(data) };
            }
        }
        self.open = Open::Nothing;
        Ok(())
    }

    /// Reports the next piece of a long port output.
    fn next_piece(&mut self) -> Result<Option<Exit>> {
        let Open::Pieces { offset, len, done, port, size } = self.open else {
            return Ok(None);
        };
        let n = (len - done).min(IoData::MAX);
        let data = IoData::new(self.area(offset + done, n)?);
        let done = done + n;
        self.open =
            if done < len { Open::Pieces { offset, len, done, port, size } } else { Open::Nothing };
        Ok(Some(Exit::IoOut { port, size, data }))
    }

    fn io_exit(&mut self) -> Result<Exit> {
        // SAFETY: the exit reason says that the union holds io.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        let (port, size, count) = (io.port, io.size, io.count);
        let len = usize::from(size) * count as usize;
        let offset = io.data_offset as usize;
        self.area(offset, len)?;
        if u32::from(io.direction) == KVM_EXIT_IO_IN {
            self.open = Open::Io { offset, len };
            return Ok(Exit::IoIn { port, size, count });
        }
        self.open = Open::Pieces { offset, len, done: 0, port, size };
        let piece = self.next_piece()?;
        piece.ok_or_else(|| Error::State("port output without data".into()))
    }

    fn mmio_exit(&mut self) -> Exit {
        // SAFETY: the exit reason says that the union holds mmio.
        let mmio = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.mmio };
        let len = (mmio.len as usize).min(mmio.data.len());
        if mmio.is_write != 0 {
            return Exit::MmioWrite { addr: mmio.phys_addr, data: IoData::new(&mmio.data[..len]) };
        }
        self.open = Open::Mmio { len };
        Exit::MmioRead { addr: mmio.phys_addr, len: len as u8 }
    }

    /// Says in words why KVM gave up.
    fn internal_error(&mut self) -> String {
        const EMULATION: u32 = kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
        // SAFETY: the exit reason says that the union holds internal.
        let e = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
        let cause = match e.suberror {
            EMULATION => "KVM cannot emulate an instruction",
            2 => "an exception came up while one was being delivered",
            3 => "an exit came while an exception was being delivered",
            4 => "an unexpected exit reason",
            _ => "KVM internal error",
        };
        let mut text = format!("{cause} (suberror {})", e.suberror);
        let data = &e.data[..(e.ndata as usize).min(e.data.len())];
        // Emulation failures: data[0] holds flags (bit 0: bytes are valid), then a length byte
        // and up to 15 instruction bytes.
        if e.suberror == EMULATION && data.len() >= 3 && data[0] & 1 != 0 {
            let raw: Vec<u8> = data[1..].iter().flat_map(|w| w.to_le_bytes()).collect();
            let n = usize::from(raw[0]).min(15).min(raw.len() - 1);
            let hex: Vec<_> = raw[1..=n].iter().map(|b| format!("{b:02x}")).collect();
            text += &format!(", bytes {}", hex.join(" "));
        } else if !data.is_empty() {
            text += &format!(", data {data:x?}");
        }
        text + &self.place()
    }

    fn place(&self) -> String {
        match self.fd.get_regs() {
            Ok(r) => format!(", vCPU {}, rip {:#x}, rsp {:#x}", self.id, r.rip, r.rsp),
            Err(_) => format!(", vCPU {}", self.id),
        }
    }

    fn decode_exit(&mut self) -> Result<Exit> {
        let reason = self.fd.get_kvm_run().exit_reason;
        Ok(match reason {
            KVM_EXIT_IO => self.io_exit()?,
            KVM_EXIT_MMIO => self.mmio_exit(),
            KVM_EXIT_HLT => Exit::Hlt,
            KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN => Exit::Interrupted,
            KVM_EXIT_SYSTEM_EVENT => {
                // SAFETY: the exit reason says that the union holds system_event.
                Exit::SystemEvent(unsafe {
                    self.fd.get_kvm_run().__bindgen_anon_1.system_event.type_
                })
            }
            KVM_EXIT_INTERNAL_ERROR => Exit::InternalError(self.internal_error()),
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: the exit reason says that the union holds fail_entry.
                let f = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.fail_entry };
                let hw = f.hardware_entry_failure_reason;
                let place = self.place();
                Exit::InternalError(format!("the CPU refuses the guest's state ({hw:#x}){place}"))
            }
            KVM_EXIT_UNKNOWN => {
                // SAFETY: the exit reason says that the union holds hw.
                let hw = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.hw };
                let (n, place) = (hw.hardware_exit_reason, self.place());
                Exit::InternalError(format!("an exit that KVM does not know ({n:#x}){place}"))
            }
            n => {
                Exit::InternalError(format!("an exit that Tern does not use ({n}){}", self.place()))
            }
        })
    }

    /// KVM_RUN failed.
    fn run_error(&mut self, e: std::io::Error) -> Result<Exit> {
        match e.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN) => {
                self.completing = false;
                self.kick.take();
                Ok(Exit::Interrupted)
            }
            Some(code @ (libc::EFAULT | libc::EHWPOISON)) => {
                let run = self.fd.get_kvm_run();
                let at = if run.exit_reason == KVM_EXIT_MEMORY_FAULT {
                    // SAFETY: the exit reason says that the union holds memory_fault.
                    let gpa = unsafe { run.__bindgen_anon_1.memory_fault.gpa };
                    format!(" at guest address {gpa:#x}")
                } else {
                    String::new()
                };
                let why = if code == libc::EHWPOISON { "is broken" } else { "cannot be reached" };
                Ok(Exit::InternalError(format!("guest memory{at} {why}{}", self.place())))
            }
            _ => Err(Error::Os { what: "cannot run a vCPU", source: e }),
        }
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kick.disown();
    }
}

impl Vcpu for KvmVcpu {
    fn id(&self) -> u32 {
        self.id
    }

    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<()> {
        let raw: Vec<_> = entries.iter().map(to_kvm).collect();
        let table = CpuId::from_entries(&raw)
            .map_err(|e| Error::State(format!("{} CPUID entries: {e:?}", raw.len())))?;
        self.fd.set_cpuid2(&table).map_err(os("KVM refuses the CPUID table"))?;
        self.cpuid = entries.to_vec();
        Ok(())
    }

    fn set_boot(&mut self, entry: Option<BootEntry>) -> Result<()> {
        self.open = Open::Nothing;
        match self.power_on.take() {
            Some(initial) => {
                let done = self.reset_to(&initial);
                self.power_on = Some(initial);
                done.map_err(|e| Error::State(format!("vCPU {}: {e}", self.id)))?;
            }
            None => {
                let initial = self
                    .take_state()
                    .map_err(|e| Error::State(format!("vCPU {}: {e}", self.id)))?;
                self.power_on = Some(Box::new(initial));
            }
        }
        boot::set_boot(&self.fd, entry)
    }

    fn run(&mut self, entry: Entry<'_>) -> Result<Exit> {
        self.kick.own();
        match entry {
            Entry::Resume => self.completing = false,
            Entry::CompleteExit => self.completing = true,
            Entry::Data(_) => {}
        }
        if let Some(exit) = self.next_piece()? {
            if matches!(entry, Entry::Data(_)) {
                return Err(Error::State("an answer to an exit that wants none".into()));
            }
            return Ok(exit);
        }
        match entry {
            Entry::Data(data) => self.answer(data)?,
            _ if self.open != Open::Nothing => {
                return Err(Error::State("the last exit wants an answer first".into()));
            }
            Entry::CompleteExit | Entry::Resume => {}
        }
        if self.completing {
            self.kick.request();
        }
        match sys::run(&self.fd) {
            Ok(()) => self.decode_exit(),
            Err(e) => self.run_error(e),
        }
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        self.kick.own();
        self.kick.clone()
    }

    fn save(&self, name: &str) -> state::Result<state::Section> {
        if self.open != Open::Nothing {
            let reason = "the last exit is not complete".into();
            return Err(state::Error::Unit { unit: name.into(), reason });
        }
        let state = self.take_state().map_err(|e| super::state::unit(name, e))?;
        state::Section::encode(name, &state)
    }

    fn restore(&mut self, section: &state::Section) -> state::Result<()> {
        let state: VcpuState = section.decode()?;
        self.open = Open::Nothing;
        self.put_state(&state)
    }

    fn notify_paused(&mut self) {
        // Fails when the guest has no kvmclock: then there is nothing to tell.
        if let Err(e) = self.fd.kvmclock_ctrl() {
            tracing::debug!(vcpu = self.id, "no kvmclock to notify: {e}");
        }
    }

    fn describe(&self) -> String {
        super::describe::vcpu(&self.fd, self.id)
    }
}

fn to_kvm(e: &CpuidEntry) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: e.function,
        index: e.index,
        flags: if e.indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
        ..Default::default()
    }
}
