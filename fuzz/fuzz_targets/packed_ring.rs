//! A driver that writes nonsense into a packed ring.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio::testing::hostile(true, data));
