//! The keyboard controller (ports 0x60 and 0x64) with a keyboard that is never typed on, and
//! port 0x92. What guests want of it is the reset line, A20, and a quick end of their probe: each
//! command is answered at once, and there is no mouse.
//!
//! Invariants: what waits for the guest is bounded; the line of the keyboard is up exactly while
//! a byte of it waits and its interrupt is enabled. A20 is kept as a bit only: the CPU's address
//! line is always on.

use std::collections::VecDeque;
use std::sync::Arc;

use minicbor::{Decode, Encode};
use parking_lot::Mutex;

use crate::bus::{Access, BusDevice, Effect};
use crate::irq::IrqLine;
use crate::shared::Shared;

pub const DATA_PORT: u16 = 0x60;
pub const COMMAND_PORT: u16 = 0x64;
pub const PORT_92: u16 = 0x92;
/// The keyboard's ISA interrupt.
pub const KEYBOARD_IRQ: u32 = 1;

const QUEUE: usize = 16;
const STATUS_FULL: u8 = 1;
const STATUS_SYSTEM: u8 = 4;
const STATUS_COMMAND: u8 = 8;
const STATUS_UNLOCKED: u8 = 0x10;
const MODE_INTERRUPT: u8 = 1;
const MODE_SYSTEM: u8 = 4;
const MODE_NO_KEYBOARD: u8 = 0x10;
const MODE_NO_MOUSE: u8 = 0x20;
const OUTPUT_RESET: u8 = 1;
const OUTPUT_A20: u8 = 2;
const ACK: u8 = 0xfa;

/// What is saved.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct I8042State {
    /// The command byte.
    #[n(0)]
    pub mode: u8,
    #[n(1)]
    pub output_port: u8,
    /// A controller command that waits for its byte; 0 for none.
    #[n(2)]
    pub command: u8,
    /// A keyboard command that waits for its byte; 0 for none.
    #[n(3)]
    pub keyboard_command: u8,
    /// The last write was to the command port.
    #[n(4)]
    pub last_was_command: bool,
    /// Bytes for the guest.
    #[cbor(n(5), with = "minicbor::bytes")]
    pub queue: Vec<u8>,
    #[n(6)]
    pub scan_code_set: u8,
}

impl state::SavedState for I8042State {
    const KIND: &'static str = "i8042";
    const VERSION: u16 = 1;
}

#[derive(Clone)]
struct Registers {
    mode: u8,
    output_port: u8,
    command: u8,
    keyboard_command: u8,
    last_was_command: bool,
    scan_code_set: u8,
    queue: VecDeque<u8>,
}

impl Registers {
    fn power_on() -> Self {
        Self {
            mode: MODE_SYSTEM | MODE_INTERRUPT | MODE_NO_MOUSE,
            output_port: OUTPUT_RESET | OUTPUT_A20,
            command: 0,
            keyboard_command: 0,
            last_was_command: false,
            scan_code_set: 2,
            queue: VecDeque::with_capacity(QUEUE),
        }
    }

    fn reply(&mut self, bytes: &[u8]) {
        for &b in bytes {
            if self.queue.len() < QUEUE {
                self.queue.push_back(b);
            }
        }
    }

    fn status(&self) -> u8 {
        let full = if self.queue.is_empty() { 0 } else { STATUS_FULL };
        let command = if self.last_was_command { STATUS_COMMAND } else { 0 };
        full | command | STATUS_UNLOCKED | self.mode & STATUS_SYSTEM
    }

    fn command(&mut self, v: u8) -> Effect {
        self.last_was_command = true;
        self.command = 0;
        match v {
            0x20 => self.reply(&[self.mode]),
            // Each of these takes a byte at the data port.
            0x60 | 0xd1..=0xd4 => self.command = v,
            0xa7 => self.mode |= MODE_NO_MOUSE,
            0xa8 => self.mode &= !MODE_NO_MOUSE,
            // The mouse's line is stuck: there is none.
            0xa9 => self.reply(&[0x01]),
            0xaa => {
                self.queue.clear();
                self.mode |= MODE_SYSTEM;
                self.reply(&[0x55]);
            }
            0xab => self.reply(&[0x00]),
            0xad => self.mode |= MODE_NO_KEYBOARD,
            0xae => self.mode &= !MODE_NO_KEYBOARD,
            0xc0 => self.reply(&[0x80]),
            0xd0 => self.reply(&[self.output_port]),
            0xdd => self.output_port &= !OUTPUT_A20,
            0xdf => self.output_port |= OUTPUT_A20,
            // Pulses the lines whose bits are 0; line 0 is the CPU's reset.
            0xf0..=0xff if v & OUTPUT_RESET == 0 => return Effect::Reset,
            _ => (),
        }
        Effect::None
    }

