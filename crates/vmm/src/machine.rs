//! A machine that has been put together: its parts, and the life-cycle operations on them.
//!
//! One lock, `life`, orders everything that changes whether the machine runs. It is taken by
//! monitors, by migration threads and by the life-cycle driver, never by a vCPU thread or a device,
//! so holding it while vCPUs stop and devices drain cannot deadlock.
//!
//! ```text
//!   Prelaunch --cont--> Running <--stop/cont--> Paused
//!                         | quiesce (migration)
//!                    FinishMigrate --resume--> as before; --handed_over--> Postmigrate
//!                       | the destination is lost: undecided (Paused or Postmigrate) --cont--> Running
//!                       |       it answers after all: as before, or Postmigrate
//!   Inmigrate --load, run_held (vCPUs run, devices hold), release_output--> Running
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use devices::acpi_pm::AcpiPm;
use devices::pci::PciDevice;
use devices::pci::root::PciRoot;
use devices::virtio_pci::VirtioPci;
use hv::{CpuidEntry, Vcpu, Vm};
use mem::{DirtySource, GuestMemory};
use migrate::LateFrame;
use minicbor::{Decode, Encode};
use parking_lot::Mutex;
use qapi::EventBus;
use serde_json::json;
use state::{Quiesced, Running, SavedState, Section, Sections, UnitSet};

use crate::disks::Disk;
#[cfg(test)]
use crate::io::IoSpace;
use crate::nics::Nic;
use crate::power_on::PowerOn;
use crate::runstate::RunState;
use crate::vcpus::{Request, Vcpus};

/// How long vCPUs and devices have to stand still for `stop`, reset or a migration.
pub const QUIESCE_TIMEOUT: Duration = Duration::from_secs(10);

/// Devices, running or not. `None` only inside a change of state.
enum Units {
    Running(UnitSet<Running>),
    Quiesced(UnitSet<Quiesced>),
}

/// What the life-cycle lock protects.
struct Life {
    state: RunState,
    units: Option<Units>,
    /// Run when the incoming migration has ended (`-S` and `stop` clear it, `cont` sets it).
    autostart: bool,
    /// Whether the guest ran when the migration's quiesce came, here or at the source.
    ran: bool,
    /// What the guest asked for while a migration held the machine still.
    pending: Option<Request>,
    /// The guest's clock when it was paused: it goes on from there, as QEMU's does.
    paused_clock: Option<u64>,
    /// Locks were given up for a hand-over.
    locks_released: bool,
    /// The state when the migration's quiesce came: back to it if the guest stays.
    before: RunState,
    /// A migration ended and the guest may run at the destination or nowhere: only the operator's
    /// `cont` lets it go on here.
    undecided: bool,
}

/// What of the machine itself moves with a migration.
#[derive(Debug, Clone, Encode, Decode)]
#[cbor(map)]
struct MachineState {
    #[n(0)]
    running: bool,
    /// 0 nothing, 1 a reset, 2 a power-off that the guest asked for and that was not done yet.
    #[n(1)]
    pending: u8,
    /// Nanoseconds on the guest's clock when it was paused, if it is.
    #[n(2)]
    paused_clock: Option<u64>,
    /// Of a guest that does not run: as what it stands still. Nothing or 0 paused, 1 before its
    /// first instruction, 2 powered off.
    #[n(3)]
    stopped_as: Option<u8>,
}

impl SavedState for MachineState {
    const KIND: &'static str = "machine";
    const VERSION: u16 = 1;
}

/// The parts that `assemble` hands over.
pub struct Parts {
    pub spec: spec::Machine,
    pub vm: Arc<dyn Vm>,
    pub mem: GuestMemory,
    /// The vCPUs have it; here it is for tests that act as a guest.
    #[cfg(test)]
    pub io: Arc<IoSpace>,
    pub pci: Arc<PciRoot>,
    pub pm: Arc<AcpiPm>,
    pub vcpus: Vcpus,
    /// vCPU 0's CPUID, for the preamble.
    pub cpuid: Vec<CpuidEntry>,
    pub virtio: Vec<Arc<VirtioPci>>,
    pub disks: Vec<Disk>,
    pub nics: Vec<Nic>,
    pub events: EventBus,
    pub requests: Sender<Request>,
    pub incoming: bool,
    pub power_on: PowerOn,
}

