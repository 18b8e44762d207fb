//! Pings at a fixed pace, each accounted for.
#![allow(unsafe_code)]

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::Result;
use crate::error::Context;

/// ICMP, RFC 792.
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
/// Marks this program's pings.
const IDENTIFIER: u16 = 0x7e41;

/// What became of the pings.
#[derive(Default)]
struct Book {
    sent: Vec<Instant>,
    answers: Vec<u32>,
    last_answer: Option<Instant>,
    longest: Duration,
    longest_since: Duration,
}

/// The sum.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sum {
    /// Sent.
    pub sent: u64,
    /// Never answered.
    pub lost: u64,
    /// Answered more than once.
    pub doubled: u64,
    /// The longest time between two answers, milliseconds.
    pub longest_gap_ms: f64,
}

/// A pinger that runs until it is stopped.
pub struct Pinger {
    book: Arc<Mutex<Book>>,
    stop: Arc<AtomicBool>,
    sender: Option<JoinHandle<()>>,
    receiver: Option<JoinHandle<()>>,
}

fn checksum(data: &[u8]) -> u16 {
    let sum: u32 =
        data.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

fn request(number: u32) -> [u8; 56] {
    let mut packet = [0; 56];
    packet[0] = ECHO_REQUEST;
    packet[4..6].copy_from_slice(&IDENTIFIER.to_be_bytes());
    packet[6..8].copy_from_slice(&(number as u16).to_be_bytes());
    packet[8..12].copy_from_slice(&number.to_be_bytes());
    let sum = checksum(&packet);
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// The number of the ping that this IP packet answers.
fn answered(packet: &[u8]) -> Option<u32> {
    let header = usize::from(packet.first()? & 15) * 4;
    let icmp = packet.get(header..)?;
    (icmp.len() >= 12 && icmp[0] == ECHO_REPLY && icmp[4..6] == IDENTIFIER.to_be_bytes())
        .then(|| u32::from_be_bytes([icmp[8], icmp[9], icmp[10], icmp[11]]))
}

fn lock(book: &Mutex<Book>) -> std::sync::MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

fn send(socket: &OwnedFd, to: Ipv4Addr, number: u32) -> io::Result<()> {
    let packet = request(number);
    let addr = libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(to.octets()) },
        sin_zero: [0; 8],
    };
    // SAFETY: packet and address outlive the call, and their lengths are theirs.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const addr).cast(),
            size_of::<libc::sockaddr_in>() as u32,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn receive(socket: &OwnedFd, book: &Mutex<Book>) {
    let mut buf = [0u8; 2048];
    // SAFETY: the buffer outlives the call and its length is its own.
    let n = unsafe { libc::recv(socket.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), 0) };
    let Some(number) = usize::try_from(n).ok().and_then(|n| answered(&buf[..n])) else { return };
    let mut book = lock(book);
    let Some(answers) = book.answers.get_mut(number as usize) else { return };
    *answers += 1;
    let now = Instant::now();
    if let Some(last) = book.last_answer {
        let gap = now - last;
        book.longest = book.longest.max(gap);
        book.longest_since = book.longest_since.max(gap);
    }
    book.last_answer = Some(now);
}

impl Pinger {
    /// Pings `to` every `pace`.
    ///
    /// # Errors
    /// Without the right to a raw socket.
    pub fn start(to: Ipv4Addr, pace: Duration) -> Result<Self> {
        // SAFETY: socket takes no memory.
        let fd = unsafe {
            libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_ICMP)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context(|| "a raw socket for pings".into());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let socket = Arc::new(unsafe { OwnedFd::from_raw_fd(fd) });
        let wait = libc::timeval { tv_sec: 0, tv_usec: 50_000 };
        // SAFETY: SO_RCVTIMEO takes a timeval, which outlives the call.
        unsafe {
            libc::setsockopt(
                fd,
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const wait).cast(),
                size_of::<libc::timeval>() as u32,
            )
        };
        let book = Arc::new(Mutex::new(Book::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let ended = Arc::new(AtomicBool::new(false));
        let (b, s, e, k) =
            (Arc::clone(&book), Arc::clone(&stop), Arc::clone(&ended), Arc::clone(&socket));
        let sender = thread::spawn(move || {
            for number in 0.. {
                if s.load(Ordering::Relaxed) {
                    break;
                }
                {
                    let mut book = lock(&b);
                    book.sent.push(Instant::now());
                    book.answers.push(0);
                }
                // A frame that cannot be sent counts as lost.
                let _ = send(&k, to, number);
                thread::sleep(pace);
            }
            // The last answers may be on their way.
            let until = Instant::now() + Duration::from_secs(3);
            while Instant::now() < until && lock(&b).answers.contains(&0) {
                thread::sleep(Duration::from_millis(10));
            }
            e.store(true, Ordering::Relaxed);
        });
        let b = Arc::clone(&book);
        let receiver = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                receive(&socket, &b);
            }
        });
        Ok(Self { book, stop, sender: Some(sender), receiver: Some(receiver) })
    }

    /// The longest time between two answers since this was asked last.
    pub fn take_gap(&self) -> Duration {
        std::mem::take(&mut lock(&self.book).longest_since)
    }

    /// Sends no more, waits for answers that are on their way, and adds up.
    pub fn finish(mut self) -> Sum {
        self.stop.store(true, Ordering::Relaxed);
        for thread in [self.sender.take(), self.receiver.take()].into_iter().flatten() {
            let _ = thread.join();
        }
        let book = lock(&self.book);
        Sum {
            sent: book.sent.len() as u64,
            lost: book.answers.iter().filter(|n| **n == 0).count() as u64,
            doubled: book.answers.iter().filter(|n| **n > 1).count() as u64,
            longest_gap_ms: book.longest.as_secs_f64() * 1e3,
        }
    }
}

impl Drop for Pinger {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_a_good_checksum() {
        assert_eq!(checksum(&request(0x1_2345)), 0);
    }

    #[test]
    fn only_answers_to_our_pings_count() {
        let mut packet = vec![0x45; 20];
        packet.extend(request(77));
        assert_eq!(answered(&packet), None);
        packet[20] = ECHO_REPLY;
        assert_eq!(answered(&packet), Some(77));
        assert_eq!(answered(&packet[..25]), None);
    }
}
