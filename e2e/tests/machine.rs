//! A guest boots, works and ends.

use std::time::Duration;

use e2e::guest::control::Order;
use e2e::link::{Control, Stream};
use e2e::network;
use e2e::ping::Pinger;
use e2e::testbed::{BOOT, Bed, is_tern};
use serde_json::{Value, json};

#[test]
fn boots_serves_and_powers_off() {
    let Some(mut bed) = Bed::new("boots") else { return };
    let config = bed.working().unwrap();
    let (mut vm, _tap) = bed.start_on_network(&config).unwrap();
    vm.wait_ready(BOOT).unwrap();
    let mut guest = Control::connect(network::GUEST).unwrap();
    let stream = Stream::start(network::GUEST, 512).unwrap();
    let pinger = Pinger::start(network::GUEST, Duration::from_millis(20)).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    let pings = pinger.finish();
    let streamed = stream.finish();
    let status = guest.order(&Order::Verify).unwrap();
    assert!(pings.sent > 50 && pings.lost == 0 && pings.doubled == 0, "{pings:?}");
    assert!(streamed.received > 100_000 && streamed.bad == 0, "{streamed:?}");
    assert!(status.tcp_received > 100_000 && status.tcp_bad == 0, "{status:?}");
    assert!(status.disk_checked > 10 && status.disk_bad == 0, "{status:?}");
    assert!(status.mem_dirtied > 100 && status.mem_bad == 0, "{status:?}");
    // The guest is gone before it can answer: nobody waits for that.
    std::thread::spawn(move || guest.order(&Order::Poweroff));
    vm.qmp.wait_event("SHUTDOWN", Duration::from_secs(20)).unwrap();
    assert_eq!(vm.wait_end(Duration::from_secs(20)).unwrap(), 0);
}

#[test]
fn boots_with_four_cpus_and_no_devices() {
    let Some(mut bed) = Bed::new("four-cpus") else { return };
    let mut config = bed.config();
    config.cpus = 4;
    let mut vm = bed.start(&config).unwrap();
    vm.wait_ready(BOOT).unwrap();
    let cpus = vm.qmp.execute("query-cpus-fast", Value::Null).unwrap();
    assert_eq!(cpus.as_array().map(Vec::len), Some(4));
    assert_eq!(vm.quit().unwrap(), 0);
}

#[test]
fn restarts_on_reset() {
    let Some(mut bed) = Bed::new("reset") else { return };
    let config = bed.config();
    let mut vm = bed.start(&config).unwrap();
    vm.wait_ready(BOOT).unwrap();
    vm.qmp.execute("system_reset", Value::Null).unwrap();
    vm.qmp.wait_event("RESET", Duration::from_secs(10)).unwrap();
    let until = std::time::Instant::now() + BOOT;
    while vm.serial().matches("TERN-GUEST READY").count() < 2 {
        assert!(std::time::Instant::now() < until, "the guest does not come up again");
        std::thread::sleep(Duration::from_millis(50));
    }
    vm.quit().unwrap();
}

#[test]
fn stop_and_cont_pause_the_guest_only() {
    let Some(mut bed) = Bed::new("stop-cont") else { return };
    let config = bed.working().unwrap();
    let (mut vm, _tap) = bed.start_on_network(&config).unwrap();
    vm.wait_ready(BOOT).unwrap();
    let mut guest = Control::connect(network::GUEST).unwrap();
    guest.order(&Order::Status).unwrap();
    vm.qmp.execute("stop", Value::Null).unwrap();
    assert_eq!(vm.status().unwrap(), "paused");
    std::thread::sleep(Duration::from_millis(1500));
    vm.qmp.execute("cont", Value::Null).unwrap();
    assert_eq!(vm.status().unwrap(), "running");
    let status = guest.order(&Order::Verify).unwrap();
    assert_eq!((status.mem_bad, status.disk_bad), (0, 0));
    assert!(status.gap.since_query_ms < 1000.0, "the guest's clock jumped: {status:?}");
}

#[test]
fn a_second_writer_of_a_disk_is_refused() {
    let Some(mut bed) = Bed::new("second-writer") else { return };
    let mut config = bed.config();
    config.disk = Some(bed.disk("disk.raw", 16 << 20).unwrap());
    let _first = bed.start(&config).unwrap();
    let mut second = bed.config();
    second.disk = config.disk.clone();
    let error = bed.start(&second).err().expect("two writers of one disk").to_string();
    assert!(error.contains("lock"), "{error}");
}

#[test]
fn unknown_commands_and_wrong_arguments_are_told() {
    let Some(mut bed) = Bed::new("qmp-errors") else { return };
    let config = bed.config();
    let mut vm = bed.start(&config).unwrap();
    let error = vm.qmp.execute("no-such-command", Value::Null).unwrap_err().to_string();
    assert!(error.contains("CommandNotFound"), "{error}");
    let error = vm.qmp.execute("migrate", json!({"uri": 5})).unwrap_err().to_string();
    assert!(error.contains("GenericError"), "{error}");
    assert!(vm.is_running());
}

/// The test that fails here does so on purpose, on a thread of its own. Its guest restarts by a
/// triple fault, the hardest thing to see from the outside: whatever fails next must be explained.
#[test]
fn a_failed_test_tells_how_its_vmms_stood() {
    let name = "fails-on-purpose";
    let Some(logs) = std::env::var_os("TERN_E2E_LOGS").map(std::path::PathBuf::from) else {
        println!("skipped: TERN_E2E_LOGS does not say where logs are kept");
        return;
    };
    let logs = logs.join(name);
    let _ = std::fs::remove_dir_all(&logs);
    let failing = || {
        let Some(mut bed) = Bed::new(name) else { return };
        let mut config = bed.config();
        config.append = format!("reboot=t tern.ip={}/{}", network::GUEST, network::PREFIX);
        let (mut vm, _tap) = bed.start_on_network(&config).unwrap();
        vm.wait_ready(BOOT).unwrap();
        let mut guest = Control::connect(network::GUEST).unwrap();
        std::thread::spawn(move || guest.order(&Order::Reboot));
        vm.qmp.wait_event("RESET", Duration::from_secs(30)).unwrap();
        panic!("this failure is wanted: the test looks at what is told of it");
    };
    let failed = std::thread::scope(|s| s.spawn(failing).join().is_err());
    let Ok(told) = std::fs::read_to_string(logs.join("told.txt")) else {
        assert!(!failed, "nothing was told");
        return; // no guests here
    };
    for part in ["query-status", "\"status\":\"running\"", "TERN-GUEST READY"] {
        assert!(told.contains(part), "{part} in {told}");
    }
    if is_tern() {
        assert!(told.contains("TRIPLE FAULT"), "{told}");
    }
    let _ = std::fs::remove_dir_all(&logs);
}
