//! A vCPU's saved state, and in which order KVM wants it back.
//!
//! Order of a restore: TSC frequency and TSC, special registers (they hold the APIC base),
//! general registers, XCRs, XSAVE, debug registers, MSRs, local APIC, TSC deadline (it needs the
//! APIC in deadline mode), events, run state.

use kvm_bindings::{kvm_mp_state, kvm_xcrs};
use kvm_ioctls::Cap;
use minicbor::{Decode, Encode};
use state::SavedState;

use super::clock::host_tsc;
use super::msrs::{self, IA32_TSC, IA32_TSC_DEADLINE, Msr};
use super::plain::{from_bytes, to_bytes};
use super::vcpu::KvmVcpu;
use super::{io, os, sys};
use crate::{CpuidEntry, Error, Result, Vcpu};

/// Most CPUID entries in a saved state (KVM_MAX_CPUID_ENTRIES).
const MAX_CPUID: usize = 256;
/// Most bytes in an XSAVE area that are taken from a saved state.
const MAX_XSAVE: usize = 1 << 20;
/// Where the timer's vector and mode are in the local APIC, and TSC-deadline mode in it.
const APIC_LVTT: usize = 0x320;
const LVTT_MODE: u32 = 3 << 17;
const LVTT_TSC_DEADLINE: u32 = 2 << 17;
/// Frequencies this close (parts per million) count as the same.
const TSC_TOLERANCE_PPM: u64 = 250;
/// All state of a vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct VcpuState {
    /// `struct kvm_regs`.
    #[n(0)]
    #[cbor(with = "minicbor::bytes")]
    pub(super) regs: Vec<u8>,
    /// `struct kvm_sregs`.
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub(super) sregs: Vec<u8>,
    /// `struct kvm_sregs2`, where the host has it: it keeps PAE guests' page directory pointers.
    #[n(2)]
    #[cbor(with = "minicbor::bytes")]
    pub(super) sregs2: Option<Vec<u8>>,
    /// The XSAVE area: FPU, SSE, AVX and the rest.
    #[n(3)]
    #[cbor(with = "minicbor::bytes")]
    pub(super) xsave: Vec<u8>,
    /// `struct kvm_xcrs`.
    #[n(4)]
    #[cbor(with = "minicbor::bytes")]
    pub(super) xcrs: Vec<u8>,
    /// `struct kvm_debugregs`.
    #[n(5)]
    #[cbor(with = "minicbor::bytes")]
    pub(super) debugregs: Vec<u8>,
    /// `struct kvm_lapic_state`.
    #[n(6)]
    #[cbor(with = "minicbor::bytes")]
    pub(super) lapic: Vec<u8>,
    /// KVM_MP_STATE_*.
    #[n(7)]
    pub(super) mp_state: u32,
    /// `struct kvm_vcpu_events`.
    #[n(8)]
    #[cbor(with = "minicbor::bytes")]
    pub(super) events: Vec<u8>,
    /// MSRs, without the TSC.
    #[n(9)]
    pub(super) msrs: Vec<Msr>,
    /// Guest TSC minus host TSC.
    #[n(10)]
    pub(super) tsc_offset: u64,
    /// The guest's TSC when it was saved.
    #[n(11)]
    pub(super) tsc: u64,
    /// kHz; 0 when the host does not say.
    #[n(12)]
    pub(super) tsc_khz: u32,
    /// What CPUID says: seven numbers an entry, as in [`CpuidEntry`].
    #[n(13)]
    pub(super) cpuid: Vec<[u32; 7]>,
}

impl SavedState for VcpuState {
    const KIND: &'static str = "kvm-vcpu";
    const VERSION: u16 = 1;
}

/// An error of the section or unit called `name`.
pub(super) fn unit(name: &str, e: impl std::fmt::Display) -> state::Error {
    state::Error::Unit { unit: name.into(), reason: e.to_string() }
}

fn cpuid_words(e: &CpuidEntry) -> [u32; 7] {
    let CpuidEntry { function, index, indexed, eax, ebx, ecx, edx } = *e;
    [function, index, indexed.into(), eax, ebx, ecx, edx]
}

