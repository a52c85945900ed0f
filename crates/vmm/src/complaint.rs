//! Says what a device meets with on the host, once and then at intervals: a guest that tries again and again must not
//! fill the log.

use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(30);

#[derive(Default)]
struct State {
    last: Option<Instant>,
    unsaid: u64,
}

/// See the module. One for each device.
pub struct Complaint {
    device: std::borrow::Cow<'static, str>,
    state: Mutex<State>,
}

impl Complaint {
    pub fn new(device: impl Into<std::borrow::Cow<'static, str>>) -> Complaint {
        Complaint {
            device: device.into(),
            state: Mutex::default(),
        }
    }

    /// What is to be said of `error` now, if anything.
    fn words(&self, error: &dyn Display, now: Instant) -> Option<String> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last.is_some_and(|last| now - last < INTERVAL) {
            state.unsaid += 1;
            return None;
        }
        state.last = Some(now);
        let text = match std::mem::take(&mut state.unsaid) {
            0 => format!("{}: {error}", self.device),
            count => format!("{}: {error} ({count} more failures before)", self.device),
        };
        Some(text)
    }

    /// Says it, or counts it.
    pub fn make(&self, error: &dyn Display) {
        if let Some(text) = self.words(error, Instant::now()) {
            tracing::warn!("{text}");
        }
    }

    /// Says what was tried in vain, where it was.
    pub fn about<E: Display>(&self, what: impl Display, result: Result<(), E>) {
        if let Err(error) = result {
            self.make(&format_args!("{what}: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_failure_is_said_once_and_counted() {
        let complaint = Complaint::new("disk0");
        let start = Instant::now();
        assert_eq!(complaint.words(&"full", start).unwrap(), "disk0: full");
        assert_eq!(complaint.words(&"full", start), None);
        assert_eq!(
            complaint.words(&"full", start + INTERVAL).unwrap(),
            "disk0: full (1 more failures before)"
        );
    }
}
