//! Sections, the container and unit sets, with good and bad input.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use minicbor::{Decode, Encode};
use proptest::prelude::*;
use state::{
    Error, Result, SaveRestore, Saveable, SavedState, Section, Sections, Unit, UnitSet, container,
};

#[derive(Debug, Clone, PartialEq, Encode, Decode)]
#[cbor(map)]
struct LampState {
    #[n(0)]
    level: u8,
    #[n(1)]
    label: Option<String>,
}

impl SavedState for LampState {
    const KIND: &'static str = "lamp";
    const VERSION: u16 = 2;
    const READS: &'static [u16] = &[1, 2];
}

#[derive(Default)]
struct Lamp {
    level: u8,
    label: Option<String>,
}

impl SaveRestore for Lamp {
    type State = LampState;
    fn save(&self) -> Result<LampState> {
        Ok(LampState { level: self.level, label: self.label.clone() })
    }
    fn restore(&mut self, LampState { level, label }: LampState) -> Result<()> {
        if level > 100 {
            return Err(Error::invalid("level", "at most 100"));
        }
        (self.level, self.label) = (level, label);
        Ok(())
    }
}

state::conformance!(a_lamp_conforms, saveable, Lamp::default, |l: &mut Lamp| {
    l.level = 7;
    l.label = Some("hall".into());
});
state::conformance!(
    a_lamp_unit_conforms,
    unit,
    || LampUnit::new("hall", false),
    |u: &mut LampUnit| {
        u.lamp.level = 9;
    }
);

/// Counts who runs.
struct LampUnit {
    name: &'static str,
    lamp: Lamp,
    stuck: bool,
    running: Arc<AtomicUsize>,
}

impl LampUnit {
    fn new(name: &'static str, stuck: bool) -> Self {
        Self { name, lamp: Lamp::default(), stuck, running: Arc::default() }
    }
}

impl Unit for LampUnit {
    fn name(&self) -> &str {
        self.name
    }
    fn quiesce(&mut self, _deadline: Instant) -> Result<()> {
        if self.stuck {
            return Err(Error::Unit { unit: self.name.into(), reason: "stuck".into() });
        }
        self.running.store(0, Ordering::SeqCst);
        Ok(())
    }
    fn resume(&mut self) {
        self.running.store(1, Ordering::SeqCst);
    }
    fn kind(&self) -> (&'static str, u16) {
        Saveable::kind(&self.lamp)
    }
    fn save(&self) -> Result<Section> {
        self.lamp.save_section(self.name)
    }
    fn restore(&mut self, section: &Section) -> Result<()> {
        self.lamp.restore_section(section)
    }
    fn migration_blocker(&self) -> Option<String> {
        self.stuck.then(|| format!("{} is stuck", self.name))
    }
    fn reset(&mut self) {
        self.lamp = Lamp::default();
    }
}

#[test]
fn a_unit_that_does_not_stop_lets_the_others_go_on() {
    let (a, b, c) =
        (LampUnit::new("a", false), LampUnit::new("b", true), LampUnit::new("c", false));
    let running = [&a, &c].map(|u| Arc::clone(&u.running));
    let set = UnitSet::new(vec![Box::new(a), Box::new(b), Box::new(c)]);
    assert_eq!(set.migration_blockers(), ["b is stuck"]);
    let (_set, e) = set.resume().quiesce(Instant::now()).err().unwrap();
    assert_eq!(e.to_string(), "b: stuck");
    assert!(running.iter().all(|r| r.load(Ordering::SeqCst) == 1));
}

#[test]
fn sections_are_matched_by_name() {
    let set = || {
        UnitSet::new(vec![Box::new(LampUnit::new("a", false)), Box::new(LampUnit::new("b", false))])
    };
    let mut there = set();
    let saved = set().save().unwrap();
    assert_eq!(there.manifest(), [("a".into(), "lamp", 2), ("b".into(), "lamp", 2)]);
    let mut backwards = saved.clone();
    backwards.0.reverse();
    there.restore(backwards).unwrap();
    let missing = Sections(saved.0[..1].to_vec());
    assert_eq!(there.restore(missing).unwrap_err().to_string(), "section b is missing");
    let mut more = saved;
    more.0.push(Section { name: "c".into(), ..more.0[0].clone() });
    assert!(matches!(there.restore(more), Err(Error::LeftOver(n)) if n == "c"));
}

