#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| image::registry::fuzz_challenge(data));
