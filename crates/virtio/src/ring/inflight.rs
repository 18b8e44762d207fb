//! Which chains are in flight, written down in memory that outlives the process.
//! Source: QEMU's vhost-user specification, "Inflight I/O tracking"; the tables' layout is
//! version 1 of that.
//!
//! The memory is shared with a front end that may write anything there at any time. It is read only
//! when a queue is taken up ([`InflightQueue::open`]), with every number checked; afterwards it is
//! only written, from a copy of one's own.
//!
//! ```text
//!   pop:      take     the entry gets the next number and the mark "in flight"
//!   push:     done     the entry joins the batch (split: linked from last_batch_head)
//!   publish:  (the driver sees the batch), commit: marks cleared, used_idx noted
//! ```
//! A process that dies in between is seen by the next one from `used_idx` and the ring itself.

use std::sync::Arc;

use mem::ForeignMapping;

/// Version of the tables that is read and written.
pub const VERSION: u16 = 1;

/// The in-flight table of one queue.
#[derive(Debug)]
pub struct InflightQueue {
    _mapping: Arc<ForeignMapping>,
}
