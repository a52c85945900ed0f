//! Host time for guests: the TSC's frequency and the thread that rings CPUs at their alarm.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use crate::state::Mailbox;

thread_local! {
    /// The counted clock of this thread's guest CPU, where it has one (see [`crate::replay`]); 0: none.
    static COUNTED: Cell<u64> = const { Cell::new(0) };
}

/// Sets the counted clock of this thread; 0 goes back to the host's.
pub(crate) fn count(now: u64) {
    COUNTED.set(now);
}

/// Whether this thread's time is counted.
pub(crate) fn counted() -> bool {
    COUNTED.get() != 0
}

/// The time-stamp counter that guests' is derived from: the host's, or the counted one.
#[inline]
pub fn host_tsc() -> u64 {
    let counted = COUNTED.get();
    if counted != 0 {
        return counted;
    }
    // SAFETY: RDTSC has no preconditions; CR4.TSD is clear on Linux unless a process asks for it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Ticks of the host's TSC in a second, measured once against the monotonic clock (5 ms) where CPUID does not say it.
pub fn tsc_hz() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| {
        if crate::replay::Options::from_environment().is_ok_and(|o| o.counts()) {
            // A billion counted instructions are a second.
            return 1_000_000_000 * crate::replay::TICKS;
        }
        told_by_cpuid().unwrap_or_else(measured)
    })
}

fn told_by_cpuid() -> Option<u64> {
    use core::arch::x86_64::__cpuid;
    if __cpuid(0).eax >= 0x15 {
        let leaf = __cpuid(0x15);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            return Some(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax));
        }
    }
    None
}

/// Both clocks at one moment: of several readings the one that took least.
fn both_clocks() -> (Instant, u64) {
    let read = || {
        let before = host_tsc();
        let time = Instant::now();
        let after = host_tsc();
        (after.wrapping_sub(before), time, before / 2 + after / 2)
    };
    let best = (0..16).map(|_| read()).min_by_key(|(took, ..)| *took);
    best.map_or_else(
        || (Instant::now(), host_tsc()),
        |(_, time, ticks)| (time, ticks),
    )
}

fn measured() -> u64 {
    let (t0, c0) = both_clocks();
    std::thread::sleep(Duration::from_millis(5));
    let (t1, c1) = both_clocks();
    let hz = u128::from(c1 - c0) * 1_000_000_000 / (t1 - t0).as_nanos().max(1);
    // Rounded to 10 kHz: the measurement is no better.
    (hz as u64 + 5_000) / 10_000 * 10_000
}

/// Ticks to host time.
pub fn ticks_to_duration(ticks: u64) -> Duration {
    Duration::from_nanos((u128::from(ticks) * 1_000_000_000 / u128::from(tsc_hz())) as u64)
}

/// The alarm clock: one thread of this process that rings mailboxes at their alarm.
#[derive(Default)]
struct Clock {
    known: Mutex<Vec<Weak<Mailbox>>>,
    changed: Condvar,
    /// Host TSC the thread sleeps until; the end of time while it looks at the alarms, so that whoever sets one then that
    /// it may have passed by waits for it to sleep, and wakes it.
    next: AtomicU64,
}

fn clock() -> &'static Clock {
    static CLOCK: OnceLock<Clock> = OnceLock::new();
    CLOCK.get_or_init(|| {
        std::thread::Builder::new()
            .name("soft-clock".into())
            .spawn(tick)
            .ok();
        Clock {
            next: AtomicU64::new(u64::MAX),
            ..Clock::default()
        }
    })
}

/// Makes `mailbox` known to the alarm clock.
pub(crate) fn register(mailbox: &Arc<Mailbox>) {
    let mut known = clock().known.lock().unwrap_or_else(|e| e.into_inner());
    known.retain(|m| m.strong_count() > 0);
    known.push(Arc::downgrade(mailbox));
}

/// `mailbox`'s alarm was set: the thread must wake earlier where it is the next.
pub(crate) fn alarm_changed(mailbox: &Mailbox) {
    let at = mailbox.alarm.load(Ordering::SeqCst);
    let clock = clock();
    if at != 0 && !counted() && at < clock.next.load(Ordering::SeqCst) {
        let _known = clock.known.lock().unwrap_or_else(|e| e.into_inner());
        clock.changed.notify_one();
    }
}

fn tick() {
    let clock = clock();
    let mut known = clock.known.lock().unwrap_or_else(|e| e.into_inner());
    loop {
        clock.next.store(u64::MAX, Ordering::SeqCst);
        let now = host_tsc();
        let mut next = u64::MAX;
        for mailbox in known.iter().filter_map(Weak::upgrade) {
            let at = mailbox.alarm.load(Ordering::SeqCst);
            if at == 0 {
                continue;
            }
            if at <= now {
                if mailbox
                    .alarm
                    .compare_exchange(at, 0, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok()
                {
                    mailbox.ring_alarm();
                } else {
                    next = now;
                }
            } else {
                next = next.min(at);
            }
        }
        clock.next.store(next, Ordering::SeqCst);
        known = if next == u64::MAX {
            clock.changed.wait(known).unwrap_or_else(|e| e.into_inner())
        } else {
            let limit = ticks_to_duration(next.saturating_sub(now));
            clock
                .changed
                .wait_timeout(known, limit)
                .unwrap_or_else(|e| e.into_inner())
                .0
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::request;

    #[test]
    fn an_alarm_that_is_set_while_the_last_one_rings_rings_too() {
        let mailbox = Arc::new(Mailbox::new());
        register(&mailbox);
        for round in 0..20_000 {
            mailbox.set_alarm(host_tsc() + 2_000);
            let begun = Instant::now();
            while mailbox.requests.swap(0, Ordering::SeqCst) & request::ALARM == 0 {
                assert!(
                    begun.elapsed() < Duration::from_secs(60),
                    "the alarm of round {round} was lost"
                );
                std::hint::spin_loop();
            }
        }
    }
}
