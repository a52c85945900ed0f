//! MSI-X: a table of messages in a BAR, with a mask and a pending bit each (PCI Local Bus 3.0, 6.8.2).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cpu::{MessageLine, Vm};
use serde::{Deserialize, Serialize};

use crate::bus::{get, put};
use crate::complaint::Complaint;

/// Vectors in one table, by its specification.
pub const LIMIT: u16 = 2048;
/// Where the pending bits begin within the BAR; the table is before.
pub const PENDING_AT: u64 = 0x8000;
/// Size of the BAR that holds both.
pub const BAR_LEN: u64 = 0x1_0000;

const VECTOR_MASKED: u32 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

/// What is saved of a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    entries: Vec<Entry>,
    enabled: bool,
    masked: bool,
}

/// One function's table. Its locks are leaves, `lines` after `state`: messages are sent after they are released.
pub struct Msix {
    vm: Arc<dyn Vm>,
    complaint: Complaint,
    state: Mutex<MsixState>,
    /// By vector, of those that were sent before.
    lines: Mutex<Vec<Line>>,
}

/// How a vector reaches the CPUs.
#[derive(Clone, Default)]
enum Line {
    /// It was not sent yet.
    #[default]
    Unknown,
    /// By the host's kernel, which sends this message.
    Kernel(Arc<dyn MessageLine>, (u64, u32)),
    /// By the back end: the host has no line for it.
    Call,
}

impl Msix {
    /// A table of `vectors`, all masked.
    ///
    /// # Panics
    /// For none or more than [`LIMIT`].
    pub fn new(vm: Arc<dyn Vm>, vectors: u16) -> Msix {
        assert!((1..=LIMIT).contains(&vectors));
        let masked = Entry {
            address: 0,
            data: 0,
            control: VECTOR_MASKED,
            pending: false,
        };
        let state = MsixState {
            entries: vec![masked; usize::from(vectors)],
            enabled: false,
            masked: false,
        };
        Msix {
            vm,
            complaint: Complaint::new("MSI-X"),
            state: Mutex::new(state),
            lines: Mutex::new(vec![Line::Unknown; usize::from(vectors)]),
        }
    }

