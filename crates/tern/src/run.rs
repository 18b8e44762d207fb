//! `tern run`: starts a VM from a few friendly options.

use std::path::PathBuf;

use spec::{
    Aio, BlockDriver, BlockNode, Boot, Chardev, ChardevKind, Device, DeviceKind, Machine, Monitor,
    MonitorMode, NetBackend, NetKind, Process, Smp, SocketAddress, VirtioBlk, VirtioNet,
};

use crate::{Outcome, launch, runtime_dir, units};

#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  tern run --kernel bzImage --initrd initrd.img --memory 1G --cpus 2\n  \
                  tern run --name web --detach --kernel vmlinux --append 'console=ttyS0 root=/dev/vda' \\\n      \
                  --disk web.img --net tap=tap0\n  tern console web"
)]
pub struct Args {
    /// Name of the VM [default: vm1, vm2, ...]
    #[arg(long)]
    name: Option<String>,
    /// Linux kernel: a bzImage, or an ELF image with a PVH entry
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0")]
    append: String,
    /// Raw disk image or block device; with ",ro" the guest cannot write to it [repeatable]
    #[arg(long, value_name = "PATH[,ro]")]
    disk: Vec<String>,
    /// Network card: "tap=INTERFACE[,mac=MAC]", or "none" [repeatable]
    #[arg(long, value_name = "NET")]
    net: Vec<String>,
    /// RAM, as 512M or 4G
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::parse_size)]
    memory: u64,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=255))]
    cpus: u32,
    /// Show the guest's console here; C-a x ends the VM, C-a h shows more keys [default]
    #[arg(long, conflicts_with = "detach")]
    console: bool,
    /// Run in the background; `tern console NAME` shows the console
    #[arg(long)]
    detach: bool,
}

/// Most disks, and most network cards.
const MAX_DEVICES: usize = 8;

pub fn run(args: &Args) -> Outcome {
    let name = match &args.name {
        Some(name) => match runtime_dir::find(name) {
            Ok(vm) => {
                return Err(format!("a VM called {name} runs already (pid {})", vm.pid).into());
            }
            Err(_) => name.clone(),
        },
        None => free_name()?,
    };
    Ok(launch::launch(machine(args, &name)?))
}

fn free_name() -> Result<String, runtime_dir::Error> {
    let running = runtime_dir::list()?;
    let taken = |name: &String| running.iter().any(|vm| vm.name == *name);
    let mut names = (1u32..).map(|n| format!("vm{n}"));
    Ok(names.find(|name| !taken(name)).unwrap_or_default())
}

/// The machine that the options describe.
pub fn machine(args: &Args, name: &str) -> Result<Machine, String> {
    runtime_dir::check_name(name).map_err(|error| format!("--name: {error}"))?;
    let mut machine = Machine {
        name: Some(name.into()),
        uuid: uuid::Uuid::new_v4(),
        smp: Smp { cpus: args.cpus, max_cpus: args.cpus, cores: args.cpus, ..Smp::default() },
        memory: args.memory,
        boot: Boot {
            kernel: Some(absolute(&args.kernel)?),
            initrd: args.initrd.as_ref().map(absolute).transpose()?,
            append: args.append.clone(),
        },
        process: Process { daemonize: args.detach, ..Process::default() },
        ..Machine::default()
    };
    add_console(&mut machine, args.detach, name);
    check_count("--net", args.net.len())?;
    check_count("--disk", args.disk.len())?;
    for (i, net) in args.net.iter().enumerate() {
        add_net(&mut machine, i, net)?;
    }
    for (i, disk) in args.disk.iter().enumerate() {
        add_disk(&mut machine, i, disk)?;
    }
    let rng = DeviceKind::VirtioRng { filename: "/dev/urandom".into(), vectors: None };
    machine.devices.push(device("rng0".into(), rng));
    Ok(machine)
}

fn check_count(option: &str, count: usize) -> Result<(), String> {
    if count <= MAX_DEVICES {
        return Ok(());
    }
    Err(format!("{option} was given {count} times; at most {MAX_DEVICES} are possible"))
}

