//! The PCI root: which function is where, access to configuration space (ECAM and ports 0xcf8 and
//! 0xcfc), and which BAR answers to an address.
//!
//! Invariants: accesses look things up in a snapshot and take no lock of the root. The snapshot
//! is made anew, under one lock, whenever a function reports [`Effect::Relayout`]; the functions'
//! [`PciDevice::relayout`] hooks run under the same lock, so that they run in the order of the
//! snapshots. A BAR behind a bridge answers only inside the bridge's open windows. Where the
//! guest makes BARs overlap, the function found first (lowest place) answers.
//!
//! Without firmware the VMM does its work: [`PciRoot::assign`] numbers buses, places BARs and
//! switches decoding on; after a reset this is done again when the machine resumes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use arc_swap::ArcSwap;
use minicbor::{Decode, Encode};
use parking_lot::Mutex;

use super::assign::{self, Windows};
use super::config::reg;
use super::device::{BarInfo, BarKind, BridgeInfo, PciDevice};
use super::{Bdf, intx_gsi, swizzle};
use crate::bus::{Access, BusDevice, Effect};
use crate::shared::Shared;

/// Where ECAM is, and how large: 256 buses of 1 MiB.
pub const ECAM_BASE: u64 = 0xb000_0000;
pub const ECAM_BYTES: u64 = 256 << 20;
/// The ports of configuration mechanism 1, with the reset control register at 0xcf9.
pub const CONFIG_PORTS: u64 = 0xcf8;
pub const CONFIG_PORTS_COUNT: u64 = 8;
/// The reset control register among them, and what to write there: the FADT's `RESET_REG` and
/// `RESET_VALUE`.
pub const RESET_PORT: u16 = 0xcf9;
pub const RESET_VALUE: u8 = 6;

/// Why a function cannot be added or found, in QEMU's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    #[error("Bus '{0}' not found")]
    NoBus(String),
    #[error("PCI: slot {slot} function {function} not available for {device}, in use by {user}")]
    InUse { slot: u8, function: u8, device: String, user: String },
    #[error("PCI: no slot/function available for {0}, all in use or reserved")]
    Full(String),
    #[error(
        "PCI: slot {slot} is not valid for {device}, parent device only allows plugging into slot 0."
    )]
    OnlySlotZero { slot: u8, device: String },
    #[error("PCI: single function device can't be populated in function {slot:x}.{function}")]
    SingleFunction { slot: u8, function: u8 },
    #[error(
        "PCI: {slot:x}.0 indicates single function, but {slot:x}.{function:x} is already populated."
    )]
    NotMultifunction { slot: u8, function: u8 },
    #[error(
        "PCI: slot {slot} function {function} does not exist: slots are 0 to 31, functions 0 to 7"
    )]
    BadAddress { slot: u8, function: u8 },
    #[error("Duplicate device ID '{0}'")]
    Duplicate(String),
    #[error("Device '{0}' not found")]
    NoDevice(String),
}

/// A function in the tree.
pub(super) struct Node {
    pub bus: usize,
    pub slot: u8,
    pub function: u8,
    pub multifunction: bool,
    pub device: Arc<dyn PciDevice>,
}

impl Node {
    fn describe(&self) -> String {
        match self.device.name() {
            "" => self.device.type_name().to_owned(),
            id => format!("{},id={id}", self.device.type_name()),
        }
    }
}

/// A bus in the tree; index 0 is the root's.
pub(super) struct BusNode {
    pub name: String,
    /// The unit name of the bridge above it; `None` for the root's.
    pub bridge: Option<String>,
}

/// The tree as plugged, sorted by bus, slot, function.
pub(super) struct Tree {
    pub nodes: Vec<Node>,
    pub buses: Vec<BusNode>,
    windows: Option<Windows>,
    assign_on_resume: bool,
}

