//! What the machine as a whole is doing, and how its CPU threads are told.
//!
//! ```text
//!   Running ──pause()──▶ Paused          every CPU thread parks, then pause() returns
//!   Paused ──resume()──▶ Running
//!   Running, Paused ──end(outcome)──▶ Ended   for good; the first outcome counts
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cpu::Kick;
use serde::{Deserialize, Serialize};

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest or its CPU cannot go on: triple fault, or a defect. What is known of it.
    Crash(String),
    /// Ended from outside.
    Killed,
    /// A test guest ended with this code.
    DebugExit(u8),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Running,
    Paused,
    Ended(Outcome),
}

struct Inner {
    phase: Phase,
    /// CPU threads that run or are about to.
    active: usize,
    kicks: Vec<Arc<dyn Kick>>,
}

/// See the module. Its lock is a leaf; kicks are sent under it, and a kick takes no lock of ours.
pub struct Control {
    inner: Mutex<Inner>,
    changed: Condvar,
    ended: AtomicBool,
}

impl Control {
    pub fn new() -> Arc<Control> {
        Arc::new(Control {
            inner: Mutex::new(Inner {
                phase: Phase::Running,
                active: 0,
                kicks: Vec::new(),
            }),
            changed: Condvar::new(),
            ended: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        self.changed
            .wait(guard)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the machine. Only the first outcome counts.
    pub fn end(&self, outcome: Outcome) {
        let mut inner = self.lock();
        if !matches!(inner.phase, Phase::Ended(_)) {
            inner.phase = Phase::Ended(outcome);
            self.ended.store(true, Ordering::Release);
            inner.kicks.iter().for_each(|kick| kick.kick());
            self.changed.notify_all();
        }
    }

    /// True from the first [`Control::end`] on; cheap enough for every exit of a CPU.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// How it ended, once it has.
    pub fn outcome(&self) -> Option<Outcome> {
        match &self.lock().phase {
            Phase::Ended(outcome) => Some(outcome.clone()),
            _ => None,
        }
    }

    /// Waits for the end.
    pub fn wait_for_end(&self) -> Outcome {
        let mut inner = self.lock();
        loop {
            if let Phase::Ended(outcome) = &inner.phase {
                return outcome.clone();
            }
            inner = self.wait(inner);
        }
    }

    /// Waits for the end, up to `timeout`.
    pub fn wait_for_end_until(&self, timeout: Duration) -> Option<Outcome> {
        let deadline = Instant::now() + timeout;
        let mut inner = self.lock();
        loop {
            if let Phase::Ended(outcome) = &inner.phase {
                return Some(outcome.clone());
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            inner = self
                .changed
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Makes the machine paused from its start; [`Control::resume`] lets it go.
    pub fn start_paused(&self) {
        self.lock().phase = Phase::Paused;
    }

    /// Stops every CPU between two instructions and returns when all have stopped; false where the machine
    /// has ended.
    pub fn pause(&self) -> bool {
        let mut inner = self.lock();
        if matches!(inner.phase, Phase::Ended(_)) {
            return false;
        }
        inner.phase = Phase::Paused;
        inner.kicks.iter().for_each(|kick| kick.kick());
        while inner.active > 0 && inner.phase == Phase::Paused {
            // A kick may come between a thread's look at the phase and its run: they are sent again.
            inner = self
                .changed
                .wait_timeout(inner, Duration::from_millis(10))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            if inner.active > 0 {
                inner.kicks.iter().for_each(|kick| kick.kick());
            }
        }
        inner.phase == Phase::Paused
    }

    /// Asks every CPU to stop and does not wait for it. Asked again now and then, it reaches those that were just about to
    /// run.
    pub fn ask_pause(&self) {
        let mut inner = self.lock();
        if !matches!(inner.phase, Phase::Ended(_)) {
            inner.phase = Phase::Paused;
            inner.kicks.iter().for_each(|kick| kick.kick());
        }
    }

    /// Lets a paused machine go on; false where it has ended.
    pub fn resume(&self) -> bool {
        let mut inner = self.lock();
        match inner.phase {
            Phase::Ended(_) => false,
            _ => {
                inner.phase = Phase::Running;
                self.changed.notify_all();
                true
            }
        }
    }

    pub fn is_paused(&self) -> bool {
        self.lock().phase == Phase::Paused
    }

    /// Registers a CPU's kick.
    pub fn add_kick(&self, kick: Arc<dyn Kick>) {
        self.lock().kicks.push(kick);
    }

    /// A CPU thread asks before each run: true to run, false at the end. Blocks while paused.
    /// After true, [`Control::leave`] must follow the run.
    pub fn enter(&self) -> bool {
        let mut inner = self.lock();
        loop {
            match inner.phase {
                Phase::Running => {
                    inner.active += 1;
                    return true;
                }
                Phase::Ended(_) => return false,
                Phase::Paused => inner = self.wait(inner),
            }
        }
    }

    /// See [`Control::enter`].
    pub fn leave(&self) {
        let mut inner = self.lock();
        inner.active -= 1;
        if inner.phase != Phase::Running {
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_outcome_counts() {
        let control = Control::new();
        control.end(Outcome::PowerOff);
        control.end(Outcome::Reset);
        assert_eq!(control.wait_for_end(), Outcome::PowerOff);
        assert!(!control.enter() && !control.pause() && !control.resume());
    }

    #[test]
    fn pause_waits_for_a_running_cpu_and_resume_lets_it_on() {
        let control = Control::new();
        assert!(control.enter());
        std::thread::scope(|scope| {
            let paused = scope.spawn(|| control.pause());
            while !control.is_paused() {
                std::thread::yield_now();
            }
            control.leave();
            assert!(paused.join().unwrap());
            let entered = scope.spawn(|| control.enter());
            assert!(control.resume());
            assert!(entered.join().unwrap());
        });
    }
}
