//! Live migration of working guests, and what happens when it fails.

use std::path::Path;
use std::time::{Duration, Instant};

use e2e::guest::control::{Order, Status};
use e2e::link::{Control, Stream};
use e2e::migration::migrate;
use e2e::network::{self, Tap};
use e2e::ping::Pinger;
use e2e::testbed::{BOOT, Bed, is_tern};
use e2e::vmm::{Config, Vmm};
use serde_json::{Value, json};

/// A guest at work, and connections to it.
struct Working {
    vm: Vmm,
    /// Goes away after the VMM.
    _tap: Tap,
    config: Config,
    guest: Control,
    stream: Stream,
}

fn working(bed: &mut Bed) -> Working {
    working_with(bed, "")
}

/// With more words for the guest's kernel.
fn working_with(bed: &mut Bed, words: &str) -> Working {
    let mut config = bed.working().unwrap();
    config.append += words;
    let (mut vm, tap) = bed.start_on_network(&config).unwrap();
    vm.wait_ready(BOOT).unwrap();
    let guest = Control::connect(network::GUEST).unwrap();
    let stream = Stream::start(network::GUEST, 512).unwrap();
    Working { vm, _tap: tap, config, guest, stream }
}

/// A second VMM of the same configuration that waits for a migration at `uri`.
fn destination(bed: &mut Bed, source: &Config, uri: &str) -> (Vmm, Tap) {
    let config =
        Config { name: bed.config().name, incoming: Some(uri.to_owned()), ..source.clone() };
    bed.start_on_network(&config).unwrap()
}

fn assert_good(status: &Status) {
    assert_eq!((status.mem_bad, status.disk_bad, status.tcp_bad), (0, 0, 0), "{status:?}");
    assert!(status.mem_dirtied > 0 && status.disk_checked > 0, "{status:?}");
}

/// The guest is at work: its counters grow.
fn assert_at_work(guest: &mut Control) {
    let before = guest.order(&Order::Status).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let after = guest.order(&Order::Verify).unwrap();
    assert_good(&after);
    assert!(after.mem_dirtied > before.mem_dirtied && after.disk_written > before.disk_written);
}

fn migrate_once(name: &str, words: &str, uri: impl Fn(&Bed) -> String) {
    let Some(mut bed) = Bed::new(name) else { return };
    let mut work = working_with(&mut bed, words);
    let uri = uri(&bed);
    let (mut to, _tap) = destination(&mut bed, &work.config, &uri);
    assert_eq!(to.status().unwrap(), "inmigrate");
    let before = work.guest.order(&Order::Status).unwrap();
    let pinger = Pinger::start(network::GUEST, Duration::from_millis(10)).unwrap();
    let report = migrate(&mut work.vm, &mut to, &uri).unwrap();
    assert_eq!(to.status().unwrap(), "running");
    assert_eq!(work.vm.status().unwrap(), "postmigrate");
    let after = work.guest.order(&Order::Verify).unwrap();
    assert_good(&after);
    assert!(after.uptime_ms > before.uptime_ms && after.uptime_ms < before.uptime_ms + 60_000.0);
    assert_at_work(&mut work.guest);
    let pings = pinger.finish();
    assert!(pings.sent > 50, "{pings:?}");
    if is_tern() {
        assert_eq!((pings.lost, pings.doubled), (0, 0), "{pings:?}");
    }
    assert!(work.stream.is_alive());
    assert_eq!(work.stream.finish().bad, 0);
    assert!(report.total_ms > 0.0 && !report.rounds.is_empty(), "{report:?}");
    if is_tern() {
        assert!(!report.phases.is_empty(), "downtime by phase is not told");
        assert!(report.vmm_blackout_ms.is_some(), "blackout is not told");
    }
    work.vm.quit().unwrap();
}

#[test]
fn over_a_unix_socket() {
    migrate_once("unix", "", Bed::uri);
}

/// And with devices that interrupt by lines, whose levels move too.
#[test]
fn over_tcp_without_msi() {
    migrate_once("tcp", " pci=nomsi", |_| "tcp:127.0.0.1:4477".to_owned());
}

#[test]
fn the_source_goes_on_when_the_destination_dies() {
    let Some(mut bed) = Bed::new("destination-dies") else { return };
    let mut work = working(&mut bed);
    let uri = bed.uri();
    let (mut to, _tap) = destination(&mut bed, &work.config, &uri);
    // Slow enough that it is caught in the middle.
    work.vm.qmp.execute("migrate-set-parameters", json!({"max-bandwidth": 8 << 20})).unwrap();
    work.vm.qmp.execute("migrate", json!({"uri": uri})).unwrap();
    std::thread::sleep(Duration::from_millis(800));
    to.kill();
    let info = wait_status(&mut work.vm, "failed");
    assert_eq!(work.vm.status().unwrap(), "running", "{info}");
    assert_at_work(&mut work.guest);
    assert!(work.stream.is_alive());
}