    fn data(&mut self, v: u8) -> Effect {
        self.last_was_command = false;
        match std::mem::take(&mut self.command) {
            0x60 => self.mode = v & 0x7f,
            0xd1 => {
                self.output_port = v | OUTPUT_RESET;
                if v & OUTPUT_RESET == 0 {
                    return Effect::Reset;
                }
            }
            // Written into the output buffer as if it came from the keyboard; from the mouse it
            // comes without the mouse's mark, by which guests see that there is none.
            0xd2 | 0xd3 => self.reply(&[v]),
            0xd4 => (),
            _ => self.keyboard(v),
        }
        Effect::None
    }

    fn keyboard(&mut self, v: u8) {
        self.mode &= !MODE_NO_KEYBOARD;
        match (std::mem::take(&mut self.keyboard_command), v) {
            (0xf0, 0) => self.reply(&[ACK, self.scan_code_set]),
            (0xf0, 1..=3) => {
                self.scan_code_set = v;
                self.reply(&[ACK]);
            }
            (0xed | 0xf3 | 0xf0, _) => self.reply(&[ACK]),
            (_, 0xed | 0xf0 | 0xf3) => {
                self.keyboard_command = v;
                self.reply(&[ACK]);
            }
            (_, 0xee) => self.reply(&[0xee]),
            (_, 0xf2) => self.reply(&[ACK, 0xab, 0x83]),
            (_, 0xff) => {
                self.scan_code_set = 2;
                self.reply(&[ACK, 0xaa]);
            }
            _ => self.reply(&[ACK]),
        }
    }
}

/// The controller.
pub struct I8042 {
    registers: Mutex<Registers>,
    line: Arc<dyn IrqLine>,
}

impl I8042 {
    /// `line`: of [`KEYBOARD_IRQ`].
    pub fn new(line: Arc<dyn IrqLine>) -> Arc<Self> {
        Arc::new(Self { registers: Mutex::new(Registers::power_on()), line })
    }

    /// The data port, for [`DATA_PORT`], 1 long.
    pub fn data_port(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Port { device: self.clone(), which: Which::Data })
    }

    /// The command and status port, for [`COMMAND_PORT`], 1 long.
    pub fn command_port(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Port { device: self.clone(), which: Which::Command })
    }

    /// System control port A, for [`PORT_92`], 1 long.
    pub fn port_92(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Port { device: self.clone(), which: Which::Port92 })
    }

    fn update_line(&self, r: &Registers) {
        let on = r.mode & MODE_INTERRUPT != 0 && r.mode & MODE_NO_KEYBOARD == 0;
        self.line.set(on && !r.queue.is_empty());
    }
}

enum Which {
    Data,
    Command,
    Port92,
}

struct Port {
    device: Arc<I8042>,
    which: Which,
}

impl BusDevice for Port {
    fn read(&self, _offset: u64, data: &mut [u8]) -> Access {
        let mut r = self.device.registers.lock();
        data.fill(0xff);
        let Some(d) = data.first_mut() else { return Access::Done };
        *d = match self.which {
            Which::Command => r.status(),
            Which::Port92 => r.output_port & OUTPUT_A20,
            Which::Data => {
                let byte = r.queue.pop_front().unwrap_or(0);
                // One edge a byte: down, and up again if more waits.
                self.device.line.set(false);
                self.device.update_line(&r);
                byte
            }
        };
        Access::Done
    }

    fn write(&self, _offset: u64, data: &[u8]) -> (Access, Effect) {
        let Some(&v) = data.first() else { return (Access::Done, Effect::None) };
        let mut r = self.device.registers.lock();
        let effect = match self.which {
            Which::Command => r.command(v),
            Which::Data => r.data(v),
            Which::Port92 => {
                r.output_port = r.output_port & !OUTPUT_A20 | v & OUTPUT_A20;
                if v & 1 != 0 { Effect::Reset } else { Effect::None }
            }
        };
        self.device.update_line(&r);
        (Access::Done, effect)
    }
}

impl Shared for I8042 {
    type State = I8042State;

    fn unit_name(&self) -> &str {
        "i8042"
    }

    fn resume(&self) {
        self.update_line(&self.registers.lock());
    }

    fn save(&self) -> state::Result<I8042State> {
        let r = self.registers.lock().clone();
        Ok(I8042State {
            mode: r.mode,
            output_port: r.output_port,
            command: r.command,
            keyboard_command: r.keyboard_command,
            last_was_command: r.last_was_command,
            queue: r.queue.into(),
            scan_code_set: r.scan_code_set,
        })
    }

    fn restore(&self, s: I8042State) -> state::Result<()> {
        if s.queue.len() > QUEUE {
            let reason = format!("{} bytes, the queue holds {QUEUE}", s.queue.len());
            return Err(state::Error::invalid("queue", reason));
        }
        if !(1..=3).contains(&s.scan_code_set) {
            let reason = format!("{} is not 1, 2 or 3", s.scan_code_set);
            return Err(state::Error::invalid("scan_code_set", reason));
        }
        *self.registers.lock() = Registers {
            mode: s.mode & 0x7f,
            output_port: s.output_port,
            command: s.command,
            keyboard_command: s.keyboard_command,
            last_was_command: s.last_was_command,
            scan_code_set: s.scan_code_set,
            queue: s.queue.into(),
        };
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