fn cpuid_entry(w: &[u32; 7]) -> CpuidEntry {
    let [function, index, indexed, eax, ebx, ecx, edx] = *w;
    CpuidEntry { function, index, indexed: indexed != 0, eax, ebx, ecx, edx }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn same_frequency(a: u32, b: u32) -> bool {
    let (a, b) = (u64::from(a), u64::from(b));
    a.abs_diff(b) * 1_000_000 <= TSC_TOLERANCE_PPM * a.max(b)
}

impl KvmVcpu {
    /// Reads everything. The run state comes first, as asking for it can handle a pending SIPI.
    pub(super) fn take_state(&self) -> Result<VcpuState> {
        const WHAT: &str = "cannot read a vCPU's state";
        let fd = &self.fd;
        let mp_state = fd.get_mp_state().map_err(os(WHAT))?.mp_state;
        let sregs2 = if self.has_sregs2() {
            Some(to_bytes(&sys::get_sregs2(fd).map_err(io(WHAT))?))
        } else {
            None
        };
        let lapic = to_bytes(&fd.get_lapic().map_err(os(WHAT))?);
        let list = msrs::list(&self.vm, fd)?;
        let mut msrs = msrs::read(fd, &list)?;
        let (tsc_offset, tsc) = self.tsc_offset()?;
        msrs.retain(|m| m.index != IA32_TSC);
        keep_expired_deadline(&lapic, &mut msrs, tsc);
        Ok(VcpuState {
            regs: to_bytes(&fd.get_regs().map_err(os(WHAT))?),
            sregs: to_bytes(&fd.get_sregs().map_err(os(WHAT))?),
            sregs2,
            xsave: sys::get_xsave(fd, self.vm.xsave_size).map_err(io(WHAT))?,
            xcrs: to_bytes(&fd.get_xcrs().map_err(os(WHAT))?),
            debugregs: to_bytes(&fd.get_debug_regs().map_err(os(WHAT))?),
            lapic,
            mp_state,
            events: to_bytes(&fd.get_vcpu_events().map_err(os(WHAT))?),
            msrs,
            tsc_offset,
            tsc,
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
            cpuid: self.cpuid.iter().map(cpuid_words).collect(),
        })
    }

    /// Goes back to the state at power-on; TSC and clock go on.
    pub(super) fn reset_to(&mut self, initial: &VcpuState) -> state::Result<()> {
        self.put_registers(initial)
    }

    /// Takes over a saved state, which is untrusted.
    pub(super) fn put_state(&mut self, s: &VcpuState) -> state::Result<()> {
        self.check_cpuid(&s.cpuid)?;
        self.put_tsc(s)?;
        self.put_registers(s)
    }

    fn put_registers(&mut self, s: &VcpuState) -> state::Result<()> {
        let fd = &self.fd;
        // Everything is decoded, and its lengths checked, before the first register is set.
        let regs = from_bytes("regs", &s.regs)?;
        let sregs = from_bytes("sregs", &s.sregs)?;
        let sregs2 = s.sregs2.as_deref().map(|b| from_bytes("sregs2", b)).transpose()?;
        let xcrs: kvm_xcrs = from_bytes("xcrs", &s.xcrs)?;
        if xcrs.nr_xcrs as usize > xcrs.xcrs.len() {
            return Err(state::Error::invalid("xcrs", format!("{} of them", xcrs.nr_xcrs)));
        }
        let debugregs = from_bytes("debugregs", &s.debugregs)?;
        let lapic = from_bytes("lapic", &s.lapic)?;
        let events = from_bytes("events", &s.events)?;
        let xsave = self.fit_xsave(&s.xsave)?;
        if s.msrs.len() > msrs::MAX_MSRS {
            return Err(state::Error::invalid("msrs", format!("{} of them", s.msrs.len())));
        }
        let (late, early): (Vec<Msr>, Vec<Msr>) =
            s.msrs.iter().partition(|m| m.index == IA32_TSC_DEADLINE);

        let bad = |field| move |e: kvm_ioctls::Error| refused(field, e);
        match sregs2 {
            Some(sregs2) if self.has_sregs2() => {
                sys::set_sregs2(fd, &sregs2).map_err(|e| refused("sregs2", e))?;
            }
            _ => fd.set_sregs(&sregs).map_err(bad("sregs"))?,
        }
        fd.set_regs(&regs).map_err(bad("regs"))?;
        if xcrs.nr_xcrs > 0 {
            fd.set_xcrs(&xcrs).map_err(bad("xcrs"))?;
        }
        sys::set_xsave(fd, self.vm.xsave_size, &xsave).map_err(|e| refused("xsave", e))?;
        fd.set_debug_regs(&debugregs).map_err(bad("debugregs"))?;
        self.put_msrs(&early)?;
        fd.set_lapic(&lapic).map_err(bad("lapic"))?;
        self.put_msrs(&late)?;
        fd.set_vcpu_events(&events).map_err(bad("events"))?;
        fd.set_mp_state(kvm_mp_state { mp_state: s.mp_state }).map_err(bad("mp_state"))
    }

    /// Writes MSRs. One that KVM refuses is an error unless it already has that value here, or
    /// has none and would be zero.
    fn put_msrs(&self, msrs: &[Msr]) -> state::Result<()> {
        let refused = msrs::write(&self.fd, msrs).map_err(|e| unit("msrs", e))?;
        for m in refused {
            let here = msrs::read(&self.fd, &[m.index]).map_err(|e| unit("msrs", e))?;
            if here.first().map_or(0, |h| h.value) != m.value {
                let (index, value) = (m.index, m.value);
                let reason = format!("this host does not take MSR {index:#x} = {value:#x}");
                return Err(state::Error::invalid("msrs", reason));
            }
        }
        Ok(())
    }

    /// A saved XSAVE area in this host's length: cut only where nothing is lost.
    fn fit_xsave(&self, saved: &[u8]) -> state::Result<Vec<u8>> {
        let want = self.vm.xsave_size.max(sys::XSAVE_MIN);
        if saved.len() < sys::XSAVE_MIN || saved.len() > MAX_XSAVE {
            let reason = format!("{} bytes, expected {want}", saved.len());
            return Err(state::Error::invalid("xsave", reason));
        }
        if saved.iter().skip(want).any(|b| *b != 0) {
            let n = saved.len();
            let reason = format!("holds {n} bytes of CPU state, this host keeps {want}");
            return Err(state::Error::invalid("xsave", reason));
        }
        let mut area = saved.to_vec();
        area.resize(want, 0);
        Ok(area)
    }

    fn has_sregs2(&self) -> bool {
        self.vm.fd.check_extension_raw(kvm_bindings::KVM_CAP_SREGS2.into()) > 0
    }

    /// Refuses a state of another CPU, naming the first leaf that differs. A vCPU whose CPUID was
    /// not set yet takes the saved one.
    fn check_cpuid(&mut self, saved: &[[u32; 7]]) -> state::Result<()> {
        if saved.len() > MAX_CPUID {
            return Err(state::Error::invalid("cpuid", format!("{} entries", saved.len())));
        }
        let saved: Vec<_> = saved.iter().map(cpuid_entry).collect();
        if self.cpuid.is_empty() && !saved.is_empty() {
            return self.set_cpuid(&saved).map_err(|e| unit("cpuid", e));
        }
        let differs = saved.iter().find(|e| !self.cpuid.contains(e));
        let missing = self.cpuid.iter().find(|e| !saved.contains(e));
        match differs.or(missing) {
            None => Ok(()),
            Some(e) => {
                let reason = format!(
                    "leaf {:#x}.{} differs from this machine's: is the CPU model the same?",
                    e.function, e.index
                );
                Err(state::Error::invalid("cpuid", reason))
            }
        }
    }

    /// Guest TSC minus host TSC, and the guest's TSC.
    fn tsc_offset(&self) -> Result<(u64, u64)> {
        let before = host_tsc();
        let tsc = msrs::read(&self.fd, &[IA32_TSC])?.first().map_or(0, |m| m.value);
        let middle = before + host_tsc().saturating_sub(before) / 2;
        let exact = sys::get_tsc_offset(&self.fd);
        Ok((exact.unwrap_or(tsc.wrapping_sub(middle)), tsc))
    }

    fn put_tsc(&self, s: &VcpuState) -> state::Result<()> {
        let here = self.fd.get_tsc_khz().unwrap_or(0);
        let scaled = s.tsc_khz != 0 && here != 0 && !same_frequency(s.tsc_khz, here);
        if scaled {
            let can = self.vm.fd.check_extension(Cap::TscControl);
            if !can || self.fd.set_tsc_khz(s.tsc_khz).is_err() {
                let (was, vcpu) = (s.tsc_khz, self.id());
                tracing::warn!(vcpu, "guest's TSC ran at {was} kHz, here it runs at {here} kHz");
            }
        }
        let shift = *self.vm.tsc_shift.lock();
        let khz = if s.tsc_khz != 0 { s.tsc_khz } else { here };
        if let (Some(shift), false) = (shift, scaled) {
            let offset = shift.apply(s.tsc_offset, khz);
            if sys::set_tsc_offset(&self.fd, offset).is_ok() {
                return Ok(());
            }
            let value = offset.wrapping_add(host_tsc());
            return self.put_msrs(&[Msr { index: IA32_TSC, value }]);
        }
        let passed = shift.map_or(0, |shift| shift.elapsed_cycles(khz));
        self.put_msrs(&[Msr { index: IA32_TSC, value: s.tsc.wrapping_add(passed) }])
    }
}

/// A TSC-deadline timer that has expired but whose interrupt is not yet in the local APIC reads
/// as 0, and would be lost: saved as a deadline that is due now.
fn keep_expired_deadline(lapic: &[u8], msrs: &mut [Msr], tsc: u64) {
    if word(lapic, APIC_LVTT) & LVTT_MODE != LVTT_TSC_DEADLINE {
        return;
    }
    for m in msrs.iter_mut().filter(|m| m.index == IA32_TSC_DEADLINE && m.value == 0) {
        m.value = tsc.max(1);
    }
}

fn refused(field: &'static str, e: impl std::fmt::Display) -> state::Error {
    state::Error::invalid(field, format!("KVM refuses it: {e}"))
}

impl From<Error> for state::Error {
    fn from(e: Error) -> Self {
        unit("kvm", e)
    }
}
