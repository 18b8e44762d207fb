//! What every device that can be saved must do, as one test: save, change, restore, equal.
//!
//! ```
//! # use state::{Section, SaveRestore, SavedState};
//! # #[derive(minicbor::Encode, minicbor::Decode)] #[cbor(map)] struct S { #[n(0)] v: u8 }
//! # impl SavedState for S { const KIND: &'static str = "lamp"; const VERSION: u16 = 1; }
//! # struct Lamp(u8);
//! # impl SaveRestore for Lamp {
//! #   type State = S;
//! #   fn save(&self) -> state::Result<S> { Ok(S { v: self.0 }) }
//! #   fn restore(&mut self, s: S) -> state::Result<()> { self.0 = s.v; Ok(()) }
//! # }
//! state::conformance!(lamp_conforms, saveable, || Lamp(0), |lamp: &mut Lamp| lamp.0 = 1);
//! ```

use crate::{Result, Saveable, Section, Unit};

/// Makes a test function: its name, `saveable` or `unit`, how to make a device as at power-on, and
/// how to change it so that its saved state is another.
#[macro_export]
macro_rules! conformance {
    ($name:ident, saveable, $make:expr, $change:expr) => {
        #[test]
        fn $name() {
            $crate::conformance::saveable($make, $change);
        }
    };
    ($name:ident, unit, $make:expr, $change:expr) => {
        #[test]
        fn $name() {
            $crate::conformance::unit($make, $change);
        }
    };
}

/// Checks a [`Saveable`] (all [`SaveRestore`](crate::SaveRestore) are).
///
/// # Panics
/// If it does not conform.
pub fn saveable<D: Saveable>(make: impl Fn() -> D, change: impl Fn(&mut D)) {
    let save = |d: &D| d.save_section("device");
    check(make, change, save, |d: &mut D, s: &Section| d.restore_section(s));
}

/// Checks a [`Unit`], which `make` gives quiesced; and that its reset leads back to power-on.
///
/// # Panics
/// If it does not conform.
pub fn unit<D: Unit>(make: impl Fn() -> D, change: impl Fn(&mut D)) {
    let mut d = make();
    let fresh = d.save().expect("a fresh device saves");
    assert_eq!(fresh.name, d.name());
    assert_eq!((fresh.kind.as_str(), fresh.version), d.kind());
    change(&mut d);
    d.reset();
    let after = d.save().expect("a device saves after a reset");
    assert_eq!(after, fresh, "reset does not lead back to the state at power-on");
    check(make, change, |d: &D| d.save(), |d: &mut D, s: &Section| d.restore(s));
}

fn check<D>(
    make: impl Fn() -> D,
    change: impl Fn(&mut D),
    save: impl Fn(&D) -> Result<Section>,
    restore: impl Fn(&mut D, &Section) -> Result<()>,
) {
    let mut source = make();
    let fresh = save(&source).expect("a fresh device saves");
    change(&mut source);
    let changed = save(&source).expect("a changed device saves");
    assert_ne!(fresh, changed, "the change does not show in the state: the test tests nothing");
    assert_eq!(save(&source).expect("it saves again"), changed, "saving changes the device");

    let mut dest = make();
    restore(&mut dest, &changed).expect("a fresh device restores");
    assert_eq!(save(&dest).expect("a restored device saves"), changed, "state was lost");
    restore(&mut dest, &fresh).expect("a used device restores");
    assert_eq!(save(&dest).expect("a restored device saves"), fresh, "something was left behind");

    let kind = Section { kind: format!("not-{}", changed.kind), ..changed.clone() };
    assert!(restore(&mut make(), &kind).is_err(), "another kind is taken");
    let newer = Section { version: u16::MAX, ..changed.clone() };
    assert!(restore(&mut make(), &newer).is_err(), "a version from the future is taken");
    damage(&changed, |s| {
        // An error or not, but no panic.
        let _ = restore(&mut make(), s);
    });
}

/// Calls `f` with `section` cut off and changed in many places.
fn damage(section: &Section, mut f: impl FnMut(&Section)) {
    let len = section.payload.len();
    // At most some hundred of each: some devices are slow to make.
    for at in (0..len).step_by(len / 200 + 1) {
        let mut s = section.clone();
        s.payload.truncate(at);
        f(&s);
        for v in [0x00, 0x7f, 0xff, section.payload[at].wrapping_add(1)] {
            let mut s = section.clone();
            s.payload[at] = v;
            f(&s);
        }
    }
}
