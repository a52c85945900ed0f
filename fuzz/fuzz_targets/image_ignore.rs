#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| image::build::ignore::fuzz_ignore(data));
