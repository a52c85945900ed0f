//! How long a device's thread looks for the next request before it sleeps: longer while requests come soon, not at all while
//! they do not. A sleep and its end cost more than what most requests wait for.

use std::time::{Duration, Instant};

const SHORTEST: Duration = Duration::from_micros(4);
const LONGEST: Duration = Duration::from_micros(32);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Watch {
    length: Duration,
}

impl Watch {
    /// True as soon as `there` is, false after a while without.
    pub(super) fn look(&self, mut there: impl FnMut() -> bool) -> bool {
        if self.length.is_zero() {
            return false;
        }
        let begun = Instant::now();
        loop {
            if there() {
                return true;
            }
            if begun.elapsed() >= self.length {
                return false;
            }
            for _ in 0..32 {
                std::hint::spin_loop();
            }
        }
    }

    /// The look was in vain, and the sleep after it lasted so long.
    pub(super) fn slept(&mut self, length: Duration) {
        self.length = if length > LONGEST {
            // Nothing to be had soon: the host's time is better used elsewhere.
            Duration::ZERO
        } else {
            (self.length * 2).clamp(SHORTEST, LONGEST)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_longer_while_requests_come_soon_and_not_at_all_when_they_do_not() {
        let mut watch = Watch::default();
        assert!(!watch.look(|| true), "the first look is a sleep");
        for _ in 0..8 {
            watch.slept(Duration::from_micros(10));
        }
        assert_eq!(watch.length, LONGEST);
        assert!(watch.look(|| true) && !watch.look(|| false));
        watch.slept(Duration::from_millis(1));
        assert!(!watch.look(|| true));
    }
}
