//! What a host has of what Tern needs or can use: one check each, with what to do when it is
//! missing. Nothing here changes the host; every check ends at once (the Linux probe after 2 s at
//! most).

use std::fs::{self, File};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;

use kvm_ioctls::{Cap, Kvm};

use crate::kvm::DEFAULT_PATH;
use crate::probe;

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// There.
    Pass,
    /// Missing; something optional does not work without it.
    Warn,
    /// Missing; no guest runs without it.
    Fail,
}

/// One thing that was looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// A stable word for scripts ("kvm-device").
    pub id: &'static str,
    /// For people.
    pub name: &'static str,
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do when it is missing; empty for [`Status::Pass`].
    pub advice: String,
}

impl Check {
    fn new(
        id: &'static str,
        name: &'static str,
        missing: Status,
        result: Result<String, String>,
        advice: &str,
    ) -> Self {
        let (status, found, advice) = match result {
            Ok(found) => (Status::Pass, found, String::new()),
            Err(found) => (missing, found, advice.to_owned()),
        };
        Self { id, name, status, found, advice }
    }
}

/// All checks, in the order to be shown.
pub fn checks() -> Vec<Check> {
    let mut out = kvm(Path::new(DEFAULT_PATH));
    out.extend([
        tun(),
        vhost_net(),
        af_xdp(),
        huge_pages(),
        userfaultfd(),
        io_uring(),
        iommu(),
        vfio(),
    ]);
    out
}

/// The worst status of `checks`.
pub fn worst(checks: &[Check]) -> Status {
    checks.iter().map(|c| c.status).max().unwrap_or(Status::Pass)
}

/// Capabilities: id, name, whether guests need it, what it is for.
const CAPABILITIES: &[(Cap, &str, &str, Status, &str)] = &[
    (
        Cap::Irqchip,
        "kvm-irqchip",
        "in-kernel interrupt controllers (KVM_CAP_IRQCHIP)",
        Status::Fail,
        "use a kernel whose KVM has it",
    ),
    (
        Cap::Irqfd,
        "kvm-irqfd",
        "interrupts by eventfd (KVM_CAP_IRQFD)",
        Status::Fail,
        "use a kernel whose KVM has it",
    ),
    (
        Cap::Ioeventfd,
        "kvm-ioeventfd",
        "doorbells by eventfd (KVM_CAP_IOEVENTFD)",
        Status::Fail,
        "use a kernel whose KVM has it",
    ),
    (
        Cap::ImmediateExit,
        "kvm-immediate-exit",
        "interruptible runs (KVM_CAP_IMMEDIATE_EXIT)",
        Status::Fail,
        "use Linux 4.11 or later",
    ),
    (
        Cap::Xsave,
        "kvm-xsave",
        "saving the FPU's state (KVM_CAP_XSAVE)",
        Status::Fail,
        "use a kernel whose KVM has it",
    ),
    (
        Cap::AdjustClock,
        "kvm-adjust-clock",
        "a settable guest clock (KVM_CAP_ADJUST_CLOCK)",
        Status::Fail,
        "use a kernel whose KVM has it",
    ),
];

/// Capabilities that kvm-ioctls has no name for.
const RAW_CAPABILITIES: &[(u32, &str, &str, &str)] = &[
    (
        kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        "kvm-dirty-log-clear",
        "dirty log with manual clear (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)",
        "migration works without it, with longer stalls of the guest; use Linux 5.2 or later",
    ),
    (
        kvm_bindings::KVM_CAP_DIRTY_LOG_RING,
        "kvm-dirty-ring",
        "dirty ring (KVM_CAP_DIRTY_LOG_RING)",
        "only per-vCPU dirty limits need it; use Linux 5.11 or later",
    ),
    (
        kvm_bindings::KVM_CAP_TSC_CONTROL,
        "kvm-tsc-scaling",
        "TSC scaling (KVM_CAP_TSC_CONTROL)",
        "guests keep their TSC's frequency only on hosts with the same one; needs the CPU's support",
    ),
];

fn kvm(path: &Path) -> Vec<Check> {
    let mut out = Vec::new();
    let opened = File::options().read(true).write(true).open(path);
    let advice = match opened.as_ref().map_err(io::Error::raw_os_error) {
        Err(Some(libc::EACCES | libc::EPERM)) => {
            "add this user to the group kvm: usermod -aG kvm USER, and log in anew"
        }
        _ => {
            "enable virtualisation in the firmware, and load its driver: modprobe kvm_intel or \
             kvm_amd"
        }
    };
    let found = opened.as_ref().map(|_| path.display().to_string()).map_err(|e| {
        let path = path.display();
        format!("{path}: {e}")
    });
    out.push(Check::new("kvm-device", "access to KVM's device", Status::Fail, found, advice));
    let Ok(file) = opened else { return out };
    // SAFETY: the fd is owned by `file`, which passes it on.
    let kvm = unsafe { Kvm::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(file)) };
    let version = kvm.get_api_version();
    let found = if version == 12 { Ok("12".to_owned()) } else { Err(format!("{version}, not 12")) };
    out.push(Check::new(
        "kvm-api",
        "KVM's API version",
        Status::Fail,
        found,
        "load the kernel's own KVM",
    ));
    if version == 12 {
        out.push(linux_probe(path));
        out.extend(capabilities(&kvm));
    }
    out
}

