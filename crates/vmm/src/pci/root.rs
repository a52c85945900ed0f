//! The root bus: configuration accesses through ECAM and through ports 0xcf8 and 0xcfc, slots, and the
//! addresses that firmware would have given to BARs.
//!
//! Lock order: the slots, then one slot's mappings, then the memory bus. No device is called with a lock held.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::{Function, FunctionBuilder, PciDevice};
use crate::bus::{Bus, BusDevice, get, put};
use crate::control::{Control, Outcome};
use crate::devices::ioapic::IoApic;
use crate::devices::pin;
use crate::memory::PCI_WINDOW32;

pub const SLOTS: usize = 32;

/// No slot or no address is left for a device.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PciError {
    #[error("all {SLOTS} PCI slots are taken: give the machine fewer devices")]
    Slots,
    #[error("the PCI memory window has no room for a BAR of {0:#x} bytes")]
    Window(u64),
}

struct Slot {
    device: Arc<dyn PciDevice>,
    /// BAR index and base of what is on the memory bus.
    mapped: Mutex<Vec<(u8, u64)>>,
}

/// See the module.
pub struct Root {
    mmio: Arc<Bus>,
    ioapic: Arc<IoApic>,
    control: Arc<Control>,
    slots: RwLock<Vec<Arc<Slot>>>,
    free: Mutex<Range<u64>>,
    address: Mutex<u32>,
}

struct HostBridge(Function);

impl PciDevice for HostBridge {
    fn function(&self) -> &Function {
        &self.0
    }
    fn read_bar(&self, _: u8, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write_bar(&self, _: u8, _: u64, _: &[u8]) {}
}

/// One BAR on the memory bus.
struct BarRange {
    device: Arc<dyn PciDevice>,
    bar: u8,
}

impl BusDevice for BarRange {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let function = self.device.function();
        match function.msix() {
            Some(msix) if function.is_msix_bar(self.bar) => msix.read(offset, data),
            _ => self.device.read_bar(self.bar, offset, data),
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let function = self.device.function();
        match function.msix() {
            Some(msix) if function.is_msix_bar(self.bar) => msix.write(offset, data),
            _ => self.device.write_bar(self.bar, offset, data),
        }
    }
}

impl Root {
    /// A root bus with its host bridge in slot 0.
    pub fn new(mmio: Arc<Bus>, ioapic: Arc<IoApic>, control: Arc<Control>) -> Arc<Root> {
        // Red Hat's PCI Express host bridge, which every guest knows to leave alone.
        let bridge = HostBridge(FunctionBuilder::new(0x1b36, 0x0008, 0x06_0000, 0).build());
        let slot = Arc::new(Slot {
            device: Arc::new(bridge),
            mapped: Mutex::default(),
        });
        Arc::new(Root {
            mmio,
            ioapic,
            control,
            slots: RwLock::new(vec![slot]),
            free: Mutex::new(PCI_WINDOW32),
            address: Mutex::new(0),
        })
    }

    /// Puts a device into the next slot and gives its BARs addresses; its slot's number.
    ///
    /// # Errors
    /// [`PciError`] where there is no room.
    pub fn attach(&self, device: Arc<dyn PciDevice>) -> Result<usize, PciError> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let number = slots.len();
        if number == SLOTS {
            return Err(PciError::Slots);
        }
        let function = device.function();
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        for bar in function.bars() {
            let base = free.start.next_multiple_of(bar.len);
            if base + bar.len > free.end {
                return Err(PciError::Window(bar.len));
            }
            function.set_bar(*bar, base);
            free.start = base + bar.len;
        }
        if function.has_pin() {
            // As _PRT says: INTA# of slot n.
            let gsi = pin::PCI[number % 4];
            function.connect(self.ioapic.line(gsi), gsi);
        }
        slots.push(Arc::new(Slot {
            device,
            mapped: Mutex::default(),
        }));
        Ok(number)
    }

