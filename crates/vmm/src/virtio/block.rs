//! A block device (section 5.2): a queue and a thread per CPU, flush, discard, write zeroes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use disk::{Disk, DiskError};

use super::{Backend, Chain, QueueError, Queues, config_bytes};
use crate::memory::Dma;

const QUEUE_SIZE: u16 = 256;
const SECTOR: u64 = 512;
const HEADER: u64 = 16;
/// Bytes of one read or write; more is an error.
const TRANSFER_LIMIT: u64 = 4 << 20;
/// Segments of one request, less those of header and status.
const SEGMENT_LIMIT: u32 = QUEUE_SIZE as u32 - 2;
/// Ranges of one discard or write zeroes, and sectors of each.
const RANGE_LIMIT: u32 = 64;
const RANGE_SECTORS: u32 = 1 << 21;

const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const WRITE_CACHE: u64 = 1 << 11;
const MULTI_QUEUE: u64 = 1 << 12;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// See the module.
pub struct Block {
    disk: Arc<dyn Disk>,
    queues: u16,
    /// At most 20 bytes that name the disk to the guest.
    serial: String,
    /// The guest's choice: with it off, each write is flushed.
    write_back: AtomicBool,
}

impl Block {
    /// # Panics
    /// Never: `queues` is brought into 1..=64.
    pub fn new(disk: Arc<dyn Disk>, queues: u32, serial: impl Into<String>) -> Block {
        let queues = queues.clamp(1, 64) as u16;
        Block {
            disk,
            queues,
            serial: serial.into(),
            write_back: AtomicBool::new(true),
        }
    }

    /// Runs one request; the bytes it wrote (without the status) and its status.
    fn request(
        &self,
        chain: &Chain,
        dma: &Dma,
        buffer: &mut Vec<u8>,
    ) -> Result<(u32, u8), QueueError> {
        let mut header = [0; HEADER as usize];
        if chain.read(dma, 0, &mut header)? < header.len() || chain.writable_len() == 0 {
            return Ok((0, IO_ERROR));
        }
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = u64::from_le_bytes(header[8..16].try_into().unwrap_or_default());
        let room = chain.writable_len() - 1;
        let given = chain.readable_len() - HEADER;
        let offset = sector.checked_mul(SECTOR);
        let done = |result: Result<(), DiskError>| match result {
            Ok(()) => OK,
            Err(error) => {
                tracing::debug!("{error}");
                IO_ERROR
            }
        };
        let after_write = |status| match status {
            OK if !self.write_back.load(Ordering::Relaxed) => done(self.disk.flush()),
            status => status,
        };
        let outcome = match (kind, offset) {
            (0, Some(offset)) if room <= TRANSFER_LIMIT && room.is_multiple_of(SECTOR) => {
                buffer.resize(room as usize, 0);
                let status = done(self.disk.read_at(offset, buffer));
                if status == OK {
                    chain.write(dma, 0, buffer)?;
                }
                (room as u32, status)
            }
            (1, Some(offset)) if given <= TRANSFER_LIMIT && given.is_multiple_of(SECTOR) => {
                buffer.resize(given as usize, 0);
                chain.read(dma, HEADER, buffer)?;
                (0, after_write(done(self.disk.write_at(offset, buffer))))
            }
            (0 | 1, _) => (0, IO_ERROR),
            (4, _) => (0, done(self.disk.flush())),
            (8, _) => {
                let mut id = [0; 20];
                for (to, from) in id.iter_mut().zip(self.serial.bytes()) {
                    *to = from;
                }
                let len = id.len().min(room as usize);
                (chain.write(dma, 0, &id[..len])? as u32, OK)
            }
            (11 | 13, _) => {
                if !given.is_multiple_of(16) || given == 0 || given > u64::from(RANGE_LIMIT) * 16 {
                    return Ok((0, IO_ERROR));
                }
                buffer.resize(given as usize, 0);
                chain.read(dma, HEADER, buffer)?;
                let mut status = OK;
                for range in buffer.chunks_exact(16) {
                    let first = u64::from_le_bytes(range[..8].try_into().unwrap_or_default());
                    let sectors = u32::from_le_bytes(range[8..12].try_into().unwrap_or_default());
                    let (Some(offset), true) =
                        (first.checked_mul(SECTOR), sectors <= RANGE_SECTORS)
                    else {
                        status = IO_ERROR;
                        break;
                    };
                    let len = u64::from(sectors) * SECTOR;
                    let result = match kind {
                        11 => self.disk.discard(offset, len),
                        _ => self.disk.write_zeroes(offset, len),
                    };
                    status = done(result);
                    if status != OK {
                        break;
                    }
                }
                (0, after_write(status))
            }
            _ => (0, UNSUPPORTED),
        };
        Ok(outcome)
    }
}

impl Backend for Block {
    fn kind(&self) -> u16 {
        2
    }
    fn class(&self) -> u32 {
        0x01_0000
    }
    fn features(&self) -> u64 {
        let writable = if self.disk.read_only() {
            READ_ONLY
        } else {
            DISCARD | WRITE_ZEROES
        };
        SEG_MAX | FLUSH | WRITE_CACHE | MULTI_QUEUE | writable
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queues)]
    }
    fn threads(&self) -> Vec<Vec<usize>> {
        (0..usize::from(self.queues))
            .map(|queue| vec![queue])
            .collect()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0u8; 60];
        config[0..8].copy_from_slice(&(self.disk.len() / SECTOR).to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENT_LIMIT.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        config[32] = u8::from(self.write_back.load(Ordering::Relaxed));
        config[34..36].copy_from_slice(&self.queues.to_le_bytes());
        config[36..40].copy_from_slice(&RANGE_SECTORS.to_le_bytes());
        config[40..44].copy_from_slice(&RANGE_LIMIT.to_le_bytes());
        config[44..48].copy_from_slice(&8u32.to_le_bytes());
        config[48..52].copy_from_slice(&RANGE_SECTORS.to_le_bytes());
        config[52..56].copy_from_slice(&RANGE_LIMIT.to_le_bytes());
        // Zeroing may give the space back.
        config[56] = 1;
        config_bytes(&config, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if offset == 32
            && let Some(first) = data.first()
        {
            self.write_back.store(*first != 0, Ordering::Relaxed);
        }
    }

    fn serve(&self, index: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        let mut buffer = Vec::new();
        queues.with(index, |queue, dma| {
            while let Some(chain) = queue.pop(dma)? {
                let (written, status) = self.request(&chain, dma, &mut buffer)?;
                let last = chain.writable_len().saturating_sub(1);
                let marked = chain.write(dma, last, &[status])?;
                queue.push(dma, chain.head, written + marked as u32)?;
            }
            Ok(())
        })
    }

    fn reset(&self) {
        self.write_back.store(true, Ordering::Relaxed);
    }

    fn save(&self) -> serde_json::Value {
        serde_json::json!({ "bytes": self.disk.len(), "write_back": self.write_back.load(Ordering::Relaxed) })
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), String> {
        if state["bytes"] != self.disk.len() {
            return Err("its disk has another size".into());
        }
        self.write_back
            .store(state["write_back"] != false, Ordering::Relaxed);
        Ok(())
    }

    fn close(&self) {
        if let Err(error) = self.disk.flush() {
            tracing::warn!("{error}");
        }
    }
}
