//! What every device with state must do: reset gives the power-on state; a save, any guest
//! activity, and a restore give the saved state; the state of another machine fits; state that
//! was tampered with is refused or taken, without a panic; random accesses do no harm.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Line, Random, Sink, Vectors, hostile};
use devices::acpi_pm::AcpiPm;
use devices::bus::BusDevice;
use devices::chipset::ChipsetFunction;
use devices::i8042::I8042;
use devices::pci::{PciDevice, PciRoot, RootPort};
use devices::rtc::{Rtc, RtcBase};
use devices::serial::Serial;
use devices::shared::{Shared, SharedUnit};
use state::{Section, Unit};

/// Configuration space and BARs as something to be accessed at random.
struct Function(Arc<dyn PciDevice>);

impl BusDevice for Function {
    fn read(&self, offset: u64, data: &mut [u8]) -> devices::bus::Access {
        self.0.config_read(offset as u16, data);
        self.0.bar_read(0, offset, data)
    }

    fn write(&self, offset: u64, data: &[u8]) -> (devices::bus::Access, devices::bus::Effect) {
        let _ = self.0.config_write(offset as u16, data);
        self.0.bar_write(0, offset, data)
    }
}

struct Case {
    unit: Box<dyn Unit>,
    ports: Vec<(Arc<dyn BusDevice>, u64)>,
}

impl Case {
    fn new<D: Shared + 'static>(d: &Arc<D>, ports: Vec<(Arc<dyn BusDevice>, u64)>) -> Self {
        Self { unit: Box::new(SharedUnit::new(d.clone())), ports }
    }
}

fn serial() -> Case {
    let s = Serial::new("serial0", Line::new(), Arc::new(Sink::default()));
    Case::new(&s, vec![(s.clone(), 8)])
}

fn rtc() -> Case {
    let r = Rtc::new(RtcBase::Utc, Line::new(), 3 << 30, 5 << 30, 4);
    Case::new(&r, vec![(r.clone(), 2)])
}

fn i8042() -> Case {
    let d = I8042::new(Line::new());
    Case::new(&d, vec![(d.data_port(), 1), (d.command_port(), 1), (d.port_92(), 1)])
}

fn acpi_pm() -> Case {
    let d = AcpiPm::new(Line::new());
    Case::new(&d, vec![(d.clone(), 0x80), (d.smi_ports(), 2)])
}

fn chipset(d: Arc<ChipsetFunction>) -> Case {
    Case::new(&d, vec![(Arc::new(Function(d.clone())), 0x100)])
}

fn root_port() -> Case {
    let d = RootPort::new("rp1", 1, 1, 1, &Vectors::default()).unwrap();
    d.slot_occupied(true);
    Case::new(&d, vec![(Arc::new(Function(d.clone())), 0x1000)])
}

fn pci_root() -> Case {
    let root = PciRoot::new("pcie.0");
    root.add("pcie.0", Some((0, 0)), false, ChipsetFunction::q35_host()).unwrap();
    let port = RootPort::new("rp1", 1, 1, 1, &Vectors::default()).unwrap();
    root.add("pcie.0", None, false, port).unwrap();
    Case::new(&root, vec![(root.config_ports(), 8), (root.ecam(), 0x20_0000)])
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn conform(make: impl Fn() -> Case) {
    let mut a = make();
    let fresh = a.unit.save().unwrap();
    assert_eq!(fresh.name, a.unit.name());
    assert_eq!(a.unit.migration_blocker(), None);
    for seed in 1..4 {
        a.unit.resume();
        a.ports.iter().for_each(|(d, n)| hostile(&**d, *n, seed));
        a.unit.quiesce(deadline()).unwrap();
        let busy = a.unit.save().unwrap();
        // Standing still, the state stands still too.
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(a.unit.save().unwrap(), busy);
        // Another machine takes it over, whatever it did before.
        let mut b = make();
        b.ports.iter().for_each(|(d, n)| hostile(&**d, *n, seed + 100));
        b.unit.restore(&busy).unwrap();
        assert_eq!(b.unit.save().unwrap(), busy);
        b.unit.resume();
        b.unit.quiesce(deadline()).unwrap();
        tamper(&busy, &make);
    }
}

fn tamper(good: &Section, make: &impl Fn() -> Case) {
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut c = make();
    for _ in 0..2000 {
        let mut bad = good.clone();
        let at = random.next() as usize % bad.payload.len();
        match random.next() % 3 {
            0 => bad.payload.truncate(at),
            1 => bad.payload[at] ^= 1 << (random.next() % 8),
            _ => bad.payload[at] = random.next() as u8,
        }
        if c.unit.restore(&bad).is_ok() {
            c.unit.resume();
            c.ports.iter().for_each(|(d, n)| {
                let _ = d.read(0, &mut [0]);
                let _ = d.write(n - 1, &[0xff]);
            });
            c.unit.quiesce(deadline()).unwrap();
        }
    }
    let mut other = good.clone();
    other.version += 1;
    assert!(c.unit.restore(&other).is_err());
}

/// Reset: equal to power-on, except the clock, which runs on.
fn resets(make: impl Fn() -> Case) {
    let mut a = make();
    let fresh = a.unit.save().unwrap();
    a.ports.iter().for_each(|(d, n)| hostile(&**d, *n, 7));
    a.unit.quiesce(deadline()).unwrap();
    a.unit.reset();
    assert_eq!(a.unit.save().unwrap(), fresh);
}

macro_rules! conformance {
    ($($name:ident: $make:expr;)*) => { $(
        mod $name {
            use super::*;

            #[test]
            fn conforms() {
                conform(|| $make);
            }

            #[test]
            fn resets_to_power_on() {
                if stringify!($name) != "rtc_" {
                    resets(|| $make);
                }
            }
        }
    )* };
}

conformance! {
    serial_: serial();
    rtc_: rtc();
    i8042_: i8042();
    acpi_pm_: acpi_pm();
    q35_host: chipset(ChipsetFunction::q35_host());
    ich9_lpc: chipset(ChipsetFunction::ich9_lpc());
    i440fx: chipset(ChipsetFunction::i440fx());
    piix3: chipset(ChipsetFunction::piix3());
    piix4_pm: chipset(ChipsetFunction::piix4_pm());
    root_port_: root_port();
    pci_root_: pci_root();
}
