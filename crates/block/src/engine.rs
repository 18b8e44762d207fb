//! Where requests go in and completions come out. An engine belongs to one thread (a queue's
//! worker), which sleeps on [`Engine::event`].

use std::os::fd::RawFd;

use crate::{Completion, Request};

/// Carries out requests to one image, several at a time and in any order: a flush covers only the
/// writes that completed before it was queued.
///
/// Dropping an engine waits until nothing is in flight.
pub trait Engine: Send {
    /// Takes a request; it begins at the latest with [`submit`](Self::submit). The caller keeps
    /// [`in_flight`](Self::in_flight) below [`capacity`](Self::capacity).
    fn queue(&mut self, request: Request);
    /// Begins everything queued, in one system call where possible.
    fn submit(&mut self) -> std::io::Result<()>;
    /// Moves completions into `done` without waiting.
    fn reap(&mut self, done: &mut Vec<Completion>);
    /// Waits until at least one request completed (at once when none is in flight).
    fn wait(&mut self) -> std::io::Result<()>;
    /// An eventfd that becomes readable when something completed. The engine clears it in
    /// [`reap`](Self::reap).
    fn event(&self) -> RawFd;
    /// Requests taken and not yet given back.
    fn in_flight(&self) -> usize;
    /// Most requests in flight.
    fn capacity(&self) -> usize;
    /// Its name, for logs ("io_uring", "threads").
    fn name(&self) -> &'static str;
}
