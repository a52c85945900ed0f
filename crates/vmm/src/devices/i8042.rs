//! Of the keyboard controller only what a PC without keyboard needs: the reset line (command 0xfe) and a
//! status that never blocks (IBM PC/AT technical reference, section 4).

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::control::{Control, Outcome};

/// Ports 0x60 and 0x64, one device at each.
pub struct KeyboardController {
    control: Arc<Control>,
    command_port: bool,
}

impl KeyboardController {
    /// The device of port 0x64 where `command_port`, else of port 0x60.
    pub fn new(control: Arc<Control>, command_port: bool) -> Arc<KeyboardController> {
        Arc::new(KeyboardController {
            control,
            command_port,
        })
    }
}

impl BusDevice for KeyboardController {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _: u64, data: &[u8]) {
        if self.command_port && data.first() == Some(&0xfe) {
            self.control.end(Outcome::Reset);
        }
    }
}
