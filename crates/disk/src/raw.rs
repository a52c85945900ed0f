//! A raw image: the file's bytes are the disk's. Block devices are raw images too.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, fallocate};
use vm_memory::VolatileSlice;

use crate::place::{Part, Place, VECTORS, Way, total};
use crate::{Disk, DiskError};

fn vectors(buffers: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    buffers
        .iter()
        .filter(|buffer| !buffer.is_empty())
        .map(|buffer| libc::iovec {
            iov_base: buffer.ptr_guard_mut().as_ptr().cast(),
            iov_len: buffer.len(),
        })
        .collect()
}

/// Moves all of `buffers` between a file, from `offset` on, and memory.
pub(crate) fn transfer(
    file: &File,
    way: Way,
    mut offset: u64,
    buffers: &[VolatileSlice<'_>],
) -> io::Result<()> {
    let mut vectors = vectors(buffers);
    transfer_vectors(file, way, &mut offset, &mut vectors)
}

/// As [`transfer`], of memory that the caller borrows for the length of the call.
pub(crate) fn transfer_vectors(
    file: &File,
    way: Way,
    offset: &mut u64,
    vectors: &mut [libc::iovec],
) -> io::Result<()> {
    let mut rest = vectors;
    while !rest.is_empty() {
        let count = rest.len().min(VECTORS) as i32;
        let (file, at) = (file.as_raw_fd(), *offset as libc::off_t);
        // SAFETY: each vector is, or is the rest of, memory that a volatile slice lends until this call returns. The
        // kernel reads and writes it as another CPU of a guest might, which is what volatile slices are for.
        let moved = unsafe {
            match way {
                Way::FromFile => libc::preadv(file, rest.as_ptr(), count, at),
                Way::ToFile => libc::pwritev(file, rest.as_ptr(), count, at),
            }
        };
        let mut moved = match usize::try_from(moved) {
            Ok(0) => {
                return Err(match way {
                    Way::FromFile => io::ErrorKind::UnexpectedEof.into(),
                    Way::ToFile => io::ErrorKind::WriteZero.into(),
                });
            }
            Ok(moved) => moved,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
        };
        *offset += moved as u64;
        while let Some(first) = rest.first_mut() {
            if moved < first.iov_len {
                first.iov_base = first.iov_base.cast::<u8>().wrapping_add(moved).cast();
                first.iov_len -= moved;
                break;
            }
            moved -= first.iov_len;
            rest = &mut rest[1..];
        }
    }
    Ok(())
}

/// Reads what the host has in memory; false, with any content, where it has not all of it. Whatever went wrong shows again,
/// and counts, in the read that may wait.
pub(crate) fn try_read(file: &File, offset: u64, vectors: &[libc::iovec], len: u64) -> bool {
    // SAFETY: as in `transfer_vectors`.
    let moved = unsafe {
        libc::preadv2(
            file.as_raw_fd(),
            vectors.as_ptr(),
            vectors.len() as i32,
            offset as libc::off_t,
            libc::RWF_NOWAIT,
        )
    };
    moved as u64 == len
}

/// See the module.
pub struct RawDisk {
    path: PathBuf,
    file: Arc<File>,
    len: AtomicU64,
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
            path: path.to_owned(),
            file: Arc::new(file),
            len: AtomicU64::new(len),
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
            Some(end) if end <= self.len() => Ok(()),
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
        self.len.load(Ordering::Acquire)
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

    fn read_volatile_at(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
    ) -> Result<(), DiskError> {
        let len = total(buffers);
        self.check("reading", offset, len, false)?;
        transfer(&self.file, Way::FromFile, offset, buffers).map_err(|source| DiskError::Io {
            what: "reading",
            offset,
            len,
            source,
        })
    }

    fn try_read_volatile_at(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
    ) -> Result<bool, DiskError> {
        let len = total(buffers);
        self.check("reading", offset, len, false)?;
        let vectors = vectors(buffers);
        if vectors.len() > VECTORS {
            return Ok(false);
        }
        Ok(try_read(&self.file, offset, &vectors, len))
    }

    fn write_volatile_at(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
    ) -> Result<(), DiskError> {
        let len = total(buffers);
        self.check("writing", offset, len, true)?;
        transfer(&self.file, Way::ToFile, offset, buffers).map_err(|source| DiskError::Io {
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
            len: self.len(),
            source,
        })
    }

    fn place(&self, way: Way, offset: u64, len: u64) -> Option<Place> {
        self.check("reaching", offset, len, way == Way::ToFile)
            .ok()?;
        let file = self.file.clone();
        Some(Place {
            parts: vec![Part::File { file, offset, len }],
            lease: None,
        })
    }

    fn flush_file(&self) -> Option<Arc<File>> {
        (!self.read_only).then(|| self.file.clone())
    }

    fn grow(&self, size: u64) -> Result<(), DiskError> {
        let len = self.len();
        let size = crate::larger(&self.path, self, size)?;
        let about = self.file.metadata();
        if !about.is_ok_and(|about| about.is_file()) {
            return Err(DiskError::Unusable {
                path: self.path.clone(),
                reason: "a block device cannot be made larger from here; grow it with what made it"
                    .into(),
            });
        }
        let grown = self.file.set_len(size);
        grown
            .and_then(|()| self.file.sync_all())
            .map_err(|source| DiskError::Io {
                what: "growing",
                offset: len,
                len: size - len,
                source,
            })?;
        self.len.store(size, Ordering::Release);
        Ok(())
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
    use crate::Format;

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
    fn scattered_memory_is_written_and_read_in_order() {
        let (_file, disk) = disk(64 << 10);
        let mut parts: Vec<Vec<u8>> = (0..1500u32)
            .map(|n| vec![n as u8; 1 + n as usize % 7])
            .collect();
        let whole = parts.concat();
        let slices: Vec<_> = parts
            .iter_mut()
            .map(|part| VolatileSlice::from(&mut part[..]))
            .collect();
        disk.write_volatile_at(100, &slices).unwrap();
        let mut read = vec![0; whole.len()];
        disk.read_at(100, &mut read).unwrap();
        assert_eq!(read, whole);
        let (mut first, mut second) = (vec![0; 5], vec![0; whole.len() - 5]);
        let into = [
            VolatileSlice::from(&mut first[..]),
            VolatileSlice::from(&mut second[..]),
        ];
        disk.read_volatile_at(100, &into).unwrap();
        assert_eq!([first, second].concat(), whole);
        assert!(disk.read_volatile_at((64 << 10) - 5, &slices).is_err());
    }

    #[test]
    fn a_disk_grows_and_never_shrinks() {
        let (file, disk) = disk(8192);
        disk.write_at(0, &[9; 512]).unwrap();
        assert!(
            crate::grow(file.path(), Format::Raw, 1 << 20).is_err(),
            "it is in use"
        );
        drop(disk);
        crate::grow(file.path(), Format::Raw, 1 << 20).unwrap();
        assert!(crate::grow(file.path(), Format::Raw, 4096).is_err());
        let disk = RawDisk::open(file.path(), false).unwrap();
        let (mut first, mut last) = ([0; 512], [1; 512]);
        disk.read_at(0, &mut first).unwrap();
        disk.read_at((1 << 20) - 512, &mut last).unwrap();
        assert!(first == [9; 512] && last == [0; 512] && disk.len() == 1 << 20);
    }

    #[test]
    fn a_discard_gives_space_back_to_the_host() {
        use std::os::unix::fs::MetadataExt;
        let (file, disk) = disk(8 << 20);
        disk.write_at(0, &vec![5; 4 << 20]).unwrap();
        disk.flush().unwrap();
        let before = file.as_file().metadata().unwrap().blocks();
        disk.discard(0, 4 << 20).unwrap();
        disk.flush().unwrap();
        let after = file.as_file().metadata().unwrap().blocks();
        assert!(after * 512 + (3 << 20) < before * 512, "{before} {after}");
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