/// A detached VM leaves its working directory, so paths must not depend on it.
fn absolute(path: &PathBuf) -> Result<PathBuf, String> {
    std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn device(id: String, kind: DeviceKind) -> Device {
    let (bus, addr, written) = (None, None, String::new());
    Device { id: Some(id), bus, addr, multifunction: false, kind, written }
}

/// The first serial port: on the terminal together with the monitor, or on the console socket.
fn add_console(machine: &mut Machine, detach: bool, name: &str) {
    let id = "console0";
    let kind = if detach {
        ChardevKind::Socket {
            address: SocketAddress::Unix {
                path: runtime_dir::directory_of(name).join("console.sock"),
            },
            server: true,
            wait: false,
            reconnect: 0,
        }
    } else {
        machine.monitors.push(Monitor {
            chardev: id.into(),
            mode: MonitorMode::Readline,
            pretty: false,
        });
        ChardevKind::Stdio { signal: false }
    };
    let (mux, logfile) = (!detach, None);
    machine.chardevs.push(Chardev {
        id: id.into(),
        kind,
        mux,
        logfile,
        log_append: false,
        written: String::new(),
    });
    let serial = DeviceKind::IsaSerial { chardev: id.into(), index: 0 };
    machine.devices.push(device("serial0".into(), serial));
}

fn add_net(machine: &mut Machine, index: usize, text: &str) -> Result<(), String> {
    if text == "none" {
        return Ok(());
    }
    let expected =
        || format!("--net {text}: expected tap=INTERFACE, tap=INTERFACE,mac=MAC, or none");
    let (mut ifname, mut mac) = (None, None);
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("tap", value)) if (1..=15).contains(&value.len()) => ifname = Some(value),
            Some(("mac", value)) => mac = Some(parse_mac(value).ok_or_else(expected)?),
            _ => return Err(expected()),
        }
    }
    let ifname = ifname.ok_or_else(expected)?;
    let id = format!("net{index}");
    let kind = NetKind::Tap {
        ifname: Some(ifname.into()),
        fds: Vec::new(),
        queues: 1,
        script: None,
        downscript: None,
        bridge: None,
    };
    let written = format!("--net {text}");
    machine.netdevs.push(NetBackend { id: id.clone(), kind, written: written.clone() });
    let mac = mac.unwrap_or_else(random_mac);
    let nic = VirtioNet { netdev: id, mac, ..VirtioNet::default() };
    let nic = device(format!("nic{index}"), DeviceKind::VirtioNet(nic));
    machine.devices.push(Device { written, ..nic });
    Ok(())
}

/// A unicast address.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        // What parses a number takes a sign as well.
        let hex = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        let part = parts.next().filter(hex)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    (parts.next().is_none() && mac[0] & 1 == 0).then_some(mac)
}

/// In the range that QEMU's tools use, so that two VMs on one network do not collide.
fn random_mac() -> [u8; 6] {
    let random = uuid::Uuid::new_v4();
    let bytes = random.as_bytes();
    [0x52, 0x54, 0x00, bytes[0], bytes[1], bytes[2]]
}

fn add_disk(machine: &mut Machine, index: usize, text: &str) -> Result<(), String> {
    let (path, read_only) = match text.strip_suffix(",ro") {
        Some(path) => (path, true),
        None => (text, false),
    };
    if path.is_empty() {
        return Err(format!("--disk {text}: expected PATH or PATH,ro"));
    }
    let node = format!("disk{index}");
    let file = format!("{node}-file");
    let filename = absolute(&path.into())?;
    machine.blocks.push(block(&file, BlockDriver::File { filename }, read_only));
    machine.blocks.push(block(&node, BlockDriver::Raw { file: file.clone() }, read_only));
    let disk = VirtioBlk { drive: node, read_only, ..VirtioBlk::default() };
    let disk = device(format!("vd{index}"), DeviceKind::VirtioBlk(disk));
    machine.devices.push(Device { written: format!("--disk {text}"), ..disk });
    Ok(())
}

fn block(name: &str, driver: BlockDriver, read_only: bool) -> BlockNode {
    BlockNode {
        node_name: name.into(),
        drive: false,
        driver,
        read_only,
        direct: false,
        no_flush: false,
        unmap: true,
        auto_read_only: false,
        aio: Aio::default(),
        locking: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(words: &[&str]) -> Result<Machine, String> {
        let words = ["run", "--kernel", "k"].iter().chain(words);
        let cli = Cli::try_parse_from(words).map_err(|e| e.to_string())?;
        machine(&cli.args, "a")
    }

    #[test]
    fn a_machine_has_what_was_asked_for() {
        let vm =
            parse(&["--disk", "d", "--disk", "e,ro", "--net", "tap=t0", "--cpus", "4"]).unwrap();
        assert_eq!((vm.smp.cpus, vm.smp.cores, vm.memory), (4, 4, 512 << 20));
        assert_eq!((vm.blocks.len(), vm.netdevs.len(), vm.devices.len()), (4, 1, 5));
        assert!(vm.boot.kernel.unwrap().is_absolute());
        assert!(vm.chardevs[0].mux && vm.monitors.len() == 1);
        let vm = parse(&["--detach", "--net", "none"]).unwrap();
        assert!(vm.process.daemonize && vm.netdevs.is_empty() && vm.monitors.is_empty());
    }

    #[test]
    fn a_mac_is_kept_and_a_bad_one_refused() {
        let vm = parse(&["--net", "tap=t0,mac=52:54:00:00:00:01"]).unwrap();
        let DeviceKind::VirtioNet(nic) = &vm.devices[1].kind else { panic!("{:?}", vm.devices) };
        assert_eq!(nic.mac, [0x52, 0x54, 0, 0, 0, 1]);
        for net in ["tap", "tap=", "user", "tap=t0,mac=53:54:00:00:00:01", "tap=t0,mac=1", "x=y"] {
            assert!(parse(&["--net", net]).is_err(), "{net}");
        }
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(parse(&["--console", "--detach"]).is_err());
        assert!(parse(&["--cpus", "0"]).is_err());
        assert!(parse(&["--memory", "lots"]).is_err());
        assert!(parse(&["--disk", ",ro"]).is_err());
    }
}
