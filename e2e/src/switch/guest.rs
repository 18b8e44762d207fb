//! A guest of QEMU's software CPU at a port of the switch, and the shell in it.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Listens, socket};
use crate::error::Context;
use crate::netguest::agent::{Answer, Order, READY};
use crate::testbed::{BOOT, Bed};
use crate::vmm::{Config, Vmm};
use crate::{Error, Result};

/// How long a command in a guest may take, unless said otherwise.
const PATIENCE: Duration = Duration::from_secs(60);

/// The guest's card, and the port that it is at.
#[derive(Clone, Debug)]
pub struct Card {
    /// The port.
    pub port: String,
    /// Who listens on the port's socket.
    pub listens: Listens,
    /// The last byte of its address.
    pub number: u8,
    /// More properties of the virtio device, each with a comma in front.
    pub more: String,
    /// Under the newest QEMU that there is. Under 7.2 guests that moved were lost now and then, also
    /// where there was nothing of Tern's, with a `virtio-net` on `-netdev user` and private memory: 2 of
    /// 30 moves, one after a return to where no code is. Under 10.0 none of 46 was.
    pub newest: bool,
}

impl Card {
    /// One without further properties.
    pub fn new(port: &str, listens: Listens, number: u8) -> Self {
        Self { port: port.to_owned(), listens, number, more: String::new(), newest: false }
    }

    /// Its address.
    pub fn mac(&self) -> String {
        format!("52:54:00:7e:50:{:02x}", self.number)
    }

    /// The guest's IPv4 address, once [`Guest::configure`] has set it.
    pub fn ip(&self) -> String {
        format!("10.78.0.{}", self.number)
    }
}

/// A guest that runs. Dropping it kills it.
pub struct Guest {
    /// Its QEMU.
    pub vmm: Vmm,
    /// Its card.
    pub card: Card,
    shell: Shell,
}

/// Boots guests, all at a time.
///
/// # Errors
/// When one does not boot.
pub fn boot(bed: &mut Bed, cards: &[Card]) -> Result<Vec<Guest>> {
    let guests: Result<Vec<_>> = cards.iter().map(|c| Guest::start(bed, c, None)).collect();
    let mut guests = guests?;
    guests.iter_mut().try_for_each(Guest::wait_ready)?;
    Ok(guests)
}

impl Guest {
    /// Starts QEMU. The guest takes commands after [`wait_ready`](Self::wait_ready).
    ///
    /// # Errors
    /// When QEMU refuses to start.
    pub fn start(bed: &mut Bed, card: &Card, incoming: Option<&str>) -> Result<Self> {
        let mut config: Config = bed.config();
        let newest = std::env::var("TERN_NEWEST_QEMU").ok().filter(|_| card.newest);
        let mut qemu = newest.as_deref().unwrap_or("qemu-system-x86_64").lines();
        config.program = qemu.next().unwrap_or_default().into();
        config.kvm = false;
        config.memory_mib = 192;
        // Pages that the guest's kernel has not written to are only in the switch's log. Without
        // IPv6 it sends only what it is told to.
        config.append = "init_on_alloc=0 ipv6.disable=1".into();
        config.initrd = std::env::var_os("TERN_NET_INITRD").map(PathBuf::from).unwrap_or_default();
        config.incoming = incoming.map(str::to_owned);
        let shell = bed.dir.join(format!("{}.shell", config.name));
        config.extra = arguments(bed, card, &shell, config.memory_mib, newest.is_some());
        config.extra.extend(qemu.map(str::to_owned));
        let vmm = config.start(&bed.dir, None)?;
        Ok(Self { vmm, card: card.clone(), shell: Shell::connect(&shell)? })
    }

    /// Waits until the guest has booted.
    ///
    /// # Errors
    /// When it does not, or QEMU ends.
    pub fn wait_ready(&mut self) -> Result<()> {
        let until = Instant::now() + BOOT;
        loop {
            match self.shell.line(Duration::from_millis(500)) {
                Ok(line) if line.contains(READY) => return Ok(()),
                Ok(_) => {}
                Err(Error::Timeout { .. }) if Instant::now() < until => self.vmm.check()?,
                Err(e) => return Err(e),
            }
        }
    }

    /// Sets its address up.
    ///
    /// # Errors
    /// When that fails.
    pub fn configure(&mut self) -> Result<()> {
        let ip = self.card.ip();
        self.run(&format!("ip addr add {ip}/24 dev eth0 && ip link set eth0 up")).map(drop)
    }

    /// Runs a command, which has to succeed; what it printed.
    ///
    /// # Errors
    /// When it fails, or takes longer than a minute.
    pub fn run(&mut self, command: &str) -> Result<String> {
        let answer = self.try_run(command)?;
        if answer.status == 0 {
            return Ok(answer.output);
        }
        let (name, Answer { status, output }) = (&self.vmm.name, answer);
        Err(Error::Host(format!("in {name}: {command}: status {status}\n{output}")))
    }

    /// Runs a command.
    ///
    /// # Errors
    /// When it takes longer than a minute.
    pub fn try_run(&mut self, command: &str) -> Result<Answer> {
        let order = Order { run: command.to_owned() };
        let order = serde_json::to_string(&order)
            .map_err(|e| Error::Protocol(format!("{command}: {e}")))?;
        self.shell.write(&order)?;
        let line = self.shell.line(PATIENCE).map_err(|e| match e {
            Error::Timeout { seconds, .. } => Error::Timeout {
                what: format!("{}'s answer to: {command}", self.vmm.name),
                seconds,
            },
            e => e,
        })?;
        serde_json::from_str(&line).map_err(|e| {
            Error::Protocol(format!("{} answers {command:?} with {line:?}: {e}", self.vmm.name))
        })
    }

