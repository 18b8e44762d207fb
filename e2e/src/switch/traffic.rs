//! Traffic between two guests whose content is checked, both ways, while something else happens to
//! them or to the switch.

use std::time::Duration;

use serde_json::Value;

use super::guest::Guest;
use crate::{Error, Result};

/// What is on its way when streams are told to end may take so long.
const PATIENCE: Duration = Duration::from_secs(50);
/// The port of the streams' receivers.
const PORT: u16 = 7801;
/// This file in a guest ends its senders.
const STOP: &str = "/tmp/stop";

/// Starts a stream each way, of so many KiB a second.
///
/// # Errors
/// When a guest does not do its part.
pub fn start_streams(a: &mut Guest, b: &mut Guest, kib: u32) -> Result<()> {
    for guest in [&mut *a, &mut *b] {
        guest.run(&format!("rm -f {STOP}"))?;
        guest.serve("stream-in", &format!("flow tcp-receive --port {PORT} --seed 41"), PORT)?;
    }
    let (to_a, to_b) = (a.card.ip(), b.card.ip());
    for (guest, to) in [(&mut *a, to_b), (&mut *b, to_a)] {
        let send = format!("flow tcp-send --to {to}:{PORT} --seed 41 --kib {kib} --until {STOP}");
        guest.spawn("stream-out", &send)?;
    }
    Ok(())
}

/// Ends them; the bytes that arrived each way: all that were sent, and right.
///
/// # Errors
/// When they did not.
pub fn end_streams(a: &mut Guest, b: &mut Guest) -> Result<[u64; 2]> {
    for guest in [&mut *a, &mut *b] {
        guest.run(&format!("touch {STOP}"))?;
    }
    Ok([check_stream(a, b)?, check_stream(b, a)?])
}

fn check_stream(from: &mut Guest, to: &mut Guest) -> Result<u64> {
    let sent = from.finish_json("stream-out", PATIENCE)?;
    let got = to.finish_json("stream-in", PATIENCE)?;
    let number = |v: &Value, name: &str| v[name].as_u64();
    let bytes = number(&sent, "sent").unwrap_or(0);
    let all = [number(&sent, "confirmed"), number(&got, "received")] == [Some(bytes); 2];
    if bytes > 0 && all && number(&got, "bad") == Some(0) {
        return Ok(bytes);
    }
    let (from, to) = (&from.vmm.name, &to.vmm.name);
    Err(Error::Protocol(format!("the stream from {from} ({sent}) came to {to} as {got}")))
}
