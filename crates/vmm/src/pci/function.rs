//! The configuration space of one function, with its BARs, capabilities, MSI-X table and interrupt pin.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cpu::Vm;
use serde::{Deserialize, Serialize};

use super::msix::{self, Msix, MsixState};
use crate::devices::ioapic::IrqLine;

/// Configuration space of PCI Express.
pub const CONFIG_LEN: usize = 4096;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BARS: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_NO_INTX: u16 = 1 << 10;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITY_MSIX: u8 = 0x11;

/// A base address register: always memory, 64 bits wide, not prefetchable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    pub index: u8,
    pub len: u64,
}

struct Config {
    bytes: Vec<u8>,
    /// Bits the guest may change.
    writable: Vec<u8>,
}

/// See the module. Lock order: the configuration, then MSI-X or the IOAPIC.
pub struct Function {
    config: Mutex<Config>,
    bars: Vec<Bar>,
    msix: Option<Msix>,
    msix_bar: u8,
    msix_capability: usize,
    line: Mutex<Option<IrqLine>>,
    /// The device asks for the pin.
    asking: AtomicBool,
}

/// What is saved of a function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionState {
    /// The first 256 bytes, which hold everything there is.
    config: Vec<u8>,
    msix: Option<MsixState>,
    asking: bool,
}

/// Makes a [`Function`].
pub struct FunctionBuilder {
    config: Config,
    bars: Vec<Bar>,
    next_capability: usize,
    last_link: usize,
    msix: Option<(Msix, u8, usize)>,
}

impl FunctionBuilder {
    /// `class` is base class, sub-class and programming interface, as 0x010802.
    pub fn new(vendor: u16, device: u16, class: u32, revision: u8) -> FunctionBuilder {
        let mut config = Config {
            bytes: vec![0; CONFIG_LEN],
            writable: vec![0; CONFIG_LEN],
        };
        config.bytes[0..2].copy_from_slice(&vendor.to_le_bytes());
        config.bytes[2..4].copy_from_slice(&device.to_le_bytes());
        config.bytes[8..12].copy_from_slice(&(class << 8 | u32::from(revision)).to_le_bytes());
        // Memory decoding, bus mastering, interrupt disable.
        config.writable[COMMAND] = 0b110;
        config.writable[COMMAND + 1] = 0b100;
        config.writable[0x0c] = 0xff;
        config.writable[INTERRUPT_LINE] = 0xff;
        FunctionBuilder {
            config,
            bars: Vec::new(),
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES,
            msix: None,
        }
    }

    pub fn subsystem(mut self, vendor: u16, device: u16) -> FunctionBuilder {
        self.config.bytes[0x2c..0x2e].copy_from_slice(&vendor.to_le_bytes());
        self.config.bytes[0x2e..0x30].copy_from_slice(&device.to_le_bytes());
        self
    }

    /// The function raises INTA#.
    pub fn interrupt_pin(mut self) -> FunctionBuilder {
        self.config.bytes[INTERRUPT_PIN] = 1;
        self
    }

    /// A BAR of `len` bytes, a power of two of at least 4 KiB, in the registers `index` (even) and the next.
    ///
    /// # Panics
    /// For any other length or index: both are the device's constants.
    pub fn bar(mut self, index: u8, len: u64) -> FunctionBuilder {
        assert!(
            len.is_power_of_two()
                && (4096..=1 << 30).contains(&len)
                && index <= 4
                && index.is_multiple_of(2)
        );
        let at = BARS + usize::from(index) * 4;
        self.config.bytes[at] = 0b100;
        self.config.writable[at..at + 8].copy_from_slice(&(!(len - 1)).to_le_bytes());
        self.bars.push(Bar { index, len });
        self
    }