impl Tree {
    pub fn on_bus(&self, bus: usize) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(move |n| n.bus == bus)
    }

    /// The bus below the function called `name`.
    pub fn bus_below(&self, name: &str) -> Option<usize> {
        self.buses.iter().position(|b| b.bridge.as_deref() == Some(name))
    }

    fn check_place(
        &self,
        bus: usize,
        (slot, function): (u8, u8),
        multifunction: bool,
        device: &str,
    ) -> Result<(), PciError> {
        if slot > 31 || function > 7 {
            return Err(PciError::BadAddress { slot, function });
        }
        if bus != 0 && slot != 0 {
            return Err(PciError::OnlySlotZero { slot, device: device.to_owned() });
        }
        let others: Vec<_> = self.on_bus(bus).filter(|n| n.slot == slot).collect();
        if let Some(n) = others.iter().find(|n| n.function == function) {
            let (device, user) = (device.to_owned(), n.describe());
            return Err(PciError::InUse { slot, function, device, user });
        }
        if function != 0 {
            let first = others.iter().find(|n| n.function == 0);
            if first.is_some_and(|n| !n.multifunction) {
                return Err(PciError::SingleFunction { slot, function });
            }
        } else if !multifunction && let Some(n) = others.first() {
            return Err(PciError::NotMultifunction { slot, function: n.function });
        }
        Ok(())
    }

    fn free_slot(&self, bus: usize, device: &str) -> Result<(u8, u8), PciError> {
        let last = if bus == 0 { 31 } else { 0 };
        (0..=last)
            .find(|&s| !self.on_bus(bus).any(|n| n.slot == s))
            .map(|s| (s, 0))
            .ok_or_else(|| PciError::Full(device.to_owned()))
    }
}

/// A BAR that answers.
#[derive(Clone)]
struct Decoded {
    start: u64,
    last: u64,
    bar: u8,
    device: Arc<dyn PciDevice>,
}

#[derive(Clone)]
struct Function {
    place: u16,
    multifunction: bool,
    device: Arc<dyn PciDevice>,
}

/// The snapshot that accesses look into.
#[derive(Default)]
struct Map {
    /// Sorted by bus << 8 | devfn.
    functions: Vec<Function>,
    /// Sorted by start, without overlap.
    mmio: Vec<Decoded>,
    io: Vec<Decoded>,
}

impl Map {
    fn function(&self, place: u16) -> Option<&Function> {
        let at = self.functions.binary_search_by_key(&place, |f| f.place).ok()?;
        Some(&self.functions[at])
    }

    fn build(tree: &Tree) -> Self {
        let mut map = Self::default();
        map.add_bus(tree, 0, 0, None, &mut [false; 256]);
        map.functions.sort_by_key(|f| f.place);
        for list in [&mut map.mmio, &mut map.io] {
            list.sort_by_key(|d| d.start);
            let mut end = None;
            list.retain(|d| {
                let keep = end.is_none_or(|e| d.start > e);
                if keep {
                    end = Some(d.last);
                }
                keep
            });
        }
        map
    }

    /// `above`: the bridge that leads here.
    fn add_bus(
        &mut self,
        tree: &Tree,
        bus: usize,
        number: u8,
        above: Option<&BridgeInfo>,
        seen: &mut [bool; 256],
    ) {
        if std::mem::replace(&mut seen[usize::from(number)], true) {
            return;
        }
        for n in tree.on_bus(bus) {
            let devfn = n.slot << 3 | n.function;
            self.functions.push(Function {
                place: u16::from(number) << 8 | u16::from(devfn),
                multifunction: n.multifunction,
                device: n.device.clone(),
            });
            for bar in n.device.bars() {
                self.add_bar(&n.device, bar, above);
            }
            let below = tree.bus_below(n.device.name());
            if let (Some(info), Some(below)) = (n.device.bridge(), below) {
                let reachable =
                    above.is_none_or(|a| (a.secondary..=a.subordinate).contains(&info.secondary));
                if info.secondary != 0 && reachable {
                    self.add_bus(tree, below, info.secondary, Some(&info), seen);
                }
            }
        }
    }

    fn add_bar(&mut self, device: &Arc<dyn PciDevice>, bar: BarInfo, above: Option<&BridgeInfo>) {
        let Some(start) = bar.address else { return };
        let open = above.is_none_or(|a| {
            let windows = match bar.kind {
                BarKind::Io => [a.io, None],
                _ => [a.memory, a.prefetch],
            };
            windows.iter().flatten().any(|w| w.holds(start, bar.size))
        });
        if open {
            let last = start + (bar.size - 1);
            let list = if bar.kind == BarKind::Io { &mut self.io } else { &mut self.mmio };
            list.push(Decoded { start, last, bar: bar.index, device: device.clone() });
        }
    }
}

