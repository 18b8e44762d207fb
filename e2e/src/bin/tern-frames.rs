//! The part of `cargo xtask bench switch` that testpmd cannot do: frames with times in them, ports
//! that stand still, many ports and many addresses. Prints what it measured as JSON.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use e2e::frames::{self, ENTRIES, Port};
use e2e::{Error, Result};
use serde_json::{Value, json};

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
    /// A socket on which the switch is waited for, one for each port (repeatable)
    #[arg(long = "socket", global = true)]
    sockets: Vec<PathBuf>,
    /// Bytes of a frame
    #[arg(long, global = true, default_value_t = 64)]
    size: u32,
}

#[derive(Subcommand)]
enum What {
    /// Frames from the first port to the second at a fixed rate, each with its time
    Latency {
        /// Frames a second
        #[arg(long)]
        rate: f64,
        #[arg(long, default_value_t = 3.0)]
        seconds: f64,
    },
    /// Nothing for some time, then single frames, then everything at once
    Idle {
        #[arg(long, default_value_t = 6.0)]
        seconds: f64,
        /// Frames that come alone, after a pause
        #[arg(long, default_value_t = 50)]
        singles: u32,
        /// Times that load goes from nothing to full
        #[arg(long, default_value_t = 5)]
        ramps: u32,
    },
    /// How long it takes to wake a process that sleeps on another CPU, without any switch
    Wake {
        #[arg(long, default_value_t = 1)]
        cpu: usize,
        #[arg(long, default_value_t = 50)]
        times: u32,
    },
    /// The process that `wake` wakes
    #[command(hide = true)]
    Sleeper,
    /// As fast as it goes, in pairs of ports
    Flood {
        /// Addresses in all
        #[arg(long)]
        macs: u64,
        #[arg(long, default_value_t = 1.5)]
        seconds: f64,
    },
}

/// Frames on their way from one port to another, at most: less than a ring holds, so that what is lost
/// was lost by the switch.
const WINDOW: u16 = ENTRIES - 32;
/// Frames sent at once.
const BURST: u16 = 32;
/// What is on its way arrives in this time, or is lost.
const PATIENCE: Duration = Duration::from_millis(500);
/// Before single frames and ramps: long enough for the switch to fall asleep.
const PAUSE: Duration = Duration::from_millis(50);
/// Where in a frame its time is.
const TIME: u64 = 14;

/// Address number `n`.
fn mac(n: u64) -> [u8; 6] {
    let b = n.to_be_bytes();
    [0x02, b[3], b[4], b[5], b[6], b[7]]
}

/// Takes and gives back everything that has come anywhere, until nothing more comes.
fn drain(ports: &mut [Port]) {
    let mut quiet = Instant::now();
    while quiet.elapsed() < Duration::from_millis(20) {
        for p in ports.iter_mut() {
            let n = p.received();
            if n > 0 {
                p.give_back(n);
                quiet = Instant::now();
            }
        }
    }
}

/// Lets the switch learn all addresses: number n lives at port n modulo their number.
fn teach(ports: &mut [Port], macs: u64) {
    let count = ports.len() as u64;
    for n in 0..macs {
        let port = (n % count) as usize;
        while ports[port].room() == 0 {
            std::hint::spin_loop();
        }
        let to = mac(u64::from(port as u32 ^ 1) % count);
        ports[port].write(0, 0, &to);
        ports[port].write(0, 6, &mac(n));
        ports[port].send(1);
        if n % u64::from(BURST) == 0 || n < count {
            for p in ports.iter_mut() {
                let n = p.received();
                p.give_back(n);
            }
        }
    }
    drain(ports);
}

