//! Driver and device in two threads that sleep whenever they may: a wake-up that is lost, or data
//! seen before it is there, shows here.
#![allow(unsafe_code)] // poll

use std::os::fd::AsRawFd;
use std::sync::Arc;

use mem::GuestMemory;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{DATA, RAM, features};
use crate::device::{Interrupt, RingSetup};
use crate::ring::{Chain, Queue};
use crate::testing::{DriverRing, ram};

const CHAINS: u32 = 20_000;

struct Wake(EventFd);

impl Interrupt for Wake {
    fn notify(&self) {
        self.0.write(1).unwrap();
    }
    fn eventfd(&self) -> Option<EventFd> {
        self.0.try_clone().ok()
    }
}

/// Sleeps until `fd` is written to.
fn sleep(fd: &EventFd, who: &str) {
    let mut p = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd.
    assert_eq!(unsafe { libc::poll(&mut p, 1, 20_000) }, 1, "the {who} was not woken");
    fd.read().unwrap();
}

/// Adds 1 to every number that it is sent, until it has served them all.
fn device(setup: RingSetup) {
    let mut queue = Queue::new(setup).unwrap();
    let mut chain = Chain::new();
    let mut served = 0;
    while served < CHAINS {
        queue.ring.disable_kicks();
        while queue.pop(&mut chain).unwrap() {
            let n: u32 = chain.read_obj(0).unwrap();
            assert_eq!(n, served, "chains come in order");
            assert!(chain.write_obj(0, &(n + 1)));
            queue.push(&chain, 4);
            served += 1;
            if served % 3 == 0 {
                queue.flush();
            }
        }
        queue.flush();
        if served < CHAINS && !queue.ring.enable_kicks() {
            sleep(&queue.kick, "device");
        }
    }
}

fn driver(mem: &GuestMemory, mut ring: DriverRing, kick: &EventFd, call: &EventFd) {
    let slot = |n: u32| DATA + u64::from(n) * 16 % (RAM - DATA);
    let (mut sent, mut received) = (0, 0);
    while received < CHAINS {
        ring.disable_interrupts();
        // Bursts of changing length, so that both sides sleep now and then.
        for _ in 0..=sent % 7 {
            if sent == CHAINS {
                break;
            }
            let at = slot(sent);
            mem.write_obj(at, &sent).unwrap();
            let table = (sent % 3 == 0).then_some(0x20000 + 0x100 * u64::from(sent % 64));
            if ring.add(&[(at, 4)], &[(at + 8, 4)], table).is_none() {
                break;
            }
            sent += 1;
        }
        if ring.needs_kick() {
            kick.write(1).unwrap();
        }
        while let Some((_, len)) = ring.poll_used() {
            assert_eq!(len, 4);
            let n: u32 = mem.read_obj(slot(received) + 8).unwrap();
            assert_eq!(n, received + 1);
            received += 1;
        }
        if ring.outstanding() > 0 {
            ring.enable_interrupts();
            if !ring.has_used() {
                sleep(call, "driver");
            }
        }
    }
}

#[test]
fn no_wake_up_is_lost() {
    for (packed, event) in [(false, false), (false, true), (true, false), (true, true)] {
        let mem = ram(RAM);
        let ring = DriverRing::new(&mem, 0, 16, features(packed, event));
        let call = Arc::new(Wake(EventFd::new(EFD_NONBLOCK).unwrap()));
        let setup = ring.setup(None, Arc::clone(&call) as _);
        let kick = setup.kick.try_clone().unwrap();
        let thread = std::thread::spawn(move || device(setup));
        driver(&mem, ring, &kick, &call.0);
        thread.join().unwrap();
    }
}
