//! From a description to a running process: character devices, machine, monitors, start, end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chardev::{Chardev, Options};
use crossbeam_channel::Sender;
use qapi::{Commands, EventBus, Monitor};

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
    let monitors = start_monitors(&spec, &chardevs, &control, &events)?;
    signals::started();
    start(&control, &spec)?;
    ready();
    let settle = || flush(&monitors, Instant::now() + DRAIN);
    let status = driver::drive(machine.as_ref(), &asked, &events, spec.actions, &settle);
    finish(&control, &chardevs, &monitors);
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
        all.push(chardev::open(config, options).map_err(|e| e.to_string())?);
    }
    for (chardev, config) in all.iter().zip(&spec.chardevs) {
        if matches!(config.kind, spec::ChardevKind::Socket { server: true, wait: true, .. }) {
            crate::tell!("tern: info: waiting for a connection: {}", config.told());
        }
        chardev.wait_connected();
    }
    Ok(all)
}

fn start_monitors(
    spec: &spec::Machine,
    chardevs: &[Arc<dyn Chardev>],
    control: &Arc<Control>,
    events: &EventBus,
) -> Result<Vec<Monitor>, String> {
    let mut all = Vec::with_capacity(spec.monitors.len());
    for monitor in &spec.monitors {
        let chardev = find_chardev(chardevs, &monitor.chardev)?;
        let commands: Arc<dyn Commands> = control.clone();
        let made = match monitor.mode {
            spec::MonitorMode::Control => Monitor::qmp(chardev, commands, events, monitor.pretty),
            spec::MonitorMode::Readline if is_mux(spec, &monitor.chardev) => {
                Monitor::hmp_on_mux(chardev, commands)
            }
            spec::MonitorMode::Readline => Monitor::hmp(chardev, commands),
        };
        all.push(made.map_err(|e| format!("monitor on '{}': {e}", monitor.chardev))?);
    }
    Ok(all)
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

/// Waits until the monitors have nothing more to say, or until `deadline`.
fn flush(monitors: &[Monitor], deadline: Instant) {
    monitors.iter().for_each(|monitor| monitor.flush(deadline));
}

/// Stops what runs, so that disks are flushed and nothing is written half, and lets every client
/// read what was meant for it.
fn finish(control: &Control, chardevs: &[Arc<dyn Chardev>], monitors: &[Monitor]) {
    if let Some((machine, migration)) = &control.machine {
        migration.cancel();
        machine.end();
    }
    let deadline = Instant::now() + DRAIN;
    flush(monitors, deadline);
    for chardev in chardevs {
        chardev.drain(deadline);
        chardev.close();
    }
}
