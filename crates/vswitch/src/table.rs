//! What poll threads know of ports: a snapshot that the control thread replaces as a whole.

use std::sync::Arc;

use crate::capture::Tap;
use crate::limit::Limiter;
use crate::vlan::Vlans;

/// A port's place in the table. Reused after the port is gone and all that was learned of it.
pub type PortId = u16;

/// Most ports.
pub const MAX_PORTS: usize = 1024;

/// One port, as poll threads see it.
#[derive(Debug, Clone, Default)]
pub struct PortView {
    pub name: String,
    pub vlans: Vlans,
    /// Largest frame without tag, in bytes; large segments do not count.
    pub max_frame: u32,
    /// Bits a second into the switch.
    pub rate: Option<Arc<Limiter>>,
    /// Flooded frames a second into the switch.
    pub storm: Option<Arc<Limiter>>,
    /// Gets copies only, and forwards nothing.
    pub mirror_output: bool,
    /// Where copies of what comes in here go.
    pub mirror_rx: Vec<PortId>,
    /// Where copies of what leaves here go.
    pub mirror_tx: Vec<PortId>,
    /// Captures to files that run.
    pub captures: Vec<Arc<Tap>>,
    /// Which poll thread has each enabled queue's transmit side: thread, queue.
    pub tx_owners: Vec<(u16, u16)>,
    /// Nothing but untagged frames of VLAN 0, no limits, no copies: most ports.
    pub simple: bool,
}

impl PortView {
    /// Works out `simple`.
    #[must_use]
    pub fn finished(mut self) -> Self {
        self.simple = self.rate.is_none()
            && self.storm.is_none()
            && !self.mirror_output
            && self.mirror_rx.is_empty()
            && self.mirror_tx.is_empty()
            && self.captures.is_empty();
        self
    }
}

/// All ports.
#[derive(Debug, Default)]
pub struct Table {
    /// By [`PortId`].
    pub ports: Vec<Option<Arc<PortView>>>,
    /// Seconds after which an address is forgotten.
    pub ageing: u32,
}

impl Table {
    /// Port `id`.
    #[inline]
    pub fn port(&self, id: PortId) -> Option<&PortView> {
        self.ports.get(usize::from(id)).and_then(Option::as_deref)
    }
}
