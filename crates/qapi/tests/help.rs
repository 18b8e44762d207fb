//! `help` of options and drivers, held against what the parser does with every key that it lists.

use qapi::cmdline::device::keys::DEVICES;
use qapi::cmdline::keys::{Family, Fate, Key, Kind};
use qapi::cmdline::{Parsed, block, chardev, net, object, parse};

const FAMILIES: [(&str, &Family); 5] = [
    ("-device", &DEVICES),
    ("-blockdev", &block::NODES),
    ("-netdev", &net::BACKENDS),
    ("-chardev", &chardev::BACKENDS),
    ("-object", &object::OBJECTS),
];

fn printed(words: &[&str]) -> String {
    let args: Vec<String> = words.iter().map(ToString::to_string).collect();
    match parse(&args) {
        Ok(Parsed::Print(text)) => text,
        other => panic!("{words:?}: {other:?}"),
    }
}

/// What is told of a command line, its warnings included; "" for nothing.
fn told(words: &[String]) -> String {
    match parse(words) {
        Ok(Parsed::Machine(m)) => m.warnings.join("\n"),
        Ok(other) => panic!("{words:?}: {other:?}"),
        Err(e) => e.to_string(),
    }
}

/// A value that the key takes, and one that it does not (`None` when any text will do).
fn samples(kind: Kind) -> (String, Option<String>) {
    let (good, bad) = match kind {
        Kind::Text | Kind::Node | Kind::List => ("word", None),
        Kind::Id => ("word", Some("1 word")),
        Kind::Switch => ("on", Some("auto")),
        Kind::SwitchOrAuto => ("auto", Some("maybe")),
        Kind::Number(min, max) => {
            return (
                min.to_string(),
                Some(max.checked_add(1).map_or("-1".into(), |n| n.to_string())),
            );
        }
        Kind::PowerOfTwo(min, max) => return (min.to_string(), Some((max - 1).to_string())),
        Kind::Signed => ("-1", Some("1.5")),
        Kind::Size(_) => ("4M", Some("4Q")),
        Kind::OneOf(words) => (words[0], Some("no-such-word")),
        Kind::Mac => ("52:54:00:00:00:99", Some("53:54:00:00:00:99")),
        Kind::PciAddr => ("06.0", Some("20")),
        Kind::Fds => ("77", Some("tap0")),
    };
    (good.into(), bad.map(str::to_string))
}

/// Options before one of the family's that make its references good, and keys that it needs.
fn around(option: &str, driver: &str) -> (&'static [&'static str], &'static str) {
    match (option, driver) {
        ("-device", "virtio-net-pci") => (&["-netdev", "tap,id=word"], ",netdev=word"),
        ("-device", "virtio-blk-pci") => (
            &["-object", "iothread,id=word", "-drive", "if=none,id=word,file=f,format=raw"],
            ",drive=word",
        ),
        ("-device", "virtio-rng-pci") => (&["-object", "rng-builtin,id=word"], ""),
        ("-device", "isa-serial") => (&["-chardev", "null,id=word"], ",chardev=word"),
        ("-device", "loader") => (&[], ",file=f,addr=0"),
        ("-blockdev", "raw") => {
            (&["-blockdev", "file,node-name=word,filename=f"], ",node-name=n,file=word")
        }
        ("-blockdev", _) => (&[], ",node-name=n,filename=f"),
        ("-netdev" | "-object", d) if !d.starts_with("memory") => (&[], ",id=i"),
        ("-object", "memory-backend-file") => (&[], ",id=i,size=1M,mem-path=p"),
        ("-object", _) => (&[], ",id=i,size=1M"),
        ("-chardev", "file") => (&[], ",id=i,path=p"),
        ("-chardev", "socket") => (&[], ",id=i,path=p,server=on,wait=off"),
        ("-chardev", _) => (&[], ",id=i"),
        _ => (&[], ""),
    }
}

