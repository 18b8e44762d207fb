//! A guest that reads and writes nonsense all over the buses of a machine that runs: PCI
//! configuration, BARs wherever they were moved to, MSI-X tables, virtio registers, rings with
//! anything in them, every port. Nothing may panic or hang, and after a reset the machine is as
//! it was at power-on.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use qapi::EventBus;
use qapi::cmdline::{Parsed, parse};

use crate::layout::ECAM;
use crate::machine::Machine;
use crate::runstate::RunState;

const RAM: u64 = 32 << 20;
/// Functions whose configuration is looked at: buses that can be there, and all slots.
const BUSES: u64 = 4;

/// Panics of this process, on any thread: a device's thread that dies must not go unseen.
static PANICS: AtomicU32 = AtomicU32::new(0);

#[derive(Debug, Clone)]
struct Access {
    write: bool,
    /// 1, 2, 4 or 8 bytes.
    width: u8,
    value: u64,
}

#[derive(Debug, Clone)]
enum Op {
    /// Configuration space of a function that is there, through ECAM or the ports.
    Config(prop::sample::Index, u16, bool, Access),
    /// A BAR of a function, where its register says that it is.
    Bar(prop::sample::Index, u8, u16, Access),
    Port(u16, Access),
    Mmio(u64, Access),
    /// A driver sets a function's queue up with rings somewhere, and rings its doorbell.
    Ring(prop::sample::Index, u16, [u64; 3]),
    /// Bytes into RAM, where rings may be.
    Ram(u64, Vec<u8>),
    Stop,
    Cont,
    Reset,
    /// Save and load, as a migration does.
    Move,
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..16, any::<u64>(), 0..RAM, Just(u64::MAX), (0u32..64).prop_map(|b| 1 << b)]
}

fn access() -> impl Strategy<Value = Access> {
    (any::<bool>(), 0u8..4, value()).prop_map(|(write, width, value)| Access {
        write,
        width: 1 << width,
        value,
    })
}

fn op() -> impl Strategy<Value = Op> {
    let at = || any::<prop::sample::Index>();
    // The standard header, the capabilities behind it, all of it.
    let config = prop_oneof![4 => 0u16..0x40, 4 => 0x40u16..0x100, 1 => 0u16..0x1000];
    let bar = prop_oneof![4 => Just(4u8), 2 => Just(1u8), 1 => 0u8..6];
    let offset = prop_oneof![6 => 0u16..64, 2 => 0x3000u16..0x3010, 2 => 0u16..0x4000];
    // Everything, and more often the configuration and ACPI ports.
    let port = prop_oneof![2 => 0xcf8u16..0xd00, 1 => 0x600u16..0x640, 2 => any::<u16>()];
    let mmio = prop_oneof![RAM..1 << 32, 0xe000_0000u64..0x1_0000_0000, any::<u64>()];
    let ring = || prop_oneof![8 => (0..RAM >> 12).prop_map(|p| p << 12), 1 => any::<u64>()];
    let bytes = prop::collection::vec(prop_oneof![Just(0u8), 0u8..4, any::<u8>()], 1..256);
    prop_oneof![
        20 => (at(), config, any::<bool>(), access()).prop_map(|(f, o, e, a)| Op::Config(f, o, e, a)),
        30 => (at(), bar, offset, access()).prop_map(|(f, b, o, a)| Op::Bar(f, b, o, a)),
        10 => (port, access()).prop_map(|(p, a)| Op::Port(p, a)),
        5 => (mmio, access()).prop_map(|(m, a)| Op::Mmio(m, a)),
        10 => (at(), 0u16..4, [ring(), ring(), ring()]).prop_map(|(f, q, r)| Op::Ring(f, q, r)),
        10 => (0..RAM, bytes).prop_map(|(at, bytes)| Op::Ram(at, bytes)),
        2 => Just(Op::Stop),
        3 => Just(Op::Cont),
        1 => Just(Op::Reset),
        1 => Just(Op::Move),
    ]
}

