#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oci::seccomp::fuzz_profile(data));