fn find(list: &[Decoded], address: u64, length: usize) -> Option<&Decoded> {
    let after = list.partition_point(|d| d.start <= address);
    let d = list[..after].last()?;
    (address.checked_add(length as u64)? - 1 <= d.last).then_some(d)
}

/// What `query-pci` and `info pci` show of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionInfo {
    pub bdf: Bdf,
    pub name: String,
    pub type_name: String,
    pub vendor: u16,
    pub device: u16,
    /// Subsystem vendor and id; zeros for a bridge.
    pub subsystem: (u16, u16),
    /// 0xCCSS.
    pub class: u16,
    /// 0 for none, 1 for INTA.
    pub interrupt_pin: u8,
    pub interrupt_line: u8,
    pub bars: Vec<BarInfo>,
    pub bridge: Option<BridgeInfo>,
}

/// What is saved of the root itself.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct PciRootState {
    #[n(0)]
    pub config_address: u32,
    #[n(1)]
    pub reset_control: u8,
}

impl state::SavedState for PciRootState {
    const KIND: &'static str = "pci-root";
    const VERSION: u16 = 1;
}

/// The host's PCI hierarchy.
pub struct PciRoot {
    tree: Mutex<Tree>,
    map: ArcSwap<Map>,
    config_address: AtomicU32,
    reset_control: AtomicU8,
}

impl PciRoot {
    /// A root whose first bus is called `bus_name`: "pcie.0" for q35, "pci.0" for pc.
    pub fn new(bus_name: &str) -> Arc<Self> {
        let buses = vec![BusNode { name: bus_name.to_owned(), bridge: None }];
        let tree = Tree { nodes: Vec::new(), buses, windows: None, assign_on_resume: false };
        Arc::new(Self {
            tree: Mutex::new(tree),
            map: ArcSwap::default(),
            config_address: AtomicU32::new(0),
            reset_control: AtomicU8::new(0),
        })
    }

    /// Plugs a function in at `place` (slot, function) of the bus called `bus`, or at the first
    /// free slot. A bridge brings a bus of its own name. Returns where it is; the bus number is 0
    /// until buses are numbered.
    ///
    /// # Errors
    /// See [`PciError`].
    pub fn add(
        &self,
        bus: &str,
        place: Option<(u8, u8)>,
        multifunction: bool,
        device: Arc<dyn PciDevice>,
    ) -> Result<Bdf, PciError> {
        let mut tree = self.tree.lock();
        let named = tree.buses.iter().position(|b| b.name == bus);
        let index = named.ok_or_else(|| PciError::NoBus(bus.to_owned()))?;
        let name = device.name().to_owned();
        if tree.nodes.iter().any(|n| n.device.name() == name) {
            return Err(PciError::Duplicate(name));
        }
        let (slot, function) = match place {
            Some(p) => p,
            None => tree.free_slot(index, device.type_name())?,
        };
        tree.check_place(index, (slot, function), multifunction, device.type_name())?;
        if device.bridge().is_some() {
            tree.buses.push(BusNode { name: name.clone(), bridge: Some(name) });
        }
        let above = tree.buses[index].bridge.clone();
        tree.nodes.push(Node { bus: index, slot, function, multifunction, device });
        tree.nodes.sort_by_key(|n| (n.bus, n.slot, n.function));
        let bridge = above.and_then(|a| tree.nodes.iter().find(|n| n.device.name() == a));
        let mut number = 0;
        if let Some(b) = bridge {
            b.device.slot_occupied(true);
            number = b.device.bridge().map_or(0, |i| i.secondary);
        }
        self.rebuild(&tree);
        Ok(Bdf { bus: number, slot, function })
    }

