//! The life-cycle driver: the one thread that acts on what guests, signals and monitors ask for.

use std::sync::Arc;

use crossbeam_channel::Receiver;
use qapi::EventBus;
use serde_json::json;

use crate::machine::Machine;
use crate::runstate::RunState;
use crate::vcpus::Request;

/// Acts on requests until one ends the process; returns the exit status. `settle` returns when the
/// monitors have answered what they were asked (or after a while).
pub fn drive(
    machine: Option<&Arc<Machine>>,
    requests: &Receiver<Request>,
    events: &EventBus,
    actions: spec::Actions,
    settle: &dyn Fn(),
) -> i32 {
    let driver = Driver { machine, events, actions, settle };
    loop {
        let Ok(request) = requests.recv() else { return 0 };
        if let Some(status) = driver.act(request) {
            return status;
        }
    }
}

struct Driver<'a> {
    machine: Option<&'a Arc<Machine>>,
    events: &'a EventBus,
    actions: spec::Actions,
    settle: &'a dyn Fn(),
}

impl Driver<'_> {
    /// `Some`: the process ends with that status.
    fn act(&self, request: Request) -> Option<i32> {
        match &request {
            Request::Quit(status) => {
                // The reply to `quit` goes out before the event, as QEMU's.
                (self.settle)();
                self.shutdown_event(false, "host-qmp-quit");
                return Some(*status);
            }
            Request::Signal(signal) => {
                tracing::info!("ends on signal {signal}");
                self.shutdown_event(false, "host-signal");
                return Some(0);
            }
            Request::Reset | Request::Shutdown | Request::InternalError { .. } => {}
        }
        tracing::debug!("{request:?}");
        let machine = self.machine?;
        if machine.defer(&request) {
            return None;
        }
        match request {
            Request::Reset if self.actions.no_reboot => self.power_off("guest-reset"),
            Request::Reset => {
                if let Err(e) = machine.reset(true, "guest-reset") {
                    tracing::error!("reset: {e}");
                    machine.halt(RunState::InternalError);
                }
                None
            }
            Request::Shutdown => self.power_off("guest-shutdown"),
            Request::InternalError { vcpu, reason } => {
                crate::tell!("tern: vCPU {vcpu} cannot go on, the machine is stopped: {reason}");
                machine.halt(RunState::InternalError);
                None
            }
            Request::Quit(_) | Request::Signal(_) => None,
        }
    }

    fn shutdown_event(&self, guest: bool, reason: &str) {
        self.events.emit("SHUTDOWN", Some(json!({"guest": guest, "reason": reason})));
    }

    fn power_off(&self, reason: &str) -> Option<i32> {
        self.shutdown_event(true, reason);
        if !self.actions.no_shutdown {
            return Some(0);
        }
        if let Some(machine) = self.machine {
            machine.halt(RunState::Shutdown);
        }
        None
    }
}
