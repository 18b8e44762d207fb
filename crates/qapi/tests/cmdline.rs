//! The option grammar against real command lines: those of libvirt 9.0 (argv/*.txt), and those of
//! people.

use proptest::prelude::*;
use qapi::cmdline::{CmdlineError, Parsed, parse};
use spec::*;

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_string).collect()
}

fn machine(text: &str) -> Machine {
    match parse(&words(text)) {
        Ok(Parsed::Machine(m)) => *m,
        other => panic!("{text}: {other:?}"),
    }
}

fn refused(text: &str) -> String {
    match parse(&words(text)) {
        Err(e) => e.to_string(),
        other => panic!("{text}: {other:?}"),
    }
}

/// A recorded file: an option and its argument a line, or several options in one.
fn recorded(text: &str) -> Vec<String> {
    let mut args = Vec::new();
    for line in text.lines() {
        let (option, rest) = line.split_once(' ').unwrap_or((line, ""));
        args.push(option.to_string());
        match rest {
            "" => {}
            _ if option == "-name" && rest.ends_with(" -S") => {
                args.extend([rest.trim_end_matches(" -S").to_string(), "-S".to_string()]);
            }
            _ => args.push(rest.to_string()),
        }
    }
    args
}

/// Parses; takes the option that is refused out, and goes on until the rest is taken. Returns the
/// refusals.
fn refusals(args: &[String]) -> (Vec<String>, Machine) {
    let mut groups: Vec<Vec<String>> = Vec::new();
    for arg in args {
        match groups.last_mut() {
            Some(group) if !arg.starts_with('-') => group.push(arg.clone()),
            _ => groups.push(vec![arg.clone()]),
        }
    }
    let mut told = Vec::new();
    loop {
        match parse(&groups.concat()) {
            Ok(Parsed::Machine(m)) => return (told, *m),
            Ok(other) => panic!("{other:?}"),
            Err(e) => {
                // The shortest run of options that gives this error ends with the culprit.
                let message = e.to_string();
                let at = (1..=groups.len())
                    .find(|n| parse(&groups[..*n].concat()) == Err(e.clone()))
                    .unwrap_or(groups.len());
                // A check at the end names what is missing: take the option that names it.
                let named = message.split('\'').nth(1).unwrap_or("?").to_string();
                let culprit = groups[..at]
                    .iter()
                    .rposition(|g| g.len() > 1 && g[1].contains(&named))
                    .unwrap_or(at - 1);
                groups.remove(culprit);
                told.push(message);
            }
        }
        assert!(told.len() < 100, "{told:#?}");
    }
}

#[test]
fn libvirts_command_lines_are_taken_but_for_what_is_named() {
    let mut seen = 0;
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/argv")).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let (told, machine) = refusals(&recorded(&text));
        let known = [
            "'qcow2'",
            "'user'",
            "'vhost-user'",
            "'virtio-balloon-pci'",
            "'tcg'",
            "'ide-cd'",
            "'virtio-serial-pci'",
            "'virtserialport'",
            "'virtconsole'",
            "'vfio-pci'",
            "'spicevmc'",
            "'usb-redir'",
            "'virtio-vga'",
            "'pcie-pci-bridge'",
            "display server",
            "no netdev",
            "'i6300esb'",
            "block node",
            "no snapshots",
            "snapshots are not available",
            "'virtio-gpu",
        ];
        for message in &told {
            assert!(known.iter().any(|k| message.contains(k)), "{path:?}: {message}");
        }
        if path.ends_with("cpu-host-model.txt") {
            assert_eq!(machine.cpu.model, "kvm64");
            assert!(!machine.cpu.features["pni"]);
        } else {
            assert_eq!(machine.machine_type, MachineType::Q35);
            assert!(machine.process.paused);
            assert!(machine.devices.len() > 9, "{path:?}");
        }
        seen += 1;
    }
    assert_eq!(seen, 10);
}

