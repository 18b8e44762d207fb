//! What replies and events consist of, against `shapes.json`: the keys and types that QEMU 7.2.22
//! gave for the same command line and commands. A key that ends in `?` was not in every element of
//! a list. Tern's own additions begin with `x-tern`; what it adds otherwise is named here.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use e2e::qmp::Event;
use e2e::vmm::{Config, Vmm};
use serde_json::{Value, json};

/// Where Tern says more than QEMU does: of migrations, the counters at both sides and always.
const MORE: &[(&str, &[&str])] = &[
    ("query-migrate, listening", &["status", "ram", "total-time"]),
    ("query-migrate, received", &["ram", "total-time", "setup-time", "downtime"]),
];

/// What of `value` is not as `shape` says, with where it is.
fn differences(at: &str, value: &Value, shape: &Value, more: &[&str], out: &mut Vec<String>) {
    match (value, shape) {
        (Value::Object(value), Value::Object(shape)) => {
            let shape: BTreeMap<_, _> = shape
                .iter()
                .map(|(k, v)| (k.trim_end_matches('?'), (v, k.ends_with('?'))))
                .collect();
            for (key, (shape, optional)) in &shape {
                match value.get(*key) {
                    Some(value) => differences(&format!("{at}.{key}"), value, shape, &[], out),
                    None if *optional => {}
                    None => out.push(format!("{at}.{key} is missing")),
                }
            }
            let known = |k: &str| shape.contains_key(k) || more.contains(&k);
            let unknown = value.keys().filter(|k| !known(k) && !k.starts_with("x-tern"));
            out.extend(unknown.map(|k| format!("{at}.{k} is not QEMU's")));
        }
        (Value::Array(value), Value::Array(shape)) => match shape.first() {
            Some(shape) => {
                for (i, value) in value.iter().enumerate() {
                    differences(&format!("{at}[{i}]"), value, shape, &[], out);
                }
                // A whole reply that is empty would pass for any; a list inside one may be empty.
                if value.is_empty() && !at.contains(['.', '[']) {
                    out.push(format!("{at} is empty"));
                }
            }
            None if value.is_empty() => {}
            None => out.push(format!("{at} is not empty")),
        },
        (Value::Number(_), Value::String(s)) if s == "number" => {}
        (Value::String(_), Value::String(s)) if s == "string" => {}
        (Value::Bool(_), Value::String(s)) if s == "bool" => {}
        (_, Value::String(s)) if s == "any" => {}
        _ => out.push(format!("{at} is {value}, not {shape}")),
    }
}

struct Check {
    golden: Value,
    wrong: Vec<String>,
}

impl Check {
    fn see(&mut self, what: &str, value: &Value) {
        let shape = &self.golden[what];
        assert!(!shape.is_null(), "{what} is not in shapes.json");
        let more = MORE.iter().find(|(w, _)| *w == what).map_or(&[][..], |(_, m)| *m);
        differences(what, value, shape, more, &mut self.wrong);
    }

    fn event(&mut self, event: &Event) {
        let shape = self.golden["events"][&event.name].clone();
        assert!(shape.is_object(), "event {} is not in shapes.json", event.name);
        assert!(event.stamp > 1e9, "{event:?}");
        match shape.get("data") {
            Some(shape) => differences(&event.name, &event.data, shape, &[], &mut self.wrong),
            None => assert!(event.data.is_null(), "{event:?}"),
        }
    }

    fn execute(&mut self, vm: &mut Vmm, command: &str, arguments: Value) -> Value {
        let reply = vm.qmp.execute(command, arguments).unwrap();
        self.see(command, &reply);
        reply
    }
}

/// The same words as for the recording.
fn config(dir: &Path) -> Config {
    let words = "-S -chardev null,id=s0 -device isa-serial,chardev=s0 \
                 -device pcie-root-port,id=rp1,chassis=1,port=1 -smp 2,sockets=1,cores=2 \
                 -device virtio-rng-pci,id=rng0,bus=rp1";
    let extra = words.split_whitespace().map(str::to_owned).collect();
    let tiny = e2e::tiny::config(env!("CARGO_BIN_EXE_tern"), dir).unwrap();
    Config { name: "a".into(), memory_mib: 64, cpus: 2, extra, ..tiny }
}

