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

/// Where a read or write goes: offset on the disk, pieces of guest memory.
pub(super) type Found = (u64, prp::Pieces);

/// What was done of a command without waiting.
pub(super) enum Begun {
    Done(Option<Answer>),
    /// It has to wait for the disk; where it goes is known of reads and writes.
    Waits(Option<Found>),
}

/// Runs one that needs no wait for the disk: a read of what the host has in memory, a write to the host's cache.
pub(super) fn run_at_once(shared: &Shared, command: &Command) -> Begun {
    let begun = match command.opcode {
        READ => disk(shared, command).and_then(|disk| begin_read(shared, &**disk, command)),
        WRITE if command.words[2] & FORCE_UNIT_ACCESS == 0 => {
            disk(shared, command).and_then(|disk| begin_write(shared, &**disk, command))
        }
        _ => return Begun::Waits(None),
    };
    match begun {
        Ok(None) => Begun::Done(Some(Answer::SUCCESS)),
        Ok(found) => Begun::Waits(found),
        Err(status) => Begun::Done(Some(status.into())),
    }
}

/// `None` where it is done.
fn begin_read(
    shared: &Shared,
    disk: &dyn Disk,
    command: &Command,
) -> Result<Option<Found>, Status> {
    let (offset, pieces) = transfer(shared, disk, command)?;
    let slices = slices(shared, &pieces)?;
    let done = disk
        .try_read_volatile_at(offset, &slices)
        .map_err(|error| shared.failed(&error, Status::READ_ERROR))?;
    if done {
        told(shared, &pieces);
        return Ok(None);
    }
    Ok(Some((offset, pieces)))
}

/// `None` where it is done.
fn begin_write(
    shared: &Shared,
    disk: &dyn Disk,
    command: &Command,
) -> Result<Option<Found>, Status> {
    if disk.read_only() {
        return Err(Status::WRITE_PROTECTED);
    }
    let (offset, pieces) = transfer(shared, disk, command)?;
    let slices = slices(shared, &pieces)?;
    let done = shared.pace.keep(|| {
        // What goes wrong is said when it is done again.
        let done = disk.try_write_volatile_at(offset, &slices);
        Ok::<_, Status>(done.unwrap_or(false).then_some(()))
    })?;
    Ok(done.is_none().then_some((offset, pieces)))
}

/// Lets the carrier do one that has to wait, whatever it is.
pub(super) fn carry(shared: &Arc<Shared>, queue: u16, command: Command, found: Option<Found>) {
    let again = {
        let shared = shared.clone();
        move || shared.run(queue, &command)
    };
    let (carrier, dma) = (&shared.carrier, &shared.dma);
    let (token, good) = ((queue, command), Some(Answer::SUCCESS));
    match (disk(shared, &command), found) {
        (Ok(disk), Some((offset, pieces))) => {
            let transfer = Transfer {
                disk: disk.clone(),
                way: match command.opcode {
                    READ => Way::FromFile,
                    _ => Way::ToFile,
                },
                offset,
                pieces,
            };
            if carrier.carry(dma, transfer, token, good, again).is_err() {
                let status = Some(Status::DATA_TRANSFER.into());
                carrier.run(token, move || status);
            }
        }
        (Ok(disk), None) if queue != 0 && command.opcode == FLUSH => {
            carrier.sync(dma, &**disk, token, good, again);
        }
        // What is wrong with it is said where it is run.
        _ => carrier.run(token, again),
    }
}

/// Offset on the disk and pieces of guest memory of a read or write.
fn transfer(shared: &Shared, disk: &dyn Disk, command: &Command) -> Result<Found, Status> {
    let (offset, len) = range(disk, command.first_block(), command.blocks())?;
    if len > MAX_TRANSFER {
        return Err(Status::INVALID_FIELD);
    }
    Ok((offset, prp::pieces(&shared.dma, command, len)?))
}

fn slices<'a>(
    shared: &'a Shared,
    pieces: &[(u64, usize)],
) -> Result<Vec<VolatileSlice<'a>>, Status> {
    shared.dma.slices(pieces).map_err(|_| Status::DATA_TRANSFER)
}

fn told(shared: &Shared, pieces: &[(u64, usize)]) {
    for (address, len) in pieces {
        shared.dma.written(*address, *len as u64);
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
