#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| image::build::words::fuzz_words(data));