/// The command line that gives `key` this value, in place of what is there of that key.
fn giving(option: &str, driver: &str, key: &str, value: &str) -> Vec<String> {
    let (before, needed) = around(option, driver);
    let mut words: Vec<String> =
        ["-nodefaults"].iter().chain(before).map(ToString::to_string).collect();
    let taken = format!("{key}=");
    // A socket is given by one of these.
    let instead = |word: &str| ["fd", "port"].contains(&key) && word.starts_with("path=");
    let kept: Vec<&str> = needed
        .split(',')
        .filter(|w| !w.is_empty() && !w.starts_with(&taken) && !instead(w))
        .collect();
    words.push(option.into());
    words.push(format!("{driver},{}", [kept, vec![&format!("{key}={value}")]].concat().join(",")));
    words
}

fn every_key(mut f: impl FnMut(&str, &str, &Key)) {
    for (option, family) in FAMILIES {
        for member in family.members {
            for key in member.schema.keys() {
                f(option, member.name(), key);
            }
        }
    }
}

#[test]
fn each_key_that_help_lists_is_taken_and_no_other() {
    let mut seen = 0;
    every_key(|option, driver, key| {
        let help = printed(&[option, &format!("{driver},help")]);
        let line = help.lines().find(|l| l.trim_start().starts_with(&format!("{}=<", key.name)));
        let (good, bad) = samples(key.kind);
        let good = match key.fate {
            Fate::Only(values, _) => values[0].to_string(),
            // The default is taken without a word.
            Fate::Ignored(_) if key.default == "on" => "off".to_string(),
            _ => good,
        };
        let said = told(&giving(option, driver, key.name, &good));
        match key.fate {
            Fate::Refused(why) => {
                assert_eq!(line, None, "{driver} {}", key.name);
                assert!(said.contains(why) && said.contains(key.name), "{driver}: {said}");
                return;
            }
            Fate::Ignored(why) => assert!(said.contains(why) && said.contains(key.name), "{said}"),
            Fate::Taken | Fate::Quiet | Fate::Only(..) => {
                assert!(!said.contains(&format!("'{}'", key.name)), "{driver}: {said}");
                assert!(!said.contains("cannot be given"), "{driver} {}: {said}", key.name);
            }
        }
        let line = line.unwrap_or_else(|| panic!("{driver} {}: {help}", key.name));
        if !key.default.is_empty() {
            assert!(line.contains(&format!("(default: {})", key.default)), "{line}");
        }
        if let Some(bad) = bad {
            let said = told(&giving(option, driver, key.name, &bad));
            assert!(said.starts_with(&format!("{option}: parameter '{}'", key.name)), "{said}");
        }
        seen += 1;
    });
    assert!(seen > 150, "{seen}");
}

#[test]
fn a_default_that_help_names_changes_nothing_when_it_is_given() {
    every_key(|option, driver, key| {
        let known = !key.default.is_empty() && !matches!(key.fate, Fate::Refused(_));
        if known {
            let with = parse(&giving(option, driver, key.name, key.default));
            let without = parse(
                &giving(option, driver, key.name, key.default)
                    .into_iter()
                    .map(|w| w.replace(&format!(",{}={}", key.name, key.default), ""))
                    .collect::<Vec<_>>(),
            );
            let (Ok(Parsed::Machine(mut with)), Ok(Parsed::Machine(mut without))) = (with, without)
            else {
                panic!("{driver} {}", key.name)
            };
            // Switches that were given are kept apart from those that were not, as are the words.
            for m in [&mut with, &mut without] {
                m.netdevs.iter_mut().for_each(|n| n.written.clear());
                m.chardevs.iter_mut().for_each(|c| c.written.clear());
                for device in &mut m.devices {
                    device.written.clear();
                    match &mut device.kind {
                        spec::DeviceKind::VirtioNet(net) => net.features.clear(),
                        spec::DeviceKind::VirtioBlk(blk) => blk.features.clear(),
                        _ => {}
                    }
                }
            }
            assert_eq!(with, without, "{driver} {}", key.name);
        }
    });
}

