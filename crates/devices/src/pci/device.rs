//! What the PCI root needs of a function. All methods take `&self`: vCPUs call at the same time.

use crate::bus::{Access, Effect};

/// What a BAR decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    Io,
    /// 32-bit, not prefetchable.
    Mem32,
    /// 64-bit, prefetchable; takes two registers.
    Mem64Prefetch,
}

/// One BAR as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarInfo {
    /// Register 0..=5.
    pub index: u8,
    pub kind: BarKind,
    /// Bytes, a power of two.
    pub size: u64,
    /// Where it answers; `None` while decoding is off or the register holds no usable address.
    pub address: Option<u64>,
}

/// An address window of a bridge, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub base: u64,
    pub limit: u64,
}

impl Window {
    /// Whether `size` bytes at `address` lie in it.
    pub fn holds(&self, address: u64, size: u64) -> bool {
        let last = address.checked_add(size.saturating_sub(1));
        address >= self.base && last.is_some_and(|l| l <= self.limit)
    }
}

/// A bridge's registers as they are now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BridgeInfo {
    pub primary: u8,
    pub secondary: u8,
    pub subordinate: u8,
    /// `None`: closed, or decoding is off.
    pub io: Option<Window>,
    pub memory: Option<Window>,
    pub prefetch: Option<Window>,
}

/// A PCI function.
pub trait PciDevice: Send + Sync {
    /// Its unit name: the user's id, or a name made from its type and place.
    fn name(&self) -> &str;

    /// What kind it is, in QEMU's words ("virtio-net-pci"), for messages.
    fn type_name(&self) -> &str;

    /// Reads configuration space. `offset` is 0..=0xfff; 1, 2 or 4 bytes, aligned. Bytes beyond
    /// the function's space read as zero.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space. [`Effect::Relayout`] when a BAR, a bridge window or a bus
    /// number changed: the root then looks at [`bars`](Self::bars) and [`bridge`](Self::bridge)
    /// again, and calls [`relayout`](Self::relayout).
    fn config_write(&self, offset: u16, data: &[u8]) -> Effect;

    /// All BARs that it has.
    fn bars(&self) -> Vec<BarInfo>;

    /// The guest reads in a BAR. Never beyond the BAR's size.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Access;

    /// The guest writes in a BAR. Never beyond the BAR's size.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> (Access, Effect);

    /// The registers of a bridge; `None` for any other function.
    fn bridge(&self) -> Option<BridgeInfo> {
        None
    }

    /// The root has made the BARs of [`bars`](Self::bars) live: register or move doorbells. Called
    /// with no lock of the device held, on the vCPU that wrote.
    fn relayout(&self) {}

    /// Something was plugged into (`true`) or pulled from the secondary bus. Bridges with slots
    /// keep their presence state by it; others never get it.
    fn slot_occupied(&self, _occupied: bool) {}
}
