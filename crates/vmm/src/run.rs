//! From a description to a running process: character devices, machine, monitors, start, end.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chardev::{Chardev, Options};
use crossbeam_channel::Sender;
use qapi::{Commands, ControlServer, ControlSocket, EventBus, Monitor};

use crate::assemble;
use crate::commands::Control;
use crate::driver;
use crate::migration::Migration;
use crate::signals;
use crate::vcpus::Request;

/// How long output to character devices may take at the end.
const DRAIN: Duration = Duration::from_millis(500);

/// Runs the machine that `spec` describes until it ends; returns the process's exit status. `ready`
/// is called once monitors listen (a daemon's parent may go then). Call [`prepare_process`] first.
pub fn run(spec: spec::Machine, ready: impl FnOnce()) -> i32 {
    match try_run(spec, ready) {
        Ok(status) => status,
        Err(e) => {
            crate::tell!("tern: {e}");
            1
        }
    }
}

/// What must happen before any thread is started.
pub fn prepare_process() {
    signals::block();
}

fn try_run(spec: spec::Machine, ready: impl FnOnce()) -> Result<i32, String> {
    for warning in &spec.warnings {
        crate::tell!("tern: warning: {warning}");
    }
    let (requests, asked) = crossbeam_channel::unbounded();
    signals::watch(requests.clone()).map_err(|e| format!("signal thread: {e}"))?;
    let events = EventBus::new();
    // Before anything takes time: who asks early waits for the answer.
    let bind = |path: &std::path::PathBuf| ControlSocket::bind(path).map_err(|e| e.to_string());
    let socket = spec.process.control.as_ref().map(bind).transpose()?;
    let chardevs = open_chardevs(&spec, &requests)?;
    let machine = match spec.machine_type {
        spec::MachineType::None => None,
        _ => Some(assemble::build(&spec, &chardevs, &events, &requests)?),
    };
    let control = Arc::new(Control {
        machine: machine.clone().map(|m| {
            let migration = Migration::new(m.clone());
            (m, migration)
        }),
        spec: spec.clone(),
        chardevs: chardevs.clone(),
        requests,
    });
    // Whoever is greeted by a monitor may count on it that the VM can be migrated to.
    listen(&control, &spec)?;
    let monitors = Monitors::start(&spec, socket, &control, &events)?;
    signals::started();
    start(&control, &spec)?;
    ready();
    let settle = || monitors.flush(Instant::now() + DRAIN);
    let status = driver::drive(machine.as_ref(), &asked, &events, spec.actions, &settle);
    finish(&control, monitors);
    Ok(status)
}

fn open_chardevs(
    spec: &spec::Machine,
    requests: &Sender<Request>,
) -> Result<Vec<Arc<dyn Chardev>>, String> {
    let mut all = Vec::with_capacity(spec.chardevs.len());
    for config in &spec.chardevs {
        let monitor = spec.monitors.iter().any(|m| m.chardev == config.id);
        let options = if monitor { Options::monitor() } else { Options::serial() };
        let quit = requests.clone();
        let options = options.with_quit(Arc::new(move || {
            let _ = quit.send(Request::Quit(0));
        }));
        let chardev = chardev::open(config, options).map_err(|e| e.to_string())?;
        if let Some(path) = chardev.filename().strip_prefix("pty:") {
            // The words, and that it is standard output, are QEMU's: scripts read them.
            let mut to = std::io::stdout().lock();
            let _ = writeln!(to, "char device redirected to {path} (label {})", config.id);
        }
        all.push(chardev);
    }
    for (chardev, config) in all.iter().zip(&spec.chardevs) {
        if matches!(config.kind, spec::ChardevKind::Socket { server: true, wait: true, .. }) {
            crate::tell!("tern: info: waiting for a connection: {}", config.told());
        }
        chardev.wait_connected();
    }
    Ok(all)
}

/// Who is answered: the monitors that the user asked for, and the `tern` commands.
struct Monitors {
    all: Vec<Monitor>,
    server: Option<ControlServer>,
}

impl Monitors {
    fn start(
        spec: &spec::Machine,
        socket: Option<ControlSocket>,
        control: &Arc<Control>,
        events: &EventBus,
    ) -> Result<Self, String> {
        let commands = || -> Arc<dyn Commands> { control.clone() };
        let mut all = Vec::with_capacity(spec.monitors.len());
        for monitor in &spec.monitors {
            let chardev = find_chardev(&control.chardevs, &monitor.chardev)?;
            let made = match monitor.mode {
                spec::MonitorMode::Control => {
                    Monitor::qmp(chardev, commands(), events, monitor.pretty)
                }
                spec::MonitorMode::Readline if is_mux(spec, &monitor.chardev) => {
                    Monitor::hmp_on_mux(chardev, commands())
                }
                spec::MonitorMode::Readline => Monitor::hmp(chardev, commands()),
            };
            all.push(made.map_err(|e| format!("monitor on '{}': {e}", monitor.chardev))?);
        }
        let server = socket.map(|socket| socket.serve(commands(), events)).transpose();
        Ok(Self { all, server: server.map_err(|e| format!("control socket: {e}"))? })
    }

    /// Waits until nobody has anything more to be told, or until `deadline`.
    fn flush(&self, deadline: Instant) {
        self.all.iter().for_each(|monitor| monitor.flush(deadline));
        if let Some(server) = &self.server {
            server.flush(deadline);
        }
    }
}

fn is_mux(spec: &spec::Machine, id: &str) -> bool {
    spec.chardevs.iter().any(|c| c.id == id && c.mux)
}

/// The chardev called `id`.
pub fn find_chardev(chardevs: &[Arc<dyn Chardev>], id: &str) -> Result<Arc<dyn Chardev>, String> {
    let found = chardevs.iter().find(|c| c.label() == id);
    found.cloned().ok_or_else(|| format!("chardev '{id}' not found"))
}

/// Waits for a guest to come, where one was told to.
fn listen(control: &Control, spec: &spec::Machine) -> Result<(), String> {
    let Some((_, migration)) = &control.machine else { return Ok(()) };
    match spec.process.incoming.as_deref() {
        None | Some("defer") => Ok(()),
        Some(uri) => {
            let uri = uri.parse().map_err(|e: migrate::Error| format!("-incoming: {e}"))?;
            migration.listen(uri).map_err(|e| format!("-incoming: {e}"))
        }
    }
}

/// Runs the guest, or leaves it to the monitor or to the migration that it comes by.
fn start(control: &Control, spec: &spec::Machine) -> Result<(), String> {
    match &control.machine {
        Some((machine, _)) if spec.process.incoming.is_none() && !spec.process.paused => {
            machine.cont().map_err(|e| e.to_string())
        }
        _ => Ok(()),
    }
}

/// Stops what runs, so that disks are flushed and nothing is written half, and lets every client
/// read what was meant for it.
fn finish(control: &Control, monitors: Monitors) {
    if let Some((machine, migration)) = &control.machine {
        migration.end();
        machine.end();
    }
    let deadline = Instant::now() + DRAIN;
    monitors.flush(deadline);
    if let Some(server) = monitors.server {
        server.close(deadline);
    }
    for chardev in &control.chardevs {
        chardev.drain(deadline);
        chardev.close();
    }
}
