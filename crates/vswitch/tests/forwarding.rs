//! What the switch does with frames, seen from the guests at its ports.

mod common;

use std::time::{Duration, Instant};

use common::*;
use vswitch::counters::Drop as Why;
use vswitch::header::{GSO_NONE, NEEDS_CSUM, VnetHeader};
use vswitch::shared::PollMode;

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn learned_addresses_get_their_frames_alone_and_whole() {
    for packed in [0, PACKED] {
        for merge in [0, MERGE] {
            for event in [0, EVENT] {
                let features = PLAIN | packed | merge | event;
                let buffer = if merge == 0 { 9200 } else { 1526 };
                let port = || PortOptions { features, buffer, ..PortOptions::default() };
                let (_net, mut g) = Net::new(1, PollMode::Adaptive, vec![port(), port(), port()]);
                g[1].send(&frame(0xff, 1, 60, 0));
                assert_eq!(g[0].receive().1, frame(0xff, 1, 60, 0));
                assert_eq!(g[2].receive().1, frame(0xff, 1, 60, 0));
                for i in 0..300 {
                    let len = [60, 64, 65, 1514, 1500, 4000, 9000, 128, 97, 14][i % 10];
                    let f = frame(1, 0, len, i);
                    g[0].send_pieces(VnetHeader::default(), &f, &[[12, 64, 5, 2000][i % 4]]);
                    let (h, got) = g[1].receive();
                    assert_eq!(got, f, "{features:#x} frame {i} of {len}");
                    assert_eq!((h.flags, h.gso_type), (0, GSO_NONE));
                }
                assert_eq!(g[2].try_receive(), None);
                assert_eq!(g[1].counters.tx_frames.get(), 300);
                assert_eq!(g[0].counters.snapshot().dropped(), (0, 0));
            }
        }
    }
}

#[test]
fn vlans_are_kept_apart_and_tags_come_and_go() {
    let ports = vec![
        PortOptions::vlan(Some(5), &[]),
        PortOptions::vlan(None, &[5, 6]),
        PortOptions::vlan(Some(6), &[]),
        PortOptions::vlan(Some(6), &[5]),
    ];
    let (_net, mut g) = Net::new(1, PollMode::Adaptive, ports);
    g[0].send(&frame(0xff, 0, 60, 1));
    assert_eq!(g[1].receive().1, tagged(0xff, 0, 5, 64, 1));
    assert_eq!(g[3].receive().1, tagged(0xff, 0, 5, 64, 1));
    g[1].send(&tagged(0xff, 1, 0x6006, 64, 2));
    assert_eq!(g[2].receive().1, frame(0xff, 1, 60, 2));
    assert_eq!(g[3].receive().1, frame(0xff, 1, 60, 2));
    assert_eq!(g[0].try_receive(), None);
    // Not in VLAN 5's neighbourhood: an untagged frame on the trunk, a tagged one on access ports.
    g[1].send(&frame(0xff, 1, 60, 3));
    g[0].send(&tagged(0xff, 0, 5, 64, 3));
    g[2].send(&tagged(0xff, 0, 5, 64, 3));
    for i in [0, 1, 2] {
        wait_until("a drop for its VLAN", || g[i].counters.drops(Why::Vlan) == 1);
    }
    // The same address in two VLANs is two addresses.
    g[0].send(&frame(1, 9, 60, 4));
    g[2].send(&frame(1, 9, 60, 5));
    assert_eq!(g[1].receive().1, tagged(1, 9, 5, 64, 4));
    assert_eq!(g[1].receive().1, tagged(1, 9, 6, 64, 5));
    g[1].send(&tagged(9, 1, 5, 64, 6));
    assert_eq!(g[0].receive().1, frame(9, 1, 60, 6));
    g[1].send(&tagged(9, 1, 6, 64, 7));
    assert_eq!(g[2].receive().1, frame(9, 1, 60, 7));
    for guest in &mut g {
        let left: Vec<_> = std::iter::from_fn(|| guest.try_receive()).collect();
        assert!(left.iter().all(|(_, f)| f.len() >= 60));
    }
}