    /// Adds a capability of `content` after its two-byte header; `writable` are its changeable bits. Gives the
    /// builder and where the capability begins.
    pub fn capability(
        mut self,
        id: u8,
        content: &[u8],
        writable: &[u8],
    ) -> (FunctionBuilder, usize) {
        let at = self.next_capability;
        let end = at + 2 + content.len();
        assert!(end <= 256, "capabilities must fit into the first 256 bytes");
        self.config.bytes[self.last_link] = at as u8;
        self.last_link = at + 1;
        self.config.bytes[at] = id;
        self.config.bytes[at + 2..end].copy_from_slice(content);
        self.config.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.config.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.next_capability = end.next_multiple_of(4);
        (self, at)
    }

    /// MSI-X with `vectors`, its table and pending bits in a BAR of their own.
    pub fn msix(self, vm: Arc<dyn Vm>, vectors: u16, bar: u8) -> FunctionBuilder {
        let table = Msix::new(vm, vectors);
        let mut content = (vectors - 1).to_le_bytes().to_vec();
        content.extend(u32::from(bar).to_le_bytes());
        content.extend((msix::PENDING_AT as u32 | u32::from(bar)).to_le_bytes());
        let (mut builder, at) =
            self.bar(bar, msix::BAR_LEN)
                .capability(CAPABILITY_MSIX, &content, &[0, 0xc0]);
        builder.msix = Some((table, bar, at));
        builder
    }

    pub fn build(self) -> Function {
        let (msix, msix_bar, msix_capability) = match self.msix {
            Some((table, bar, at)) => (Some(table), bar, at),
            None => (None, u8::MAX, 0),
        };
        Function {
            config: Mutex::new(self.config),
            bars: self.bars,
            msix,
            msix_bar,
            msix_capability,
            line: Mutex::new(None),
            asking: AtomicBool::new(false),
        }
    }
}

