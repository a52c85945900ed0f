//! The 8254 timer: three counters at 1.193182 MHz (Intel 8254 data sheet), with the gate and output of the
//! third at port 0x61, by which a guest measures its time-stamp counter. Counter 0 raises no interrupt: the
//! board is hardware-reduced, its timers are the CPUs' own.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::state::{Persist, Saved, StateError};

const HERTZ: u128 = 1_193_182;

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Counter {
    mode: u8,
    /// 1 low byte, 2 high byte, 3 low then high.
    access: u8,
    reload: u16,
    /// The low byte came, the high one is awaited.
    half_written: Option<u8>,
    high_next: bool,
    latch: Option<u16>,
    status_latch: Option<u8>,
    gate: bool,
    loaded: bool,
    /// Ticks counted up to the last stop of the gate.
    counted: u64,
    /// When counting went on, in nanoseconds of the device's clock.
    since: u64,
}

impl Counter {
    fn elapsed(&self, now: u64) -> u64 {
        let running = if self.gate && self.loaded {
            (u128::from(now.saturating_sub(self.since)) * HERTZ / 1_000_000_000) as u64
        } else {
            0
        };
        self.counted + running
    }

    fn period(&self) -> u64 {
        if self.reload == 0 {
            0x1_0000
        } else {
            u64::from(self.reload)
        }
    }

    fn value(&self, now: u64) -> u16 {
        let elapsed = self.elapsed(now);
        match self.mode {
            2 => (self.period() - elapsed % self.period()) as u16,
            3 => ((self.period() - elapsed * 2 % self.period()) & !1) as u16,
            _ => self.period().wrapping_sub(elapsed) as u16,
        }
    }

    fn output(&self, now: u64) -> bool {
        let elapsed = self.elapsed(now);
        match self.mode {
            0 | 1 => self.loaded && elapsed >= self.period(),
            2 => elapsed % self.period() != self.period() - 1,
            3 => elapsed % self.period() < self.period().div_ceil(2),
            _ => elapsed != self.period(),
        }
    }

    fn load(&mut self, value: u16, now: u64) {
        self.reload = value;
        self.loaded = true;
        self.counted = 0;
        self.since = now;
    }

    fn set_gate(&mut self, gate: bool, now: u64) {
        if gate == self.gate {
            return;
        }
        if !gate {
            self.counted = self.elapsed(now);
        } else if matches!(self.mode, 1 | 2 | 3 | 5) {
            // A rising gate starts these modes anew.
            self.counted = 0;
        }
        self.gate = gate;
        self.since = now;
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status_latch.take() {
            return status;
        }
        let value = self.latch.unwrap_or_else(|| self.value(now));
        let high = match self.access {
            1 => false,
            2 => true,
            _ => {
                self.high_next = !self.high_next;
                !self.high_next
            }
        };
        if self.access != 3 || high {
            self.latch = None;
        }
        if high {
            (value >> 8) as u8
        } else {
            value as u8
        }
    }

