//! The set of units that stop and start together, with its state in its type: only a quiesced set
//! can be saved or restored.
//!
//! ```text
//!   UnitSet<Running> --quiesce--> UnitSet<Quiesced> --resume--> UnitSet<Running>
//!                                   |  ^
//!                                   +--+ save, restore
//! ```

use std::marker::PhantomData;
use std::time::Instant;

use crate::{Result, Section, Sections};

/// A device as the machine sees it: it can stand still, go on, and move its state.
pub trait Unit: Send {
    /// Instance name, unique in the machine, stable across a migration ("net0", "serial0").
    fn name(&self) -> &str;
    /// Stops all activity of its own (I/O threads, timers) and returns with nothing in flight,
    /// or an error when `deadline` passes first.
    fn quiesce(&mut self, deadline: Instant) -> Result<()>;
    /// Goes on. Cannot fail: whatever can fail belongs into `restore` or the constructor.
    fn resume(&mut self);
    /// Kind and version of the section that it saves.
    fn kind(&self) -> (&'static str, u16);
    /// Saves; called only while quiesced.
    fn save(&self) -> Result<Section>;
    /// Restores; called only while quiesced. The section is untrusted.
    fn restore(&mut self, section: &Section) -> Result<()>;
    /// Why it cannot be migrated, if so. No default: every device says it.
    fn migration_blocker(&self) -> Option<String>;
    /// Brings it to its state at power-on; called only while quiesced.
    fn reset(&mut self);
}

/// Units that run.
#[derive(Debug)]
pub enum Running {}
/// Units that stand still.
#[derive(Debug)]
pub enum Quiesced {}

/// All units of a machine, in load order.
pub struct UnitSet<S> {
    units: Vec<Box<dyn Unit>>,
    _state: PhantomData<S>,
}

impl<S> UnitSet<S> {
    fn into_state<T>(self) -> UnitSet<T> {
        UnitSet { units: self.units, _state: PhantomData }
    }

    /// Name, kind and version of every section that a save will hold.
    pub fn manifest(&self) -> Vec<(String, &'static str, u16)> {
        self.units
            .iter()
            .map(|u| {
                let (kind, version) = u.kind();
                (u.name().to_owned(), kind, version)
            })
            .collect()
    }

    /// Every reason why this set cannot be migrated.
    pub fn migration_blockers(&self) -> Vec<String> {
        self.units.iter().filter_map(|u| u.migration_blocker()).collect()
    }
}

impl UnitSet<Quiesced> {
    /// A set of units that have not been started yet.
    pub fn new(units: Vec<Box<dyn Unit>>) -> Self {
        Self { units, _state: PhantomData }
    }

    /// Adds a unit (hotplug); it must stand still.
    pub fn push(&mut self, unit: Box<dyn Unit>) {
        self.units.push(unit);
    }

    /// Saves every unit.
    pub fn save(&self) -> Result<Sections> {
        self.units.iter().map(|u| u.save()).collect::<Result<_>>().map(Sections)
    }

    /// Restores every unit from `sections`; a missing section is an error, and so is a left-over.
    pub fn restore(&mut self, mut sections: Sections) -> Result<()> {
        for u in &mut self.units {
            let section = sections.take(u.name())?;
            u.restore(&section)?;
        }
        sections.finish()
    }

    /// Brings every unit to its state at power-on.
    pub fn reset(&mut self) {
        self.units.iter_mut().for_each(|u| u.reset());
    }

    /// Starts every unit.
    pub fn resume(mut self) -> UnitSet<Running> {
        self.units.iter_mut().for_each(|u| u.resume());
        self.into_state()
    }
}

impl UnitSet<Running> {
    /// Stops every unit. On an error those already stopped are started again.
    ///
    /// # Errors
    /// The running set and what went wrong.
    pub fn quiesce(
        mut self,
        deadline: Instant,
    ) -> std::result::Result<UnitSet<Quiesced>, (UnitSet<Running>, crate::Error)> {
        for i in 0..self.units.len() {
            if let Err(e) = self.units[i].quiesce(deadline) {
                self.units[..=i].iter_mut().for_each(|u| u.resume());
                return Err((self, e));
            }
        }
        Ok(self.into_state())
    }
}
