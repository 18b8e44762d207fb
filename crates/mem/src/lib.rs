//! Guest memory: where the guest's RAM lies in this process, how devices reach it without ever
//! trusting an address that the guest wrote, and which pages changed.
//!
//! - [`guest`]: [`GuestMemory`], the map from guest-physical addresses to host memory.
//! - [`backing`]: what RAM is made of (memfd, file, huge pages).
//! - [`bitmap`]: page bitmaps that several threads set and one harvests.
//! - [`dirty`]: [`DirtySource`], everything that can say which pages changed.
//! - [`foreign`]: RAM and logs that another process owns and lends by a descriptor.
//! - [`sigbus`]: such a file shrinks while it is mapped, and the process lives on.
#![allow(unsafe_code)] // the one place that turns guest addresses into pointers

pub mod backing;
pub mod bitmap;
pub mod dirty;
pub mod foreign;
pub mod guest;
mod mapping;
pub mod sigbus;

pub use backing::{Backing, BackingKind, lacks_room};
pub use bitmap::Bitmap;
pub use dirty::DirtySource;
pub use foreign::{DirtyAlias, DirtyLog, ForeignMapping, ForeignRegion};
pub use guest::{GuestMemory, GuestSlice, Region, RegionSpec};
pub use vm_memory::ByteValued;

/// Size in bytes of the pages that dirty logs and migration count in (x86-64 base page).
pub const PAGE_SIZE: u64 = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An address range (often written by the guest) is not wholly inside one RAM region.
    #[error("guest address {addr:#x}, {len:#x} bytes, is not in RAM")]
    NotRam { addr: u64, len: u64 },
    /// An address is not aligned as the access needs.
    #[error("guest address {addr:#x} is not aligned to {align} bytes")]
    Unaligned { addr: u64, align: u64 },
    /// The memory layout itself is wrong (sizes, overlaps).
    #[error("memory layout: {0}")]
    Layout(String),
    /// The host refused memory.
    #[error("{what}: {source}")]
    Host { what: String, source: std::io::Error },
}

/// Shorthand for this crate's results.
pub type Result<T> = std::result::Result<T, Error>;
