//! A block device (section 5.2): a queue and a thread per CPU, flush, discard, write zeroes.
//!
//! ```text
//!   queue thread: pop ─▶ the host has it in memory ───────────────────────────────▶ used ring
//!                    └─▶ the disk must be waited for ─▶ carrier ─▶ landed, event ─▶ used ring
//! ```
//!
//! Lock order: a queue, then its carrier.

mod request;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use disk::{Disk, DiskError, Way};

use self::request::{Operation, Outcome, Status, perform, try_read, try_write};
use super::queue::{Chain, Queue};
use super::{Backend, QueueError, Queues, config_bytes};
use crate::carrier::{Carrier, Pace, TELL_BYTES, TELL_COUNT, Transfer};
use crate::complaint::Complaint;
use crate::memory::Dma;
use crate::pool::{Pool, grow_on};

const QUEUE_SIZE: u16 = 256;
const SECTOR: u64 = 512;
/// Bytes of one read or write; more is an error.
const TRANSFER_LIMIT: u64 = 4 << 20;
/// Segments of one request, less those of header and status.
const SEGMENT_LIMIT: u32 = QUEUE_SIZE as u32 - 2;
/// Ranges of one discard or write zeroes, and sectors of each.
const RANGE_LIMIT: u32 = 64;
const RANGE_SECTORS: u32 = 1 << 21;
/// Batches begun in one go, so that a reset or a pause gets its turn.
const TURN: usize = 16;

const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const BLOCK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const TOPOLOGY: u64 = 1 << 10;
const WRITE_CACHE: u64 = 1 << 11;
const MULTI_QUEUE: u64 = 1 << 12;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;
/// Sectors of a physical block, as a power of two: 4 KiB, the host's page.
const PHYSICAL_SHIFT: u8 = 3;

/// Carries the requests of one queue.
type Requests = Carrier<Chain, Result<Outcome, QueueError>>;

/// See the module.
pub struct Block {
    disk: Arc<dyn Disk>,
    /// One for each queue. Before the pool, which they use.
    requests: Vec<Requests>,
    pool: Arc<Pool>,
    pace: Pace,
    /// At most 20 bytes that name the disk to the guest.
    serial: String,
    complaint: Arc<Complaint>,
    /// The guest's choice: with it off, each write is flushed.
    write_back: AtomicBool,
}

impl Block {
    /// A device with as many queues as `queues` says, between 1 and 64.
    ///
    /// # Errors
    /// Where the host gives no threads or events.
    pub fn new(
        disk: Arc<dyn Disk>,
        queues: u32,
        serial: impl Into<String>,
    ) -> std::io::Result<Block> {
        let serial = serial.into();
        let pool = Arc::new(Pool::new(&serial)?);
        let requests = (0..queues.clamp(1, 64))
            .map(|_| Carrier::new(pool.clone()))
            .collect::<std::io::Result<_>>()?;
        Ok(Block {
            disk,
            requests,
            pool,
            pace: Pace::default(),
            complaint: Arc::new(Complaint::new(serial.clone())),
            serial,
            write_back: AtomicBool::new(true),
        })
    }

    /// Makes the disk larger; its transport must then tell of the changed configuration.
    ///
    /// # Errors
    /// For people: why it cannot be.
    pub fn grow(&self, size: u64) -> Result<(), String> {
        grow_on(&self.pool, self.disk.clone(), size)
    }

    /// Runs a request at once, or lets it be carried; bytes of one that is done.
    fn begin(
        &self,
        index: usize,
        chain: Chain,
        queue: &mut Queue,
        dma: &Dma,
    ) -> Result<u64, QueueError> {
        let operation = Operation::of(&chain, dma)?;
        let write_back = self.write_back.load(Ordering::Relaxed);
        let complain = |error: &DiskError| self.complaint.make(error);
        let outcome = match operation {
            Operation::Read { offset } => try_read(&*self.disk, offset, &chain, dma, &complain)?,
            Operation::Write { offset } if write_back => self
                .pace
                .keep(|| try_write(&*self.disk, offset, &chain, dma))?,
            Operation::Name | Operation::Refused(_) => Some(perform(
                &*self.disk,
                operation,
                &chain,
                dma,
                &self.serial,
                write_back,
                &complain,
            )?),
            _ => None,
        };
        if let Some(outcome) = outcome {
            finish(&chain, outcome, queue, dma)?;
            return Ok(chain.readable_len() + chain.writable_len());
        }
        self.carry(index, chain, operation, dma, write_back)?;
        Ok(0)
    }

