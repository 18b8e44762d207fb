//! ACPI fixed hardware: power management event and control blocks, the timer, general purpose
//! events, the SMI command port (ACPI Specification 6.5, section 4.8).
//!
//! Invariants: the SCI line is up exactly while an enabled event's status is set. The timer
//! counts 3.579545 MHz of host monotonic time while the machine runs and stands still with it, so
//! it goes on without a jump after a migration.
//!
//! For the writer of the FADT: the constants here are what its fields must say; the timer is 24
//! bits wide.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use minicbor::{Decode, Encode};
use parking_lot::Mutex;

use crate::bus::{Access, BusDevice, Effect};
use crate::irq::IrqLine;
use crate::shared::Shared;
use crate::timer::Timer;

/// Ports of the block.
pub const PM_BASE: u16 = 0x600;
pub const PM_BYTES: u16 = 0x80;
/// `PM1a_EVT_BLK`, 4 bytes: status, enable.
pub const PM1_EVENT: u16 = PM_BASE;
/// `PM1a_CNT_BLK`, 2 bytes.
pub const PM1_CONTROL: u16 = PM_BASE + 4;
/// `PM_TMR_BLK`, 4 bytes.
pub const PM_TIMER: u16 = PM_BASE + 8;
/// `GPE0_BLK`: status, then enable.
pub const GPE0: u16 = PM_BASE + 0x20;
/// `GPE0_BLK_LEN`.
pub const GPE0_BYTES: u16 = 16;
/// `SCI_INT`.
pub const SCI_GSI: u32 = 9;
/// `SMI_CMD`, with the values of `ACPI_ENABLE` and `ACPI_DISABLE`; two ports.
pub const SMI_PORT: u16 = 0xb2;
pub const ACPI_ENABLE: u8 = 2;
pub const ACPI_DISABLE: u8 = 3;
/// `SLP_TYP` of `\_S5`. Other sleep states are not offered, and a guest's write of them is ignored.
pub const S5_SLEEP_TYPE: u8 = 0;

const FREQUENCY: u128 = 3_579_545;
const TIMER_MASK: u64 = 0xff_ffff;
const HALF: u64 = 0x80_0000;

const TIMER_STATUS: u16 = 1 << 0;
const POWER_BUTTON: u16 = 1 << 8;
const STATUS_BITS: u16 = TIMER_STATUS | 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10 | 1 << 15;
const ENABLE_BITS: u16 = TIMER_STATUS | 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10;
const SCI_ENABLE: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;
const CONTROL_BITS: u16 = 0x1c03;
const GPE_HALF: usize = GPE0_BYTES as usize / 2;

/// What is saved.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct AcpiPmState {
    #[n(0)]
    pub status: u16,
    #[n(1)]
    pub enable: u16,
    #[n(2)]
    pub control: u16,
    /// Timer ticks since power-on.
    #[n(3)]
    pub ticks: u64,
    #[cbor(n(4), with = "minicbor::bytes")]
    pub gpe_status: Vec<u8>,
    #[cbor(n(5), with = "minicbor::bytes")]
    pub gpe_enable: Vec<u8>,
    /// The SMI command and status ports.
    #[n(6)]
    pub smi_command: u8,
    #[n(7)]
    pub smi_status: u8,
}

impl state::SavedState for AcpiPmState {
    const KIND: &'static str = "acpi-pm";
    const VERSION: u16 = 1;
}

struct Registers {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: [u8; GPE_HALF],
    gpe_enable: [u8; GPE_HALF],
    smi_command: u8,
    smi_status: u8,
    /// Ticks at `since`; `since` is `None` while the machine stands still.
    ticks: u64,
    since: Option<Instant>,
    /// The half period (bit 23 and up) in which the timer's status was last brought up to date.
    half: u64,
}

impl Registers {
    fn power_on() -> Self {
        Self {
            status: 0,
            enable: 0,
            control: 0,
            gpe_status: [0; GPE_HALF],
            gpe_enable: [0; GPE_HALF],
            smi_command: 0,
            smi_status: 0,
            ticks: 0,
            since: None,
            half: 0,
        }
    }

