//! Placing PCI resources as firmware would, for a guest that boots without any: bus numbers, BARs,
//! bridge windows, command registers. It works through configuration space only, so it needs
//! nothing of a function but registers.
//!
//! The outcome depends on nothing but the tree, so that both ends of a migration agree, and a
//! reset gives the same again. Each kind of space is a cursor that only moves up: a bridge's
//! window is what its children took, rounded up, and at least what a hotplugged device needs.

use std::sync::Arc;

use super::config::{command, reg};
use super::device::{BarInfo, BarKind, PciDevice, Window};
use super::root::{Node, Tree};
use super::{intx_gsi, swizzle};

/// What the root may hand out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    pub io: Window,
    /// Below 4 GiB.
    pub memory: Window,
    /// Above RAM, for 64-bit prefetchable BARs.
    pub memory64: Window,
}

impl Windows {
    /// Ports from 0x1000, 0xc0000000 to 0xfebfffff, and `size` bytes from `base64`.
    pub fn standard(base64: u64, size: u64) -> Self {
        Self {
            io: Window { base: 0x1000, limit: 0xffff },
            memory: Window { base: 0xc000_0000, limit: 0xfebf_ffff },
            memory64: Window { base: base64, limit: base64.saturating_add(size - 1) },
        }
    }
}

/// A BAR or window that does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DoesNotFit {
    #[error(
        "{name}: no room for a BAR of {size:#x} bytes in the {space} window; use fewer or smaller devices"
    )]
    Bar { name: String, size: u64, space: &'static str },
    #[error("{name}: no room for its bridge window in the {space} window; use fewer root ports")]
    Bridge { name: String, space: &'static str },
    #[error("{name}: more than 256 PCI buses")]
    Buses { name: String },
}

/// The least that a bridge gets, for what may be plugged in later.
const BRIDGE_IO: u64 = 0x1000;
const BRIDGE_MEMORY: u64 = 2 << 20;
const BRIDGE_PREFETCH: u64 = 32 << 20;
const IO_STEP: u64 = 0x1000;
const MEMORY_STEP: u64 = 1 << 20;

/// One kind of address space.
struct Cursor {
    space: &'static str,
    next: u64,
    limit: u64,
}

impl Cursor {
    fn new(space: &'static str, w: Window) -> Self {
        Self { space, next: w.base, limit: w.limit }
    }

    /// Moves to a multiple of `to`, a power of two.
    fn align(&mut self, to: u64) {
        self.next = self.next.checked_next_multiple_of(to).unwrap_or(u64::MAX);
    }

    fn take(&mut self, size: u64) -> Option<u64> {
        let start = self.next.checked_next_multiple_of(size)?;
        let last = start.checked_add(size - 1).filter(|&l| l <= self.limit)?;
        self.next = last.checked_add(1)?;
        Some(start)
    }
}

struct Assigner<'a> {
    tree: &'a Tree,
    io: Cursor,
    memory: Cursor,
    memory64: Cursor,
    next_bus: u16,
}

/// Assigns everything in `tree`.
pub(super) fn assign(tree: &Tree, w: Windows) -> Result<(), DoesNotFit> {
    let mut a = Assigner {
        tree,
        io: Cursor::new("I/O", w.io),
        memory: Cursor::new("32-bit memory", w.memory),
        memory64: Cursor::new("64-bit memory", w.memory64),
        next_bus: 1,
    };
    for n in &tree.nodes {
        let off = read16(&n.device, reg::COMMAND) & !(command::IO | command::MEMORY);
        write(&n.device, reg::COMMAND, &off.to_le_bytes());
    }
    a.bus(0, 0, &|slot, pin| intx_gsi(slot, pin))
}

fn write(d: &Arc<dyn PciDevice>, at: usize, data: &[u8]) {
    // The root makes its snapshot anew when all is assigned.
    let _ = d.config_write(at as u16, data);
}

fn read16(d: &Arc<dyn PciDevice>, at: usize) -> u16 {
    let mut b = [0; 2];
    d.config_read(at as u16, &mut b);
    u16::from_le_bytes(b)
}