    /// Pulls out the function called `name`, which must not be a bridge with something behind it.
    ///
    /// # Errors
    /// If there is no such function, or its bus is in use.
    pub fn remove(&self, name: &str) -> Result<Arc<dyn PciDevice>, PciError> {
        let mut tree = self.tree.lock();
        let at = tree.nodes.iter().position(|n| n.device.name() == name);
        let at = at.ok_or_else(|| PciError::NoDevice(name.to_owned()))?;
        let below = tree.bus_below(name);
        if let Some(n) = below.and_then(|b| tree.on_bus(b).next()) {
            let (device, user) = (n.device.type_name().to_owned(), n.describe());
            return Err(PciError::InUse { slot: n.slot, function: n.function, device, user });
        }
        let node = tree.nodes.remove(at);
        if let Some(below) = below {
            tree.buses.remove(below);
            tree.nodes.iter_mut().filter(|n| n.bus > below).for_each(|n| n.bus -= 1);
        }
        let above = tree.buses.get(node.bus).and_then(|b| b.bridge.clone());
        let emptied = tree.on_bus(node.bus).next().is_none();
        let bridge = above.and_then(|a| tree.nodes.iter().find(|n| n.device.name() == a));
        if let Some(b) = bridge.filter(|_| emptied) {
            b.device.slot_occupied(false);
        }
        self.rebuild(&tree);
        Ok(node.device)
    }

    /// Numbers buses, places BARs in `windows`, opens bridges and switches decoding on, as
    /// firmware would. Remembered, to be done again after a reset.
    ///
    /// # Errors
    /// A sentence on what does not fit.
    pub fn assign(&self, windows: Windows) -> Result<(), assign::DoesNotFit> {
        let mut tree = self.tree.lock();
        tree.windows = Some(windows);
        assign::assign(&tree, windows)?;
        self.rebuild(&tree);
        tree.nodes.iter().for_each(|n| n.device.relayout());
        Ok(())
    }

    /// After a reset of all functions: what [`assign`](Self::assign) did, again. Done at the latest
    /// when the machine resumes; one that is saved before must be given its addresses earlier.
    pub fn assign_again(&self) {
        let again = {
            let mut tree = self.tree.lock();
            std::mem::take(&mut tree.assign_on_resume).then_some(tree.windows).flatten()
        };
        if let Some(Err(e)) = again.map(|w| self.assign(w)) {
            tracing::error!("PCI resources after reset: {e}");
        }
    }

    /// Looks at all BARs again.
    pub fn relayout(&self) {
        let tree = self.tree.lock();
        self.rebuild(&tree);
        tree.nodes.iter().for_each(|n| n.device.relayout());
    }

    fn rebuild(&self, tree: &Tree) {
        self.map.store(Arc::new(Map::build(tree)));
    }

    /// After an access by the guest: acts on [`Effect::Relayout`], hands on the others.
    fn effect(&self, device: &Arc<dyn PciDevice>, effect: Effect) -> Effect {
        if effect != Effect::Relayout {
            return effect;
        }
        let tree = self.tree.lock();
        self.rebuild(&tree);
        device.relayout();
        if device.bridge().is_some() {
            tree.nodes.iter().for_each(|n| n.device.relayout());
        }
        Effect::None
    }

    /// Every function that configuration accesses reach, by place.
    pub fn list(&self) -> Vec<FunctionInfo> {
        self.map.load().functions.iter().map(describe).collect()
    }

    /// The place of the function called `name`, as the buses are numbered now.
    pub fn find(&self, name: &str) -> Option<Bdf> {
        let map = self.map.load();
        map.functions.iter().find(|f| f.device.name() == name).map(|f| bdf(f.place))
    }

    /// The slot and function that [`add`](Self::add) would give the next function on the bus called
    /// `bus`; `None` if there is no such bus or it is full. Its interrupt line depends on it.
    pub fn free_place(&self, bus: &str) -> Option<(u8, u8)> {
        let tree = self.tree.lock();
        let index = tree.buses.iter().position(|b| b.name == bus)?;
        tree.free_slot(index, "").ok()
    }

    /// Where the function called `name` is plugged in, as bus name, slot and function: unlike
    /// [`find`](Self::find) it does not change when the guest numbers its buses anew.
    pub fn place(&self, name: &str) -> Option<String> {
        let tree = self.tree.lock();
        let n = tree.nodes.iter().find(|n| n.device.name() == name)?;
        Some(format!("{}:{:02x}.{:x}", tree.buses[n.bus].name, n.slot, n.function))
    }

