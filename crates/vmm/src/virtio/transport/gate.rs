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

    /// False while paused.
    pub(super) fn enter(&self) -> bool {
        let mut state = self.lock();
        if !state.paused {
            state.active += 1;
        }
        !state.paused
    }

    pub(super) fn leave(&self) {
        let mut state = self.lock();
        state.active -= 1;
        // Each notice is a system call, and nearly always for nobody.
        if state.paused {
            self.changed.notify_all();
        }
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
