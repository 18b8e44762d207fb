//! The transport with a fake driver that walks configuration space and a device that echoes.

mod driver;
mod echo;

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use state::{Section, Unit};
use virtio::features::{
    VIRTIO_F_EVENT_IDX, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, mask, status,
};

use self::driver::{FakeDriver, Host};
use self::echo::Echo;
use super::layout::common;
use super::*;
use crate::pci::PciDevice;

fn function(host: &Arc<Host>, config: VirtioPciConfig) -> Arc<VirtioPci> {
    VirtioPci::new(
        "echo0",
        Box::new(Echo::default()),
        config,
        Arc::clone(host) as _,
        Arc::clone(host) as _,
        Some(Arc::clone(host) as _),
        host.mem.clone(),
    )
    .unwrap()
}

fn packed_on() -> VirtioPciConfig {
    VirtioPciConfig { packed: true, ..VirtioPciConfig::default() }
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

#[test]
fn looks_like_a_modern_function() {
    let host = Host::new();
    let dev = function(&host, VirtioPciConfig::default());
    let driver = FakeDriver::new(&host, &dev);
    assert_eq!(driver.config32(0), 0x1044_1af4);
    assert_eq!(driver.config32(8), 0x00ff_0001);
    assert_eq!(driver.config32(0x2c), 0x1100_1af4);
    assert_eq!((dev.name(), dev.type_name()), ("echo0", "virtio-rng-pci"));
    assert_eq!(driver.capability(1), (4, 0, 0x1000));
    assert_eq!(driver.capability(3), (4, 0x1000, 0x1000));
    assert_eq!(driver.capability(4), (4, 0x2000, 0x1000));
    assert_eq!(driver.capability(2), (4, 0x3000, 8));
    assert_eq!(driver.bar_sizes(), [(1, 0x1000), (4, 0x4000)]);
    // 2 queues and the configuration: 3 vectors, table and pending bits in BAR 1.
    let at = driver.find_capability(0x11, None).unwrap();
    assert_eq!(driver.config32(at) >> 16 & 0x7ff, 2);
    assert_eq!((driver.config32(at + 4), driver.config32(at + 8)), (1, 0x801));
}

#[test]
fn echoes_by_msix_and_doorbell() {
    for packed in [false, true] {
        let host = Host::new();
        let dev = function(&host, if packed { packed_on() } else { Default::default() });
        let mut driver = FakeDriver::new(&host, &dev);
        driver.set_up(true);
        assert_eq!(driver.features & mask(VIRTIO_F_RING_PACKED) != 0, packed);
        for i in 0..50_u32 {
            let queue = i as usize % 2;
            assert_eq!(driver.echo(queue, &i.to_le_bytes()), i.to_le_bytes());
        }
        assert!(host.triggered(1) > 0 && host.triggered(2) > 0);
        assert_eq!((host.triggered(0), host.line_changes()), (0, 0));
        assert!(host.doorbell_kicks() > 0, "kicks went by doorbell");
        let info = dev.describe();
        assert_eq!(info.status, 0xf);
        assert!(info.msix && info.queues.iter().all(|q| q.started && q.vector.is_some()));
    }
}

#[test]
fn falls_back_to_intx_and_slow_kicks() {
    let host = Host::new();
    let dev = function(&host, VirtioPciConfig { vectors: Some(0), ..Default::default() });
    assert_eq!(dev.describe().vectors, 0);
    let mut driver = FakeDriver::new(&host, &dev);
    host.refuse_doorbells();
    driver.set_up(false);
    assert_eq!(driver.echo(0, b"abcd"), *b"abcd");
    driver.wait(|| host.line());
    assert_eq!(driver.read_isr(), 1);
    assert!(!host.line(), "reading the ISR lowers the line");
    assert_eq!(driver.read_isr(), 0);
    assert_eq!(host.doorbell_kicks(), 0);
}

#[test]
fn configuration_changes_are_announced() {
    let host = Host::new();
    let dev = function(&host, VirtioPciConfig::default());
    let mut driver = FakeDriver::new(&host, &dev);
    driver.set_up(true);
    let before = driver.common(common::GENERATION, 1);
    // The echo device changes its configuration when that is written to.
    driver.write(layout::DEVICE, &[7]);
    assert_eq!(driver.common(common::GENERATION, 1), before + 1);
    assert_eq!(host.triggered(0), 1);
    let mut data = [0; 4];
    driver.read(layout::DEVICE, &mut data);
    assert_eq!(data, [7, 0, 0, 0]);
}

#[test]
fn refuses_features_that_were_not_offered() {
    let host = Host::new();
    let dev = function(&host, VirtioPciConfig::default());
    let driver = FakeDriver::new(&host, &dev);
    let offered = driver.offered();
    assert!(offered & mask(VIRTIO_F_VERSION_1) != 0);
    assert!(offered & mask(VIRTIO_F_RING_PACKED) == 0, "packed=off");
    let event_idx = mask(VIRTIO_F_EVENT_IDX);
    assert!(offered & event_idx != 0);
    let config = VirtioPciConfig { without: event_idx, ..VirtioPciConfig::default() };
    assert_eq!(function(&host, config).describe().offered, offered & !event_idx);
    for features in [0, offered & !mask(VIRTIO_F_VERSION_1), offered | mask(VIRTIO_F_RING_PACKED)] {
        driver.set_status(0);
        driver.set_status(status::ACKNOWLEDGE | status::DRIVER);
        driver.accept(features);
        driver.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        assert_eq!(driver.status() & status::FEATURES_OK, 0, "{features:#x}");
        driver.set_status(0xf);
        assert_eq!(driver.status() & status::DRIVER_OK, 0);
    }
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn a_broken_ring_marks_the_device_until_it_is_reset() {
    let host = Host::new();
    let dev = function(&host, VirtioPciConfig::default());
    let mut driver = FakeDriver::new(&host, &dev);
    driver.set_up(true);
    driver.break_ring(0);
    driver.wait(|| dev.describe().status & status::NEEDS_RESET != 0);
    driver.wait(|| host.triggered(0) == 1);
    let mut driver = FakeDriver::new(&host, &dev);
    driver.set_up(true);
    assert_eq!(driver.echo(0, b"abcd"), *b"abcd");
    // A ring outside RAM is refused when it is to be started.
    let mut driver = FakeDriver::new(&host, &dev);
    driver.ring_base = 1 << 40;
    driver.set_up_rings_anywhere();
    assert_eq!(driver.status() & status::NEEDS_RESET, status::NEEDS_RESET);
}

#[test]
fn doorbells_follow_the_bar() {
    let host = Host::new();
    let dev = function(&host, VirtioPciConfig::default());
    let mut driver = FakeDriver::new(&host, &dev);
    driver.set_up(true);
    let first = driver.bar_address();
    assert_eq!(host.doorbells(), [first + 0x3000, first + 0x3004]);
    driver.move_bar(0xc000_0000);
    assert_eq!(host.doorbells(), [0xc000_3000, 0xc000_3004]);
    assert_eq!(driver.echo(1, b"abcd"), *b"abcd");
    driver.config_write(4, &[0, 0]);
    assert_eq!(host.doorbells(), [0_u64; 0]);
    driver.config_write(4, &[6, 0]);
    assert_eq!(host.doorbells().len(), 2);
    driver.set_status(0);
    assert_eq!(host.doorbells(), [0_u64; 0]);
}

#[test]
fn unplugging_stops_everything() {
    let host = Host::new();
    let dev = function(&host, VirtioPciConfig::default());
    let mut driver = FakeDriver::new(&host, &dev);
    driver.set_up(true);
    drop(driver);
    assert_eq!(Arc::strong_count(&dev), 1, "the device's interrupts do not own the function");
    drop(dev);
    assert_eq!(host.doorbells(), [0_u64; 0]);
}

#[test]
fn configuration_space_reaches_the_bar() {
    let host = Host::new();
    let dev = function(&host, VirtioPciConfig::default());
    let mut driver = FakeDriver::new(&host, &dev);
    driver.set_up(true);
    let at = driver.find_capability(9, Some(5)).unwrap();
    let aim = |offset: u32, len: u32| {
        driver.config_write(at + 4, &[4]);
        driver.config_write(at + 8, &offset.to_le_bytes());
        driver.config_write(at + 12, &len.to_le_bytes());
    };
    aim(common::NUM_QUEUES as u32, 2);
    assert_eq!(driver.config32(at + 16), 2);
    aim(common::STATUS as u32, 1);
    assert_eq!(driver.config32(at + 16) & 0xff, 0xf);
    driver.config_write(at + 16, &[0]);
    assert_eq!(driver.status(), 0, "reset by way of configuration space");
    aim(0xffff_fffc, 4);
    driver.config32(at + 16);
    aim(2, 3);
    driver.config_write(at + 16, &[1, 2, 3, 4]);
}

#[test]
fn moves_in_the_middle_of_work() {
    for packed in [false, true] {
        let config = || if packed { packed_on() } else { VirtioPciConfig::default() };
        let host = Host::new();
        let source = function(&host, config());
        let mut driver = FakeDriver::new(&host, &source);
        driver.set_up(true);
        for i in 0..37_u32 {
            assert_eq!(driver.echo(0, &i.to_le_bytes()), i.to_le_bytes());
        }
        let mut unit = VirtioPciUnit(Arc::clone(&source));
        unit.quiesce(deadline()).unwrap();
        // The guest kicked after the queue was stopped: served only where the guest goes on.
        let late = driver.send(0, b"late");
        let section = unit.save().unwrap();
        assert_eq!(section, unit.save().unwrap(), "saving changes nothing");
        assert_eq!((section.kind.as_str(), section.version), ("echo", 0x103));

        // Another host, the same memory.
        let there = Host::with_memory(host.mem.clone());
        let dest = function(&there, config());
        let mut arriving = VirtioPciUnit(Arc::clone(&dest));
        assert_eq!(arriving.kind(), ("echo", 0x103));
        arriving.quiesce(deadline()).unwrap();
        arriving.restore(&section).unwrap();
        assert_eq!(there.doorbells(), host.doorbells(), "kicks are caught before it goes on");
        assert_eq!(arriving.save().unwrap(), section);
        let mut driver = driver.at(&there, &dest);
        let early = driver.send(1, b"soon");
        arriving.resume();
        assert_eq!(driver.receive(0, late), *b"late");
        assert_eq!(driver.receive(1, early), *b"soon");
        for i in 0..37_u32 {
            assert_eq!(driver.echo(1, &i.to_le_bytes()), i.to_le_bytes());
        }
        assert!(there.triggered(1) > 0);
        dest.arrived();
        assert_eq!(dest.migration_blocker(), None);

        // The source was told no: it goes on from where it stood, and nothing was lost.
        arriving.quiesce(deadline()).unwrap();
        arriving.resume();
        arriving.quiesce(deadline()).unwrap();
        arriving.reset();
        assert_eq!((driver.status(), there.doorbells().len()), (0, 0));
        assert_eq!(driver.config32(0x20), 0xc, "no BAR address after a reset");
    }
}

#[test]
fn stops_and_goes_on_under_load() {
    let host = Host::new();
    let dev = function(&host, packed_on());
    let mut driver = FakeDriver::new(&host, &dev);
    driver.set_up(true);
    let mut unit = VirtioPciUnit(Arc::clone(&dev));
    for i in 0..40_u32 {
        let sent = driver.send(0, &i.to_le_bytes());
        unit.quiesce(deadline()).unwrap();
        unit.resume();
        assert_eq!(driver.receive(0, sent), i.to_le_bytes());
    }
}

#[test]
fn restore_refuses_what_does_not_fit() {
    let host = Host::new();
    let source = function(&host, packed_on());
    let mut driver = FakeDriver::new(&host, &source);
    driver.set_up(true);
    let mut unit = VirtioPciUnit(source);
    unit.quiesce(deadline()).unwrap();
    let section = unit.save().unwrap();
    let fails = |dev: Arc<VirtioPci>, section: &Section| {
        VirtioPciUnit(dev).restore(section).unwrap_err().to_string()
    };
    let other = Host::new();
    let e = fails(function(&other, VirtioPciConfig::default()), &section);
    assert!(e.contains("not offered"), "{e}");
    let e = fails(function(&other, VirtioPciConfig { vectors: Some(9), ..packed_on() }), &section);
    assert!(e.contains("vectors") || e.contains("byte"), "{e}");
    let e = fails(function(&other, VirtioPciConfig { vectors: Some(0), ..packed_on() }), &section);
    assert!(e.contains("MSI-X"), "{e}");
    let newer = Section { version: 0x203, ..section.clone() };
    let e = fails(function(&other, packed_on()), &newer);
    assert!(e.contains("version"), "{e}");
    let kind = Section { kind: "virtio-net".into(), ..section };
    fails(function(&other, packed_on()), &kind);
}

fn quiesced(config: VirtioPciConfig) -> (Arc<Host>, VirtioPciUnit) {
    let host = Host::new();
    let mut unit = VirtioPciUnit(function(&host, config));
    unit.quiesce(deadline()).unwrap();
    (host, unit)
}

/// A guest that has set the function up, used it and stands still.
fn used(unit: &mut VirtioPciUnit) {
    let host = Host::with_memory(unit.0.core.lock().memory());
    unit.resume();
    let mut driver = FakeDriver::new(&host, &unit.0);
    driver.set_up(true);
    driver.write(layout::DEVICE, &[9]);
    assert_eq!(driver.echo(0, b"abcd"), *b"abcd");
    unit.quiesce(deadline()).unwrap();
}

state::conformance!(conforms, unit, || quiesced(VirtioPciConfig::default()).1, used);
state::conformance!(
    conforms_packed_express,
    unit,
    || { quiesced(VirtioPciConfig { express: true, ..packed_on() }).1 },
    used
);

#[derive(Debug, Clone)]
enum Poke {
    ConfigRead(u16, u8),
    ConfigWrite(u16, u8, u32),
    BarRead(u8, u16, u8),
    BarWrite(u8, u16, u8, u64),
    Pause,
}

fn poke() -> impl Strategy<Value = Poke> {
    let offset = || prop_oneof![4 => 0u16..64, 1 => 0x3000u16..0x3010, 1 => 0u16..0x4000];
    let bar = || prop_oneof![4 => Just(4u8), 1 => Just(1u8), 1 => 0u8..6];
    let value = || prop_oneof![0u64..16, any::<u64>(), Just(0xf)];
    prop_oneof![
        1 => (0u16..256, 0u8..3).prop_map(|(o, w)| Poke::ConfigRead(o, w)),
        2 => (0u16..256, 0u8..3, any::<u32>()).prop_map(|(o, w, v)| Poke::ConfigWrite(o, w, v)),
        2 => (bar(), offset(), 0u8..4).prop_map(|(b, o, w)| Poke::BarRead(b, o, w)),
        8 => (bar(), offset(), 0u8..4, value()).prop_map(|(b, o, w, v)| Poke::BarWrite(b, o, w, v)),
        1 => Just(Poke::Pause),
    ]
}

fn do_poke(dev: &Arc<VirtioPci>, p: Poke) {
    let size = |bar: u8| dev.bars().iter().find(|b| b.index == bar).map_or(0, |b| b.size);
    match p {
        Poke::ConfigRead(o, w) => dev.config_read(o >> w << w, &mut [0; 4][..1 << w]),
        Poke::ConfigWrite(o, w, v) => {
            let effect = dev.config_write(o >> w << w, &v.to_le_bytes()[..1 << w]);
            if effect == Effect::Relayout {
                dev.relayout();
            }
        }
        Poke::BarRead(b, o, w) if u64::from(o) + (1 << w) <= size(b) => {
            dev.bar_read(b, o.into(), &mut [0; 8][..1 << w]);
        }
        Poke::BarWrite(b, o, w, v) if u64::from(o) + (1 << w) <= size(b) => {
            let _ = dev.bar_write(b, o.into(), &v.to_le_bytes()[..1 << w]);
        }
        Poke::Pause => {
            let mut unit = VirtioPciUnit(Arc::clone(dev));
            unit.quiesce(deadline()).unwrap();
            let section = unit.save().unwrap();
            // What can be reached by the guest can be restored, except for rings that are nowhere.
            let _ = unit.restore(&section);
            unit.resume();
        }
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_access_is_survived(packed: bool, pokes in prop::collection::vec(poke(), 0..120)) {
        let host = Host::new();
        let dev = function(&host, VirtioPciConfig { packed, express: packed, ..Default::default() });
        let mut driver = FakeDriver::new(&host, &dev);
        driver.set_up(true);
        for p in pokes {
            do_poke(&dev, p);
        }
        // Whatever happened, a driver that starts again is served.
        let mut driver = FakeDriver::new(&host, &dev);
        driver.set_up(true);
        prop_assert_eq!(driver.echo(0, b"abcd"), *b"abcd");
    }

    #[test]
    fn any_section_is_survived(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
        whole: bool,
    ) {
        let host = Host::new();
        let source = function(&host, VirtioPciConfig::default());
        let mut driver = FakeDriver::new(&host, &source);
        driver.set_up(true);
        let mut unit = VirtioPciUnit(source);
        unit.quiesce(deadline()).unwrap();
        let mut section = unit.save().unwrap();
        for (at, v) in changes {
            let at = at.index(section.payload.len());
            section.payload[at] = v;
        }
        if !whole {
            section.payload.truncate(cut.index(section.payload.len()));
        }
        let _ = unit.restore(&section);
        unit.resume();
    }
}

#[test]
fn packed_needs_a_device_that_knows_it() {
    let host = Host::new();
    let echo = Echo::without(mask(VIRTIO_F_RING_PACKED) | mask(VIRTIO_F_EVENT_IDX));
    let made = VirtioPci::new(
        "echo0",
        Box::new(echo),
        packed_on(),
        Arc::clone(&host) as _,
        Arc::clone(&host) as _,
        None,
        host.mem.clone(),
    );
    assert!(matches!(made, Err(VirtioPciError::NoPacked { .. })));
}