#[test]
fn every_drop_has_its_reason() {
    let mut small = PortOptions::default();
    small.view.max_frame = 1014;
    let (net, mut g) = Net::new(1, PollMode::Adaptive, vec![PortOptions::default(), small]);
    g[1].send(&frame(0xff, 1, 60, 0));
    g[0].receive();
    let expect = |g: &mut Vec<Guest>, at: usize, why: Why, f: Vec<u8>, h: VnetHeader| {
        let before = g[at].counters.drops(why);
        g[0].send_pieces(h, &f, &[]);
        wait_until(why.name(), || g[at].counters.drops(why) == before + 1);
    };
    let none = VnetHeader::default();
    expect(&mut g, 0, Why::Runt, vec![2; 10], none);
    expect(&mut g, 0, Why::BadSource, frame(1, 0, 60, 0).iter().map(|b| b | 1).collect(), none);
    let mut reserved = frame(1, 0, 60, 0);
    reserved[..6].copy_from_slice(&[1, 0x80, 0xc2, 0, 0, 0]);
    expect(&mut g, 0, Why::Reserved, reserved, none);
    expect(&mut g, 1, Why::TooBigForPort, frame(1, 0, 1015, 0), none);
    let bad = VnetHeader { flags: NEEDS_CSUM, csum_start: 60, csum_offset: 0, ..none };
    expect(&mut g, 0, Why::BadHeader, frame(1, 0, 60, 0), bad);
    expect(&mut g, 0, Why::SamePort, frame(0, 0, 60, 0), none);
    // More than there are buffers for.
    for i in 0..300 {
        g[0].send(&frame(1, 0, 60, i));
    }
    wait_until("buffers run out", || {
        g[1].counters.drops(Why::NoBuffers) + g[1].counters.tx_frames.get() >= 300
    });
    assert!(g[1].counters.drops(Why::NoBuffers) >= 300 - 256);
    let t = g[0].counters.snapshot();
    let r = g[1].counters.snapshot();
    let dropped_out: u64 = r.drops[Why::NoBuffers as usize] + r.drops[Why::TooBigForPort as usize];
    assert_eq!(t.rx_frames, t.dropped().0 + r.tx_frames + dropped_out);
    drop(net);
}

#[test]
fn limits_hold() {
    use std::sync::Arc;
    use vswitch::limit::Limiter;
    let mut limited = PortOptions::default();
    limited.view.storm = Some(Arc::new(Limiter::new(1, 10)));
    let (mut net, mut g) = Net::new(1, PollMode::Adaptive, vec![limited, PortOptions::default()]);
    for i in 0..50 {
        g[0].send(&frame(0xff, 0, 60, i));
    }
    // A burst is counted as received before what is dropped of it.
    let storm = || g[0].counters.drops(Why::StormLimit);
    wait_until("the storm is over", || g[0].counters.rx_frames.get() == 50 && storm() > 30);
    assert!(storm() <= 40, "{}", storm());
    net.views[0].storm = None;
    net.views[0].rate = Some(Arc::new(Limiter::new(8, 8 * 600)));
    net.publish();
    for i in 0..50 {
        g[0].send(&frame(0xff, 0, 60, i));
    }
    let limited = || g[0].counters.drops(Why::RateLimit);
    wait_until("all are taken", || g[0].counters.rx_frames.get() == 100 && limited() >= 40);
    assert_eq!(limited(), 40);
}

#[test]
fn mirrors_and_captures_see_both_ways() {
    use std::sync::Arc;
    let ports = (0..3).map(|_| PortOptions::default()).collect();
    let (mut net, mut g) = Net::new(1, PollMode::Adaptive, ports);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.pcap");
    let capture = vswitch::capture::Capture::start(&path, 2000, 1, true, true).unwrap();
    net.views[0].mirror_rx = vec![2];
    net.views[0].mirror_tx = vec![2];
    net.views[0].captures = vec![Arc::clone(&capture.tap)];
    net.views[2].mirror_output = true;
    net.publish();
    g[0].send(&frame(1, 0, 100, 1));
    assert_eq!(g[1].receive().1, frame(1, 0, 100, 1));
    assert_eq!(g[2].receive().1, frame(1, 0, 100, 1));
    g[1].send(&frame(0, 1, 200, 2));
    assert_eq!(g[0].receive().1, frame(0, 1, 200, 2));
    assert_eq!(g[2].receive().1, frame(0, 1, 200, 2));
    assert_eq!(g[2].try_receive(), None);
    g[2].send(&frame(0xff, 2, 60, 3));
    wait_until("the mirror's own frame is dropped", || {
        g[2].counters.drops(Why::NoDestination) == 1
    });
    net.views[0].captures.clear();
    net.publish();
    drop(capture);
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 24 + 16 + 100 + 16 + 200);
    assert_eq!(bytes[24 + 16..24 + 116], frame(1, 0, 100, 1));
    assert_eq!(bytes[24 + 116 + 16..], frame(0, 1, 200, 2));
}