/// A machine. All methods may be called from any thread but a vCPU's.
pub struct Machine {
    pub parts: Parts,
    life: Mutex<Life>,
    dirty: Arc<dyn DirtySource>,
}

impl Machine {
    /// Takes the parts and devices over; the machine is in [`RunState::Prelaunch`] or `Inmigrate`.
    pub fn new(parts: Parts, units: UnitSet<Quiesced>) -> Arc<Self> {
        let state = if parts.incoming { RunState::Inmigrate } else { RunState::Prelaunch };
        let life = Life {
            state,
            units: Some(Units::Quiesced(units)),
            autostart: !parts.spec.process.paused,
            ran: false,
            pending: None,
            paused_clock: None,
            locks_released: false,
            before: state,
            undecided: false,
        };
        let dirty = parts.vm.dirty(&parts.mem);
        Arc::new(Self { parts, life: Mutex::new(life), dirty })
    }

    /// The run state now.
    pub fn state(&self) -> RunState {
        self.life.lock().state
    }

    /// Everything that writes guest memory.
    pub fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>> {
        vec![self.dirty.clone(), Arc::new(self.parts.mem.clone())]
    }

    fn emit(&self, event: &str, data: Option<serde_json::Value>) {
        self.parts.events.emit(event, data);
    }

    /// Starts devices and vCPUs; both stand still now.
    fn start(&self, life: &mut Life) {
        self.start_devices(life);
        self.parts.vcpus.run();
        life.state = RunState::Running;
    }

    fn start_devices(&self, life: &mut Life) {
        life.units = match life.units.take() {
            Some(Units::Quiesced(units)) => Some(Units::Running(units.resume())),
            other => other,
        };
    }

    fn freeze_clock(&self, life: &mut Life) {
        match self.parts.vm.clock_ns() {
            Ok(ns) => life.paused_clock = Some(ns),
            Err(e) => tracing::warn!("the guest will see the pause: {e}"),
        }
    }

    fn thaw_clock(&self, life: &mut Life) {
        if let Some(ns) = life.paused_clock.take()
            && let Err(e) = self.parts.vm.set_clock_ns(ns)
        {
            tracing::warn!("the guest sees the pause: {e}");
        }
    }

    /// Stops vCPUs, then devices. On an error everything goes on as before.
    fn still(&self, life: &mut Life, deadline: Instant) -> Result<(), String> {
        let was_running = life.state == RunState::Running;
        let result = self.parts.vcpus.pause(deadline).and_then(|()| match life.units.take() {
            Some(Units::Running(units)) => match units.quiesce(deadline) {
                Ok(units) => {
                    life.units = Some(Units::Quiesced(units));
                    Ok(())
                }
                Err((units, e)) => {
                    life.units = Some(Units::Running(units));
                    Err(e.to_string())
                }
            },
            other => {
                life.units = other;
                Ok(())
            }
        });
        if result.is_err() && was_running {
            self.parts.vcpus.run();
        }
        result
    }

    /// `cont`.
    pub fn cont(&self) -> Result<(), qapi::Error> {
        let mut life = self.life.lock();
        if life.undecided {
            return self.take_back(&mut life);
        }
        match life.state {
            RunState::Running => Ok(()),
            RunState::Prelaunch | RunState::Paused => {
                self.thaw_clock(&mut life);
                self.parts.vcpus.with_all(|_, vcpu| vcpu.notify_paused());
                self.start(&mut life);
                self.emit("RESUME", None);
                Ok(())
            }
            RunState::Inmigrate => {
                life.autostart = true;
                Ok(())
            }
            RunState::FinishMigrate => Err(qapi::Error::generic(
                "The migration is handing the guest over; cancel it first",
            )),
            RunState::Postmigrate => Err(qapi::Error::generic(
                "The guest was handed over to the destination and is there; it cannot run here too",
            )),
            RunState::Shutdown | RunState::InternalError => {
                Err(qapi::Error::generic("Resetting the Virtual Machine is required"))
            }
        }
    }

