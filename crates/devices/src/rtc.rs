//! The CMOS clock and memory (Motorola MC146818, ports 0x70 and 0x71).
//!
//! Invariants: the guest's time is the host's real time plus an offset, and a guest that sets the
//! clock changes the offset only; so the clock goes on by itself over a pause or a migration.
//! Flags are computed when they are looked at, from the seconds that have gone since; the timer
//! runs only while an interrupt is enabled. The line is up exactly while an enabled flag is set,
//! and reading register C clears it.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use minicbor::{Decode, Encode};
use parking_lot::Mutex;

use crate::bus::{Access, BusDevice, Effect};
use crate::irq::IrqLine;
use crate::shared::Shared;
use crate::timer::Timer;

/// Index and data port.
pub const RTC_PORTS: u16 = 0x70;
pub const RTC_PORT_COUNT: u64 = 2;
/// The ISA interrupt.
pub const RTC_IRQ: u32 = 8;

const CMOS_BYTES: usize = 128;
const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

const A_UPDATING: u8 = 0x80;
const B_SET: u8 = 0x80;
const B_BINARY: u8 = 4;
const B_24_HOURS: u8 = 2;
/// Enable bits of register B stand where the flags of register C do.
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATE: u8 = 0x10;
const C_IRQ: u8 = 0x80;
const D_VALID: u8 = 0x80;

const NANOS: i64 = 1_000_000_000;
/// The update-in-progress bit goes up this long before the second ends.
const UPDATE_LEAD: i64 = 244_000;
const DAY_SECONDS: i64 = 86_400;
/// Times that the registers can show, and some: years 0 to 9999.
const TIME_MIN: i64 = -62_167_219_200;
const TIME_MAX: i64 = 253_402_300_799;

/// What the clock shows at power-on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RtcBase {
    Utc,
    LocalTime,
    /// Seconds since 1970 as the guest is to see them.
    Fixed(i64),
}

/// What is saved.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct RtcState {
    /// 128 bytes; the time registers hold what was last set while the clock was halted.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub cmos: Vec<u8>,
    #[n(1)]
    pub index: u8,
    /// Guest time minus the host's UTC, nanoseconds.
    #[n(2)]
    pub offset: i64,
    /// Flags of register C.
    #[n(3)]
    pub flags: u8,
    /// The guest second up to which flags are computed.
    #[n(4)]
    pub seen: i64,
}

impl state::SavedState for RtcState {
    const KIND: &'static str = "mc146818rtc";
    const VERSION: u16 = 1;
}

/// A date and time of day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Civil {
    year: i64,
    month: i64,
    day: i64,
    second_of_day: i64,
    /// 1 is Sunday.
    weekday: i64,
}

impl Civil {
    /// From seconds since 1970, in the proleptic Gregorian calendar. Years are counted from March
    /// so that the leap day is the last.
    fn from_seconds(t: i64) -> Self {
        let (days, second_of_day) = (t.div_euclid(DAY_SECONDS), t.rem_euclid(DAY_SECONDS));
        let z = days + 719_468;
        let (era, d) = (z.div_euclid(146_097), z.rem_euclid(146_097));
        let y = (d - d / 1460 + d / 36_524 - d / 146_096) / 365;
        let of_year = d - (365 * y + y / 4 - y / 100);
        let m = (5 * of_year + 2) / 153;
        let month = if m < 10 { m + 3 } else { m - 9 };
        Self {
            year: y + era * 400 + i64::from(month <= 2),
            month,
            day: of_year - (153 * m + 2) / 5 + 1,
            second_of_day,
            weekday: (days + 4).rem_euclid(7) + 1,
        }
    }

    fn seconds(&self) -> i64 {
        let y = self.year - i64::from(self.month <= 2);
        let (era, of_era) = (y.div_euclid(400), y.rem_euclid(400));
        let m = (self.month + 9) % 12;
        let of_year = (153 * m + 2) / 5 + self.day - 1;
        let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
        days * DAY_SECONDS + self.second_of_day
    }
}

fn host_nanos() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// How far local time is ahead of UTC now, in seconds.
#[allow(unsafe_code)]
fn local_offset() -> i64 {
    let now = host_nanos() / NANOS;
    // SAFETY: `tm` is plain data for which all zeros is a value.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live locals, and the call keeps neither.
    let done = unsafe { libc::localtime_r(&now, &mut tm) };
    if done.is_null() { 0 } else { tm.tm_gmtoff }
}

struct Registers {
    cmos: [u8; CMOS_BYTES],
    index: u8,
    offset: i64,
    flags: u8,
    seen: i64,
    /// When the next periodic flag is due.
    periodic: Option<Instant>,
}

