//! Process 1 of the guest: mounts, modules, clocks, the end.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use super::control::{self, Work};
use super::{Orders, disk::Disk, facts, gap::Watch, memory::Memory, net};

/// The monotonic clock, milliseconds.
pub fn uptime_ms() -> f64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a timespec that outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as f64 * 1e3 + now.tv_nsec as f64 / 1e6
}

/// This thread runs before all ordinary ones. Without the right to that, nothing changes.
pub fn be_urgent() {
    let param = libc::sched_param { sched_priority: 50 };
    // SAFETY: `param` outlives the call; 0 is this thread.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &param) };
}

/// Ends the guest. The network goes first, as on any system that shuts down: Debian's kernel 6.1.192
/// breaks virtio devices at its end, and its network driver then waits for ever for one through which
/// a stream was being sent (the loop in its start_xmit around virtqueue_enable_cb_delayed).
pub fn stop(again: bool) -> ! {
    // Some guests have no card.
    let _ = net::take_down("eth0");
    let how = if again { libc::RB_AUTOBOOT } else { libc::RB_POWER_OFF };
    // SAFETY: neither call takes memory.
    unsafe {
        libc::sync();
        libc::reboot(how);
    }
    loop {
        thread::park();
    }
}

fn mount(kind: &str, at: &str) -> io::Result<()> {
    let text = |s: &str| CString::new(s).map_err(io::Error::other);
    let (kind, at) = (text(kind)?, text(at)?);
    // SAFETY: the strings outlive the call and there is no data argument.
    if unsafe { libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Loads what the file /modules/order names, in that order.
fn load_modules() -> io::Result<()> {
    for name in fs::read_to_string("/modules/order")?.lines() {
        let file = File::open(Path::new("/modules").join(name))?;
        // SAFETY: the string is a literal; the descriptor is open.
        let result =
            unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        if result < 0 {
            eprintln!("tern-guest: {name}: {}", io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A serial line, without echo.
pub fn serial(path: &str) -> io::Result<File> {
    let tty = OpenOptions::new().read(true).write(true).open(path)?;
    // SAFETY: termios is plain data; both calls get one that outlives them.
    unsafe {
        let mut mode: libc::termios = std::mem::zeroed();
        if libc::tcgetattr(tty.as_raw_fd(), &mut mode) == 0 {
            mode.c_lflag &= !libc::ECHO;
            libc::tcsetattr(tty.as_raw_fd(), libc::TCSANOW, &mode);
        }
    }
    Ok(tty)
}

/// Says on the console that something failed.
pub fn complain(what: &str, result: io::Result<()>) {
    if let Err(e) = result {
        eprintln!("tern-guest: {what}: {e}");
    }
}

fn start_network(orders: &Orders, work: &Arc<Work>) -> io::Result<()> {
    let Some(ip) = orders.text("ip") else { return Ok(()) };
    let (ip, prefix) = ip.split_once('/').unwrap_or((ip, "24"));
    let ip = ip.parse().map_err(io::Error::other)?;
    net::configure("eth0", ip, prefix.parse().unwrap_or(24))?;
    let kib = orders.number("tcp", 1024);
    let tcp = Arc::clone(&work.tcp);
    thread::spawn(move || complain("streams", net::serve_streams(&tcp, kib)));
    thread::spawn(|| complain("echo", net::serve_echo()));
    let serving = Arc::clone(work);
    thread::spawn(move || complain("control", control::serve(&serving)));
    Ok(())
}

/// The facts, as a line, when they are asked for.
fn said(orders: &Orders) -> String {
    if orders.number("facts", 0) == 0 {
        return String::new();
    }
    let facts = facts::collect(orders.text("discard"));
    format!("TERN-GUEST FACTS {}\n", serde_json::to_string(&facts).unwrap_or_default())
}

/// Mounts what every guest needs and loads its modules.
pub fn prepare() {
    for (kind, at) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        complain(at, mount(kind, at));
    }
    complain("modules", load_modules());
}

/// Runs the guest; never comes back.
pub fn main() -> ! {
    let started = uptime_ms();
    prepare();
    let orders = Orders::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    let memory = Memory::new(
        orders.number("mem", 0),
        orders.number("random", 50),
        orders.number("rate", 1000),
    );
    let work = Arc::new(Work {
        watch: Watch::default(),
        memory,
        disk: Disk::default(),
        tcp: Arc::default(),
    });
    complain("network", start_network(&orders, &work));
    for job in [|w: &Work| w.watch.run(), |w: &Work| w.memory.run()] {
        let work = Arc::clone(&work);
        thread::spawn(move || job(&work));
    }
    let blocks = orders.number("disk", 0);
    if blocks > 0 {
        let work = Arc::clone(&work);
        thread::spawn(move || complain("/dev/vda", work.disk.run("/dev/vda", blocks)));
    }
    facts::watch_power_button();
    let ready = said(&orders)
        + &format!(
            "TERN-GUEST READY {{\"uptime\":{:.3},\"ready\":{:.3}}}\n",
            started / 1e3,
            uptime_ms() / 1e3
        );
    match serial("/dev/ttyS0") {
        Ok(mut tty) => {
            complain("serial line", tty.write_all(ready.as_bytes()));
            complain("serial line", control::serve_serial(&work, tty));
        }
        Err(_) => eprint!("{ready}"),
    }
    loop {
        thread::park();
    }
}
