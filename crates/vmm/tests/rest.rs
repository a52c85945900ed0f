//! A device that a hostile guest has left in any state takes none of the host's time. A process of its own: it looks at
//! its own CPU time.

use std::time::Duration;

use vmm::fuzz::{Kind, drive};

/// CPU time of this process so far.
fn used() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Bytes that are the same in each run.
fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

#[test]
fn a_device_left_in_any_state_rests() {
    for kind in Kind::ALL {
        for seed in 0..15 {
            let _driven = drive(kind, &bytes(seed * 8 + kind as u64, 1200)).unwrap();
            // What is under way ends first, on a slow host too.
            let rests = (0..40).any(|_| {
                std::thread::sleep(Duration::from_millis(20));
                let before = used();
                std::thread::sleep(Duration::from_millis(40));
                used() - before < Duration::from_millis(10)
            });
            assert!(rests, "{kind:?} with seed {seed} never rests");
        }
    }
}
