//! The pair of 8259A interrupt controllers, kept to what a guest in APIC mode asks of them: initialisation,
//! masks, and no interrupts (Intel 8259A data sheet). No device is wired to them.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::state::{Persist, Saved, StateError};

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct State {
    mask: u8,
    vector_base: u8,
    /// Next initialisation word wanted: 2, 3 or 4; 0 outside initialisation.
    step: u8,
    wants_fourth: bool,
}

/// One controller of the pair.
pub struct Pic {
    name: &'static str,
    state: Mutex<State>,
}

impl Pic {
    /// `name` is `pic0` or `pic1`.
    pub fn new(name: &'static str) -> Arc<Pic> {
        Arc::new(Pic {
            name,
            state: Mutex::new(State {
                mask: 0xff,
                ..State::default()
            }),
        })
    }
}

impl BusDevice for Pic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        data.fill(0);
        if let (1, Some(first)) = (offset, data.first_mut()) {
            *first = state.mask;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match (offset, state.step) {
            (0, _) if value & 0x10 != 0 => {
                *state = State {
                    step: 2,
                    wants_fourth: value & 1 != 0,
                    ..State::default()
                };
            }
            (1, 2) => {
                state.vector_base = value & 0xf8;
                state.step = 3;
            }
            (1, 3) => state.step = if state.wants_fourth { 4 } else { 0 },
            (1, 4) => state.step = 0,
            (1, _) => state.mask = value,
            _ => {}
        }
    }
}

impl Persist for Pic {
    fn identity(&self) -> String {
        self.name.into()
    }
    fn save(&self) -> Result<Saved, StateError> {
        Saved::of(
            self.identity(),
            1,
            &*self.state.lock().unwrap_or_else(PoisonError::into_inner),
        )
    }
    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) =
            saved.get(&self.identity(), 1)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::test_board::keeps_its_state;

    #[test]
    fn a_mask_reads_back_and_survives() {
        let pic = Pic::new("pic0");
        for (offset, value) in [(0, 0x11), (1, 0x30), (1, 4), (1, 1), (1, 0xa5)] {
            pic.write(offset, &[value]);
        }
        let mut mask = [0];
        pic.read(1, &mut mask);
        assert_eq!(mask, [0xa5]);
        keeps_its_state(&*pic, &*Pic::new("pic0"));
    }
}