fn linux_probe(path: &Path) -> Check {
    let found = probe::can_run_linux(path)
        .map(|r| format!("{} steps in {:.1} ms", r.steps.len(), r.took.as_secs_f64() * 1000.0))
        .map_err(|e| e.to_string());
    let advice = "this KVM emulates the guest's kernel mode and knows too few instructions: use a \
                  host with hardware virtualisation (bare metal, or a VM with nested \
                  virtualisation enabled)";
    Check::new("kvm-linux", "KVM can run Linux", Status::Fail, found, advice)
}

fn capabilities(kvm: &Kvm) -> Vec<Check> {
    let yes = |n: i32| if n > 0 { Ok("yes".to_owned()) } else { Err("no".to_owned()) };
    let named = CAPABILITIES.iter().map(|(cap, id, name, status, advice)| {
        Check::new(id, name, *status, yes(kvm.check_extension_int(*cap)), advice)
    });
    let raw = RAW_CAPABILITIES.iter().map(|(cap, id, name, advice)| {
        let n = kvm.check_extension_raw((*cap).into());
        Check::new(id, name, Status::Warn, yes(n), advice)
    });
    named.chain(raw).collect()
}

fn device(path: &str) -> Result<String, String> {
    let opened = File::options().read(true).write(true).open(path);
    opened.map(|_| path.to_owned()).map_err(|e| format!("{path}: {e}"))
}

fn tun() -> Check {
    let advice = "tap networking needs it: modprobe tun; as a user, let an administrator make the \
                  tap device (ip tuntap add NAME mode tap user USER)";
    Check::new("tun", "tap devices", Status::Warn, device("/dev/net/tun"), advice)
}

fn vhost_net() -> Check {
    let advice = "faster tap networking in the kernel: modprobe vhost_net";
    Check::new("vhost-net", "in-kernel virtio-net", Status::Warn, device("/dev/vhost-net"), advice)
}

fn af_xdp() -> Check {
    // SAFETY: only numbers are passed.
    let ret = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    let result = fd(ret.into()).map(|_| "yes".to_owned()).map_err(|e| e.to_string());
    let advice = "only af-xdp ports of tern switch need it: a kernel with CONFIG_XDP_SOCKETS, and \
                  root's rights";
    Check::new("af-xdp", "AF_XDP sockets", Status::Warn, result, advice)
}

fn number(path: &Path) -> u64 {
    fs::read_to_string(path).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
}

fn huge_pages() -> Check {
    let mut found = Vec::new();
    let sizes = fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
    for entry in sizes {
        let total = number(&entry.path().join("nr_hugepages"));
        let free = number(&entry.path().join("free_hugepages"));
        if total > 0 {
            let name = entry.file_name().to_string_lossy().replace("hugepages-", "");
            found.push(format!("{free} of {total} pages of {name} free"));
        }
    }
    found.sort();
    let result =
        if found.is_empty() { Err("none reserved".to_owned()) } else { Ok(found.join(", ")) };
    let advice = "only guests on huge pages need them: sysctl vm.nr_hugepages=NUMBER";
    Check::new("hugepages", "huge pages", Status::Warn, result, advice)
}

/// Owns what a syscall returned, or tells its error.
fn fd(ret: libc::c_long) -> io::Result<OwnedFd> {
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(ret as i32) })
}

fn userfaultfd() -> Check {
    // SAFETY: only a number is passed.
    let call = || fd(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) });
    let result = match device("/dev/userfaultfd") {
        Ok(path) => Ok(path),
        Err(_) => call().map(|_| "the system call".to_owned()).map_err(|e| e.to_string()),
    };
    let advice = "post-copy migration needs it: sysctl vm.unprivileged_userfaultfd=1, or give this \
                  user access to /dev/userfaultfd";
    Check::new("userfaultfd", "userfaultfd", Status::Warn, result, advice)
}

fn io_uring() -> Check {
    // struct io_uring_params is 120 bytes, all zero to begin with.
    let mut params = [0u64; 15];
    // SAFETY: the kernel reads and writes 120 bytes at params, which it has.
    let ret = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    let result = fd(ret).map(|_| "yes".to_owned()).map_err(|e| e.to_string());
    let advice = "disks fall back to slower I/O without it: use Linux 5.6 or later, and sysctl \
                  kernel.io_uring_disabled=0";
    Check::new("io-uring", "io_uring", Status::Warn, result, advice)
}

fn iommu() -> Check {
    let groups = fs::read_dir("/sys/kernel/iommu_groups").map_or(0, Iterator::count);
    let result = if groups > 0 { Ok(format!("{groups} groups")) } else { Err("no groups".into()) };
    let advice = "only device passthrough needs it: enable the IOMMU in the firmware, and \
                  intel_iommu=on on the kernel's command line on Intel";
    Check::new("iommu", "IOMMU", Status::Warn, result, advice)
}

fn vfio() -> Check {
    let advice = "only device passthrough needs it: modprobe vfio-pci";
    Check::new("vfio", "VFIO", Status::Warn, device("/dev/vfio/vfio"), advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_says_what_to_do_unless_it_passes() {
        let all = checks();
        assert!(all.len() >= 8);
        for (i, c) in all.iter().enumerate() {
            assert_eq!(c.advice.is_empty(), c.status == Status::Pass, "{}", c.id);
            assert!(!c.found.is_empty());
            assert!(all[..i].iter().all(|b| b.id != c.id), "{} twice", c.id);
        }
        let none = kvm(Path::new("/nonexistent"));
        assert_eq!(worst(&none), Status::Fail);
        assert!(none[0].advice.contains("modprobe"));
    }
}
