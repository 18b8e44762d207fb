//! MSRs in bulk. KVM stops at the first MSR that it does not take, so both directions go on
//! behind it.

use std::sync::Arc;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use minicbor::{Decode, Encode};

use super::os;
use super::vm::Shared;
use crate::{Error, Result};

pub(super) const IA32_TSC: u32 = 0x10;
pub(super) const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// Most MSRs in a saved state.
pub(super) const MAX_MSRS: usize = 4096;

/// Hyper-V's synthetic MSRs: guests are never told of them, and some tick.
const HYPER_V: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;

/// One MSR's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub(super) struct Msr {
    #[n(0)]
    pub(super) index: u32,
    #[n(1)]
    pub(super) value: u64,
}

fn batch(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries).map_err(|e| Error::State(format!("list of MSRs: {e:?}")))
}

/// Reads those of `indexes` that are readable.
pub(super) fn read(fd: &VcpuFd, indexes: &[u32]) -> Result<Vec<Msr>> {
    let all: Vec<_> =
        indexes.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut out = Vec::with_capacity(all.len());
    let mut rest = all.as_slice();
    while !rest.is_empty() {
        let mut msrs = batch(rest)?;
        let n = fd.get_msrs(&mut msrs).map_err(os("cannot read MSRs"))?.min(rest.len());
        out.extend(msrs.as_slice()[..n].iter().map(|e| Msr { index: e.index, value: e.data }));
        rest = rest.get(n + 1..).unwrap_or(&[]);
    }
    Ok(out)
}

/// Writes `msrs`; returns those that KVM did not take.
pub(super) fn write(fd: &VcpuFd, msrs: &[Msr]) -> Result<Vec<Msr>> {
    let all: Vec<_> = msrs
        .iter()
        .map(|m| kvm_msr_entry { index: m.index, data: m.value, ..Default::default() })
        .collect();
    let mut refused = Vec::new();
    let mut at = 0;
    while at < all.len() {
        let n = fd.set_msrs(&batch(&all[at..])?).map_err(os("cannot write MSRs"))?;
        at += n.min(all.len() - at);
        if at < all.len() {
            refused.push(msrs[at]);
            at += 1;
        }
    }
    Ok(refused)
}

/// The MSRs that this host saves: KVM's list, those that can be read on `fd`. Found once a VM.
pub(super) fn list(vm: &Shared, fd: &VcpuFd) -> Result<Arc<[u32]>> {
    let mut cached = vm.msrs.lock();
    if let Some(list) = &*cached {
        return Ok(list.clone());
    }
    let all = vm.kvm.get_msr_index_list().map_err(os("cannot ask KVM for its MSRs"))?;
    let readable = read(fd, all.as_slice())?;
    let indexes = readable.iter().map(|m| m.index).filter(|i| !HYPER_V.contains(i));
    let list: Arc<[u32]> = indexes.take(MAX_MSRS).collect();
    *cached = Some(list.clone());
    Ok(list)
}
