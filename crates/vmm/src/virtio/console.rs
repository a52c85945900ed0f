//! A console with one port (section 5.3).

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::{Backend, QueueError, Queues, config_bytes};

const INPUT: usize = 0;
const OUTPUT: usize = 1;
const INPUT_LIMIT: usize = 64 * 1024;
const CHUNK: usize = 64 * 1024;
const SIZE: u64 = 1;

/// See the module.
pub struct Console {
    sink: Mutex<Box<dyn Write + Send>>,
    input: Mutex<VecDeque<u8>>,
    /// Columns and rows.
    size: Mutex<(u16, u16)>,
    event: OwnedFd,
}

impl Console {
    /// A console whose output goes to `sink`.
    ///
    /// # Errors
    /// Where the host gives no event.
    pub fn new(sink: Box<dyn Write + Send>) -> std::io::Result<Console> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Console {
            sink: Mutex::new(sink),
            input: Mutex::default(),
            size: Mutex::new((80, 24)),
            event,
        })
    }

    fn input(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Input from outside; what has no room is dropped.
    pub fn receive(&self, bytes: &[u8]) {
        let mut input = self.input();
        let room = INPUT_LIMIT.saturating_sub(input.len());
        input.extend(&bytes[..bytes.len().min(room)]);
        drop(input);
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Sets columns and rows; the transport must then tell of the changed configuration.
    pub fn resize(&self, columns: u16, rows: u16) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = (columns, rows);
    }

    fn give(&self, queues: &Queues<'_>) -> Result<(), QueueError> {
        queues.with(INPUT, |queue, dma| {
            let mut input = self.input();
            while !input.is_empty() {
                let Some(chain) = queue.pop(dma)? else {
                    return Ok(());
                };
                let len = input
                    .len()
                    .min(chain.writable_len().min(CHUNK as u64) as usize);
                let bytes: Vec<u8> = input.drain(..len).collect();
                let written = chain.write(dma, 0, &bytes)?;
                queue.push(dma, chain.head, written as u32)?;
            }
            Ok(())
        })
    }
}

impl Backend for Console {
    fn kind(&self) -> u16 {
        3
    }
    fn class(&self) -> u32 {
        0x07_8000
    }
    fn features(&self) -> u64 {
        SIZE
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![64; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = *self.size.lock().unwrap_or_else(PoisonError::into_inner);
        let mut config = [0u8; 12];
        config[..2].copy_from_slice(&columns.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        config[4] = 1;
        config_bytes(&config, offset, data);
    }

    fn serve(&self, index: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        if index != OUTPUT {
            return self.give(queues);
        }
        queues.with(OUTPUT, |queue, dma| {
            let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
            let mut bytes = Vec::new();
            while let Some(chain) = queue.pop(dma)? {
                let mut at = 0;
                while at < chain.readable_len() {
                    bytes.resize((chain.readable_len() - at).min(CHUNK as u64) as usize, 0);
                    let len = chain.read(dma, at, &mut bytes)?;
                    // A reader that is gone takes no output; the guest goes on.
                    let _ = sink.write_all(&bytes[..len]);
                    at += len as u64;
                }
                let _ = sink.flush();
                queue.push(dma, chain.head, 0)?;
            }
            Ok(())
        })
    }

    fn event_source(&self, _: usize) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }

    fn serve_event(&self, _: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        self.give(queues)
    }

    fn save(&self) -> serde_json::Value {
        serde_json::json!({ "input": Vec::from(self.input().clone()) })
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), String> {
        let input: VecDeque<u8> =
            serde_json::from_value(state["input"].clone()).map_err(|error| error.to_string())?;
        if input.len() > INPUT_LIMIT {
            return Err("more input than a console holds".into());
        }
        *self.input() = input;
        Ok(())
    }
}