    /// The operator says that the guest does not run at the destination: it goes on here, if its
    /// disks do not say otherwise.
    fn take_back(&self, life: &mut Life) -> Result<(), qapi::Error> {
        if life.locks_released {
            self.take_locks(life).map_err(|e| {
                qapi::Error::generic(format!(
                    "The guest may run at the destination, for its disk is in use: {e}"
                ))
            })?;
        }
        tracing::warn!("cont after a hand-over that was not confirmed: the guest goes on here");
        life.undecided = false;
        if life.before == RunState::Shutdown {
            life.state = life.before;
            return Err(qapi::Error::generic("Resetting the Virtual Machine is required"));
        }
        let pending = life.pending.take();
        self.thaw_clock(life);
        self.parts.vcpus.with_all(|_, vcpu| vcpu.notify_paused());
        self.start(life);
        // The network may have been told another place.
        self.parts.virtio.iter().for_each(|v| v.arrived());
        self.emit("RESUME", None);
        self.replay(pending);
        Ok(())
    }

    /// `stop`.
    pub fn stop(&self) -> Result<(), String> {
        let mut life = self.life.lock();
        match life.state {
            RunState::Running => {
                self.still(&mut life, Instant::now() + QUIESCE_TIMEOUT)?;
                self.freeze_clock(&mut life);
                life.state = RunState::Paused;
                self.emit("STOP", None);
            }
            RunState::Inmigrate => life.autostart = false,
            _ => {}
        }
        Ok(())
    }

    /// Stops for good with `state`, after a power-off or an error.
    pub fn halt(&self, state: RunState) {
        let mut life = self.life.lock();
        if life.state == RunState::Running {
            if let Err(e) = self.still(&mut life, Instant::now() + QUIESCE_TIMEOUT) {
                tracing::error!("stop: {e}");
            }
            self.emit("STOP", None);
        }
        life.state = state;
    }

    /// Stops for the end of the process: no event, for SHUTDOWN was the last, as in QEMU.
    pub fn end(&self) {
        let mut life = self.life.lock();
        if life.state == RunState::Running {
            if let Err(e) = self.still(&mut life, Instant::now() + QUIESCE_TIMEOUT) {
                tracing::warn!("stop: {e}");
            }
            life.state = RunState::Shutdown;
        }
    }

    /// Resets the machine; it goes on if it ran. `guest`: the guest asked for it.
    pub fn reset(&self, guest: bool, reason: &str) -> Result<(), String> {
        let mut life = self.life.lock();
        match life.state {
            _ if life.undecided => {
                return Err("It is not known whether the guest runs at the destination of the \
                            migration; only if it does not, let it go on here with cont first"
                    .into());
            }
            RunState::FinishMigrate => {
                life.pending = Some(Request::Reset);
                return Ok(());
            }
            RunState::Postmigrate => {
                return Err("The guest was migrated away and runs at the destination; reset it \
                            there"
                    .into());
            }
            RunState::Inmigrate => return Err("An incoming migration is under way".into()),
            _ => {}
        }
        let ran = life.state == RunState::Running;
        self.still(&mut life, Instant::now() + QUIESCE_TIMEOUT)?;
        if let Some(Units::Quiesced(units)) = &mut life.units {
            units.reset();
        }
        self.parts.pci.assign_again();
        self.parts.power_on.run(&self.parts.vcpus)?;
        self.emit("RESET", Some(json!({"guest": guest, "reason": reason})));
        if ran {
            self.start(&mut life);
        } else {
            // As if it had never run, so the clock has nothing to go on from.
            life.state = RunState::Prelaunch;
        }
        Ok(())
    }

    /// Whether a request of the guest must wait for the end of a migration; it is kept then.
    pub fn defer(&self, request: &Request) -> bool {
        let mut life = self.life.lock();
        let wait = matches!(life.state, RunState::FinishMigrate | RunState::Inmigrate);
        if wait {
            life.pending = Some(request.clone());
        }
        wait || life.state == RunState::Postmigrate
    }

    /// Presses the power button.
    pub fn power_button(&self) {
        self.parts.pm.press_power_button();
        self.emit("POWERDOWN", None);
    }

    // What follows is the machine's side of a migration (`endpoint.rs` calls it).

    /// Stops for the switchover.
    pub fn quiesce_for_migration(&self, deadline: Instant) -> Result<(), String> {
        let mut life = self.life.lock();
        life.ran = life.state == RunState::Running;
        life.before = life.state;
        match life.state {
            RunState::Running | RunState::Paused | RunState::Prelaunch | RunState::Shutdown => {}
            other => return Err(format!("a machine in state {} cannot be moved", other.name())),
        }
        let ran = life.ran;
        self.still(&mut life, deadline)?;
        life.state = RunState::FinishMigrate;
        if ran {
            self.emit("STOP", None);
        }
        Ok(())
    }

