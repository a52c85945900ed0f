//! The I/O APIC: 24 interrupt pins, each turned into a message to a CPU (Intel 82093AA data sheet; the EOI
//! register of version 0x20 as in the ICH9 data sheet, 13.5.1).
//!
//! Lock order: the state's lock is a leaf. Messages are sent after it is released, because a CPU may answer
//! one by ending an older interrupt ([`IoApic::end_of_interrupt`]).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cpu::Vm;
use serde::{Deserialize, Serialize};

use crate::bus::{BusDevice, get, put};
use crate::complaint::Complaint;
use crate::memory::LAPIC_START;
use crate::state::{Persist, Saved, StateError};

pub const PINS: usize = 24;
const VERSION: u32 = 0x20 | ((PINS as u32 - 1) << 16);

const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
/// Delivery status and remote IRR belong to the device.
const READ_ONLY: u64 = REMOTE_IRR | 1 << 12;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    id: u32,
    select: u8,
    redirection: [u64; PINS],
    /// An edge came while the pin was masked.
    waiting_edges: u32,
}

struct Inner {
    state: State,
    /// How many devices hold each pin up; not saved, each device gives it back itself.
    holders: [u32; PINS],
}

/// The interrupt controller of the board.
pub struct IoApic {
    vm: Arc<dyn Vm>,
    complaint: Complaint,
    inner: Mutex<Inner>,
}

/// A message to be sent once the lock is released.
type Message = (u64, u32);

fn message(entry: u64) -> Message {
    let address = LAPIC_START | (entry >> 56 & 0xff) << 12 | (entry >> 11 & 1) << 2;
    let trigger = entry >> 15 & 1;
    let data = (entry & 0x7ff) as u32 & !0x800 | (trigger as u32) << 15 | (trigger as u32) << 14;
    (address, data)
}

impl Inner {
    /// Sends for `pin` if it may, and notes that a level-triggered one is under way.
    fn deliver(&mut self, pin: usize) -> Option<Message> {
        let entry = self.state.redirection[pin];
        if entry & MASKED != 0 {
            return None;
        }
        if entry & LEVEL != 0 {
            if self.holders[pin] == 0 || entry & REMOTE_IRR != 0 {
                return None;
            }
            self.state.redirection[pin] |= REMOTE_IRR;
        }
        Some(message(entry))
    }

    fn write_entry(&mut self, register: u8, value: u32) -> Option<Message> {
        let pin = usize::from((register - 0x10) / 2);
        let entry = &mut self.state.redirection[pin];
        if register & 1 == 1 {
            *entry = *entry & 0xffff_ffff | u64::from(value) << 32;
            return None;
        }
        let kept = *entry & (READ_ONLY | 0xffff_ffff << 32);
        *entry = u64::from(value) & !READ_ONLY & 0x1_ffff | kept;
        if *entry & LEVEL == 0 {
            // An edge pin has nothing under way (ICH9 13.5.7: remote IRR is undefined then).
            *entry &= !REMOTE_IRR;
        }
        if *entry & MASKED != 0 {
            return None;
        }
        let waited = self.state.waiting_edges & 1 << pin != 0;
        self.state.waiting_edges &= !(1 << pin);
        if *entry & LEVEL != 0 || waited && self.holders[pin] > 0 {
            self.deliver(pin)
        } else {
            None
        }
    }
}

