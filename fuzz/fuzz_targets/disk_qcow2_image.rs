#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| disk::qcow2::fuzz_image(data));
