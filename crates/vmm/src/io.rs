//! The guest's I/O address spaces: ports and memory-mapped I/O, as vCPU threads use them.

use devices::bus::{Access, Bus, Effect};

/// Both I/O buses. Look-ups take no lock.
#[derive(Default)]
pub struct IoSpace {
    pub ports: Bus,
    pub mmio: Bus,
}

impl IoSpace {
    /// Reads at a guest-physical address that is not RAM; nobody there reads as ones.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        let _ = self.mmio.read(address, data);
    }

    /// Writes at a guest-physical address that is not RAM.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> (Access, Effect) {
        self.mmio.write(address, data)
    }

    /// `in`; nobody there reads as ones.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        let _ = self.ports.read(port.into(), data);
    }

    /// `out`.
    pub fn port_write(&self, port: u16, data: &[u8]) -> (Access, Effect) {
        self.ports.write(port.into(), data)
    }
}
