#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| net::user::fuzz_user_frame(data));