impl Function {
    fn lock(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    pub(super) fn has_pin(&self) -> bool {
        self.lock().bytes[INTERRUPT_PIN] != 0
    }

    pub(super) fn connect(&self, line: IrqLine, gsi: u32) {
        self.lock().bytes[INTERRUPT_LINE] = gsi as u8;
        *self.line.lock().unwrap_or_else(PoisonError::into_inner) = Some(line);
    }

    /// Firmware's part: where a BAR lies.
    pub(super) fn set_bar(&self, bar: Bar, address: u64) {
        let at = BARS + usize::from(bar.index) * 4;
        let mut config = self.lock();
        let low = config.bytes[at] & 0xf;
        config.bytes[at..at + 8].copy_from_slice(&address.to_le_bytes());
        config.bytes[at] |= low;
    }

    /// The BARs that are decoded now, with their addresses.
    pub(super) fn decoded(&self) -> Vec<(Bar, u64)> {
        let config = self.lock();
        let command = u16::from_le_bytes([config.bytes[COMMAND], config.bytes[COMMAND + 1]]);
        if command & COMMAND_MEMORY == 0 {
            return Vec::new();
        }
        self.bars
            .iter()
            .map(|bar| {
                let at = BARS + usize::from(bar.index) * 4;
                let mut bytes = [0; 8];
                bytes.copy_from_slice(&config.bytes[at..at + 8]);
                (*bar, u64::from_le_bytes(bytes) & !0xf)
            })
            .filter(|(bar, address)| *address != 0 && address.checked_add(bar.len).is_some())
            .collect()
    }

    /// Where BAR `index` is decoded now.
    pub fn decoded_at(&self, index: u8) -> Option<u64> {
        self.decoded()
            .into_iter()
            .find(|(bar, _)| bar.index == index)
            .map(|(_, address)| address)
    }

    pub(super) fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.lock();
        for (at, byte) in (offset..).zip(data) {
            *byte = config.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    pub(super) fn write_config(&self, offset: usize, data: &[u8]) {
        let control = {
            let mut config = self.lock();
            for (at, byte) in (offset..).zip(data) {
                if let Some(mask) = config.writable.get(at).copied() {
                    config.bytes[at] = config.bytes[at] & !mask | byte & mask;
                }
            }
            let at = self.msix_capability + 2;
            u16::from_le_bytes([config.bytes[at], config.bytes[at + 1]])
        };
        if let Some(msix) = &self.msix {
            msix.set_control(control);
        }
        self.update_pin();
    }

    /// Bytes of a capability, for a device that gives them a meaning.
    pub fn config_bytes(&self, offset: usize, data: &mut [u8]) {
        self.read_config(offset, data);
    }

    /// Sets bytes whatever the guest may write there.
    pub fn set_config_bytes(&self, offset: usize, data: &[u8]) {
        let mut config = self.lock();
        if let Some(target) = config.bytes.get_mut(offset..offset + data.len()) {
            target.copy_from_slice(data);
        }
    }

    pub fn msix(&self) -> Option<&Msix> {
        self.msix.as_ref()
    }

    pub(super) fn is_msix_bar(&self, bar: u8) -> bool {
        bar == self.msix_bar
    }

    /// Raises or lowers INTA#, where MSI-X is off.
    pub fn set_pin(&self, up: bool) {
        self.asking.store(up, Ordering::Release);
        self.update_pin();
    }

    fn pin_level(&self) -> bool {
        let asking = self.asking.load(Ordering::Acquire);
        let mut config = self.lock();
        if asking {
            config.bytes[STATUS] |= STATUS_INTERRUPT;
        } else {
            config.bytes[STATUS] &= !STATUS_INTERRUPT;
        }
        let command = u16::from_le_bytes([config.bytes[COMMAND], config.bytes[COMMAND + 1]]);
        asking && command & COMMAND_NO_INTX == 0 && !self.msix.as_ref().is_some_and(Msix::enabled)
    }

    /// Whoever changes the pin brings it to what is asked for now, one after another: a device and the guest's CPU do so at
    /// once, and the line must not stay as the slower one meant it.
    fn update_pin(&self) {
        let line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        let level = self.pin_level();
        if let Some(line) = &*line {
            line.set(level);
        }
    }

    pub fn save(&self) -> FunctionState {
        FunctionState {
            config: self.lock().bytes[..256].to_vec(),
            msix: self.msix.as_ref().map(Msix::save),
            asking: self.asking.load(Ordering::Acquire),
        }
    }

    /// # Errors
    /// Where the state is of another kind of function.
    pub fn restore(&self, state: FunctionState) -> Result<(), &'static str> {
        {
            let mut config = self.lock();
            let same = state.config.len() == 256
                && state
                    .config
                    .iter()
                    .zip(&config.bytes)
                    .zip(&config.writable)
                    .enumerate()
                    .all(|(at, ((new, old), mask))| {
                        at == STATUS || at == INTERRUPT_LINE || (new ^ old) & !mask == 0
                    });
            if !same {
                return Err("the configuration space is another device's");
            }
            config.bytes[..256].copy_from_slice(&state.config);
        }
        match (&self.msix, state.msix) {
            (Some(table), Some(saved)) if table.restore(saved.clone()) => {}
            (None, None) => {}
            _ => return Err("the MSI-X table has another size"),
        }
        self.asking.store(state.asking, Ordering::Release);
        let level = self.pin_level();
        if let Some(line) = &*self.line.lock().unwrap_or_else(PoisonError::into_inner) {
            line.resume(level);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pin_is_as_it_was_asked_for_last_whoever_asks_at_once() {
        let function = FunctionBuilder::new(1, 2, 0, 0).interrupt_pin().build();
        for _ in 0..1000 {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for up in [true, false, true] {
                        function.set_pin(up);
                    }
                });
                for up in [false, true, false] {
                    function.set_pin(up);
                }
            });
            let saved = function.save();
            let shown = saved.config[STATUS] & STATUS_INTERRUPT != 0;
            assert_eq!(shown, saved.asking);
        }
    }
}
