//! Interrupt lines, MSI vectors and doorbells for the devices, over the hypervisor.
//!
//! An MSI is sent straight to the kernel when the VMM itself triggers it; only a vector whose
//! eventfd is asked for (back ends outside the process) takes a GSI and a route.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use devices::irq::{DoorbellAddress, Doorbells, IrqLine, MsiAllocator, MsiVector};
use hv::{IoAddress, Route, Vm};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::layout;

/// Pins of the IOAPIC.
const IOAPIC_PINS: u32 = 24;
/// Last GSI that may be a route (KVM_MAX_IRQ_ROUTES is 4,096).
const LAST_GSI: u32 = 4095;

/// The machine's interrupt wiring.
pub struct Interrupts {
    vm: Arc<dyn Vm>,
    state: Mutex<State>,
    weak: Weak<Interrupts>,
}

#[derive(Default)]
struct State {
    /// How many devices hold each pin up.
    levels: BTreeMap<u32, u32>,
    /// Routes of the vectors that have an eventfd, by GSI.
    messages: BTreeMap<u32, (u64, u32)>,
    next_gsi: u32,
}

impl Interrupts {
    /// Wires `vm`'s irqchip as ACPI tells the guest: IRQ 0 on IOAPIC pin 2, the rest one to one.
    pub fn new(vm: Arc<dyn Vm>) -> hv::Result<Arc<Self>> {
        let state = State { next_gsi: layout::FIRST_MSI_GSI, ..Default::default() };
        let this =
            Arc::new_cyclic(|weak| Self { vm, state: Mutex::new(state), weak: weak.clone() });
        this.apply(&this.state.lock())?;
        Ok(this)
    }

    /// A new user of pin `gsi`. Users of one pin are ORed.
    pub fn line(self: &Arc<Self>, gsi: u32) -> Arc<dyn IrqLine> {
        Arc::new(Line { wiring: self.clone(), gsi, up: Mutex::new(false) })
    }

    fn apply(&self, state: &State) -> hv::Result<()> {
        let mut routes = Vec::with_capacity(48 + state.messages.len());
        for gsi in 0..16 {
            if gsi != 2 {
                routes.push(Route::Irqchip { gsi, chip: gsi / 8, pin: gsi % 8 });
            }
        }
        for gsi in 0..IOAPIC_PINS {
            match gsi {
                0 => routes.push(Route::Irqchip { gsi, chip: 2, pin: 2 }),
                2 => {}
                _ => routes.push(Route::Irqchip { gsi, chip: 2, pin: gsi }),
            }
        }
        for (&gsi, &(address, data)) in &state.messages {
            routes.push(Route::Msi { gsi, address, data });
        }
        self.vm.set_routes(&routes)
    }
}

struct Line {
    wiring: Arc<Interrupts>,
    gsi: u32,
    up: Mutex<bool>,
}

impl IrqLine for Line {
    fn set(&self, level: bool) {
        let mut up = self.up.lock();
        let wiring = &self.wiring;
        if *up == level {
            return;
        }
        *up = level;
        let mut state = wiring.state.lock();
        let users = state.levels.entry(self.gsi).or_default();
        let before = *users > 0;
        *users = if level { *users + 1 } else { users.saturating_sub(1) };
        let after = *users > 0;
        if before != after
            && let Err(e) = wiring.vm.set_irq_line(self.gsi, after)
        {
            tracing::warn!("interrupt line {}: {e}", self.gsi);
        }
    }
}

impl MsiAllocator for Interrupts {
    fn allocate(&self, count: u16) -> Result<Vec<Arc<dyn MsiVector>>, String> {
        let wiring = self.weak.upgrade().ok_or("the machine is being taken apart")?;
        let vector = |_| {
            let state = Mutex::new(VectorState { message: None, event: None });
            Arc::new(Vector { wiring: wiring.clone(), state }) as Arc<dyn MsiVector>
        };
        Ok((0..count).map(vector).collect())
    }
}

struct VectorState {
    message: Option<(u64, u32)>,
    /// The eventfd, its GSI, and whether it is connected now.
    event: Option<(EventFd, u32, bool)>,
}

struct Vector {
    wiring: Arc<Interrupts>,
    state: Mutex<VectorState>,
}

impl Vector {
    /// Brings the irqfd in line with the message: connected where there is one.
    fn connect(wiring: &Interrupts, state: &mut VectorState) -> hv::Result<()> {
        let Some((fd, gsi, connected)) = &mut state.event else { return Ok(()) };
        match state.message {
            Some(message) => {
                {
                    let mut table = wiring.state.lock();
                    if table.messages.insert(*gsi, message) != Some(message) {
                        wiring.apply(&table)?;
                    }
                }
                if !*connected {
                    wiring.vm.register_irqfd(fd, *gsi)?;
                    *connected = true;
                }
            }
            None if *connected => {
                wiring.vm.unregister_irqfd(fd, *gsi)?;
                *connected = false;
            }
            None => {}
        }
        Ok(())
    }
}

impl MsiVector for Vector {
    fn trigger(&self) {
        let message = self.state.lock().message;
        if let Some((address, data)) = message
            && let Err(e) = self.wiring.vm.signal_msi(address, data)
        {
            tracing::debug!("MSI to {address:#x}: {e}");
        }
    }

    fn route(&self, message: Option<(u64, u32)>) {
        let mut state = self.state.lock();
        if state.message == message {
            return;
        }
        state.message = message;
        if let Err(e) = Self::connect(&self.wiring, &mut state) {
            tracing::warn!("MSI route: {e}");
        }
    }

    fn eventfd(&self) -> Option<EventFd> {
        let mut state = self.state.lock();
        if state.event.is_none() {
            let gsi = {
                let mut table = self.wiring.state.lock();
                if table.next_gsi > LAST_GSI {
                    return None;
                }
                table.next_gsi += 1;
                table.next_gsi - 1
            };
            state.event = Some((EventFd::new(EFD_NONBLOCK).ok()?, gsi, false));
            if let Err(e) = Self::connect(&self.wiring, &mut state) {
                tracing::warn!("irqfd: {e}");
                state.event = None;
            }
        }
        state.event.as_ref().and_then(|(fd, _, _)| fd.try_clone().ok())
    }
}

impl Doorbells for Interrupts {
    fn register(
        &self,
        fd: &EventFd,
        address: DoorbellAddress,
        datamatch: Option<u32>,
    ) -> Result<(), String> {
        let (address, len, value) = doorbell(address, datamatch);
        self.vm.register_ioevent(fd, address, len, value).map_err(|e| e.to_string())
    }

    fn unregister(&self, fd: &EventFd, address: DoorbellAddress, datamatch: Option<u32>) {
        let (address, len, value) = doorbell(address, datamatch);
        if let Err(e) = self.vm.unregister_ioevent(fd, address, len, value) {
            tracing::debug!("doorbell: {e}");
        }
    }
}

/// A doorbell without a value to match takes writes of any width; with one, 16-bit writes (virtio's
/// notification register).
fn doorbell(address: DoorbellAddress, datamatch: Option<u32>) -> (IoAddress, u32, Option<u64>) {
    let address = match address {
        DoorbellAddress::Port(p) => IoAddress::Port(p),
        DoorbellAddress::Mmio(a) => IoAddress::Mmio(a),
    };
    (address, if datamatch.is_some() { 2 } else { 0 }, datamatch.map(u64::from))
}
