//! The switch as the control thread has it: ports, mirrors, poll threads. All changes go through
//! here, one at a time; poll threads hear of them by message and by a new table.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::bounded;
use serde::{Deserialize, Serialize};
use tracing::Level;

use crate::capture::{self, Capture};
use crate::config::{Config, PortSpec, PortType};
use crate::interface_port::InterfacePort;
use crate::port::{Kind, Link, Port, VhostPort};
use crate::queue::{Io, Queue};
use crate::shared::{Message, Shared};
use crate::table::{MAX_PORTS, PortId, PortView, Table};
use crate::vhost_port::VhostDevice;
use crate::{Error, Result, threads};

/// Seconds after which an address is forgotten, unless configured.
pub const AGEING: u32 = 300;
/// Addresses that the forwarding database holds, unless configured.
pub const MACS: usize = 8192;

/// Copies of ports' frames for another port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    pub name: String,
    /// Ports whose frames are copied.
    pub select: Vec<String>,
    /// Frames that come in from them.
    #[serde(default)]
    pub rx: bool,
    /// Frames that leave to them.
    #[serde(default)]
    pub tx: bool,
    /// The port that gets the copies, and nothing else.
    pub output: String,
}

/// The switch.
pub struct Switch {
    pub shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    pub ports: Vec<Option<Port>>,
    pub mirrors: BTreeMap<String, Mirror>,
    ageing: u32,
    started: Instant,
}

fn no_port(name: &str) -> Error {
    Error::Config(format!("there is no port '{name}'"))
}

impl Switch {
    /// Starts poll threads and adds the configured ports.
    ///
    /// # Errors
    /// A sentence that names what cannot be.
    pub fn start(config: &Config) -> Result<Self> {
        config.check()?;
        let count = config.cpus.len().max(1);
        let macs = config.macs.unwrap_or(MACS);
        let shared = Shared::new(count, macs, config.poll).map_err(Error::host("eventfd"))?;
        let mut switch = Self {
            shared: shared.clone(),
            threads: Vec::new(),
            ports: Vec::new(),
            mirrors: BTreeMap::new(),
            ageing: config.ageing.unwrap_or(AGEING),
            started: Instant::now(),
        };
        for thread in 0..count {
            switch.threads.push(threads::start(&shared, thread, config.cpus.get(thread).copied())?);
        }
        for spec in &config.port {
            switch.add_port(spec.clone())?;
        }
        Ok(switch)
    }

    /// All ports.
    pub fn ports(&self) -> impl Iterator<Item = &Port> {
        self.ports.iter().flatten()
    }