    /// The GSI that INTx pin `pin` (1..=4) of a function at (`slot`) of the bus called `bus` comes
    /// out at.
    ///
    /// # Errors
    /// If there is no such bus.
    pub fn intx_gsi(&self, bus: &str, mut slot: u8, mut pin: u8) -> Result<u32, PciError> {
        let tree = self.tree.lock();
        let mut at = bus.to_owned();
        // Each turn goes up one bridge; there are no more bridges than functions.
        for _ in 0..=tree.nodes.len() {
            let b = tree.buses.iter().find(|b| b.name == at);
            let b = b.ok_or_else(|| PciError::NoBus(at.clone()))?;
            let Some(bridge) = &b.bridge else { return Ok(intx_gsi(slot, pin)) };
            let n = tree.nodes.iter().find(|n| n.device.name() == bridge);
            let n = n.ok_or_else(|| PciError::NoBus(at.clone()))?;
            pin = swizzle(slot, pin);
            slot = n.slot;
            at = tree.buses[n.bus].name.clone();
        }
        Err(PciError::NoBus(bus.to_owned()))
    }

    /// ECAM: put it at [`ECAM_BASE`], [`ECAM_BYTES`] long.
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Ecam(self.clone()))
    }

    /// Configuration ports: put it at [`CONFIG_PORTS`], [`CONFIG_PORTS_COUNT`] long.
    pub fn config_ports(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(ConfigPorts(self.clone()))
    }

    /// Memory BARs, by guest address: for [`Bus::set_fallback`](crate::bus::Bus::set_fallback).
    pub fn mmio(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Bars { root: self.clone(), io: false })
    }

    /// I/O BARs, by port: for [`Bus::set_fallback`](crate::bus::Bus::set_fallback).
    pub fn pio(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Bars { root: self.clone(), io: true })
    }

    /// One access to configuration space, in aligned pieces of at most four bytes.
    fn config_read(&self, place: u16, offset: u16, data: &mut [u8]) {
        let map = self.map.load();
        let Some(f) = map.function(place) else { return data.fill(0xff) };
        for (at, piece) in pieces(offset, data.len()) {
            let data = &mut data[piece];
            f.device.config_read(at, data);
            let header = reg::HEADER_TYPE as u16;
            if f.multifunction && (at..at + data.len() as u16).contains(&header) {
                data[usize::from(header - at)] |= 0x80;
            }
        }
    }

    fn config_write(&self, place: u16, offset: u16, data: &[u8]) -> Effect {
        let map = self.map.load();
        let Some(f) = map.function(place) else { return Effect::None };
        let mut effect = Effect::None;
        for (at, piece) in pieces(offset, data.len()) {
            let e = self.effect(&f.device, f.device.config_write(at, &data[piece]));
            if e != Effect::None {
                effect = e;
            }
        }
        effect
    }
}

/// Cuts an access at `offset` into aligned pieces of 1, 2 or 4 bytes that end within the space.
fn pieces(offset: u16, length: usize) -> impl Iterator<Item = (u16, std::ops::Range<usize>)> {
    let end = length.min(0x1000usize.saturating_sub(usize::from(offset)));
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = end.checked_sub(at).filter(|&l| l > 0)?;
        let o = usize::from(offset) + at;
        let n = [4, 2, 1].into_iter().find(|&n| o.is_multiple_of(n) && n <= left)?;
        at += n;
        Some((o as u16, at - n..at))
    })
}

fn bdf(place: u16) -> Bdf {
    Bdf { bus: (place >> 8) as u8, slot: (place >> 3) as u8 & 31, function: place as u8 & 7 }
}

fn describe(f: &Function) -> FunctionInfo {
    let word = |at: usize| {
        let mut d = [0; 2];
        f.device.config_read(at as u16, &mut d);
        u16::from_le_bytes(d)
    };
    let bridge = f.device.bridge();
    let subsystem = match bridge {
        Some(_) => (0, 0),
        None => (word(reg::SUBSYSTEM), word(reg::SUBSYSTEM + 2)),
    };
    let [line, pin] = word(reg::INTERRUPT_LINE).to_le_bytes();
    FunctionInfo {
        bdf: bdf(f.place),
        name: f.device.name().to_owned(),
        type_name: f.device.type_name().to_owned(),
        vendor: word(reg::VENDOR),
        device: word(reg::VENDOR + 2),
        subsystem,
        class: word(reg::REVISION + 2),
        interrupt_pin: pin,
        interrupt_line: line,
        bars: f.device.bars(),
        bridge,
    }
}

