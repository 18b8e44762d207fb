//! Inside a guest of the switch's tests: an init that runs the commands it is sent ([`agent`]), and
//! senders and receivers of traffic whose content is checked ([`tcp`], [`udp`]), which are called as
//! `flow`. Beside them the guest has busybox, iperf3, ethtool and ping of Debian's.

pub mod agent;
pub mod tcp;
pub mod udp;

use std::path::PathBuf;

use clap::Parser;

/// A sender or a receiver; what it saw is printed as a line of JSON.
#[derive(Parser)]
#[command(name = "flow")]
enum Flow {
    /// Send a stream with checked content
    TcpSend(tcp::Send),
    /// Take one such stream and check it
    TcpReceive(tcp::Receive),
    /// Send numbered datagrams with checked content
    UdpSend(udp::Send),
    /// Take them and check them
    UdpReceive(udp::Receive),
}

/// Runs as the command line says; the exit status.
pub fn tool() -> i32 {
    let said = match Flow::parse() {
        Flow::TcpSend(args) => args.run(),
        Flow::TcpReceive(args) => args.run(),
        Flow::UdpSend(args) => args.run(),
        Flow::UdpReceive(args) => args.run(),
    };
    match said {
        Ok(said) => {
            println!("{said}");
            0
        }
        Err(e) => {
            eprintln!("flow: {e}");
            1
        }
    }
}

/// Whether the file that ends something is there.
fn is_told(file: Option<&PathBuf>) -> bool {
    file.is_some_and(|f| f.exists())
}
