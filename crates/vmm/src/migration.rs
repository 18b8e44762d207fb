//! Migrations of this process, as the monitors see them: the running or last one, its limits and
//! capabilities, and its events.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::Sender;
use migrate::{Events, MigrationInfo, Status, Uri, dest, source};
use parking_lot::Mutex;
use qapi::params::{Capabilities, Parameters};
use qapi::{Error, EventBus};
use serde_json::{Value, json};

use crate::endpoint::MachineEndpoint;
use crate::machine::Machine;
use crate::runstate::RunState;
use crate::vcpus::Request;

/// The running or last migration.
enum Current {
    None,
    Outgoing(source::Handle),
    Incoming(dest::Incoming),
}

struct State {
    current: Current,
    parameters: Parameters,
    capabilities: Capabilities,
}

/// All that monitors can do about migration.
pub struct Migration {
    machine: Arc<Machine>,
    limits: Arc<migrate::Parameters>,
    state: Mutex<State>,
    /// The `events` capability.
    wanted: Arc<AtomicBool>,
}

/// Where the engine's events of one migration go.
struct Told {
    events: EventBus,
    wanted: Arc<AtomicBool>,
    /// Whether it is one into this process. A guest that came in earlier may go out again.
    incoming: bool,
    requests: Sender<Request>,
}

impl Events for Told {
    fn migration(&self, status: Status) {
        if self.wanted.load(Ordering::Acquire) {
            self.events.emit("MIGRATION", Some(json!({"status": status.as_str()})));
        }
    }

    fn pass(&self, pass: u64) {
        if self.wanted.load(Ordering::Acquire) {
            self.events.emit("MIGRATION_PASS", Some(json!({"pass": pass})));
        }
    }

    fn ended(&self, result: &Result<(), migrate::Error>) {
        let Err(e) = result else { return };
        // Of an outgoing one the engine has told already.
        if self.incoming {
            crate::tell!("tern: incoming migration: {e}");
            // As QEMU's: a destination without a guest has nothing left to do.
            let _ = self.requests.send(Request::Quit(1));
        }
    }
}

impl Migration {
    /// For `machine`; nothing runs yet.
    pub fn new(machine: Arc<Machine>) -> Self {
        let state = State {
            current: Current::None,
            parameters: Parameters::default(),
            capabilities: Capabilities::default(),
        };
        Self { machine, limits: Arc::default(), state: Mutex::new(state), wanted: Arc::default() }
    }

    fn told(&self, incoming: bool) -> Arc<Told> {
        let parts = &self.machine.parts;
        Arc::new(Told {
            events: parts.events.clone(),
            wanted: self.wanted.clone(),
            incoming,
            requests: parts.requests.clone(),
        })
    }

    /// `migrate`.
    pub fn start(&self, arguments: &Value) -> Result<Value, Error> {
        if arguments["resume"].as_bool() == Some(true) {
            return Err(Error::generic("resume: only a paused post-copy can be resumed"));
        }
        let uri = parse(arguments)?;
        let mut state = self.state.lock();
        match &state.current {
            Current::Outgoing(h) if !h.status().is_final() => {
                return Err(Error::generic("There's a migration process in progress"));
            }
            Current::Incoming(_) if self.machine.state() == RunState::Inmigrate => {
                return Err(Error::generic("Guest is waiting for an incoming migration"));
            }
            _ => {}
        }
        let endpoint = Arc::new(MachineEndpoint(self.machine.clone()));
        let handle = source::start(endpoint, uri, self.limits.clone(), self.told(false))
            .map_err(|e| Error::generic(e.to_string()))?;
        state.current = Current::Outgoing(handle);
        Ok(json!({}))
    }

    /// `migrate-incoming`, and `-incoming URI`.
    pub fn listen(&self, uri: Uri) -> Result<(), Error> {
        let mut state = self.state.lock();
        if self.machine.state() != RunState::Inmigrate {
            return Err(Error::generic("'-incoming' was not specified on the command line"));
        }
        if let Current::Incoming(_) = state.current {
            return Err(Error::generic("The incoming migration has already been started"));
        }
        let endpoint = Arc::new(MachineEndpoint(self.machine.clone()));
        let incoming = dest::listen(endpoint, &uri, dest::Options::default(), self.told(true))
            .map_err(|e| Error::generic(e.to_string()))?;
        state.current = Current::Incoming(incoming);
        Ok(())
    }