impl Registers {
    fn now(&self) -> i64 {
        host_nanos().saturating_add(self.offset)
    }

    fn halted(&self) -> bool {
        self.cmos[usize::from(REG_B)] & B_SET != 0
    }

    fn mode(&self, bit: u8) -> bool {
        self.cmos[usize::from(REG_B)] & bit != 0
    }

    fn encode(&self, v: i64) -> u8 {
        let v = v as u8;
        if self.mode(B_BINARY) { v } else { ((v / 10) << 4) | (v % 10) }
    }

    /// Any byte is taken: digits beyond nine count on.
    fn decode(&self, v: u8) -> i64 {
        i64::from(if self.mode(B_BINARY) { v } else { (v >> 4) * 10 + (v & 0xf) })
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.mode(B_24_HOURS) {
            return self.encode(hour);
        }
        let twelve = if hour % 12 == 0 { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { 0x80 } else { 0 }
    }

    fn decode_hour(&self, v: u8) -> i64 {
        if self.mode(B_24_HOURS) {
            return self.decode(v);
        }
        self.decode(v & 0x7f) % 12 + if v & 0x80 != 0 { 12 } else { 0 }
    }

    /// Puts the time into the registers.
    fn show(&mut self, t: i64) {
        let c = Civil::from_seconds(t.clamp(TIME_MIN, TIME_MAX));
        let s = c.second_of_day;
        self.cmos[usize::from(SECONDS)] = self.encode(s % 60);
        self.cmos[usize::from(MINUTES)] = self.encode(s / 60 % 60);
        self.cmos[usize::from(HOURS)] = self.encode_hour(s / 3600);
        self.cmos[usize::from(WEEKDAY)] = self.encode(c.weekday);
        self.cmos[usize::from(DAY)] = self.encode(c.day);
        self.cmos[usize::from(MONTH)] = self.encode(c.month);
        self.cmos[usize::from(YEAR)] = self.encode(c.year % 100);
        self.cmos[usize::from(CENTURY)] = self.encode(c.year / 100);
    }

    /// Takes the time from the registers; out of range values are brought into it.
    fn take(&mut self) {
        let reg = |i: u8| self.decode(self.cmos[usize::from(i)]);
        let hour = self.decode_hour(self.cmos[usize::from(HOURS)]).min(23);
        let c = Civil {
            year: (reg(CENTURY) * 100 + reg(YEAR)).min(9999),
            month: reg(MONTH).clamp(1, 12),
            day: reg(DAY).clamp(1, 31),
            second_of_day: hour * 3600 + reg(MINUTES).min(59) * 60 + reg(SECONDS).min(59),
            weekday: 1,
        };
        self.set_time(c.seconds());
    }

    fn set_time(&mut self, t: i64) {
        let wanted = t.clamp(TIME_MIN, TIME_MAX).saturating_mul(NANOS);
        self.offset = wanted.saturating_sub(host_nanos());
        self.seen = self.now().div_euclid(NANOS);
    }

    /// Whether the alarm matches a second of the day. A register of 0xc0 and up matches always.
    fn alarm_at(&self, s: i64) -> bool {
        let alarm = |i: u8| self.cmos[usize::from(i)];
        let any = |v: u8| v & 0xc0 == 0xc0;
        let (h, m, sec) = (alarm(HOURS_ALARM), alarm(MINUTES_ALARM), alarm(SECONDS_ALARM));
        (any(sec) || self.decode(sec) == s % 60)
            && (any(m) || self.decode(m) == s / 60 % 60)
            && (any(h) || self.decode_hour(h) == s / 3600)
    }

    /// Half a periodic wave, from the rate bits of register A.
    fn period(&self) -> Option<Duration> {
        let rate = match self.cmos[usize::from(REG_A)] & 0xf {
            0 => return None,
            // The first two give what 8 and 9 give.
            r @ 1..=2 => r + 7,
            r => r,
        };
        Some(Duration::from_nanos(NANOS as u64 * (1 << (rate - 1)) / 32_768))
    }

    /// Sets the flags of what happened since they were last looked at.
    fn update_flags(&mut self) {
        let second = self.now().div_euclid(NANOS);
        if self.halted() {
            self.seen = second;
        } else if second > self.seen {
            self.flags |= UPDATE;
            // A day holds every time of day.
            let from = self.seen.max(second - DAY_SECONDS);
            let mut went_by = from + 1..=second;
            if self.flags & ALARM == 0 && went_by.any(|t| self.alarm_at(t.rem_euclid(DAY_SECONDS)))
            {
                self.flags |= ALARM;
            }
            self.seen = second;
        } else {
            self.seen = second;
        }
        let Some(due) = self.periodic else { return };
        let now = Instant::now();
        if now >= due {
            self.flags |= PERIODIC;
            let period = self.period();
            // What is late is not made up for: the guest has one flag only.
            self.periodic = period.map(|p| if due + p > now { due + p } else { now + p });
        }
    }

    /// When a flag of an enabled interrupt may be set next.
    fn next_event(&self) -> Option<Instant> {
        let enabled = self.cmos[usize::from(REG_B)];
        let waiting = |bit: u8| enabled & bit != 0 && self.flags & bit == 0;
        let second = (waiting(ALARM) || waiting(UPDATE)) && !self.halted();
        let left = NANOS - self.now().rem_euclid(NANOS);
        let second = second.then(|| Instant::now() + Duration::from_nanos(left as u64));
        let periodic = self.periodic.filter(|_| waiting(PERIODIC));
        second.into_iter().chain(periodic).min()
    }

    fn line(&self) -> bool {
        self.flags & self.cmos[usize::from(REG_B)] & (PERIODIC | ALARM | UPDATE) != 0
    }

    fn restart_periodic(&mut self) {
        let on = self.mode(PERIODIC);
        let period = self.period().filter(|_| on);
        self.periodic = period.map(|p| Instant::now() + p);
    }

    fn read(&mut self) -> u8 {
        let i = self.index;
        match i {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY if !self.halted() => {
                self.show(self.now().div_euclid(NANOS));
            }
            REG_A => {
                let left = NANOS - self.now().rem_euclid(NANOS);
                let updating = !self.halted() && left <= UPDATE_LEAD;
                let a = self.cmos[usize::from(REG_A)] & !A_UPDATING;
                return if updating { a | A_UPDATING } else { a };
            }
            REG_C => {
                let irq = if self.line() { C_IRQ } else { 0 };
                return std::mem::take(&mut self.flags) | irq;
            }
            REG_D => return D_VALID,
            _ => (),
        }
        self.cmos[usize::from(i)]
    }

    fn write(&mut self, v: u8) {
        let i = self.index;
        let at = usize::from(i);
        match i {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY => {
                if !self.halted() {
                    self.show(self.now().div_euclid(NANOS));
                }
                self.cmos[at] = v;
                if !self.halted() && i != WEEKDAY {
                    self.take();
                }
            }
            REG_A => {
                self.cmos[at] = v & !A_UPDATING;
                self.restart_periodic();
            }
            REG_B => self.write_b(v),
            REG_C | REG_D => (),
            _ => self.cmos[at] = v,
        }
    }

    fn write_b(&mut self, v: u8) {
        let was = self.cmos[usize::from(REG_B)];
        if v & B_SET != 0 && was & B_SET == 0 {
            // The clock halts, and shows where.
            self.show(self.now().div_euclid(NANOS));
        }
        // Setting the clock ends the update interrupt.
        self.cmos[usize::from(REG_B)] = if v & B_SET != 0 { v & !UPDATE } else { v };
        if v & B_SET == 0 && was & B_SET != 0 {
            self.take();
        }
        if (v ^ was) & PERIODIC != 0 {
            self.restart_periodic();
        }
    }
}

/// The clock.
pub struct Rtc {
    registers: Mutex<Registers>,
    power_on: [u8; CMOS_BYTES],
    line: Arc<dyn IrqLine>,
    timer: Timer,
}

impl Rtc {
    /// `line`: of [`RTC_IRQ`]. `below_4g` and `above_4g`: bytes of RAM, for firmware; `cpus` too.
    pub fn new(
        base: RtcBase,
        line: Arc<dyn IrqLine>,
        below_4g: u64,
        above_4g: u64,
        cpus: u8,
    ) -> Arc<Self> {
        let power_on = memory_bytes(below_4g, above_4g, cpus);
        let offset = match base {
            RtcBase::Utc => 0,
            RtcBase::LocalTime => local_offset().saturating_mul(NANOS),
            RtcBase::Fixed(t) => {
                t.clamp(TIME_MIN, TIME_MAX).saturating_mul(NANOS).saturating_sub(host_nanos())
            }
        };
        let mut registers =
            Registers { cmos: power_on, index: 0, offset, flags: 0, seen: 0, periodic: None };
        registers.seen = registers.now().div_euclid(NANOS);
        Arc::new_cyclic(|me: &Weak<Self>| {
            let me = me.clone();
            let fire = move || {
                if let Some(rtc) = me.upgrade() {
                    rtc.update(&mut rtc.registers.lock());
                }
            };
            let timer = Timer::new("rtc-timer", fire);
            Self { registers: Mutex::new(registers), power_on, line, timer }
        })
    }

