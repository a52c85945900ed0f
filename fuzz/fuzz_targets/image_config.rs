#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| image::config::fuzz_config(data));