impl IoApic {
    pub fn new(vm: Arc<dyn Vm>) -> Arc<IoApic> {
        let state = State {
            id: 0,
            select: 0,
            redirection: [MASKED; PINS],
            waiting_edges: 0,
        };
        Arc::new(IoApic {
            vm,
            complaint: Complaint::new("ioapic"),
            inner: Mutex::new(Inner {
                state,
                holders: [0; PINS],
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, messages: impl IntoIterator<Item = Message>) {
        for (address, data) in messages {
            let sent = self.vm.signal_msi(address, data);
            self.complaint.about(
                format_args!("interrupt message {address:#x} {data:#x} not delivered"),
                sent,
            );
        }
    }

    /// A wire to `pin`. Several devices may hold wires to the same pin; it is up while any is.
    ///
    /// # Panics
    /// Where there is no such pin.
    pub fn line(self: &Arc<IoApic>, pin: u32) -> IrqLine {
        assert!((pin as usize) < PINS);
        IrqLine {
            ioapic: self.clone(),
            pin: pin as usize,
            up: AtomicBool::new(false),
        }
    }

    fn change(&self, pin: usize, up: bool) {
        let message = {
            let mut inner = self.lock();
            let before = inner.holders[pin];
            inner.holders[pin] = if up {
                before + 1
            } else {
                before.saturating_sub(1)
            };
            if !(up && before == 0) {
                return;
            }
            let entry = inner.state.redirection[pin];
            if entry & MASKED != 0 && entry & LEVEL == 0 {
                inner.state.waiting_edges |= 1 << pin;
            }
            inner.deliver(pin)
        };
        self.send(message);
    }

    /// A CPU ended a level-triggered interrupt: pins that are still up ask again.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut messages = Vec::new();
        {
            let mut inner = self.lock();
            for pin in 0..PINS {
                let entry = inner.state.redirection[pin];
                if entry & 0xff == u64::from(vector)
                    && entry & LEVEL != 0
                    && entry & REMOTE_IRR != 0
                {
                    inner.state.redirection[pin] &= !REMOTE_IRR;
                    messages.extend(inner.deliver(pin));
                }
            }
        }
        self.send(messages);
    }

    /// Tells the CPU back end which vectors are level-triggered, so that it reports their end.
    fn announce(&self, pin: usize, entry: u64) {
        let route = (entry & MASKED == 0).then(|| message(entry));
        let routed = self.vm.ioapic_route(pin as u32, route);
        self.complaint
            .about(format_args!("pin {pin} could not be routed"), routed);
    }
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let inner = self.lock();
        let value = match (offset, inner.state.select) {
            (0x00, select) => u32::from(select),
            (0x10, 0x00 | 0x02) => inner.state.id << 24,
            (0x10, 0x01) => VERSION,
            (0x10, register @ 0x10..=0x3f) => {
                let entry = inner.state.redirection[usize::from((register - 0x10) / 2)];
                if register & 1 == 1 {
                    (entry >> 32) as u32
                } else {
                    entry as u32
                }
            }
            _ => 0,
        };
        put(data, u64::from(value));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let value = get(data) as u32;
        let mut routed = None;
        let message = {
            let mut inner = self.lock();
            match (offset, inner.state.select) {
                (0x00, _) => {
                    inner.state.select = value as u8;
                    None
                }
                (0x10, 0x00) => {
                    inner.state.id = value >> 24 & 0xf;
                    None
                }
                (0x10, register @ 0x10..=0x3f) => {
                    let message = inner.write_entry(register, value);
                    let pin = usize::from((register - 0x10) / 2);
                    routed = Some((pin, inner.state.redirection[pin]));
                    message
                }
                (0x40, _) => {
                    drop(inner);
                    self.end_of_interrupt(value as u8);
                    None
                }
                _ => None,
            }
        };
        if let Some((pin, entry)) = routed {
            self.announce(pin, entry);
        }
        self.send(message);
    }
}

impl Persist for IoApic {
    fn identity(&self) -> String {
        "ioapic".into()
    }
    fn save(&self) -> Result<Saved, StateError> {
        Saved::of(self.identity(), 1, &self.lock().state)
    }
    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: State = saved.get(&self.identity(), 1)?;
        let redirection = state.redirection;
        self.lock().state = state;
        for (pin, entry) in redirection.into_iter().enumerate() {
            self.announce(pin, entry);
        }
        Ok(())
    }
}

/// One device's wire to an interrupt pin.
pub struct IrqLine {
    ioapic: Arc<IoApic>,
    pin: usize,
    up: AtomicBool,
}

impl IrqLine {
    /// Raises or lowers the wire; nothing happens where it is so already.
    pub fn set(&self, up: bool) {
        if self.up.swap(up, Ordering::AcqRel) != up {
            self.ioapic.change(self.pin, up);
        }
    }

    /// Lowers and raises: one edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// Gives the wire back the level it had when saved, without an interrupt: that one was sent then.
    pub fn resume(&self, up: bool) {
        if self.up.swap(up, Ordering::AcqRel) != up {
            let mut inner = self.ioapic.lock();
            let holders = &mut inner.holders[self.pin];
            *holders = if up {
                *holders + 1
            } else {
                holders.saturating_sub(1)
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::test_board::{Recorder, keeps_its_state};

    fn program(ioapic: &IoApic, pin: u8, entry: u64) {
        for (register, value) in [
            (0x11 + 2 * pin, (entry >> 32) as u32),
            (0x10 + 2 * pin, entry as u32),
        ] {
            ioapic.write(0, &u32::from(register).to_le_bytes());
            ioapic.write(0x10, &value.to_le_bytes());
        }
    }

    #[test]
    fn an_edge_is_one_message_and_a_held_level_asks_again_after_its_end() {
        let vm = Arc::new(Recorder::default());
        let ioapic = IoApic::new(vm.clone());
        program(&ioapic, 4, 0x0100_0000_0000_0034);
        let edge = ioapic.line(4);
        edge.set(true);
        edge.set(true);
        assert_eq!(*vm.messages.lock().unwrap(), [(0xfee0_1000, 0x34)]);
        vm.messages.lock().unwrap().clear();
        program(&ioapic, 16, LEVEL | 0x51);
        let (first, second) = (ioapic.line(16), ioapic.line(16));
        first.set(true);
        second.set(true);
        assert_eq!(vm.messages.lock().unwrap().len(), 1);
        first.set(false);
        ioapic.end_of_interrupt(0x51);
        assert_eq!(
            vm.messages.lock().unwrap().len(),
            2,
            "the second device still holds the pin"
        );
        second.set(false);
        ioapic.end_of_interrupt(0x51);
        assert_eq!(vm.messages.lock().unwrap().len(), 2);
        assert_eq!(vm.messages.lock().unwrap()[0], (0xfee0_0000, 0xc051));
    }

    #[test]
    fn an_edge_that_came_while_masked_is_sent_when_unmasked() {
        let vm = Arc::new(Recorder::default());
        let ioapic = IoApic::new(vm.clone());
        let line = ioapic.line(4);
        line.set(true);
        assert!(vm.messages.lock().unwrap().is_empty());
        program(&ioapic, 4, 0x34);
        assert_eq!(vm.messages.lock().unwrap().len(), 1);
    }

    #[test]
    fn the_state_survives() {
        let used = IoApic::new(Arc::new(Recorder::default()));
        program(&used, 3, LEVEL | 0x31);
        used.line(3).set(true);
        keeps_its_state(&*used, &*IoApic::new(Arc::new(Recorder::default())));
    }

    proptest::proptest! {
        #[test]
        fn no_register_write_panics(writes in proptest::collection::vec((0u64..0x50, proptest::num::u32::ANY), 0..200)) {
            let ioapic = IoApic::new(Arc::new(Recorder::default()));
            let line = ioapic.line(23);
            for (offset, value) in writes {
                ioapic.write(offset & !0xf, &value.to_le_bytes());
                line.set(value & 1 == 1);
                ioapic.read(offset, &mut [0; 4]);
            }
        }
    }
}
