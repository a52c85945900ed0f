//! The gate that a device's threads pass before each piece of work, and that a pause shuts.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Stops the device's threads between two pieces of work.
#[derive(Default)]
pub(super) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    paused: bool,
    active: usize,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` while paused; who is inside is waited for.
    pub(super) fn enter(&self) -> Option<Inside<'_>> {
        let mut state = self.lock();
        if state.paused {
            return None;
        }
        state.active += 1;
        Some(Inside(self))
    }

    pub(super) fn pause(&self) {
        let mut state = self.lock();
        state.paused = true;
        while state.active > 0 {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn open(&self) {
        self.lock().paused = false;
    }
}

/// A piece of work inside the gate; it ends with this, however it ends.
pub(super) struct Inside<'a>(&'a Gate);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.active -= 1;
        // Each notice is a system call, and nearly always for nobody.
        if state.paused {
            self.0.changed.notify_all();
        }
    }
}
