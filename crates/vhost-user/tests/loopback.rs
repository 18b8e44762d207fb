//! Our front end against our back end, with real rings in shared memory.

mod common;

use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;

use common::{Driver, RAM, SIZE, Server, TIMEOUT, features, memory, until};
use mem::{Bitmap, PAGE_SIZE};
use vhost_user::frontend::Event;
use vhost_user::{Error, Frontend, protocol};

fn pair() -> (Frontend, Server) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Frontend::new(ours, TIMEOUT).unwrap(), Server::spawn(theirs))
}

/// Everything up to the rings.
fn ready(front: &mut Frontend, mem: &mem::GuestMemory, packed: bool, inflight: bool) {
    let offer = front.negotiate(u64::MAX).unwrap();
    assert_eq!(offer.features & features(packed), features(packed));
    assert!(offer.can_log);
    assert_eq!(offer.queues, 2);
    front.set_features(features(packed)).unwrap();
    if inflight {
        front.track_inflight(4, SIZE).unwrap();
    }
    front.set_memory(mem).unwrap();
}

#[test]
fn data_goes_through_both_kinds_of_ring_and_on_after_a_stop() {
    for packed in [false, true] {
        let (mut front, server) = pair();
        let mem = memory();
        ready(&mut front, &mem, packed, false);
        let mut drivers: Vec<_> = (0..2).map(|i| Driver::new(&mem, i, features(packed))).collect();
        drivers.iter().for_each(|d| d.start(&mut front, None));
        drivers.iter_mut().for_each(|d| d.exchange(1000));
        // Interrupts came.
        assert!(drivers[0].call.0.read().unwrap() > 0);
        for (i, driver) in drivers.iter_mut().enumerate() {
            let pos = front.stop_ring(i as u8).unwrap();
            driver.start(&mut front, Some(pos));
            driver.exchange(300);
        }
        drop(front);
        assert!(matches!(server.end(), Error::Disconnected));
    }
}

#[test]
fn memory_comes_and_goes_under_running_rings() {
    let (mut front, server) = pair();
    let mem = memory();
    ready(&mut front, &mem, false, false);
    assert_eq!(front.max_mem_slots().unwrap(), 509);
    let mut driver = Driver::new(&mem, 1, features(false));
    driver.start(&mut front, None);
    driver.exchange(10);
    server.shared.calls();
    let more = mem::GuestMemory::new(
        &[mem::RegionSpec { gpa: 0, size: 0x20_0000 }],
        &mem::Backing::default(),
    )
    .unwrap();
    let region = |gpa| vhost_user::message::MemRegion {
        guest_addr: gpa,
        size: 0x20_0000,
        user_addr: more.regions()[0].host as u64,
        mmap_offset: 0,
    };
    let file = more.regions()[0].file.clone().unwrap().0;
    use std::os::fd::AsFd;
    front.add_region(region(0x2_0000_0000), file.as_fd()).unwrap();
    assert_eq!(server.shared.calls(), ["stop 1", "start 1", "enable 1 true"]);
    driver.exchange(100);
    // The same again overlaps; somewhere else in the guest, but twice in the front end, too.
    for gpa in [0x2_0000_0000, 0x3_0000_0000] {
        let e = front.add_region(region(gpa), file.as_fd()).unwrap_err();
        assert!(matches!(e, Error::Device { .. }), "{e}");
    }
    front.remove_region(region(0x2_0000_0000)).unwrap();
    assert!(front.remove_region(region(0x2_0000_0000)).is_err());
    driver.exchange(100);
    // The same table once more maps nothing anew, and the ring goes on.
    front.set_memory(&mem).unwrap();
    driver.exchange(100);
}

