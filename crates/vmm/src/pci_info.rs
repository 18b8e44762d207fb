//! `query-pci`: the functions of the PCI root as QEMU shows them (qapi/pci.json).

use devices::pci::root::{FunctionInfo, PciRoot};
use devices::pci::{BarKind, Window};
use serde_json::{Value, json};

/// The reply to `query-pci`: one entry a bus without a bridge above it, bridges with their buses
/// inside.
pub fn describe(root: &PciRoot) -> Value {
    let all = root.list();
    json!([{ "bus": 0, "devices": bus(&all, 0, 0) }])
}

/// Deeper than this there are no bridges in a machine that Tern builds.
const MAX_DEPTH: usize = 8;

fn bus(all: &[FunctionInfo], number: u8, depth: usize) -> Value {
    let here = all.iter().filter(|f| f.bdf.bus == number);
    here.map(|f| function(all, f, depth)).collect()
}

fn function(all: &[FunctionInfo], f: &FunctionInfo, depth: usize) -> Value {
    let mut v = json!({
        "bus": f.bdf.bus,
        "slot": f.bdf.slot,
        "function": f.bdf.function,
        "class_info": { "desc": class_name(f.class), "class": f.class },
        "id": { "device": f.device, "vendor": f.vendor },
        "irq_pin": f.interrupt_pin,
        "qdev_id": f.name,
        "regions": f.bars.iter().map(bar).collect::<Value>(),
    });
    if f.interrupt_pin != 0 {
        v["irq"] = json!(f.interrupt_line);
    }
    if f.bridge.is_none() {
        v["id"]["subsystem-vendor"] = json!(f.subsystem.0);
        v["id"]["subsystem"] = json!(f.subsystem.1);
    }
    if let Some(b) = &f.bridge {
        let range = |w: Option<Window>| {
            let w = w.unwrap_or(Window { base: 0, limit: 0 });
            json!({ "base": w.base, "limit": w.limit })
        };
        let mut bridge = json!({
            "bus": {
                "number": b.primary, "secondary": b.secondary, "subordinate": b.subordinate,
                "io_range": range(b.io), "memory_range": range(b.memory),
                "prefetchable_range": range(b.prefetch),
            },
        });
        if b.secondary != 0 && depth < MAX_DEPTH {
            bridge["devices"] = bus(all, b.secondary, depth + 1);
        }
        v["pci_bridge"] = bridge;
    }
    v
}

fn bar(b: &devices::pci::BarInfo) -> Value {
    let address = b.address.map_or(json!(-1), |a| json!(a));
    let base = json!({ "bar": b.index, "size": b.size, "address": address });
    let mut v = base;
    match b.kind {
        BarKind::Io => v["type"] = json!("io"),
        BarKind::Mem32 | BarKind::Mem64Prefetch => {
            let wide = b.kind == BarKind::Mem64Prefetch;
            v["type"] = json!("memory");
            v["mem_type_64"] = json!(wide);
            v["prefetch"] = json!(wide);
        }
    }
    v
}

fn class_name(class: u16) -> &'static str {
    match class {
        0x0100 => "SCSI controller",
        0x0200 => "Ethernet controller",
        0x00ff => "RNG",
        0x0600 => "Host bridge",
        0x0601 => "ISA bridge",
        0x0604 => "PCI bridge",
        0x0680 => "Bridge",
        _ => "Class",
    }
}
