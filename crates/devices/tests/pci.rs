//! The PCI tree as a guest and a user see it: places, assignment, decoding, MSI-X.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use common::{Vector, Vectors, hostile};
use devices::bus::{Access, Bus, Effect};
use devices::chipset::ChipsetFunction;
use devices::irq::MsiAllocator;
use devices::pci::config::command;
use devices::pci::root::{CONFIG_PORTS, CONFIG_PORTS_COUNT, ECAM_BASE, ECAM_BYTES};
use devices::pci::{
    BarInfo, BarKind, ConfigSpace, Ident, Msix, MsixLayout, PciDevice, PciRoot, RootPort, Windows,
    intx_gsi, swizzle,
};
use devices::shared::{Shared, SharedUnit};
use parking_lot::Mutex;
use state::Unit;

/// A function with every kind of BAR and MSI-X.
struct Card {
    name: String,
    config: Mutex<ConfigSpace>,
    msix: Msix,
    relayouts: AtomicU32,
}

impl Card {
    fn new(name: &str, vectors: &Vectors) -> Arc<Self> {
        let ident = Ident {
            vendor: 0x1af4,
            device: 0x1041,
            revision: 1,
            class: 0x02_0000,
            subsystem: (0x1af4, 0x1100),
        };
        let mut config = ConfigSpace::endpoint(ident, true);
        config.set_interrupt_pin(1);
        config.add_bar(0, BarKind::Io, 0x20);
        config.add_bar(1, BarKind::Mem32, 0x1000);
        config.add_bar(4, BarKind::Mem64Prefetch, 0x4000);
        let layout = MsixLayout { bar: 1, table: 0, pending: 0x800 };
        let msix = Msix::new(&mut config, layout, vectors.allocate(3).unwrap());
        let relayouts = AtomicU32::new(0);
        Arc::new(Self { name: name.into(), config: Mutex::new(config), msix, relayouts })
    }
}

impl PciDevice for Card {
    fn name(&self) -> &str {
        &self.name
    }