#[test]
fn the_log_has_every_page_that_was_written_and_no_other() {
    for packed in [false, true] {
        let (mut front, _server) = pair();
        let mem = memory();
        ready(&mut front, &mem, packed, false);
        let mut driver = Driver::new(&mem, 0, features(packed));
        driver.start(&mut front, None);
        driver.exchange(100);
        let log = front.start_log().unwrap();
        let all = |pages: &Bitmap| (0..pages.len()).filter(|p| pages.test(*p)).collect::<Vec<_>>();
        let low = Bitmap::new(RAM / PAGE_SIZE);
        let high = Bitmap::new(0x100);
        // Starting to log touches at most the rings.
        log.harvest(0, low.len(), &low);
        log.harvest(0x1_0000_0000, high.len(), &high);
        low.clear_all();
        assert_eq!(high.count(), 0);
        let mut expected = std::collections::BTreeSet::new();
        for _ in 0..5 {
            driver.send();
        }
        for (to, text) in driver.expected.values() {
            let last = to + text.len() as u64 - 1;
            expected.extend(to / PAGE_SIZE..=last / PAGE_SIZE);
        }
        driver.kick();
        until("the device's answer", || {
            driver.receive();
            driver.expected.is_empty()
        });
        // The ring is stopped: whatever it wrote is logged.
        front.stop_ring(0).unwrap();
        log.harvest(0, low.len(), &low);
        log.harvest(0x1_0000_0000, high.len(), &high);
        let found: std::collections::BTreeSet<_> =
            all(&low).into_iter().chain(all(&high).iter().map(|p| p + 0x10_0000)).collect();
        let rings = 0x1000 / PAGE_SIZE..(0x1000 + 2 * 0x1000) / PAGE_SIZE;
        assert!(rings.clone().any(|p| found.contains(&p)), "the ring itself: {found:?}");
        let buffers: std::collections::BTreeSet<_> =
            found.into_iter().filter(|p| !rings.contains(p)).collect();
        assert_eq!(buffers, expected, "packed: {packed}");
        assert_eq!(log.harvest(0, low.len(), &low), 0);
        front.stop_log().unwrap();
    }
}

#[test]
fn a_back_end_that_is_killed_loses_nothing_with_in_flight_tables() {
    for packed in [false, true] {
        let (mut front, mut server) = pair();
        let mem = memory();
        ready(&mut front, &mem, packed, true);
        let mut driver = Driver::new(&mem, 2, features(packed));
        driver.start(&mut front, None);
        let mut again = 0;
        for _ in 0..10 {
            driver.exchange(37);
            server.shared.hold.store(true, Ordering::SeqCst);
            (0..8).for_each(|_| assert!(driver.send()));
            driver.kick();
            // Long enough for it to take some, or all, or none.
            std::thread::sleep(std::time::Duration::from_millis(3));
            again += *server.shared.resubmitted.lock().unwrap();
            server.stop(true);
            let (ours, theirs) = UnixStream::pair().unwrap();
            server = Server::spawn(theirs);
            front.reconnect(ours).unwrap();
            until("what was in flight", || {
                driver.receive();
                driver.expected.is_empty()
            });
        }
        again += *server.shared.resubmitted.lock().unwrap();
        assert!(again > 0, "nothing was ever in flight");
        driver.exchange(200);
    }
}

#[test]
fn a_split_ring_goes_on_from_its_used_index_without_them() {
    let (mut front, mut server) = pair();
    let mem = memory();
    ready(&mut front, &mem, false, false);
    let mut driver = Driver::new(&mem, 0, features(false));
    driver.start(&mut front, None);
    for _ in 0..5 {
        driver.exchange(50);
        server.shared.hold.store(true, Ordering::SeqCst);
        (0..5).for_each(|_| assert!(driver.send()));
        driver.kick();
        std::thread::sleep(std::time::Duration::from_millis(3));
        server.stop(true);
        let (ours, theirs) = UnixStream::pair().unwrap();
        server = Server::spawn(theirs);
        front.reconnect(ours).unwrap();
        until("what was in flight", || {
            driver.receive();
            driver.expected.is_empty()
        });
    }
}

#[test]
fn a_new_back_end_without_a_feature_in_use_is_refused() {
    let (mut front, server) = pair();
    let mem = memory();
    ready(&mut front, &mem, true, false);
    server.stop(true);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let _server = Server::with(theirs, |shared| {
        let mut device = common::Copier::new(shared);
        device.features = features(false);
        device
    });
    let e = front.reconnect(ours).unwrap_err().to_string();
    assert!(e.contains("lacks features 0x400000000"), "{e}");
}

