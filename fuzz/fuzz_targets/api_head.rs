#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| api_docker::sniff::fuzz_read_head(data));
