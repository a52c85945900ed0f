//! The port by which a guest's kernel says that it panicked (QEMU's `docs/specs/pvpanic`). Linux finds it by its ACPI
//! name and writes to it before anything else that a panic does.
//!
//! ```text
//!   +0  read: the events known here   write: bit 0 the guest panicked, bit 1 its crash kernel takes over
//! ```

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::control::{Control, Outcome};

const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;

/// See the module.
pub struct PanicPort {
    control: Arc<Control>,
}

impl PanicPort {
    pub fn new(control: Arc<Control>) -> Arc<PanicPort> {
        Arc::new(PanicPort { control })
    }
}

impl BusDevice for PanicPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, _: u64, data: &[u8]) {
        match data.first() {
            Some(events) if events & PANICKED != 0 => self.control.end(Outcome::Crash(
                "the guest's kernel panicked; its console says why".into(),
            )),
            Some(events) if events & CRASH_LOADED != 0 => {
                tracing::info!("the guest's kernel panicked and its crash kernel takes over");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_the_machine_and_a_crash_kernel_goes_on() {
        let control = Control::new();
        let port = PanicPort::new(control.clone());
        let mut known = [0];
        port.read(0, &mut known);
        assert_eq!(known, [3]);
        port.write(0, &[CRASH_LOADED]);
        assert_eq!(control.outcome(), None);
        port.write(0, &[PANICKED]);
        assert!(matches!(control.outcome(), Some(Outcome::Crash(_))));
    }
}