    /// Brings flags, line and timer in line with the time.
    fn update(&self, r: &mut Registers) {
        r.update_flags();
        self.line.set(r.line());
        self.timer.arm(r.next_event());
    }
}

/// CMOS memory as firmware expects it: sizes of memory in several places, and the CPUs.
fn memory_bytes(below_4g: u64, above_4g: u64, cpus: u8) -> [u8; CMOS_BYTES] {
    let mut cmos = [0; CMOS_BYTES];
    cmos[usize::from(REG_A)] = 0x26;
    cmos[usize::from(REG_B)] = B_24_HOURS;
    let mut put = |at: usize, v: u64, n: usize| {
        cmos[at..at + n].copy_from_slice(&v.to_le_bytes()[..n]);
    };
    put(0x15, 640, 2);
    let extended = (below_4g.saturating_sub(1 << 20) >> 10).min(0xffff);
    put(0x17, extended, 2);
    put(0x30, extended, 2);
    put(0x34, (below_4g.saturating_sub(16 << 20) >> 16).min(0xffff), 2);
    put(0x5b, (above_4g >> 16).min(0xff_ffff), 3);
    put(0x5f, u64::from(cpus.saturating_sub(1)), 1);
    cmos
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        let mut r = self.registers.lock();
        for (at, d) in (offset..).zip(data) {
            if at != 1 {
                *d = 0xff;
                continue;
            }
            r.update_flags();
            *d = r.read();
            if r.index == REG_C {
                self.line.set(false);
                self.update(&mut r);
            }
        }
        Access::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> (Access, Effect) {
        let mut r = self.registers.lock();
        for (at, &v) in (offset..).zip(data) {
            match at {
                // Bit 7 masks the NMI, which nothing here raises.
                0 => r.index = v & 0x7f,
                1 => {
                    r.update_flags();
                    r.write(v);
                    self.update(&mut r);
                }
                _ => (),
            }
        }
        (Access::Done, Effect::None)
    }
}

impl Shared for Rtc {
    type State = RtcState;