#[test]
fn each_option_and_driver_has_help() {
    for (option, family) in FAMILIES {
        let list = printed(&[option, "help"]);
        for name in family.names() {
            assert!(list.contains(name), "{list}");
            let help = printed(&[option, &format!("{name},help")]);
            assert!(help.starts_with(&format!("{name} options:\n  ")), "{help}");
            assert_eq!(help, printed(&[option, &format!("{name},?")]));
        }
        let json = format!("{{\"{}\":\"help\"}}", family.key);
        assert_eq!(list, printed(&[option, &json]));
    }
    for option in
        ["smp", "m", "numa", "name", "rtc", "action", "boot", "overcommit", "msg", "mon", "drive"]
    {
        let help = printed(&[&format!("-{option}"), "help"]);
        assert!(help.starts_with(&format!("{option} options:\n  ")), "{help}");
    }
    assert!(printed(&["-machine", "help"]).contains("q35"));
    assert!(printed(&["-machine", "q35,help"]).contains("memory-backend=<str>"));
    assert!(printed(&["-accel", "help"]).contains("kvm"));
    assert!(printed(&["-accel", "kvm,help"]).contains("kernel-irqchip=<on|off|split>"));
    assert!(printed(&["-device", "usb-tablet,help"]).contains("left out"));
    assert!(printed(&["-serial", "help"]).contains("server=<bool>"));
    assert!(printed(&["-nic", "tap,help"]).contains("model=<virtio-net-pci|"));
    for text in ["-help", "-version", "-netdev help", "-net help", "-d help"] {
        printed(&text.split(' ').collect::<Vec<_>>());
    }
    for word in ["help", "?"] {
        let args = ["-cpu".to_string(), word.to_string()];
        assert_eq!(parse(&args), Ok(Parsed::CpuHelp));
    }
}

#[test]
fn a_device_without_keys_is_what_spec_calls_the_default() {
    let words = |text: &str| text.split(' ').map(str::to_string).collect::<Vec<_>>();
    let line = "-nodefaults -netdev tap,id=n -device virtio-net-pci,netdev=n \
                -drive if=none,id=d,file=f,format=raw -device virtio-blk-pci,drive=d";
    let Ok(Parsed::Machine(m)) = parse(&words(line)) else { panic!() };
    let kinds: Vec<_> = m.devices.iter().map(|d| d.kind.clone()).collect();
    let net = spec::VirtioNet { netdev: "n".into(), ..Default::default() };
    let blk = spec::VirtioBlk { drive: "d".into(), ..Default::default() };
    assert_eq!(kinds, [spec::DeviceKind::VirtioNet(net), spec::DeviceKind::VirtioBlk(blk)]);
}

#[test]
fn an_unknown_key_is_sent_to_the_help_that_lists_the_known() {
    for (words, expected) in [
        (["-device", "virtio-rng-pci,max_bytes=1"], "(-device virtio-rng-pci,help lists what is)"),
        (
            ["-netdev", "tap,id=a,ifnam=b"],
            "did you mean 'ifname'? (-netdev tap,help lists what is)",
        ),
        (["-smp", "4,core=4"], "did you mean 'cores'? (-smp help lists what is)"),
        (
            ["-blockdev", "raw,node-name=a,file.driver=file,file.x=y"],
            "-blockdev (file): parameter 'x'",
        ),
        (
            ["-object", "memory-backend-memf,id=a"],
            "did you mean 'memory-backend-memfd'? (-object help",
        ),
        (["-machine", "q35,memory-backed=a"], "did you mean 'memory-backend'? (-machine help"),
    ] {
        let said = told(&words.map(str::to_string));
        assert!(said.contains(expected), "{said}");
    }
}