/// A q35 with ports, two disks, a random number generator, and a NIC where a tap can be had.
fn machine(dir: &std::path::Path) -> Result<Arc<Machine>, String> {
    let file = |name: &str, bytes: &[u8]| {
        std::fs::write(dir.join(name), bytes).map_err(|e| e.to_string())?;
        Ok::<_, String>(dir.join(name).display().to_string())
    };
    let kernel = file("kernel", &e2e::tiny::kernel())?;
    let (one, two) = (file("one", &[1; 1 << 20])?, file("two", &[2; 1 << 16])?);
    let line = format!(
        "-S -nodefaults -display none -m 32 -smp 1 -kernel {kernel} \
         -device pcie-root-port,id=rp1,chassis=1 -device pcie-root-port,id=rp2,chassis=2 \
         -drive if=none,id=d1,file={one},format=raw,discard=unmap \
         -drive if=none,id=d2,file={two},format=raw,readonly=on \
         -device virtio-blk-pci,drive=d1,bus=rp1 -device virtio-blk-pci,drive=d2,packed=on \
         -device virtio-rng-pci,bus=rp2 -serial null"
    );
    let mut words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
    // SAFETY: geteuid has no arguments and cannot fail.
    #[allow(unsafe_code)]
    let root = unsafe { libc::geteuid() } == 0;
    if root && File::options().read(true).write(true).open("/dev/net/tun").is_ok() {
        let nic = "-netdev tap,id=n,script=no,downscript=no -device virtio-net-pci,netdev=n";
        words.extend(nic.split_whitespace().map(str::to_owned));
    }
    let spec = match parse(&words).map_err(|e| e.to_string())? {
        Parsed::Machine(spec) => *spec,
        other => return Err(format!("{other:?}")),
    };
    let chardevs = spec.chardevs.iter().map(|c| chardev::open(c, chardev::Options::serial()));
    let chardevs = chardevs.collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
    let (requests, _) = crossbeam_channel::unbounded();
    crate::assemble::build(&spec, &chardevs, &EventBus::new(), &requests)
}

struct Guest {
    machine: Arc<Machine>,
    /// ECAM addresses of the functions that are there at power-on.
    functions: Vec<u64>,
}

impl Guest {
    fn new(machine: Arc<Machine>) -> Self {
        let mut guest = Self { machine, functions: Vec::new() };
        let all = (0..BUSES << 8).map(|bdf| ECAM + (bdf << 12));
        guest.functions = all.filter(|f| guest.read(*f, 4) != 0xffff_ffff).collect();
        guest
    }

    fn read(&self, address: u64, width: u8) -> u64 {
        let mut data = [0; 8];
        self.machine.parts.io.mmio_read(address, &mut data[..usize::from(width)]);
        u64::from_le_bytes(data)
    }

    fn write(&self, address: u64, width: u8, value: u64) {
        let data = &value.to_le_bytes()[..usize::from(width)];
        let _ = self.machine.parts.io.mmio_write(address, data);
    }

    fn mmio(&self, address: u64, a: &Access) {
        match a.write {
            // RAM is not on the bus; what is there the guest writes as it likes.
            _ if address < RAM => {}
            true => self.write(address, a.width, a.value),
            false => drop(self.read(address, a.width)),
        }
    }

    fn port(&self, port: u16, a: &Access) {
        let width = usize::from(a.width.min(4));
        match a.write {
            true => drop(self.machine.parts.io.port_write(port, &a.value.to_le_bytes()[..width])),
            false => self.machine.parts.io.port_read(port, &mut [0; 4][..width]),
        }
    }

    /// Where a BAR is now: an address, and whether it is a port.
    fn bar(&self, function: u64, bar: u8) -> (u64, bool) {
        let register = |n: u64| self.read(function + 0x10 + 4 * n, 4);
        let low = register(u64::from(bar % 6));
        match low {
            _ if low & 1 == 1 => (low & !3, true),
            _ if low & 6 == 4 && bar < 5 => (low & !15 | register(u64::from(bar) + 1) << 32, false),
            _ => (low & !15, false),
        }
    }

    fn act(&self, op: &Op) {
        let function = |f: &prop::sample::Index| *f.get(&self.functions);
        match op {
            Op::Config(f, offset, true, a) => self.mmio(function(f) + u64::from(*offset), a),
            Op::Config(f, offset, false, a) => {
                let bdf = (function(f) - ECAM) >> 4;
                let address = 0x8000_0000 | bdf | u64::from(offset & 0xfc);
                self.port(0xcf8, &Access { write: true, width: 4, value: address });
                self.port(0xcfc + (offset & 3), a);
            }
            Op::Bar(f, bar, offset, a) => match self.bar(function(f), *bar) {
                (port, true) => self.port((port as u16).wrapping_add(*offset), a),
                (address, false) => self.mmio(address.wrapping_add((*offset).into()), a),
            },
            Op::Port(port, a) => self.port(*port, a),
            Op::Mmio(address, a) => self.mmio(*address, a),
            Op::Ring(f, queue, rings) => self.ring(function(f), *queue, *rings),
            Op::Ram(at, bytes) => {
                let room = (RAM - at).min(bytes.len() as u64) as usize;
                self.machine.parts.mem.write(*at, &bytes[..room]).unwrap();
            }
            Op::Stop => self.machine.stop().unwrap(),
            Op::Cont => drop(self.machine.cont()),
            Op::Reset => self.machine.reset(true, "guest-reset").unwrap(),
            Op::Move => {
                let ran = self.machine.state() == RunState::Running;
                self.machine.stop().unwrap();
                // A device whose driver talks nonsense may refuse to be loaded, in words.
                let _ = self.machine.rehearse();
                if ran {
                    let _ = self.machine.cont();
                }
            }
        }
    }