#[test]
fn older_versions_are_read_if_listed() {
    let s = Lamp { level: 3, label: None }.save_section("x").unwrap();
    let mut lamp = Lamp::default();
    lamp.restore_section(&Section { version: 1, ..s.clone() }).unwrap();
    assert_eq!(lamp.level, 3);
    let e = lamp.restore_section(&Section { version: 3, ..s }).unwrap_err().to_string();
    assert_eq!(e, "section x: lamp version 3, this build reads lamp versions [1, 2]");
    let bright = Section::encode("x", &LampState { level: 101, label: None }).unwrap();
    assert!(matches!(lamp.restore_section(&bright), Err(Error::Invalid { field: "level", .. })));
}

fn some_sections() -> impl Strategy<Value = Sections> {
    let section = ("[a-z]{1,8}", any::<u16>(), prop::collection::vec(any::<u8>(), 0..300));
    prop::collection::vec(section, 0..8).prop_map(|list| {
        let named = list.into_iter().enumerate().map(|(i, (kind, version, payload))| Section {
            name: format!("{kind}{i}"),
            kind,
            version,
            payload,
        });
        Sections(named.collect())
    })
}

proptest! {
    #[test]
    fn the_container_gives_back_what_it_took(sections in some_sections(), tail: Vec<u8>) {
        let mut bytes = Vec::new();
        container::write(&mut bytes, &sections).unwrap();
        bytes.extend(&tail);
        let mut input = bytes.as_slice();
        prop_assert_eq!(container::read(&mut input).unwrap(), sections);
        prop_assert_eq!(input, tail.as_slice());
    }

    #[test]
    fn damage_is_found(
        sections in some_sections(), at: prop::sample::Index, flip in 1u8.., cut: bool,
    ) {
        let mut bytes = Vec::new();
        container::write(&mut bytes, &sections).unwrap();
        let at = at.index(bytes.len());
        if cut { bytes.truncate(at) } else { bytes[at] ^= flip }
        prop_assert!(container::read(&mut bytes.as_slice()).is_err());
    }

    #[test]
    fn nonsense_is_an_error(payload: Vec<u8>, mut bytes: Vec<u8>) {
        let s = Section { name: "x".into(), kind: "lamp".into(), version: 2, payload };
        let _ = Lamp::default().restore_section(&s);
        bytes.splice(0..0, *b"TERNSTAT");
        prop_assert!(container::read(&mut bytes.as_slice()).is_err());
    }
}

#[test]
fn lengths_are_bounded() {
    let huge =
        Section { name: "x".into(), kind: "k".into(), version: 1, payload: vec![0; 17 << 20] };
    let e = container::write(&mut std::io::sink(), &Sections(vec![huge])).unwrap_err();
    assert!(matches!(e, Error::TooLarge(_)));
    let mut head = b"TERNSTAT\x01\0\0\0".to_vec();
    head.extend(5000_u32.to_le_bytes());
    head.extend(crc32c::crc32c(&head).to_le_bytes());
    assert!(matches!(container::read(&mut head.as_slice()), Err(Error::TooLarge(_))));
    // A length that promises 16 MiB, with nothing behind it.
    let mut head = b"TERNSTAT\x01\0\0\0\x01\0\0\0".to_vec();
    head.extend(crc32c::crc32c(&head).to_le_bytes());
    head.extend((16_u32 << 20).to_le_bytes());
    head.extend([0; 4]);
    assert!(matches!(container::read(&mut head.as_slice()), Err(Error::Container(_))));
    let twice = Section { name: "x".into(), kind: "k".into(), version: 1, payload: vec![] };
    let mut bytes = Vec::new();
    container::write(&mut bytes, &Sections(vec![twice.clone(), twice])).unwrap();
    let e = container::read(&mut bytes.as_slice()).unwrap_err().to_string();
    assert_eq!(e, "saved state: two sections are called x");
}
