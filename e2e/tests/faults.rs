//! Faults of a migration with a real guest at work: the path breaks at messages of the protocol,
//! a side dies, a side refuses. After each, exactly one VM runs, its disk lock is with it, and the
//! guest there goes on with nothing lost; the next fault meets that VM.

use std::process::Command;
use std::time::{Duration, Instant};

use e2e::guest::control::Order;
use e2e::link::{Control, Stream};
use e2e::network::{self, Tap};
use e2e::proxy::{Fault, Point, Proxy, kind};
use e2e::testbed::{BOOT, Bed, is_tern};
use e2e::vmm::{Config, Vmm};
use serde_json::{Value, json};

/// Longer than every patience of the protocol together.
const SETTLE: Duration = Duration::from_secs(120);

/// A VMM and what has to go after it.
struct Side {
    vm: Vmm,
    _tap: Tap,
}

/// Which of the two sides ran in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Winner {
    Source,
    Destination,
}

/// A guest at work that moves, or does not, from fault to fault.
struct Work {
    config: Config,
    side: Side,
    guest: Control,
    stream: Stream,
    tries: u32,
    /// The last: it tells how the others stood.
    bed: Bed,
}

impl Work {
    fn new(name: &str) -> Option<Self> {
        let mut bed = Bed::new(name)?;
        if !is_tern() {
            println!("skipped: the faults are those of Tern's protocol");
            return None;
        }
        let mut config = bed.working().unwrap();
        config.memory_mib = 160;
        config.append =
            config.append.replace("tern.mem=64", "tern.mem=24").replace("tcp=512", "tcp=128");
        let (mut vm, tap) = bed.start_on_network(&config).unwrap();
        vm.wait_ready(BOOT).unwrap();
        let guest = Control::connect(network::GUEST).unwrap();
        let stream = Stream::start(network::GUEST, 128).unwrap();
        Some(Self { config, side: Side { vm, _tap: tap }, guest, stream, tries: 0, bed })
    }

    /// A destination that listens, and the address that leads to it.
    fn destination(&mut self, change: impl FnOnce(&mut Config)) -> (Side, std::path::PathBuf) {
        self.tries += 1;
        let address = self.bed.dir.join(format!("in{}", self.tries));
        let mut config = Config {
            name: self.bed.config().name,
            incoming: Some(format!("unix:{}", address.display())),
            ..self.config.clone()
        };
        change(&mut config);
        let (vm, tap) = self.bed.start_on_network(&config).unwrap();
        (Side { vm, _tap: tap }, address)
    }

    /// One migration with one fault; who runs afterwards. All promises are checked.
    fn meet(&mut self, what: &str, point: Point, fault: impl FnOnce(u32) -> Fault) -> Winner {
        let since = Instant::now();
        let (mut to, address) = self.destination(|_| ());
        let at = self.bed.dir.join(format!("path{}", self.tries));
        let fault = fault(to.vm.pid());
        let proxy = Proxy::start(&at, &address, Some((point, fault))).unwrap();
        self.side.vm.qmp.execute("migrate", json!({"uri": proxy.uri()})).unwrap();
        let winner = settle(&mut self.side.vm, &mut to.vm, what);
        assert!(proxy.fault_is_done(), "{what}: the fault did not happen");
        self.go_on(winner, to, what);
        println!("{what}: {winner:?} ({:.1} s)", since.elapsed().as_secs_f64());
        winner
    }

