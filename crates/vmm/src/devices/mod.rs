//! The devices of the board itself. Everything else sits on PCI.

pub mod debug_exit;
pub mod i8042;
pub mod ioapic;
pub mod outlet;
pub mod pic;
pub mod pit;
pub mod power;
pub mod pvpanic;
pub mod rtc;
pub mod serial;

/// The board's port addresses.
pub mod port {
    pub const PIC_MASTER: u64 = 0x20;
    pub const PIT: u64 = 0x40;
    pub const KEYBOARD_DATA: u64 = 0x60;
    pub const SYSTEM_CONTROL: u64 = 0x61;
    pub const KEYBOARD_COMMAND: u64 = 0x64;
    pub const RTC: u64 = 0x70;
    pub const PIC_SLAVE: u64 = 0xa0;
    pub const DEBUG_EXIT: u64 = 0xf4;
    pub const COM1: u64 = 0x3f8;
    pub const PANIC: u64 = 0x505;
    pub const POWER: u64 = 0x600;
    pub const PCI_CONFIG: u64 = 0xcf8;
}

/// The board's interrupt pins on the IOAPIC.
pub mod pin {
    pub const COM1: u32 = 4;
    pub const RTC: u32 = 8;
    pub const POWER: u32 = 9;
    /// INTA# to INTD# of the PCI slots.
    pub const PCI: [u32; 4] = [16, 17, 18, 19];
}

#[cfg(test)]
pub(crate) mod test_board {
    use std::sync::{Arc, Mutex};

    use cpu::{CpuError, GuestMemory, Vcpu, Vm};

    use crate::state::Persist;

    /// A machine without CPUs that notes the interrupts it is sent.
    #[derive(Default)]
    pub struct Recorder {
        pub messages: Mutex<Vec<(u64, u32)>>,
        pub written: Mutex<Vec<(u64, u64)>>,
    }

    impl Vm for Recorder {
        fn name(&self) -> &'static str {
            "recorder"
        }
        fn set_memory(&self, _: Arc<GuestMemory>) -> Result<(), CpuError> {
            Ok(())
        }
        fn create_vcpu(&self, _: u32) -> Result<Box<dyn Vcpu>, CpuError> {
            Err(CpuError::Broken("a recorder has no CPUs".into()))
        }
        fn signal_msi(&self, address: u64, data: u32) -> Result<(), CpuError> {
            self.messages.lock().unwrap().push((address, data));
            Ok(())
        }
        fn memory_written(&self, gpa: u64, len: u64) {
            self.written.lock().unwrap().push((gpa, len));
        }
    }

    /// The test every device passes: save, restore into a fresh one, save again, compare.
    pub fn keeps_its_state(used: &dyn Persist, fresh: &dyn Persist) {
        let saved = used.save().unwrap();
        assert_ne!(
            saved,
            fresh.save().unwrap(),
            "the test must change the device first"
        );
        let text = serde_json::to_string(&saved).unwrap();
        fresh
            .restore(&serde_json::from_str(&text).unwrap())
            .unwrap();
        assert_eq!(fresh.save().unwrap(), saved);
        let mut other = saved.clone();
        other.version += 1;
        assert!(fresh.restore(&other).is_err());
        other = saved;
        other.device.push('x');
        assert!(fresh.restore(&other).is_err());
    }
}