#[test]
fn a_libvirt_start_with_raw_disk_and_tap_is_understood() {
    let m = parse(&[
        "-name", "guest=k1,debug-threads=on", "-S",
        "-machine", "pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram",
        "-accel", "kvm", "-cpu", "host,migratable=on", "-m", "512",
        "-object", r#"{"qom-type":"memory-backend-memfd","id":"pc.ram","share":true,"x-use-canonical-path-for-ramblock-id":false,"size":536870912}"#,
        "-smp", "4,maxcpus=4,sockets=4,cores=1,threads=1",
        "-nodefaults", "-chardev", "socket,id=charmonitor,fd=30,server=on,wait=off",
        "-mon", "chardev=charmonitor,id=monitor,mode=control",
        "-device", r#"{"driver":"pcie-root-port","port":8,"chassis":1,"id":"pci.1","bus":"pcie.0","multifunction":true,"addr":"0x1"}"#,
        "-device", r#"{"driver":"pcie-root-port","port":9,"chassis":2,"id":"pci.2","bus":"pcie.0","addr":"0x1.0x1"}"#,
        "-blockdev", r#"{"driver":"file","filename":"/d.raw","aio":"native","node-name":"libvirt-1-storage","cache":{"direct":true,"no-flush":false},"auto-read-only":true,"discard":"unmap"}"#,
        "-blockdev", r#"{"node-name":"libvirt-1-format","read-only":false,"cache":{"direct":true,"no-flush":false},"driver":"raw","file":"libvirt-1-storage"}"#,
        "-device", r#"{"driver":"virtio-blk-pci","bus":"pci.1","addr":"0x0","drive":"libvirt-1-format","id":"virtio-disk0","bootindex":1,"write-cache":"on"}"#,
        "-netdev", r#"{"type":"tap","fds":"31:33","id":"hostnet0"}"#,
        "-device", r#"{"driver":"virtio-net-pci","mq":true,"vectors":6,"netdev":"hostnet0","id":"net0","mac":"52:54:00:00:01:01","bus":"pci.2","addr":"0x0"}"#,
        "-chardev", "pty,id=charserial0",
        "-device", r#"{"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}"#,
    ].map(str::to_string)).unwrap();
    let Parsed::Machine(m) = m else { panic!() };
    assert_eq!(m.memory, 512 << 20);
    assert_eq!(m.memory_backends[0].kind, MemoryKind::Memfd { hugetlb: None });
    assert_eq!((m.smp.cpus, m.smp.max_cpus, m.smp.sockets), (4, 4, 4));
    assert_eq!(m.devices[1].addr, Some((1, 1)));
    assert_eq!(m.blocks[0].aio, Aio::Native);
    assert!(m.blocks[0].direct && m.blocks[0].unmap);
    let DeviceKind::VirtioNet(net) = &m.devices[3].kind else { panic!() };
    assert!(net.mq && net.vectors == Some(6) && net.mac[5] == 1);
    let NetKind::Tap { fds, queues, .. } = &m.netdevs[0].kind;
    assert_eq!((&fds[..], *queues), (&[31, 33][..], 2));
    assert_eq!(m.monitors[0].mode, MonitorMode::Control);
}

#[test]
fn a_hand_written_command_line_is_understood() {
    let m = machine(
        "-enable-kvm -M q35 -cpu max,+avx2,-sse4a,pmu=off -smp 4 -m 2G -kernel k -initrd i -append console=ttyS0 \
         -drive file=d.img,if=virtio,format=raw,cache=none,aio=io_uring,discard=unmap,readonly=on \
         -nic tap,model=virtio-net-pci,ifname=t0,script=no,mac=52:54:00:00:00:07 \
         -nographic -no-reboot -qmp unix:/tmp/q,server,nowait -rtc base=localtime -device usb-tablet -usb",
    );
    assert_eq!(m.smp, Smp { cpus: 4, max_cpus: 4, cores: 4, ..Smp::default() });
    assert_eq!((m.memory, m.rtc, m.actions.no_reboot), (2 << 30, RtcBase::Localtime, true));
    assert!(m.cpu.features["avx2"]);
    assert!(!m.cpu.features["sse4a"]);
    assert!(m.blocks[0].direct && m.blocks[0].read_only && m.blocks[0].aio == Aio::IoUring);
    assert_eq!(m.blocks[1].node_name, "virtio0");
    assert_eq!(m.warnings.len(), 2, "{:?}", m.warnings);
    // -nographic: the serial port and a monitor share stdio, as no -monitor was given; but -qmp
    // counts as one.
    assert_eq!(m.chardevs.len(), 2);
    assert!(m.devices.iter().any(|d| matches!(d.kind, DeviceKind::IsaSerial { index: 0, .. })));
    assert_eq!(
        m.monitors,
        [Monitor { chardev: "compat_monitor0".into(), mode: MonitorMode::Control, pretty: false }]
    );

    let m = machine("-nographic -kernel k");
    assert!(m.chardevs[0].mux && m.monitors[0].mode == MonitorMode::Readline);
    let m = machine(
        "-S -no-user-config -nodefaults -nographic -machine none,accel=kvm:tcg \
         -qmp unix:/q,server=on,wait=off -pidfile /p -daemonize",
    );
    assert_eq!(m.machine_type, MachineType::None);
    assert!(m.process.daemonize && m.devices.is_empty());
}

