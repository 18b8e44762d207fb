//! QMP input in two pieces: nothing panics, and the split changes no reply. Then the same bytes as
//! a command-line option.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qapi::qmp::{QmpSession, Step};

fn replies(pieces: &[&[u8]]) -> Vec<Vec<u8>> {
    let mut session = QmpSession::new(false);
    session.receive(b"{\"execute\":\"qmp_capabilities\"}", Vec::new());
    let mut out = Vec::new();
    for piece in [&b""[..]].iter().chain(pieces) {
        session.receive(piece, Vec::new());
        while let Some(step) = session.step() {
            out.push(match step {
                Step::Send(bytes) => bytes,
                Step::Execute(request) => {
                    session.reply(request.id, Err(qapi::Error::generic(request.name)))
                }
            });
        }
    }
    out
}

fuzz_target!(|data: &[u8]| {
    let at = data.first().map_or(0, |b| usize::from(*b)).min(data.len());
    assert_eq!(replies(&[data]), replies(&[&data[..at], &data[at..]]));
    if let Ok(text) = std::str::from_utf8(data) {
        let words: Vec<String> = text.split('\n').map(str::to_string).collect();
        let _ = qapi::cmdline::parse(&words);
    }
});
