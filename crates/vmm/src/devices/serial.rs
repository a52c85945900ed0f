//! A 16550A serial port (National Semiconductor PC16550D data sheet, section 8).
//!
//! Output goes to a queue that a thread of its own drains, so that a slow terminal never stops a CPU: while
//! the queue is full the port says that its transmitter is busy, as a slow line would, and interrupts when it is not any
//! more.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::devices::ioapic::IrqLine;
use crate::devices::outlet::Outlet;
use crate::state::{Persist, Saved, StateError};

/// Bytes that wait for the outside; the guest sees a busy transmitter beyond.
const OUTPUT_LIMIT: usize = 64 * 1024;
/// Bytes of input that wait for the guest; more is dropped, as a line without flow control drops.
const INPUT_LIMIT: usize = 64 * 1024;
const FIFO: usize = 16;

const IER_RECEIVED: u8 = 1;
const IER_EMPTY: u8 = 2;
const IER_LINE: u8 = 4;
/// Causes of an interrupt, by rank (8.6.4).
const CAUSE_LINE: u8 = 0b0110;
const CAUSE_RECEIVED: u8 = 0b0100;
const CAUSE_EMPTY: u8 = 0b0010;
const CAUSE_NONE: u8 = 0b0001;
const LCR_DIVISOR: u8 = 0x80;
const MCR_LOOP: u8 = 0x10;
const MCR_OUT2: u8 = 0x08;
const LSR_READY: u8 = 0x01;
const LSR_OVERRUN: u8 = 0x02;
const LSR_EMPTY: u8 = 0x60;
/// Carrier, data set ready, clear to send.
const MSR_CONNECTED: u8 = 0xb0;

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct State {
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    divisor: u16,
    overrun: bool,
    /// The transmitter became empty and the guest has not yet been told.
    empty_pending: bool,
    input: VecDeque<u8>,
    irq_up: bool,
}

/// One serial port. Lock order: the state, then the outlet, then the IOAPIC.
pub struct Serial {
    name: String,
    irq: IrqLine,
    state: Mutex<State>,
    outlet: Outlet,
}

