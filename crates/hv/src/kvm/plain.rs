//! Kernel structs as byte strings, for saved state: their layout is KVM's ABI and never changes.

use kvm_bindings::{
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_sregs2,
    kvm_vcpu_events, kvm_xcrs,
};

/// A C struct that is plain data: every bit pattern is valid, there is no implicit padding.
///
/// # Safety
/// Only for such types.
pub unsafe trait Plain: Copy + Default {}

// SAFETY: integers and arrays of them, padding is spelled out in the ABI.
unsafe impl Plain for kvm_regs {}
// SAFETY: as above.
unsafe impl Plain for kvm_sregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_sregs2 {}
// SAFETY: as above.
unsafe impl Plain for kvm_debugregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_lapic_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_xcrs {}
// SAFETY: as above.
unsafe impl Plain for kvm_vcpu_events {}
// SAFETY: as above.
unsafe impl Plain for kvm_pit_state2 {}
// SAFETY: as above; the union's variants are all plain data.
unsafe impl Plain for kvm_irqchip {}

/// The bytes of `value`.
pub fn to_bytes<T: Plain>(value: &T) -> Vec<u8> {
    let p = std::ptr::from_ref(value).cast::<u8>();
    // SAFETY: T is plain data without padding, so all its bytes are initialised.
    unsafe { std::slice::from_raw_parts(p, size_of::<T>()) }.to_vec()
}

/// The value that `bytes` hold; they must be exactly as many as the struct has.
///
/// # Errors
/// [`state::Error::Invalid`] that names `field`.
pub fn from_bytes<T: Plain>(field: &'static str, bytes: &[u8]) -> state::Result<T> {
    let want = size_of::<T>();
    if bytes.len() != want {
        let reason = format!("{} bytes, expected {want}", bytes.len());
        return Err(state::Error::invalid(field, reason));
    }
    let mut value = T::default();
    let p = std::ptr::from_mut(&mut value).cast::<u8>();
    // SAFETY: both are `want` bytes long and T takes every bit pattern.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), p, want) };
    Ok(value)
}
