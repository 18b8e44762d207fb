//! [`ClientListener`]: a unix socket that takes several clients at once, each as a [`Chardev`] of
//! its own. (A socket chardev takes one client after another, as QEMU's does.)

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use spec::SocketAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::pump::{NoMore, Pump, Setup, Source};
use crate::socket::Server;
use crate::{Chardev, Error, Options, sys};

/// See the module's header. The socket's file goes away with it.
pub struct ClientListener {
    label: String,
    server: Server,
    wake: Arc<EventFd>,
}

/// Ends another thread's [`ClientListener::next`].
#[derive(Clone)]
pub struct Waker(Arc<EventFd>);

impl Waker {
    /// The next call, or the one that waits now, returns at once.
    pub fn wake(&self) {
        // It can only fail when the counter is full, and then it is awake.
        let _ = self.0.write(1);
    }
}

impl ClientListener {
    /// Listens on `path`, in place of a dead server's socket. `label`: what the clients' chardevs
    /// are called. Errors: the path is too long, taken, or cannot be listened on.
    pub fn bind(label: &str, path: &Path) -> Result<Self, Error> {
        let address = SocketAddress::Unix { path: path.into() };
        let server = Server::new(label, &address)?;
        let failed = |source| Error::Setup { who: label.into(), what: "its eventfd", source };
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(failed)?);
        Ok(Self { label: label.into(), server, wake })
    }

    /// What ends the waiting in [`next`](Self::next).
    pub fn waker(&self) -> Waker {
        Waker(self.wake.clone())
    }

    /// Waits for a client, for `timeout` at most (`None`: for ever) or until it is woken. With
    /// `accepting` false new clients wait, in the kernel's queue. Errors: a client came for whom
    /// there is no thread, or nothing can be waited for.
    pub fn next(
        &mut self,
        accepting: bool,
        timeout: Option<Duration>,
    ) -> Result<Option<Arc<dyn Chardev>>, Error> {
        let (fd, events) = match self.server.waiting_on() {
            Some(wait) if accepting => wait,
            _ => (-1, 0),
        };
        let mut set = [sys::pollfd(self.wake.as_raw_fd(), libc::POLLIN), sys::pollfd(fd, events)];
        let retry = self.server.timeout().filter(|_| accepting);
        let timeout = [timeout, retry].into_iter().flatten().min();
        let failed =
            |what, source: io::Error| Error::Setup { who: self.label.clone(), what, source };
        sys::poll(&mut set, timeout).map_err(|e| failed("its socket", e))?;
        if set[0].revents != 0 {
            let _ = self.wake.read();
        }
        if !accepting {
            return Ok(None);
        }
        let Some(link) = self.server.next() else { return Ok(None) };
        let setup = Setup {
            label: self.label.clone(),
            who: self.label.clone(),
            options: Options::monitor(),
            log: None,
            wait: false,
        };
        let gone = Box::new(NoMore(self.server.idle_name()));
        Ok(Some(Arc::new(Pump::start(setup, gone, Some(link))?)))
    }
}