    /// `migrate-incoming`.
    pub fn incoming(&self, arguments: &Value) -> Result<Value, Error> {
        self.listen(parse(arguments)?)?;
        Ok(json!({}))
    }

    /// `migrate_cancel`: does nothing when there is nothing to cancel.
    pub fn cancel(&self) -> Result<(), Error> {
        match &self.state.lock().current {
            Current::Outgoing(h) if h.in_doubt() => Err(Error::generic(
                "The guest was given to a destination that does not answer, and may be there; it \
                 is asked on. Only if the guest does not run there, let it go on here with cont",
            )),
            Current::Outgoing(h) if h.is_past_cancel() => Err(Error::generic(
                "The migration is handing the guest over and cannot be cancelled any more",
            )),
            Current::Outgoing(h) => {
                h.cancel();
                Ok(())
            }
            Current::Incoming(_) | Current::None => Ok(()),
        }
    }

    /// `cont` at a source that is in doubt where the guest is: what its destination says now.
    pub fn insist(&self) -> Result<(), Error> {
        // It may take seconds: other monitors shall see the state meanwhile.
        let handle = match &self.state.lock().current {
            Current::Outgoing(h) => h.clone(),
            _ => return Ok(()),
        };
        handle.insist().map_err(Error::generic)
    }

    /// The process ends: an outgoing migration does not go on.
    pub fn end(&self) {
        match &self.state.lock().current {
            Current::Outgoing(h) => h.cancel(),
            Current::Incoming(i) => i.forget(),
            Current::None => {}
        }
    }

    /// The operator says `cont` for a guest that runs here held, its source out of reach.
    pub fn force_release(&self) -> bool {
        match &self.state.lock().current {
            Current::Incoming(i) => i.force_release(),
            _ => false,
        }
    }

    /// `query-migrate`.
    pub fn query(&self) -> Value {
        let (info, listening) = match &self.state.lock().current {
            Current::None => (MigrationInfo::default(), None),
            Current::Outgoing(h) => (h.info(), None),
            Current::Incoming(i) => (i.info(), (!i.status().is_final()).then(|| i.uri())),
        };
        let mut reply = serde_json::to_value(info).unwrap_or_else(|_| json!({}));
        if let Some(uri) = listening {
            reply["socket-address"] = json!([socket_address(&uri)]);
        }
        reply
    }

    /// `migrate-set-parameters`; effective at once, also in a running migration.
    pub fn set_parameters(&self, arguments: &Value) -> Result<Value, Error> {
        let mut state = self.state.lock();
        let mut new = state.parameters;
        new.apply(arguments)?;
        self.limits.set_downtime_limit_ms(new.downtime_limit).map_err(Error::generic)?;
        self.limits.set_max_bandwidth(new.max_bandwidth);
        state.parameters = new;
        Ok(json!({}))
    }

    /// `query-migrate-parameters`.
    pub fn parameters(&self) -> Value {
        self.state.lock().parameters.to_json()
    }

    /// `migrate-set-capabilities`.
    pub fn set_capabilities(&self, arguments: &Value) -> Result<Value, Error> {
        let mut state = self.state.lock();
        state.capabilities.apply(arguments)?;
        self.wanted.store(state.capabilities.events, Ordering::Release);
        Ok(json!({}))
    }

    /// `query-migrate-capabilities`.
    pub fn capabilities(&self) -> Value {
        self.state.lock().capabilities.to_json()
    }
}

/// Where a destination listens, as QEMU's SocketAddress (qapi/sockets.json).
fn socket_address(uri: &Uri) -> Value {
    match uri {
        Uri::Tcp { host, port } => {
            let host = if host.is_empty() { "::" } else { host };
            let family = if host.contains(':') { "ipv6" } else { "ipv4" };
            json!({"type": "inet", "host": host, "port": port.to_string(), family: true})
        }
        Uri::Unix { path } => json!({"type": "unix", "path": path}),
    }
}

fn parse(arguments: &Value) -> Result<Uri, Error> {
    let uri = arguments["uri"].as_str().unwrap_or_default();
    Uri::from_str(uri).map_err(|e| Error::generic(e.to_string()))
}