#[test]
fn refusals_name_option_key_and_the_nearest() {
    for (text, expected) in [
        ("-devcie x", "-devcie: unknown option; did you mean '-device'?"),
        ("-m", "-m: requires an argument"),
        ("disk.img", "'disk.img' is not an option"),
        ("-device virtio-net-pcie,netdev=a", "did you mean 'virtio-net-pci'?"),
        ("-device virtio-balloon-pci", "-device: device 'virtio-balloon-pci' is not supported"),
        (
            "-device pcie-root-port,chasis=1",
            "parameter 'chasis' is not supported; did you mean 'chassis'?",
        ),
        ("-device virtio-net-pci,netdev=a", "there is no netdev 'a'"),
        ("-device virtio-blk-pci,drive=a", "there is no drive or block node 'a'"),
        ("-smp 2,sockets=2,cores=2", "product of the hierarchy must match maxcpus"),
        ("-smp 4,maxcpus=2", "maxcpus must be equal to or greater than smp"),
        ("-smp 0", "-smp: parameter 'cpus': must be greater than zero"),
        ("-smp 1000", "The max CPUs supported"),
        ("-accel tcg", "-accel: 'tcg' is not available"),
        ("-drive file=a,if=ide", "parameter 'if': expected virtio or none, not 'ide'"),
        ("-drive file=a,if=virtio,format=qcow2", "only 'raw' is supported, not 'qcow2'"),
        ("-blockdev qcow2,node-name=a", "block driver 'qcow2' is not supported"),
        ("-drive file=nbd://h/x,if=virtio", "'nbd://h/x' is a URL"),
        ("-netdev tap,id=a,vhost=on", "only 'off' is supported, not 'on': in-kernel vhost-net"),
        ("-chardev file,path,id=a", "parameter 'path': expected a string"),
        (r#"-device {"driver":"loader","file":"a","file":"b"}"#, "duplicate key 'file'"),
        (
            r#"-blockdev {"driver":"file","node-name":"a","cache":{"direct":true,"direct":true}}"#,
            "duplicate key 'direct'",
        ),
        (r#"-netdev {"type":"tap","id":"a","id":"b"}"#, "duplicate key 'id'"),
        (
            r#"-object {"qom-type":"iothread","qom-type":"iothread","id":"b"}"#,
            "duplicate key 'qom-type'",
        ),
        ("-drive file=a,if=virtio,format=raw,aio=native", "requires cache.direct=on"),
        ("-drive file=a,if=virtio,snapshot=on,format=raw", "parameter 'snapshot'"),
        ("-netdev user,id=a", "'user' is not available"),
        ("-initrd i", "-initrd: only allowed with -kernel option"),
        ("-serial stdio -monitor stdio", "cannot use stdio by multiple character devices"),
        ("-m 12Q", "-m: parameter 'size': expected a size"),
        ("-uuid 1", "-uuid: '1' is not a UUID"),
        ("-vnc :0", "-vnc: there is no display server"),
        ("-incoming exec:cat", "'exec:cat' is not supported"),
        ("-machine q36", "did you mean 'q35'?"),
        ("-mon chardev=x", "there is no chardev 'x'"),
        ("-daemonize -nographic", "-daemonize: cannot be used"),
        ("-cpu host,phys-bits=40", "property 'phys-bits' cannot be set"),
        ("-cpu host,pmu=on", "pmu=on"),
        ("-incoming fd:3", "'fd:3' is not supported"),
        ("-d gest_errors", "did you mean 'guest_errors'?"),
        ("-display none,x=y", "-display: 'none,x=y' is not available"),
        (
            "-drive file=a,if=none,id=d,format=raw -device virtio-blk-pci,drive=d,iothread=i",
            "no -object iothread with id 'i'",
        ),
        (
            "-drive file=a,if=none,id=d,format=raw -device virtio-blk-pci,drive=d,seg-max=8",
            "parameter 'seg-max' is not supported",
        ),
        (
            "-m 256 -object memory-backend-ram,id=a,size=128M -numa node,memdev=a -numa node,memdev=a",
            "memory backend a is used twice",
        ),
        (
            "-m 256 -smp 2 -numa node,mem=128M,cpus=0-1 -numa node,mem=128M,cpus=1",
            "CPU 1 is in two nodes",
        ),
        ("-runas nobody", "-runas: start the process as that user"),
    ] {
        let message = refused(text);
        assert!(message.contains(expected), "{text}: {message}");
    }
}

#[test]
fn what_is_not_done_is_said_once() {
    for (text, expected) in [
        ("-m 0", "-m 0 is taken as the default, 128 MiB"),
        ("-machine q35,usb=on,hpet=off,smm=auto", "-machine usb= is ignored"),
        ("-name a,process=b", "-name process= is ignored"),
        ("-cpu host,migratable=off", "-cpu migratable=off is ignored"),
        ("-netdev tap,id=n,script=no", "netdev n has no peer"),
        ("-nic tap,script=no,sndbuf=0", "-nic tap sndbuf= is ignored"),
        ("-object memory-backend-ram,id=m,size=1M", "-object id=m is not used"),
        ("-drive file=a,if=virtio,format=raw,unit=1", "-drive unit= is ignored"),
        (
            "-drive file=a,if=none,id=d,format=raw -device virtio-blk-pci,drive=d,min_io_size=512",
            "-device virtio-blk-pci min_io_size= is ignored",
        ),
    ] {
        let m = machine(&format!("-nodefaults {text}"));
        let found = m.warnings.iter().filter(|w| w.contains(expected)).count();
        assert_eq!((m.warnings.len(), found), (1, 1), "{text}: {:?}", m.warnings);
    }
}

#[test]
fn device_switches_reach_the_device() {
    let m = machine(
        "-object iothread,id=io -drive file=a,if=none,id=d,format=raw \
         -device virtio-blk-pci,drive=d,iothread=io,discard=off,config-wce=off,vectors=0 \
         -device virtio-rng-pci,vectors=1 -device pcie-root-port,id=p,chassis=1,slot=7 \
         -chardev null,id=c,logfile=l,logappend=on -cpu qemu64,enforce",
    );
    let DeviceKind::VirtioBlk(blk) = &m.devices[0].kind else { panic!() };
    assert_eq!(
        (blk.vectors, blk.features["discard"], blk.features["config-wce"]),
        (Some(0), false, false)
    );
    assert!(matches!(m.devices[1].kind, DeviceKind::VirtioRng { vectors: Some(1), .. }));
    assert!(matches!(m.devices[2].kind, DeviceKind::PcieRootPort { slot: Some(7), .. }));
    assert!(m.chardevs[0].log_append && m.cpu.features["enforce"]);
}

#[test]
fn cache_modes_and_native_aio() {
    let m = machine(
        "-drive file=a,if=none,id=d,format=raw,cache=none,aio=native -device virtio-blk-pci,drive=d",
    );
    assert!(m.blocks[0].direct && m.blocks[0].aio == Aio::Native && m.blocks[1].node_name == "d");
    let m = machine("-drive file=a,if=virtio,format=raw,cache=writethrough");
    let DeviceKind::VirtioBlk(blk) = &m.devices.last().unwrap().kind else { panic!() };
    assert!(!blk.write_cache && !m.blocks[0].direct);
    let m = machine(
        "-drive file=a,if=none,id=d,format=raw,cache=unsafe -device virtio-blk,drive=d,write-cache=off",
    );
    assert!(m.blocks[0].no_flush);
}

#[test]
fn smp_arithmetic_is_qemus() {
    for (text, expected) in [
        ("8", (8, 8, 1, 1, 8, 1)),
        ("8,threads=2", (8, 8, 1, 1, 4, 2)),
        ("8,cores=4", (8, 8, 2, 1, 4, 1)),
        ("8,sockets=2", (8, 8, 2, 1, 4, 1)),
        ("4,maxcpus=4,sockets=1,dies=1,cores=2,threads=2", (4, 4, 1, 1, 2, 2)),
        ("sockets=2,cores=2,threads=2", (8, 8, 2, 1, 2, 2)),
        ("cpus=4,dies=2", (4, 4, 1, 2, 2, 1)),
        ("maxcpus=6", (6, 6, 1, 1, 6, 1)),
        ("2,maxcpus=4,sockets=4,cores=1,threads=1", (2, 4, 4, 1, 1, 1)),
    ] {
        let s = machine(&format!("-smp {text}")).smp;
        assert_eq!((s.cpus, s.max_cpus, s.sockets, s.dies, s.cores, s.threads), expected, "{text}");
    }
}

#[test]
fn an_image_of_another_format_is_not_taken_as_raw() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("d");
    std::fs::write(&image, b"QFI\xfb\0\0\0\x03").unwrap();
    let message = refused(&format!("-drive if=virtio,file={}", image.display()));
    assert!(message.contains("is not a raw image"), "{message}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn no_option_string_panics(
        option in prop::sample::select(qapi::cmdline::options::OPTIONS.iter().map(|o| o.name).collect::<Vec<_>>()),
        value in prop_oneof![
            "\\PC{0,40}",
            "(socket|stdio|tap|node|raw|file|virtio-net-pci|virtio-blk-pci|q35|host|4)(,(id|fd|fds|size|cpus|addr|bus|mac|path|port|drive|netdev|cache|cores|maxcpus|nodeid|driver|file|server|index|type)=[0-9a-z:.x-]{0,12}){0,5}",
        ],
    ) {
        let r = parse(&[format!("-{option}"), value.clone()]);
        if let Err(CmdlineError::Invalid { option: named, .. }) = r {
            prop_assert!(named.starts_with('-'));
        }
        let _ = parse(&[value]);
    }
}

#[test]
fn the_generic_loader_takes_plain_files() {
    let m = machine("-device loader,file=/f,addr=0x4000000,force-raw=on");
    assert_eq!(m.loads, [Load { file: "/f".into(), addr: 0x400_0000, raw: true }]);
    assert!(m.devices.iter().all(|d| d.id.is_none()));
    assert!(!machine(r#"-device {"driver":"loader","file":"/f","addr":4096}"#).loads[0].raw);
    for (text, says) in [
        ("loader,file=/f", "addr"),
        ("loader,addr=0", "file"),
        ("loader,addr=0,data=1,data-len=4", "data"),
        ("loader,file=/f,addr=0,cpu-num=0", "cpu-num"),
    ] {
        let told = refused(&format!("-device {text}"));
        assert!(told.contains(says), "{told}");
    }
}

#[test]
fn what_the_user_wrote_is_kept_for_messages() {
    let long = format!("unix:/{},server=on,wait=off", "x".repeat(300));
    let m = machine(&format!(
        "-nodefaults -nic tap,ifname=t0 -netdev tap,id=n -device virtio-net-pci,netdev=n \
         -drive if=virtio,file=/d,format=raw -serial null -qmp {long} -chardev null,id=c"
    ));
    let written = |d: &Device| d.written.clone();
    assert_eq!(
        m.devices.iter().map(written).collect::<Vec<_>>(),
        [
            "-device virtio-net-pci,netdev=n",
            "",
            "-drive if=virtio,file=/d,format=raw",
            "-nic tap,ifname=t0",
        ]
    );
    assert_eq!(m.netdevs[0].written, "-netdev tap,id=n");
    assert_eq!(m.netdevs[1].written, "-nic tap,ifname=t0");
    let told: Vec<String> = m.chardevs.iter().map(Chardev::told).collect();
    assert_eq!((&told[0][..], &told[1][..]), ("-chardev null,id=c", "-serial null"));
    assert!(told[2].starts_with("-qmp unix:/xxx") && told[2].ends_with("x..."), "{}", told[2]);
}

#[test]
fn machine_types_are_those_that_qemu_had() {
    for good in ["pc-q35-2.12", "pc-q35-4.0.1", "pc-q35-10.0", "pc-i440fx-7.2", "pc-i440fx-1.7"] {
        machine(&format!("-machine {good}"));
    }
    for bad in ["pc-q35-99.9", "pc-q35-7.3", "pc-q35-7", "pc-q35-+7.2", "pc-i440fx-0.9"] {
        let e = refused(&format!("-machine {bad}"));
        assert!(e.contains(bad), "{e}");
    }
}
