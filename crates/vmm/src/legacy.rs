//! ISA devices: serial ports, CMOS clock, keyboard controller, POST port.

use std::sync::Arc;

use chardev::Chardev;
use devices::debugcon::{POST_PORT, PostPort};
use devices::i8042::{self, I8042};
use devices::rtc::{self, Rtc, RtcBase};
use devices::serial::{self, Serial};
use spec::DeviceKind;

use crate::assemble::Builder;
use crate::layout;
use crate::run::find_chardev;

/// Adds them; returns the indexes of the serial ports (COM1 is 0).
pub(crate) fn add(
    builder: &mut Builder<'_>,
    chardevs: &[Arc<dyn Chardev>],
) -> Result<Vec<u8>, String> {
    keyboard(builder)?;
    clock(builder)?;
    builder.ports(POST_PORT.into(), 1, Arc::new(PostPort))?;
    serials(builder, chardevs)
}

fn keyboard(builder: &mut Builder<'_>) -> Result<(), String> {
    let device = I8042::new(builder.interrupts.line(i8042::KEYBOARD_IRQ));
    builder.ports(i8042::DATA_PORT.into(), 1, device.data_port())?;
    builder.ports(i8042::COMMAND_PORT.into(), 1, device.command_port())?;
    builder.ports(i8042::PORT_92.into(), 1, device.port_92())?;
    builder.unit(device);
    Ok(())
}

/// The CMOS clock, with the memory sizes that firmware would look for in it.
fn clock(builder: &mut Builder<'_>) -> Result<(), String> {
    let base = match builder.spec.rtc {
        spec::RtcBase::Utc => RtcBase::Utc,
        spec::RtcBase::Localtime => RtcBase::LocalTime,
        spec::RtcBase::At(seconds) => RtcBase::Fixed(seconds),
    };
    let ram = layout::ram(builder.spec.memory);
    let above = ram.get(1).map_or(0, |r| r.size);
    let below = builder.spec.memory - above;
    let cpus = u8::try_from(builder.spec.smp.cpus).unwrap_or(u8::MAX);
    let device = Rtc::new(base, builder.interrupts.line(rtc::RTC_IRQ), below, above, cpus);
    builder.ports(rtc::RTC_PORTS.into(), rtc::RTC_PORT_COUNT, device.clone())?;
    builder.unit(device);
    Ok(())
}

fn serials(builder: &mut Builder<'_>, chardevs: &[Arc<dyn Chardev>]) -> Result<Vec<u8>, String> {
    let mut indexes = Vec::new();
    for device in &builder.spec.devices {
        let DeviceKind::IsaSerial { chardev, index } = &device.kind else { continue };
        let Some(&(port, irq)) = serial::PORTS.get(usize::from(*index)) else {
            return Err(format!("-device isa-serial,index={index}: expected 0 to 3"));
        };
        if indexes.contains(index) {
            return Err(format!("-device isa-serial,index={index}: this port is there already"));
        }
        let chardev = find_chardev(chardevs, chardev)
            .map_err(|e| format!("-device isa-serial,index={index}: {e}"))?;
        let line = builder.interrupts.line(irq);
        let device = Serial::new(&format!("serial{index}"), line, chardev);
        builder.ports(port.into(), serial::PORT_COUNT, device.clone())?;
        builder.unit(device);
        indexes.push(*index);
    }
    Ok(indexes)
}
