//! Machines of other kinds: many CPUs, an ELF kernel, `-machine pc` without MSI, devices behind PCIe ports,
//! options in JSON, memory on huge pages, discard, the power button.

use std::fs;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use e2e::guest::control::Order;
use e2e::guest::facts::{DISCARDED, Facts};
use e2e::link::{Control, Stream};
use e2e::network;
use e2e::ping::Pinger;
use e2e::testbed::{BOOT, Bed};
use e2e::vmm::{MAC, Vmm};
use serde_json::{Value, json};

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}

fn facts(vm: &mut Vmm) -> Facts {
    let line = vm.wait_serial("TERN-GUEST FACTS {", BOOT).unwrap();
    serde_json::from_str(line.split_once("FACTS ").unwrap().1).unwrap()
}

#[test]
fn sixteen_cpus_come_up() {
    let Some(mut bed) = Bed::new("sixteen-cpus") else { return };
    let mut config = bed.config();
    config.cpus = 16;
    config.append = "tern.facts=1".into();
    let mut vm = bed.start(&config).unwrap();
    assert_eq!(facts(&mut vm).cpus, 16);
    vm.wait_ready(BOOT).unwrap();
    assert_eq!(vm.quit().unwrap(), 0);
}

#[test]
fn an_elf_kernel_boots_by_its_pvh_entry() {
    let Some(mut bed) = Bed::new("elf") else { return };
    let mut config = bed.config();
    config.kernel = std::env::var_os("TERN_GUEST_ELF").expect("TERN_GUEST_ELF").into();
    config.append = "tern.facts=1 tern.mem=16".into();
    let mut vm = bed.start(&config).unwrap();
    vm.wait_ready(BOOT).unwrap();
    let facts = facts(&mut vm);
    assert!(facts.memory_kib > 200 << 10 && facts.memory_kib < 256 << 10, "{facts:?}");
    assert_eq!(vm.quit().unwrap(), 0);
}

/// All of virtio's interrupts come over the pins' lines, which cards share.
fn assert_intx(facts: &Facts, lines: usize) {
    let all = &facts.interrupts;
    assert!(all.len() >= lines, "{facts:?}");
    assert!(all.iter().all(|l| l.contains("IO-APIC") && l.contains("fasteoi")), "{facts:?}");
}

#[test]
fn a_pc_without_msi_boots_and_stays_when_its_guest_is_off() {
    let Some(mut bed) = Bed::new("pc") else { return };
    let mut config = bed.working().unwrap();
    config.append += " tern.facts=1 pci=nomsi";
    config.extra = words(&["-machine", "pc", "-no-shutdown", "-device", "virtio-rng-pci,id=rng0"]);
    let (mut vm, _tap) = bed.start_on_network(&config).unwrap();
    vm.wait_ready(BOOT).unwrap();
    let facts = facts(&mut vm);
    assert_eq!(facts.random.len(), 64, "{facts:?}");
    assert!(facts.random.bytes().any(|b| b != b'0'), "{facts:?}");
    assert_intx(&facts, 3);
    let mut guest = Control::connect(network::GUEST).unwrap();
    let pinger = Pinger::start(network::GUEST, Duration::from_millis(20)).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let pings = pinger.finish();
    assert!(pings.sent > 20 && pings.lost == 0, "{pings:?}");
    let status = guest.order(&Order::Verify).unwrap();
    assert_eq!((status.mem_bad, status.disk_bad), (0, 0));
    assert!(status.disk_written > 0 && status.disk_checked > 0, "{status:?}");
    vm.qmp.execute("system_powerdown", Value::Null).unwrap();
    vm.qmp.wait_event("POWERDOWN", BOOT).unwrap();
    vm.qmp.wait_event("SHUTDOWN", BOOT).unwrap();
    vm.qmp.wait_event("STOP", BOOT).unwrap();
    assert_eq!(vm.status().unwrap(), "shutdown");
    assert_eq!(vm.quit().unwrap(), 0);
}

/// Huge pages, given back at the end.
struct HugePages(String);

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    fn get(count: u64) -> Option<Self> {
        let before = fs::read_to_string(NR_HUGEPAGES).ok()?.trim().to_owned();
        let wanted = before.parse::<u64>().ok()? + count;
        let kept = Self(before);
        fs::write(NR_HUGEPAGES, wanted.to_string()).ok()?;
        let now = fs::read_to_string(NR_HUGEPAGES).ok()?.trim().parse::<u64>().ok()?;
        (now == wanted).then_some(kept)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(NR_HUGEPAGES, &self.0);
    }
}

/// A tap that the VMM opens by its name.
fn named_tap(name: &str) {
    for args in
        [format!("tuntap add {name} mode tap vnet_hdr"), format!("link set {name} master br0 up")]
    {
        let status = Command::new("ip").args(args.split_whitespace()).status().unwrap();
        assert!(status.success(), "ip {args}");
    }
}

/// Whether files of this directory can be read and written past the page cache.
fn takes_direct(path: &Path) -> bool {
    fs::OpenOptions::new().read(true).custom_flags(0o40000).open(path).is_ok()
}

/// A loop device, for file systems that do not take O_DIRECT (the lab's).
struct Loop(PathBuf);

