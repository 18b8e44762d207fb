//! What agent and starter say to each other over the virtio-serial port: frames of a kind byte, a
//! little-endian 32-bit length, and that many bytes.

use std::io::{self, Read, Write};

/// The command's standard output.
pub const STDOUT: u8 = 1;
/// The command's standard error.
pub const STDERR: u8 = 2;
/// The command's exit status, one byte; the last frame.
pub const EXIT: u8 = 3;
/// The agent is there and starts the command.
pub const HELLO: u8 = 5;
/// From the starter: end the command.
pub const KILL: u8 = 4;

/// No frame's contents are longer.
pub const MAX: usize = 64 * 1024;

/// Sends one frame.
pub fn send(to: &mut impl Write, kind: u8, data: &[u8]) -> io::Result<()> {
    debug_assert!(data.len() <= MAX);
    let mut frame = Vec::with_capacity(5 + data.len());
    frame.push(kind);
    frame.extend_from_slice(&(data.len() as u32).to_le_bytes());
    frame.extend_from_slice(data);
    to.write_all(&frame)
}

/// Takes one frame.
pub fn receive(from: &mut impl Read) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    from.read_exact(&mut head)?;
    let len = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if len > MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {len} bytes")));
    }
    let mut data = vec![0; len];
    from.read_exact(&mut data)?;
    Ok((head[0], data))
}