#[test]
fn small_messages_reach_the_device() {
    let (mut front, server) = pair();
    let mem = memory();
    ready(&mut front, &mem, false, false);
    server.shared.calls();
    front.send_rarp([2, 0, 0, 1, 2, 3]).unwrap();
    front.set_mtu(9000).unwrap();
    assert!(matches!(front.set_mtu(67), Err(Error::Device { .. })));
    front.set_config(4, &[1, 2, 3], false).unwrap();
    assert_eq!(front.get_config(3, 5).unwrap(), [0, 1, 2, 3, 0]);
    assert!(front.get_config(60, 5).is_err());
    assert!(front.set_config(62, &[0; 3], true).is_err());
    front.set_status(15).unwrap();
    assert_eq!(front.get_status().unwrap(), 15);
    let driver = Driver::new(&mem, 3, features(false));
    driver.start(&mut front, None);
    front.enable_ring(3, false).unwrap();
    front.set_status(0).unwrap();
    assert_eq!(front.get_status().unwrap(), 0);
    driver.start(&mut front, None);
    front.reset_device().unwrap();
    assert!(front.postcopy_advise().is_err());
    assert_eq!(
        server.shared.calls(),
        [
            "rarp [2, 0, 0, 1, 2, 3]",
            "mtu 9000",
            "status 15",
            "start 3",
            "enable 3 true",
            "enable 3 false",
            "status 0",
            "stop 3",
            "reset",
            "start 3",
            "enable 3 true",
            "stop 3",
            "reset",
        ]
    );
}

#[test]
fn a_device_tells_that_its_configuration_changed() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let shared = std::sync::Arc::new(common::Shared::default());
    let thread = std::thread::spawn(move || {
        let mut connection =
            vhost_user::Connection::new(theirs, common::Copier::new(&shared)).unwrap();
        while connection.protocol_features() == 0 || connection.features().is_none() {
            connection.process().unwrap();
        }
        connection.config_changed().unwrap();
        while connection.process().is_ok() {}
    });
    let mut front = Frontend::new(ours, TIMEOUT).unwrap();
    let offer = front.negotiate(protocol::BACKEND_REQ | protocol::REPLY_ACK).unwrap();
    assert_eq!(offer.protocol, protocol::BACKEND_REQ | protocol::REPLY_ACK);
    front.set_features(features(false)).unwrap();
    let mut event = None;
    until("the event", || {
        event = front.next_event().unwrap();
        event.is_some()
    });
    assert!(matches!(event, Some(Event::ConfigChanged)));
    drop(front);
    thread.join().unwrap();
}

#[test]
fn post_copy_in_its_order_and_no_other() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Server::with(theirs, |shared| {
        let mut device = common::Copier::new(shared);
        device.postcopy = true;
        device
    });
    let mut front = Frontend::new(ours, TIMEOUT).unwrap();
    front.negotiate(u64::MAX).unwrap();
    let mem = memory();
    let fd = front.postcopy_advise().unwrap();
    assert_eq!(std::fs::File::from(fd).metadata().unwrap().len(), 7);
    front.postcopy_listen().unwrap();
    let mut told = Vec::new();
    front
        .postcopy_memory(&mem, |regions| {
            told = regions.to_vec();
            Ok(())
        })
        .unwrap();
    assert_eq!(server.shared.calls(), ["fault in 2 regions"]);
    // The back end's addresses, of the same guest memory.
    for (theirs, ours) in told.iter().zip(mem.regions()) {
        assert_eq!((theirs.guest_addr, theirs.size), (ours.gpa, ours.size));
        assert_ne!(theirs.user_addr, ours.host as u64);
    }
    front.set_features(features(false)).unwrap();
    let mut driver = Driver::new(&mem, 0, features(false));
    driver.start(&mut front, None);
    driver.exchange(20);
    front.postcopy_end().unwrap();
    driver.exchange(20);
    assert!(front.postcopy_listen().is_err());
    assert!(server.end().to_string().contains("out of order"));
}