impl Shared for PciRoot {
    type State = PciRootState;

    fn unit_name(&self) -> &str {
        "pci-root"
    }

    fn resume(&self) {
        self.assign_again();
        self.relayout();
    }

    fn save(&self) -> state::Result<PciRootState> {
        Ok(PciRootState {
            config_address: self.config_address.load(Ordering::Relaxed),
            reset_control: self.reset_control.load(Ordering::Relaxed),
        })
    }

    fn restore(&self, state: PciRootState) -> state::Result<()> {
        self.config_address.store(state.config_address & 0x80ff_fffc, Ordering::Relaxed);
        self.reset_control.store(state.reset_control & 0xa, Ordering::Relaxed);
        self.tree.lock().assign_on_resume = false;
        Ok(())
    }

    fn reset(&self) {
        self.config_address.store(0, Ordering::Relaxed);
        self.reset_control.store(0, Ordering::Relaxed);
        self.tree.lock().assign_on_resume = true;
    }

    fn migration_blocker(&self) -> Option<String> {
        None
    }
}

struct Ecam(Arc<PciRoot>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        self.0.config_read((offset >> 12) as u16, (offset & 0xfff) as u16, data);
        Access::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> (Access, Effect) {
        let effect = self.0.config_write((offset >> 12) as u16, (offset & 0xfff) as u16, data);
        (Access::Done, effect)
    }
}

struct ConfigPorts(Arc<PciRoot>);

impl ConfigPorts {
    /// The function and register that 0xcf8 selects for an access at 0xcfc + `low`.
    fn target(&self, low: u64) -> Option<(u16, u16)> {
        let a = self.0.config_address.load(Ordering::Relaxed);
        (a >> 31 == 1).then_some(((a >> 8) as u16, (a & 0xfc) as u16 + low as u16))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        data.fill(0xff);
        match offset {
            0 if data.len() == 4 => {
                let a = self.0.config_address.load(Ordering::Relaxed);
                data.copy_from_slice(&a.to_le_bytes());
            }
            1 if data.len() == 1 => data[0] = self.0.reset_control.load(Ordering::Relaxed),
            4..8 => {
                if let Some((place, at)) = self.target(offset - 4) {
                    self.0.config_read(place, at, data);
                }
            }
            _ => return Access::Fault,
        }
        Access::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> (Access, Effect) {
        let effect = match (offset, data) {
            (0, &[a, b, c, d]) => {
                let address = u32::from_le_bytes([a, b, c, d]) & 0x80ff_fffc;
                self.0.config_address.store(address, Ordering::Relaxed);
                Effect::None
            }
            // Reset control (ICH9 13.7.5): bit 2 going up resets, bits 1 and 3 choose how.
            (1, &[v]) => {
                self.0.reset_control.store(v & 0xa, Ordering::Relaxed);
                if v & 4 != 0 { Effect::Reset } else { Effect::None }
            }
            (4..8, _) => match self.target(offset - 4) {
                Some((place, at)) => self.0.config_write(place, at, data),
                None => Effect::None,
            },
            _ => return (Access::Fault, Effect::None),
        };
        (Access::Done, effect)
    }
}

struct Bars {
    root: Arc<PciRoot>,
    io: bool,
}

impl BusDevice for Bars {
    fn read(&self, address: u64, data: &mut [u8]) -> Access {
        let map = self.root.map.load();
        match find(if self.io { &map.io } else { &map.mmio }, address, data.len()) {
            Some(d) => d.device.bar_read(d.bar, address - d.start, data),
            None => {
                data.fill(0xff);
                Access::Fault
            }
        }
    }

    fn write(&self, address: u64, data: &[u8]) -> (Access, Effect) {
        let map = self.root.map.load();
        match find(if self.io { &map.io } else { &map.mmio }, address, data.len()) {
            Some(d) => {
                let (access, effect) = d.device.bar_write(d.bar, address - d.start, data);
                (access, self.root.effect(&d.device, effect))
            }
            None => (Access::Fault, Effect::None),
        }
    }
}