    fn unit_name(&self) -> &str {
        "rtc"
    }

    fn quiesce(&self) {
        self.timer.stop();
    }

    fn resume(&self) {
        let mut r = self.registers.lock();
        r.restart_periodic();
        self.update(&mut r);
    }

    fn save(&self) -> state::Result<RtcState> {
        let r = self.registers.lock();
        Ok(RtcState {
            cmos: r.cmos.to_vec(),
            index: r.index,
            offset: r.offset,
            flags: r.flags,
            seen: r.seen,
        })
    }

    fn restore(&self, s: RtcState) -> state::Result<()> {
        let cmos = <[u8; CMOS_BYTES]>::try_from(&s.cmos[..]).map_err(|_| {
            let reason = format!("{} bytes, this device has {CMOS_BYTES}", s.cmos.len());
            state::Error::invalid("cmos", reason)
        })?;
        if usize::from(s.index) >= CMOS_BYTES {
            let reason = format!("{} is beyond {CMOS_BYTES} bytes", s.index);
            return Err(state::Error::invalid("index", reason));
        }
        let limit = TIME_MAX.saturating_mul(2);
        if !(-limit..=limit).contains(&s.seen) {
            return Err(state::Error::invalid("seen", format!("{} is no time", s.seen)));
        }
        let flags = s.flags & (PERIODIC | ALARM | UPDATE);
        let (index, offset, seen) = (s.index, s.offset, s.seen);
        *self.registers.lock() = Registers { cmos, index, offset, flags, seen, periodic: None };
        Ok(())
    }

    /// The clock runs on a battery: its time outlives a reset.
    fn reset(&self) {
        let mut r = self.registers.lock();
        r.cmos = self.power_on;
        r.index = 0;
        r.flags = 0;
        r.periodic = None;
        self.line.set(false);
    }

    fn migration_blocker(&self) -> Option<String> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let date = |t| {
            let c = Civil::from_seconds(t);
            (c.year, c.month, c.day, c.second_of_day, c.weekday)
        };
        assert_eq!(date(0), (1970, 1, 1, 0, 5));
        assert_eq!(date(951_782_400 + 86_399), (2000, 2, 29, 86_399, 3));
        assert_eq!(date(-1), (1969, 12, 31, 86_399, 4));
        assert_eq!(date(4_107_542_400), (2100, 3, 1, 0, 2));
        assert_eq!(date(TIME_MIN), (0, 1, 1, 0, 7));
        assert_eq!(date(TIME_MAX).0, 9999);
        for t in (TIME_MIN..TIME_MAX).step_by(86_400 * 13 + 7) {
            assert_eq!(Civil::from_seconds(t).seconds(), t);
        }
    }
}
