//! One guest that works hard and moves again and again. Only when asked for:
//! `cargo xtask test --e2e -- --ignored soak`; TERN_SOAK is how often it moves.

use e2e::guest::control::Order;
use e2e::link::{Control, Stream};
use e2e::migration::migrate;
use e2e::network;
use e2e::testbed::{BOOT, Bed};
use e2e::vmm::Config;

#[test]
#[ignore = "takes minutes"]
fn soak() {
    let Some(mut bed) = Bed::new("soak") else { return };
    let times = std::env::var("TERN_SOAK").ok().and_then(|n| n.parse().ok()).unwrap_or(18);
    let mut config = bed.working().unwrap();
    config.cpus = 2;
    config.append =
        config.append.replace("tern.rate=500", "tern.rate=3000").replace("tcp=512", "tcp=2048");
    let (mut vm, mut tap) = bed.start_on_network(&config).unwrap();
    vm.wait_ready(BOOT).unwrap();
    let mut guest = Control::connect(network::GUEST).unwrap();
    let stream = Stream::start(network::GUEST, 2048).unwrap();
    let mut uptime = 0.0;
    for turn in 1..=times {
        let uri = format!("{}-{turn}", bed.uri());
        let to = Config { name: bed.config().name, incoming: Some(uri.clone()), ..config.clone() };
        let (mut to, to_tap) = bed.start_on_network(&to).unwrap();
        let report = migrate(&mut vm, &mut to, &uri)
            .unwrap_or_else(|e| panic!("turn {turn}: {e}; {}", vm.serial()));
        (vm, tap) = (to, {
            drop(tap);
            to_tap
        });
        let status = guest.order(&Order::Verify).unwrap_or_else(|e| panic!("turn {turn}: {e}"));
        let said = std::fs::read_to_string(vm.dir.join("stderr.log")).unwrap_or_default();
        println!(
            "turn {turn}: total {:.0} ms, downtime {:.1} ms, rounds {}, pages {}, blocks {}, tcp {} {said}",
            report.total_ms,
            report.downtime_ms,
            report.rounds.len(),
            status.mem_dirtied,
            status.disk_checked,
            status.tcp_received,
        );
        assert_eq!((status.mem_bad, status.disk_bad, status.tcp_bad), (0, 0, 0), "turn {turn}");
        assert!(status.uptime_ms > uptime, "turn {turn}: the guest has started anew");
        uptime = status.uptime_ms;
        assert!(stream.is_alive() && stream.sum().bad == 0, "turn {turn}");
        // An oops or a restart shows here.
        assert!(vm.serial().is_empty(), "turn {turn}: the guest said {}", vm.serial());
    }
    assert_eq!(stream.finish().bad, 0);
    drop((vm, tap));
}
