//! Disks of machines: one trait, and the image formats behind it.

mod raw;

use std::path::PathBuf;

use base::error::kind_of_io;
use base::{Classified, Kind};

pub use raw::RawDisk;

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
    /// Returns once everything written before is on stable storage.
    fn flush(&self) -> Result<(), DiskError>;
    /// The range's content no longer matters; it may read as zeros or as before.
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError>;
    /// The range reads as zeros from now on.
    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError>;
}
