//! The guest's clock: kvmclock and TSC go on by the real time that passed between save and
//! restore, together, so that neither of the guest's clock sources jumps back.
//!
//! As the kernel's documentation has it (virt/kvm/devices/vcpu, KVM_VCPU_TSC_OFFSET): one reading
//! of kvmclock, host TSC and real time at the source, one at the destination, and from both a
//! single correction that is added to every vCPU's TSC offset. One for all, so that the vCPUs'
//! TSCs keep their distance to the cycle. Hence the order: the clock is restored before vCPUs.

use std::io;

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::Cap;
use minicbor::{Decode, Encode};
use state::{SavedState, Section};

use super::state::unit;
use super::vm::Shared;

/// Longest pause that counts as elapsed time (366 days, in ns). Beyond it one of the hosts'
/// clocks is wrong, and the guest's clock goes on as if no time had passed.
const MAX_PAUSE_NS: u64 = 366 * 24 * 3600 * 1_000_000_000;
/// Readings tried for a narrow bracket when the kernel cannot read all clocks at once.
const TRIES: usize = 5;

/// The guest's clock at one instant.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub(super) struct ClockState {
    /// kvmclock, ns since the VM's start.
    #[n(0)]
    pub(super) clock_ns: u64,
    /// The host's CLOCK_REALTIME, ns since 1970.
    #[n(1)]
    pub(super) realtime_ns: u64,
    /// The host's TSC.
    #[n(2)]
    pub(super) host_tsc: u64,
}

impl SavedState for ClockState {
    const KIND: &'static str = "kvm-clock";
    const VERSION: u16 = 1;
}

/// What restoring the clock found out for the vCPUs that are restored after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TscShift {
    /// kvmclock ns that passed from save to restore.
    elapsed_ns: i128,
    /// Source's host TSC minus this host's at the two readings.
    host_tsc: i128,
}

impl TscShift {
    /// The TSC offset here of a vCPU that had `offset` at the source; TSC at `khz`.
    pub(super) fn apply(self, offset: u64, khz: u32) -> u64 {
        let cycles = self.elapsed_ns * i128::from(khz) / 1_000_000;
        (i128::from(offset) + cycles + self.host_tsc) as u64
    }

    /// Cycles at `khz` that passed from save to restore.
    pub(super) fn elapsed_cycles(self, khz: u32) -> u64 {
        (self.elapsed_ns.max(0) * i128::from(khz) / 1_000_000) as u64
    }
}

fn host_realtime() -> io::Result<u64> {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: t is valid for the call, which writes only into it.
    if unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &mut t) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64)
}

/// This host's TSC now.
pub(super) fn host_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn get_clock(vm: &Shared) -> io::Result<kvm_clock_data> {
    vm.fd.get_clock().map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

/// Reads kvmclock, real time and host TSC at one instant: exactly where the kernel can, else as
/// the middle of the narrowest of some brackets.
fn read(vm: &Shared) -> io::Result<ClockState> {
    let mut best: Option<(u64, ClockState)> = None;
    for _ in 0..TRIES {
        let (tsc0, real0) = (host_tsc(), host_realtime()?);
        let data = get_clock(vm)?;
        let (real1, tsc1) = (host_realtime()?, host_tsc());
        let (clock_ns, realtime_ns, host_tsc) = (data.clock, data.realtime, data.host_tsc);
        let both = KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
        if data.flags & both == both {
            return Ok(ClockState { clock_ns, realtime_ns, host_tsc });
        }
        let width = real1.saturating_sub(real0);
        if best.as_ref().is_none_or(|(w, _)| width < *w) {
            let realtime_ns = real0 + width / 2;
            let host_tsc = tsc0 + tsc1.saturating_sub(tsc0) / 2;
            best = Some((width, ClockState { clock_ns, realtime_ns, host_tsc }));
        }
    }
    best.map(|(_, state)| state).ok_or_else(|| io::Error::other("no reading of the clock"))
}

pub(super) fn save(vm: &Shared, name: &str) -> state::Result<Section> {
    Section::encode(name, &read(vm).map_err(|e| unit(name, e))?)
}

pub(super) fn restore(vm: &Shared, section: &Section) -> state::Result<()> {
    let name = section.name.as_str();
    let saved: ClockState = section.decode()?;
    let now = host_realtime().map_err(|e| unit(name, e))?;
    let pause = pause_ns(saved.realtime_ns, now);
    if pause.is_none() {
        tracing::warn!("the saved clock is not of this host's past: no time passes for the guest");
    }
    let flags = vm.fd.check_extension_int(Cap::AdjustClock).max(0) as u32;
    let data = if pause.is_some() && flags & KVM_CLOCK_REALTIME != 0 {
        let (clock, realtime) = (saved.clock_ns, saved.realtime_ns);
        kvm_clock_data { clock, realtime, flags: KVM_CLOCK_REALTIME, ..Default::default() }
    } else {
        let clock = saved.clock_ns.saturating_add(pause.unwrap_or(0));
        kvm_clock_data { clock, ..Default::default() }
    };
    vm.fd.set_clock(&data).map_err(|e| unit(name, e))?;
    let here = read(vm).map_err(|e| unit(name, e))?;
    *vm.tsc_shift.lock() = Some(TscShift {
        elapsed_ns: i128::from(here.clock_ns) - i128::from(saved.clock_ns),
        host_tsc: i128::from(saved.host_tsc) - i128::from(here.host_tsc),
    });
    Ok(())
}

/// Nanoseconds from `saved` to `now`, or `None` when that cannot be (negative, or absurdly long).
fn pause_ns(saved: u64, now: u64) -> Option<u64> {
    now.checked_sub(saved).filter(|d| *d <= MAX_PAUSE_NS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clamps_pauses_that_cannot_be() {
        assert_eq!(pause_ns(5, 12), Some(7));
        assert_eq!(pause_ns(12, 5), None);
        assert_eq!(pause_ns(0, MAX_PAUSE_NS + 1), None);
        assert_eq!(pause_ns(u64::MAX, 1), None);
    }

    #[test]
    fn tsc_offsets_keep_their_distance_and_count_the_pause() {
        let shift = TscShift { elapsed_ns: 2_000_000_000, host_tsc: -500 };
        let a = shift.apply(1000, 1_000_000);
        assert_eq!(a, 1000 + 2_000_000_000 - 500);
        assert_eq!(shift.apply(1007, 1_000_000) - a, 7);
        // Offsets are signed in disguise.
        assert_eq!(TscShift { elapsed_ns: 0, host_tsc: 10 }.apply(u64::MAX, 1), 9);
    }
}
