//! Migrations between two real processes that end badly: what the source says, and what its
//! operator can do. The guest is one instruction, so the KVM of any host does.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use e2e::proxy::{Fault, Point, Proxy, kind};
use e2e::vmm::{Config, Vmm};
use serde_json::{Value, json};

/// A directory with a kernel and a disk, and VMMs of one configuration.
struct Place {
    dir: tempfile::TempDir,
    config: Config,
    tries: u32,
}

impl Place {
    /// `None`, with the reason printed, where there is no KVM.
    fn new() -> Option<Self> {
        if !e2e::tiny::has_kvm() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let config = e2e::tiny::config(env!("CARGO_BIN_EXE_tern"), dir.path()).unwrap();
        Some(Self { dir, config, tries: 0 })
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn source(&self, extra: &[&str]) -> Vmm {
        let extra = extra.iter().map(|w| (*w).to_owned()).collect();
        Config { extra, ..self.config.clone() }.start(self.path(), None).unwrap()
    }

    /// A destination that gets `signal` at `point`, and the path to it.
    fn struck(&mut self, point: Point, signal: &'static str) -> (Vmm, Proxy) {
        self.tries += 1;
        let address = self.path().join(format!("in{}", self.tries));
        let incoming = Some(format!("unix:{}", address.display()));
        let name = format!("destination{}", self.tries);
        let to = Config { name, incoming, ..self.config.clone() }.start(self.path(), None).unwrap();
        let pid = to.pid();
        let at = self.path().join(format!("path{}", self.tries));
        let fault = Fault::Do(Box::new(move || kill(pid, signal)));
        (to, Proxy::start(&at, &address, Some((point, fault))).unwrap())
    }

    /// Migrates `source` to a destination that is killed at `point`; what query-migrate says then.
    fn killed_at(&mut self, source: &mut Vmm, point: Point) -> Value {
        let (_to, proxy) = self.struck(point, "-KILL");
        migrate(source, &proxy)
    }
}

fn kill(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

/// Migrates `source` over `proxy`, which breaks; what query-migrate says then.
fn migrate(source: &mut Vmm, proxy: &Proxy) -> Value {
    source.qmp.execute("migrate", json!({"uri": proxy.uri()})).unwrap();
    let info = reaches(source, "failed");
    assert!(proxy.fault_is_done(), "{info}");
    info
}

/// What query-migrate says once the migration's status is `status`.
fn reaches(vm: &mut Vmm, status: &str) -> Value {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let info = vm.qmp.execute("query-migrate", Value::Null).unwrap();
        if info["status"] == status {
            return info;
        }
        assert!(Instant::now() < until, "not {status}: {info}");
        std::thread::sleep(Duration::from_millis(10));
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
fn a_destination_that_wakes_up_takes_the_guest_after_all() {
    let Some(mut place) = Place::new() else { return };
    for (point, state) in
        [(Point::Before(kind::GO), "paused"), (Point::Before(kind::RELEASE), "postmigrate")]
    {
        let mut source = place.source(&[]);
        let (mut to, proxy) = place.struck(point, "-STOP");
        let info = migrate(&mut source, &proxy);
        let why = info["error-desc"].as_str().unwrap();
        assert!(why.contains("does not answer") || why.contains("does not say"), "{why}");
        assert_eq!(source.status().unwrap(), state, "{point:?}");
        let refused = source.qmp.execute("migrate_cancel", Value::Null).unwrap_err().to_string();
        assert!(refused.contains("cont"), "{refused}");
        kill(to.pid(), "-CONT");
        assert_eq!(reaches(&mut source, "completed")["error-desc"], Value::Null);
        assert_eq!(source.status().unwrap(), "postmigrate");
        assert_eq!(to.status().unwrap(), "running");
        let refused = source.qmp.execute("cont", Value::Null).unwrap_err().to_string();
        assert!(refused.contains("destination"), "{refused}");
        assert!(is_locked(&place));
        assert_eq!(source.quit().unwrap(), 0);
        assert_eq!(to.quit().unwrap(), 0);
    }
}

#[test]
fn who_insists_on_the_guest_has_it_when_the_destination_stays_silent() {
    let Some(mut place) = Place::new() else { return };
    let mut source = place.source(&[]);
    let (mut to, proxy) = place.struck(Point::Before(kind::GO), "-STOP");
    migrate(&mut source, &proxy);
    source.qmp.execute("cont", Value::Null).unwrap();
    assert_eq!(source.status().unwrap(), "running");
    kill(to.pid(), "-CONT");
    // The lock is the source's again: it cannot run there.
    assert_eq!(to.wait_end(Duration::from_secs(60)).unwrap(), 1);
    assert_eq!(source.status().unwrap(), "running");
    assert!(is_locked(&place));
    assert_eq!(source.quit().unwrap(), 0);
}

#[test]
fn cont_at_a_source_in_doubt_hears_what_the_destination_says() {
    let Some(mut place) = Place::new() else { return };
    let mut source = place.source(&[]);
    let (mut to, proxy) = place.struck(Point::Before(kind::RELEASE), "-STOP");
    migrate(&mut source, &proxy);
    let pid = to.pid();
    let wakes = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(1));
        kill(pid, "-CONT");
    });
    let refused = source.qmp.execute("cont", Value::Null).unwrap_err().to_string();
    assert!(refused.contains("runs there"), "{refused}");
    wakes.join().unwrap();
    assert_eq!(source.status().unwrap(), "postmigrate");
    assert_eq!(to.status().unwrap(), "running");
    assert_eq!(source.quit().unwrap(), 0);
    assert_eq!(to.quit().unwrap(), 0);
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

#[test]
fn the_tern_command_says_what_is_left_to_do() {
    let Some(mut place) = Place::new() else { return };
    let name = format!("handover-{}", std::process::id());
    place.config.name.clone_from(&name);
    let mut source = place.source(&[]);
    let tern = |words: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_tern")).args(words).output().unwrap();
        let said = [out.stdout, out.stderr].concat();
        (out.status.success(), String::from_utf8_lossy(&said).into_owned())
    };
    let (listed, all) = tern(&["ps"]);
    if !listed || !all.contains(&name) {
        eprintln!("skipped: VMs have no runtime directory here: {all}");
        return;
    }
    let (_to, proxy) = place.struck(Point::Before(kind::RELEASE), "-KILL");
    let (went, said) = tern(&["migrate", &name, &proxy.uri()]);
    assert!(!went && said.contains("runs nowhere"), "{said}");
    assert!(said.contains(&format!("postmigrate; cont is: tern monitor {name} cont")), "{said}");
    let (went, said) = tern(&["monitor", &name, "cont"]);
    assert!(went, "{said}");
    assert_eq!(source.status().unwrap(), "running");
    let (_to, proxy) = place.struck(Point::Before(kind::READY), "-KILL");
    let (went, said) = tern(&["migrate", &name, &proxy.uri()]);
    assert!(!went && said.contains("Here it is running"), "{said}");
}
