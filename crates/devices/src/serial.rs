//! A 16550A UART on a chardev (National Semiconductor PC16550D data sheet).
//!
//! Invariants: a byte that the guest sends goes to the chardev at once, so the transmitter is
//! always empty; the chardev never blocks. Input is taken only while there is room in the receive
//! FIFO, so that it is the chardev that holds a sender back, and nothing is overrun. The line is
//! up exactly while an enabled interrupt is pending. The chardev is never called with the
//! registers locked, so it may call back.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use chardev::{Chardev, Frontend};
use minicbor::{Decode, Encode};
use parking_lot::Mutex;

use crate::bus::{Access, BusDevice, Effect};
use crate::irq::IrqLine;
use crate::shared::Shared;

/// Base ports and ISA interrupts of COM1 to COM4. Each has 8 ports.
pub const PORTS: [(u16, u32); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];
pub const PORT_COUNT: u64 = 8;

const FIFO: usize = 16;

// Interrupt enable and identification.
const IER_RECEIVE: u8 = 1;
const IER_TRANSMIT: u8 = 2;
const IER_LINE: u8 = 4;
const IER_MODEM: u8 = 8;
const IIR_NONE: u8 = 1;
const IIR_MODEM: u8 = 0;
const IIR_TRANSMIT: u8 = 2;
const IIR_RECEIVE: u8 = 4;
const IIR_LINE: u8 = 6;
const IIR_TIMEOUT: u8 = 0xc;

const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RECEIVE: u8 = 2;
const LCR_DIVISOR: u8 = 0x80;
const MCR_OUT2: u8 = 8;
const MCR_LOOP: u8 = 0x10;
const LSR_READY: u8 = 1;
const LSR_OVERRUN: u8 = 2;
const LSR_ERRORS: u8 = 0x1e;
const LSR_EMPTY: u8 = 0x60;
/// CTS, DSR and DCD: the other side is always there.
const MSR_CONNECTED: u8 = 0xb0;

/// What is saved.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct SerialState {
    #[n(0)]
    pub divisor: u16,
    #[n(1)]
    pub interrupt_enable: u8,
    #[n(2)]
    pub fifo_control: u8,
    #[n(3)]
    pub line_control: u8,
    #[n(4)]
    pub modem_control: u8,
    #[n(5)]
    pub line_errors: u8,
    /// Modem status with its change bits.
    #[n(6)]
    pub modem_status: u8,
    #[n(7)]
    pub scratch: u8,
    /// The transmitter-empty interrupt has not been seen by the guest.
    #[n(8)]
    pub transmit_pending: bool,
    #[cbor(n(9), with = "minicbor::bytes")]
    pub received: Vec<u8>,
}

impl state::SavedState for SerialState {
    const KIND: &'static str = "serial16550";
    const VERSION: u16 = 1;
}

struct Registers {
    divisor: u16,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    errors: u8,
    msr: u8,
    scratch: u8,
    transmit_pending: bool,
    received: VecDeque<u8>,
}

impl Registers {
    fn power_on() -> Self {
        Self {
            divisor: 12,
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: MCR_OUT2,
            errors: 0,
            msr: MSR_CONNECTED,
            scratch: 0,
            transmit_pending: false,
            received: VecDeque::with_capacity(FIFO),
        }
    }

    fn capacity(&self) -> usize {
        if self.fcr & FCR_ENABLE != 0 { FIFO } else { 1 }
    }

    fn room(&self) -> usize {
        self.capacity().saturating_sub(self.received.len())
    }

    fn trigger_level(&self) -> usize {
        match self.fcr {
            f if f & FCR_ENABLE == 0 => 1,
            f => [1, 4, 8, 14][usize::from(f >> 6)],
        }
    }

    fn push(&mut self, byte: u8) {
        if self.room() == 0 {
            self.errors |= LSR_OVERRUN;
            return;
        }
        self.received.push_back(byte);
    }

