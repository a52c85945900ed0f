#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| api_docker::request::fuzz_json_body(data));