impl Loop {
    fn new(image: &Path) -> Option<Self> {
        let _ = Command::new("/sbin/modprobe").arg("loop").status();
        let out = Command::new("/sbin/losetup").args(["-f", "--show"]).arg(image).output().ok()?;
        let name = String::from_utf8_lossy(&out.stdout).trim().to_owned();
        (out.status.success() && !name.is_empty()).then(|| Self(name.into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("/sbin/losetup").arg("-d").arg(&self.0).status();
    }
}

#[test]
fn ports_json_huge_pages_and_discard() {
    let Some(mut bed) = Bed::new("ports") else { return };
    let mut config = bed.working().unwrap();
    let first = config.disk.take().unwrap();
    let image = bed.disk("trim.raw", 64 << 20).unwrap();
    let looped = if takes_direct(&image) { None } else { Loop::new(&image) };
    let trim = looped.as_ref().map_or(&image, |l| &l.0).clone();
    let direct = takes_direct(&trim);
    println!("cache=none on {}: {direct}", trim.display());
    let cache = if direct { "none" } else { "writeback" };
    let huge = HugePages::get(u64::from(config.memory_mib) / 2);
    println!("huge pages: {}", huge.is_some());
    named_tap("tern0");
    let memory = json!({"qom-type": "memory-backend-memfd", "id": "mem0", "share": true,
        "size": u64::from(config.memory_mib) << 20, "hugetlb": huge.is_some()});
    let blockdev = json!({"driver": "raw", "node-name": "first", "discard": "unmap",
        "file": {"driver": "file", "filename": first}});
    let drive =
        format!("if=none,id=trim,file={},format=raw,cache={cache},discard=unmap", trim.display());
    let netdev = json!({"type": "tap", "id": "net0", "ifname": "tern0", "script": "no",
        "downscript": "no"});
    let device =
        |driver: &str, id: &str, bus: &str| json!({"driver": driver, "id": id, "bus": bus});
    let mut devices = vec![
        json!({"driver": "pcie-root-port", "id": "rp1", "bus": "pcie.0", "port": 1, "chassis": 1}),
        json!({"driver": "pcie-root-port", "id": "rp2", "bus": "pcie.0", "port": 2, "chassis": 2}),
        json!({"driver": "pcie-root-port", "id": "rp3", "bus": "pcie.0", "port": 3, "chassis": 3}),
    ];
    let mut disk = device("virtio-blk-pci", "vda", "rp1");
    disk["drive"] = "first".into();
    let mut second = device("virtio-blk-pci", "vdb", "rp2");
    second["drive"] = "trim".into();
    let mut nic = device("virtio-net-pci", "nic", "rp3");
    (nic["netdev"], nic["mac"]) = ("net0".into(), MAC.into());
    devices.extend([disk, second, nic, json!({"driver": "virtio-rng-pci", "id": "rng0"})]);
    config.extra = words(&["-object", &memory.to_string(), "-machine", "memory-backend=mem0"]);
    config.extra.extend(words(&["-blockdev", &blockdev.to_string(), "-drive", &drive]));
    config.extra.extend(words(&["-netdev", &netdev.to_string()]));
    for device in devices {
        config.extra.extend(words(&["-device", &device.to_string()]));
    }
    config.append += " tern.facts=1 tern.discard=/dev/vdb";
    let mut vm = bed.start(&config).unwrap();
    vm.wait_ready(BOOT).unwrap();
    let facts = facts(&mut vm);
    assert_eq!(facts.discard.as_deref(), Some("good"), "{facts:?}");
    for name in ["vda", "vdb", "eth0"] {
        assert!(facts.devices.iter().any(|d| d == name), "{facts:?}");
    }
    assert_eq!(facts.random.len(), 64, "{facts:?}");
    // What was discarded takes no room: of 8 MiB that were written, half is left.
    let room = fs::metadata(&image).unwrap().blocks() * 512;
    assert!(room <= (2 * DISCARDED as u64) - (1 << 20), "{room} bytes are allocated");
    let mut guest = Control::connect(network::GUEST).unwrap();
    let stream = Stream::start(network::GUEST, 512).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let status = guest.order(&Order::Verify).unwrap();
    let sum = stream.finish();
    assert_eq!((status.mem_bad, status.disk_bad, status.tcp_bad, sum.bad), (0, 0, 0, 0));
    assert!(status.disk_checked > 0 && sum.received > 0, "{status:?} {sum:?}");
    assert_eq!(vm.quit().unwrap(), 0);
}

/// Large frames, with what the kernel leaves for the card to do: the content is checked at both
/// ends, and the rate is as much as goes.
#[test]
fn segments_and_checksums_are_the_cards() {
    let Some(mut bed) = Bed::new("offloads") else { return };
    let mut config = bed.config();
    config.append = format!("tern.ip={}/{} tern.tcp=100000", network::GUEST, network::PREFIX);
    let (mut vm, tap) = bed.start_on_network(&config).unwrap();
    vm.wait_ready(BOOT).unwrap();
    // /sys shows the network namespace of whoever mounted it, /proc this thread's.
    let counters = || -> Vec<f64> {
        let all = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let mine = all.lines().find_map(|l| l.trim().strip_prefix(&format!("{}:", tap.name)));
        mine.unwrap().split_whitespace().map(|n| n.parse().unwrap()).collect()
    };
    let stream = Stream::start(network::GUEST, 100_000).unwrap();
    std::thread::sleep(Duration::from_secs(4));
    let sum = stream.finish();
    let mut guest = Control::connect(network::GUEST).unwrap();
    let status = guest.order(&Order::Status).unwrap();
    assert_eq!((sum.bad, status.tcp_bad), (0, 0), "{sum:?} {status:?}");
    assert!(sum.received > 1 << 20 && status.tcp_received > 1 << 20, "{sum:?} {status:?}");
    // From the host's view: rx is what the guest sent. More than a frame's 1514 bytes each.
    let c = counters();
    let (from_guest, to_guest) = (c[0] / c[1], c[8] / c[9]);
    println!("bytes a frame: {from_guest:.0} from the guest, {to_guest:.0} to it; {sum:?}");
    let largest = from_guest.max(to_guest);
    assert!(largest > 1514.0, "no frame was larger than the network's: {largest}");
    assert_eq!(vm.quit().unwrap(), 0);
}