    /// The pending interrupt of the highest priority.
    fn identify(&self) -> u8 {
        let have = self.received.len();
        if self.ier & IER_LINE != 0 && self.errors & LSR_ERRORS != 0 {
            IIR_LINE
        } else if self.ier & IER_RECEIVE != 0 && have >= self.trigger_level() {
            IIR_RECEIVE
        } else if self.ier & IER_RECEIVE != 0 && have > 0 {
            // Too few for the trigger level; no more come in, so time out at once.
            IIR_TIMEOUT
        } else if self.ier & IER_TRANSMIT != 0 && self.transmit_pending {
            IIR_TRANSMIT
        } else if self.ier & IER_MODEM != 0 && self.msr & 0x0f != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    /// The modem inputs as they are: the other side, or the own outputs while looped back.
    fn set_modem_inputs(&mut self) {
        let inputs = if self.mcr & MCR_LOOP == 0 {
            MSR_CONNECTED
        } else {
            let m = self.mcr;
            (m & 2) << 3 | (m & 1) << 5 | (m & 4) << 4 | (m & 8) << 4
        };
        let changed = (self.msr ^ inputs) >> 4;
        // The ring indicator reports its end only.
        let ring = changed & 4 != 0 && inputs & 0x40 != 0;
        self.msr = inputs | self.msr & 0x0f | if ring { changed & !4 } else { changed };
    }

    fn read(&mut self, offset: u64) -> u8 {
        let divisor = self.lcr & LCR_DIVISOR != 0;
        match offset {
            0 if divisor => self.divisor as u8,
            1 if divisor => (self.divisor >> 8) as u8,
            0 => self.received.pop_front().unwrap_or(0),
            1 => self.ier,
            2 => {
                let id = self.identify();
                if id == IIR_TRANSMIT {
                    self.transmit_pending = false;
                }
                id | if self.fcr & FCR_ENABLE != 0 { 0xc0 } else { 0 }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                let ready = if self.received.is_empty() { 0 } else { LSR_READY };
                LSR_EMPTY | ready | std::mem::take(&mut self.errors)
            }
            6 => {
                let v = self.msr;
                self.msr &= 0xf0;
                v
            }
            7 => self.scratch,
            _ => 0xff,
        }
    }

    /// Returns a byte to be sent.
    fn write(&mut self, offset: u64, v: u8) -> Option<u8> {
        let divisor = self.lcr & LCR_DIVISOR != 0;
        match offset {
            0 if divisor => self.divisor = self.divisor & 0xff00 | u16::from(v),
            1 if divisor => self.divisor = self.divisor & 0x00ff | u16::from(v) << 8,
            0 => {
                self.transmit_pending = true;
                if self.mcr & MCR_LOOP == 0 {
                    return Some(v);
                }
                self.push(v);
            }
            1 => {
                // Enabling the interrupt while the transmitter is empty raises it.
                if v & !self.ier & IER_TRANSMIT != 0 {
                    self.transmit_pending = true;
                }
                self.ier = v & 0x0f;
            }
            2 => {
                if (v ^ self.fcr) & FCR_ENABLE != 0 || v & FCR_CLEAR_RECEIVE != 0 {
                    self.received.clear();
                }
                self.fcr = if v & FCR_ENABLE != 0 { v & 0xc9 } else { 0 };
            }
            3 => self.lcr = v,
            4 => {
                self.mcr = v & 0x1f;
                self.set_modem_inputs();
            }
            7 => self.scratch = v,
            _ => (),
        }
        None
    }
}

/// A serial port.
pub struct Serial {
    name: String,
    registers: Mutex<Registers>,
    line: Arc<dyn IrqLine>,
    chardev: Arc<dyn Chardev>,
}

impl Serial {
    /// A port called `name` ("serial0") on `chardev`, which it connects to.
    pub fn new(name: &str, line: Arc<dyn IrqLine>, chardev: Arc<dyn Chardev>) -> Arc<Self> {
        let registers = Mutex::new(Registers::power_on());
        let serial = Arc::new(Self { name: name.to_owned(), registers, line, chardev });
        serial.chardev.connect(serial.clone());
        serial
    }

