//! The host's side of what the guest does on the network: orders, and a stream that is checked.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::Context;
use crate::guest::control::{Order, Status};
use crate::guest::{CONTROL_PORT, GUEST_SEED, HOST_SEED, STREAM_PORT, net};
use crate::{Error, Result};

fn connect(ip: Ipv4Addr, port: u16, patience: Duration) -> Result<TcpStream> {
    let until = Instant::now() + patience;
    let address = SocketAddr::from((ip, port));
    loop {
        match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
            Ok(stream) => {
                stream.set_nodelay(true).context(|| format!("{address}"))?;
                return Ok(stream);
            }
            Err(_) if Instant::now() < until => thread::sleep(Duration::from_millis(20)),
            Err(e) => return Err(e).context(|| format!("the guest does not answer at {address}")),
        }
    }
}

/// A connection for orders.
pub struct Control {
    reader: BufReader<TcpStream>,
    writer: TcpStream,
}

impl Control {
    /// Connects to the guest at `ip`.
    pub fn connect(ip: Ipv4Addr) -> Result<Self> {
        let writer = connect(ip, CONTROL_PORT, Duration::from_secs(20))?;
        writer.set_read_timeout(Some(Duration::from_secs(60))).context(|| "guest".into())?;
        let reader = BufReader::new(writer.try_clone().context(|| "guest".into())?);
        Ok(Self { reader, writer })
    }

    /// Gives an order; the guest's status is the answer (all zero where the order has none).
    pub fn order(&mut self, order: &Order) -> Result<Status> {
        let line = serde_json::to_string(order).map_err(|e| Error::Protocol(e.to_string()))?;
        self.writer
            .write_all(format!("{line}\n").as_bytes())
            .context(|| "cannot give the guest an order".into())?;
        let mut answer = String::new();
        self.reader
            .read_line(&mut answer)
            .context(|| "the guest does not answer an order".into())?;
        if answer.trim() == "{}" {
            return Ok(Status::default());
        }
        serde_json::from_str(&answer)
            .map_err(|e| Error::Protocol(format!("the guest's answer {answer:?}: {e}")))
    }
}

/// Bytes that went over a stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct Streamed {
    /// Sent by the host.
    pub sent: u64,
    /// Received by the host and compared.
    pub received: u64,
    /// Wrong bytes among these.
    pub bad: u64,
}

/// A stream with checked content in both directions.
pub struct Stream {
    stop: Arc<AtomicBool>,
    socket: TcpStream,
    counters: Arc<[AtomicU64; 3]>,
    threads: Vec<JoinHandle<std::io::Result<()>>>,
}

impl Stream {
    /// Starts a stream with the guest at `ip`; the host sends `kib` KiB a second.
    pub fn start(ip: Ipv4Addr, kib: u64) -> Result<Self> {
        let socket = connect(ip, STREAM_PORT, Duration::from_secs(20))?;
        let clone = || socket.try_clone().context(|| "stream".into());
        let (sending, receiving) = (clone()?, clone()?);
        let stop = Arc::new(AtomicBool::new(false));
        let counters: Arc<[AtomicU64; 3]> = Arc::default();
        let (c, s) = (Arc::clone(&counters), Arc::clone(&stop));
        let send = thread::spawn(move || {
            net::send(&sending, HOST_SEED, kib, &c[0], || !s.load(Ordering::Relaxed))
        });
        let c = Arc::clone(&counters);
        let receive = thread::spawn(move || net::receive(&receiving, GUEST_SEED, &c[1], &c[2]));
        Ok(Self { stop, socket, counters, threads: vec![send, receive] })
    }

    /// So far.
    pub fn sum(&self) -> Streamed {
        let [sent, received, bad] =
            [0, 1, 2].map(|i: usize| self.counters[i].load(Ordering::Relaxed));
        Streamed { sent, received, bad }
    }

    /// Whether both directions are still up.
    pub fn is_alive(&self) -> bool {
        self.threads.iter().all(|t| !t.is_finished())
    }

    /// Ends the stream.
    pub fn finish(mut self) -> Streamed {
        self.stop.store(true, Ordering::Relaxed);
        // The sender's last bytes go out before the connection is closed.
        thread::sleep(Duration::from_millis(300));
        let _ = self.socket.shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.sum()
    }
}
