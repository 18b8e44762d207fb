//! Numbered datagrams with checked content: what is lost, doubled, late or wrong is counted, and how
//! long nothing came. A receiver that is told to wait leaves what comes in the kernel's buffers, as the
//! device wrote it.
#![allow(unsafe_code)]

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::is_told;
use crate::pattern::Stream;

/// The number in front of the content.
const NUMBER: usize = 8;
/// Largest number that a receiver takes.
const MOST: u64 = 1 << 24;

fn content(seed: u64, number: u64) -> Stream {
    Stream::new(seed ^ number.rotate_left(32))
}

/// The sender.
#[derive(clap::Args)]
pub struct Send {
    #[arg(long)]
    to: SocketAddrV4,
    #[arg(long)]
    seed: u64,
    /// Bytes of each
    #[arg(long, default_value_t = 64)]
    size: usize,
    #[arg(long, default_value_t = 0)]
    first: u64,
    #[arg(long)]
    count: u64,
    /// Datagrams a second; 0 as fast as it goes
    #[arg(long, default_value_t = 0)]
    pps: u64,
    /// End when this file is there
    #[arg(long)]
    until: Option<PathBuf>,
}

impl Send {
    pub(super) fn run(&self) -> io::Result<Value> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        let mut buf = vec![0; self.size.max(NUMBER)];
        let (mut sent, mut errors) = (0u64, 0u64);
        let start = Instant::now();
        while sent < self.count && !is_told(self.until.as_ref()) {
            if let Some(ns) = (sent * 1_000_000_000).checked_div(self.pps) {
                let due = start + Duration::from_nanos(ns);
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            let number = self.first + sent;
            let (head, rest) = buf.split_at_mut(NUMBER);
            head.copy_from_slice(&number.to_le_bytes());
            content(self.seed, number).fill(rest);
            errors += u64::from(socket.send_to(&buf, self.to).is_err());
            sent += 1;
        }
        Ok(json!({ "sent": sent, "errors": errors }))
    }
}

/// The receiver.
#[derive(clap::Args)]
pub struct Receive {
    #[arg(long)]
    port: u16,
    #[arg(long)]
    seed: u64,
    /// The socket's buffer, MiB
    #[arg(long, default_value_t = 8)]
    buffer: i32,
    /// Read nothing before this file is there
    #[arg(long)]
    wait: Option<PathBuf>,
    /// End when nothing has come for so long after the first, milliseconds
    #[arg(long, default_value_t = 3000)]
    idle: u64,
}

/// What came.
#[derive(Default)]
struct Seen {
    numbers: Vec<u64>,
    received: u64,
    doubled: u64,
    late: u64,
    bad: u64,
    next: u64,
    longest: Duration,
}

impl Seen {
    fn take(&mut self, seed: u64, datagram: &[u8]) {
        self.received += 1;
        let number = datagram.first_chunk::<NUMBER>().map(|n| u64::from_le_bytes(*n));
        let Some(number) = number.filter(|n| *n < MOST) else {
            self.bad += 1;
            return;
        };
        let wrong = content(seed, number).check(&datagram[NUMBER..]) > 0;
        self.bad += u64::from(wrong);
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if self.numbers.len() <= word {
            self.numbers.resize(word + 1, 0);
        }
        self.doubled += u64::from(self.numbers[word] & bit != 0);
        self.numbers[word] |= bit;
        self.late += u64::from(number < self.next);
        self.next = self.next.max(number + 1);
    }
}

impl Receive {
    pub(super) fn run(&self) -> io::Result<Value> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, self.port))?;
        let bytes = self.buffer.saturating_mul(1 << 20);
        // SAFETY: the option takes an int, which outlives the call.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVBUFFORCE,
                std::ptr::from_ref(&bytes).cast(),
                size_of::<i32>() as libc::socklen_t,
            )
        };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
        while self.wait.is_some() && !is_told(self.wait.as_ref()) {
            thread::sleep(Duration::from_millis(20));
        }
        let mut seen = Seen::default();
        let mut buf = vec![0; 65_536];
        let mut last = None;
        loop {
            socket.set_read_timeout(last.map(|_| Duration::from_millis(self.idle)))?;
            let n = match socket.recv(&mut buf) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            };
            let now = Instant::now();
            let gap = last.map_or(Duration::ZERO, |last| now - last);
            seen.longest = seen.longest.max(gap);
            last = Some(now);
            seen.take(self.seed, &buf[..n]);
        }
        Ok(json!({
            "received": seen.received, "doubled": seen.doubled, "late": seen.late, "bad": seen.bad,
            "next": seen.next, "longest-gap-ms": seen.longest.as_secs_f64() * 1e3,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(seed: u64, number: u64) -> Vec<u8> {
        let mut d = vec![0; 100];
        d[..NUMBER].copy_from_slice(&number.to_le_bytes());
        content(seed, number).fill(&mut d[NUMBER..]);
        d
    }

    #[test]
    fn what_is_doubled_late_or_wrong_is_counted() {
        let mut seen = Seen::default();
        for number in [0, 1, 3, 3, 2] {
            seen.take(7, &datagram(7, number));
        }
        let mut broken = datagram(7, 4);
        broken[99] ^= 1;
        seen.take(7, &broken);
        seen.take(7, &[1, 2]);
        assert_eq!((seen.received, seen.doubled, seen.late, seen.bad), (7, 1, 2, 2));
        assert_eq!(seen.next, 5);
    }
}
