//! A function's saved state, and the function as a unit of the machine.
//!
//! The section has the kind of the device inside ("virtio-net"); the high byte of its version is
//! the transport's format, the low byte the device's. So a peer that cannot read either is found
//! before any memory moves.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use minicbor::{Decode, Encode};
use state::{Error, Result, Section, Unit};
use virtio::features::{negotiate, status};
use virtio::{Ring, RingPos};

use super::VirtioPci;
use super::core::{Core, QueueRegs};
use super::layout::NO_VECTOR;
use crate::pci::{ConfigState, MsixState};

/// The transport's format.
const VERSION: u16 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct QueueState {
    #[n(0)]
    size: u16,
    #[n(1)]
    enabled: bool,
    #[n(2)]
    vector: u16,
    #[n(3)]
    desc: u64,
    #[n(4)]
    avail: u64,
    #[n(5)]
    used: u64,
    /// Next avail and used position; none if it never ran.
    #[n(6)]
    position: Option<(u16, u16)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
struct PciState {
    #[n(0)]
    config: ConfigState,
    #[n(1)]
    msix: Option<MsixState>,
    #[n(2)]
    status: u8,
    #[n(3)]
    isr: u8,
    #[n(4)]
    generation: u8,
    #[n(5)]
    config_vector: u16,
    #[n(6)]
    device_feature_select: u32,
    #[n(7)]
    driver_feature_select: u32,
    #[n(8)]
    accepted: u64,
    #[n(9)]
    queue_select: u16,
    #[n(10)]
    queues: Vec<QueueState>,
    #[cbor(n(11), with = "minicbor::bytes")]
    device: Vec<u8>,
}

fn save(core: &Core) -> Result<PciState> {
    let s = &core.shared;
    let queues = core.queues.iter().zip(&s.queue_vectors).map(|(q, vector)| {
        let QueueRegs { size, enabled, desc, avail, used, pos, .. } = *q;
        let vector = vector.load(Ordering::SeqCst);
        let position = pos.map(|p| (p.avail, p.used));
        QueueState { size, enabled, vector, desc, avail, used, position }
    });
    Ok(PciState {
        config: s.config.lock().save(),
        msix: s.msix.as_ref().map(|m| m.save()),
        status: s.status.load(Ordering::SeqCst),
        isr: s.isr.load(Ordering::SeqCst),
        generation: s.generation.load(Ordering::SeqCst),
        config_vector: s.config_vector.load(Ordering::SeqCst),
        device_feature_select: core.device_feature_select,
        driver_feature_select: core.driver_feature_select,
        accepted: core.accepted,
        queue_select: core.queue_select,
        queues: queues.collect(),
        device: core.device.save()?,
    })
}

/// Checks what can be checked before anything changes.
fn check(core: &Core, st: &PciState) -> Result<()> {
    let known = status::DRIVER_BITS | status::NEEDS_RESET;
    let features_ok = st.status & status::FEATURES_OK != 0;
    if st.status & !known != 0 || (st.status & status::DRIVER_OK != 0 && !features_ok) {
        return Err(Error::invalid("status", format!("{:#x} cannot be", st.status)));
    }
    if features_ok {
        negotiate(core.offered, st.accepted)
            .map_err(|e| Error::invalid("accepted", e.to_string()))?;
    }
    if st.isr > 3 {
        return Err(Error::invalid("isr", format!("{:#x} cannot be", st.isr)));
    }
    let vectors = core.shared.msix.as_ref().map_or(0, |m| m.len());
    if st.msix.is_some() != core.shared.msix.is_some() {
        return Err(Error::invalid("msix", "one side has MSI-X and the other has not"));
    }
    let (have, want) = (st.queues.len(), core.queues.len());
    if have != want {
        return Err(Error::invalid("queues", format!("{have} queues, this device has {want}")));
    }
    let bad_vector = |v: u16| v != NO_VECTOR && usize::from(v) >= vectors;
    if bad_vector(st.config_vector) || st.queues.iter().any(|q| bad_vector(q.vector)) {
        return Err(Error::invalid("vector", format!("a vector beyond the {vectors} here")));
    }
    for (q, max) in st.queues.iter().zip(&core.traits.queue_sizes) {
        if q.size == 0 || q.size > *max {
            let reason = format!("{} entries, this device has at most {max}", q.size);
            return Err(Error::invalid("queue size", reason));
        }
    }
    Ok(())
}

fn restore(core: &mut Core, kind: &str, version: u16, st: PciState) -> Result<()> {
    check(core, &st)?;
    core.paused = true;
    core.reset_device();
    let result = take_over(core, kind, version, st);
    if result.is_err() {
        // Nothing half restored may start.
        core.reset_device();
    }
    result
}

fn take_over(core: &mut Core, kind: &str, version: u16, st: PciState) -> Result<()> {
    let s = Arc::clone(&core.shared);
    {
        let mut config = s.config.lock();
        config.restore(&st.config)?;
        if let (Some(msix), Some(saved)) = (&s.msix, &st.msix) {
            msix.restore(saved, &config)?;
        }
        s.isr.store(st.isr, Ordering::SeqCst);
        s.update_line(&mut config);
    }
    s.generation.store(st.generation, Ordering::SeqCst);
    s.config_vector.store(st.config_vector, Ordering::SeqCst);
    s.status.store(st.status, Ordering::SeqCst);
    core.device_feature_select = st.device_feature_select;
    core.driver_feature_select = st.driver_feature_select;
    core.accepted = st.accepted;
    core.queue_select = st.queue_select;
    for (i, saved) in st.queues.iter().enumerate() {
        s.queue_vectors[i].store(saved.vector, Ordering::SeqCst);
        let q = &mut core.queues[i];
        (q.size, q.enabled) = (saved.size, saved.enabled);
        (q.desc, q.avail, q.used) = (saved.desc, saved.avail, saved.used);
        q.pos = saved.position.map(|(avail, used)| RingPos { avail, used });
    }
    core.device.restore(kind, version, &st.device)?;
    if st.status & status::DRIVER_OK != 0 {
        core.activate().map_err(|e| Error::invalid("device", e))?;
        if st.status & status::NEEDS_RESET == 0 {
            check_rings(core)?;
        }
    }
    core.restored = true;
    // From here on no kick is lost, though nobody serves the queues before `resume`.
    core.sync_doorbells();
    Ok(())
}

fn check_rings(core: &Core) -> Result<()> {
    for i in (0..core.queues.len()).filter(|i| core.queues[*i].enabled) {
        let setup = core.ring_setup(i).map_err(|e| Error::invalid("queue", e))?;
        Ring::new(&setup).map_err(|e| Error::invalid("queue", format!("queue {i}: {e}")))?;
    }
    Ok(())
}

/// The function as a unit: stops, goes on, moves its state.
pub struct VirtioPciUnit(pub Arc<VirtioPci>);

impl VirtioPciUnit {
    /// The function itself.
    pub fn device(&self) -> &Arc<VirtioPci> {
        &self.0
    }
}

impl Unit for VirtioPciUnit {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn quiesce(&mut self, _deadline: Instant) -> Result<()> {
        let mut core = self.0.core.lock();
        core.paused = true;
        core.stop_queues();
        Ok(())
    }

    fn resume(&mut self) {
        let mut core = self.0.core.lock();
        core.paused = false;
        core.start_queues();
        if std::mem::take(&mut core.restored) && core.shared.has_status(status::DRIVER_OK) {
            // An interrupt that was on its way when the source saved its interrupt controller may
            // be lost; drivers take one too many in their stride.
            let queues = core.queues.iter().enumerate().filter(|(_, q)| q.started);
            queues.for_each(|(i, _)| core.shared.notify_queue(i));
        }
    }

    fn kind(&self) -> (&'static str, u16) {
        let (kind, version) = self.0.core.lock().device.state_kind();
        (kind, VERSION << 8 | version & 0xff)
    }

    fn save(&self) -> Result<Section> {
        let (kind, version) = self.kind();
        let st = save(&self.0.core.lock())?;
        let payload = minicbor::to_vec(&st)
            .map_err(|e| Error::Encode { section: self.0.name.clone(), reason: e.to_string() })?;
        Ok(Section { name: self.0.name.clone(), kind: kind.into(), version, payload })
    }

    fn restore(&mut self, section: &Section) -> Result<()> {
        let (kind, version) = self.kind();
        if section.kind != kind || section.version >> 8 != VERSION {
            return Err(Error::Version {
                section: section.name.clone(),
                kind: section.kind.clone(),
                found: section.version,
                supported: format!("{kind} version {version}"),
            });
        }
        let st: PciState = minicbor::decode(&section.payload)
            .map_err(|e| Error::Decode { section: section.name.clone(), reason: e.to_string() })?;
        restore(&mut self.0.core.lock(), kind, section.version & 0xff, st)
    }

    fn migration_blocker(&self) -> Option<String> {
        self.0.migration_blocker()
    }

    fn reset(&mut self) {
        let mut core = self.0.core.lock();
        core.reset_device();
        let s = Arc::clone(&core.shared);
        {
            let mut config = s.config.lock();
            config.reset();
            if let Some(msix) = &s.msix {
                msix.config_changed(&config);
                msix.reset();
            }
            s.generation.store(0, Ordering::SeqCst);
            s.update_line(&mut config);
        }
        // The BARs are gone, and the doorbells with them.
        core.sync_doorbells();
    }
}