    fn write(&mut self, value: u8, now: u64) {
        match self.access {
            1 => self.load(u16::from(value), now),
            2 => self.load(u16::from(value) << 8, now),
            _ => match self.half_written.take() {
                None => {
                    self.half_written = Some(value);
                    if self.mode == 0 {
                        self.loaded = false;
                    }
                }
                Some(low) => self.load(u16::from(low) | u16::from(value) << 8, now),
            },
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    counters: [Counter; 3],
    speaker: bool,
    refresh: bool,
    /// The device's clock when saved, nanoseconds.
    clock: u64,
}

struct Inner {
    state: State,
    /// The device's clock in nanoseconds when it began to run, and when that was; it stands while the machine is paused.
    clock: u64,
    running_since: Option<Instant>,
}

impl Inner {
    fn now(&self) -> u64 {
        let running = self
            .running_since
            .map_or(0, |start| start.elapsed().as_nanos() as u64);
        self.clock.saturating_add(running)
    }

    fn run(&mut self, run: bool) {
        self.clock = self.now();
        self.running_since = run.then(Instant::now);
    }
}

/// Ports 0x40 to 0x43.
pub struct Pit {
    inner: Mutex<Inner>,
}

/// Port 0x61.
pub struct SystemControl(pub Arc<Pit>);

impl Pit {
    pub fn new() -> Arc<Pit> {
        let counter = Counter {
            access: 3,
            gate: true,
            ..Counter::default()
        };
        let gated = Counter {
            gate: false,
            ..counter.clone()
        };
        let state = State {
            counters: [counter.clone(), counter, gated],
            speaker: false,
            refresh: false,
            clock: 0,
        };
        Arc::new(Pit {
            inner: Mutex::new(Inner {
                state,
                clock: 0,
                running_since: Some(Instant::now()),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn control(inner: &mut Inner, value: u8) {
        let now = inner.now();
        if value >> 6 == 3 {
            for (index, counter) in inner.state.counters.iter_mut().enumerate() {
                if value & 2 << index == 0 {
                    continue;
                }
                if value & 0x20 == 0 && counter.latch.is_none() {
                    counter.latch = Some(counter.value(now));
                }
                if value & 0x10 == 0 {
                    let output = if counter.output(now) { 0x80 } else { 0 };
                    let null = if counter.loaded { 0 } else { 0x40 };
                    counter.status_latch =
                        Some(output | null | counter.access << 4 | counter.mode << 1);
                }
            }
            return;
        }
        let counter = &mut inner.state.counters[usize::from(value >> 6)];
        match value >> 4 & 3 {
            0 => {
                if counter.latch.is_none() {
                    counter.latch = Some(counter.value(now));
                }
            }
            access => {
                let mode = value >> 1 & 7;
                *counter = Counter {
                    mode: if mode > 5 { mode & 3 } else { mode },
                    access,
                    gate: counter.gate,
                    ..Counter::default()
                };
            }
        }
    }
}

impl BusDevice for Pit {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut inner = self.lock();
        let now = inner.now();
        for (register, byte) in (offset..).zip(data) {
            *byte = match inner.state.counters.get_mut(register as usize) {
                Some(counter) => counter.read(now),
                None => 0xff,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        for (register, byte) in (offset..).zip(data) {
            let now = inner.now();
            match inner.state.counters.get_mut(register as usize) {
                Some(counter) => counter.write(*byte, now),
                None => Pit::control(&mut inner, *byte),
            }
        }
    }
}

impl BusDevice for SystemControl {
    fn read(&self, _: u64, data: &mut [u8]) {
        let mut inner = self.0.lock();
        let now = inner.now();
        // Bit 4 toggles with each memory refresh; some guests wait for the change.
        inner.state.refresh = !inner.state.refresh;
        let state = &inner.state;
        let third = &state.counters[2];
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = u8::from(third.gate)
                | u8::from(state.speaker) << 1
                | u8::from(state.refresh) << 4
                | u8::from(third.output(now)) << 5;
        }
    }

    fn write(&self, _: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut inner = self.0.lock();
        let now = inner.now();
        inner.state.speaker = value & 2 != 0;
        inner.state.counters[2].set_gate(value & 1 != 0, now);
    }
}

impl Persist for Pit {
    fn identity(&self) -> String {
        "pit".into()
    }
    fn quiesce(&self) {
        self.lock().run(false);
    }
    fn wake(&self) {
        self.lock().run(true);
    }
    fn save(&self) -> Result<Saved, StateError> {
        let inner = self.lock();
        Saved::of(
            self.identity(),
            2,
            &State {
                clock: inner.now(),
                ..inner.state.clone()
            },
        )
    }
    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: State = saved.get(&self.identity(), 2)?;
        if state
            .counters
            .iter()
            .any(|counter| counter.mode > 5 || counter.access > 3)
        {
            return Err(saved.damaged("a counter is in no mode there is"));
        }
        let mut inner = self.lock();
        inner.clock = state.clock;
        inner.running_since = inner.running_since.map(|_| Instant::now());
        inner.state = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::test_board::keeps_its_state;

    #[test]
    fn the_third_counter_measures_time_as_linux_calibrates() {
        let pit = Pit::new();
        let gate = SystemControl(pit.clone());
        gate.write(0, &[1]);
        pit.write(3, &[0xb0]);
        pit.write(2, &[(11_932u16 & 0xff) as u8]);
        pit.write(2, &[(11_932u16 >> 8) as u8]);
        let start = Instant::now();
        let mut value = [0u8];
        loop {
            gate.read(0, &mut value);
            if value[0] & 0x20 != 0 {
                break;
            }
        }
        assert!(start.elapsed().as_millis() >= 9, "{:?}", start.elapsed());
    }

    #[test]
    fn the_state_survives() {
        let pit = Pit::new();
        pit.write(3, &[0xb0]);
        pit.write(2, &[1]);
        let fresh = Pit::new();
        pit.quiesce();
        fresh.quiesce();
        keeps_its_state(&*pit, &*fresh);
    }

    proptest::proptest! {
        #[test]
        fn no_access_panics(writes in proptest::collection::vec((0u64..4, proptest::num::u8::ANY), 0..100)) {
            let pit = Pit::new();
            for (register, value) in writes {
                pit.write(register, &[value]);
                pit.read(register & 3, &mut [0; 2]);
                SystemControl(pit.clone()).read(0, &mut [0]);
            }
        }
    }
}
