//! Disks of machines: one trait, and the image formats behind it.

mod bounce;
mod place;
pub mod qcow2;
mod raw;
mod ring;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base::error::kind_of_io;
use base::{Classified, Kind};
use vm_memory::VolatileSlice;

pub use place::{Part, Place, Way, total};
pub use qcow2::{BackingFiles, Qcow2Disk};
pub use raw::RawDisk;
pub use ring::{Ring, Task};

/// A disk could not be opened or reached.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("cannot open disk {path}: {source}")]
    Open {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("disk {path} cannot be used: {reason}")]
    Unusable { path: PathBuf, reason: String },
    #[error("{what} of {len} bytes at {offset} on the disk failed: {source}")]
    Io {
        what: &'static str,
        offset: u64,
        len: u64,
        source: std::io::Error,
    },
}

impl Classified for DiskError {
    fn kind(&self) -> Kind {
        match self {
            DiskError::Open { source, .. } | DiskError::Io { source, .. } => kind_of_io(source),
            DiskError::Unusable { .. } => Kind::Invalid,
        }
    }
}

/// A disk as a device model sees it. Offsets and lengths are in bytes; any thread may call, several at once.
/// An access past the end fails and changes nothing.
pub trait Disk: Send + Sync {
    /// Its size in bytes.
    fn len(&self) -> u64;
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    fn read_only(&self) -> bool;
    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError>;
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError>;
    /// As [`Disk::read_at`] into a guest's memory, which the guest may change meanwhile: fills all of `buffers`, in order.
    fn read_volatile_at(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
    ) -> Result<(), DiskError> {
        bounce::read(buffers, |data| self.read_at(offset, data))
    }
    /// As [`Disk::read_volatile_at`] where that needs no wait for the disk; false, with any content, where it does.
    fn try_read_volatile_at(
        &self,
        _offset: u64,
        _buffers: &[VolatileSlice<'_>],
    ) -> Result<bool, DiskError> {
        Ok(false)
    }
    /// As [`Disk::write_at`] from a guest's memory, which the guest may change meanwhile.
    fn write_volatile_at(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
    ) -> Result<(), DiskError> {
        bounce::write(buffers, |data| self.write_at(offset, data))
    }
    /// As [`Disk::write_volatile_at`] where that is a copy into the host's cache and nothing else; false, with nothing
    /// written, where it is more: the disk has to be looked at, room to be found.
    fn try_write_volatile_at(
        &self,
        _offset: u64,
        _buffers: &[VolatileSlice<'_>],
    ) -> Result<bool, DiskError> {
        Ok(false)
    }
    /// Where a range lies, so that it may be moved without this disk's help; `None` where it may not, or where that
    /// cannot be said without waiting. What is moved must be told with [`Disk::moved`].
    fn place(&self, _way: Way, _offset: u64, _len: u64) -> Option<Place> {
        None
    }
    /// `len` bytes were moved to or from a [`Disk::place`].
    fn moved(&self, _way: Way, _len: u64) {}
    /// The file whose fdatasync(2) is all that [`Disk::flush`] does.
    fn flush_file(&self) -> Option<Arc<File>> {
        None
    }
    /// Makes the disk larger, up to the next whole sector; what is new reads as zeros. Accesses go on meanwhile.
    ///
    /// # Errors
    /// [`DiskError::Unusable`] where `size` is smaller than the disk, or its size is not ours to change.
    fn grow(&self, size: u64) -> Result<(), DiskError>;
    /// Returns once everything written before is on stable storage.
    fn flush(&self) -> Result<(), DiskError>;
    /// The range's content no longer matters; it may read as zeros or as before.
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError>;
    /// The range reads as zeros from now on.
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError>;
}

/// The formats known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    #[default]
    Raw,
    Qcow2,
}

/// What a file's first bytes say it is. A raw disk may hold any bytes, so a disk that a guest once wrote as raw
/// must be opened as raw and never by this guess.
///
/// # Errors
/// [`DiskError::Open`].
pub fn probe(path: &Path) -> Result<Format, DiskError> {
    let failed = |source| DiskError::Open {
        path: path.to_owned(),
        source,
    };
    let mut magic = [0; 4];
    let mut file = std::fs::File::open(path).map_err(failed)?;
    match file.read_exact(&mut magic) {
        Ok(()) if u32::from_be_bytes(magic) == qcow2::MAGIC => Ok(Format::Qcow2),
        Ok(()) => Ok(Format::Raw),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(Format::Raw),
        Err(error) => Err(failed(error)),
    }
}

/// Opens an image of a format.
///
/// # Errors
/// As the format's own `open`.
pub fn open(
    path: &Path,
    format: Format,
    read_only: bool,
    backing: BackingFiles,
) -> Result<Box<dyn Disk>, DiskError> {
    Ok(match format {
        Format::Raw => Box::new(RawDisk::open(path, read_only)?),
        Format::Qcow2 => Box::new(Qcow2Disk::open(path, read_only, backing)?),
    })
}

/// Makes a disk larger. Its image must not be in use.
///
/// # Errors
/// As [`Disk::grow`].
pub fn grow(path: &Path, format: Format, size: u64) -> Result<(), DiskError> {
    open(path, format, false, BackingFiles::Allowed)?.grow(size)
}

/// The size that a disk shall have, in whole sectors, where it may have that.
pub(crate) fn larger(path: &Path, disk: &dyn Disk, size: u64) -> Result<u64, DiskError> {
    let unusable = |reason: String| DiskError::Unusable {
        path: path.to_owned(),
        reason,
    };
    if disk.read_only() {
        return Err(unusable(
            "it is read-only, so it cannot be made larger".into(),
        ));
    }
    let size = size
        .checked_next_multiple_of(512)
        .ok_or_else(|| unusable("no disk is that large".into()))?;
    if size < disk.len() {
        return Err(unusable(format!(
            "it has {} bytes; a disk cannot be made smaller, what is cut off would be lost",
            disk.len()
        )));
    }
    Ok(size)
}

/// Locks an image against other machines; false where one has it. A process just forked anywhere in this program holds
/// a copy of every lock until it executes its own program, so a refusal is not believed at once.
pub(crate) fn lock(file: &std::fs::File, read_only: bool) -> bool {
    use rustix::fs::{FlockOperation, flock};
    let wanted = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    for _ in 0..50 {
        // File systems without locks exist; the disk is usable all the same.
        if flock(file, wanted) != Err(rustix::io::Errno::WOULDBLOCK) {
            return true;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    false
}
