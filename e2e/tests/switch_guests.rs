//! Two guests at the switch, and one and the host: DHCP, ping, streams with and without checked
//! content, large segments, jumbo frames, VLANs.

use std::process::Command;
use std::time::Duration;

use e2e::switch::guest::{Card, Guest, boot};
use e2e::switch::{self, Counted, Listens, Switch};
use e2e::testbed::Bed;
use serde_json::{Value, json};

/// What an Ethernet frame is at most without jumbo frames: anything longer is a large segment.
const ETHERNET: u64 = 1514;
/// Not busybox's, which cannot forbid fragments.
const PING: &str = "/usr/bin/ping";
/// Most that iperf3 or a stream may take.
const PATIENCE: Duration = Duration::from_secs(40);

/// Five pings, all of which have to be answered.
fn ping(from: &mut Guest, options: &str, to: &str) {
    let said = from.run(&format!("{PING} -i 0.2 -c 5 -W 5 {options} {to}")).unwrap();
    assert!(said.contains(" 0% packet loss"), "{said}");
}

/// Whether anything answers.
fn is_reached(from: &mut Guest, to: &str) -> bool {
    from.try_run(&format!("{PING} -i 0.2 -c 3 -W 1 {to}")).unwrap().status == 0
}

fn gigabits(report: &Value) -> f64 {
    report.pointer("/end/sum_received/bits_per_second").and_then(Value::as_f64).unwrap_or(0.0) / 1e9
}

/// A guest's offloads are on.
fn check_offloads(guest: &mut Guest) {
    let features = guest.run("ethtool -k eth0").unwrap();
    for feature in ["tx-checksumming", "tcp-segmentation-offload", "rx-checksumming"] {
        assert!(features.contains(&format!("{feature}: on")), "{features}");
    }
}

/// Runs iperf3, whose data comes into the switch from port `from` in large segments, none of which is
/// cut for port `to`.
fn whole_segments(switch: &Switch, from: &str, to: &str, iperf3: impl FnOnce() -> Value) {
    let count = || (switch.stats(from).unwrap(), switch.stats(to).unwrap());
    let (before, before_to) = count();
    let report = iperf3();
    let (after, after_to) = count();
    let mean = after.mean_length_since(&before);
    println!("iperf3 {from} -> {to}: {:.2} Gbit/s, frames of {mean} B", gigabits(&report));
    assert!(gigabits(&report) > 0.05, "{report:#}");
    assert!(mean > 2 * ETHERNET, "frames of {mean} B only: {after}");
    let cut = |c: &Counted| c.get("segmented") + c.get("checksummed");
    assert_eq!(cut(&after_to), cut(&before_to), "{after_to}");
}

/// A stream with checked content from one guest to another.
fn stream_checked(from: &mut Guest, to: &mut Guest, address: &str, bytes: u64) {
    to.serve("sink", "flow tcp-receive --port 7801 --seed 41", 7801).unwrap();
    let command = format!("flow tcp-send --to {address}:7801 --seed 41 --bytes {bytes}");
    let sent = from.run_json(&command).unwrap();
    let got = to.finish_json("sink", PATIENCE).unwrap();
    assert_eq!((&got["bad"], &got["received"]), (&json!(0), &sent["sent"]), "{sent} {got}");
    assert!(sent["sent"].as_u64().unwrap() >= bytes && sent["sent"] == sent["confirmed"], "{sent}");
}

