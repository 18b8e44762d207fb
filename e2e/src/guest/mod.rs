//! The workload inside a guest.
//!
//! Orders come on the kernel's command line:
//!
//! | word | meaning |
//! |---|---|
//! | `tern.ip=ADDRESS/PREFIX` | eth0's address; without it no network work |
//! | `tern.mem=MIB` | memory to dirty (default 0: none) |
//! | `tern.random=PERCENT` | how much of that is random data (default 50); the rest compresses well |
//! | `tern.rate=PAGES` | pages dirtied a second (default 1000) |
//! | `tern.disk=BLOCKS` | 4 KiB blocks of /dev/vda to write and re-read (default 0: none) |
//! | `tern.facts=1` | say what the machine is ([`facts`]) |
//! | `tern.discard=DISK` | with that, discard and write-zeroes on a disk whose content may go |
//! | `tern.tcp=KIB` | KiB a second that the guest sends on a stream (default 1024) |
//!
//! and later as JSON lines on TCP port [`CONTROL_PORT`] and on ttyS0 ([`control`]).

pub mod control;
pub mod disk;
pub mod facts;
pub mod gap;
pub mod init;
pub mod memory;
pub mod net;

use std::collections::HashMap;

/// JSON lines: orders and status.
pub const CONTROL_PORT: u16 = 7700;
/// Streams with checked content, both ways.
pub const STREAM_PORT: u16 = 7701;
/// Echo of datagrams.
pub const ECHO_PORT: u16 = 7702;
/// What the host sends on a stream.
pub const HOST_SEED: u64 = 0x686f_7374;
/// What the guest sends on a stream.
pub const GUEST_SEED: u64 = 0x6775_6573;

/// What this guest was told on the kernel's command line.
#[derive(Debug, Default)]
pub struct Orders(HashMap<String, String>);

impl Orders {
    /// Takes the `tern.` words from a kernel command line.
    pub fn parse(cmdline: &str) -> Self {
        let words =
            cmdline.split_whitespace().filter_map(|w| w.strip_prefix("tern.")?.split_once('='));
        Self(words.map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
    }

    /// A word's text.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// A word's number, or `default` when it is not there or none.
    pub fn number(&self, name: &str, default: u64) -> u64 {
        self.text(name).and_then(|v| v.parse().ok()).unwrap_or(default)
    }
}

#[cfg(test)]
mod tests {
    use super::Orders;

    #[test]
    fn orders_come_from_the_command_line() {
        let orders =
            Orders::parse("console=ttyS0 tern.ip=10.0.0.2/24 quiet tern.mem=64 tern.rate=x\n");
        assert_eq!(orders.text("ip"), Some("10.0.0.2/24"));
        assert_eq!(orders.number("mem", 0), 64);
        assert_eq!(orders.number("rate", 5), 5);
        assert_eq!(orders.number("disk", 7), 7);
    }
}
