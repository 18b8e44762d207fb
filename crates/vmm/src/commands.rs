//! QMP commands on a machine: [`qapi::Commands`], one short function a command.

use std::sync::Arc;

use chardev::Chardev;
use crossbeam_channel::Sender;
use qapi::{ClientFds, Commands, Error};
use serde_json::{Value, json};

use crate::machine::Machine;
use crate::migration::Migration;
use crate::runstate::RunState;
use crate::vcpus::Request;

/// The command handler of all monitors of this process.
pub struct Control {
    /// The machine and its migrations; `None` with `-machine none`.
    pub machine: Option<(Arc<Machine>, Migration)>,
    pub spec: spec::Machine,
    pub chardevs: Vec<Arc<dyn Chardev>>,
    pub requests: Sender<Request>,
}

impl Commands for Control {
    fn execute(&self, name: &str, arguments: Value, _fds: &ClientFds) -> Result<Value, Error> {
        match name {
            "query-status" => Ok(self.status()),
            "query-name" => Ok(self.name()),
            "query-uuid" => Ok(json!({"UUID": self.spec.uuid.to_string()})),
            "query-kvm" => Ok(json!({"enabled": self.machine.is_some(), "present": true})),
            "query-chardev" => Ok(self.chardevs()),
            "quit" => {
                let _ = self.requests.send(Request::Quit(0));
                Ok(json!({}))
            }
            _ => {
                let Some((machine, migration)) = &self.machine else {
                    return Err(Error::generic(format!(
                        "{name}: there is no machine (-machine none)"
                    )));
                };
                on_machine(machine, migration, name, &arguments)
            }
        }
    }
}

impl Control {
    fn state(&self) -> RunState {
        self.machine.as_ref().map_or(RunState::Prelaunch, |(m, _)| m.state())
    }

    fn status(&self) -> Value {
        let state = self.state();
        json!({
            "status": state.name(), "singlestep": false, "running": state == RunState::Running,
        })
    }

    fn name(&self) -> Value {
        match &self.spec.name {
            Some(name) => json!({ "name": name }),
            None => json!({}),
        }
    }

    fn chardevs(&self) -> Value {
        let one = |c: &Arc<dyn Chardev>| {
            json!({
                "label": c.label(), "filename": c.filename(), "frontend-open": c.frontend_open(),
            })
        };
        self.chardevs.iter().map(one).collect()
    }
}

fn on_machine(
    machine: &Arc<Machine>,
    migration: &Migration,
    name: &str,
    arguments: &Value,
) -> Result<Value, Error> {
    let done = || Ok(json!({}));
    match name {
        "cont" => {
            if !migration.force_release() {
                migration.insist()?;
                machine.cont()?;
            }
            done()
        }
        "stop" => machine.stop().map_err(Error::generic).and_then(|()| done()),
        "system_reset" => {
            machine.reset(false, "host-qmp-system-reset").map_err(Error::generic)?;
            done()
        }
        "system_powerdown" => {
            machine.power_button();
            done()
        }
        "migrate" => migration.start(arguments),
        "migrate-incoming" => migration.incoming(arguments),
        "migrate_cancel" => {
            migration.cancel()?;
            done()
        }
        "migrate-set-capabilities" => migration.set_capabilities(arguments),
        "migrate-set-parameters" => migration.set_parameters(arguments),
        "query-migrate" => Ok(migration.query()),
        "query-migrate-capabilities" => Ok(migration.capabilities()),
        "query-migrate-parameters" => Ok(migration.parameters()),
        "query-cpus-fast" => Ok(cpus(machine)),
        "query-block" => Ok(machine.parts.disks.iter().map(|d| d.describe()).collect()),
        "query-pci" => Ok(crate::pci_info::describe(&machine.parts.pci)),
        "x-query-network" => Ok(machine.parts.nics.iter().map(|n| n.describe()).collect()),
        "set_link" => set_link(machine, arguments),
        _ => Err(Error {
            class: qapi::ErrorClass::CommandNotFound,
            desc: format!("The command {name} has not been found"),
        }),
    }
}

fn cpus(machine: &Machine) -> Value {
    let smp = &machine.parts.spec.smp;
    let one = |(i, tid): (usize, i32)| {
        let index = i as u32;
        let thread = index % smp.threads;
        let core = index / smp.threads % smp.cores;
        let die = index / (smp.threads * smp.cores) % smp.dies;
        let socket = index / (smp.threads * smp.cores * smp.dies);
        let mut props = json!({"socket-id": socket, "core-id": core, "thread-id": thread});
        if smp.dies > 1 {
            props["die-id"] = json!(die);
        }
        json!({
            "thread-id": tid,
            "props": props,
            "qom-path": format!("/machine/unattached/device[{i}]"),
            "cpu-index": i,
            "target": "x86_64",
        })
    };
    machine.parts.vcpus.thread_ids().into_iter().enumerate().map(one).collect()
}

fn set_link(machine: &Machine, arguments: &Value) -> Result<Value, Error> {
    let name = arguments["name"].as_str().unwrap_or_default();
    let up = arguments["up"].as_bool().unwrap_or(true);
    let nic = machine.parts.nics.iter().find(|n| n.is_called(name));
    nic.ok_or_else(|| Error::device_not_found(name))?.set_link(up);
    Ok(json!({}))
}