impl Serial {
    /// A port called `name` (`serial0`) whose output goes to `sink`.
    pub fn new(name: impl Into<String>, irq: IrqLine, sink: Box<dyn Write + Send>) -> Arc<Serial> {
        let name = name.into();
        Arc::new_cyclic(|serial: &Weak<Serial>| {
            let serial = serial.clone();
            let taken = move || {
                if let Some(serial) = serial.upgrade() {
                    serial.update_irq(&mut serial.lock());
                }
            };
            Serial {
                outlet: Outlet::new(&name, OUTPUT_LIMIT, sink, taken),
                name,
                irq,
                state: Mutex::new(State {
                    divisor: 1,
                    ..State::default()
                }),
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Input from outside; what has no room is dropped.
    pub fn receive(&self, bytes: &[u8]) {
        let mut state = self.lock();
        let room = INPUT_LIMIT.saturating_sub(state.input.len());
        state.input.extend(&bytes[..bytes.len().min(room)]);
        state.overrun |= bytes.len() > room;
        self.update_irq(&mut state);
    }

    fn pending(&self, state: &State) -> Option<u8> {
        let enabled = |bit| state.interrupt_enable & bit != 0;
        if enabled(IER_LINE) && state.overrun {
            Some(CAUSE_LINE)
        } else if enabled(IER_RECEIVED) && !state.input.is_empty() {
            Some(CAUSE_RECEIVED)
        } else if enabled(IER_EMPTY) && state.empty_pending && self.outlet.has_room() {
            Some(CAUSE_EMPTY)
        } else {
            None
        }
    }

    fn update_irq(&self, state: &mut State) {
        // OUT2 gates the line on a PC.
        let gated = state.modem_control & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2;
        state.irq_up = gated && self.pending(state).is_some();
        self.irq.set(state.irq_up);
    }

    fn read_register(&self, register: u64) -> u8 {
        let mut state = self.lock();
        let value = match register {
            0 if state.line_control & LCR_DIVISOR != 0 => state.divisor as u8,
            0 => state.input.pop_front().unwrap_or(0),
            1 if state.line_control & LCR_DIVISOR != 0 => (state.divisor >> 8) as u8,
            1 => state.interrupt_enable,
            2 => {
                let fifos = if state.fifo_control & 1 != 0 { 0xc0 } else { 0 };
                let cause = self.pending(&state);
                if cause == Some(CAUSE_EMPTY) {
                    state.empty_pending = false;
                }
                fifos | cause.unwrap_or(CAUSE_NONE)
            }
            3 => state.line_control,
            4 => state.modem_control,
            5 => {
                let ready = if state.input.is_empty() { 0 } else { LSR_READY };
                let overrun = if std::mem::take(&mut state.overrun) {
                    LSR_OVERRUN
                } else {
                    0
                };
                ready | overrun | if self.outlet.has_room() { LSR_EMPTY } else { 0 }
            }
            6 if state.modem_control & MCR_LOOP != 0 => {
                // Outputs wired to inputs: DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD.
                let out = state.modem_control;
                (out & 1) << 5 | (out & 2) << 3 | (out & 4) << 4 | (out & 8) << 4
            }
            6 => MSR_CONNECTED,
            7 => state.scratch,
            _ => 0xff,
        };
        self.update_irq(&mut state);
        value
    }

    fn write_register(&self, register: u64, value: u8) {
        let mut state = self.lock();
        match register {
            0 if state.line_control & LCR_DIVISOR != 0 => {
                state.divisor = state.divisor & 0xff00 | u16::from(value)
            }
            0 => {
                if state.modem_control & MCR_LOOP != 0 {
                    if state.input.len() < FIFO {
                        state.input.push_back(value);
                    } else {
                        state.overrun = true;
                    }
                } else {
                    self.outlet.push(&[value]);
                }
                state.empty_pending = true;
                // One edge for each byte: lowered here, raised below.
                self.irq.set(false);
            }
            1 if state.line_control & LCR_DIVISOR != 0 => {
                state.divisor = state.divisor & 0xff | u16::from(value) << 8;
            }
            1 => {
                let newly = value & !state.interrupt_enable;
                state.interrupt_enable = value & 0xf;
                if newly & IER_EMPTY != 0 {
                    state.empty_pending = true;
                }
            }
            2 => {
                state.fifo_control = value & 0xc9;
                if value & 2 != 0 && state.modem_control & MCR_LOOP != 0 {
                    state.input.clear();
                }
            }
            3 => state.line_control = value,
            4 => state.modem_control = value & 0x1f,
            7 => state.scratch = value,
            _ => {}
        }
        self.update_irq(&mut state);
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            *byte = self.read_register(register);
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        for (register, byte) in (offset..).zip(data) {
            self.write_register(register, *byte);
        }
    }
}

impl Persist for Serial {
    fn identity(&self) -> String {
        self.name.clone()
    }
    /// Waits until all output is written. Later output is dropped.
    fn close(&self) {
        self.outlet.close();
    }
    fn save(&self) -> Result<Saved, StateError> {
        Saved::of(self.identity(), 1, &*self.lock())
    }
    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: State = saved.get(&self.identity(), 1)?;
        if state.input.len() > INPUT_LIMIT {
            return Err(saved.damaged("more input than the port holds"));
        }
        self.irq.resume(state.irq_up);
        *self.lock() = state;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::ioapic::IoApic;
    use crate::devices::test_board::{Recorder, keeps_its_state};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);
    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn port(sink: &Shared) -> (Arc<Recorder>, Arc<Serial>) {
        let vm = Arc::new(Recorder::default());
        let ioapic = IoApic::new(vm.clone());
        ioapic.write(0, &[0x18]);
        ioapic.write(0x10, &0x24u32.to_le_bytes());
        let serial = Serial::new("serial0", ioapic.line(4), Box::new(sink.clone()));
        (vm, serial)
    }

    #[test]
    fn what_is_written_comes_out_whole_and_in_order() {
        let sink = Shared::default();
        let (_, serial) = port(&sink);
        let text: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
        for byte in &text {
            while serial.read_register(5) & LSR_EMPTY == 0 {
                std::thread::yield_now();
            }
            serial.write_register(0, *byte);
        }
        serial.close();
        assert_eq!(*sink.0.lock().unwrap(), text);
    }

    #[test]
    fn input_and_an_empty_transmitter_interrupt() {
        let (vm, serial) = port(&Shared::default());
        serial.write_register(4, MCR_OUT2);
        serial.write_register(1, IER_RECEIVED | IER_EMPTY);
        assert_eq!(vm.messages.lock().unwrap().len(), 1);
        assert_eq!(serial.read_register(2) & 0xf, 0b0010);
        assert_eq!(
            serial.read_register(2) & 0xf,
            0b0001,
            "reading the cause takes it away"
        );
        serial.receive(b"ab");
        assert_eq!(vm.messages.lock().unwrap().len(), 2);
        assert_eq!(serial.read_register(2) & 0xf, 0b0100);
        assert_eq!(
            (serial.read_register(0), serial.read_register(0)),
            (b'a', b'b')
        );
        assert_eq!(serial.read_register(5) & LSR_READY, 0);
    }

    #[test]
    fn a_slow_line_is_busy_and_interrupts_once_it_is_not() {
        /// Takes nothing before it is let.
        struct Slow(std::sync::mpsc::Receiver<()>);
        impl Write for Slow {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                let _ = self.0.recv();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (let_go, held) = std::sync::mpsc::channel();
        let vm = Arc::new(Recorder::default());
        let ioapic = IoApic::new(vm.clone());
        ioapic.write(0, &[0x18]);
        ioapic.write(0x10, &0x24u32.to_le_bytes());
        let serial = Serial::new("serial0", ioapic.line(4), Box::new(Slow(held)));
        serial.write_register(4, MCR_OUT2);
        let mut written = 0;
        while serial.read_register(5) & LSR_EMPTY != 0 {
            serial.write_register(0, b'x');
            written += 1;
        }
        assert!(
            (OUTPUT_LIMIT..=2 * OUTPUT_LIMIT).contains(&written),
            "{written}"
        );
        serial.write_register(1, IER_EMPTY);
        assert_eq!(serial.read_register(2) & 0xf, CAUSE_NONE);
        assert!(vm.messages.lock().unwrap().is_empty());
        drop(let_go);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while vm.messages.lock().unwrap().is_empty() {
            assert!(std::time::Instant::now() < deadline, "no interrupt came");
            std::thread::yield_now();
        }
        assert_eq!(serial.read_register(2) & 0xf, CAUSE_EMPTY);
    }

    #[test]
    fn the_state_survives() {
        let (_, used) = port(&Shared::default());
        used.write_register(4, MCR_OUT2);
        used.write_register(1, IER_RECEIVED);
        used.receive(b"waiting");
        let (vm, fresh) = port(&Shared::default());
        keeps_its_state(&*used, &*fresh);
        assert!(
            vm.messages.lock().unwrap().is_empty(),
            "the interrupt was sent before the save"
        );
    }

    proptest::proptest! {
        #[test]
        fn no_register_access_panics(accesses in proptest::collection::vec((0u64..8, proptest::num::u8::ANY), 0..200)) {
            let (_, serial) = port(&Shared::default());
            for (register, value) in accesses {
                serial.write_register(register, value);
                serial.read_register(register ^ 7);
            }
        }
    }
}
