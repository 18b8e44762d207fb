//! Orders and status as JSON lines, over TCP and on the serial line.
//!
//! `{"op":"status"}`, `{"op":"verify"}` (looks at all of the memory), `{"op":"rate","pages":N}`,
//! `{"op":"poweroff"}`, `{"op":"reboot"}`.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use serde::{Deserialize, Serialize};

use super::gap::{Seen, Watch};
use super::{CONTROL_PORT, disk::Disk, init, memory::Memory, net::Tcp};

/// The guest's work.
pub struct Work {
    /// Its sense of time.
    pub watch: Watch,
    /// Its memory.
    pub memory: Memory,
    /// Its disk.
    pub disk: Disk,
    /// Its streams.
    pub tcp: Arc<Tcp>,
}

/// What a guest says of its work.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// Its monotonic clock, milliseconds.
    pub uptime_ms: f64,
    /// Gaps in it.
    pub gap: Seen,
    /// Pages worked on.
    pub mem_pages: u64,
    /// Pages changed.
    pub mem_dirtied: u64,
    /// Pages found wrong.
    pub mem_bad: u64,
    /// Blocks written.
    pub disk_written: u64,
    /// Blocks read again and compared.
    pub disk_checked: u64,
    /// Blocks found wrong.
    pub disk_bad: u64,
    /// Bytes sent on streams.
    pub tcp_sent: u64,
    /// Bytes received on streams and compared.
    pub tcp_received: u64,
    /// Of these, wrong ones.
    pub tcp_bad: u64,
}

/// An order.
#[derive(Debug, Deserialize, Serialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Order {
    /// Say what was done; the gap since the last query starts anew.
    Status,
    /// Look at all of the memory, then as `Status`.
    Verify,
    /// Change so many pages a second from now on.
    Rate {
        /// Pages a second.
        pages: u64,
    },
    /// Power off.
    Poweroff,
    /// Restart.
    Reboot,
}

impl Work {
    /// The counters now.
    pub fn status(&self) -> Status {
        let get = |c: &std::sync::atomic::AtomicU64| c.load(Ordering::Relaxed);
        Status {
            uptime_ms: init::uptime_ms(),
            gap: self.watch.seen(true),
            mem_pages: self.memory.len() as u64,
            mem_dirtied: get(&self.memory.dirtied),
            mem_bad: get(&self.memory.bad),
            disk_written: get(&self.disk.written),
            disk_checked: get(&self.disk.checked),
            disk_bad: get(&self.disk.bad),
            tcp_sent: get(&self.tcp.sent),
            tcp_received: get(&self.tcp.received),
            tcp_bad: get(&self.tcp.bad),
        }
    }

    /// Does what a line says; the answer is a line of JSON.
    pub fn obey(&self, line: &str) -> String {
        match serde_json::from_str(line) {
            Err(e) => serde_json::json!({ "error": e.to_string() }).to_string(),
            Ok(Order::Poweroff) => init::stop(false),
            Ok(Order::Reboot) => init::stop(true),
            Ok(Order::Rate { pages }) => {
                self.memory.rate.store(pages, Ordering::Relaxed);
                "{}".into()
            }
            Ok(order) => {
                if matches!(order, Order::Verify) {
                    self.memory.verify();
                }
                serde_json::to_string(&self.status())
                    .unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}"))
            }
        }
    }
}

/// Answers over TCP for ever.
pub fn serve(work: &Arc<Work>) -> std::io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, CONTROL_PORT))?;
    for connection in listener.incoming() {
        let Ok(connection) = connection else { continue };
        let work = Arc::clone(work);
        thread::spawn(move || -> std::io::Result<()> {
            let mut to = connection.try_clone()?;
            for line in BufReader::new(connection).lines() {
                to.write_all(format!("{}\n", work.obey(&line?)).as_bytes())?;
            }
            Ok(())
        });
    }
    Ok(())
}

/// Answers on the serial line for ever; answers begin with `TERN-GUEST REPLY`.
pub fn serve_serial(work: &Work, tty: std::fs::File) -> std::io::Result<()> {
    let mut to = tty.try_clone()?;
    for line in BufReader::new(tty).lines() {
        let line = line?;
        if !line.trim().is_empty() {
            to.write_all(format!("TERN-GUEST REPLY {}\n", work.obey(&line)).as_bytes())?;
        }
    }
    Ok(())
}