fn migrate(check: &mut Check, vm: &mut Vmm, to: &mut Vmm) {
    let reply = to.qmp.execute("query-migrate", Value::Null).unwrap();
    check.see("query-migrate, listening", &reply);
    let port = reply["socket-address"][0]["port"].as_str().unwrap();
    let uri = format!("tcp:127.0.0.1:{port}");
    // Slowly, so that it is seen under way.
    let slow = json!({"max-bandwidth": 20_000});
    vm.qmp.execute("migrate-set-parameters", slow).unwrap();
    check.execute(vm, "migrate", json!({"uri": uri}));
    let until = Instant::now() + Duration::from_secs(60);
    let (mut active, mut reply) = (0, Value::Null);
    while reply["status"] != "completed" {
        assert!(Instant::now() < until, "{reply}");
        std::thread::sleep(Duration::from_millis(5));
        reply = vm.qmp.execute("query-migrate", Value::Null).unwrap();
        if reply["status"] == "active" {
            check.see("query-migrate, active", &reply);
            active += 1;
            if active == 3 {
                let fast = json!({"max-bandwidth": 0});
                vm.qmp.execute("migrate-set-parameters", fast).unwrap();
            }
        }
    }
    assert!(active > 0, "the migration was never seen under way");
    check.see("query-migrate, completed", &reply);
    assert_eq!(vm.status().unwrap(), "postmigrate");
    while to.status().unwrap() == "inmigrate" {
        assert!(Instant::now() < until, "the destination does not take over");
        std::thread::sleep(Duration::from_millis(5));
    }
    // As QEMU: a guest that never ran has not run at the destination either.
    assert_eq!(to.status().unwrap(), "prelaunch");
    check.see("query-migrate, received", &to.qmp.execute("query-migrate", Value::Null).unwrap());
}

#[test]
fn replies_and_events_are_qemus() {
    if !e2e::tiny::has_kvm() {
        return;
    }
    let golden = serde_json::from_str(include_str!("shapes.json")).unwrap();
    let mut check = Check { golden, wrong: Vec::new() };
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let mut vm = config.start(dir.path(), None).unwrap();
    check.see("greeting", &vm.qmp.greeting.clone());
    for query in check.golden.as_object().unwrap().clone().keys() {
        if query.starts_with("query-") && !query.contains(',') {
            check.execute(&mut vm, query, Value::Null);
        }
    }
    let events = json!({"capabilities": [{"capability": "events", "state": true}]});
    vm.qmp.execute("migrate-set-capabilities", events).unwrap();
    for command in ["cont", "stop", "system_reset", "system_powerdown"] {
        check.execute(&mut vm, command, Value::Null);
    }
    let hmp = json!({"command-line": "info status"});
    let said = check.execute(&mut vm, "human-monitor-command", hmp);
    // A reset machine that does not run is one that never ran.
    assert_eq!(said, "VM status: paused (prelaunch)\r\n");

    let to = Config { name: "b".into(), incoming: Some("defer".into()), ..config };
    let mut to = to.start(dir.path(), None).unwrap();
    check.execute(&mut to, "migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"}));
    migrate(&mut check, &mut vm, &mut to);
    check.execute(&mut vm, "migrate_cancel", Value::Null);
    check.execute(&mut vm, "quit", Value::Null);
    let mut names: Vec<_> = vm.qmp.events().map(|e| e.name.clone()).collect();
    let events: Vec<_> = vm.qmp.events().cloned().collect();
    let last = vm.qmp.wait_event("SHUTDOWN", Duration::from_secs(10)).unwrap();
    names.push(last.name.clone());
    for event in events.iter().chain([&last]) {
        check.event(event);
    }
    for name in check.golden["events"].as_object().unwrap().keys() {
        assert!(names.contains(name), "{name} was not sent: {names:?}");
    }
    assert_eq!(check.wrong, [""; 0]);
}
