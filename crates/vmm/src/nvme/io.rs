//! I/O commands of the NVM command set (NVMe Base 1.4, section 6).

use std::io::ErrorKind;

use disk::{Disk, DiskError};

use super::command::{Answer, BROADCAST, Command, Status};
use super::{MAX_TRANSFER, Shared, prp};

const FLUSH: u8 = 0x00;
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;
const WRITE_ZEROES: u8 = 0x08;
const DATASET_MANAGEMENT: u8 = 0x09;

const BLOCK: u64 = 512;
const FORCE_UNIT_ACCESS: u32 = 1 << 30;
const DEALLOCATE: u32 = 1 << 2;

fn failed(error: &DiskError, otherwise: Status) -> Status {
    match error {
        DiskError::Io { source, .. } => match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Status::CAPACITY,
            ErrorKind::ReadOnlyFilesystem => Status::WRITE_PROTECTED,
            _ => otherwise,
        },
        _ => otherwise,
    }
}

/// Runs one on a worker's thread; `buffer` is the worker's own.
pub(super) fn run(shared: &Shared, command: &Command, buffer: &mut Vec<u8>) -> Answer {
    let result = if command.opcode == FLUSH && command.namespace == BROADCAST {
        shared.flush_all()
    } else {
        match command
            .namespace
            .checked_sub(1)
            .and_then(|index| shared.disks.get(index as usize))
        {
            Some(disk) => one(shared, &**disk, command, buffer),
            None => Err(Status::INVALID_NAMESPACE),
        }
    };
    result.err().unwrap_or(Status::SUCCESS).into()
}

/// Offset and length in bytes, where the disk has them.
fn range(disk: &dyn Disk, first: u64, blocks: u64) -> Result<(u64, u64), Status> {
    let offset = first.checked_mul(BLOCK).ok_or(Status::OUT_OF_RANGE)?;
    let len = blocks.checked_mul(BLOCK).ok_or(Status::OUT_OF_RANGE)?;
    let end = offset.checked_add(len).ok_or(Status::OUT_OF_RANGE)?;
    if end <= disk.len() / BLOCK * BLOCK {
        Ok((offset, len))
    } else {
        Err(Status::OUT_OF_RANGE)
    }
}

fn one(
    shared: &Shared,
    disk: &dyn Disk,
    command: &Command,
    buffer: &mut Vec<u8>,
) -> Result<(), Status> {
    match command.opcode {
        FLUSH => disk
            .flush()
            .map_err(|error| failed(&error, Status::WRITE_FAULT)),
        READ | WRITE => {
            let (offset, len) = range(disk, command.first_block(), command.blocks())?;
            if len > MAX_TRANSFER {
                return Err(Status::INVALID_FIELD);
            }
            let pieces = prp::pieces(&shared.dma, command, len)?;
            if buffer.len() < len as usize {
                buffer.resize(len as usize, 0);
            }
            let data = &mut buffer[..len as usize];
            if command.opcode == READ {
                disk.read_at(offset, data)
                    .map_err(|error| failed(&error, Status::READ_ERROR))?;
                return prp::scatter(&shared.dma, &pieces, data);
            }
            if disk.read_only() {
                return Err(Status::WRITE_PROTECTED);
            }
            prp::gather(&shared.dma, &pieces, data)?;
            disk.write_at(offset, data)
                .map_err(|error| failed(&error, Status::WRITE_FAULT))?;
            if command.words[2] & FORCE_UNIT_ACCESS != 0 {
                disk.flush()
                    .map_err(|error| failed(&error, Status::WRITE_FAULT))?;
            }
            Ok(())
        }
        WRITE_ZEROES => {
            let (offset, len) = range(disk, command.first_block(), command.blocks())?;
            disk.write_zeroes(offset, len)
                .map_err(|error| failed(&error, Status::WRITE_FAULT))?;
            if command.words[2] & FORCE_UNIT_ACCESS != 0 {
                disk.flush()
                    .map_err(|error| failed(&error, Status::WRITE_FAULT))?;
            }
            Ok(())
        }
        DATASET_MANAGEMENT => {
            let count = u64::from(command.words[0] & 0xff) + 1;
            let mut list = vec![0; count as usize * 16];
            let pieces = prp::pieces(&shared.dma, command, count * 16)?;
            prp::gather(&shared.dma, &pieces, &mut list)?;
            if command.words[1] & DEALLOCATE == 0 {
                return Ok(());
            }
            for entry in list.chunks_exact(16) {
                let blocks = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
                let first = u64::from_le_bytes(entry[8..16].try_into().unwrap_or_default());
                let (offset, len) = range(disk, first, u64::from(blocks))?;
                disk.discard(offset, len)
                    .map_err(|error| failed(&error, Status::WRITE_FAULT))?;
            }
            Ok(())
        }
        _ => Err(Status::INVALID_OPCODE),
    }
}
