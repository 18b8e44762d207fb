//! The PC's own devices, as a guest's driver uses them.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use chardev::Frontend;
use common::{Line, Sink, effect, get, put};
use devices::acpi_pm::{ACPI_ENABLE, AcpiPm};
use devices::bus::{BusDevice, Effect};
use devices::i8042::I8042;
use devices::rtc::{Rtc, RtcBase};
use devices::serial::Serial;
use devices::shared::Shared;

fn wait_for(what: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !what() {
        assert!(Instant::now() < end, "did not happen in 20 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn serial_sends_receives_and_holds_back() {
    let (line, sink) = (Line::new(), Arc::new(Sink::default()));
    let s = Serial::new("serial0", line.clone(), sink.clone());
    assert!(sink.frontend.lock().is_some());
    put(&*s, 0, b'x');
    assert_eq!(*sink.out.lock(), b"x");
    // Enabling the transmitter's interrupt raises it; reading what it is lowers it.
    put(&*s, 1, 2);
    assert!(line.is_up());
    assert_eq!(get(&*s, 2), 2);
    assert!(!line.is_up());
    put(&*s, 0, b'y');
    assert!(line.is_up());
    // Without FIFO there is room for one byte, with it for sixteen.
    assert_eq!(s.can_receive(), 1);
    put(&*s, 2, 0xc7);
    assert_eq!(s.can_receive(), 16);
    put(&*s, 1, 1);
    s.receive(b"0123456789abc", vec![]);
    assert!(line.is_up());
    assert_eq!(get(&*s, 2), 0xcc);
    s.receive(b"d", vec![]);
    assert_eq!(get(&*s, 2), 0xc4);
    s.receive(b"efgh", vec![]);
    assert_eq!(s.can_receive(), 0);
    assert_eq!(get(&*s, 5), 0x63, "overrun, ready, empty");
    assert_eq!(get(&*s, 5), 0x61);
    assert_eq!(sink.resumed.load(Ordering::SeqCst), 1, "by clearing the FIFO only");
    for want in b"0123456789abcdef" {
        assert_eq!(get(&*s, 0), *want);
    }
    assert!(!line.is_up());
    assert!(sink.resumed.load(Ordering::SeqCst) > 1);
}

#[test]
fn serial_loops_back_and_divides() {
    let (line, sink) = (Line::new(), Arc::new(Sink::default()));
    let s = Serial::new("serial0", line, sink.clone());
    put(&*s, 4, 0x1a);
    assert_eq!(get(&*s, 6) & 0xf0, 0x90, "what Linux probes for");
    put(&*s, 0, 0x5a);
    assert_eq!((get(&*s, 0), s.can_receive()), (0x5a, 0));
    assert!(sink.out.lock().is_empty());
    put(&*s, 4, 0);
    put(&*s, 3, 0x83);
    put(&*s, 0, 1);
    put(&*s, 1, 0);
    assert_eq!((get(&*s, 0), get(&*s, 1)), (1, 0));
    put(&*s, 3, 3);
    assert_eq!(get(&*s, 1), 0);
}

fn cmos(r: &Rtc, index: u8) -> u8 {
    put(r, 0, index);
    get(r, 1)
}

fn set_cmos(r: &Rtc, index: u8, v: u8) {
    put(r, 0, index);
    put(r, 1, v);
}

fn shown(r: &Rtc) -> [u8; 7] {
    [0x32, 9, 8, 7, 4, 2, 0].map(|i| cmos(r, i))
}

#[test]
fn rtc_shows_and_takes_the_time() {
    // 2024-02-29 12:34:50 UTC, a Thursday.
    let r = Rtc::new(RtcBase::Fixed(1_709_210_090), Line::new(), 2 << 30, 0, 1);
    let t = shown(&r);
    assert_eq!(t[..6], [0x20, 0x24, 0x02, 0x29, 0x12, 0x34]);
    assert!((0x50..0x58).contains(&t[6]), "{t:x?}");
    assert_eq!(cmos(&r, 6), 5);
    // Set while halted, in binary, twelve hours.
    set_cmos(&r, 0x0b, 0x84);
    for (i, v) in [(0x32, 19), (9, 99), (8, 12), (7, 31), (4, 0x8b), (2, 59), (0, 58)] {
        set_cmos(&r, i, v);
    }
    set_cmos(&r, 0x0b, 0x04);
    let t = shown(&r);
    assert!(t == [19, 99, 12, 31, 0x8b, 59, 58] || t[6] == 59, "{t:?}");
    wait_for(|| shown(&r)[..6] == [20, 0, 1, 1, 12, 0]);
    assert_eq!(cmos(&r, 0x34), (((2u64 << 30) - (16 << 20)) >> 16) as u8);
}

#[test]
fn rtc_interrupts() {
    let line = Line::new();
    let r = Rtc::new(RtcBase::Fixed(1_709_210_090), line.clone(), 2 << 30, 0, 1);
    r.resume();
    // An alarm in two seconds.
    set_cmos(&r, 1, 0x52);
    set_cmos(&r, 3, 0x34);
    set_cmos(&r, 5, 0x12);
    set_cmos(&r, 0x0b, 0x22);
    assert!(!line.is_up());
    wait_for(|| line.is_up());
    assert_eq!(cmos(&r, 0x0c) & 0xa0, 0xa0);
    assert!(!line.is_up());
    // Updates.
    set_cmos(&r, 0x0b, 0x12);
    wait_for(|| line.is_up());
    // Standing still, nothing comes.
    r.quiesce();
    cmos(&r, 0x0c);
    // The periodic interrupt, at 1024 Hz.
    set_cmos(&r, 0x0b, 0x42);
    r.resume();
    for _ in 0..3 {
        wait_for(|| line.is_up());
        assert_eq!(cmos(&r, 0x0c) & 0xc0, 0xc0);
    }
}

#[test]
fn acpi_powers_off_and_counts() {
    let line = Line::new();
    let pm = AcpiPm::new(line.clone());
    pm.resume();
    assert!(!pm.press_power_button(), "nobody listens");
    put(&*pm, 1, 1);
    assert_eq!(pm.write(2, &0x100u16.to_le_bytes()).1, Effect::None);
    put(&*pm.smi_ports(), 0, ACPI_ENABLE);
    assert_eq!(get(&*pm, 4) & 1, 1);
    assert!(!line.is_up());
    assert!(pm.press_power_button());
    assert!(line.is_up());
    put(&*pm, 1, 1);
    assert!(!line.is_up());
    pm.raise_gpe(1);
    assert!(!line.is_up());
    put(&*pm, 0x28, 2);
    assert!(line.is_up());
    put(&*pm, 0x20, 2);
    assert!(!line.is_up());
    // S3 is not offered, S5 is.
    assert_eq!(pm.write(4, &(1u16 << 13 | 1 << 10 | 1).to_le_bytes()).1, Effect::None);
    assert_eq!(pm.write(4, &(1u16 << 13 | 1).to_le_bytes()).1, Effect::Shutdown);

    let ticks = || {
        let mut b = [0; 4];
        pm.read(8, &mut b);
        u32::from_le_bytes(b)
    };
    let (t, a) = (Instant::now(), ticks());
    std::thread::sleep(Duration::from_millis(50));
    let b = ticks();
    let real = t.elapsed().as_nanos() * 3_579_545 / 1_000_000_000;
    let counted = u128::from(b.wrapping_sub(a) & 0xff_ffff);
    assert!(counted <= real && counted >= 170_000, "{counted} of {real}");
    // It stands still with the machine, and goes on elsewhere.
    pm.quiesce();
    let still = ticks();
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(ticks(), still);
    let other = AcpiPm::new(Line::new());
    other.restore(pm.save().unwrap()).unwrap();
    let mut b = [0; 4];
    other.read(8, &mut b);
    assert_eq!(u32::from_le_bytes(b), still);
}

#[test]
fn i8042_resets_and_is_probed_quickly() {
    let line = Line::new();
    let d = I8042::new(line.clone());
    let (data, command) = (d.data_port(), d.command_port());
    let ask = |v| {
        put(&*command, 0, v);
        assert_eq!(get(&*command, 0) & 1, 1, "answers at once");
        get(&*data, 0)
    };
    assert_eq!(ask(0xaa), 0x55);
    assert_eq!(ask(0xab), 0);
    assert_eq!(ask(0xa9), 1, "no mouse");
    let mode = ask(0x20);
    put(&*command, 0, 0x60);
    put(&*data, 0, mode & !1);
    assert_eq!(ask(0x20), mode & !1);
    put(&*command, 0, 0x60);
    put(&*data, 0, mode);
    put(&*data, 0, 0xf2);
    assert!(line.is_up());
    assert_eq!([get(&*data, 0), get(&*data, 0), get(&*data, 0)], [0xfa, 0xab, 0x83]);
    assert!(line.rises.load(Ordering::SeqCst) >= 3);
    assert!(!line.is_up());
    assert_eq!(effect(&*command, 0, 0xff), Effect::None);
    assert_eq!(effect(&*command, 0, 0xfe), Effect::Reset);
    assert_eq!(effect(&*d.port_92(), 0, 0), Effect::None);
    assert_eq!(get(&*d.port_92(), 0), 0);
    assert_eq!(effect(&*d.port_92(), 0, 1), Effect::Reset);
}
