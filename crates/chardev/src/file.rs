//! The file back end: all output goes to a file; and the log file of any back end.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use crate::link::{AtEnd, Link, Medium};
use crate::pump::{NoMore, Pump, Setup};
use crate::{Chardev, Error};

pub(crate) fn open(setup: Setup, path: &Path, append: bool) -> Result<Arc<dyn Chardev>, Error> {
    let file = create(path, append).map_err(|source| Error::Open {
        who: setup.who.clone(),
        what: "output file",
        path: path.into(),
        source,
    })?;
    let link = Link {
        input: None,
        output: Some(Arc::new(OwnedFd::from(file))),
        medium: Medium::Stream,
        at_end: AtEnd::KeepWriting,
        max_write: usize::MAX,
        name: "file".into(),
    };
    Ok(Arc::new(Pump::start(setup, Box::new(NoMore("file".into())), Some(link))?))
}

/// Opens the file that gets a copy of all output.
pub(crate) fn open_log(who: &str, path: &Path, append: bool) -> Result<File, Error> {
    create(path, append).map_err(|source| Error::Open {
        who: who.into(),
        what: "log file",
        path: path.into(),
        source,
    })
}

fn create(path: &Path, append: bool) -> std::io::Result<File> {
    // Non-blocking: a FIFO without a reader is refused instead of hanging the start.
    OpenOptions::new()
        .create(true)
        .write(true)
        .append(append)
        .truncate(!append)
        .mode(0o666)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}
