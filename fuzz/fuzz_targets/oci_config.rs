#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oci::bundle::fuzz_config(data));