    /// All state of a machine that stands still, in load order.
    pub fn save(&self) -> Result<Sections, String> {
        let life = self.life.lock();
        let Some(Units::Quiesced(units)) = &life.units else {
            return Err("devices still run".into());
        };
        let pending = match life.pending {
            Some(Request::Reset) => 1,
            Some(Request::Shutdown) => 2,
            _ => 0,
        };
        let stopped_as = match life.before {
            RunState::Prelaunch => Some(1),
            RunState::Shutdown => Some(2),
            _ => None,
        };
        let paused_clock = life.paused_clock;
        let machine = MachineState { running: life.ran, pending, paused_clock, stopped_as };
        let mut sections = vec![Section::encode("machine", &machine).map_err(text)?];
        sections.push(self.parts.vm.save_clock("clock").map_err(text)?);
        for vcpu in self.parts.vcpus.with_all(|i, vcpu| vcpu.save(&format!("vcpu.{i}"))) {
            sections.push(vcpu.map_err(text)?);
        }
        sections.push(self.parts.vm.save_irqchip("irqchip").map_err(text)?);
        sections.extend(units.save().map_err(text)?.0);
        Ok(Sections(sections))
    }

    /// Destination, before anything is received: saves this machine's state and takes it over
    /// again. Whether that works is known then, and the code and kernel data that the real one goes
    /// through, while the guest waits, are in memory.
    pub fn rehearse(&self) -> Result<(), String> {
        let sections = self.save()?;
        self.load(sections)
    }

    /// Takes over the state of `sections`, all of it, and nothing may be left over.
    pub fn load(&self, mut sections: Sections) -> Result<(), String> {
        let mut life = self.life.lock();
        let machine: MachineState =
            sections.take("machine").and_then(|s| s.decode()).map_err(text)?;
        let clock = sections.take("clock").map_err(text)?;
        self.parts.vm.restore_clock(&clock).map_err(text)?;
        let vcpus = (0..self.parts.vcpus.len())
            .map(|i| sections.take(&format!("vcpu.{i}")))
            .collect::<state::Result<Vec<_>>>()
            .map_err(text)?;
        let irqchip = sections.take("irqchip").map_err(text)?;
        self.parts.vm.restore_irqchip(&irqchip).map_err(text)?;
        let running = machine.running;
        let restore = move |i: usize, vcpu: &mut dyn Vcpu| {
            vcpu.restore(&vcpus[i])?;
            tracing::debug!("restored {}", vcpu.describe());
            if running {
                vcpu.notify_paused();
            }
            Ok(())
        };
        for result in self.parts.vcpus.with_all(restore) {
            result.map_err(|e: state::Error| text(e))?;
        }
        match &mut life.units {
            Some(Units::Quiesced(units)) => units.restore(sections).map_err(text)?,
            _ => return Err("devices already run".into()),
        }
        // vCPUs run before the devices do: their BARs and doorbells must be in place by then.
        self.parts.pci.relayout();
        life.ran = machine.running;
        life.before = match machine.stopped_as {
            None | Some(0) => RunState::Paused,
            Some(1) => RunState::Prelaunch,
            Some(2) => RunState::Shutdown,
            Some(other) => return Err(format!("section machine: state {other} is unknown")),
        };
        life.paused_clock = machine.paused_clock;
        life.pending = match machine.pending {
            0 => None,
            1 => Some(Request::Reset),
            2 => Some(Request::Shutdown),
            other => return Err(format!("section machine: pending request {other} is unknown")),
        };
        Ok(())
    }

    /// Gives up the disk locks.
    pub fn release_locks(&self) -> Result<(), String> {
        self.life.lock().locks_released = true;
        self.parts.disks.iter().try_for_each(Disk::release_locks)
    }

    /// Takes the disk locks; on an error those already taken are given up again.
    pub fn acquire_locks(&self) -> Result<(), String> {
        self.take_locks(&mut self.life.lock())
    }

    fn take_locks(&self, life: &mut Life) -> Result<(), String> {
        for (i, disk) in self.parts.disks.iter().enumerate() {
            if let Err(e) = disk.acquire_locks() {
                for taken in &self.parts.disks[..i] {
                    let _ = taken.release_locks();
                }
                return Err(e);
            }
        }
        life.locks_released = false;
        Ok(())
    }