fn two_guests(name: &str, listens: Listens) {
    let Some(mut bed) = switch::bed(name) else { return };
    let ports = ["p1", "p2"].map(|p| switch::port(&bed, p, listens, ""));
    let switch = Switch::start(&bed, &ports).unwrap();
    let (one, two) = (Card::new("p1", listens, 1), Card::new("p2", listens, 2));
    let mut guests = boot(&mut bed, &[one.clone(), two]).unwrap();
    let [a, b] = &mut guests[..] else { unreachable!("two were booted") };
    a.configure().unwrap();
    lease(a, b);
    ping(b, "", &one.ip());

    check_offloads(a);
    check_offloads(b);
    a.serve("iperf3", "iperf3 -s", 5201).unwrap();
    for (way, from, to) in [("", "p2", "p1"), ("-R", "p1", "p2")] {
        // The server does not listen for a moment after each test.
        a.wait_listening(5201).unwrap();
        let command = format!("iperf3 -J -t 2 -c {} {way}", one.ip());
        whole_segments(&switch, from, to, || b.run_json(&command).unwrap());
    }
    stream_checked(a, b, "10.78.0.100", 24 << 20);
    stream_checked(b, a, &one.ip(), 24 << 20);

    jumbo_frames(&switch, a, b);
    for port in ["p1", "p2"] {
        let counted = switch.stats(port).unwrap();
        assert_eq!(counted.get("resets"), 0, "{counted}");
        // A guest that has not set its card up yet gives no buffers: nothing else may be lost.
        let lost = counted.get("rx-dropped") - counted.drops("no-destination");
        assert_eq!(lost - counted.drops("port-down"), 0, "{counted}");
    }
}

/// DHCP: `client` gets its address from a server in `server`.
fn lease(server: &mut Guest, client: &mut Guest) {
    server
        .run(
            "printf 'start 10.78.0.100\nend 10.78.0.100\ninterface eth0\noption subnet 255.255.255.0\n\
             lease_file /tmp/leases\npidfile /tmp/pid\n' > /tmp/udhcpd.conf; touch /tmp/leases; \
             udhcpd /tmp/udhcpd.conf",
        )
        .unwrap();
    client
        .run(
            "printf '#!/bin/sh\n[ $1 = bound ] && ip addr add $ip/24 dev $interface; exit 0\n' \
             > /tmp/lease; chmod +x /tmp/lease; ip link set eth0 up; \
             udhcpc -i eth0 -n -q -t 10 -T 1 -s /tmp/lease",
        )
        .unwrap();
    let addresses = client.run("ip addr show eth0").unwrap();
    assert!(addresses.contains("inet 10.78.0.100/24"), "{addresses}");
}

/// Frames of 9,000 bytes arrive whole, and only between guests that both take them.
fn jumbo_frames(switch: &Switch, a: &mut Guest, b: &mut Guest) {
    let to = a.card.ip();
    let large = "-M do -s 8900";
    let refused = b.try_run(&format!("{PING} -c 1 -W 1 {large} {to}")).unwrap();
    assert!(refused.status != 0 && refused.output.contains("too long"), "{}", refused.output);
    for guest in [&mut *a, &mut *b] {
        guest.run("ip link set eth0 mtu 9000").unwrap();
    }
    let before = switch.stats("p2").unwrap();
    ping(b, large, &to);
    let after = switch.stats("p2").unwrap();
    let bytes = after.get("rx-bytes") - before.get("rx-bytes");
    assert!(bytes >= 5 * 8942, "{after}");
    // Without the guests' help each frame is a jumbo frame of its own.
    for guest in [&mut *a, &mut *b] {
        guest.run("ethtool -K eth0 tso off gso off gro off").unwrap();
    }
    let before = switch.stats("p1").unwrap();
    stream_checked(a, b, "10.78.0.100", 16 << 20);
    let mean = switch.stats("p1").unwrap().mean_length_since(&before);
    assert!(mean > 4000 && mean <= 9014, "frames of {mean} B");
}

#[test]
fn two_guests_where_the_switch_listens() {
    two_guests("switch-server", Listens::Switch);
}

#[test]
fn two_guests_where_qemu_listens() {
    two_guests("switch-client", Listens::Peer);
}

