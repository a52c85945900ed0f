#![no_main]

use vmm::fuzz::{Kind, fuzz_device};

// The first byte says which device.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some((first, rest)) = data.split_first() {
        let kind = Kind::ALL[usize::from(*first) % Kind::ALL.len()];
        if let Err(error) = fuzz_device(kind, rest) {
            panic!("{kind:?}: {error}");
        }
    }
});