    fn update_line(&self, r: &Registers) {
        self.line.set(r.identify() != IIR_NONE);
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        let mut r = self.registers.lock();
        let room = r.room();
        for (at, d) in (offset..).zip(data) {
            *d = r.read(at);
        }
        let more = r.room() > room;
        self.update_line(&r);
        drop(r);
        if more {
            self.chardev.resume_input();
        }
        Access::Done
    }

    fn write(&self, offset: u64, data: &[u8]) -> (Access, Effect) {
        let mut r = self.registers.lock();
        let room = r.room();
        let mut sent = None;
        for (at, &v) in (offset..).zip(data) {
            // Offset 0 is the only one that sends, so there is at most one byte.
            sent = r.write(at, v).or(sent);
        }
        let more = r.room() > room;
        self.update_line(&r);
        drop(r);
        if let Some(byte) = sent {
            // A serial line has no answer to a byte that is not taken: it is lost.
            let _ = self.chardev.write(&[byte]);
        }
        if more {
            self.chardev.resume_input();
        }
        (Access::Done, Effect::None)
    }
}

impl Frontend for Serial {
    fn can_receive(&self) -> usize {
        let r = self.registers.lock();
        if r.mcr & MCR_LOOP != 0 { 0 } else { r.room() }
    }

    fn receive(&self, data: &[u8], _fds: Vec<OwnedFd>) {
        let mut r = self.registers.lock();
        data.iter().for_each(|&b| r.push(b));
        self.update_line(&r);
    }

    fn opened(&self) {}

    fn closed(&self) {}
}

impl Shared for Serial {
    type State = SerialState;

    fn unit_name(&self) -> &str {
        &self.name
    }

    fn resume(&self) {
        self.update_line(&self.registers.lock());
        self.chardev.resume_input();
    }

    fn save(&self) -> state::Result<SerialState> {
        let r = self.registers.lock();
        let Registers {
            divisor,
            ier,
            fcr,
            lcr,
            mcr,
            errors,
            msr,
            scratch,
            transmit_pending,
            ref received,
        } = *r;
        Ok(SerialState {
            divisor,
            interrupt_enable: ier,
            fifo_control: fcr,
            line_control: lcr,
            modem_control: mcr,
            line_errors: errors,
            modem_status: msr,
            scratch,
            transmit_pending,
            received: received.iter().copied().collect(),
        })
    }

    fn restore(&self, s: SerialState) -> state::Result<()> {
        let fits = |field, value: u8, mask: u8| match value & !mask {
            0 => Ok(value),
            _ => Err(state::Error::invalid(field, format!("{value:#x} has reserved bits set"))),
        };
        if s.received.len() > FIFO {
            let reason = format!("{} bytes, the FIFO holds {FIFO}", s.received.len());
            return Err(state::Error::invalid("received", reason));
        }
        let restored = Registers {
            divisor: s.divisor,
            ier: fits("interrupt_enable", s.interrupt_enable, 0x0f)?,
            fcr: fits("fifo_control", s.fifo_control, 0xc9)?,
            lcr: s.line_control,
            mcr: fits("modem_control", s.modem_control, 0x1f)?,
            errors: fits("line_errors", s.line_errors, LSR_ERRORS)?,
            msr: s.modem_status,
            scratch: s.scratch,
            transmit_pending: s.transmit_pending,
            received: s.received.into(),
        };
        *self.registers.lock() = restored;
        Ok(())
    }

    fn reset(&self) {
        let mut r = self.registers.lock();
        *r = Registers::power_on();
        self.update_line(&r);
    }

    fn migration_blocker(&self) -> Option<String> {
        None
    }
}
