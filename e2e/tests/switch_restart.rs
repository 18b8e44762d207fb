//! Either side of the switch dies and comes back: the switch is killed in a loop under traffic, a guest
//! is killed and started again beside another's traffic.
//!
//! What a restart costs is printed: from the new process answering at its control socket to the first
//! frame that it forwards. It is judged where nothing of the front end's waits longer by design, by its
//! median: a single restart shows the machine's load.

use std::fs::File;
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use e2e::Result;
use e2e::ping::Pinger;
use e2e::switch::guest::{Card, Guest, boot};
use e2e::switch::{self, Listens, Switch, traffic};
use e2e::testbed::Bed;
use serde_json::Value;

/// QEMU may look for a switch that listens only once a second.
const RECONNECT: Duration = Duration::from_secs(30);
/// What a restart may cost a guest once the new process is up, in milliseconds.
const GAP: f64 = 50.0;
/// Frames of one burst: so many may come twice when the switch dies between giving them to the
/// receiver and giving them back to the sender.
const BURST: u64 = 32;
/// Descriptors of a ring of QEMU's.
const RING: u64 = 256;

/// Kills the switch so many times; it has to forward to `port` each time again. How long that took
/// from the new process being up, in milliseconds.
fn kill_in_a_loop(switch: &mut Switch, times: usize, port: &str) -> Vec<f64> {
    let forwards = |s: &Switch| Ok(s.stats(port)?.get("tx-frames") > 0);
    (0..times)
        .map(|_| {
            switch.wait("frames", RECONNECT, forwards).unwrap();
            std::thread::sleep(Duration::from_millis(300));
            switch.kill();
            std::thread::sleep(Duration::from_millis(50));
            switch.start_again().unwrap();
            let up = Instant::now();
            switch.wait("frames after a restart", RECONNECT, forwards).unwrap();
            up.elapsed().as_secs_f64() * 1e3
        })
        .collect()
}

/// Prints what restarts cost; the median.
fn report(what: &str, mut gaps: Vec<f64>) -> f64 {
    gaps.sort_by(f64::total_cmp);
    let (median, worst) = (gaps[gaps.len() / 2], gaps[gaps.len() - 1]);
    println!("{what}: {} restarts, median {median:.1} ms, worst {worst:.1} ms", gaps.len());
    median
}

/// Stops a process and lets it go on when this is dropped.
struct Frozen(u32);

impl Frozen {
    fn new(pid: u32) -> Self {
        signal("STOP", pid);
        Self(pid)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        signal("CONT", self.0);
    }
}

fn signal(name: &str, pid: u32) {
    let status = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status();
    assert!(status.unwrap().success());
}

/// A guest's command by which it knows another's address without asking.
fn know(card: &Card) -> String {
    format!("arp -i eth0 -s {} {}", card.ip(), card.mac())
}

/// And one by which it has to ask again.
fn forget(card: &Card) -> String {
    format!("arp -i eth0 -d {}", card.ip())
}

/// How many frames the switch can give a guest that takes none: the descriptors of its ring.
fn room_to_receive(switch: &Switch, from: &mut Guest, to: &mut Guest) -> u64 {
    let ip = to.card.ip();
    from.run(&know(&to.card)).unwrap();
    // An interface that comes up fills its ring; what comes in afterwards is not made up for until
    // half of it is empty, so counting begins before.
    std::thread::sleep(Duration::from_millis(200));
    to.run("ip link set eth0 down").unwrap();
    let before = switch.stats(&to.card.port).unwrap();
    to.run("ip link set eth0 up").unwrap();
    let frozen = Frozen::new(to.vmm.pid());
    let burst = format!("flow udp-send --to {ip}:9 --seed 0 --count {}", 2 * RING);
    from.run(&burst).unwrap();
    let full =
        |s: &Switch| Ok(s.stats(&to.card.port)?.drops("no-buffers") > before.drops("no-buffers"));
    switch.wait("a full ring", Duration::from_secs(10), full).unwrap();
    let after = switch.stats(&to.card.port).unwrap();
    drop(frozen);
    after.get("tx-frames") - before.get("tx-frames")
}