    /// Begins as many requests as the guest is told of together; whether there may be more.
    fn begin_some(&self, index: usize, queue: &mut Queue, dma: &Dma) -> Result<bool, QueueError> {
        let (mut count, mut bytes) = (0, 0);
        while count < TELL_COUNT && bytes < TELL_BYTES {
            let Some(chain) = queue.pop(dma)? else {
                return Ok(false);
            };
            bytes += self.begin(index, chain, queue, dma)?;
            count += 1;
        }
        Ok(true)
    }

    fn carry(
        &self,
        index: usize,
        chain: Chain,
        operation: Operation,
        dma: &Dma,
        write_back: bool,
    ) -> Result<(), QueueError> {
        let requests = &self.requests[index];
        let again = {
            let (disk, dma) = (self.disk.clone(), dma.clone());
            let (chain, complaint) = (chain.clone(), self.complaint.clone());
            move || {
                let complain = |error: &DiskError| complaint.make(error);
                perform(&*disk, operation, &chain, &dma, "", write_back, &complain)
            }
        };
        let transfer = |way, offset, pieces| Transfer {
            disk: self.disk.clone(),
            way,
            offset,
            pieces,
        };
        match operation {
            Operation::Read { offset } => {
                let pieces = request::room(&chain);
                let good = Ok((chain.writable_len() as u32 - 1, Status::Ok));
                let transfer = transfer(Way::FromFile, offset, pieces);
                requests.carry(dma, transfer, chain, good, again)?;
            }
            Operation::Write { offset } if write_back => {
                let transfer = transfer(Way::ToFile, offset, request::given(&chain));
                requests.carry(dma, transfer, chain, Ok((0, Status::Ok)), again)?;
            }
            Operation::Flush => {
                requests.sync(dma, &*self.disk, chain, Ok((0, Status::Ok)), again);
            }
            _ => requests.run(chain, again),
        }
        Ok(())
    }

    /// Gives back what has landed.
    fn land(&self, index: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        queues.with(index, |queue, dma| {
            let landed = self.requests[index].landed();
            if !queue.enabled {
                return Ok(());
            }
            landed
                .into_iter()
                .try_for_each(|(chain, outcome)| finish(&chain, outcome?, queue, dma))
        })
    }

    /// Waits for all that is under way.
    fn settle(&self) {
        self.requests.iter().for_each(Requests::drain);
    }
}

/// Writes a request's status and gives its chain back.
fn finish(
    chain: &Chain,
    (written, status): Outcome,
    queue: &mut Queue,
    dma: &Dma,
) -> Result<(), QueueError> {
    let last = chain.writable_len().saturating_sub(1);
    let marked = chain.write(dma, last, &[status as u8])?;
    queue.push(dma, chain.head, written + marked as u32)
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
        SEG_MAX | BLOCK_SIZE | TOPOLOGY | FLUSH | WRITE_CACHE | MULTI_QUEUE | writable
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.requests.len()]
    }
    fn threads(&self) -> Vec<Vec<usize>> {
        (0..self.requests.len()).map(|queue| vec![queue]).collect()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0u8; 60];
        config[0..8].copy_from_slice(&(self.disk.len() / SECTOR).to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENT_LIMIT.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        config[24] = PHYSICAL_SHIFT;
        config[32] = u8::from(self.write_back.load(Ordering::Relaxed));
        config[34..36].copy_from_slice(&(self.requests.len() as u16).to_le_bytes());
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
        for _ in 0..TURN {
            let more = queues.with(index, |queue, dma| {
                let begun = self.begin_some(index, queue, dma);
                // Those that were begun before an error too.
                self.requests[index].submit();
                begun
            })?;
            if !more {
                return Ok(());
            }
            // The guest works on these while the next are done.
            queues.tell(index);
        }
        queues.again(index);
        Ok(())
    }

    fn is_brisk(&self) -> bool {
        true
    }

    fn event_source(&self, thread: usize) -> Option<BorrowedFd<'_>> {
        Some(self.requests[thread].event())
    }

    fn serve_event(&self, thread: usize, queues: &Queues<'_>) -> Result<(), QueueError> {
        self.land(thread, queues)
    }

    fn drain(&self, queues: &Queues<'_>) -> Result<(), QueueError> {
        self.settle();
        (0..self.requests.len()).try_for_each(|index| self.land(index, queues))
    }

    fn reset(&self) {
        // What is under way still fills the guest's memory: the reset is over when that is.
        self.settle();
        for requests in &self.requests {
            drop(requests.landed());
        }
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
        self.settle();
        self.pool.close();
        if let Err(error) = self.disk.flush() {
            tracing::warn!("{error}");
        }
    }
}