    fn slot(&self, number: usize) -> Option<Arc<Slot>> {
        self.slots
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(number)
            .cloned()
    }

    /// Brings the memory bus in line with what the function decodes.
    fn remap(&self, slot: &Slot) {
        let wanted = slot.device.function().decoded();
        let mut mapped = slot.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        mapped.retain(|(index, base)| {
            let keep = wanted
                .iter()
                .any(|(bar, address)| bar.index == *index && address == base);
            if !keep {
                self.mmio.remove(*base);
            }
            keep
        });
        for (bar, address) in wanted {
            if mapped.iter().any(|(index, _)| *index == bar.index) {
                continue;
            }
            let range = Arc::new(BarRange {
                device: slot.device.clone(),
                bar: bar.index,
            });
            match self.mmio.insert(address, bar.len, range) {
                Ok(()) => mapped.push((bar.index, address)),
                // The guest put it over another device: neither hardware nor we decode that.
                Err(error) => tracing::debug!("BAR {} not mapped: {error}", bar.index),
            }
        }
    }

    /// After a restore of devices' configuration spaces.
    pub fn remap_all(&self) {
        let slots = self
            .slots
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        slots.iter().for_each(|slot| self.remap(slot));
    }

    fn read_config(&self, slot: usize, function: usize, offset: usize, data: &mut [u8]) {
        match self.slot(slot) {
            Some(slot) if function == 0 => {
                slot.device.before_config_read(offset, data.len());
                slot.device.function().read_config(offset, data);
            }
            _ => data.fill(0xff),
        }
    }

    fn write_config(&self, slot: usize, function: usize, offset: usize, data: &[u8]) {
        if let Some(slot) = self.slot(slot)
            && function == 0
        {
            slot.device.function().write_config(offset, data);
            self.remap(&slot);
            slot.device.after_config_write(offset, data.len());
        }
    }
}

/// The memory-mapped configuration space of bus 0.
pub struct Ecam(pub Arc<Root>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (slot, function) = ((offset >> 15) as usize & 31, (offset >> 12) as usize & 7);
        self.0
            .read_config(slot, function, offset as usize & 0xfff, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let (slot, function) = ((offset >> 15) as usize & 31, (offset >> 12) as usize & 7);
        self.0
            .write_config(slot, function, offset as usize & 0xfff, data);
    }
}

/// Ports 0xcf8 to 0xcff: configuration mechanism 1, and the reset register at 0xcf9.
pub struct ConfigPorts(pub Arc<Root>);

