//! Transfers that move data without the image's lock: what they use is given to nobody else meanwhile.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Transfers that move data without the lock, by the moment at which they began.
#[derive(Default)]
pub struct Leases(Mutex<BTreeMap<u64, usize>>);

impl Leases {
    pub fn take(self: &Arc<Leases>, moment: u64) -> Lease {
        *self.lock().entry(moment).or_default() += 1;
        Lease {
            leases: self.clone(),
            moment,
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the oldest of them began.
    pub fn oldest(&self) -> Option<u64> {
        self.lock().keys().next().copied()
    }
}

/// One such transfer; over when this is dropped.
pub struct Lease {
    leases: Arc<Leases>,
    moment: u64,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut leases = self.leases.lock();
        if let Some(count) = leases.get_mut(&self.moment) {
            *count -= 1;
            if *count == 0 {
                leases.remove(&self.moment);
            }
        }
    }
}
