//! An independent QMP client, the Python package `qemu.qmp`, gets along with the VMM.

use std::process::Command;

use e2e::testbed::Bed;

#[test]
fn the_python_client_gets_along() {
    let Some(mut bed) = Bed::new("qmp-peer") else { return };
    let Some(python) = std::env::var_os("TERN_QMP_PYTHON") else {
        println!(
            "skipped: there is no Python environment with qemu.qmp (TERN_QMP_PYTHON is not set)"
        );
        return;
    };
    let mut config = bed.config();
    let socket = bed.dir.join("peer");
    config.extra = ["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]
        .map(str::to_owned)
        .to_vec();
    let _vm = bed.start(&config).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/qmp_peer.py");
    let status = Command::new(python).arg(script).arg(&socket).status().unwrap();
    assert!(status.success(), "qmp_peer.py: {status}");
}
