#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| api_docker::auth::fuzz_registry_auth(data));
