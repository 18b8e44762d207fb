//! The vhost-user frontend against a backend that says anything.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| vhost_user::testing::hostile_backend(input));
