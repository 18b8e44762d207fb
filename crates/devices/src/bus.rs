//! Port and memory-mapped I/O: what a device on a bus is, and what its accesses may ask for.

/// How an access went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Done at once.
    Done,
    /// Nobody answers there: reads are all ones.
    Fault,
}

/// What a device asks the machine for after an access. The device asks, the life-cycle driver acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[must_use]
pub enum Effect {
    #[default]
    None,
    /// Reset the machine.
    Reset,
    /// Power off (ACPI S5).
    Shutdown,
    /// The device's BARs moved or were switched on or off: look at them again.
    Relayout,
}

/// A device on the port or memory bus. All methods take `&self`: vCPUs access it at the same time.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the device's base.
    fn read(&self, offset: u64, data: &mut [u8]) -> Access;
    /// Writes `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]) -> (Access, Effect);
}
