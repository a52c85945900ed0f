#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| image::manifest::fuzz_manifest(data));