fn latency(ports: &mut [Port], rate: f64, seconds: f64) -> Result<Value> {
    let [from, to, ..] = ports else { return Err(Error::Host("two sockets are needed".into())) };
    for ahead in 0..ENTRIES {
        from.write(ahead, 0, &mac(1));
        from.write(ahead, 6, &mac(0));
    }
    let start = Instant::now();
    let now = || start.elapsed().as_nanos() as u64;
    let (step, end) = (1e9 / rate, (seconds * 1e9) as u64);
    let mut times: Vec<u32> = Vec::with_capacity((rate * seconds) as usize + 1);
    let (mut sent, mut received, mut full) = (0u64, 0u64, 0u64);
    let mut due = 0.0;
    // The first tenth is for warming up.
    let counts_from = end / 10;
    loop {
        let t = now();
        if t as f64 >= due && t < end {
            due += step;
            if from.room() > 0 {
                from.write(0, TIME, &now().to_le_bytes());
                from.send(1);
                sent += 1;
            } else {
                full += 1;
            }
        }
        let n = to.received();
        if n > 0 {
            let arrived = now();
            for i in 0..n {
                let mut bytes = [0; 8];
                to.read(i, TIME, &mut bytes);
                let left = u64::from_le_bytes(bytes);
                if left > counts_from {
                    times.push(u32::try_from(arrived - left).unwrap_or(u32::MAX));
                }
            }
            to.give_back(n);
            received += u64::from(n);
        }
        if t >= end && (received == sent || t > end + PATIENCE.as_nanos() as u64) {
            break;
        }
    }
    times.sort_unstable();
    let at = |part: f64| times.get((times.len() as f64 * part) as usize).copied().unwrap_or(0);
    Ok(json!({
        "sent": sent, "lost": sent - received.min(sent), "not_sent": full,
        "median_ns": at(0.5), "p99_ns": at(0.99), "worst_ns": times.last(),
    }))
}

/// Sends one frame from port `from` to its neighbour; nanoseconds until it is there.
fn single(ports: &mut [Port], from: usize) -> Option<u64> {
    let sent = Instant::now();
    ports[from].send(1);
    loop {
        let n = ports[from ^ 1].received();
        if n > 0 {
            let took = sent.elapsed();
            ports[from ^ 1].give_back(n);
            return Some(took.as_nanos() as u64);
        }
        if sent.elapsed() > PATIENCE {
            return None;
        }
    }
}

/// All pairs of ports, both ways, for `time`; frames sent and received.
fn full(
    ports: &mut [Port],
    time: Duration,
    mut address: impl FnMut(&mut Port, usize, u16),
) -> (u64, u64) {
    let mut sent = vec![0u64; ports.len()];
    let mut received = vec![0u64; ports.len()];
    let start = Instant::now();
    let mut running = true;
    let mut since = Instant::now();
    loop {
        for i in 0..ports.len() {
            let n = ports[i].received();
            if n > 0 {
                ports[i].give_back(n);
                received[i] += u64::from(n);
            }
            if running {
                let flying = (sent[i] - received[i ^ 1]).min(u64::from(WINDOW)) as u16;
                let n = ports[i].room().min(WINDOW - flying).min(BURST);
                if n > 0 {
                    address(&mut ports[i], i, n);
                    ports[i].send(n);
                    sent[i] += u64::from(n);
                }
            }
        }
        if running && start.elapsed() > time {
            (running, since) = (false, Instant::now());
        }
        let (s, r) = (sent.iter().sum(), received.iter().sum());
        if !running && (s == r || since.elapsed() > PATIENCE) {
            return (s, r);
        }
    }
}

fn idle(ports: &mut [Port], seconds: f64, singles: u32, ramps: u32) -> Value {
    println!("connected");
    let _ = std::io::stdout().flush();
    std::thread::sleep(Duration::from_secs_f64(seconds));
    let count = ports.len();
    for (i, p) in ports.iter_mut().enumerate() {
        for ahead in 0..ENTRIES {
            p.write(ahead, 0, &mac(i as u64 ^ 1));
            p.write(ahead, 6, &mac(i as u64));
        }
    }
    let mut times = Vec::new();
    let mut lost = 0;
    for k in 0..singles {
        std::thread::sleep(PAUSE);
        match single(ports, k as usize % count) {
            Some(t) => times.push(t),
            None => lost += 1,
        }
    }
    let mut at_once = Vec::new();
    for _ in 0..ramps {
        std::thread::sleep(PAUSE);
        let (sent, received) = full(ports, Duration::from_millis(300), |_, _, _| ());
        at_once.push(json!({ "sent": sent, "lost": sent - received.min(sent) }));
    }
    json!({ "single_ns": times, "singles_lost": lost, "ramps": at_once })
}

