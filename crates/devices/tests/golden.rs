//! What a guest finds in configuration space at power-on, byte for byte.
//!
//! These files must never change once released: a guest reads them once at boot, and goes on with
//! what it read after it has been migrated to a newer build. A machine that is to look otherwise
//! is a new machine version with files of its own. `TERN_BLESS=1` writes files that are new;
//! whoever blesses a change to an old one breaks running guests.

mod common;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use common::Vectors;
use devices::chipset::ChipsetFunction;
use devices::pci::{PciDevice, RootPort};

/// Sixteen bytes a line; lines of zeros beyond the first 256 bytes are left out.
fn dump(d: &dyn PciDevice, bytes: u16) -> String {
    let mut text = String::new();
    for at in (0..bytes).step_by(16) {
        let mut line = [0; 16];
        for i in (0..16).step_by(4) {
            d.config_read(at + i, &mut line[usize::from(i)..usize::from(i) + 4]);
        }
        if at >= 256 && line == [0; 16] {
            continue;
        }
        write!(text, "{at:03x}:").unwrap();
        line.iter().for_each(|b| write!(text, " {b:02x}").unwrap());
        text.push('\n');
    }
    text
}

/// What the guest can write: what reads back after all ones.
fn writable(d: &dyn PciDevice, bytes: u16) -> String {
    for at in (0..bytes).step_by(4) {
        let _ = d.config_write(at, &[0xff; 4]);
    }
    dump(d, bytes)
}

fn check(machine: &str, name: &str, d: &dyn PciDevice, bytes: u16) {
    let found = format!("power-on\n{}after writing ones\n{}", dump(d, bytes), writable(d, bytes));
    let path: PathBuf =
        [env!("CARGO_MANIFEST_DIR"), "golden", machine, &format!("{name}.txt")].iter().collect();
    if std::env::var_os("TERN_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &found).unwrap();
    }
    let pinned = std::fs::read_to_string(&path)
        .unwrap_or_else(|e| panic!("{}: {e}; TERN_BLESS=1 writes it", path.display()));
    assert_eq!(found, pinned, "{name} of {machine} looks otherwise to a guest than it did");
}

#[test]
fn q35() {
    let functions: [Arc<ChipsetFunction>; 2] =
        [ChipsetFunction::q35_host(), ChipsetFunction::ich9_lpc()];
    for f in functions {
        check("q35-1", f.name(), &*f, 256);
    }
    let port = RootPort::new("rp1", 1, 1, 1, &Vectors::default()).unwrap();
    check("q35-1", "root-port-empty", &*port, 4096);
    let port = RootPort::new("rp2", 2, 3, 4, &Vectors::default()).unwrap();
    port.slot_occupied(true);
    check("q35-1", "root-port-occupied", &*port, 4096);
}

#[test]
fn pc() {
    let functions =
        [ChipsetFunction::i440fx(), ChipsetFunction::piix3(), ChipsetFunction::piix4_pm()];
    for f in functions {
        check("pc-1", f.name(), &*f, 256);
    }
}