#[test]
fn vlans_keep_guests_apart() {
    let Some(mut bed) = switch::bed("switch-vlans") else { return };
    let listens = Listens::Switch;
    let ports = [("p1", ",vlan=10"), ("p2", ",vlan=20")];
    let ports = ports.map(|(name, vlan)| switch::port(&bed, name, listens, vlan));
    let switch = Switch::start(&bed, &ports).unwrap();
    let cards = [Card::new("p1", listens, 1), Card::new("p2", listens, 2)];
    let mut guests = boot(&mut bed, &cards).unwrap();
    guests.iter_mut().for_each(|g| g.configure().unwrap());
    let [a, b] = &mut guests[..] else { unreachable!("two were booted") };
    let to = cards[1].ip();
    assert!(!is_reached(a, &to));
    let counted = switch.stats("p1").unwrap();
    assert!(counted.drops("no-destination") > 0, "{counted}");
    assert_eq!(switch.stats("p2").unwrap().get("tx-frames"), 0);

    let set = |port: &str, change: &[&str]| {
        switch.ask("set-port", json!({ "name": port, "set": change })).unwrap();
    };
    set("p2", &["vlan=10"]);
    ping(a, "", &to);

    // A guest that tags its frames itself, on a trunk.
    set("p2", &["vlan=", "trunk=10+30"]);
    b.run(&format!(
        "ip addr flush dev eth0; ip link add link eth0 name v10 type vlan id 10; \
         ip addr add {to}/24 dev v10; ip link set v10 up"
    ))
    .unwrap();
    ping(a, "", &to);
    stream_checked(a, b, &to, 16 << 20);
    let back = cards[0].ip();
    stream_checked(b, a, &back, 16 << 20);
    set("p1", &["vlan=30"]);
    assert!(!is_reached(a, &to));
}

/// A program on the host, in the test's network namespace, that has to succeed.
fn host(command: &str) -> String {
    let out = Command::new("sh").args(["-c", command]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{command}: {said}{}", String::from_utf8_lossy(&out.stderr));
    said
}

#[test]
fn a_guest_and_the_host_over_a_tap() {
    let Some(mut bed) = switch::bed("switch-tap") else { return };
    let listens = Listens::Switch;
    let ports = [switch::port(&bed, "p1", listens, ""), "up,type=tap,ifname=swtap0".into()];
    let switch = Switch::start(&bed, &ports).unwrap();
    host("ip addr add 10.78.0.200/24 dev swtap0 && ip link set swtap0 up");
    let card = Card::new("p1", listens, 1);
    let mut guests = boot(&mut bed, std::slice::from_ref(&card)).unwrap();
    let guest = &mut guests[0];
    guest.configure().unwrap();
    check_offloads(guest);
    let said = host(&format!("ping -i 0.2 -c 5 -W 5 {}", card.ip()));
    assert!(said.contains(" 0% packet loss"), "{said}");
    ping(guest, "", "10.78.0.200");

    guest.serve("iperf3", "iperf3 -s", 5201).unwrap();
    for (way, from, to) in [("", "up", "p1"), ("-R", "p1", "up")] {
        guest.wait_listening(5201).unwrap();
        let command = format!("iperf3 -J -t 2 -c {} {way}", card.ip());
        whole_segments(&switch, from, to, || serde_json::from_str(&host(&command)).unwrap());
    }
    files_both_ways(&bed, guest);
}

/// Files, compared by programs that are not this project's: one to the guest, and it back again.
fn files_both_ways(bed: &Bed, guest: &mut Guest) {
    let dir = bed.dir.display().to_string();
    host(&format!("head -c 33554432 /dev/urandom > {dir}/file"));
    let httpd = Command::new("busybox").args(["httpd", "-f", "-p", "7900", "-h", &dir]).spawn();
    let mut httpd = httpd.unwrap();
    let got =
        guest.run("wget -q -O /tmp/file http://10.78.0.200:7900/file && sha256sum < /tmp/file");
    httpd.kill().unwrap();
    httpd.wait().unwrap();
    let sum = host(&format!("sha256sum < {dir}/file"));
    assert_eq!(got.unwrap(), sum);
    guest.serve("httpd", "httpd -f -p 7900 -h /tmp", 7900).unwrap();
    let back = format!("http://{}:7900/file", guest.card.ip());
    host(&format!("busybox wget -q -O {dir}/back {back}"));
    assert_eq!(host(&format!("sha256sum < {dir}/back")), sum);
}