/// How many frames a guest can give a switch that takes none. The card's own counter is no help: its
/// driver counts a frame when it gets its descriptor back.
fn room_to_send(switch: &Switch, from: &mut Guest, to: &Card) -> u64 {
    const TRACING: &str = "/sys/kernel/tracing";
    const EVENT: &str = "events/net/net_dev_xmit/enable";
    from.run(&format!(
        "mountpoint -q {TRACING} || mount -t tracefs none {TRACING}; \
         echo 1 > {TRACING}/{EVENT}"
    ))
    .unwrap();
    let given = |guest: &mut Guest| -> u64 {
        let count = format!("grep -c 'net_dev_xmit: dev=eth0.* rc=0' {TRACING}/trace || true");
        guest.run(&count).unwrap().trim().parse().unwrap()
    };
    from.run(&know(to)).unwrap();
    let frozen = Frozen::new(switch.pid());
    from.run(&format!("echo > {TRACING}/trace")).unwrap();
    from.spawn("burst", &format!("flow udp-send --to {}:9 --seed 0 --count {}", to.ip(), 2 * RING))
        .unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    let mut count = 0;
    // Until it gets no more off.
    let mut looks_alike = 0;
    while looks_alike < 3 {
        std::thread::sleep(Duration::from_millis(300));
        let now = given(from);
        looks_alike = if now == count && now > 0 { looks_alike + 1 } else { 0 };
        count = now;
        assert!(Instant::now() < until, "the guest still sends, {count} so far");
    }
    drop(frozen);
    from.finish("burst", Duration::from_secs(10)).unwrap();
    from.run(&format!("echo 0 > {TRACING}/{EVENT}; {}", forget(to))).unwrap();
    count
}

/// No driver has complained and the card is up.
fn check_health(guest: &mut Guest) {
    let log = guest.run("dmesg").unwrap();
    for trouble in ["is not a head", "WATCHDOG", "Call Trace", "BUG:", "virtio_net virtio0:"] {
        assert!(!log.contains(trouble), "{trouble}: {log}");
    }
    let link = guest.run("ip link show eth0").unwrap();
    assert!(link.contains(",UP,LOWER_UP"), "{link}");
}

fn rate(server: &mut Guest, client: &mut Guest) -> Result<f64> {
    server.wait_listening(5201)?;
    let report = client.run_json(&format!("iperf3 -J -t 2 -c {}", server.card.ip()))?;
    let rate = report.pointer("/end/sum_received/bits_per_second").and_then(Value::as_f64);
    Ok(rate.unwrap_or(0.0) / 1e9)
}

/// What a test of guests under a dying switch wants.
#[derive(Default)]
struct Wanted {
    /// Properties of the guests' cards.
    more: &'static str,
    /// Under the newest QEMU that there is.
    newest: bool,
    /// How often the switch dies.
    times: usize,
    /// Whether the median of what that costs has to stay below [`GAP`].
    in_time: bool,
}

fn guests_survive(name: &str, listens: Listens, wanted: &Wanted) {
    let Wanted { more, newest, times, in_time } = *wanted;
    let Some(mut bed) = switch::bed(name) else { return };
    let ports = ["p1", "p2"].map(|p| switch::port(&bed, p, listens, ""));
    let mut switch = Switch::start(&bed, &ports).unwrap();
    let card =
        |port: &str, number| Card { more: more.into(), newest, ..Card::new(port, listens, number) };
    let mut guests = boot(&mut bed, &[card("p1", 1), card("p2", 2)]).unwrap();
    guests.iter_mut().for_each(|g| g.configure().unwrap());
    let [a, b] = &mut guests[..] else { unreachable!("two were booted") };
    b.serve("iperf3", "iperf3 -s", 5201).unwrap();
    let rate_before = rate(b, a).unwrap();
    let rooms = |switch: &Switch, a: &mut Guest, b: &mut Guest| {
        let receive = [room_to_receive(switch, a, b), room_to_receive(switch, b, a)];
        [receive, [room_to_send(switch, a, &b.card), room_to_send(switch, b, &a.card)]]
    };
    let before = rooms(&switch, a, b);
    assert_eq!(before[0], [RING; 2]);

    traffic::start_streams(a, b, 2048).unwrap();
    b.spawn("datagrams", "flow udp-receive --port 7802 --seed 5 --idle 5000").unwrap();
    a.run("rm -f /tmp/enough").unwrap();
    let send = "--seed 5 --size 800 --pps 1000 --count 1000000 --until /tmp/enough";
    a.spawn("sender", &format!("flow udp-send --to {}:7802 {send}", b.card.ip())).unwrap();
    let gaps = kill_in_a_loop(&mut switch, times, "p2");
    a.run("touch /tmp/enough").unwrap();
    let bytes = traffic::end_streams(a, b).unwrap();
    let sent = a.finish_json("sender", Duration::from_secs(10)).unwrap();
    let seen = b.finish_json("datagrams", Duration::from_secs(20)).unwrap();
    let median = report(name, gaps);
    assert!(!in_time || median < GAP, "{median} ms from the new process to the first frame");
    println!("streams {bytes:?} bytes; datagrams {sent} {seen}");
    assert_eq!(seen["bad"], 0, "{seen}");
    assert!(seen["doubled"].as_u64().unwrap() <= BURST * times as u64, "{seen}");

    check_health(a);
    check_health(b);
    let after = rooms(&switch, a, b);
    assert_eq!(after, before, "descriptors of the rings: receive of both, send of both");
    println!("iperf3 before {rate_before:.2} Gbit/s, after {:.2}", rate(b, a).unwrap());
    for port in ["p1", "p2"] {
        assert_eq!(switch.stats(port).unwrap().get("resets"), 0);
    }
}

