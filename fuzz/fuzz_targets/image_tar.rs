#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| image::layer::tar::fuzz_tar(data));
