//! Two trivial ports: isa-debugcon (0x402), where firmware and unikernels write what they have to
//! say, and the POST and delay port (0x80). Neither has state.
//!
//! Port 0x61 (speaker and timer gate) is not here: KVM's in-kernel timer answers it when created
//! with `KVM_PIT_SPEAKER_DUMMY`.

use std::sync::Arc;

use chardev::Chardev;

use crate::bus::{Access, BusDevice, Effect};

/// Where guests look for it, and what it answers so that they know it.
pub const DEBUGCON_PORT: u16 = 0x402;
const READBACK: u8 = 0xe9;
/// The POST code port.
pub const POST_PORT: u16 = 0x80;

/// isa-debugcon: one port, output only.
pub struct Debugcon {
    chardev: Arc<dyn Chardev>,
}

impl Debugcon {
    pub fn new(chardev: Arc<dyn Chardev>) -> Arc<Self> {
        Arc::new(Self { chardev })
    }
}

impl BusDevice for Debugcon {
    fn read(&self, _offset: u64, data: &mut [u8]) -> Access {
        data.fill(READBACK);
        Access::Done
    }

    fn write(&self, _offset: u64, data: &[u8]) -> (Access, Effect) {
        let _ = self.chardev.write(data);
        (Access::Done, Effect::None)
    }
}

/// The POST port: takes everything.
pub struct PostPort;

impl BusDevice for PostPort {
    fn read(&self, _offset: u64, data: &mut [u8]) -> Access {
        data.fill(0xff);
        Access::Done
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> (Access, Effect) {
        (Access::Done, Effect::None)
    }
}
