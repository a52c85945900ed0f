#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm::boot::fuzz_kernel(data));