    fn lock(&self) -> MutexGuard<'_, MsixState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn vectors(&self) -> u16 {
        self.lock().entries.len() as u16
    }

    /// True while the guest uses MSI-X and not the interrupt pin.
    pub fn enabled(&self) -> bool {
        self.lock().enabled
    }

    fn send(&self, messages: impl IntoIterator<Item = (u64, u32)>) {
        for (address, data) in messages {
            let sent = self.vm.signal_msi(address, data);
            self.complaint.about(
                format_args!("interrupt message {address:#x} {data:#x} not delivered"),
                sent,
            );
        }
    }

    /// Sends an unmasked vector's message.
    fn send_vector(&self, vector: u16, message: (u64, u32)) {
        match self.line(vector, message) {
            Some(line) => {
                // Full means that it is on its way already.
                let _ = rustix::io::write(line.event(), &1u64.to_ne_bytes());
            }
            None => self.send([message]),
        }
    }

    /// The line that sends a vector's message, which it is told where it is another than last time.
    fn line(&self, vector: u16, message: (u64, u32)) -> Option<Arc<dyn MessageLine>> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = lines.get_mut(usize::from(vector))?;
        let line = match slot {
            Line::Call => return None,
            Line::Kernel(line, known) if *known == message => return Some(line.clone()),
            Line::Kernel(line, _) => Ok(line.clone()),
            Line::Unknown => match self.vm.message_lines() {
                None => {
                    *slot = Line::Call;
                    return None;
                }
                Some(lines) => lines.open_line(),
            },
        };
        let ready = line.and_then(|line| {
            line.set_message(message.0, message.1)?;
            Ok(line)
        });
        match ready {
            Ok(line) => {
                *slot = Line::Kernel(line.clone(), message);
                Some(line)
            }
            Err(error) => {
                tracing::debug!("no interrupt line for a vector: {error}");
                *slot = Line::Call;
                None
            }
        }
    }

    /// Sends `vector`, or notes it as pending while it is masked. A vector there is none of is ignored.
    pub fn notify(&self, vector: u16) {
        let message = {
            let mut state = self.lock();
            let open = state.enabled && !state.masked;
            match state.entries.get_mut(usize::from(vector)) {
                Some(entry) if open && entry.control & VECTOR_MASKED == 0 => {
                    Some((entry.address, entry.data))
                }
                Some(entry) => {
                    entry.pending = true;
                    None
                }
                None => None,
            }
        };
        if let Some(message) = message {
            self.send_vector(vector, message);
        }
    }

    /// Takes the pending messages that may go now.
    fn release(state: &mut MsixState) -> Vec<(u64, u32)> {
        if !state.enabled || state.masked {
            return Vec::new();
        }
        state
            .entries
            .iter_mut()
            .filter(|entry| entry.pending && entry.control & VECTOR_MASKED == 0)
            .map(|entry| {
                entry.pending = false;
                (entry.address, entry.data)
            })
            .collect()
    }

    /// Message control, bits 15 (enable) and 14 (mask all), as the guest wrote it.
    pub(super) fn set_control(&self, control: u16) {
        let messages = {
            let mut state = self.lock();
            state.enabled = control & 0x8000 != 0;
            state.masked = control & 0x4000 != 0;
            Msix::release(&mut state)
        };
        self.send(messages);
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        // Four and eight bytes are what the specification allows; anything else reads as zeros.
        let word = |at: u64| -> u32 {
            if at >= PENDING_AT {
                let first = ((at - PENDING_AT) * 8) as usize;
                return (0..32)
                    .filter(|bit| {
                        state
                            .entries
                            .get(first + bit)
                            .is_some_and(|entry| entry.pending)
                    })
                    .fold(0, |word, bit| word | 1 << bit);
            }
            let Some(entry) = state.entries.get((at / 16) as usize) else {
                return 0;
            };
            match at % 16 {
                0 => entry.address as u32,
                4 => (entry.address >> 32) as u32,
                8 => entry.data,
                _ => entry.control,
            }
        };
        let value = match data.len() {
            4 if offset.is_multiple_of(4) => u64::from(word(offset)),
            8 if offset.is_multiple_of(8) => {
                u64::from(word(offset)) | u64::from(word(offset + 4)) << 32
            }
            _ => 0,
        };
        put(data, value);
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        let value = get(data);
        let messages = {
            let mut state = self.lock();
            let Some(entry) = state.entries.get_mut((offset / 16) as usize) else {
                return;
            };
            match (offset % 16, data.len()) {
                (0, 4) => entry.address = entry.address >> 32 << 32 | value & !3,
                (0, 8) => entry.address = value & !3,
                (4, 4) => entry.address = entry.address & 0xffff_ffff | value << 32,
                (8, 4) => entry.data = value as u32,
                (8, 8) => {
                    (entry.data, entry.control) =
                        (value as u32, (value >> 32) as u32 & VECTOR_MASKED)
                }
                (12, 4) => entry.control = value as u32 & VECTOR_MASKED,
                _ => {}
            }
            Msix::release(&mut state)
        };
        self.send(messages);
    }

    pub fn save(&self) -> MsixState {
        self.lock().clone()
    }

    /// False where the state is of a table of another size.
    pub fn restore(&self, state: MsixState) -> bool {
        let mut own = self.lock();
        let fits = state.entries.len() == own.entries.len();
        if fits {
            *own = state;
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::test_board::Recorder;

    #[test]
    fn a_masked_vector_waits_and_is_sent_once() {
        let vm = Arc::new(Recorder::default());
        let msix = Msix::new(vm.clone(), 4);
        msix.set_control(0x8000);
        msix.write(16, &0xfee0_1000u64.to_le_bytes());
        msix.write(24, &0x41u32.to_le_bytes());
        msix.notify(1);
        let mut pending = [0; 8];
        msix.read(PENDING_AT, &mut pending);
        assert_eq!(pending[0], 2);
        msix.write(28, &0u32.to_le_bytes());
        assert_eq!(*vm.messages.lock().unwrap(), [(0xfee0_1000, 0x41)]);
        msix.notify(1);
        msix.notify(9);
        assert_eq!(vm.messages.lock().unwrap().len(), 2);
    }

    proptest::proptest! {
        #[test]
        fn no_access_panics(accesses in proptest::collection::vec((0u64..BAR_LEN, 0u32..4, proptest::num::u64::ANY), 0..100)) {
            let msix = Msix::new(Arc::new(Recorder::default()), 3);
            for (offset, size, value) in accesses {
                let len = 1 << size;
                msix.write(offset, &value.to_le_bytes()[..len]);
                msix.read(offset, &mut [0; 8][..len]);
                msix.set_control(value as u16);
                msix.notify(value as u16);
            }
        }
    }
}