    /// Starts a command that runs on; [`finish`](Self::finish) has what it printed.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn spawn(&mut self, name: &str, command: &str) -> Result<()> {
        let quiet = format!("(({command}) >/tmp/{name} 2>&1; mv /tmp/{name} /tmp/{name}.done)");
        self.run(&format!("rm -f /tmp/{name}*; {quiet} >/dev/null 2>&1 </dev/null &")).map(drop)
    }

    /// Starts a TCP server as [`spawn`](Self::spawn) does, and waits until it listens.
    ///
    /// # Errors
    /// When it does not.
    pub fn serve(&mut self, name: &str, command: &str, port: u16) -> Result<()> {
        self.spawn(name, command)?;
        self.wait_listening(port)
    }

    /// Waits until something listens on a TCP port.
    ///
    /// # Errors
    /// When nothing does within 10 s.
    pub fn wait_listening(&mut self, port: u16) -> Result<()> {
        self.run(&format!(
            "i=0; until netstat -ltn | grep -q :{port}; do i=$((i+1)); \
             [ $i -gt 500 ] && {{ echo nothing listens on {port}; exit 1; }}; usleep 20000; done"
        ))
        .map(drop)
    }

    /// Waits for the end of what [`spawn`](Self::spawn) started; what it printed.
    ///
    /// # Errors
    /// When it does not end.
    pub fn finish(&mut self, name: &str, patience: Duration) -> Result<String> {
        let tries = patience.as_secs() * 10;
        self.run(&format!(
            "i=0; while ! [ -e /tmp/{name}.done ]; do i=$((i+1)); \
             [ $i -gt {tries} ] && {{ echo {name} has not ended; cat /tmp/{name}; exit 1; }}; \
             usleep 100000; done; cat /tmp/{name}.done"
        ))
    }

    /// The same for a command that prints JSON.
    ///
    /// # Errors
    /// When it does not end, or prints something else.
    pub fn finish_json(&mut self, name: &str, patience: Duration) -> Result<Value> {
        let said = self.finish(name, patience)?;
        parse(name, &said)
    }

    /// Runs a command that prints JSON.
    ///
    /// # Errors
    /// When it fails, or prints something else.
    pub fn run_json(&mut self, command: &str) -> Result<Value> {
        let said = self.run(command)?;
        parse(command, &said)
    }
}

fn parse(what: &str, said: &str) -> Result<Value> {
    serde_json::from_str(said).map_err(|e| Error::Protocol(format!("{what} says {said:?}: {e}")))
}

fn arguments(bed: &Bed, card: &Card, shell: &Path, memory_mib: u32, newest: bool) -> Vec<String> {
    let path = socket(bed, &card.port).display().to_string();
    let listens = match card.listens {
        // Since 9.2 QEMU counts in milliseconds.
        Listens::Switch if newest => "reconnect-ms=10",
        Listens::Switch => "reconnect=1",
        Listens::Peer => "server=on,wait=off",
    };
    // Without KVM, QEMU 7.2 dies of MSI-X on a vhost-user device.
    let device = format!("virtio-net-pci,netdev=net0,mac={},vectors=0{}", card.mac(), card.more);
    [
        ["-object", &format!("memory-backend-memfd,id=ram0,size={memory_mib}M,share=on")],
        ["-machine", "memory-backend=ram0"],
        ["-serial", &format!("unix:{},server=on,wait=off", shell.display())],
        ["-chardev", &format!("socket,id=port0,path={path},{listens}")],
        ["-netdev", "vhost-user,id=net0,chardev=port0"],
        ["-device", &device],
    ]
    .concat()
    .iter()
    .map(|w| (*w).to_owned())
    .collect()
}

/// The connection to the guest's second serial line.
struct Shell {
    reader: BufReader<UnixStream>,
    partial: Vec<u8>,
}

impl Shell {
    fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).context(|| format!("{}", path.display()))?;
        Ok(Self { reader: BufReader::new(stream), partial: Vec::new() })
    }

    fn write(&mut self, line: &str) -> Result<()> {
        let mut to = self.reader.get_ref();
        to.write_all(format!("{line}\n").as_bytes()).context(|| "the guest's shell".into())
    }

    /// The next line that is not empty.
    fn line(&mut self, patience: Duration) -> Result<String> {
        let until = Instant::now() + patience;
        let what = || "the guest's shell".to_owned();
        loop {
            let wait = until.saturating_duration_since(Instant::now());
            let wait = wait.max(Duration::from_millis(1));
            self.reader.get_ref().set_read_timeout(Some(wait)).context(what)?;
            match self.reader.read_until(b'\n', &mut self.partial) {
                Ok(0) => return Err(Error::Protocol("the guest's shell has gone".into())),
                Ok(_) => {
                    let line = std::mem::take(&mut self.partial);
                    let line = String::from_utf8_lossy(&line).trim().to_owned();
                    if !line.is_empty() {
                        return Ok(line);
                    }
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if Instant::now() >= until {
                        let what = "an answer of the guest's shell".into();
                        return Err(Error::Timeout { what, seconds: patience.as_secs() });
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e).context(what),
            }
        }
    }
}
