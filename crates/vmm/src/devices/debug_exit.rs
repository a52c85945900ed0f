//! A port that ends the machine with a code, for test guests. Not on machines of users.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::control::{Control, Outcome};

/// Port 0xf4: a written byte is the exit code.
pub struct DebugExit {
    control: Arc<Control>,
}

impl DebugExit {
    pub fn new(control: Arc<Control>) -> Arc<DebugExit> {
        Arc::new(DebugExit { control })
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _: u64, data: &[u8]) {
        self.control
            .end(Outcome::DebugExit(data.first().copied().unwrap_or(0)));
    }
}