    /// The loser ends; the winner has the lock, and its guest is all right.
    fn go_on(&mut self, winner: Winner, mut to: Side, what: &str) {
        if winner == Winner::Destination {
            std::mem::swap(&mut self.side, &mut to);
        }
        drop(to);
        let mut third = self.bed.config();
        third.disk.clone_from(&self.config.disk);
        match self.bed.start(&third) {
            Ok(_) => panic!("{what}: the VM that runs has not the lock of its disk"),
            Err(e) => assert!(e.to_string().contains("lock"), "{what}: {e}"),
        }
        let before = self.guest.order(&Order::Status).unwrap();
        let until = Instant::now() + SETTLE;
        loop {
            let now = self.guest.order(&Order::Verify).unwrap();
            assert_eq!((now.mem_bad, now.disk_bad, now.tcp_bad), (0, 0, 0), "{what}: {now:?}");
            let at_work = now.mem_dirtied > before.mem_dirtied
                && now.disk_checked > before.disk_checked
                && now.disk_written > before.disk_written
                && now.tcp_received > before.tcp_received;
            if at_work {
                break;
            }
            assert!(Instant::now() < until, "{what}: the guest does not work on: {now:?}");
        }
        assert!(self.stream.is_alive(), "{what}: the guest's stream broke");
        assert_eq!(self.stream.sum().bad, 0, "{what}");
        assert_eq!(self.side.vm.status().unwrap(), "running", "{what}");
    }
}

fn migration(vm: &mut Vmm) -> Value {
    vm.qmp.execute("query-migrate", Value::Null).unwrap()
}

