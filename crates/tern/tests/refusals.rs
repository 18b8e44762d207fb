//! A destination that is configured otherwise refuses before memory moves, and both sides name what
//! differs.

use std::time::{Duration, Instant};

use e2e::vmm::Config;
use serde_json::{Value, json};

/// What the source has, what the destination has, and what both say of it.
const CASES: &[(&str, &str, &str)] = &[
    (
        "-device pcie-root-port,id=rp,chassis=1",
        "-device pcie-root-port,id=rp,chassis=2",
        "device rp, chassis: the source has 1, the destination 2",
    ),
    (
        "-device pcie-root-port,id=rp,chassis=1,slot=3",
        "-device pcie-root-port,id=rp,chassis=1,slot=4",
        "device rp, slot: the source has 3, the destination 4",
    ),
    (
        "-device pcie-root-port,id=rp,chassis=1,port=0x10",
        "-device pcie-root-port,id=rp,chassis=1,port=0x11",
        "device rp, port: the source has 16, the destination 17",
    ),
    (
        "-device pcie-root-port,id=rp,chassis=1,multifunction=on",
        "-device pcie-root-port,id=rp,chassis=1",
        "device rp, multifunction: the source has on, the destination off",
    ),
    (
        "-device virtio-blk-pci,id=vd,drive=disk0,queue-size=128",
        "-device virtio-blk-pci,id=vd,drive=disk0,queue-size=64",
        "device vd, queue sizes: the source has 128, the destination 64",
    ),
    (
        "-device virtio-blk-pci,id=vd,drive=disk0,queue-size=64",
        "-device virtio-blk-pci,id=vd,drive=disk0,queue-size=128",
        "device vd, queue sizes: the source has 64, the destination 128",
    ),
    (
        "-device virtio-blk-pci,id=vd,drive=disk0,serial=A",
        "-device virtio-blk-pci,id=vd,drive=disk0",
        "device vd, serial: the source has 'A', the destination ''",
    ),
    (
        "-numa node,cpus=0,mem=8M -numa node,cpus=1,mem=8M",
        "-numa node,cpus=0-1,mem=16M",
        "NUMA nodes (-numa): the source has node 0 (vCPUs 0; 8 MiB), node 1 (vCPUs 1; 8 MiB), \
         the destination node 0 (vCPUs 0,1; 16 MiB)",
    ),
    (
        "-numa node,cpus=0-1,mem=16M",
        "",
        "NUMA nodes (-numa): the source has node 0 (vCPUs 0,1; 16 MiB), the destination none",
    ),
];

#[test]
fn a_machine_that_differs_is_refused_by_name_at_both_sides() {
    if !e2e::tiny::has_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tiny = e2e::tiny::config(env!("CARGO_BIN_EXE_tern"), dir.path()).unwrap();
    let drive =
        format!("-drive if=none,id=disk0,format=raw,file={}", dir.path().join("disk").display());
    for (turn, (theirs, ours, why)) in CASES.iter().enumerate() {
        let config = |side: &str, options: &str, incoming| Config {
            name: format!("{side}{turn}"),
            cpus: 2,
            disk: None,
            extra: format!("{drive} {options}").split_whitespace().map(str::to_owned).collect(),
            incoming,
            ..tiny.clone()
        };
        let mut source = config("source", theirs, None).start(dir.path(), None).unwrap();
        let uri = format!("unix:{}", dir.path().join(format!("in{turn}")).display());
        let to = config("destination", ours, Some(uri.clone())).start(dir.path(), None).unwrap();
        source.qmp.execute("migrate", json!({ "uri": uri })).unwrap();
        let until = Instant::now() + Duration::from_secs(30);
        let info = loop {
            let info = source.qmp.execute("query-migrate", Value::Null).unwrap();
            if info["status"] == "failed" {
                break info;
            }
            assert!(info["status"] != "completed" && Instant::now() < until, "{theirs}: {info}");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(info["error-desc"].as_str().is_some_and(|e| e.contains(why)), "{theirs}: {info}");
        assert_eq!(info["ram"]["normal"], 0, "memory moved: {info}");
        assert_eq!(source.status().unwrap(), "running");
        let log = to.dir.join("stderr.log");
        let said = || std::fs::read_to_string(&log).unwrap();
        while !said().contains(why) {
            assert!(Instant::now() < until, "{theirs}: the destination says: {}", said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