impl ConfigPorts {
    /// Slot, function and register, where the address port selects any on bus 0.
    fn target(&self, offset: u64) -> Option<(usize, usize, usize)> {
        let address = *self
            .0
            .address
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let selected = address & 0x8000_0000 != 0 && address >> 16 & 0xff == 0;
        let register = (address & 0xfc) as usize + (offset - 4) as usize;
        selected.then_some((
            (address >> 11 & 31) as usize,
            (address >> 8 & 7) as usize,
            register,
        ))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            put(
                data,
                u64::from(
                    *self
                        .0
                        .address
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner),
                ),
            );
            return;
        }
        match self.target(offset.max(4)) {
            Some((slot, function, register)) if offset >= 4 => {
                self.0.read_config(slot, function, register, data)
            }
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data.len()) {
            (0, 4) => {
                *self
                    .0
                    .address
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = get(data) as u32
            }
            // Bit 2 resets, as in every PC's reset control register.
            (1, 1) if data[0] & 4 != 0 => self.0.control.end(Outcome::Reset),
            (4.., _) => {
                if let Some((slot, function, register)) = self.target(offset) {
                    self.0.write_config(slot, function, register, data);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::devices::test_board::Recorder;
    use proptest::prelude::*;

    pub struct Board {
        pub vm: Arc<Recorder>,
        pub mmio: Arc<Bus>,
        pub root: Arc<Root>,
    }

    pub fn board() -> Board {
        let vm = Arc::new(Recorder::default());
        let mmio = Arc::new(Bus::new());
        let root = Root::new(mmio.clone(), IoApic::new(vm.clone()), Control::new());
        Board { vm, mmio, root }
    }

    struct Scratch(Function);
    impl PciDevice for Scratch {
        fn function(&self) -> &Function {
            &self.0
        }
        fn read_bar(&self, bar: u8, _: u64, data: &mut [u8]) {
            data.fill(bar + 1);
        }
        fn write_bar(&self, _: u8, _: u64, _: &[u8]) {}
    }

    fn scratch(board: &Board) -> usize {
        let function = FunctionBuilder::new(0x1234, 1, 0xff_0000, 0)
            .interrupt_pin()
            .bar(0, 0x4000)
            .msix(board.vm.clone(), 2, 4)
            .build();
        board.root.attach(Arc::new(Scratch(function))).unwrap()
    }

    #[test]
    fn a_bar_is_sized_moved_and_decoded_only_when_enabled() {
        let board = board();
        let slot = scratch(&board) as u64;
        let ecam = Ecam(board.root.clone());
        let at = |register: u64| slot << 15 | register;
        let mut word = [0; 4];
        ecam.read(at(0), &mut word);
        assert_eq!(u32::from_le_bytes(word), 0x0001_1234);
        ecam.read(at(0x10), &mut word);
        let base = u32::from_le_bytes(word) & !0xf;
        assert!(
            !board.mmio.read(u64::from(base), &mut [0]),
            "nothing decodes yet"
        );
        ecam.write(at(0x10), &[0xff; 4]);
        ecam.read(at(0x10), &mut word);
        assert_eq!(u32::from_le_bytes(word), 0xffff_c004);
        ecam.write(at(0x10), &0xd000_0000u32.to_le_bytes());
        ecam.write(at(0x04), &[2, 0]);
        let mut byte = [0];
        assert!(board.mmio.read(0xd000_0010, &mut byte) && byte == [1]);
        ecam.write(at(0x14), &1u32.to_le_bytes());
        assert!(
            board.mmio.read(0x1_d000_0010, &mut byte) && !board.mmio.read(0xd000_0010, &mut byte)
        );
        ecam.write(at(0x04), &[0, 0]);
        assert!(!board.mmio.read(0x1_d000_0010, &mut byte));
    }

    #[test]
    fn both_ways_into_configuration_space_agree() {
        let board = board();
        let slot = scratch(&board) as u32;
        let ports = ConfigPorts(board.root.clone());
        ports.write(0, &(0x8000_0000 | slot << 11 | 0x34).to_le_bytes());
        let (mut low, mut wide) = ([0; 1], [0; 1]);
        ports.read(4, &mut low);
        Ecam(board.root.clone()).read(u64::from(slot) << 15 | 0x34, &mut wide);
        assert_eq!((low, wide), ([0x40], [0x40]));
        ports.write(0, &(0x8000_0000u32 | 31 << 11).to_le_bytes());
        let mut nothing = [0; 4];
        ports.read(4, &mut nothing);
        assert_eq!(nothing, [0xff; 4]);
    }

    proptest! {
        #[test]
        fn no_configuration_access_panics(accesses in prop::collection::vec((0u64..1 << 17, 0u32..4, any::<u64>()), 0..200)) {
            let board = board();
            scratch(&board);
            let (ecam, ports) = (Ecam(board.root.clone()), ConfigPorts(board.root.clone()));
            for (offset, size, value) in accesses {
                let len = 1usize << size;
                ecam.write(offset, &value.to_le_bytes()[..len]);
                ecam.read(offset, &mut [0; 8][..len]);
                let port = offset % 8;
                if port as usize + len <= 8 {
                    ports.write(port, &value.to_le_bytes()[..len]);
                    ports.read(port, &mut [0; 8][..len]);
                }
            }
        }
    }
}
