//! I/O commands of the NVM command set (NVMe Base 1.4, section 6).

use std::io::ErrorKind;
use std::sync::Arc;

use disk::{Disk, DiskError, Way};
use vm_memory::VolatileSlice;

use super::command::io::{DATASET_MANAGEMENT, FLUSH, READ, WRITE, WRITE_ZEROES};
use super::command::{Answer, BROADCAST, Command, Status};
use super::{MAX_TRANSFER, Shared, prp};
use crate::carrier::Transfer;

const BLOCK: u64 = 512;
const FORCE_UNIT_ACCESS: u32 = 1 << 30;
const DEALLOCATE: u32 = 1 << 2;

/// The status for what the host's disk says.
pub(super) fn status_of(error: &DiskError, otherwise: Status) -> Status {
    match error {
        DiskError::Io { source, .. } => match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Status::CAPACITY,
            ErrorKind::ReadOnlyFilesystem => Status::WRITE_PROTECTED,
            _ => otherwise,
        },
        _ => otherwise,
    }
}

/// The disk of a command's namespace.
fn disk<'a>(shared: &'a Shared, command: &Command) -> Result<&'a Arc<dyn Disk>, Status> {
    command
        .namespace
        .checked_sub(1)
        .and_then(|index| shared.disks.get(index as usize))
        .ok_or(Status::INVALID_NAMESPACE)
}

/// Runs one on a thread that may wait.
pub(super) fn run(shared: &Shared, command: &Command) -> Answer {
    let result = if command.opcode == FLUSH && command.namespace == BROADCAST {
        shared.flush_all()
    } else {
        disk(shared, command).and_then(|disk| one(shared, &**disk, command))
    };
    result.err().unwrap_or(Status::SUCCESS).into()
}

/// Runs one that needs no wait for the disk: a read of what the host has in memory, a write to the host's cache. `None`
/// for any other.
pub(super) fn run_at_once(shared: &Shared, command: &Command) -> Option<Answer> {
    let result = match command.opcode {
        READ => disk(shared, command).and_then(|disk| {
            let (offset, pieces) = transfer(shared, &**disk, command)?;
            let slices = slices(shared, &pieces)?;
            let done = disk
                .try_read_volatile_at(offset, &slices)
                .map_err(|error| shared.failed(&error, Status::READ_ERROR))?;
            if done {
                told(shared, &pieces);
            }
            Ok(done)
        }),
        WRITE if command.words[2] & FORCE_UNIT_ACCESS == 0 => {
            disk(shared, command).and_then(|disk| {
                if disk.read_only() {
                    return Err(Status::WRITE_PROTECTED);
                }
                let (offset, pieces) = transfer(shared, &**disk, command)?;
                let slices = slices(shared, &pieces)?;
                let done = shared.pace.keep(|| {
                    // What goes wrong is said when it is done again.
                    let done = disk.try_write_volatile_at(offset, &slices);
                    Ok::<_, Status>(done.unwrap_or(false).then_some(()))
                })?;
                Ok(done.is_some())
            })
        }
        _ => return None,
    };
    match result {
        Ok(true) => Some(Answer::SUCCESS),
        Ok(false) => None,
        Err(status) => Some(status.into()),
    }
}

/// Lets the carrier do one that has to wait, whatever it is.
pub(super) fn carry(shared: &Arc<Shared>, queue: u16, command: Command) {
    let again = {
        let shared = shared.clone();
        move || shared.run(queue, &command)
    };
    let good = Some(Answer::SUCCESS);
    let way = match command.opcode {
        READ => Way::FromFile,
        WRITE if command.words[2] & FORCE_UNIT_ACCESS == 0 => Way::ToFile,
        FLUSH if queue != 0 && command.namespace != BROADCAST => {
            if let Ok(disk) = disk(shared, &command) {
                let token = (queue, command);
                shared
                    .carrier
                    .sync(&shared.dma, &**disk, token, good, again);
                return;
            }
            return shared.carrier.run((queue, command), again);
        }
        _ => return shared.carrier.run((queue, command), again),
    };
    // What is wrong with it is said where it is run.
    let found = match disk(shared, &command) {
        Ok(disk) if queue != 0 => {
            transfer(shared, &**disk, &command)
                .ok()
                .map(|(offset, pieces)| Transfer {
                    disk: disk.clone(),
                    way,
                    offset,
                    pieces: pieces
                        .into_iter()
                        .map(|(address, len)| (address, len as usize))
                        .collect(),
                })
        }
        _ => None,
    };
    match found {
        Some(transfer) => {
            let token = (queue, command);
            let carried = shared
                .carrier
                .carry(&shared.dma, transfer, token, good, again);
            if carried.is_err() {
                let status = Some(Status::DATA_TRANSFER.into());
                shared.carrier.run((queue, command), move || status);
            }
        }
        None => shared.carrier.run((queue, command), again),
    }
}

/// Offset on the disk and pieces of guest memory of a read or write.
fn transfer(
    shared: &Shared,
    disk: &dyn Disk,
    command: &Command,
) -> Result<(u64, Vec<(u64, u64)>), Status> {
    let (offset, len) = range(disk, command.first_block(), command.blocks())?;
    if len > MAX_TRANSFER {
        return Err(Status::INVALID_FIELD);
    }
    Ok((offset, prp::pieces(&shared.dma, command, len)?))
}

fn slices<'a>(shared: &'a Shared, pieces: &[(u64, u64)]) -> Result<Vec<VolatileSlice<'a>>, Status> {
    pieces
        .iter()
        .map(|(address, len)| shared.dma.slice(*address, *len as usize))
        .collect::<Result<_, _>>()
        .map_err(|_| Status::DATA_TRANSFER)
}

fn told(shared: &Shared, pieces: &[(u64, u64)]) {
    for (address, len) in pieces {
        shared.dma.written(*address, *len);
    }
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

fn one(shared: &Shared, disk: &dyn Disk, command: &Command) -> Result<(), Status> {
    let write_fault = |error: DiskError| shared.failed(&error, Status::WRITE_FAULT);
    let writes = matches!(command.opcode, WRITE | WRITE_ZEROES | DATASET_MANAGEMENT);
    if writes && disk.read_only() {
        return Err(Status::WRITE_PROTECTED);
    }
    match command.opcode {
        FLUSH => disk.flush().map_err(write_fault),
        READ => {
            let (offset, pieces) = transfer(shared, disk, command)?;
            let slices = slices(shared, &pieces)?;
            let result = disk.read_volatile_at(offset, &slices);
            told(shared, &pieces);
            result.map_err(|error| shared.failed(&error, Status::READ_ERROR))
        }
        WRITE => {
            let (offset, pieces) = transfer(shared, disk, command)?;
            disk.write_volatile_at(offset, &slices(shared, &pieces)?)
                .map_err(write_fault)?;
            if command.words[2] & FORCE_UNIT_ACCESS != 0 {
                disk.flush().map_err(write_fault)?;
            }
            Ok(())
        }
        WRITE_ZEROES => {
            let (offset, len) = range(disk, command.first_block(), command.blocks())?;
            disk.write_zeroes(offset, len).map_err(write_fault)?;
            if command.words[2] & FORCE_UNIT_ACCESS != 0 {
                disk.flush().map_err(write_fault)?;
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
                disk.discard(offset, len).map_err(write_fault)?;
            }
            Ok(())
        }
        _ => Err(Status::INVALID_OPCODE),
    }
}
