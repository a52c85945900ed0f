#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| image::reference::fuzz_reference(data));
