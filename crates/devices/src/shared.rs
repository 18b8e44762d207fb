//! Devices that vCPUs, back ends and the life-cycle driver share: [`Shared`] is what such a
//! device implements, with `&self` and locks of its own, and [`SharedUnit`] is its handle in the
//! machine's set of units.

use std::sync::Arc;
use std::time::Instant;

use state::{Result, SaveRestore, Saveable, SavedState, Section, Unit};

/// A device behind an [`Arc`] with state to save.
pub trait Shared: Send + Sync {
    type State: SavedState;
    /// Instance name, as [`Unit::name`].
    fn unit_name(&self) -> &str;
    /// Stops timers and the like.
    fn quiesce(&self) {}
    /// Starts them again, from the state that it has now.
    fn resume(&self) {}
    /// The state now; only while quiesced.
    fn save(&self) -> Result<Self::State>;
    /// Takes over an untrusted state; only while quiesced.
    fn restore(&self, state: Self::State) -> Result<()>;
    /// Back to power-on; only while quiesced.
    fn reset(&self);
    /// Why it cannot be migrated, if so.
    fn migration_blocker(&self) -> Option<String>;
}

/// The [`Unit`] of a [`Shared`] device.
pub struct SharedUnit<D> {
    device: Arc<D>,
    name: String,
}

impl<D: Shared> SharedUnit<D> {
    pub fn new(device: Arc<D>) -> Self {
        let name = device.unit_name().to_owned();
        Self { device, name }
    }
}

impl<D: Shared> SaveRestore for SharedUnit<D> {
    type State = D::State;

    fn save(&self) -> Result<Self::State> {
        self.device.save()
    }

    fn restore(&mut self, state: Self::State) -> Result<()> {
        self.device.restore(state)
    }
}

impl<D: Shared> Unit for SharedUnit<D> {
    fn name(&self) -> &str {
        &self.name
    }

    fn quiesce(&mut self, _deadline: Instant) -> Result<()> {
        self.device.quiesce();
        Ok(())
    }

    fn resume(&mut self) {
        self.device.resume();
    }

    fn kind(&self) -> (&'static str, u16) {
        Saveable::kind(self)
    }

    fn save(&self) -> Result<Section> {
        self.save_section(&self.name)
    }

    fn restore(&mut self, section: &Section) -> Result<()> {
        self.restore_section(section)
    }

    fn migration_blocker(&self) -> Option<String> {
        self.device.migration_blocker()
    }

    fn reset(&mut self) {
        self.device.reset();
    }
}