/// Waits until the migration is over at the source and one side runs. At no time both do: the
/// destination is asked first, as the guest only ever goes from the source to it.
fn settle(source: &mut Vmm, to: &mut Vmm, what: &str) -> Winner {
    let until = Instant::now() + SETTLE;
    loop {
        // A destination that has ended answers no more.
        let there = to.status().unwrap_or_else(|_| "ended".to_owned());
        let here = source.status().unwrap();
        assert!(here != "running" || there != "running", "{what}: both run");
        let info = migration(source);
        let over = matches!(info["status"].as_str(), Some("completed" | "failed" | "cancelled"));
        match (here.as_str(), there.as_str()) {
            ("running", _) if over => return Winner::Source,
            (_, "running") if over => return Winner::Destination,
            _ => {}
        }
        assert!(
            Instant::now() < until,
            "{what}: nobody runs: source {here}, destination {there}, {info}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn kill(pid: u32) {
    let status = Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    assert!(status.success(), "kill -9 {pid}: {status}");
}

#[test]
fn the_path_breaks_at_a_message() {
    let Some(mut work) = Work::new("cuts") else { return };
    let until_go = [
        ("hello", kind::HELLO),
        ("hello acknowledgement", kind::HELLO_ACK),
        ("preamble", kind::PREAMBLE),
        ("accept", kind::ACCEPT),
        ("round acknowledgement", kind::ROUND_ACK),
        ("section", kind::SECTION),
        ("end of state", kind::STATE_END),
        ("ready", kind::READY),
    ];
    for (i, (name, kind)) in until_go.into_iter().enumerate() {
        // One of the two each; every message has both in the session's own tests.
        let point = if i % 2 == 0 { Point::After(kind) } else { Point::Before(kind) };
        let what = format!("cut at {name}, {point:?}");
        assert_eq!(work.meet(&what, point, |_| Fault::Cut), Winner::Source, "{what}");
    }
    let from_go = [
        ("go", Point::Before(kind::GO)),
        ("go", Point::After(kind::GO)),
        ("running", Point::Before(kind::RUNNING)),
        ("running", Point::After(kind::RUNNING)),
        ("release", Point::Before(kind::RELEASE)),
        ("release", Point::After(kind::RELEASE)),
        ("released", Point::Before(kind::RELEASED)),
        ("released", Point::After(kind::RELEASED)),
    ];
    for (name, point) in from_go {
        // The source asks anew how it stands, and goes on.
        let what = format!("cut at {name}, {point:?}");
        assert_eq!(work.meet(&what, point, |_| Fault::Cut), Winner::Destination, "{what}");
    }
    for (name, point) in [("go", Point::After(kind::GO)), ("release", Point::Before(kind::RELEASE))]
    {
        let what = format!("path down for 3 s at {name}");
        let fault = |_| Fault::Down(Duration::from_secs(3));
        assert_eq!(work.meet(&what, point, fault), Winner::Destination, "{what}");
    }
    // A VM that came in by a migration is not ended by the failure of its own.
    let what = "cut at ready once more";
    assert_eq!(work.meet(what, Point::Before(kind::READY), |_| Fault::Cut), Winner::Source);
}

#[test]
fn a_side_dies_or_refuses() {
    let Some(mut work) = Work::new("deaths") else { return };
    let deaths = [
        ("in round 1", Point::Memory(4 << 20)),
        ("after ready", Point::Before(kind::READY)),
        ("before go", Point::Before(kind::GO)),
        ("after go", Point::Before(kind::RUNNING)),
    ];
    for (name, point) in deaths {
        let what = format!("the destination is killed {name}");
        let fault = |pid| Fault::Do(Box::new(move || kill(pid)));
        assert_eq!(work.meet(&what, point, fault), Winner::Source, "{what}");
    }
    refused(&mut work);
    abandoned(&mut work);
    // The end of this guest: its VMM crashes before the other may run it.
    let (mut to, address) = work.destination(|_| ());
    let at = work.bed.dir.join("last");
    let source = work.side.vm.pid();
    let fault = Fault::Do(Box::new(move || kill(source)));
    let proxy = Proxy::start(&at, &address, Some((Point::Memory(4 << 20), fault))).unwrap();
    // The answer may be lost with the source.
    let _ = work.side.vm.qmp.execute("migrate", json!({"uri": proxy.uri()}));
    let status = to.vm.wait_end(SETTLE).unwrap();
    assert!(proxy.fault_is_done());
    assert_ne!(status, 0, "a destination that lost its source ends with a failure");
    // A process that was killed closes its connections before it is gone.
    work.side.vm.wait_end(SETTLE).unwrap();
}

/// A destination that dies when it has run the guest, and before it may let its output out: nobody
/// runs, the source says so, and its operator lets the guest go on there.
fn abandoned(work: &mut Work) {
    let what = "the destination is killed after running";
    let (to, address) = work.destination(|_| ());
    let at = work.bed.dir.join("abandoned");
    let pid = to.vm.pid();
    let point = Point::Before(kind::RELEASE);
    let fault = Fault::Do(Box::new(move || kill(pid)));
    let proxy = Proxy::start(&at, &address, Some((point, fault))).unwrap();
    work.side.vm.qmp.execute("migrate", json!({"uri": proxy.uri()})).unwrap();
    let until = Instant::now() + SETTLE;
    let mut info = migration(&mut work.side.vm);
    while info["status"] != "failed" {
        assert!(Instant::now() < until, "{what}: {info}");
        std::thread::sleep(Duration::from_millis(20));
        info = migration(&mut work.side.vm);
    }
    assert!(proxy.fault_is_done(), "{what}");
    let why = info["error-desc"].as_str().unwrap_or_default();
    assert!(why.contains("runs nowhere") && why.contains("cont"), "{what}: {info}");
    assert_eq!(work.side.vm.status().unwrap(), "postmigrate", "{what}");
    work.side.vm.qmp.execute("cont", Value::Null).unwrap();
    work.go_on(Winner::Source, to, what);
}

/// A destination with other memory says no before any moves, and both sides say why.
fn refused(work: &mut Work) {
    let (mut to, address) = work.destination(|config| config.memory_mib = 192);
    let uri = format!("unix:{}", address.display());
    work.side.vm.qmp.execute("migrate", json!({"uri": uri})).unwrap();
    assert_eq!(settle(&mut work.side.vm, &mut to.vm, "refused"), Winner::Source);
    let info = migration(&mut work.side.vm);
    let why = info["error-desc"].as_str().unwrap_or_default().to_lowercase();
    assert!(why.contains("memory") || why.contains("ram"), "{info}");
    work.go_on(Winner::Source, to, "refused");
}