    /// VIRTIO 1.2, section 4.1.4.3: the common configuration is at the beginning of BAR 4 here.
    fn ring(&self, function: u64, queue: u16, rings: [u64; 3]) {
        self.write(function + 4, 2, 6); // memory space, bus master
        let (bar, _) = self.bar(function, 4);
        if bar < RAM {
            return;
        }
        for status in [0, 1, 3] {
            self.write(bar + 0x14, 1, status);
        }
        for half in [0, 1] {
            self.write(bar, 4, half);
            let offered = self.read(bar + 4, 4);
            self.write(bar + 8, 4, half);
            self.write(bar + 12, 4, offered);
        }
        self.write(bar + 0x14, 1, 11);
        self.write(bar + 0x16, 2, queue.into());
        self.write(bar + 0x1a, 2, (queue & 1).into());
        for (i, ring) in (0u64..).zip(rings) {
            self.write(bar + 0x20 + 8 * i, 4, ring & 0xffff_ffff);
            self.write(bar + 0x24 + 8 * i, 4, ring >> 32);
        }
        self.write(bar + 0x1c, 2, 1);
        self.write(bar + 0x14, 1, 15);
        self.write(bar + 0x3000 + 4 * u64::from(queue), 2, queue.into());
    }

    /// All configuration space, and the first registers of virtio functions: (where, what).
    fn look(&self) -> Vec<(String, u64)> {
        let mut all = Vec::new();
        for bdf in 0..BUSES << 8 {
            let function = ECAM + (bdf << 12);
            for at in (0..0x100).step_by(4) {
                all.push((format!("{bdf:#x} {at:#x}"), self.read(function + at, 4)));
            }
        }
        for (i, function) in self.functions.iter().enumerate() {
            let (bar, _) = self.bar(*function, 4);
            if self.read(*function, 2) == 0x1af4 && bar >= RAM {
                for at in (0..0x38).step_by(4) {
                    all.push((format!("function {i} virtio {at:#x}"), self.read(bar + at, 4)));
                }
            }
        }
        all
    }
}

/// What is another than it was: where, before, after.
fn changed(before: Vec<(String, u64)>, after: Vec<(String, u64)>) -> Vec<(String, u64, u64)> {
    let pairs = before.into_iter().zip(after);
    pairs.filter(|(b, a)| b != a).map(|((at, b), (_, a))| (at, b, a)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn nonsense_on_the_buses_of_a_running_machine(ops in prop::collection::vec(op(), 1..400)) {
        if !e2e::tiny::has_kvm() {
            return Ok(());
        }
        let before = PANICS.load(Ordering::SeqCst);
        static HOOK: std::sync::Once = std::sync::Once::new();
        HOOK.call_once(|| {
            let hook = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                PANICS.fetch_add(1, Ordering::SeqCst);
                hook(info);
            }));
        });
        let dir = tempfile::tempdir().unwrap();
        let guest = Guest::new(machine(dir.path()).unwrap());
        // Two bridges, and a host bridge, LPC, disks, ... behind and beside them.
        prop_assert!(guest.functions.len() >= 7, "{:x?}", guest.functions);
        let at_power_on = guest.look();
        guest.machine.cont().unwrap();
        for op in &ops {
            guest.act(op);
        }
        let _ = guest.machine.stop();
        guest.machine.reset(false, "host-qmp-system-reset").unwrap();
        let changed = changed(at_power_on, guest.look());
        prop_assert!(changed.is_empty(), "a reset leaves another machine: {changed:x?}");
        guest.machine.save().unwrap();
        guest.machine.rehearse().unwrap();
        let _ = crate::pci_info::describe(&guest.machine.parts.pci);
        drop(guest);
        prop_assert_eq!(PANICS.load(Ordering::SeqCst), before, "a thread panicked");
    }
}
