//! A stream with checked content from one guest to another. The receiver says at the end how much it
//! had, so that the sender knows that all of it has come.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use super::is_told;
use crate::guest::net;

/// The sender.
#[derive(clap::Args)]
pub struct Send {
    #[arg(long)]
    to: SocketAddrV4,
    #[arg(long)]
    seed: u64,
    /// KiB a second
    #[arg(long, default_value_t = 1 << 30)]
    kib: u64,
    /// End after so many bytes
    #[arg(long, default_value_t = u64::MAX)]
    bytes: u64,
    /// End when this file is there
    #[arg(long)]
    until: Option<PathBuf>,
}

impl Send {
    pub(super) fn run(&self) -> std::io::Result<Value> {
        let mut stream = TcpStream::connect(self.to)?;
        let sent = AtomicU64::new(0);
        let go_on = || sent.load(Ordering::Relaxed) < self.bytes && !is_told(self.until.as_ref());
        net::send(&stream, self.seed, self.kib, &sent, go_on)?;
        stream.shutdown(Shutdown::Write)?;
        let mut confirmed = [0; 8];
        stream.read_exact(&mut confirmed)?;
        let confirmed = u64::from_le_bytes(confirmed);
        Ok(json!({ "sent": sent.load(Ordering::Relaxed), "confirmed": confirmed }))
    }
}

/// The receiver.
#[derive(clap::Args)]
pub struct Receive {
    #[arg(long)]
    port: u16,
    #[arg(long)]
    seed: u64,
}

impl Receive {
    pub(super) fn run(&self) -> std::io::Result<Value> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, self.port))?;
        let (mut stream, _) = listener.accept()?;
        let (received, bad) = (AtomicU64::new(0), AtomicU64::new(0));
        net::receive(&stream, self.seed, &received, &bad)?;
        let received = received.load(Ordering::Relaxed);
        stream.write_all(&received.to_le_bytes())?;
        Ok(json!({ "received": received, "bad": bad.load(Ordering::Relaxed) }))
    }
}