    /// Source: goes on after a migration that did not happen.
    pub fn resume_after_migration(&self) -> Result<(), String> {
        let mut life = self.life.lock();
        if life.locks_released
            && let Err(e) = self.take_locks(&mut life)
        {
            life.state = RunState::Paused;
            life.undecided = true;
            return Err(e);
        }
        if life.state != RunState::FinishMigrate && !life.undecided {
            return Ok(());
        }
        if std::mem::take(&mut life.undecided) {
            // It may have stood still for long.
            self.parts.vcpus.with_all(|_, vcpu| vcpu.notify_paused());
        }
        let pending = life.pending.take();
        if life.ran {
            self.start(&mut life);
            self.emit("RESUME", None);
        } else {
            life.state = life.before;
        }
        drop(life);
        self.replay(pending);
        Ok(())
    }

    /// Source: nobody knows whether the guest runs at the destination; `cont` is the operator's.
    pub fn undecided(&self) {
        let mut life = self.life.lock();
        life.undecided = true;
        if life.state == RunState::FinishMigrate {
            life.state = RunState::Paused;
        }
    }

    /// Whether only the operator can say where the guest runs.
    pub fn is_undecided(&self) -> bool {
        self.life.lock().undecided
    }

    /// Source: the guest runs elsewhere.
    pub fn handed_over(&self) {
        let mut life = self.life.lock();
        life.state = RunState::Postmigrate;
        life.undecided = false;
    }

    /// Destination: vCPUs run if they ran at the source; devices stand still.
    pub fn run_held(&self) {
        let life = self.life.lock();
        if life.ran && life.autostart {
            self.parts.vcpus.run();
        }
    }

    /// Destination: devices go on, NICs announce themselves.
    pub fn release_output(&self) {
        let mut life = self.life.lock();
        let pending = life.pending.take();
        if life.ran && life.autostart {
            // The vCPUs run since run_held; a `stop` meanwhile has only cleared autostart.
            self.start_devices(&mut life);
            life.state = RunState::Running;
            self.parts.virtio.iter().for_each(|v| v.arrived());
            self.emit("RESUME", None);
        } else {
            if life.ran
                && let Err(e) = self.still(&mut life, Instant::now() + QUIESCE_TIMEOUT)
            {
                tracing::error!("stop after migration: {e}");
            }
            life.state = if life.ran { RunState::Paused } else { life.before };
        }
        drop(life);
        self.replay(pending);
    }

    /// Source: frames that came for the guest after it had stopped here, and whether the network
    /// knows its new place. `None`: there is no NIC for which any could come.
    pub fn late_frames(&self) -> Option<(Vec<LateFrame>, bool)> {
        if self.state() != RunState::Postmigrate {
            return None;
        }
        let mut all: Option<(Vec<LateFrame>, bool)> = None;
        for v in &self.parts.virtio {
            let Some(late) = v.late_input() else { continue };
            let (frames, settled) = all.get_or_insert((Vec::new(), true));
            let named = |frame| LateFrame { nic: v.name().to_owned(), frame };
            frames.extend(late.frames.into_iter().map(named));
            *settled &= late.settled;
        }
        all
    }

    /// Destination: gives the guest the frames that came to the source after it had stopped there.
    pub fn deliver_late(&self, frames: Vec<LateFrame>) {
        for v in &self.parts.virtio {
            let own = frames.iter().filter(|f| f.nic == v.name());
            let own: Vec<_> = own.map(|f| f.frame.clone()).collect();
            if !own.is_empty() {
                v.deliver_late(own);
            }
        }
    }

    fn replay(&self, pending: Option<Request>) {
        if let Some(request) = pending {
            let _ = self.parts.requests.send(request);
        }
    }

    /// Names, kinds and versions of all sections that a save will hold.
    pub fn manifest(&self) -> Vec<(String, &'static str, u16)> {
        let life = self.life.lock();
        match &life.units {
            Some(Units::Running(units)) => units.manifest(),
            Some(Units::Quiesced(units)) => units.manifest(),
            None => Vec::new(),
        }
    }

    /// Every reason why the devices cannot be migrated.
    pub fn blockers(&self) -> Vec<String> {
        let life = self.life.lock();
        match &life.units {
            Some(Units::Running(units)) => units.migration_blockers(),
            Some(Units::Quiesced(units)) => units.migration_blockers(),
            None => Vec::new(),
        }
    }
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}
