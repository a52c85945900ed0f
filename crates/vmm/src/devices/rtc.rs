//! The CMOS clock (Motorola MC146818A data sheet), in UTC, BCD and 24-hour form, running with the host's
//! clock at an offset that the guest may set. No alarm and no periodic interrupt.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::state::{Persist, Saved, StateError};

const CENTURY: usize = 0x32;
const REGISTER_B: usize = 0x0b;
const B_SET: u8 = 0x80;
const B_BINARY: u8 = 0x04;
const B_24_HOURS: u8 = 0x02;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    index: u8,
    ram: Vec<u8>,
    /// Seconds that the guest's clock is ahead of the host's.
    offset: i64,
}

/// Ports 0x70 and 0x71.
pub struct Rtc {
    state: Mutex<State>,
}

/// Days since 1970-01-01 of a date, and back (the proleptic Gregorian calendar).
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let shifted = if month <= 2 { year - 1 } else { year };
    let era = shifted.div_euclid(400);
    let of_era = shifted.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

fn date_of(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

fn host_seconds() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() as i64)
}

impl State {
    fn encode(&self, value: i64) -> u8 {
        let value = value as u8;
        if self.ram[REGISTER_B] & B_BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, register: usize) -> i64 {
        let value = self.ram[register];
        i64::from(if self.ram[REGISTER_B] & B_BINARY != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 0xf)
        })
    }

    /// Puts the time of `seconds` into the registers.
    fn show(&mut self, seconds: i64) {
        let (year, month, day) = date_of(seconds.div_euclid(86_400));
        let of_day = seconds.rem_euclid(86_400);
        let weekday = (seconds.div_euclid(86_400) + 4).rem_euclid(7) + 1;
        let mut hour = of_day / 3600;
        let mut afternoon = 0;
        if self.ram[REGISTER_B] & B_24_HOURS == 0 {
            afternoon = if hour >= 12 { 0x80 } else { 0 };
            hour = (hour + 11) % 12 + 1;
        }
        self.ram[0] = self.encode(of_day % 60);
        self.ram[2] = self.encode(of_day / 60 % 60);
        self.ram[4] = self.encode(hour) | afternoon;
        self.ram[6] = self.encode(weekday);
        self.ram[7] = self.encode(day);
        self.ram[8] = self.encode(month);
        self.ram[9] = self.encode(year.rem_euclid(100));
        self.ram[CENTURY] = self.encode(year.div_euclid(100));
    }

    /// Takes the registers for the time, where they hold one.
    fn set(&mut self, host: i64) {
        let mut hour = self.decode(4);
        if self.ram[REGISTER_B] & B_24_HOURS == 0 {
            let afternoon = self.ram[4] & 0x80 != 0;
            self.ram[4] &= 0x7f;
            hour = self.decode(4) % 12 + if afternoon { 12 } else { 0 };
        }
        let (month, day) = (self.decode(8), self.decode(7));
        if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
            return;
        }
        let days = days_of(self.decode(CENTURY) * 100 + self.decode(9), month, day);
        self.offset = days * 86_400 + hour * 3600 + self.decode(2) * 60 + self.decode(0) - host;
    }
}

impl Rtc {
    pub fn new() -> Arc<Rtc> {
        let mut ram = vec![0; 128];
        ram[0x0a] = 0x26;
        ram[REGISTER_B] = B_24_HOURS;
        ram[0x0d] = 0x80;
        Arc::new(Rtc {
            state: Mutex::new(State {
                index: 0,
                ram,
                offset: 0,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_at(&self, host: i64) -> u8 {
        let mut state = self.lock();
        if state.ram[REGISTER_B] & B_SET == 0 {
            let seconds = host.saturating_add(state.offset);
            state.show(seconds);
        }
        state.ram[usize::from(state.index)]
    }

    fn write_at(&self, value: u8, host: i64) {
        let mut state = self.lock();
        let index = usize::from(state.index);
        let setting = state.ram[REGISTER_B] & B_SET != 0;
        match index {
            // Status C and D are read-only, the update bit of A too.
            0x0c | 0x0d => {}
            0x0a => state.ram[index] = value & 0x7f,
            REGISTER_B => {
                // The interrupts of the device do not exist: their enables stay zero.
                state.ram[index] = value & !0x70;
                if setting && value & B_SET == 0 {
                    state.set(host);
                }
            }
            _ => {
                state.ram[index] = value;
                if !setting && (index <= 9 || index == CENTURY) {
                    state.set(host);
                }
            }
        }
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, Some(first)) = (offset, data.first_mut()) {
            *first = self.read_at(host_seconds());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (register, byte) in (offset..).zip(data) {
            match register {
                0 => self.lock().index = byte & 0x7f,
                _ => self.write_at(*byte, host_seconds()),
            }
        }
    }
}

impl Persist for Rtc {
    fn identity(&self) -> String {
        "rtc".into()
    }
    fn save(&self) -> Result<Saved, StateError> {
        let mut state = self.lock().clone();
        if state.ram[REGISTER_B] & B_SET == 0 {
            // They show the time, which goes on.
            for register in [0, 2, 4, 6, 7, 8, 9, CENTURY] {
                state.ram[register] = 0;
            }
        }
        Saved::of(self.identity(), 1, &state)
    }
    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: State = saved.get(&self.identity(), 1)?;
        if state.ram.len() != 128 || state.index > 127 {
            return Err(saved.damaged("the clock's memory is not 128 bytes"));
        }
        *self.lock() = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::test_board::keeps_its_state;
    use proptest::prelude::*;

    fn register(rtc: &Rtc, index: u8, host: i64) -> u8 {
        rtc.write(0, &[index]);
        rtc.read_at(host)
    }

    #[test]
    fn a_known_second_shows_as_its_date() {
        let rtc = Rtc::new();
        let shown: Vec<u8> = [0x32, 9, 8, 7, 6, 4, 2, 0]
            .iter()
            .map(|index| register(&rtc, *index, 1_709_210_096))
            .collect();
        assert_eq!(
            shown,
            [0x20, 0x24, 0x02, 0x29, 0x05, 0x12, 0x34, 0x56],
            "Thursday 2024-02-29 12:34:56"
        );
    }

    #[test]
    fn the_guest_can_set_the_clock() {
        let rtc = Rtc::new();
        rtc.write(0, &[0x0b]);
        rtc.write_at(0x82, 1000);
        for (index, value) in [
            (0x32, 0x19),
            (9, 0x99),
            (8, 0x12),
            (7, 0x31),
            (4, 0x23),
            (2, 0x59),
            (0, 0x59),
        ] {
            rtc.write(0, &[index]);
            rtc.write_at(value, 1000);
        }
        rtc.write(0, &[0x0b]);
        rtc.write_at(0x02, 1000);
        assert_eq!(
            (
                register(&rtc, 9, 1001),
                register(&rtc, 0x32, 1001),
                register(&rtc, 0, 1001)
            ),
            (0, 0x20, 0)
        );
        keeps_its_state(&*rtc, &*Rtc::new());
    }

    proptest! {
        #[test]
        fn every_date_goes_there_and_back(days in -200_000i64..200_000) {
            let (year, month, day) = date_of(days);
            prop_assert_eq!(days_of(year, month, day), days);
        }

        #[test]
        fn no_access_panics(writes in prop::collection::vec((0u8..128, any::<u8>()), 0..200), host in any::<i32>()) {
            let rtc = Rtc::new();
            for (index, value) in writes {
                rtc.write(0, &[index]);
                rtc.write_at(value, i64::from(host));
                rtc.read_at(i64::from(host));
            }
        }
    }
}