    fn ticks(&self, now: Instant) -> u64 {
        let run = self.since.map_or(0, |s| now.saturating_duration_since(s).as_nanos());
        self.ticks.wrapping_add((run * FREQUENCY / 1_000_000_000) as u64)
    }

    /// The timer's status is set whenever bit 23 changes.
    fn update_timer(&mut self, now: Instant) {
        let half = self.ticks(now) / HALF;
        if half != self.half {
            self.half = half;
            self.status |= TIMER_STATUS;
        }
    }

    /// When bit 23 changes next.
    fn next_overflow(&self, now: Instant) -> Instant {
        let left = HALF - self.ticks(now) % HALF;
        let nanos = u128::from(left) * 1_000_000_000 / FREQUENCY;
        now + Duration::from_nanos(nanos as u64 + 1000)
    }

    fn sci(&self) -> bool {
        let gpe = self.gpe_status.iter().zip(&self.gpe_enable).any(|(s, e)| s & e != 0);
        self.control & SCI_ENABLE != 0 && (self.status & self.enable & ENABLE_BITS != 0 || gpe)
    }

    fn read_byte(&self, offset: u64, ticks: u64) -> u8 {
        let byte = |v: u16, at: u64| v.to_le_bytes()[at as usize & 1];
        match offset {
            0 | 1 => byte(self.status, offset),
            2 | 3 => byte(self.enable, offset),
            4 | 5 => byte(self.control, offset),
            8..12 => ((ticks & TIMER_MASK) as u32).to_le_bytes()[offset as usize - 8],
            0x20..0x28 => self.gpe_status[offset as usize - 0x20],
            0x28..0x30 => self.gpe_enable[offset as usize - 0x28],
            _ => 0,
        }
    }

    fn write_byte(&mut self, offset: u64, value: u8) {
        let shift = 8 * (offset & 1);
        let wide = u16::from(value) << shift;
        let merge = |old: u16| old & !(0xff << shift) | wide;
        match offset {
            0 | 1 => self.status &= !wide,
            2 | 3 => self.enable = merge(self.enable) & ENABLE_BITS,
            4 | 5 => self.control = merge(self.control) & CONTROL_BITS,
            0x20..0x28 => self.gpe_status[offset as usize - 0x20] &= !value,
            0x28..0x30 => self.gpe_enable[offset as usize - 0x28] = value,
            _ => (),
        }
    }
}

/// The power management block and its ports.
pub struct AcpiPm {
    registers: Mutex<Registers>,
    sci: Arc<dyn IrqLine>,
    timer: Timer,
}

impl AcpiPm {
    /// `sci`: the line of [`SCI_GSI`], level triggered. It stands still until resumed.
    pub fn new(sci: Arc<dyn IrqLine>) -> Arc<Self> {
        Arc::new_cyclic(|me: &Weak<Self>| {
            let me = me.clone();
            let fire = move || {
                if let Some(pm) = me.upgrade() {
                    pm.update(&mut pm.registers.lock());
                }
            };
            let registers = Mutex::new(Registers::power_on());
            Self { registers, sci, timer: Timer::new("acpi-timer", fire) }
        })
    }

    /// The user asks the guest to power off. False if the guest does not listen to the button.
    pub fn press_power_button(&self) -> bool {
        let mut r = self.registers.lock();
        r.status |= POWER_BUTTON;
        self.update(&mut r);
        r.enable & POWER_BUTTON != 0 && r.control & SCI_ENABLE != 0
    }

    /// Raises general purpose event `number`, 0..=63.
    pub fn raise_gpe(&self, number: u8) {
        let mut r = self.registers.lock();
        if let Some(b) = r.gpe_status.get_mut(usize::from(number / 8)) {
            *b |= 1 << (number % 8);
        }
        self.update(&mut r);
    }

    /// The SMI command and status ports: put them at [`SMI_PORT`], 2 long.
    pub fn smi_ports(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(SmiPorts(self.clone()))
    }

    /// Brings status, line and timer in line with the registers.
    fn update(&self, r: &mut Registers) {
        let now = Instant::now();
        r.update_timer(now);
        self.sci.set(r.sci());
        let armed = r.since.is_some() && r.enable & TIMER_STATUS != 0;
        self.timer.arm(armed.then(|| r.next_overflow(now)));
    }
}

