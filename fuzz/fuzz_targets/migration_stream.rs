//! Whatever comes in on a migration's connections: control frames through the destination's
//! session, and RAM frames into a small guest memory.
//!
//! The first byte chooses; for RAM frames the input is patched so that magic, sequence number and
//! checksum are right as often as not, and the fuzzer reaches what lies behind them.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use mem::{Backing, GuestMemory, RegionSpec};
use migrate::ram;
use migrate::receiver::Receiver;
use migrate::session::Dest;
use migrate::session::dest::{Input, Output};
use migrate::wire::Msg;

fn memory() -> &'static GuestMemory {
    static MEMORY: OnceLock<GuestMemory> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let specs = [
            RegionSpec { gpa: 0, size: 64 << 12 },
            RegionSpec { gpa: 1 << 30, size: 130 << 12 },
        ];
        GuestMemory::new(&specs, &Backing::default()).expect("memory")
    })
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, data)) = data.split_first() else {
        return;
    };
    match choice % 3 {
        0 => control(data),
        1 => frames(data),
        _ => frames(&sealed(data)),
    }
});

fn control(mut data: &[u8]) {
    let mut session = Dest::new();
    while let Ok(Some(msg)) = Msg::read(&mut data) {
        let mut outputs = session.step(Input::Msg(msg));
        // A machine that agrees to everything.
        while let Some(output) = outputs.pop() {
            let input = match output {
                Output::Check(_) => Input::Checked(vec![]),
                Output::Prepare { .. } => Input::Prepared(Ok(())),
                Output::Load(_) => Input::Loaded(Ok(0)),
                Output::AcquireLocks => Input::Locked(Ok(())),
                Output::RunHeld => Input::Started(Ok(0)),
                Output::End(_) | Output::Close => return,
                _ => continue,
            };
            outputs.extend(session.step(input));
        }
    }
}

fn frames(data: &[u8]) {
    let receiver = Receiver::new(memory());
    let _ = receiver.run(data, &mut |_| {});
    let _ = receiver.missing();
}

/// Makes frames with right headers of what the fuzzer gave: a count, runs, and data.
fn sealed(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = data;
    for sequence in 0..8 {
        let Some((head, after)) = rest.split_at_checked(4) else {
            break;
        };
        let runs = usize::from(head[0] % 8);
        let Some((table, after)) = after.split_at_checked(runs * ram::RUN) else {
            break;
        };
        let mut frame = vec![0; ram::HEADER];
        frame.extend_from_slice(table);
        let kind = if runs == 0 {
            ram::Kind::Sync { round: u32::from(head[1]), last: head[2] & 1 == 1 }
        } else {
            let region = u16::from(head[1] % 4);
            ram::Kind::Pages { region, runs: runs as u32, data: u32::from(head[2]) }
        };
        ram::seal(&mut frame, kind, sequence);
        out.extend_from_slice(&frame);
        let pages = usize::from(head[2]) * 4096;
        if runs > 0 {
            out.resize(out.len() + pages, head[3]);
        }
        rest = after;
    }
    out
}