    /// Port `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn port(&self, name: &str) -> Result<&Port> {
        self.ports().find(|p| p.spec.name == name).ok_or_else(|| no_port(name))
    }

    /// Port `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn port_mut(&mut self, name: &str) -> Result<&mut Port> {
        let found = self.ports.iter_mut().flatten().find(|p| p.spec.name == name);
        found.ok_or_else(|| no_port(name))
    }

    /// Port `id`.
    pub fn by_id(&mut self, id: PortId) -> Option<&mut Port> {
        self.ports.get_mut(usize::from(id)).and_then(Option::as_mut)
    }

    /// Adds a port.
    ///
    /// # Errors
    /// A sentence; nothing is left of it then.
    pub fn add_port(&mut self, spec: PortSpec) -> Result<PortId> {
        spec.check()?;
        for p in self.ports() {
            if p.spec.name == spec.name {
                return Err(Error::Config(format!("there is a port '{}' already", spec.name)));
            }
            fn same<T: PartialEq>(a: &Option<T>, b: &Option<T>) -> bool {
                a.is_some() && a == b
            }
            if same(&p.spec.ifname, &spec.ifname) {
                let text = format!("port '{}' has this interface already", p.spec.name);
                return Err(Error::Port { port: spec.name, reason: text });
            }
            if same(&p.spec.path, &spec.path) {
                let text = format!("port '{}' has this socket already", p.spec.name);
                return Err(Error::Port { port: spec.name, reason: text });
            }
        }
        let id = self.ports.iter().position(Option::is_none).unwrap_or(self.ports.len());
        if id >= MAX_PORTS {
            return Err(Error::Config(format!("there are {MAX_PORTS} ports already")));
        }
        let id = id as PortId;
        let count = self.threads.len();
        let threads: Vec<u16> =
            (0..usize::from(spec.queues)).map(|i| ((usize::from(id) + i) % count) as u16).collect();
        let (kind, ios) = self.open(id, &spec, &threads)?;
        let port = Port::new(id, spec, kind, threads);
        self.add_queues(&port, ios);
        if usize::from(id) == self.ports.len() {
            self.ports.push(None);
        }
        self.ports[usize::from(id)] = Some(port);
        self.publish();
        Ok(id)
    }

    fn open(&self, id: PortId, spec: &PortSpec, threads: &[u16]) -> Result<(Kind, Vec<Io>)> {
        if spec.kind == PortType::VhostUser {
            let device = VhostDevice::new(self.shared.clone(), id, threads.to_vec());
            let port = VhostPort::new(spec, device)?;
            let ios = threads.iter().map(|_| Io::Vhost { rx: None, tx: None }).collect();
            return Ok((Kind::Vhost(port), ios));
        }
        let failed = |reason: String| Error::Port { port: spec.name.clone(), reason };
        let (port, ios) = InterfacePort::open(spec).map_err(failed)?;
        Ok((Kind::Interface(port), ios))
    }

    /// Gives poll threads the queues of a port.
    fn add_queues(&self, port: &Port, ios: Vec<Io>) {
        for (i, io) in ios.into_iter().enumerate() {
            let on = !matches!(io, Io::Vhost { .. });
            let queue = Queue {
                port: port.id,
                index: i as u16,
                io,
                counters: port.counters[i].clone(),
                rx_enabled: on,
                tx_enabled: on,
                rx_broken: false,
            };
            self.shared.mailboxes[usize::from(port.threads[i])].send(Message::Add(Box::new(queue)));
        }
    }

    /// Takes a port's queues from the poll threads and closes them here, where it may last. When this
    /// returns nothing touches what was behind them.
    fn remove_queues(&self, id: PortId, threads: &[u16]) {
        for (i, thread) in threads.iter().enumerate() {
            let (done, gone) = bounded(1);
            let message = Message::Remove { port: id, index: i as u16, done };
            self.shared.mailboxes[usize::from(*thread)].send(message);
            drop(gone.recv());
        }
    }

    /// Removes port `name`. When this returns nothing touches what was behind it.
    ///
    /// # Errors
    /// There is none, or a mirror needs it.
    pub fn del_port(&mut self, name: &str) -> Result<()> {
        let id = self.port(name)?.id;
        if let Some(m) = self.mirrors.values().find(|m| m.output == name) {
            let text =
                format!("port '{name}' is the output of mirror '{}': remove that first", m.name);
            return Err(Error::Config(text));
        }
        let Some(mut port) = self.ports[usize::from(id)].take() else { return Err(no_port(name)) };
        // First out of the table: no more frames for it are on their way after the queues are gone.
        self.publish();
        if let Kind::Vhost(v) = &mut port.kind {
            v.detach();
        }
        self.remove_queues(id, &port.threads);
        self.shared.fdb.flush(Some(id));
        for m in self.mirrors.values_mut() {
            m.select.retain(|n| n != name);
        }
        // Nothing is left that it could copy.
        self.mirrors.retain(|_, m| !m.select.is_empty());
        Ok(())
    }

    /// Changes keys of port `name`.
    ///
    /// # Errors
    /// A sentence; nothing has changed then.
    pub fn set_port(&mut self, name: &str, changes: &[(String, String)]) -> Result<()> {
        let port = self.port_mut(name)?;
        let mut spec = port.spec.clone();
        for (i, (key, value)) in changes.iter().enumerate() {
            if changes[..i].iter().any(|(before, _)| before == key) {
                return Err(Error::Config(format!("port '{name}': {key}= is given twice")));
            }
            spec.set(&format!("port '{name}'"), key, value)?;
        }
        spec.check()?;
        let (id, moved) = (port.id, spec.vlans() != port.spec.vlans());
        port.spec = spec;
        port.apply_limits();
        if moved {
            self.shared.fdb.flush(Some(id));
        }
        self.publish();
        Ok(())
    }

    /// Adds a mirror.
    ///
    /// # Errors
    /// A sentence.
    pub fn add_mirror(&mut self, mut m: Mirror) -> Result<()> {
        if self.mirrors.contains_key(&m.name) {
            return Err(Error::Config(format!("there is a mirror '{}' already", m.name)));
        }
        self.port(&m.output)?;
        m.select.iter().try_for_each(|p| self.port(p).map(drop))?;
        if m.select.is_empty() || m.select.contains(&m.output) {
            let text = "a mirror needs ports to copy from, other than its output".into();
            return Err(Error::Config(text));
        }
        if self
            .mirrors
            .values()
            .any(|o| o.select.contains(&m.output) || m.select.contains(&o.output))
        {
            return Err(Error::Config(
                "the output of one mirror cannot be copied by another".into(),
            ));
        }
        if !m.rx && !m.tx {
            (m.rx, m.tx) = (true, true);
        }
        let id = self.port(&m.output)?.id;
        self.shared.fdb.flush(Some(id));
        self.mirrors.insert(m.name.clone(), m);
        self.publish();
        Ok(())
    }

    /// Removes a mirror.
    ///
    /// # Errors
    /// There is none.
    pub fn del_mirror(&mut self, name: &str) -> Result<()> {
        let gone = self.mirrors.remove(name);
        gone.ok_or_else(|| Error::Config(format!("there is no mirror '{name}'")))?;
        self.publish();
        Ok(())
    }

    /// Captures frames of port `name` into `file`.
    ///
    /// # Errors
    /// A sentence.
    pub fn capture(
        &mut self,
        name: &str,
        file: &Path,
        snap: u32,
        rx: bool,
        tx: bool,
    ) -> Result<()> {
        let threads = self.threads.len();
        let id = self.port(name)?.id;
        let cannot = || Error::host(format!("cannot write '{}'", file.display()));
        let (_, identity) = capture::open(file).map_err(cannot())?;
        let same = |p: &&Port| p.captures.iter().any(|c| c.file == identity);
        if let Some(other) = self.ports().find(same) {
            return Err(Error::Config(format!(
                "'{}' is being written already, by a capture of port '{}'",
                file.display(),
                other.spec.name
            )));
        }
        let c = Capture::start(file, snap, threads, rx || !tx, tx || !rx).map_err(cannot())?;
        if let Some(port) = self.ports[usize::from(id)].as_mut() {
            port.captures.push(c);
        }
        self.publish();
        Ok(())
    }

    /// Ends all captures of port `name`; returns frames written and left out, and what went wrong.
    ///
    /// # Errors
    /// There are none.
    pub fn end_captures(&mut self, name: &str) -> Result<(u64, u64, Option<String>)> {
        let ended = std::mem::take(&mut self.port_mut(name)?.captures);
        if ended.is_empty() {
            return Err(Error::Config(format!("port '{name}' is not being captured")));
        }
        self.publish();
        let mut sum = (0, 0, None);
        for c in ended {
            let tap = c.tap.clone();
            drop(c);
            let (written, lost) = tap.progress();
            let failure = tap.failure().map(str::to_owned);
            sum = (sum.0 + written, sum.1 + lost, sum.2.or(failure));
        }
        Ok(sum)
    }

    /// Gives poll threads a new table.
    pub fn publish(&self) {
        let mut views: Vec<Option<PortView>> =
            self.ports.iter().map(|p| p.as_ref().map(Port::view)).collect();
        let id = |name: &str| self.port(name).ok().map(|p| p.id);
        for m in self.mirrors.values() {
            let Some(output) = id(&m.output) else { continue };
            for from in m.select.iter().filter_map(|n| id(n)) {
                if let Some(v) = &mut views[usize::from(from)] {
                    if m.rx {
                        v.mirror_rx.push(output);
                    }
                    if m.tx {
                        v.mirror_tx.push(output);
                    }
                }
            }
            if let Some(v) = &mut views[usize::from(output)] {
                v.mirror_output = true;
            }
        }
        let ports = views.into_iter().map(|v| v.map(|v| Arc::new(v.finished()))).collect();
        self.shared.publish(Table { ports, ageing: self.ageing });
    }

    /// Once a second: time goes on, old addresses are forgotten.
    pub fn tick(&self) {
        let now = u32::try_from(self.started.elapsed().as_secs()).unwrap_or(u32::MAX);
        if self.shared.now.swap(now, Ordering::Relaxed) != now && now.is_multiple_of(5) {
            self.shared.fdb.expire(now, self.ageing);
        }
    }

    /// Says of a port's connection that it is over, and why if somebody broke the rules.
    pub fn disconnect(&mut self, id: PortId, mut reason: Option<String>) {
        let Some(port) = self.by_id(id) else { return };
        match &mut port.kind {
            Kind::Vhost(v) => {
                let Link::Connected(c) = &v.link else { return };
                // Memory that has gone reads as zeroes, and rings of zeroes are wrong in many ways.
                if let (Some(reason), Some(broken)) = (&mut reason, c.broken()) {
                    *reason = broken.to_owned();
                }
                v.detach();
            }
            Kind::Interface(i) => {
                if i.down.is_some() {
                    return;
                }
                let why = reason.clone().unwrap_or_else(|| "its interface has gone".into());
                self.take_down(id, why);
            }
        }
        let Some(port) = self.by_id(id) else { return };
        match reason {
            Some(reason) => port.note_reset(reason),
            None => port.log(Level::INFO, "the other side has gone"),
        }
        self.publish();
    }

    /// Closes everything on a port's interface; [`reopen`](Self::reopen) may bring it back.
    fn take_down(&mut self, id: PortId, why: String) {
        let Some(port) = self.by_id(id) else { return };
        let Kind::Interface(i) = &mut port.kind else { return };
        i.down = Some(why);
        let (attachment, threads) = (i.xdp.take(), port.threads.clone());
        // No more frames for it are on their way after the queues are gone.
        self.publish();
        self.remove_queues(id, &threads);
        // The program goes after the sockets that it gives frames to.
        drop(attachment);
    }

    /// Takes down the ports whose interfaces have gone.
    pub fn look_for_lost_interfaces(&mut self) {
        let gone =
            |p: &&Port| matches!(&p.kind, Kind::Interface(i) if i.down.is_none() && i.is_gone());
        let lost: Vec<PortId> = self.ports().filter(gone).map(|p| p.id).collect();
        lost.into_iter().for_each(|id| self.disconnect(id, None));
    }

    /// Opens the ports anew whose interfaces have come back.
    pub fn reopen(&mut self) {
        let is_down = |p: &Port| matches!(&p.kind, Kind::Interface(i) if i.down.is_some());
        let is_there = |p: &Port| {
            let name = p.spec.ifname.as_deref().unwrap_or_default();
            net::interface::index_of(name).is_ok()
        };
        let back = self.ports().filter(|p| is_down(p) && is_there(p));
        let back: Vec<PortId> = back.map(|p| p.id).collect();
        for id in back {
            let Some(port) = self.by_id(id) else { continue };
            match InterfacePort::open(&port.spec) {
                Ok((opened, ios)) => {
                    port.kind = Kind::Interface(opened);
                    port.log(Level::INFO, "its interface is back");
                    if let Some(port) = self.ports.get(usize::from(id)).and_then(Option::as_ref) {
                        self.add_queues(port, ios);
                    }
                    self.publish();
                }
                Err(why) => {
                    if let Kind::Interface(i) = &mut port.kind {
                        i.down = Some(why);
                    }
                }
            }
        }
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let names: Vec<String> = self.ports().map(|p| p.spec.name.clone()).collect();
        self.mirrors.clear();
        for name in names {
            if let Err(e) = self.del_port(&name) {
                tracing::warn!("{e}");
            }
        }
        for m in &self.shared.mailboxes {
            m.send(Message::Stop);
        }
        for t in self.threads.drain(..) {
            if t.join().is_err() {
                tracing::error!("a poll thread has panicked");
            }
        }
    }
}
