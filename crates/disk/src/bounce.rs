//! A guest's memory by way of a buffer of our own, for disks that cannot move the bytes straight.

use vm_memory::VolatileSlice;

use crate::{DiskError, total};

fn buffer(buffers: &[VolatileSlice<'_>]) -> Vec<u8> {
    vec![0; total(buffers) as usize]
}

/// Fills `buffers`, in order, with what `read` gives.
pub(crate) fn read(
    buffers: &[VolatileSlice<'_>],
    read: impl FnOnce(&mut [u8]) -> Result<(), DiskError>,
) -> Result<(), DiskError> {
    let mut data = buffer(buffers);
    read(&mut data)?;
    let mut rest = &data[..];
    for buffer in buffers {
        let (now, later) = rest.split_at(buffer.len());
        buffer.copy_from(now);
        rest = later;
    }
    Ok(())
}

/// Hands what `buffers` hold to `write`.
pub(crate) fn write(
    buffers: &[VolatileSlice<'_>],
    write: impl FnOnce(&[u8]) -> Result<(), DiskError>,
) -> Result<(), DiskError> {
    let mut data = buffer(buffers);
    let mut rest = &mut data[..];
    for buffer in buffers {
        let (now, later) = rest.split_at_mut(buffer.len());
        buffer.copy_to(now);
        rest = later;
    }
    write(&data)
}
