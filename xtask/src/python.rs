//! A Python environment with the package `qemu.qmp`, the tests' independent QMP client.

use std::path::PathBuf;
use std::process::Command;

use crate::{host, paths};

/// The version that the tests were written against.
const PACKAGE: &str = "qemu.qmp==0.0.6";

/// The environment's interpreter, or none with a notice when the package cannot be had.
pub fn ensure() -> Option<PathBuf> {
    let dir = paths::lab().join("venv");
    let python = dir.join("bin/python");
    let stamp = dir.join(".package");
    if std::fs::read_to_string(&stamp).is_ok_and(|s| s == PACKAGE) {
        return Some(python);
    }
    let made =
        host::must(Command::new("python3").args(["-m", "venv"]).arg(&dir), "python3 -m venv")
            .and_then(|()| {
                let mut pip = Command::new(dir.join("bin/pip"));
                pip.args(["install", "--quiet", "--disable-pip-version-check", PACKAGE]);
                host::must(&mut pip, "pip install")
            });
    match made {
        Ok(()) => {
            let _ = std::fs::write(&stamp, PACKAGE);
            Some(python)
        }
        Err(e) => {
            eprintln!("xtask: {e}: the test with Python's QMP client is left out");
            None
        }
    }
}
