#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| image::bootstrap::sources::fuzz_sources(data));
