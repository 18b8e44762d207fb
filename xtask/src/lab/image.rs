//! The lab host's initramfs: busybox, the modules that it needs, and an init that makes this
//! machine's file system the root, with an overlay in memory on top, and starts the agent.

use std::fs;
use std::path::PathBuf;

use crate::cpio::Archive;
use crate::kernel::{self, Flavour};
use crate::{Result, paths};

/// Modules loaded before the root is there.
const EARLY: &[&str] = &["virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console"];
/// Modules loaded right after; more can be had inside with modprobe.
const LATE: &[&str] = &["kvm-amd", "vhost_net", "tun", "bridge", "veth"];

const INIT: &str = r#"#!/bin/busybox sh
# Init of the lab host.
bb() { /bin/busybox "$@"; }
bb mount -t proc proc /proc
bb mount -t sysfs sys /sys
bb mount -t devtmpfs dev /dev
. /job/settings
for m in $(bb cat /modules/order); do bb insmod /modules/$m || echo "lab: $m does not load"; done
o=version=9p2000.L,trans=virtio,msize=512000
bb mount -t 9p -o $o,ro,cache=loose host /lower || echo "lab: no root"
bb mount -t tmpfs -o size=75% tmpfs /upper
bb mkdir -p /upper/up /upper/work
bb mount -t overlay -o lowerdir=/lower,upperdir=/upper/up,workdir=/upper/work,xino=off,redirect_dir=off overlay /root || echo "lab: no overlay"
bb mount -t 9p -o $o,cache=loose target "/root$TARGET" || echo "lab: no target directory"
for d in dev proc sys; do bb mkdir -p /root/$d; bb mount --move /$d /root/$d; done
bb mkdir -p /root/dev/pts /root/dev/shm /root/run /root/lib/modules
bb mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /root/dev/pts
bb mount -t tmpfs shm /root/dev/shm
bb mount -t tmpfs run /root/run
bb mount -t cgroup2 cgroup2 /root/sys/fs/cgroup
bb mkdir -p "/root/lib/modules/$KERNEL" /root/run/lab /root/run/lock
bb mount --bind "/root$MODULES" "/root/lib/modules/$KERNEL"
bb mv /job/* /root/run/lab/
bb ip link set lo up
bb hostname tern-lab
bb ln -sf /proc/self/fd /root/dev/fd
bb ln -sf fd/0 /root/dev/stdin; bb ln -sf fd/1 /root/dev/stdout; bb ln -sf fd/2 /root/dev/stderr
bb chroot /root /run/lab/agent lab-agent /run/lab
echo "lab: the agent ended with $?"
bb sync
bb poweroff -f
"#;

/// What is booted.
pub struct Image {
    /// The lab host's kernel package.
    pub kernel: kernel::Kernel,
    /// The archive without a job.
    pub initramfs: PathBuf,
}

/// Builds the lab host's image when that has not been done for this version of its recipe.
pub fn ensure() -> Result<Image> {
    fs::create_dir_all(paths::lab())
        .map_err(|e| format!("cannot make {}: {e}", paths::lab().display()))?;
    let _lock = super::lock::hold(&paths::lab().join(".lock"))?;
    let kernel = kernel::ensure(Flavour::Host)?;
    let initramfs = paths::lab().join("host-initramfs.cpio");
    let stamp = paths::lab().join("host-initramfs.stamp");
    let recipe = format!("{}\n{EARLY:?}{LATE:?}\n{INIT}", kernel.version);
    if initramfs.exists() && fs::read_to_string(&stamp).is_ok_and(|s| s == recipe) {
        return Ok(Image { kernel, initramfs });
    }
    let mut archive = Archive::new();
    for dir in ["bin", "proc", "sys", "dev", "root", "lower", "upper", "modules", "job"] {
        archive.dir(dir);
    }
    archive.char_device("dev/console", 5, 1);
    archive.copy("bin/busybox", 0o755, "/bin/busybox".as_ref())?;
    archive.file("init", 0o755, INIT.as_bytes());
    let mut order = String::new();
    let names: Vec<&str> = EARLY.iter().chain(LATE).copied().collect();
    for path in kernel.module_files(&names)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        archive.copy(&format!("modules/{name}"), 0o644, &path)?;
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    fs::write(&initramfs, archive.finish())
        .map_err(|e| format!("cannot write {}: {e}", initramfs.display()))?;
    fs::write(&stamp, recipe).map_err(|e| format!("cannot write {}: {e}", stamp.display()))?;
    Ok(Image { kernel, initramfs })
}
