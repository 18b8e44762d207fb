//! The ioctls that kvm-ioctls lacks, or wraps in a way that allocates on a path where we do not
//! want it. Each function here is one ioctl with its lengths checked; nothing else.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_device_attr, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_ioeventfd, kvm_sregs2, kvm_xsave,
};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_io_nr!(KVM_RUN, KVMIO, 0x80);
ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);

/// Size in bytes of the XSAVE area of hosts without KVM_CAP_XSAVE2.
pub const XSAVE_MIN: usize = size_of::<kvm_xsave>();

fn check(ret: i32) -> io::Result<()> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Runs the vCPU until it exits.
pub fn run(vcpu: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: takes no argument; the kernel writes only to the kvm_run mapping.
    check(unsafe { ioctl(vcpu, KVM_RUN()) })
}

/// Reads the dirty log of slot `slot` into `bitmap`, which must be `pages` bits long, rounded up
/// to whole words. Clears the log unless manual clearing is on.
pub fn get_dirty_log(
    vm: &impl AsRawFd,
    slot: u32,
    pages: u64,
    bitmap: &mut [u64],
) -> io::Result<()> {
    if (bitmap.len() as u64) < pages.div_ceil(64) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_mut_ptr().cast() },
    };
    // SAFETY: the kernel writes one bit a page of the slot, which fits into `bitmap` (checked).
    check(unsafe { ioctl_with_ptr(vm, KVM_GET_DIRTY_LOG(), &log) })
}

/// Clears, and write-protects anew, the pages whose bits are set in `bitmap`: bit 0 is page
/// `first` of slot `slot`. `first` must be a multiple of 64, and `pages` too unless it reaches
/// the slot's end.
pub fn clear_dirty_log(
    vm: &impl AsRawFd,
    slot: u32,
    first: u64,
    pages: u32,
    bitmap: &[u64],
) -> io::Result<()> {
    if (bitmap.len() as u64) < u64::from(pages).div_ceil(64) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page: first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bitmap.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the kernel only reads `pages` bits of `bitmap` (length checked).
    check(unsafe { ioctl_with_mut_ref(vm, KVM_CLEAR_DIRTY_LOG(), &mut log) })
}

/// Special registers with the PAE page directory pointers (KVM_CAP_SREGS2).
pub fn get_sregs2(vcpu: &impl AsRawFd) -> io::Result<kvm_sregs2> {
    let mut s = kvm_sregs2::default();
    // SAFETY: the kernel fills exactly this struct.
    check(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut s) })?;
    Ok(s)
}

/// Sets what [`get_sregs2`] reads.
pub fn set_sregs2(vcpu: &impl AsRawFd, s: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: the kernel reads exactly this struct.
    check(unsafe { ioctl_with_ptr(vcpu, KVM_SET_SREGS2(), s) })
}

/// Reads the XSAVE area, `size` bytes: KVM_CAP_XSAVE2's value, or [`XSAVE_MIN`] where that is 0.
pub fn get_xsave(vcpu: &impl AsRawFd, size: usize) -> io::Result<Vec<u8>> {
    let mut area = vec![0u8; size.max(XSAVE_MIN)];
    let request = if size > XSAVE_MIN { KVM_GET_XSAVE2() } else { KVM_GET_XSAVE() };
    // SAFETY: the kernel writes as many bytes as KVM_CAP_XSAVE2 says (4096 for the old call),
    // which is the length of `area`.
    check(unsafe { ioctl_with_mut_ptr(vcpu, request, area.as_mut_ptr()) })?;
    Ok(area)
}

/// Sets the XSAVE area. `area` must be at least as long as this VM's (see [`get_xsave`]).
pub fn set_xsave(vcpu: &impl AsRawFd, size: usize, area: &[u8]) -> io::Result<()> {
    if area.len() < size.max(XSAVE_MIN) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the kernel reads at most the bytes that KVM_CAP_XSAVE2 says; `area` has them.
    check(unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), area.as_ptr()) })
}

/// Adds or removes a doorbell (kvm-ioctls ties the width to the type of the data match).
pub fn ioeventfd(vm: &impl AsRawFd, request: &kvm_ioeventfd) -> io::Result<()> {
    // SAFETY: the kernel reads exactly this struct.
    check(unsafe { ioctl_with_ptr(vm, KVM_IOEVENTFD(), request) })
}

/// KVM_VCPU_TSC_CTRL and KVM_VCPU_TSC_OFFSET (virt/kvm/devices/vcpu, section 4).
const TSC_CTRL: u32 = 0;
const TSC_OFFSET: u64 = 0;

fn tsc_offset_attr(value: &mut u64) -> kvm_device_attr {
    let addr = std::ptr::from_mut(value) as u64;
    kvm_device_attr { group: TSC_CTRL, attr: TSC_OFFSET, addr, flags: 0 }
}

/// Guest TSC minus host TSC, exactly (Linux 5.16 and later).
pub fn get_tsc_offset(vcpu: &impl AsRawFd) -> io::Result<u64> {
    let mut value = 0;
    let attr = tsc_offset_attr(&mut value);
    // SAFETY: the attribute is a u64 and addr points at `value`, which outlives the call.
    check(unsafe { ioctl_with_ptr(vcpu, KVM_GET_DEVICE_ATTR(), &attr) })?;
    Ok(value)
}

/// Sets what [`get_tsc_offset`] reads.
pub fn set_tsc_offset(vcpu: &impl AsRawFd, mut value: u64) -> io::Result<()> {
    let attr = tsc_offset_attr(&mut value);
    // SAFETY: as in `get_tsc_offset`; the kernel only reads it.
    check(unsafe { ioctl_with_ptr(vcpu, KVM_SET_DEVICE_ATTR(), &attr) })
}