/// Waits until query-migrate says `status`.
fn wait_status(vm: &mut Vmm, status: &str) -> Value {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let info = vm.qmp.execute("query-migrate", Value::Null).unwrap();
        if info["status"] == status {
            return info;
        }
        assert!(Instant::now() < until, "the migration is not {status}: {info}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn cancel_leaves_the_source_running_and_a_second_try_succeeds() {
    let Some(mut bed) = Bed::new("cancel") else { return };
    let mut work = working(&mut bed);
    let uri = bed.uri();
    let (to, tap) = destination(&mut bed, &work.config, &uri);
    work.vm.qmp.execute("migrate-set-parameters", json!({"max-bandwidth": 8 << 20})).unwrap();
    work.vm.qmp.execute("migrate", json!({"uri": uri})).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    work.vm.qmp.execute("migrate_cancel", Value::Null).unwrap();
    wait_status(&mut work.vm, "cancelled");
    assert_eq!(work.vm.status().unwrap(), "running");
    assert_at_work(&mut work.guest);
    drop((to, tap));
    let uri = bed.uri() + "b";
    let (mut to, _tap) = destination(&mut bed, &work.config, &uri);
    work.vm.qmp.execute("migrate-set-parameters", json!({"max-bandwidth": 1u64 << 30})).unwrap();
    migrate(&mut work.vm, &mut to, &uri).unwrap();
    assert_at_work(&mut work.guest);
}

#[test]
fn a_different_destination_is_refused_and_the_source_goes_on() {
    let Some(mut bed) = Bed::new("different") else { return };
    let mut work = working(&mut bed);
    let uri = bed.uri();
    let other = Config { memory_mib: 320, ..work.config.clone() };
    let (_to, _tap) = destination(&mut bed, &other, &uri);
    work.vm.qmp.execute("migrate", json!({"uri": uri})).unwrap();
    let info = wait_status(&mut work.vm, "failed");
    if is_tern() {
        let why = info["error-desc"].as_str().unwrap_or_default();
        assert!(why.contains("memory") || why.contains("RAM"), "{info}");
    }
    assert_eq!(work.vm.status().unwrap(), "running");
    assert_at_work(&mut work.guest);
}

#[test]
fn nobody_listens() {
    let Some(mut bed) = Bed::new("nobody") else { return };
    let config = bed.config();
    let mut vm = bed.start(&config).unwrap();
    let missing = Path::new("/nonexistent/socket");
    let answer = vm.qmp.execute("migrate", json!({"uri": format!("unix:{}", missing.display())}));
    // QEMU tells it in one of two places.
    if answer.is_ok() {
        wait_status(&mut vm, "failed");
    }
    assert_eq!(vm.status().unwrap(), "running");
}

/// A guest that came by a migration restarts, by itself and by the monitor, and works again: what
/// a reset goes back to is what the destination made, for it never ran the guest's first boot.
#[test]
fn a_guest_that_was_migrated_reboots() {
    let Some(mut bed) = Bed::new("reboot-after") else { return };
    let mut work = working(&mut bed);
    let uri = bed.uri();
    let (mut to, _tap) = destination(&mut bed, &work.config, &uri);
    migrate(&mut work.vm, &mut to, &uri).unwrap();
    assert_at_work(&mut work.guest);
    drop(work.stream);
    let mut guest = work.guest;
    for (boots, by_guest) in [(1, true), (2, false)] {
        if by_guest {
            // It may be gone before it answers.
            std::thread::spawn(move || guest.order(&Order::Reboot));
        } else {
            to.qmp.execute("system_reset", Value::Null).unwrap();
        }
        let reset = to.qmp.wait_event("RESET", Duration::from_secs(30)).unwrap();
        assert_eq!(reset.data["guest"], by_guest, "{reset:?}");
        let until = Instant::now() + BOOT;
        // The serial line of the destination begins with the guest's arrival.
        while to.serial().matches("TERN-GUEST READY {").count() < boots {
            to.check().unwrap();
            assert!(Instant::now() < until, "boot {boots}: {}", to.serial());
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(to.status().unwrap(), "running");
        guest = Control::connect(network::GUEST).unwrap();
        assert_at_work(&mut guest);
        to.qmp.forget_events();
    }
    assert_eq!(work.vm.status().unwrap(), "postmigrate");
}