impl Assigner<'_> {
    /// `gsi`: of a slot and pin on this bus.
    fn bus(
        &mut self,
        bus: usize,
        number: u8,
        gsi: &dyn Fn(u8, u8) -> u32,
    ) -> Result<(), DoesNotFit> {
        let tree = self.tree;
        let mut bars: Vec<(&Node, BarInfo)> = tree
            .on_bus(bus)
            .flat_map(|n| n.device.bars().into_iter().map(move |b| (n, b)))
            .collect();
        // Largest first leaves no holes; the sort is stable, so the order is the tree's else.
        bars.sort_by_key(|(_, b)| std::cmp::Reverse(b.size));
        for (n, b) in bars {
            self.bar(n, b)?;
        }
        for n in tree.on_bus(bus) {
            let [line, pin] = read16(&n.device, reg::INTERRUPT_LINE).to_le_bytes();
            // A function with a line already has it wired so.
            if pin != 0 && line == 0 {
                write(&n.device, reg::INTERRUPT_LINE, &[gsi(n.slot, pin) as u8]);
            }
            if n.device.bridge().is_some() {
                self.bridge(n, number, &|slot, pin| gsi(n.slot, swizzle(slot, pin)))?;
            }
            enable(&n.device);
        }
        Ok(())
    }

    fn bar(&mut self, n: &Node, b: BarInfo) -> Result<(), DoesNotFit> {
        let cursor = match b.kind {
            BarKind::Io => &mut self.io,
            BarKind::Mem32 => &mut self.memory,
            BarKind::Mem64Prefetch => &mut self.memory64,
        };
        let address = cursor.take(b.size).ok_or_else(|| DoesNotFit::Bar {
            name: n.device.name().to_owned(),
            size: b.size,
            space: cursor.space,
        })?;
        let at = reg::BAR0 + 4 * usize::from(b.index);
        write(&n.device, at, &(address as u32).to_le_bytes());
        if b.kind == BarKind::Mem64Prefetch {
            write(&n.device, at + 4, &((address >> 32) as u32).to_le_bytes());
        }
        Ok(())
    }

    fn bridge(
        &mut self,
        n: &Node,
        primary: u8,
        gsi: &dyn Fn(u8, u8) -> u32,
    ) -> Result<(), DoesNotFit> {
        let d = &n.device;
        let secondary = u8::try_from(self.next_bus)
            .map_err(|_| DoesNotFit::Buses { name: d.name().to_owned() })?;
        self.next_bus += 1;
        write(d, reg::PRIMARY_BUS, &[primary, secondary, 0xff]);
        self.io.align(IO_STEP);
        self.memory.align(MEMORY_STEP);
        self.memory64.align(MEMORY_STEP);
        let start = [self.io.next, self.memory.next, self.memory64.next];
        if let Some(below) = self.tree.bus_below(d.name()) {
            self.bus(below, secondary, gsi)?;
        }
        write(d, reg::PRIMARY_BUS + 2, &[(self.next_bus - 1) as u8]);
        let no_room = |space| DoesNotFit::Bridge { name: d.name().to_owned(), space };
        // I/O space is small and little used: a bridge without it is a bridge all the same.
        let io = close(&mut self.io, start[0], IO_STEP, BRIDGE_IO);
        let (base, limit) = io.map_or((0xf0, 0), |w| ((w.base >> 8) as u8, (w.limit >> 8) as u8));
        write(d, reg::IO_BASE, &[base & 0xf0, limit & 0xf0]);
        let w = close(&mut self.memory, start[1], MEMORY_STEP, BRIDGE_MEMORY)
            .ok_or_else(|| no_room(self.memory.space))?;
        write(d, reg::MEMORY_BASE, &((w.base >> 16) as u16).to_le_bytes());
        write(d, reg::MEMORY_BASE + 2, &((w.limit >> 16) as u16).to_le_bytes());
        let w = close(&mut self.memory64, start[2], MEMORY_STEP, BRIDGE_PREFETCH)
            .ok_or_else(|| no_room(self.memory64.space))?;
        write(d, reg::PREFETCH_BASE, &((w.base >> 16) as u16).to_le_bytes());
        write(d, reg::PREFETCH_BASE + 2, &((w.limit >> 16) as u16).to_le_bytes());
        write(d, reg::PREFETCH_BASE + 4, &((w.base >> 32) as u32).to_le_bytes());
        write(d, reg::PREFETCH_BASE + 8, &((w.limit >> 32) as u32).to_le_bytes());
        Ok(())
    }
}

/// Ends a bridge's window that began at `start`: a multiple of `step`, at least `least`. `None` if
/// it does not fit: nothing below uses it then, or it would have failed already.
fn close(c: &mut Cursor, start: u64, step: u64, least: u64) -> Option<Window> {
    let used = c.next - start;
    let size = used.max(least).checked_next_multiple_of(step)?;
    let fits = |size: u64| start.checked_add(size - 1).filter(|&l| l <= c.limit);
    let limit = fits(size).or_else(|| fits(used.max(1).checked_next_multiple_of(step)?))?;
    c.next = limit.checked_add(1)?;
    Some(Window { base: start, limit })
}

/// Switches on what the function decodes; bridges forward in both directions.
fn enable(d: &Arc<dyn PciDevice>) {
    let mut on = read16(d, reg::COMMAND);
    for b in d.bars() {
        on |= if b.kind == BarKind::Io { command::IO } else { command::MEMORY };
    }
    if d.bridge().is_some() {
        on |= command::IO | command::MEMORY | command::MASTER;
    }
    write(d, reg::COMMAND, &on.to_le_bytes());
}