/// Without a link status QEMU cannot tell its guest that nobody is at the other end: the guest forgets
/// nothing and goes on at once.
#[test]
fn guests_survive_a_switch_that_dies_ten_times_where_qemu_listens() {
    let wanted = Wanted { more: ",status=off", times: 10, in_time: true, ..Wanted::default() };
    guests_survive("switch-killed-client", Listens::Peer, &wanted);
}

/// With it, the guest's link goes down and comes up again, and it has to ask for its peers' addresses.
#[test]
fn guests_whose_links_go_down_survive_a_switch_that_dies() {
    let wanted = Wanted { times: 3, ..Wanted::default() };
    guests_survive("switch-killed-links", Listens::Peer, &wanted);
}

/// QEMU of Debian's stable release looks for the switch once a second.
#[test]
fn guests_survive_a_switch_that_dies_where_the_switch_listens() {
    let wanted = Wanted { more: ",status=off", times: 3, ..Wanted::default() };
    guests_survive("switch-killed-server", Listens::Switch, &wanted);
}

/// The newest one looks every 10 ms.
#[test]
fn guests_of_the_newest_qemu_survive_a_switch_that_dies_ten_times_where_the_switch_listens() {
    if std::env::var_os("TERN_NEWEST_QEMU").is_none() {
        println!("skipped: the newest QEMU is not here (cargo xtask test fetches it)");
        return;
    }
    let wanted = Wanted { more: ",status=off", newest: true, times: 10, in_time: true };
    guests_survive("switch-killed-server-ms", Listens::Switch, &wanted);
}

#[test]
fn a_guest_dies_and_comes_back_beside_the_traffic_of_others() {
    let Some(mut bed) = switch::bed("switch-guest-killed") else { return };
    let listens = Listens::Switch;
    let ports = ["p1", "p2"].map(|p| switch::port(&bed, p, listens, ""));
    let switch =
        Switch::start(&bed, &[&ports[..], &["up,type=tap,ifname=swtap1".into()]].concat()).unwrap();
    let status = Command::new("sh")
        .args(["-c", "ip addr add 10.78.0.200/24 dev swtap1 && ip link set swtap1 up"])
        .status();
    assert!(status.unwrap().success());
    let [steady, other] = [Card::new("p1", listens, 1), Card::new("p2", listens, 2)];
    let mut guests = boot(&mut bed, &[steady.clone(), other.clone()]).unwrap();
    guests.iter_mut().for_each(|g| g.configure().unwrap());
    let reach = format!("/usr/bin/ping -i 0.2 -c 5 -W 5 {}", steady.ip());
    guests[1].run(&reach).unwrap();

    let pinger = Pinger::start(steady.ip().parse().unwrap(), Duration::from_millis(5)).unwrap();
    let before = switch.stats("p1").unwrap();
    for _ in 0..2 {
        // Dropping it kills it, in the middle of a stream.
        let mut killed = guests.pop().unwrap();
        killed.spawn("stream", &format!("ping -A -q {}", steady.ip())).unwrap();
        std::thread::sleep(Duration::from_millis(500));
        drop(killed);
        guests.extend(boot(&mut bed, std::slice::from_ref(&other)).unwrap());
        guests[1].configure().unwrap();
        guests[1].run(&reach).unwrap();
    }
    let sum = pinger.finish();
    println!("beside it: {sum:?}");
    assert!(sum.sent > 500 && sum.lost == 0 && sum.doubled == 0, "{sum:?}");
    let after = switch.stats("p1").unwrap();
    for count in ["tx-dropped", "resets"] {
        assert_eq!(after.get(count), before.get(count), "{after}");
    }
    check_health(&mut guests[0]);
}

