//! Which frames the driver wants (VIRTIO 1.2, sections 5.1.6.5.1 and 5.1.6.5.2).

use net::Mac;

/// Most addresses in each table; with more, every frame of that kind passes.
pub(super) const MAX_MACS: usize = 64;

/// Receive modes, by their command numbers in class VIRTIO_NET_CTRL_RX.
pub(super) const PROMISC: u8 = 0;
const ALL_MULTI: u8 = 1;
const ALL_UNI: u8 = 2;
const NO_MULTI: u8 = 3;
const NO_UNI: u8 = 4;
const NO_BROADCAST: u8 = 5;
pub(super) const MODES: u8 = 6;

/// Receive modes and tables. Replaced as a whole, read for every frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Filter {
    pub mac: Mac,
    modes: u8,
    pub unicast: Vec<Mac>,
    pub multicast: Vec<Mac>,
    pub unicast_overflow: bool,
    pub multicast_overflow: bool,
}

impl Filter {
    /// As after reset: everything passes.
    pub fn new(mac: Mac) -> Self {
        Self {
            mac,
            modes: 1 << PROMISC,
            unicast: Vec::new(),
            multicast: Vec::new(),
            unicast_overflow: false,
            multicast_overflow: false,
        }
    }

    fn on(&self, mode: u8) -> bool {
        self.modes & (1 << mode) != 0
    }

    pub fn set_mode(&mut self, mode: u8, on: bool) {
        self.modes = self.modes & !(1 << mode) | u8::from(on) << mode;
    }

    /// Modes and overflows as one number, for saved state.
    pub fn flags(&self) -> u16 {
        let overflow = u16::from(self.unicast_overflow) | u16::from(self.multicast_overflow) << 1;
        u16::from(self.modes) | overflow << 8
    }

    pub fn set_flags(&mut self, flags: u16) {
        self.modes = flags as u8 & ((1 << MODES) - 1);
        self.unicast_overflow = flags & 0x100 != 0;
        self.multicast_overflow = flags & 0x200 != 0;
    }

    /// Whether a frame to `to` passes.
    pub fn accepts(&self, to: Mac) -> bool {
        if self.on(PROMISC) {
            return true;
        }
        if to == [0xff; 6] {
            return !self.on(NO_BROADCAST);
        }
        if to[0] & 1 != 0 {
            let all = self.on(ALL_MULTI) || self.multicast_overflow;
            return !self.on(NO_MULTI) && (all || self.multicast.contains(&to));
        }
        let all = self.on(ALL_UNI) || self.unicast_overflow || to == self.mac;
        !self.on(NO_UNI) && (all || self.unicast.contains(&to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_and_tables_decide() {
        let mac = [2, 0, 0, 0, 0, 1];
        let other = [2, 0, 0, 0, 0, 2];
        let group = [0x33, 0x33, 0, 0, 0, 1];
        let mut f = Filter::new(mac);
        assert!(f.accepts(other));
        f.set_mode(PROMISC, false);
        assert!(f.accepts(mac) && f.accepts([0xff; 6]));
        assert!(!f.accepts(other) && !f.accepts(group));
        f.unicast.push(other);
        f.multicast.push(group);
        assert!(f.accepts(other) && f.accepts(group));
        f.set_mode(NO_MULTI, true);
        f.set_mode(NO_BROADCAST, true);
        assert!(!f.accepts(group) && !f.accepts([0xff; 6]));
        let mut g = Filter::new(mac);
        g.unicast = f.unicast.clone();
        g.multicast = f.multicast.clone();
        g.set_flags(f.flags());
        assert_eq!(g, f);
    }
}
