#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| base::units::fuzz_words(data));