/// DPDK's testpmd with two ports at the switch, which sends flows out of each.
struct Testpmd {
    child: Child,
}

impl Testpmd {
    /// `None`, with a word, where it is not installed.
    fn start(bed: &Bed, ports: [&str; 2], packed: bool) -> Option<Self> {
        let log = bed.dir.join("testpmd.log");
        let log = File::create(&log).unwrap();
        let nic = |i: usize| {
            let path = switch::socket(bed, ports[i]);
            let packed = u8::from(packed);
            let path = path.display();
            format!("net_virtio_user{i},path={path},server=1,queue_size=256,packed_vq={packed}")
        };
        let prefix = format!("tern-restart-{}", std::process::id());
        let mut command = Command::new("dpdk-testpmd");
        command
            .args(["--lcores", "0@0,1@0", "--no-huge", "-m", "256", "--no-pci"])
            .args(["--file-prefix", &prefix, "--vdev", &nic(0), "--vdev", &nic(1)])
            .args(["--", "-i", "--nb-cores=1", "--total-num-mbufs=8192", "--forward-mode=flowgen"])
            .args(["--eth-peer=0,02:00:00:00:00:02", "--eth-peer=1,02:00:00:00:00:01"])
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        match command.spawn() {
            Ok(child) => Some(Self { child }),
            Err(_) => {
                println!("skipped: dpdk-testpmd is not installed (Debian package dpdk-dev)");
                None
            }
        }
    }

    fn tell(&mut self, command: &str) {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(format!("{command}\n").as_bytes()).unwrap();
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The switch takes and gives frames at both ports, which run.
fn both_ways(switch: &Switch) -> Result<bool> {
    let mut all = true;
    for port in ["p1", "p2"] {
        let counted = switch.stats(port)?;
        all &= counted.get("tx-frames") > 1000 && counted.get("rx-frames") > 1000;
    }
    Ok(all)
}

fn testpmd_survives(name: &str, packed: bool) {
    let Some(bed) = switch::bed(name) else { return };
    let ports = ["p1", "p2"].map(|p| switch::port(&bed, p, Listens::Peer, ""));
    let mut switch = Switch::start(&bed, &ports).unwrap();
    let Some(mut testpmd) = Testpmd::start(&bed, ["p1", "p2"], packed) else { return };
    let up = |s: &Switch| {
        let shown = s.ask("show", Value::Null)?;
        let ports = shown["ports"].as_array().cloned().unwrap_or_default();
        Ok(ports.iter().all(|p| p["rings"]["receive"] == 1 && p["rings"]["transmit"] == 1))
    };
    switch.wait("testpmd's rings", Duration::from_secs(60), up).unwrap();
    testpmd.tell("start");
    switch.wait("traffic", Duration::from_secs(20), both_ways).unwrap();
    let gaps = kill_in_a_loop(&mut switch, 10, "p2");
    report(name, gaps);
    switch.wait("traffic both ways afterwards", Duration::from_secs(20), both_ways).unwrap();
    assert!(testpmd.child.try_wait().unwrap().is_none(), "testpmd has ended");
    for port in ["p1", "p2"] {
        let counted = switch.stats(port).unwrap();
        assert_eq!(counted.get("resets"), 0, "{counted}");
    }
}

#[test]
fn testpmd_survives_a_switch_that_dies_ten_times() {
    testpmd_survives("switch-killed-testpmd", false);
}

/// No index in a packed ring tells where it stood, and virtio-user has no in-flight table: it starts
/// its packed rings over when its back end is there again.
#[test]
fn testpmd_with_packed_rings_survives_a_switch_that_dies_ten_times() {
    testpmd_survives("switch-killed-testpmd-packed", true);
}
