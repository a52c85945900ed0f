//! Log pages (NVMe Base 1.4, 5.14.1): errors, health, firmware, changed namespaces, commands and their effects.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::command::{Command, Status, admin, io};

/// Errors that are kept, the newest first.
pub const ERRORS: usize = 16;
const ERROR_LEN: usize = 64;
/// The page of changed namespaces.
pub const CHANGED_NAMESPACES: u32 = 4;

/// An entry of the error log (figure 94).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorEntry {
    pub count: u64,
    pub queue: u16,
    pub command: u16,
    pub status: Status,
    pub first_block: u64,
    pub namespace: u32,
}

/// What the log pages tell of.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Log {
    errors: VecDeque<ErrorEntry>,
    /// Errors since the controller was made.
    error_count: u64,
    /// Commands, and blocks of 512 bytes.
    reads: u64,
    writes: u64,
    blocks_read: u64,
    blocks_written: u64,
    /// Namespaces that changed and that the guest has not read of, ascending.
    #[serde(default)]
    changed: Vec<u32>,
    /// The guest was told that there are such.
    #[serde(default)]
    told_of_changes: bool,
}

impl Log {
    /// Notes how a command ended.
    pub fn note(&mut self, queue: u16, command: &Command, status: Status) {
        if status != Status::SUCCESS {
            self.error_count += 1;
            self.errors.truncate(ERRORS - 1);
            self.errors.push_front(ErrorEntry {
                count: self.error_count,
                queue,
                command: command.id,
                status,
                first_block: if queue == 0 { 0 } else { command.first_block() },
                namespace: command.namespace,
            });
        } else if queue != 0 && command.opcode == io::READ {
            self.reads += 1;
            self.blocks_read += command.blocks();
        } else if queue != 0 && command.opcode == io::WRITE {
            self.writes += 1;
            self.blocks_written += command.blocks();
        }
    }

    /// Notes that a namespace changed.
    pub fn note_change(&mut self, namespace: u32) {
        if let Err(place) = self.changed.binary_search(&namespace) {
            self.changed.insert(place, namespace);
        }
    }

    /// True once for every time that there are changes of which the guest has not heard (5.2: an event is not told again
    /// until its log page was read).
    pub fn tell_of_changes(&mut self) -> bool {
        !self.changed.is_empty() && !std::mem::replace(&mut self.told_of_changes, true)
    }

    /// The guest has read of the changes.
    pub fn clear_changes(&mut self) {
        self.changed.clear();
        self.told_of_changes = false;
    }

    /// True where a saved log is one that could have been kept.
    pub fn is_sound(&self) -> bool {
        self.errors.len() <= ERRORS && self.changed.len() <= 1024
    }

    /// The page of a number, where there is one.
    pub fn page(&self, number: u32) -> Option<Vec<u8>> {
        Some(match number {
            1 => self.errors(),
            2 => self.health(),
            3 => firmware(),
            CHANGED_NAMESPACES => self.changes(),
            5 => effects(),
            _ => return None,
        })
    }

    fn errors(&self) -> Vec<u8> {
        let mut page = vec![0u8; ERRORS * ERROR_LEN];
        for (entry, data) in self.errors.iter().zip(page.chunks_exact_mut(ERROR_LEN)) {
            data[0..8].copy_from_slice(&entry.count.to_le_bytes());
            data[8..10].copy_from_slice(&entry.queue.to_le_bytes());
            data[10..12].copy_from_slice(&entry.command.to_le_bytes());
            data[12..14].copy_from_slice(&(entry.status.0 << 1).to_le_bytes());
            // Which field was wrong is not told.
            data[14..16].copy_from_slice(&u16::MAX.to_le_bytes());
            data[16..24].copy_from_slice(&entry.first_block.to_le_bytes());
            data[24..28].copy_from_slice(&entry.namespace.to_le_bytes());
        }
        page
    }

    /// Namespaces whose identify data changed (5.14.1.4).
    fn changes(&self) -> Vec<u8> {
        let mut page = vec![0u8; 4096];
        for (namespace, slot) in self.changed.iter().zip(page.chunks_exact_mut(4)) {
            slot.copy_from_slice(&namespace.to_le_bytes());
        }
        page
    }

    fn health(&self) -> Vec<u8> {
        let mut page = vec![0u8; 512];
        // Kelvin; spare capacity and its threshold in percent.
        page[1..3].copy_from_slice(&300u16.to_le_bytes());
        page[3] = 100;
        page[4] = 10;
        // Data units are thousands of blocks, rounded up.
        for (at, value) in [
            (32, self.blocks_read.div_ceil(1000)),
            (48, self.blocks_written.div_ceil(1000)),
            (64, self.reads),
            (80, self.writes),
            (176, self.error_count),
        ] {
            page[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        page
    }
}

fn firmware() -> Vec<u8> {
    let mut page = vec![0u8; 512];
    page[0] = 1;
    page[8..16].copy_from_slice(b"1       ");
    page
}

/// Supported, and whether it changes blocks.
fn effects() -> Vec<u8> {
    const SUPPORTED: u32 = 1;
    const CHANGES: u32 = 1 << 1;
    let mut page = vec![0u8; 4096];
    let mut put = |at: usize, value: u32| {
        page[at * 4..at * 4 + 4].copy_from_slice(&value.to_le_bytes());
    };
    for opcode in admin::ALL {
        let changes = if opcode == admin::FORMAT { CHANGES } else { 0 };
        put(usize::from(opcode), SUPPORTED | changes);
    }
    for opcode in io::ALL {
        let changes = match opcode {
            io::WRITE | io::WRITE_ZEROES | io::DATASET_MANAGEMENT => CHANGES,
            _ => 0,
        };
        put(256 + usize::from(opcode), SUPPORTED | changes);
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_error_comes_first_and_old_ones_go() {
        let mut log = Log::default();
        let command = Command::parse(&[9; 64]);
        for _ in 0..ERRORS + 3 {
            log.note(1, &command, Status::OUT_OF_RANGE);
        }
        log.note(1, &command, Status::SUCCESS);
        let page = log.page(1).unwrap();
        assert_eq!(page.len(), ERRORS * ERROR_LEN);
        assert_eq!(page[0], ERRORS as u8 + 3);
        assert_eq!(
            u16::from_le_bytes([page[12], page[13]]),
            Status::OUT_OF_RANGE.0 << 1
        );
        assert_eq!(page[(ERRORS - 1) * ERROR_LEN], 4);
        assert_eq!(log.page(2).unwrap()[176], ERRORS as u8 + 3);
        assert_eq!(log.page(6), None);
    }
}