fn flood(ports: &mut [Port], macs: u64, seconds: f64) -> Value {
    let count = ports.len() as u64;
    let each = (macs / count).max(1);
    // Cheap, and the same in every run.
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut of_port = move |port: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        mac((random >> 33) % each * count + port as u64)
    };
    let mut address = |p: &mut Port, i: usize, n: u16| {
        for ahead in 0..n {
            let (dst, src) = (of_port(i ^ 1), of_port(i));
            let [a, b, c, d, e, f] = dst;
            let [g, h, j, k, l, m] = src;
            p.write(ahead, 0, &[a, b, c, d, e, f, g, h, j, k, l, m]);
        }
    };
    full(ports, Duration::from_millis(300), &mut address);
    let start = Instant::now();
    let (sent, received) = full(ports, Duration::from_secs_f64(seconds), &mut address);
    let took = start.elapsed().as_secs_f64();
    json!({ "mpps": received as f64 / took / 1e6, "sent": sent, "lost": sent - received.min(sent) })
}

/// The clock that all processes share, in nanoseconds.
fn clock() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |d| d.as_nanos() as u64)
}

/// Answers each byte with the time at which it woke up, until there are no more.
fn sleeper() -> std::io::Result<()> {
    let (mut input, mut output) = (std::io::stdin(), std::io::stdout());
    let mut byte = [0];
    while input.read(&mut byte)? == 1 {
        output.write_all(&clock().to_le_bytes())?;
        output.flush()?;
    }
    Ok(())
}

fn wake(cpu: usize, times: u32) -> std::io::Result<Value> {
    let mut command = Command::new("taskset");
    command.args(["-c", &cpu.to_string()]).arg(std::env::current_exe()?).arg("sleeper");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let gone = || std::io::Error::from(std::io::ErrorKind::BrokenPipe);
    let mut to = child.stdin.take().ok_or_else(gone)?;
    let mut from = child.stdout.take().ok_or_else(gone)?;
    let mut took = Vec::new();
    for _ in 0..times {
        std::thread::sleep(PAUSE);
        let sent = clock();
        to.write_all(&[0])?;
        let mut woken = [0; 8];
        from.read_exact(&mut woken)?;
        took.push(u64::from_le_bytes(woken).saturating_sub(sent));
    }
    drop(to);
    child.wait()?;
    Ok(json!({ "wake_ns": took }))
}

fn run(args: &Args) -> Result<Value> {
    let host = |e: std::io::Error| Error::Host(format!("a process to be woken: {e}"));
    match args.what {
        What::Wake { cpu, times } => return wake(cpu, times).map_err(host),
        What::Sleeper => return sleeper().map(|()| Value::Null).map_err(host),
        _ => {}
    }
    if args.sockets.is_empty() || args.sockets.len() % 2 == 1 {
        return Err(Error::Host("--socket: an even number of sockets is needed".into()));
    }
    let mem = frames::memory(args.sockets.len())?;
    let mut ports = frames::ports(&mem, &args.sockets)?;
    for p in &mut ports {
        p.frames_of(args.size);
    }
    // The switch takes rings up a moment after the last message.
    std::thread::sleep(Duration::from_millis(300));
    let macs = match args.what {
        What::Flood { macs, .. } => macs.max(ports.len() as u64),
        _ => ports.len() as u64,
    };
    teach(&mut ports, macs);
    match args.what {
        What::Latency { rate, seconds } => latency(&mut ports, rate, seconds),
        What::Idle { seconds, singles, ramps } => Ok(idle(&mut ports, seconds, singles, ramps)),
        What::Flood { seconds, .. } => Ok(flood(&mut ports, macs, seconds)),
        What::Wake { .. } | What::Sleeper => Ok(Value::Null),
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("tern-frames: {e}");
            ExitCode::FAILURE
        }
    }
}
