//! The table of command-line options: what each takes and what becomes of it.

use super::{Builder, Stop, Taken};

/// What becomes of an option.
#[derive(Clone, Copy)]
pub(super) enum Action {
    /// Understood by this code.
    Run(fn(&mut Builder, &str, &str) -> Taken),
    /// What it asks for is so anyway.
    Nothing,
    /// Taken with one warning line: it changes nothing here, because of this.
    Warn(&'static str),
    /// Refused, because of this.
    Refuse(&'static str),
}

/// One option.
pub struct OptionSpec {
    /// Without its dash.
    pub name: &'static str,
    /// What its argument looks like; `None` when it has none.
    pub argument: Option<&'static str>,
    pub(super) action: Action,
}

impl OptionSpec {
    /// "supported", "accepted: WHY" or "refused: WHY".
    pub fn status(&self) -> String {
        match self.action {
            Action::Run(_) => "supported".into(),
            Action::Nothing => "supported (it is so anyway)".into(),
            Action::Warn(why) => format!("taken with a warning: {why}"),
            Action::Refuse(why) => format!("refused: {why}"),
        }
    }
}

const fn run(
    name: &'static str,
    argument: &'static str,
    f: fn(&mut Builder, &str, &str) -> Taken,
) -> OptionSpec {
    let argument = if argument.is_empty() { None } else { Some(argument) };
    OptionSpec { name, argument, action: Action::Run(f) }
}
const fn other(name: &'static str, argument: &'static str, action: Action) -> OptionSpec {
    let argument = if argument.is_empty() { None } else { Some(argument) };
    OptionSpec { name, argument, action }
}

const NO_SOUND: Action = Action::Warn("there is no sound device");
const NO_USB: Action = Action::Warn("there is no USB controller");
const NO_SCREEN: Action = Action::Warn("there is no display device");
const NO_DISK_BUS: Action =
    Action::Refuse("there is no IDE or floppy controller; use -drive if=virtio");
const NO_DISPLAY: Action = Action::Refuse("there is no display server; use -display none");

/// All options, in the order of their names.
pub const OPTIONS: &[OptionSpec] = &[
    run("D", "FILE", Builder::logfile),
    run("M", "TYPE[,prop=value,...]", Builder::machine_option),
    run("S", "", |b, _, _| {
        b.machine.process.paused = true;
        Ok(())
    }),
    run("accel", "kvm[,prop=value,...]", Builder::accel),
    run("action", "reboot=reset|shutdown,shutdown=poweroff|pause", Builder::action),
    other("add-fd", "fd=N,set=N", Action::Refuse("fd sets are not available")),
    run("append", "TEXT", |b, _, text| {
        b.machine.boot.append = text.to_string();
        Ok(())
    }),
    other("audio", "ARG", NO_SOUND),
    other("audiodev", "ARG", NO_SOUND),
    run("balloon", "none", Builder::balloon),
    other("bios", "FILE", Action::Refuse("firmware boot is not available; use -kernel")),
    run("blockdev", "driver=file|host_device|raw,node-name=ID,...", Builder::blockdev),
    run("boot", "[strict=on|off]", Builder::boot),
    other("cdrom", "FILE", NO_DISK_BUS),
    run("chardev", "null|stdio|pty|file|socket,id=ID,...", Builder::chardev),
    run("cpu", "MODEL[,+feature,-feature,feature=on|off]", Builder::cpu),
    run("d", "ITEM[,...]", Builder::log_items),
    run("daemonize", "", |b, _, _| {
        b.machine.process.daemonize = true;
        Ok(())
    }),
    other("debugcon", "DEV", Action::Refuse("the debug console is not available; use -serial")),
    run("device", "DRIVER[,prop=value,...]", Builder::device),
    run("display", "none", Builder::display),
    run("drive", "file=FILE,if=virtio|none,format=raw,...", Builder::drive),
    run("enable-kvm", "", |b, _, _| {
        b.accels.push("kvm".into());
        Ok(())
    }),
    other("full-screen", "", NO_SCREEN),
    other("fw_cfg", "ARG", Action::Refuse("fw_cfg items cannot be added")),
    other("gdb", "DEV", Action::Refuse("there is no debugger stub")),
    run("global", "DRIVER.PROPERTY=VALUE", Builder::global),
    run("h", "", help),
    other("hda", "FILE", NO_DISK_BUS),
    other("hdb", "FILE", NO_DISK_BUS),
    run("help", "", help),
    run("incoming", "tcp:HOST:PORT|unix:PATH|defer", Builder::incoming),
    run("initrd", "FILE", |b, _, file| {
        b.machine.boot.initrd = Some(file.into());
        Ok(())
    }),
    other("k", "LANGUAGE", NO_SCREEN),
    run("kernel", "FILE", |b, _, file| {
        b.machine.boot.kernel = Some(file.into());
        Ok(())
    }),
    other("loadvm", "TAG", Action::Refuse("snapshots are not available")),
    run("m", "[size=]SIZE[,slots=N,maxmem=SIZE]", Builder::memory),
    run("machine", "TYPE[,prop=value,...]", Builder::machine_option),
    other("mem-path", "PATH", Action::Refuse("use -object memory-backend-file,mem-path=...")),
    other("mem-prealloc", "", Action::Refuse("use prealloc=on of the -object memory-backend-*")),
    run("mon", "chardev=ID[,mode=readline|control][,pretty=on]", Builder::mon),
    run("monitor", "DEV", Builder::monitor),
    run("msg", "timestamp=on|off", Builder::msg),
    run("name", "[guest=]NAME[,debug-threads=on]", Builder::name),
    run("net", "none", Builder::net),
    run("netdev", "tap,id=ID[,ifname=,fd=,fds=,queues=,vhost=,...]", Builder::netdev),
    run("nic", "tap[,model=virtio-net-pci,mac=...]|none", Builder::nic),
    other("no-acpi", "", Action::Refuse("ACPI cannot be switched off")),
    other("no-fd-bootchk", "", Action::Nothing),
    other("no-hpet", "", Action::Nothing),
    run("no-reboot", "", |b, _, _| {
        b.machine.actions.no_reboot = true;
        Ok(())
    }),
    run("no-shutdown", "", |b, _, _| {
        b.machine.actions.no_shutdown = true;
        Ok(())
    }),
    other("no-user-config", "", Action::Nothing),
    run("nodefaults", "", |b, _, _| {
        b.no_defaults = true;
        Ok(())
    }),
    run("nographic", "", |b, _, _| {
        b.nographic = true;
        Ok(())
    }),
    run("numa", "node[,nodeid=N][,cpus=A-B][,memdev=ID|mem=SIZE]", Builder::numa),
    run("object", "TYPE,id=ID[,prop=value,...]", Builder::object),
    run("overcommit", "mem-lock=off,cpu-pm=off", Builder::overcommit),
    run("parallel", "none|null", Builder::parallel),
    run("pidfile", "FILE", |b, _, file| {
        b.machine.process.pidfile = Some(file.into());
        Ok(())
    }),
    run("qmp", "DEV", Builder::monitor),
    run("qmp-pretty", "DEV", Builder::monitor),
    other("readconfig", "FILE", Action::Refuse("configuration files are not read")),
    run("rtc", "[base=utc|localtime|DATE][,clock=host][,driftfix=none]", Builder::rtc),
    other("runas", "USER", Action::Refuse("start the process as that user instead")),
    other("s", "", Action::Refuse("there is no debugger stub")),
    other("sandbox", "ARG", Action::Warn("there is no seccomp filter yet")),
    other("sd", "FILE", NO_DISK_BUS),
    run("serial", "DEV", |b, _, word| {
        b.serials.push(word.to_string());
        Ok(())
    }),
    other("show-cursor", "", NO_SCREEN),
    other("smbios", "ARG", Action::Refuse("SMBIOS tables are not available")),
    run(
        "smp",
        "[cpus=]N[,maxcpus=N (no vCPU is plugged later),sockets=,dies=,clusters=,cores=,threads=]",
        Builder::smp,
    ),
    other("snapshot", "", Action::Refuse("temporary overlays are not available")),
    other("soundhw", "ARG", NO_SOUND),
    other("spice", "ARG", NO_DISPLAY),
    other("tpmdev", "ARG", Action::Refuse("there is no TPM")),
    other("trace", "ARG", Action::Refuse("QEMU's trace points do not exist here; use -d")),
    other("usb", "", NO_USB),
    other("usbdevice", "ARG", NO_USB),
    run("uuid", "UUID", Builder::uuid),
    run("version", "", |_, _, _| Err(Stop::Print(version_text()))),
    run("vga", "none|TYPE", Builder::vga),
    other("virtfs", "ARG", Action::Refuse("shared folders are not available")),
    other("vnc", "ARG", NO_DISPLAY),
    other("watchdog-action", "ARG", Action::Warn("there is no watchdog device")),
];

/// The option of that name, without dashes.
pub fn find(name: &str) -> Option<&'static OptionSpec> {
    OPTIONS.iter().find(|o| o.name == name)
}

const EXAMPLE: &str = "\
Example:
  tern qemu -M q35 -m 1G -smp 2 -kernel vmlinuz -initrd initrd.img -append console=ttyS0 \\
    -drive file=disk.raw,format=raw,if=virtio -nic tap,model=virtio-net-pci,ifname=tap0 \\
    -nographic

-OPTION help or -device DRIVER,help lists the keys of one.
";

fn help(_: &mut Builder, _: &str, _: &str) -> Taken {
    let mut text = format!("{}usage: tern qemu [options]\n\n{EXAMPLE}\n", version_text());
    for option in OPTIONS {
        if matches!(option.action, Action::Run(_) | Action::Nothing) {
            text += &format!("-{} {}\n", option.name, option.argument.unwrap_or_default());
        }
    }
    text += "\nOther options of QEMU are taken with a warning when they change nothing here, or \
             refused by name.\n";
    Err(Stop::Print(text))
}

/// Scripts look for "version MAJOR.MINOR.MICRO" after "QEMU emulator".
fn version_text() -> String {
    format!(
        "QEMU emulator version 8.2.0 (tern-{0})\nTern {0}, a KVM virtual machine monitor that takes \
         QEMU's options\n",
        env!("CARGO_PKG_VERSION")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_and_names_are_unique() {
        assert!(OPTIONS.windows(2).all(|w| w[0].name < w[1].name));
    }
}
