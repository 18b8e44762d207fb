//! What is told of a VMM when a test fails: how it stood, what it logged last, what its guest
//! printed last, and whether the guest's end explains the rest.
//!
//! A [`Vmm`](crate::vmm::Vmm) that is dropped by a panic notes how it stands in its directory; the
//! test's bed tells it all when it is dropped itself, also of VMMs that had ended before.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

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

/// What the threads of process `pid` do for `time`: a vCPU that uses no time has a guest that waits,
/// one that uses all has a guest that is lost in its own code.
pub fn threads(pid: u32, time: Duration) -> String {
    let before = ticks(pid);
    std::thread::sleep(time);
    // proc(5): in units of 10 ms, whatever the kernel's own.
    let percent = |n: u64| n * 10 * 100 / (time.as_millis() as u64).max(1);
    let used = ticks(pid).into_iter().map(|(id, (name, user, system))| {
        let (_, u, s) = before.get(&id).cloned().unwrap_or((name.clone(), user, system));
        (name, percent(user.saturating_sub(u)), percent(system.saturating_sub(s)))
    });
    let busy: Vec<_> = used
        .filter(|(name, user, system)| name.contains("CPU") || user + system > 0)
        .map(|(name, user, system)| format!("{name} {user}+{system}"))
        .collect();
    format!("threads' user and system time in percent: {}", busy.join(", "))
}

/// Name, user and system time of each thread.
fn ticks(pid: u32) -> BTreeMap<u32, (String, u64, u64)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let one = |task: fs::DirEntry| {
        let id = task.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        // The name is in parentheses and may hold any.
        let (head, tail) = stat.rsplit_once(')')?;
        let name = head.split_once('(')?.1.to_owned();
        let fields: Vec<_> = tail.split_whitespace().collect();
        let field = |n: usize| fields.get(n)?.parse().ok();
        Some((id, (name, field(11)?, field(12)?)))
    };
    tasks.filter_map(one).collect()
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
    fn a_busy_thread_is_seen() {
        let stop = std::sync::atomic::AtomicBool::new(false);
        let order = std::sync::atomic::Ordering::Relaxed;
        let told = std::thread::scope(|s| {
            let spin = || {
                while !stop.load(order) {
                    std::hint::spin_loop();
                }
            };
            std::thread::Builder::new().name("CPU 0/test".into()).spawn_scoped(s, spin).unwrap();
            let told = threads(std::process::id(), Duration::from_millis(300));
            stop.store(true, order);
            told
        });
        let (_, percent) = told.split_once("CPU 0/test ").unwrap_or_else(|| panic!("{told}"));
        let percent: u32 = percent.split('+').next().unwrap().parse().unwrap();
        assert!(percent > 0, "{told}");
    }

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
