//! Power and reset registers of a hardware-reduced ACPI board (ACPI 6.4, 4.8.3.7 sleep control and status,
//! 4.8.3.6 reset), and the events behind the generic event device (5.6.9), of which the power button is one.
//!
//! ```text
//!   +0  sleep control  bits 2..=4 SLP_TYP, bit 5 SLP_EN     (5 is S5: off)
//!   +1  sleep status   bit 7 WAK_STS
//!   +2  reset          1 resets
//!   +3  events         bit 0 power button; reading takes them
//! ```

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::control::{Control, Outcome};
use crate::devices::ioapic::IrqLine;
use crate::state::{Persist, Saved, StateError};

pub const LEN: u64 = 4;
pub const SLEEP_TYPE_OFF: u8 = 5;
pub const RESET_VALUE: u8 = 1;
pub const EVENT_POWER_BUTTON: u8 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct State {
    events: u8,
}

/// See the module.
pub struct Power {
    control: Arc<Control>,
    irq: IrqLine,
    state: Mutex<State>,
}

impl Power {
    pub fn new(control: Arc<Control>, irq: IrqLine) -> Arc<Power> {
        Arc::new(Power {
            control,
            irq,
            state: Mutex::new(State::default()),
        })
    }

    /// Presses the power button: a guest with ACPI shuts down in its own time.
    pub fn press_button(&self) {
        // Held over the pulse: two at once would leave the wire up.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.events |= EVENT_POWER_BUTTON;
        self.irq.pulse();
    }
}

impl BusDevice for Power {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            *byte = match register {
                3 => std::mem::take(
                    &mut self
                        .state
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .events,
                ),
                _ => 0,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (register, byte) in (offset..).zip(data) {
            match (register, *byte) {
                (0, value) if value & 0x20 != 0 && value >> 2 & 7 == SLEEP_TYPE_OFF => {
                    self.control.end(Outcome::PowerOff);
                }
                (2, RESET_VALUE) => self.control.end(Outcome::Reset),
                _ => {}
            }
        }
    }
}

impl Persist for Power {
    fn identity(&self) -> String {
        "power".into()
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
    use crate::devices::ioapic::IoApic;
    use crate::devices::test_board::{Recorder, keeps_its_state};

    fn power() -> (Arc<Control>, Arc<Power>) {
        let control = Control::new();
        let ioapic = IoApic::new(Arc::new(Recorder::default()));
        (control.clone(), Power::new(control, ioapic.line(9)))
    }

    #[test]
    fn only_the_sleep_type_of_off_ends_the_machine() {
        let (control, power) = power();
        power.write(0, &[0x20 | 3 << 2]);
        assert_eq!(control.outcome(), None);
        power.write(0, &[0x20 | SLEEP_TYPE_OFF << 2]);
        assert_eq!(control.outcome(), Some(Outcome::PowerOff));
    }

    #[test]
    fn the_state_survives() {
        let (_, used) = power();
        used.press_button();
        keeps_its_state(&*used, &*power().1);
    }
}
