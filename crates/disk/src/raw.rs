//! A raw image: the file's bytes are the disk's. Block devices are raw images too.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate};

use crate::{Disk, DiskError};

/// See the module.
pub struct RawDisk {
    file: File,
    len: u64,
    read_only: bool,
}

impl RawDisk {
    /// Opens a file or block device, locked against another machine that would write it.
    ///
    /// # Errors
    /// [`DiskError::Open`]; [`DiskError::Unusable`] for what is no disk, or is in use.
    pub fn open(path: &Path, read_only: bool) -> Result<RawDisk, DiskError> {
        let open = |source| DiskError::Open {
            path: path.to_owned(),
            source,
        };
        let unusable = |reason: &str| DiskError::Unusable {
            path: path.to_owned(),
            reason: reason.into(),
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(open)?;
        let kind = file.metadata().map_err(open)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(unusable("it is neither a file nor a block device"));
        }
        if !crate::lock(&file, read_only) {
            return Err(unusable("another machine uses it"));
        }
        let len = file.seek(SeekFrom::End(0)).map_err(open)?;
        if len < 512 {
            return Err(unusable("it is smaller than one sector"));
        }
        Ok(RawDisk {
            file,
            len,
            read_only,
        })
    }

    fn check(
        &self,
        what: &'static str,
        offset: u64,
        len: u64,
        writes: bool,
    ) -> Result<(), DiskError> {
        let fail = |kind| {
            Err(DiskError::Io {
                what,
                offset,
                len,
                source: io::Error::from(kind),
            })
        };
        if writes && self.read_only {
            return fail(io::ErrorKind::ReadOnlyFilesystem);
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => fail(io::ErrorKind::InvalidInput),
        }
    }

    fn punch(&self, offset: u64, len: u64) -> Result<(), rustix::io::Errno> {
        fallocate(
            &self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        )
    }
}

impl Disk for RawDisk {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        let len = data.len() as u64;
        self.check("reading", offset, len, false)?;
        self.file
            .read_exact_at(data, offset)
            .map_err(|source| DiskError::Io {
                what: "reading",
                offset,
                len,
                source,
            })
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let len = data.len() as u64;
        self.check("writing", offset, len, true)?;
        self.file
            .write_all_at(data, offset)
            .map_err(|source| DiskError::Io {
                what: "writing",
                offset,
                len,
                source,
            })
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        self.file.sync_data().map_err(|source| DiskError::Io {
            what: "flushing",
            offset: 0,
            len: self.len,
            source,
        })
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check("discarding", offset, len, true)?;
        if len == 0 {
            return Ok(());
        }
        match self.punch(offset, len) {
            // Where the file system cannot punch holes the space stays used: a discard is a hint.
            Ok(())
            | Err(
                rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL,
            ) => Ok(()),
            Err(error) => Err(DiskError::Io {
                what: "discarding",
                offset,
                len,
                source: error.into(),
            }),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check("zeroing", offset, len, true)?;
        if len == 0 || self.punch(offset, len).is_ok() {
            return Ok(());
        }
        let zeros = vec![0u8; len.min(1 << 20) as usize];
        let mut done = 0;
        while done < len {
            let step = (len - done).min(zeros.len() as u64);
            self.write_at(offset + done, &zeros[..step as usize])?;
            done += step;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(len: u64) -> (tempfile::NamedTempFile, RawDisk) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        let disk = RawDisk::open(file.path(), false).unwrap();
        (file, disk)
    }

    #[test]
    fn what_is_written_reads_back_and_zeroes_are_zero() {
        let (_file, disk) = disk(64 << 10);
        disk.write_at(4096, &[7; 8192]).unwrap();
        disk.write_zeroes(5000, 1000).unwrap();
        let mut data = [1; 4096];
        disk.read_at(4096, &mut data).unwrap();
        assert!(
            data[..904].iter().all(|b| *b == 7)
                && data[904..1904].iter().all(|b| *b == 0)
                && data[1904] == 7
        );
        disk.flush().unwrap();
        disk.discard(4096, 4096).unwrap();
    }

    #[test]
    fn nothing_reaches_past_the_end_or_writes_a_read_only_disk() {
        let (file, disk) = disk(4096);
        assert!(disk.write_at(4000, &[0; 97]).is_err());
        assert!(disk.read_at(u64::MAX, &mut [0]).is_err());
        assert!(disk.discard(0, 4097).is_err());
        assert!(
            matches!(
                RawDisk::open(file.path(), false),
                Err(DiskError::Unusable { .. })
            ),
            "it is locked"
        );
        drop(disk);
        let disk = RawDisk::open(file.path(), true).unwrap();
        assert!(disk.write_at(0, &[0]).is_err() && disk.write_zeroes(0, 1).is_err());
    }
}
