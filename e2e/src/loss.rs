//! Whether a guest was lost, and how, from what is at hand when a run fails: the VMMs' logs, the
//! guest's serial lines, and the failure itself.
//!
//! Invariant: only what an emulated host is known to do to a guest
//! (docs/architecture.md, "The lab") is [`Loss::is_known_of_the_lab`]. Wrong bytes, lost pings, a
//! migration that failed and a VMM that ended never are.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use crate::Error;

/// `tern-demo`'s exit status when the guest was lost as an emulated host loses one; EX_TEMPFAIL of
/// sysexits.h.
pub const EXIT: u8 = 75;

/// How a guest was lost. The strings are the VMMs whose logs show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Its CPU took a triple fault, so it started anew.
    TripleFault(String),
    /// A vCPU could not go on.
    Stopped(String),
    /// Its kernel or its work panicked.
    Panicked(String),
    /// It came up again without any of these.
    Restarted(String),
    /// Its VMM runs, and nothing comes from it.
    Silent,
}

impl Loss {
    /// What the logs below `bed` (a directory for each VMM that one guest ran in) and the failure
    /// tell; `None` when the guest was not lost.
    pub fn find(bed: &Path, error: &Error) -> Option<Self> {
        if matches!(error, Error::Ended { .. } | Error::Migration { .. } | Error::Qmp { .. }) {
            return None;
        }
        let dirs = fs::read_dir(bed).into_iter().flatten().flatten().map(|e| e.path());
        let mut dirs: Vec<_> = dirs.filter(|p| p.is_dir()).collect();
        dirs.sort();
        let has = |file: &str, marks: &[&str]| {
            dirs.iter().find_map(|dir| {
                let text = fs::read(dir.join(file)).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
                marks.iter().any(|m| text.contains(m)).then_some(name)
            })
        };
        // A panic comes first: it may end in a triple fault, and is what there is to look at.
        if let Some(name) = has("serial.log", &["Kernel panic", "TERN-GUEST PANIC"]) {
            return Some(Self::Panicked(name));
        }
        if let Some(name) = has("stderr.log", &["cannot go on, the machine is stopped"]) {
            return Some(Self::Stopped(name));
        }
        if let Some(name) = has("stderr.log", &["triple fault"]) {
            return Some(Self::TripleFault(name));
        }
        // The guest came up in the first VMM; all others took it as it was.
        let mut boots = dirs.iter().flat_map(|dir| {
            let text = fs::read(dir.join("serial.log")).unwrap_or_default();
            let times = String::from_utf8_lossy(&text).matches("TERN-GUEST READY").count();
            let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
            std::iter::repeat_n(name, times)
        });
        if let Some(name) = boots.nth(1) {
            return Some(Self::Restarted(name));
        }
        // A connection that was reset is not silence: somebody answered.
        matches!(error, Error::Io { what, source }
            if what.starts_with("the guest does not answer")
                && matches!(source.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
        .then_some(Self::Silent)
    }

    /// Whether an emulated host is known to lose guests so.
    pub fn is_known_of_the_lab(&self) -> bool {
        matches!(self, Self::TripleFault(_) | Self::Silent)
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TripleFault(vmm) => write!(
                f,
                "the guest was lost: its CPU took a triple fault in {vmm}, and it started anew"
            ),
            Self::Stopped(vmm) => write!(f, "the guest was lost: a vCPU in {vmm} cannot go on"),
            Self::Panicked(vmm) => write!(f, "the guest was lost: it panicked in {vmm}"),
            Self::Restarted(vmm) => write!(f, "the guest was lost: it came up again in {vmm}"),
            Self::Silent => write!(f, "the guest was lost: its VMM runs but it no longer answers"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn io(what: &str, kind: ErrorKind) -> Error {
        Error::Io { what: format!("{what}: {kind}"), source: kind.into() }
    }

    fn find(logs: &[(&str, &str, &str)], error: &Error) -> Option<Loss> {
        let bed = tempfile::tempdir().unwrap();
        for (vmm, file, text) in logs {
            fs::create_dir_all(bed.path().join(vmm)).unwrap();
            fs::write(bed.path().join(vmm).join(file), text).unwrap();
        }
        Loss::find(bed.path(), error)
    }

    #[test]
    fn a_guest_is_lost_by_evidence_only() {
        let reset = io("the guest does not answer an order", ErrorKind::ConnectionReset);
        let silent = io("the guest does not answer an order", ErrorKind::WouldBlock);
        let up = ("vmm1", "serial.log", "TERN-GUEST READY {}\n");
        let triple = ("vmm2", "stderr.log", "WARN vCPU 0: triple fault\nrip 1\n");
        let again = ("vmm2", "serial.log", "TERN-GUEST READY {}\n");
        let panic = ("vmm2", "serial.log", "Kernel panic - not syncing\nTERN-GUEST READY {}\n");
        let stopped = ("vmm2", "stderr.log", "vCPU 0 cannot go on, the machine is stopped\n");
        let vmm2 = || "vmm2".to_owned();
        assert_eq!(find(&[up, triple, again], &reset), Some(Loss::TripleFault(vmm2())));
        assert_eq!(find(&[up, again], &reset), Some(Loss::Restarted(vmm2())));
        assert_eq!(find(&[up, panic, triple], &reset), Some(Loss::Panicked(vmm2())));
        assert_eq!(find(&[up, stopped], &silent), Some(Loss::Stopped(vmm2())));
        assert_eq!(find(&[up], &silent), Some(Loss::Silent));
        assert_eq!(find(&[up], &reset), None);
        assert_eq!(find(&[up], &io("the network", ErrorKind::TimedOut)), None);
        let broken = Error::Protocol("the TCP connection did not survive the migration".into());
        assert_eq!(find(&[up], &broken), None);
        assert_eq!(find(&[up, triple], &broken), Some(Loss::TripleFault(vmm2())));
    }

    #[test]
    fn a_failed_migration_and_an_ended_vmm_are_no_loss_of_a_guest() {
        let triple = ("vmm2", "stderr.log", "WARN vCPU 0: triple fault\n");
        let failed = Error::Migration { status: "failed".into(), why: "no".into() };
        let ended = Error::Ended {
            name: "vmm2".into(),
            status: "signal 6".into(),
            said: String::new(),
            dir: "vmm2".into(),
        };
        assert_eq!(find(&[triple], &failed), None);
        assert_eq!(find(&[triple], &ended), None);
    }

    #[test]
    fn only_what_emulation_does_is_excused() {
        let name = String::new;
        assert!(Loss::TripleFault(name()).is_known_of_the_lab());
        assert!(Loss::Silent.is_known_of_the_lab());
        for other in [Loss::Stopped(name()), Loss::Panicked(name()), Loss::Restarted(name())] {
            assert!(!other.is_known_of_the_lab(), "{other}");
        }
    }
}
