//! The null back end: takes everything, gives nothing.

use std::sync::Arc;

use crate::link::{AtEnd, Link, Medium};
use crate::pump::{Pump, Setup};
use crate::{Chardev, Error};

/// It runs on the common pump so that a `logfile=` works on it, too.
pub(crate) fn open(setup: Setup) -> Result<Arc<dyn Chardev>, Error> {
    let link = Link {
        input: None,
        output: None,
        medium: Medium::Stream,
        at_end: AtEnd::KeepWriting,
        max_write: usize::MAX,
        name: "null".into(),
    };
    Ok(Arc::new(Pump::start(setup, Box::new(crate::pump::NoMore("null".into())), Some(link))?))
}
