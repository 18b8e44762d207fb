//! Requests to an image and their completions.

use crate::Buffer;

/// What is to be done. Offsets and lengths are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Fills the buffer from `offset`. Bytes past the end of the image read as zero.
    Read { offset: u64 },
    /// Writes the buffer at `offset`; `durable`: it is on stable storage when it completes.
    Write { offset: u64, durable: bool },
    /// All writes completed so far are on stable storage when it completes.
    Flush,
    /// The contents of the range are no longer needed.
    Discard { offset: u64, len: u64 },
    /// The range reads as zeroes afterwards; `unmap`: its space may be given back.
    WriteZeroes { offset: u64, len: u64, unmap: bool },
}

/// An operation with its buffer. `token` is the caller's and comes back unchanged.
#[derive(Debug)]
pub struct Request {
    pub op: Op,
    pub buffer: Buffer,
    pub token: u64,
}

/// A request that is done.
#[derive(Debug)]
pub struct Completion {
    pub request: Request,
    /// The error, if it failed; what was read or written then is undefined.
    pub result: std::io::Result<()>,
}