#[test]
fn a_large_segment_stays_whole_for_who_takes_it_and_is_cut_for_others() {
    for packed in [0, PACKED] {
        let able = PortOptions {
            features: PLAIN | packed | MERGE | OFFLOADS,
            buffer: 1526,
            ..PortOptions::default()
        };
        let plain = PortOptions { features: PLAIN | packed, ..PortOptions::default() };
        let sender = PortOptions { features: PLAIN | packed, ..PortOptions::default() };
        let (_net, mut g) = Net::new(1, PollMode::Adaptive, vec![sender, able, plain]);
        let (h, f) = tcp(40_000);
        g[0].send_pieces(h, &f, &[12, 4096, 4096, 1]);
        let (got_h, got) = g[1].receive();
        assert_eq!(got, f);
        assert_eq!(VnetHeader { num_buffers: 0, ..got_h }, h);
        assert_eq!(usize::from(got_h.num_buffers), (12 + f.len()).div_ceil(1526));
        let mut payload = Vec::new();
        while payload.len() < 40_000 {
            let (h, part) = g[2].receive();
            assert!(h.is_plain() && part.len() <= 54 + 1448);
            payload.extend_from_slice(&part[54..]);
        }
        assert_eq!(payload, f[54..]);
        assert_eq!(g[2].counters.segmented.get(), 1);
        assert_eq!(g[2].counters.checksummed.get(), 40_000u64.div_ceil(1448));
    }
}

#[test]
fn frames_cross_from_thread_to_thread_in_order() {
    for poll in [PollMode::Adaptive, PollMode::Interrupt] {
        let port = |thread| PortOptions { thread, ..PortOptions::default() };
        let (_net, mut g) = Net::new(2, poll, vec![port(0), port(1)]);
        let (a, b) = g.split_at_mut(1);
        let mut got = 0;
        for i in 0..2000 {
            a[0].send(&frame(1, 0, 60 + i % 1400, i));
            // No more on their way than the receiver has buffers.
            while i - got > 200 {
                assert_eq!(b[0].receive().1, frame(1, 0, 60 + got % 1400, got));
                got += 1;
            }
        }
        while got < 2000 {
            assert_eq!(b[0].receive().1, frame(1, 0, 60 + got % 1400, got));
            got += 1;
        }
        assert_eq!(a[0].counters.snapshot().dropped(), (0, 0));
    }
}

#[test]
fn a_sleeping_thread_wakes_for_every_frame() {
    for poll in [PollMode::Adaptive, PollMode::Interrupt] {
        for features in [PLAIN, PLAIN | EVENT, PLAIN | PACKED, PLAIN | PACKED | EVENT] {
            let port = || PortOptions { features, ..PortOptions::default() };
            let (net, mut g) = Net::new(1, poll, vec![port(), port()]);
            let sleeps =
                || net.shared.mailboxes[0].sleeps.load(std::sync::atomic::Ordering::Relaxed);
            for i in 0..50 {
                let before = sleeps();
                g[0].send(&frame(1, 0, 60, i));
                assert_eq!(g[1].receive().1, frame(1, 0, 60, i));
                wait_until("it sleeps", || sleeps() > before);
            }
        }
    }
}

#[test]
fn a_driver_that_breaks_the_rules_costs_its_own_port_only() {
    let ports = (0..3).map(|_| PortOptions::default()).collect();
    let (net, mut g) = Net::new(1, PollMode::Adaptive, ports);
    // An available index that runs ahead, at a port that is not the last one polled.
    let avail = g[0].tx.avail;
    g[0].mem.store_u16(avail + 2, 5000, std::sync::atomic::Ordering::Release).unwrap();
    g[0].tx_kick.write(1).unwrap();
    let mut faults = Vec::new();
    wait_until("a fault", || {
        faults.extend(net.shared.take_faults());
        !faults.is_empty()
    });
    assert_eq!(faults[0].port, 0);
    assert!(faults[0].reason.contains("more buffers available"), "{}", faults[0].reason);
    for i in 0..100 {
        g[2].send(&frame(1, 2, 60, i));
        assert_eq!(g[1].receive().1, frame(1, 2, 60, i));
        g[1].send(&frame(2, 1, 60, i));
        assert_eq!(g[2].receive().1, frame(2, 1, 60, i));
    }
    assert!(net.shared.take_faults().is_empty());
}

#[test]
fn flooded_and_known_frames_stay_in_order() {
    let ports = (0..2).map(|_| PortOptions::default()).collect();
    let (_net, mut g) = Net::new(1, PollMode::Always, ports);
    g[1].send(&frame(0xff, 1, 60, 0));
    g[0].receive();
    for round in 0..20 {
        for i in 0..64 {
            let to = if (i * 7 + round) % 3 == 0 { 0xff } else { 1 };
            g[0].send(&frame(to, 0, 60, i));
        }
        for i in 0..64 {
            let to = if (i * 7 + round) % 3 == 0 { 0xff } else { 1 };
            assert_eq!(g[1].receive().1, frame(to, 0, 60, i));
        }
    }
}