    fn type_name(&self) -> &str {
        "card"
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Effect {
        let mut c = self.config.lock();
        let relayout = c.write(offset, data);
        self.msix.config_changed(&c);
        if relayout { Effect::Relayout } else { Effect::None }
    }

    fn bars(&self) -> Vec<BarInfo> {
        self.config.lock().bars()
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> Access {
        if !self.msix.bar_read(bar, offset, data) {
            data.fill(bar);
        }
        Access::Done
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> (Access, Effect) {
        self.msix.bar_write(bar, offset, data);
        (Access::Done, Effect::None)
    }

    fn relayout(&self) {
        self.relayouts.fetch_add(1, Ordering::SeqCst);
    }
}

struct Machine {
    root: Arc<PciRoot>,
    vectors: Vectors,
    mmio: Bus,
    pio: Bus,
}

const HIGH: u64 = 0x10_0000_0000;

impl Machine {
    fn new() -> Self {
        let root = PciRoot::new("pcie.0");
        let (mmio, pio) = (Bus::new(), Bus::new());
        mmio.insert(ECAM_BASE, ECAM_BYTES, root.ecam()).unwrap();
        pio.insert(CONFIG_PORTS, CONFIG_PORTS_COUNT, root.config_ports()).unwrap();
        mmio.set_fallback(root.mmio());
        pio.set_fallback(root.pio());
        root.add("pcie.0", Some((0, 0)), false, ChipsetFunction::q35_host()).unwrap();
        root.add("pcie.0", Some((31, 0)), true, ChipsetFunction::ich9_lpc()).unwrap();
        Self { root, vectors: Vectors::default(), mmio, pio }
    }

    fn card(&self, bus: &str, name: &str) -> Arc<Card> {
        let card = Card::new(name, &self.vectors);
        self.root.add(bus, None, false, card.clone()).unwrap();
        card
    }

    fn port(&self, name: &str, slot: u8) -> Arc<RootPort> {
        let port = RootPort::new(name, slot, slot, u16::from(slot), &self.vectors).unwrap();
        self.root.add("pcie.0", Some((slot, 0)), false, port.clone()).unwrap();
        port
    }

    fn read32(&self, address: u64) -> u32 {
        let mut b = [0; 4];
        self.mmio.read(address, &mut b);
        u32::from_le_bytes(b)
    }

    fn write32(&self, address: u64, v: u32) {
        assert_eq!(self.mmio.write(address, &v.to_le_bytes()).1, Effect::None);
    }

    fn ecam(&self, name: &str) -> u64 {
        let b = self.root.find(name).unwrap();
        ECAM_BASE + (u64::from(b.bus) << 20) + (u64::from(b.devfn()) << 12)
    }
}

fn address(card: &Card, bar: usize) -> u64 {
    card.bars()[bar].address.unwrap()
}

#[test]
fn refuses_places_in_the_words_of_qemu() {
    let m = Machine::new();
    m.port("rp1", 2);
    let add = |bus: &str, place, multi, name: &str| {
        let card = Card::new(name, &m.vectors);
        m.root.add(bus, place, multi, card).map_err(|e| e.to_string())
    };
    assert_eq!(
        add("pcie.0", Some((2, 0)), false, "a").unwrap_err(),
        "PCI: slot 2 function 0 not available for card, in use by pcie-root-port,id=rp1"
    );
    assert_eq!(add("nowhere", None, false, "a").unwrap_err(), "Bus 'nowhere' not found");
    assert_eq!(
        add("rp1", Some((1, 0)), false, "a").unwrap_err(),
        "PCI: slot 1 is not valid for card, parent device only allows plugging into slot 0."
    );
    add("rp1", None, false, "a").unwrap();
    assert_eq!(
        add("rp1", None, false, "b").unwrap_err(),
        "PCI: no slot/function available for card, all in use or reserved"
    );
    assert_eq!(add("pcie.0", None, false, "a").unwrap_err(), "Duplicate device ID 'a'");
    assert!(add("pcie.0", Some((32, 0)), false, "b").is_err());
    add("pcie.0", Some((5, 0)), true, "m0").unwrap();
    add("pcie.0", Some((5, 1)), false, "m1").unwrap();
    add("pcie.0", Some((6, 1)), false, "m2").unwrap();
    assert!(add("pcie.0", Some((6, 0)), false, "m3").is_err());
    assert!(add("pcie.0", Some((2, 1)), false, "m3").is_err());
    assert!(m.root.remove("rp1").is_err(), "something is behind it");
    m.root.remove("a").unwrap();
    m.root.remove("rp1").unwrap();
    assert!(m.root.remove("rp1").is_err());
    // Places are given from the first free slot on.
    assert_eq!(add("pcie.0", None, false, "x").unwrap().slot, 1);
    assert_eq!(add("pcie.0", None, false, "y").unwrap().slot, 2);
}

#[test]
fn assigns_so_that_everything_answers() {
    let m = Machine::new();
    let near = m.card("pcie.0", "near");
    m.port("rp1", 2);
    m.port("rp2", 3);
    let far = m.card("rp2", "far");
    m.root.assign(Windows::standard(HIGH, 64 << 30)).unwrap();
    for card in [&near, &far] {
        assert!((0x1000..0x1_0000).contains(&address(card, 0)));
        assert!((0xc000_0000..0xfec0_0000).contains(&address(card, 1)));
        assert!(address(card, 2) >= HIGH);
        let mut b = [0];
        m.pio.read(address(card, 0), &mut b);
        assert_eq!(b, [0]);
        assert_eq!(m.read32(address(card, 1) + 0xc), 1, "vector 0 is masked");
        assert_eq!(m.read32(address(card, 2) + 0x3ffc), 0x0404_0404);
        assert_eq!(m.read32(address(card, 2) + 0x4000), 0xffff_ffff);
        assert!(card.relayouts.load(Ordering::SeqCst) > 0);
    }
    assert_eq!(m.root.find("far").unwrap().to_string(), "02:00.0");
    assert_eq!(m.read32(m.ecam("far")), 0x1041_1af4);
    assert_eq!(m.root.list().len(), 6);
    // Windows are disjoint, on their granules, and hold what is behind them.
    let list = m.root.list();
    let bridges: Vec<_> = list.iter().filter_map(|f| f.bridge).collect();
    let (a, b) = (bridges[0], bridges[1]);
    assert_eq!((a.secondary, a.subordinate, b.secondary, b.subordinate), (1, 1, 2, 2));
    assert!(a.memory.unwrap().limit < b.memory.unwrap().base);
    assert!(a.prefetch.unwrap().limit < b.prefetch.unwrap().base);
    assert!(a.io.unwrap().limit < b.io.unwrap().base);
    assert!(b.memory.unwrap().holds(address(&far, 1), 0x1000));
    // The same through the ports.
    let bdf = m.root.find("near").unwrap();
    let select = 0x8000_0000u32 | u32::from(bdf.devfn()) << 8;
    let _ = m.pio.write(0xcf8, &select.to_le_bytes());
    let mut b = [0; 2];
    m.pio.read(0xcfe, &mut b);
    assert_eq!(u16::from_le_bytes(b), 0x1041);
    assert_eq!(m.pio.write(0xcf9, &[6]).1, Effect::Reset);
    // Multifunction shows in the header, nothing answers beside it.
    assert_eq!(m.read32(m.ecam("ich9-lpc") + 0xc) >> 16 & 0xff, 0x80);
    assert_eq!(m.read32(ECAM_BASE + (9 << 15)), 0xffff_ffff);
}

#[test]
fn bars_move_size_and_go_behind_closed_bridges() {
    let m = Machine::new();
    m.port("rp1", 2);
    let card = m.card("rp1", "card");
    m.root.assign(Windows::standard(HIGH, 64 << 30)).unwrap();
    let cfg = m.ecam("card");
    let old = address(&card, 1);
    // Sizing as Linux does it: decoding off, ones, back.
    let cmd = m.read32(cfg + 4);
    m.write32(cfg + 4, cmd & !3);
    assert_eq!(m.read32(old), 0xffff_ffff);
    m.write32(cfg + 0x14, 0xffff_ffff);
    assert_eq!(m.read32(cfg + 0x14), 0xffff_f000);
    m.write32(cfg + 0x10, 0xffff_ffff);
    assert_eq!(m.read32(cfg + 0x10), 0xffff_ffe1);
    m.write32(cfg + 0x20, 0xffff_ffff);
    m.write32(cfg + 0x24, 0xffff_ffff);
    assert_eq!((m.read32(cfg + 0x20), m.read32(cfg + 0x24)), (0xffff_c00c, 0xffff_ffff));
    m.write32(cfg + 0x14, old as u32 + 0x1000);
    m.write32(cfg + 4, cmd);
    assert_eq!(m.read32(old), 0xffff_ffff);
    assert_eq!(m.read32(old + 0x100c), 1);
    // Outside the window of its bridge it does not answer.
    m.write32(cfg + 0x14, 0xfe00_0000);
    assert_eq!(m.read32(0xfe00_000c), 0xffff_ffff);
    m.write32(cfg + 0x14, old as u32);
    assert_eq!(m.read32(old + 0xc), 1);
    let port = m.ecam("rp1");
    let on = m.read32(port + 4);
    m.write32(port + 4, on & !2);
    assert_eq!(m.read32(old + 0xc), 0xffff_ffff);
    m.write32(port + 4, on);
    assert_eq!(m.read32(old + 0xc), 1);
    // A bus number that is moved takes the card along.
    m.write32(port + 0x18, 0x0007_0700);
    assert_eq!(m.root.find("card").unwrap().bus, 7);
    m.write32(port + 0x18, 0);
    assert_eq!(m.root.find("card"), None);
}

#[test]
fn assignment_is_redone_after_reset_and_refused_when_it_does_not_fit() {
    let m = Machine::new();
    let port = m.port("rp1", 2);
    m.root.assign(Windows::standard(HIGH, 64 << 30)).unwrap();
    let before = m.root.list();
    let mut units: [Box<dyn Unit>; 2] =
        [Box::new(SharedUnit::new(m.root.clone())), Box::new(SharedUnit::new(port))];
    units.iter_mut().for_each(|u| u.reset());
    units.iter_mut().for_each(|u| u.resume());
    assert_eq!(m.root.list(), before);
    let small = Windows::standard(HIGH, 1 << 20);
    m.card("rp1", "card");
    m.root.assign(small).unwrap();
    m.port("rp2", 3);
    let e = m.root.assign(small).unwrap_err().to_string();
    assert!(e.starts_with("rp2: no room for its bridge window in the 64-bit memory"), "{e}");
}

#[test]
fn msix_masks_keep_interrupts_pending() {
    let m = Machine::new();
    let card = m.card("pcie.0", "card");
    m.root.assign(Windows::standard(HIGH, 64 << 30)).unwrap();
    let v: Arc<Vector> = m.vectors.0.lock()[1].clone();
    let sent = || v.sent.load(Ordering::SeqCst);
    let (table, control) = (address(&card, 1), m.ecam("card") + 0x40);
    card.msix.trigger(1);
    assert_eq!(sent(), 0, "off");
    assert_eq!(m.read32(control) >> 16, 2);
    m.write32(control, 0x8000_0000);
    card.msix.trigger(1);
    assert_eq!((sent(), m.read32(table + 0x800)), (0, 2), "pending");
    m.write32(table + 0x10, 0xfee0_1000);
    m.write32(table + 0x18, 0x41);
    m.write32(table + 0x1c, 0);
    assert_eq!((sent(), m.read32(table + 0x800)), (1, 0));
    assert_eq!(*v.route.lock(), Some((0xfee0_1000, 0x41)));
    card.msix.trigger(1);
    assert_eq!(sent(), 2);
    m.write32(control, 0xc000_0000);
    assert_eq!(*v.route.lock(), None);
    card.msix.trigger(1);
    assert_eq!(sent(), 2);
    let (config, saved) = (card.config.lock().save(), card.msix.save());
    m.write32(control, 0x8000_0000);
    assert_eq!(sent(), 3);
    // Elsewhere the pending one comes too, and only once.
    let there = Vectors::default();
    let other = Card::new("card", &there);
    other.config.lock().restore(&config).unwrap();
    other.msix.restore(&saved, &other.config.lock()).unwrap();
    assert_eq!(other.msix.save(), saved);
    let w = there.0.lock()[1].clone();
    assert_eq!(w.sent.load(Ordering::SeqCst), 0);
    let _ = other.config_write(0x42, &[0, 0x80]);
    assert_eq!(w.sent.load(Ordering::SeqCst), 1);
    card.msix.trigger(99);
}

#[test]
fn hostile_accesses_change_no_identity() {
    let m = Machine::new();
    let port = m.port("rp1", 2);
    m.card("rp1", "card");
    m.root.assign(Windows::standard(HIGH, 64 << 30)).unwrap();
    for seed in 1..20 {
        hostile(&*m.root.ecam(), 3 << 20, seed);
        hostile(&*m.root.config_ports(), 8, seed);
        hostile(&*m.root.mmio(), u64::MAX / 2, seed);
    }
    let mut b = [0; 4];
    port.config_read(0, &mut b);
    assert_eq!(u32::from_le_bytes(b), 0x000c_1b36);
}

#[test]
fn root_port_tells_of_what_is_plugged_in() {
    let m = Machine::new();
    let port = m.port("rp1", 2);
    let slot_status = |p: &RootPort| {
        let mut b = [0; 2];
        p.config_read(0x40 + 0x1a, &mut b);
        u16::from_le_bytes(b)
    };
    assert_eq!(slot_status(&port), 0);
    m.card("rp1", "card");
    assert_eq!(slot_status(&port), 0x40, "there from the start: present, and no change");
    assert!(!port.powered_off());
    // The guest wants interrupts: each command completes, changes come.
    let v = m.vectors.0.lock()[0].clone();
    let _ = port.config_write(0x7c + 2, &[0, 0x80]);
    m.root.assign(Windows::standard(HIGH, 64 << 30)).unwrap();
    let bar = port.bars()[0].address.unwrap();
    m.write32(bar + 0xc, 0);
    let _ = port.config_write(0x40 + 0x18, &[0x39, 0]);
    assert_eq!(slot_status(&port), 0x50);
    assert_eq!(v.sent.load(Ordering::SeqCst), 1);
    let _ = port.config_write(0x40 + 0x1a, &[0x10, 0]);
    port.press_attention_button();
    assert_eq!((slot_status(&port), v.sent.load(Ordering::SeqCst)), (0x41, 2));
    m.root.remove("card").unwrap();
    assert_eq!((slot_status(&port), v.sent.load(Ordering::SeqCst)), (0x109, 3));
    // Its state goes only to a slot with the same in it.
    let saved = Shared::save(&*port).unwrap();
    let other = RootPort::new("rp1", 2, 2, 2, &m.vectors).unwrap();
    other.restore(saved.clone()).unwrap();
    other.slot_occupied(true);
    assert!(other.restore(saved).is_err());
}

#[test]
fn command_bits_gate_intx() {
    let m = Machine::new();
    let card = m.card("pcie.0", "card");
    let mut c = card.config.lock();
    c.set_intx_status(true);
    assert!(c.intx_level());
    c.write(4, &command::INTX_DISABLE.to_le_bytes());
    assert!(!c.intx_level());
}

#[test]
fn intx_is_swizzled() {
    let m = Machine::new();
    m.port("rp1", 2);
    for slot in 0..32 {
        for pin in 1..=4 {
            assert!((20..24).contains(&intx_gsi(slot, pin)));
        }
    }
    assert_eq!(swizzle(0, 1), 1);
    assert_eq!(swizzle(3, 2), 1);
    assert_eq!(m.root.intx_gsi("pcie.0", 5, 1).unwrap(), intx_gsi(5, 1));
    assert_eq!(m.root.intx_gsi("rp1", 0, 1).unwrap(), intx_gsi(2, 1));
    assert!(m.root.intx_gsi("rp9", 0, 1).is_err());
}

#[test]
fn chipsets_plug_in() {
    let root = PciRoot::new("pci.0");
    assert_eq!(devices::chipset::plug_pc(&root).unwrap().len(), 3);
    assert!(devices::chipset::plug_pc(&root).is_err());
    root.assign(Windows::standard(HIGH, 1 << 30)).unwrap();
    let pm = root.list().into_iter().find(|f| f.name == "piix4-pm").unwrap();
    assert_eq!((pm.bdf.to_string().as_str(), pm.interrupt_line), ("00:01.3", 9));
    let root = PciRoot::new("pcie.0");
    assert_eq!(devices::chipset::plug_q35(&root).unwrap().len(), 2);
}

/// Two vCPUs move BARs while two others use them: nothing locks up, and all is back in place.
#[test]
fn vcpus_access_while_bars_move() {
    let m = Machine::new();
    m.port("rp1", 2);
    let (near, far) = (m.card("pcie.0", "near"), m.card("rp1", "far"));
    m.root.assign(Windows::standard(HIGH, 64 << 30)).unwrap();
    let before = m.root.list();
    let bars = [address(&near, 1), address(&far, 1)];
    std::thread::scope(|s| {
        for name in ["near", "rp1"] {
            let cfg = m.ecam(name) + 4;
            let m = &m;
            s.spawn(move || {
                let on = m.read32(cfg);
                for _ in 0..2000 {
                    m.write32(cfg, on & !7);
                    m.write32(cfg, on);
                }
            });
        }
        for bar in bars {
            let m = &m;
            s.spawn(move || {
                for _ in 0..20_000 {
                    let v = m.read32(bar + 0xc);
                    assert!(v == 1 || v == 0xffff_ffff, "{v:#x}");
                }
            });
        }
    });
    assert_eq!(m.root.list(), before);
    assert_eq!((m.read32(bars[0] + 0xc), m.read32(bars[1] + 0xc)), (1, 1));
}
