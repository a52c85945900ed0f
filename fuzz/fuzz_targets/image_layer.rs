#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| image::layer::apply::fuzz_layer(data));
