//! One request of a block device (5.2.6): header, data, status.

use disk::{Disk, DiskError};

use super::{RANGE_LIMIT, RANGE_SECTORS, SECTOR, TRANSFER_LIMIT};
use crate::memory::Dma;
use crate::virtio::QueueError;
use crate::virtio::queue::{Chain, pieces};

const HEADER: u64 = 16;
/// Bytes of the name of a disk.
const ID: usize = 20;
/// Bytes of one range of a discard or write zeroes.
const RANGE: usize = 16;
const UNMAP: u32 = 1;

/// The status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What a request wants of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Read {
        offset: u64,
    },
    Write {
        offset: u64,
    },
    Flush,
    Name,
    Discard,
    WriteZeroes,
    /// It has its answer already.
    Refused(Status),
}

impl Operation {
    /// Reads a request's header; a chain without one, or without room for a status, is refused.
    pub fn of(chain: &Chain, dma: &Dma) -> Result<Operation, QueueError> {
        let mut header = [0; HEADER as usize];
        if chain.read(dma, 0, &mut header)? < header.len() || chain.writable_len() == 0 {
            return Ok(Operation::Refused(Status::IoError));
        }
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = u64::from_le_bytes(header[8..16].try_into().unwrap_or_default());
        let fits = |len: u64| len <= TRANSFER_LIMIT && len.is_multiple_of(SECTOR);
        let room = chain.writable_len() - 1;
        let given = chain.readable_len() - HEADER;
        Ok(match (kind, sector.checked_mul(SECTOR)) {
            (0, Some(offset)) if fits(room) => Operation::Read { offset },
            (1, Some(offset)) if fits(given) => Operation::Write { offset },
            (0 | 1, _) => Operation::Refused(Status::IoError),
            (4, _) => Operation::Flush,
            (8, _) => Operation::Name,
            (11, _) => Operation::Discard,
            (13, _) => Operation::WriteZeroes,
            _ => Operation::Refused(Status::Unsupported),
        })
    }
}

/// Where the data of a read goes.
pub fn room(chain: &Chain) -> Vec<(u64, usize)> {
    let len = chain.writable_len().saturating_sub(1);
    pieces(&chain.writable, 0, len as usize)
}

/// Where the data of a write lies.
pub fn given(chain: &Chain) -> Vec<(u64, usize)> {
    let len = chain.readable_len().saturating_sub(HEADER);
    pieces(&chain.readable, HEADER, len as usize)
}

/// What a request came to: bytes written into the chain, without the status, and the status.
pub type Outcome = (u32, Status);

fn done(result: Result<(), DiskError>, complain: &dyn Fn(&DiskError)) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(error) => {
            complain(&error);
            Status::IoError
        }
    }
}

/// Reads what the host has in memory; `None` where the disk would have to be waited for.
pub fn try_read(
    disk: &dyn Disk,
    offset: u64,
    chain: &Chain,
    dma: &Dma,
    complain: &dyn Fn(&DiskError),
) -> Result<Option<Outcome>, QueueError> {
    let room = chain.writable_len() - 1;
    let parts = self::room(chain);
    match disk.try_read_volatile_at(offset, &dma.slices(&parts)?) {
        Ok(true) => {
            told(dma, &parts);
            Ok(Some((room as u32, Status::Ok)))
        }
        Ok(false) => Ok(None),
        Err(error) => {
            complain(&error);
            Ok(Some((0, Status::IoError)))
        }
    }
}

/// Writes to the host's cache; `None` where more is to be done than that. What goes wrong is said when it is done again.
pub fn try_write(
    disk: &dyn Disk,
    offset: u64,
    chain: &Chain,
    dma: &Dma,
) -> Result<Option<Outcome>, QueueError> {
    let slices = dma.slices(&given(chain))?;
    Ok(match disk.try_write_volatile_at(offset, &slices) {
        Ok(true) => Some((0, Status::Ok)),
        Ok(false) | Err(_) => None,
    })
}

fn told(dma: &Dma, parts: &[(u64, usize)]) {
    for (address, len) in parts {
        dma.written(*address, *len as u64);
    }
}

/// Runs one request to its end.
pub fn perform(
    disk: &dyn Disk,
    operation: Operation,
    chain: &Chain,
    dma: &Dma,
    serial: &str,
    write_back: bool,
    complain: &dyn Fn(&DiskError),
) -> Result<Outcome, QueueError> {
    let room = chain.writable_len().saturating_sub(1);
    let given = chain.readable_len().saturating_sub(HEADER);
    let after_write = |status| match status {
        Status::Ok if !write_back => done(disk.flush(), complain),
        status => status,
    };
    Ok(match operation {
        Operation::Read { offset } => {
            let parts = self::room(chain);
            let status = done(
                disk.read_volatile_at(offset, &dma.slices(&parts)?),
                complain,
            );
            told(dma, &parts);
            (if status == Status::Ok { room as u32 } else { 0 }, status)
        }
        Operation::Write { offset } => {
            let written = disk.write_volatile_at(offset, &dma.slices(&self::given(chain))?);
            (0, after_write(done(written, complain)))
        }
        Operation::Flush => (0, done(disk.flush(), complain)),
        Operation::Name => {
            let mut id = [0; ID];
            for (to, from) in id.iter_mut().zip(serial.bytes()) {
                *to = from;
            }
            let len = id.len().min(room as usize);
            (chain.write(dma, 0, &id[..len])? as u32, Status::Ok)
        }
        Operation::Discard | Operation::WriteZeroes => {
            if !given.is_multiple_of(RANGE as u64)
                || given == 0
                || given > u64::from(RANGE_LIMIT) * RANGE as u64
            {
                return Ok((0, Status::IoError));
            }
            let mut list = vec![0; given as usize];
            chain.read(dma, HEADER, &mut list)?;
            let status = list
                .chunks_exact(RANGE)
                .map(|range| one_range(disk, operation, range, complain))
                .find(|status| *status != Status::Ok)
                .unwrap_or(Status::Ok);
            (0, after_write(status))
        }
        Operation::Refused(status) => (0, status),
    })
}

/// One range of a discard or write zeroes: first sector, number of sectors, flags.
fn one_range(
    disk: &dyn Disk,
    operation: Operation,
    range: &[u8],
    complain: &dyn Fn(&DiskError),
) -> Status {
    let first = u64::from_le_bytes(range[..8].try_into().unwrap_or_default());
    let sectors = u32::from_le_bytes(range[8..12].try_into().unwrap_or_default());
    let flags = u32::from_le_bytes(range[12..16].try_into().unwrap_or_default());
    // Only zeroing knows a flag (5.2.6.2).
    let known = if operation == Operation::Discard {
        0
    } else {
        UNMAP
    };
    if flags & !known != 0 {
        return Status::Unsupported;
    }
    let (Some(offset), true) = (first.checked_mul(SECTOR), sectors <= RANGE_SECTORS) else {
        return Status::IoError;
    };
    let len = u64::from(sectors) * SECTOR;
    done(
        match operation {
            Operation::Discard => disk.discard(offset, len),
            _ => disk.write_zeroes(offset, len),
        },
        complain,
    )
}
