#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| image::archive::fuzz_archive(data));
