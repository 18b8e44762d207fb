//! Migrations between two real processes that end badly: what the source says, and what its
//! operator can do. The guest is one instruction, so the KVM of any host does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use e2e::proxy::{Fault, Point, Proxy, kind};
use e2e::vmm::{Config, Vmm};
use serde_json::{Value, json};

/// An ELF kernel with a PVH entry that is `jmp .`; Xen's public note format and the ELF
/// specification say what is where.
fn kernel() -> Vec<u8> {
    const AT: u64 = 0x10_0000;
    let mut elf = Vec::new();
    let mut put = |bytes: &[u8]| elf.extend_from_slice(bytes);
    put(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put(&[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&AT.to_le_bytes());
    put(&64u64.to_le_bytes());
    put(&[0; 12]);
    for half in [64u16, 56, 2, 64, 0, 0] {
        put(&half.to_le_bytes());
    }
    let mut segment = |kind: u32, flags: u32, offset: u64, bytes: u64, align: u64| {
        put(&kind.to_le_bytes());
        put(&flags.to_le_bytes());
        for word in [offset, AT, AT, bytes, bytes, align] {
            put(&word.to_le_bytes());
        }
    };
    let headers = 64 + 2 * 56;
    segment(1, 5, headers + 20, 2, 1);
    segment(4, 4, headers, 20, 4);
    // XEN_ELFNOTE_PHYS32_ENTRY of "Xen".
    for word in [4u32, 4, 18] {
        put(&word.to_le_bytes());
    }
    put(b"Xen\0");
    put(&(AT as u32).to_le_bytes());
    put(&[0xeb, 0xfe]);
    elf
}

/// A directory with a kernel and a disk, and VMMs of one configuration.
struct Place {
    dir: tempfile::TempDir,
    config: Config,
    tries: u32,
}

impl Place {
    /// `None`, with the reason printed, where there is no KVM.
    fn new() -> Option<Self> {
        if let Err(e) = fs::File::options().read(true).write(true).open("/dev/kvm") {
            eprintln!("skipped: /dev/kvm: {e}");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| -> PathBuf {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            path
        };
        let config = Config {
            program: env!("CARGO_BIN_EXE_tern").into(),
            name: "source".into(),
            memory_mib: 16,
            cpus: 1,
            kernel: file("kernel", &kernel()),
            initrd: file("initrd", b"none"),
            append: String::new(),
            disk: Some(file("disk", &[0; 1 << 16])),
            incoming: None,
            extra: Vec::new(),
        };
        Some(Self { dir, config, tries: 0 })
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn source(&self, extra: &[&str]) -> Vmm {
        let extra = extra.iter().map(|w| (*w).to_owned()).collect();
        Config { extra, ..self.config.clone() }.start(self.path(), None).unwrap()
    }

    /// Migrates `source` to a destination that is killed at `point`; what query-migrate says then.
    fn killed_at(&mut self, source: &mut Vmm, point: Point) -> Value {
        self.tries += 1;
        let address = self.path().join(format!("in{}", self.tries));
        let incoming = Some(format!("unix:{}", address.display()));
        let name = format!("destination{}", self.tries);
        let to = Config { name, incoming, ..self.config.clone() }.start(self.path(), None).unwrap();
        let pid = to.pid().to_string();
        let kill = move || {
            assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
        };
        let at = self.path().join(format!("path{}", self.tries));
        let fault = Fault::Do(Box::new(kill));
        let proxy = Proxy::start(&at, &address, Some((point, fault))).unwrap();
        source.qmp.execute("migrate", json!({"uri": proxy.uri()})).unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let info = source.qmp.execute("query-migrate", Value::Null).unwrap();
            if info["status"] == "failed" {
                assert!(proxy.fault_is_done(), "{info}");
                return info;
            }
            assert!(Instant::now() < until, "{info}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Who holds the disk: another VMM that wants it is refused.
fn is_locked(place: &Place) -> bool {
    let third = Config { name: "third".into(), ..place.config.clone() };
    match third.start(place.path(), None) {
        Ok(_) => false,
        Err(e) => {
            assert!(e.to_string().contains("lock"), "{e}");
            true
        }
    }
}

#[test]
fn a_destination_lost_before_it_confirmed_leaves_the_choice_to_cont() {
    let Some(mut place) = Place::new() else { return };
    let mut source = place.source(&[]);
    let info = place.killed_at(&mut source, Point::Before(kind::RELEASE));
    let why = info["error-desc"].as_str().unwrap();
    assert!(why.contains("runs nowhere") && why.contains("cont"), "{why}");
    assert_eq!(source.status().unwrap(), "postmigrate");
    // Nothing but cont is taken until the operator has said where the guest is.
    for command in ["system_reset", "migrate"] {
        let arguments = if command == "migrate" { json!({"uri": "unix:/none"}) } else { json!({}) };
        let refused = source.qmp.execute(command, arguments).unwrap_err().to_string();
        assert!(refused.contains("cont"), "{refused}");
    }
    // While another process has the disk, it may be the one.
    let other = Config { name: "other".into(), ..place.config.clone() };
    let other = other.start(place.path(), None).unwrap();
    let refused = source.qmp.execute("cont", Value::Null).unwrap_err().to_string();
    assert!(refused.contains("lock") && refused.contains("destination"), "{refused}");
    assert_eq!(source.status().unwrap(), "postmigrate");
    drop(other);
    source.qmp.execute("cont", Value::Null).unwrap();
    assert_eq!(source.status().unwrap(), "running");
    source.qmp.wait_event("RESUME", Duration::from_secs(10)).unwrap();
    assert!(is_locked(&place));
    // It is a machine as any other now.
    let info = place.killed_at(&mut source, Point::Before(kind::READY));
    assert_eq!(source.status().unwrap(), "running", "{info}");
    assert_eq!(source.quit().unwrap(), 0);
}

#[test]
fn after_a_failed_migration_a_source_is_what_it_was() {
    let Some(mut place) = Place::new() else { return };
    let mut source = place.source(&["-S"]);
    for point in [Point::Before(kind::READY), Point::Before(kind::RUNNING)] {
        assert_eq!(source.status().unwrap(), "prelaunch");
        place.killed_at(&mut source, point);
        assert_eq!(source.status().unwrap(), "prelaunch", "{point:?}");
        assert!(is_locked(&place));
    }
    source.qmp.execute("cont", Value::Null).unwrap();
    assert_eq!(source.status().unwrap(), "running");
    source.qmp.execute("stop", Value::Null).unwrap();
    place.killed_at(&mut source, Point::Before(kind::READY));
    assert_eq!(source.status().unwrap(), "paused");
    assert_eq!(source.quit().unwrap(), 0);
}
