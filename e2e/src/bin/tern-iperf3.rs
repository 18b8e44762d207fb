//! Two QEMU guests at a switch that is not ours to start, and iperf3 between them: for
//! `cargo xtask bench switch --only guests`.
//!
//! Prints `{"sockets":[A,B]}`, where its guests wait for a switch, and at the end
//! `{"gbits":[A to B, B to A]}`.

use std::time::{Duration, Instant};

use clap::Parser;
use e2e::switch::guest::{Card, Guest, boot};
use e2e::switch::{Listens, socket};
use e2e::testbed::Bed;
use e2e::{Error, Result};
use serde_json::{Value, json};

const PORT: u16 = 5201;
/// The switch is there, and both guests can be reached through it, by then.
const REACHED: Duration = Duration::from_secs(60);

#[derive(Parser)]
#[command(about, long_about = None, after_help = "Example:\n  tern-iperf3 --seconds 10")]
struct Args {
    /// Seconds for each direction
    #[arg(long, default_value_t = 10)]
    seconds: u32,
}

fn wait_reached(from: &mut Guest, to: &str) -> Result<()> {
    let until = Instant::now() + REACHED;
    while from.try_run(&format!("/usr/bin/ping -c 1 -W 1 {to}"))?.status != 0 {
        if Instant::now() > until {
            return Err(Error::Host(format!("{to} is not reached through the switch")));
        }
    }
    Ok(())
}

fn gigabits(report: &Value) -> Result<f64> {
    let rate = report.pointer("/end/sum_received/bits_per_second").and_then(Value::as_f64);
    rate.map(|r| r / 1e9).ok_or_else(|| Error::Protocol(format!("iperf3 says {report}")))
}

fn measure(seconds: u32) -> Result<Value> {
    let missing = || Error::Host("TERN_E2E, TERN_GUEST_KERNEL, TERN_NET_INITRD: not set".into());
    let mut bed = Bed::new("iperf3").ok_or_else(missing)?;
    let cards = [Card::new("p1", Listens::Peer, 1), Card::new("p2", Listens::Peer, 2)];
    let sockets = cards.clone().map(|card| socket(&bed, &card.port));
    println!("{}", json!({ "sockets": sockets }));
    let mut guests = boot(&mut bed, &cards)?;
    let [a, b] = &mut guests[..] else { unreachable!("two were booted") };
    a.configure()?;
    b.configure()?;
    wait_reached(a, &b.card.ip())?;
    b.serve("iperf3", "iperf3 -s", PORT)?;
    let mut rates = Vec::new();
    for way in ["", "-R"] {
        // The server does not listen for a moment after each test.
        b.wait_listening(PORT)?;
        let command = format!("iperf3 -J -t {seconds} -O 1 -c {} {way}", b.card.ip());
        rates.push(gigabits(&a.run_json(&command)?)?);
    }
    Ok(json!({ "gbits": rates }))
}

fn main() {
    match measure(Args::parse().seconds) {
        Ok(report) => println!("{report}"),
        Err(e) => {
            eprintln!("tern-iperf3: {e}");
            std::process::exit(1);
        }
    }
}