impl BusDevice for AcpiPm {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        let mut r = self.registers.lock();
        let now = Instant::now();
        r.update_timer(now);
        let ticks = r.ticks(now);
        for (i, d) in data.iter_mut().enumerate() {
            *d = r.read_byte(offset + i as u64, ticks);
        }
        Access::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> (Access, Effect) {
        let mut r = self.registers.lock();
        r.update_timer(Instant::now());
        let mut sleep = false;
        for (at, &v) in (offset..).zip(data) {
            sleep |= at == 5 && v & (SLEEP_ENABLE >> 8) as u8 != 0;
            r.write_byte(at, v);
        }
        // The timer's thread is only told when an event is in question.
        if !(8..0x20).contains(&offset) {
            self.update(&mut r);
        }
        let kind = (r.control >> 10 & 7) as u8;
        let off = sleep && kind == S5_SLEEP_TYPE;
        (Access::Done, if off { Effect::Shutdown } else { Effect::None })
    }
}

struct SmiPorts(Arc<AcpiPm>);

impl BusDevice for SmiPorts {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        let r = self.0.registers.lock();
        for (at, d) in (offset..).zip(data) {
            *d = match at {
                0 => r.smi_command,
                1 => r.smi_status,
                _ => 0xff,
            };
        }
        Access::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> (Access, Effect) {
        let mut r = self.0.registers.lock();
        for (at, &v) in (offset..).zip(data) {
            match at {
                0 => {
                    r.smi_command = v;
                    match v {
                        ACPI_ENABLE => r.control |= SCI_ENABLE,
                        ACPI_DISABLE => r.control &= !SCI_ENABLE,
                        _ => (),
                    }
                    self.0.update(&mut r);
                }
                1 => r.smi_status = v,
                _ => (),
            }
        }
        (Access::Done, Effect::None)
    }
}

impl Shared for AcpiPm {
    type State = AcpiPmState;

    fn unit_name(&self) -> &str {
        "acpi-pm"
    }

    fn quiesce(&self) {
        self.timer.stop();
        let mut r = self.registers.lock();
        let now = Instant::now();
        r.update_timer(now);
        r.ticks = r.ticks(now);
        r.since = None;
    }

    fn resume(&self) {
        let mut r = self.registers.lock();
        r.since.get_or_insert_with(Instant::now);
        self.update(&mut r);
    }

    fn save(&self) -> state::Result<AcpiPmState> {
        let r = self.registers.lock();
        Ok(AcpiPmState {
            status: r.status,
            enable: r.enable,
            control: r.control,
            ticks: r.ticks(Instant::now()),
            gpe_status: r.gpe_status.to_vec(),
            gpe_enable: r.gpe_enable.to_vec(),
            smi_command: r.smi_command,
            smi_status: r.smi_status,
        })
    }

    fn restore(&self, s: AcpiPmState) -> state::Result<()> {
        let gpe = |field, v: &[u8]| {
            <[u8; GPE_HALF]>::try_from(v).map_err(|_| {
                let reason = format!("{} bytes, this device has {GPE_HALF}", v.len());
                state::Error::invalid(field, reason)
            })
        };
        let fits = |field, value: u16, mask: u16| match value & !mask {
            0 => Ok(value),
            _ => Err(state::Error::invalid(field, format!("{value:#x} has reserved bits set"))),
        };
        let restored = Registers {
            status: fits("status", s.status, STATUS_BITS)?,
            enable: fits("enable", s.enable, ENABLE_BITS)?,
            control: fits("control", s.control, CONTROL_BITS)?,
            gpe_status: gpe("gpe_status", &s.gpe_status)?,
            gpe_enable: gpe("gpe_enable", &s.gpe_enable)?,
            smi_command: s.smi_command,
            smi_status: s.smi_status,
            ticks: s.ticks,
            since: None,
            half: s.ticks / HALF,
        };
        *self.registers.lock() = restored;
        Ok(())
    }

    fn reset(&self) {
        let mut r = self.registers.lock();
        *r = Registers::power_on();
        self.sci.set(false);
    }

    fn migration_blocker(&self) -> Option<String> {
        None
    }
}
