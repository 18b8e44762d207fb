//! The real drivers through a proxy that cuts the control connection at every message, in both
//! directions, before or after it passes: in the end exactly one machine runs, with the lock.

mod common;

use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{Lock, Machine, exactly_one};
use migrate::dest::{self, Options};
use migrate::wire::{Msg, Role};
use migrate::{NoEvents, Parameters, Uri, source};

/// Where the proxy cuts: at control message number `at` of the direction, once.
#[derive(Debug, Clone, Copy)]
struct Cut {
    to_dest: bool,
    at: usize,
    /// Whether the message itself still passes.
    after: bool,
}

#[derive(Default)]
struct Counts {
    to_dest: AtomicUsize,
    to_source: AtomicUsize,
    cuts: AtomicUsize,
}

fn proxy(dest: u16, cut: Option<Cut>, counts: &Arc<Counts>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let counts = counts.clone();
    std::thread::spawn(move || {
        for source in listener.incoming() {
            let source = source.unwrap();
            source.set_nodelay(true).unwrap();
            let Ok(dest) = TcpStream::connect(("127.0.0.1", dest)) else {
                // As a real path would: refused there is refused here.
                drop(source);
                return;
            };
            dest.set_nodelay(true).unwrap();
            let counts = counts.clone();
            std::thread::spawn(move || connection(source, dest, cut, &counts));
        }
    });
    port
}

fn connection(source: TcpStream, dest: TcpStream, cut: Option<Cut>, counts: &Arc<Counts>) {
    let Ok(Some(first)) = Msg::read(&mut &source) else {
        return;
    };
    let ram = matches!(&first, Msg::Hello(h) if matches!(h.role, Role::Ram(_)));
    let pump = |mut from: TcpStream, mut to: TcpStream, first: Option<Msg>, to_dest: bool| {
        let counts = counts.clone();
        move || {
            if ram {
                if let Some(m) = first {
                    let _ = to.write_all(&m.encode().unwrap());
                }
                let _ = std::io::copy(&mut from, &mut to);
            } else {
                pass(&from, &to, first, to_dest, cut, &counts);
            }
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        }
    };
    let (s, d) = (source.try_clone().unwrap(), dest.try_clone().unwrap());
    std::thread::spawn(pump(source, dest, Some(first), true));
    pump(d, s, None, false)();
}

fn pass(
    mut from: &TcpStream,
    mut to: &TcpStream,
    mut first: Option<Msg>,
    to_dest: bool,
    cut: Option<Cut>,
    counts: &Counts,
) {
    let counter = if to_dest { &counts.to_dest } else { &counts.to_source };
    loop {
        let msg = match first.take() {
            Some(m) => m,
            None => match Msg::read(&mut from) {
                Ok(Some(m)) => m,
                _ => return,
            },
        };
        let n = counter.fetch_add(1, Ordering::SeqCst);
        let here = cut.filter(|c| c.to_dest == to_dest && c.at == n);
        if here.is_none_or(|c| c.after) && to.write_all(&msg.encode().unwrap()).is_err() {
            return;
        }
        if here.is_some() {
            counts.cuts.fetch_add(1, Ordering::SeqCst);
            return;
        }
    }
}

/// One migration with one cut; returns which machine won and how many messages passed.
fn run(cut: Option<Cut>) -> (&'static str, usize, usize) {
    let lock = Lock::default();
    let (here, there) = (Machine::new("src", 8, &lock), Machine::new("dst", 8, &lock));
    here.guest.rate.store(2000, Ordering::SeqCst);
    here.boot();
    let uri: Uri = "tcp:127.0.0.1:0".parse().unwrap();
    let keep = Options::default();
    let incoming = dest::listen(there.clone(), &uri, keep, Arc::new(NoEvents)).unwrap();
    let Uri::Tcp { port, .. } = incoming.uri() else { panic!() };
    let counts = Arc::new(Counts::default());
    let to = Uri::Tcp { host: "127.0.0.1".into(), port: proxy(port, cut, &counts) };
    let params = Arc::new(Parameters::default());
    let out = source::start(here.clone(), to, params, Arc::new(NoEvents)).unwrap();
    let result = out.wait();
    if result.is_ok() {
        incoming.wait().unwrap();
    }
    // A destination that lost its source still waits for it; it never runs meanwhile.
    let winner = exactly_one(&here, &there).name;
    assert_eq!(result.is_ok(), winner == "dst", "{cut:?}: {result:?}");
    incoming.stop();
    let _ = incoming.wait();
    assert_eq!(exactly_one(&here, &there).name, winner, "{cut:?}");
    here.stop();
    there.stop();
    let passed = |c: &AtomicUsize| c.load(Ordering::SeqCst);
    (winner, passed(&counts.to_dest), passed(&counts.to_source))
}

#[test]
fn cut_at_every_message() {
    let (winner, to_dest, to_source) = run(None);
    assert_eq!(winner, "dst");
    let mut won = [0, 0];
    for to_dest_side in [true, false] {
        // The number of rounds varies, so look a little further than one run's.
        let most = 3 + if to_dest_side { to_dest } else { to_source };
        for at in 0..most {
            for after in [false, true] {
                let cut = Cut { to_dest: to_dest_side, at, after };
                won[usize::from(run(Some(cut)).0 == "dst")] += 1;
            }
        }
    }
    assert!(won[0] > 8 && won[1] > 8, "{won:?}");
    std::thread::sleep(Duration::from_millis(1));
}
