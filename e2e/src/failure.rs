//! What is told of a VMM when a test fails: how it stood, what it logged last, what its guest
//! printed last, and whether the guest's end explains the rest.
//!
//! A [`Vmm`](crate::vmm::Vmm) that is dropped by a panic notes how it stands in its directory; the
//! test's bed tells it all when it is dropped itself, also of VMMs that had ended before.

use std::fs;
use std::path::Path;

/// The file in a VMM's directory that says how it stood when the test failed.
pub const STATE: &str = "state.txt";
/// Lines of each log that are told.
const LINES: usize = 40;
/// Lines of a log after a vCPU's end, which have its registers.
const REGISTERS: usize = 12;

/// What in a VMM's log ends the guest's work, whatever a test sees of it later.
const ENDS: &[(&str, &str)] = &[
    ("triple fault", "its guest took a TRIPLE FAULT and started anew"),
    ("cannot go on, the machine is stopped", "a vCPU of it CANNOT GO ON (status internal-error)"),
];
/// The same in what the guest prints.
const GUEST_ENDS: &[(&str, &str)] = &[
    ("Kernel panic", "its guest's kernel PANICKED"),
    ("TERN-GUEST PANIC", "its guest's work PANICKED"),
];

/// Everything about the VMMs whose directories are in `bed`, for a failed test's output.
pub fn tell(bed: &Path) -> String {
    let dirs = fs::read_dir(bed).into_iter().flatten().flatten().map(|e| e.path());
    let mut dirs: Vec<_> = dirs.filter(|p| p.is_dir()).collect();
    dirs.sort();
    dirs.iter().map(|dir| tell_one(dir)).collect()
}

fn tell_one(dir: &Path) -> String {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let read = |file: &str| printable(&fs::read(dir.join(file)).unwrap_or_default());
    let (log, serial) = (read("stderr.log"), read("serial.log"));
    let state = read(STATE);
    let state = if state.is_empty() { "it had ended before" } else { state.trim() };
    let mut text = format!("==== {name}: {state}\n");
    for (said, ends) in [(&log, ENDS), (&serial, GUEST_ENDS)] {
        for (mark, what) in ends.iter().filter(|(mark, _)| said.contains(mark)) {
            let times = said.matches(mark).count();
            text += &format!("==== {name}: {what} ({times} times)\n");
            let from = said.lines().skip_while(|l| !l.contains(mark)).take(1 + REGISTERS);
            from.for_each(|l| text += &format!("    {l}\n"));
        }
    }
    // A guest that came up twice was reset.
    let boots = serial.matches("TERN-GUEST READY").count();
    if boots > 1 {
        text += &format!("==== {name}: its guest came up {boots} times\n");
    }
    for (what, said) in [("log", &log), ("guest's serial line", &serial)] {
        if !said.is_empty() {
            text += &format!("---- the end of {name}'s {what}:\n{}\n", tail(said));
        }
    }
    text
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// Without what would confuse a terminal or a log of CI.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_all_logs_are_told_and_a_triple_fault_first() {
        let bed = tempfile::tempdir().unwrap();
        let write = |vm: &str, file: &str, text: &str| {
            fs::create_dir_all(bed.path().join(vm)).unwrap();
            fs::write(bed.path().join(vm).join(file), text).unwrap();
        };
        let many: String = (0..100).map(|i| format!("line {i}\n")).collect();
        write("vm1", "serial.log", &(many + "\x1b[0mlast words\r\n"));
        write("vm2", "stderr.log", "WARN vCPU 0: triple fault\nrip 0x123\nrsp 0x8\n");
        write("vm2", "serial.log", "TERN-GUEST READY {}\nTERN-GUEST READY {}\n");
        write("vm2", STATE, "status running\n");
        let told = tell(bed.path());
        let at = |what: &str| told.find(what).unwrap_or_else(|| panic!("{what:?} in\n{told}"));
        assert!(at("vm1: it had ended before") < at("last words"), "{told}");
        assert!(told.contains("line 99") && told.contains("line 61") && !told.contains("line 60"));
        assert!(at("vm2: status running") < at("vm2: its guest took a TRIPLE FAULT"));
        assert!(at("TRIPLE FAULT") < at("rip 0x123"));
        assert!(at("came up 2 times") < at("the end of vm2's log"));
        assert!(!told.contains('\x1b') && !told.contains('\r'));
    }
}
