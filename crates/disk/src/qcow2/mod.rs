//! qcow2 images (QEMU: docs/interop/qcow2.txt), versions 2 and 3: read, write, backing files, growing, discard,
//! compressed clusters (read), internal snapshots (kept, not made).
//!
//! Locks: data moves under the read half of `metadata`, or with a lease that was taken under it, so that no cluster is given
//! away under it; whatever changes a table holds the write half. `flushing` is taken before either, so that transfers go on
//! while a flush waits for the disk. The backing image is locked after, never before.

mod create;
mod header;
mod leases;
mod metadata;
mod transfer;

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::{FallocateFlags, fallocate};
use vm_memory::VolatileSlice;

pub use create::CreateOptions;
pub use header::{Backing, Compression, Header, MAGIC, fuzz_header};
use metadata::{COMPRESSED, COPIED, Metadata, OFFSET, ZERO};

use crate::place::{Part, Place, Way, split, total, zero};
use crate::raw::try_read;
use crate::{Disk, DiskError, bounce};

/// A chain of backing files longer than this is a loop or a mistake.
const CHAIN_LIMIT: usize = 64;

/// Whether an image may name the file below it. One from elsewhere may not: it could name any file of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackingFiles {
    Allowed,
    Refused,
}

/// A qcow2 image.
pub struct Qcow2Disk {
    path: PathBuf,
    file: Arc<File>,
    read_only: bool,
    size: AtomicU64,
    metadata: RwLock<Metadata>,
    /// Held by the one who writes a batch.
    flushing: Mutex<()>,
    backing: Option<Box<dyn Disk>>,
}

/// Reads what is there; what lies beyond the file's end reads as zeros (a cluster never fully written).
fn read_or_zero(file: &File, data: &mut [u8], mut offset: u64) -> io::Result<()> {
    let mut at = 0;
    while at < data.len() {
        match file.read_at(&mut data[at..], offset) {
            Ok(0) => {
                data[at..].fill(0);
                return Ok(());
            }
            Ok(n) => {
                at += n;
                offset += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Qcow2Disk {
    /// Opens an image and the chain below it.
    ///
    /// # Errors
    /// [`DiskError::Open`]; [`DiskError::Unusable`] with what is wrong with it.
    pub fn open(
        path: &Path,
        read_only: bool,
        backing: BackingFiles,
    ) -> Result<Qcow2Disk, DiskError> {
        Qcow2Disk::open_at(path, read_only, backing, 0)
    }

    fn open_at(
        path: &Path,
        read_only: bool,
        backing: BackingFiles,
        depth: usize,
    ) -> Result<Qcow2Disk, DiskError> {
        let failed = |source| DiskError::Open {
            path: path.to_owned(),
            source,
        };
        let unusable = |reason: String| DiskError::Unusable {
            path: path.to_owned(),
            reason,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(failed)?;
        if !file.metadata().map_err(failed)?.file_type().is_file() {
            return Err(unusable("it is no file".into()));
        }
        if !crate::lock(&file, read_only) {
            return Err(unusable("another machine uses it".into()));
        }
        let mut first = Vec::new();
        (&file)
            .take(1 << 16)
            .read_to_end(&mut first)
            .map_err(failed)?;
        let mut header = Header::parse(&first).map_err(unusable)?;
        if !read_only && header.corrupt {
            return Err(unusable(
                "it is marked as damaged; mend it with qemu-img check -r all".into(),
            ));
        }
        if !read_only && header.dirty {
            return Err(unusable(
                "it was not closed in order; mend it with qemu-img check -r leaks".into(),
            ));
        }
        let below = match &header.backing {
            None => None,
            Some(_) if backing == BackingFiles::Refused => {
                return Err(unusable(
                    "it needs a file below it, which is not allowed for an image from elsewhere; flatten it with qemu-img convert"
                        .into(),
                ));
            }
            Some(_) if depth >= CHAIN_LIMIT => {
                return Err(unusable(format!(
                    "more than {CHAIN_LIMIT} images lie below one another"
                )));
            }
            Some(below) => Some(Qcow2Disk::open_backing(path, below, depth)?),
        };
        if !read_only && header.autoclear != 0 && header.version == 3 {
            // Whatever those features describe is out of date with our first write.
            file.write_all_at(&[0; 8], 88).map_err(failed)?;
            header.autoclear = 0;
        }
        // What is wrong with it says what to do; everything else is the host's.
        let damaged = |error: io::Error| match error.kind() {
            io::ErrorKind::InvalidData => unusable(error.to_string()),
            _ => failed(error),
        };
        let mut metadata = Metadata::load(&file, header).map_err(damaged)?;
        if !read_only {
            metadata.check(&file).map_err(damaged)?;
        }
        Ok(Qcow2Disk::of(path, file, read_only, metadata, below))
    }

    fn of(
        path: &Path,
        file: File,
        read_only: bool,
        metadata: Metadata,
        backing: Option<Box<dyn Disk>>,
    ) -> Qcow2Disk {
        Qcow2Disk {
            path: path.to_owned(),
            file: Arc::new(file),
            read_only,
            size: AtomicU64::new(metadata.header.size),
            metadata: RwLock::new(metadata),
            flushing: Mutex::default(),
            backing,
        }
    }

    fn open_backing(
        path: &Path,
        below: &Backing,
        depth: usize,
    ) -> Result<Box<dyn Disk>, DiskError> {
        // A relative name is relative to the image that says it.
        let file = path.parent().unwrap_or(Path::new("")).join(&below.file);
        match below.format.as_deref() {
            Some("qcow2") => Ok(Box::new(Qcow2Disk::open_at(
                &file,
                true,
                BackingFiles::Allowed,
                depth + 1,
            )?)),
            Some("raw") => Ok(Box::new(crate::RawDisk::open(&file, true)?)),
            Some(other) => Err(DiskError::Unusable {
                path: path.to_owned(),
                reason: format!(
                    "the image below it has the format {other:?}; raw and qcow2 are known"
                ),
            }),
            // Guessing would let the writer of a raw image turn it into a qcow2 that names any file.
            None => Err(DiskError::Unusable {
                path: path.to_owned(),
                reason: format!(
                    "it does not say the format of {}; say it with qemu-img rebase -u -F FORMAT -b {} {}",
                    file.display(),
                    below.file,
                    path.display()
                ),
            }),
        }
    }

    /// Bytes the image takes on the host.
    pub fn allocated(&self) -> Result<u64, DiskError> {
        use std::os::unix::fs::MetadataExt;
        let about = self
            .file
            .metadata()
            .map_err(|source| self.failed("looking", 0, 0, source))?;
        Ok(about.blocks() * 512)
    }

    fn read_lock(&self) -> RwLockReadGuard<'_, Metadata> {
        self.metadata.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_lock(&self) -> RwLockWriteGuard<'_, Metadata> {
        self.metadata
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, what: &'static str, offset: u64, len: u64, source: io::Error) -> DiskError {
        DiskError::Io {
            what,
            offset,
            len,
            source,
        }
    }

    fn check(&self, what: &'static str, offset: u64, len: u64) -> Result<(), DiskError> {
        if offset.checked_add(len).is_none_or(|end| end > self.len()) {
            let source =
                io::Error::new(io::ErrorKind::InvalidInput, "it lies beyond the disk's end");
            return Err(self.failed(what, offset, len, source));
        }
        Ok(())
    }

    /// [`Self::check`], for what changes the range.
    fn check_change(&self, what: &'static str, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check(what, offset, len)?;
        if self.read_only {
            let source = io::ErrorKind::PermissionDenied.into();
            return Err(self.failed(what, offset, len, source));
        }
        Ok(())
    }

    /// What the image below has at `offset`; zeros beyond its end.
    fn read_below(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let Some(below) = &self.backing else {
            data.fill(0);
            return Ok(());
        };
        let there = below.len().saturating_sub(offset).min(data.len() as u64) as usize;
        let (inside, beyond) = data.split_at_mut(there);
        beyond.fill(0);
        if inside.is_empty() {
            return Ok(());
        }
        below.read_at(offset, inside).map_err(io::Error::other)
    }

    /// Reads within one cluster.
    fn read_part(
        &self,
        metadata: &Metadata,
        entry: u64,
        offset: u64,
        data: &mut [u8],
    ) -> io::Result<()> {
        if entry & COMPRESSED != 0 {
            let whole = self.decompress(&metadata.header, entry)?;
            let at = (offset % metadata.cluster()) as usize;
            data.copy_from_slice(&whole[at..at + data.len()]);
            return Ok(());
        }
        if entry & ZERO != 0 && metadata.header.version == 3 {
            data.fill(0);
            return Ok(());
        }
        let host = entry & OFFSET;
        if host == 0 {
            return self.read_below(offset, data);
        }
        if !host.is_multiple_of(metadata.cluster()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the image is damaged: a cluster is out of place",
            ));
        }
        read_or_zero(&self.file, data, host + offset % metadata.cluster())
    }

    fn decompress(&self, header: &Header, entry: u64) -> io::Result<Vec<u8>> {
        let range = header.host_range(entry);
        let (host, len) = (range.start, (range.end - range.start) as usize);
        let mut packed = vec![0; len];
        read_or_zero(&self.file, &mut packed, host)?;
        let cluster = 1usize << header.cluster_bits;
        let mut whole = vec![0; cluster];
        let damaged = |_| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "the image is damaged: a compressed cluster cannot be read",
            )
        };
        match header.compression {
            Compression::Deflate => {
                flate2::read::DeflateDecoder::new(&packed[..])
                    .read_exact(&mut whole)
                    .map_err(damaged)?;
            }
            Compression::Zstd => {
                zstd::stream::read::Decoder::new(&packed[..])
                    .and_then(|mut decoder| decoder.read_exact(&mut whole))
                    .map_err(damaged)?;
            }
        }
        Ok(whole)
    }

    /// Lets go of what an entry names.
    fn release(&self, metadata: &mut Metadata, entry: u64) {
        let range = metadata.header.host_range(entry);
        if range.is_empty() {
            return;
        }
        let first = range.start / metadata.cluster();
        let last = (range.end - 1) / metadata.cluster();
        metadata.free(first * metadata.cluster(), last - first + 1);
    }

    /// Writes within one cluster that has to be allocated or un-shared first.
    fn write_new(&self, metadata: &mut Metadata, offset: u64, data: &[u8]) -> io::Result<()> {
        metadata.check_writable()?;
        let cluster = metadata.cluster();
        let start = offset - offset % cluster;
        let entry = metadata.entry(&self.file, start)?;
        if in_place(entry) {
            let host = entry & OFFSET;
            metadata.check_data(&self.file, host)?;
            return self.file.write_all_at(data, host + offset % cluster);
        }
        let mut whole;
        let bytes = if data.len() as u64 == cluster {
            data
        } else {
            whole = vec![0; cluster as usize];
            let there = (self.len() - start).min(cluster) as usize;
            self.read_part(metadata, entry, start, &mut whole[..there])?;
            let at = (offset % cluster) as usize;
            whole[at..at + data.len()].copy_from_slice(data);
            &whole[..]
        };
        // A zero cluster may keep its place, unless it is shared.
        let keeps_place = entry & COMPRESSED == 0 && entry & COPIED != 0 && entry & OFFSET != 0;
        let host = if keeps_place {
            metadata.check_data(&self.file, entry & OFFSET)?;
            entry & OFFSET
        } else {
            metadata.allocate(&self.file, 1)?
        };
        let written = self
            .file
            .write_all_at(bytes, host)
            .and_then(|()| metadata.set_entry(&self.file, start, host | COPIED));
        if !keeps_place {
            match written {
                Ok(()) => self.release(metadata, entry),
                // A full host disk: the write comes again, and shall not leave a cluster behind each time.
                Err(_) => metadata.free(host, 1),
            }
        }
        written
    }

    /// Makes whole clusters read as zeros (or, for `discard` without an image below, as nothing).
    fn clear(&self, metadata: &mut Metadata, offset: u64, keep: bool) -> io::Result<()> {
        metadata.check_writable()?;
        let entry = metadata.entry(&self.file, offset)?;
        if entry == 0 && self.backing.is_none() {
            return Ok(());
        }
        let empty = if metadata.header.version == 3 {
            ZERO
        } else {
            0
        };
        if empty == 0 && self.backing.is_some() {
            let zeros = vec![0; metadata.cluster().min(self.len() - offset) as usize];
            return self.write_new(metadata, offset, &zeros);
        }
        if keep
            && entry & COMPRESSED == 0
            && entry & COPIED != 0
            && entry & OFFSET != 0
            && empty != 0
        {
            return metadata.set_entry(&self.file, offset, entry | ZERO);
        }
        if entry & COMPRESSED == 0 && entry & OFFSET != 0 {
            metadata.check_data(&self.file, entry & OFFSET)?;
        }
        metadata.set_entry(&self.file, offset, empty)?;
        self.release(metadata, entry);
        if entry & COMPRESSED == 0 && entry & COPIED != 0 && entry & OFFSET != 0 {
            // The table that no longer names it reaches the disk before anything is lost: a crash in between
            // shows zeros early, which a discarded range may.
            let _ = fallocate(
                &self.file,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                entry & OFFSET,
                metadata.cluster(),
            );
        }
        Ok(())
    }

    /// Calls `whole` for every cluster inside the range and `part` for the pieces at its ends.
    fn each_cluster(
        &self,
        offset: u64,
        len: u64,
        mut whole: impl FnMut(&mut Metadata, u64) -> io::Result<()>,
        mut part: impl FnMut(u64, u64) -> Result<(), DiskError>,
        what: &'static str,
    ) -> Result<(), DiskError> {
        let cluster = 1u64 << self.read_lock().header.cluster_bits;
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let start = at - at % cluster;
            let next = (start + cluster).min(end);
            // The last cluster of a disk may be shorter than a cluster.
            if at == start && (next == start + cluster || next == self.len()) {
                let wants_flush = {
                    let mut metadata = self.write_lock();
                    whole(&mut metadata, start)
                        .map_err(|source| self.failed(what, offset, len, source))?;
                    metadata.wants_flush()
                };
                if wants_flush {
                    self.flush()?;
                }
            } else {
                part(at, next - at)?;
            }
            at = next;
        }
        Ok(())
    }
}

/// The cluster is ours alone and plain: it is written where it lies.
fn in_place(entry: u64) -> bool {
    entry & COMPRESSED == 0 && entry & ZERO == 0 && entry & COPIED != 0 && entry & OFFSET != 0
}

impl Disk for Qcow2Disk {
    fn len(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        let len = data.len() as u64;
        self.check("reading", offset, len)?;
        let failed = |source| self.failed("reading", offset, len, source);
        let mut at = 0;
        while at < data.len() {
            let here = offset + at as u64;
            let metadata = self.read_lock();
            let cluster = metadata.cluster();
            let n = ((cluster - here % cluster) as usize).min(data.len() - at);
            let part = &mut data[at..at + n];
            match metadata.peek(here) {
                Some(entry) => self
                    .read_part(&metadata, entry, here, part)
                    .map_err(failed)?,
                None => {
                    drop(metadata);
                    // Brings the table in; the next turn finds it.
                    self.write_lock().entry(&self.file, here).map_err(failed)?;
                    continue;
                }
            }
            at += n;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let len = data.len() as u64;
        self.check("writing", offset, len)?;
        let failed = |source| self.failed("writing", offset, len, source);
        if self.read_only {
            return Err(failed(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "the disk is read-only",
            )));
        }
        let mut at = 0;
        while at < data.len() {
            let here = offset + at as u64;
            let metadata = self.read_lock();
            let cluster = metadata.cluster();
            let n = ((cluster - here % cluster) as usize).min(data.len() - at);
            let part = &data[at..at + n];
            match metadata.peek(here) {
                Some(entry) if in_place(entry) && metadata.is_sound(entry & OFFSET) => {
                    let host = entry & OFFSET;
                    self.file
                        .write_all_at(part, host + here % cluster)
                        .map_err(failed)?;
                }
                _ => {
                    drop(metadata);
                    let wants_flush = {
                        let mut metadata = self.write_lock();
                        self.write_new(&mut metadata, here, part).map_err(failed)?;
                        metadata.wants_flush()
                    };
                    if wants_flush {
                        self.flush()?;
                    }
                }
            }
            at += n;
        }
        Ok(())
    }

    fn read_volatile_at(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
    ) -> Result<(), DiskError> {
        let len = total(buffers);
        self.check("reading", offset, len)?;
        let moved = match self.place(Way::FromFile, offset, len) {
            Some(place) => self
                .transfer(Way::FromFile, &place, buffers)
                .map_err(|source| self.failed("reading", offset, len, source))?,
            None => false,
        };
        if moved {
            return Ok(());
        }
        bounce::read(buffers, |data| self.read_at(offset, data))
    }

    fn try_read_volatile_at(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
    ) -> Result<bool, DiskError> {
        let len = total(buffers);
        self.check("reading", offset, len)?;
        let Some(place) = self.place(Way::FromFile, offset, len) else {
            return Ok(false);
        };
        let Some((vectors, counts)) = split(&place, buffers) else {
            return Ok(false);
        };
        let mut rest = &vectors[..];
        for (part, count) in place.parts.iter().zip(counts) {
            let (list, later) = rest.split_at(count);
            rest = later;
            match part {
                Part::File { file, offset, len } => {
                    if !try_read(file, *offset, list, *len) {
                        return Ok(false);
                    }
                }
                Part::Zeros { .. } => list.iter().for_each(zero),
            }
        }
        Ok(true)
    }

    fn write_volatile_at(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
    ) -> Result<(), DiskError> {
        if self.try_write_volatile_at(offset, buffers)? {
            return Ok(());
        }
        bounce::write(buffers, |data| self.write_at(offset, data))
    }

    fn try_write_volatile_at(
        &self,
        offset: u64,
        buffers: &[VolatileSlice<'_>],
    ) -> Result<bool, DiskError> {
        let len = total(buffers);
        self.check_change("writing", offset, len)?;
        match self.place(Way::ToFile, offset, len) {
            Some(place) => self
                .transfer(Way::ToFile, &place, buffers)
                .map_err(|source| self.failed("writing", offset, len, source)),
            None => Ok(false),
        }
    }

    fn place(&self, way: Way, offset: u64, len: u64) -> Option<Place> {
        if way == Way::ToFile && self.read_only {
            return None;
        }
        self.check("reaching", offset, len).ok()?;
        // Whoever changes a table may wait for the disk.
        let metadata = self.metadata.try_read().ok()?;
        let mut place = Place {
            parts: Vec::new(),
            lease: None,
        };
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let cluster = metadata.cluster();
            let n = (cluster - at % cluster).min(end - at);
            self.place_part(&metadata, way, at, n, &mut place)?;
            at += n;
        }
        if !self.read_only {
            let lease = metadata.leases.take(metadata.moment());
            place.lease = Some(Box::new(lease));
        }
        Some(place)
    }

    fn grow(&self, size: u64) -> Result<(), DiskError> {
        let len = self.len();
        let size = crate::larger(&self.path, self, size)?;
        let failed = |source| self.failed("growing", len, size - len, source);
        let _flushing = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut metadata = self.write_lock();
        metadata.check_writable().map_err(failed)?;
        metadata.grow(&self.file, size).map_err(failed)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        let flushed = || {
            let _flushing = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
            let batch = self.write_lock().begin_flush(&self.file)?;
            let written = batch.write(&self.file);
            self.write_lock().end_flush(&self.file, batch, written)
        };
        flushed().map_err(|source| self.failed("flushing", 0, self.len(), source))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check_change("discarding", offset, len)?;
        self.each_cluster(
            offset,
            len,
            |metadata, at| self.clear(metadata, at, false),
            |_, _| Ok(()),
            "discarding",
        )
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check_change("writing zeros", offset, len)?;
        self.each_cluster(
            offset,
            len,
            |metadata, at| self.clear(metadata, at, true),
            |at, n| self.write_at(at, &vec![0; n as usize]),
            "writing zeros",
        )
    }
}

impl Drop for Qcow2Disk {
    fn drop(&mut self) {
        if !self.read_only {
            // Nobody is left to hear of a failure; what was flushed is safe.
            let _ = self
                .metadata
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner)
                .close(&self.file);
        }
    }
}

/// Opens an image for reading from any bytes, as fuzzing wants it.
pub fn fuzz_image(data: &[u8]) {
    let Ok(mut file) =
        rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).map(File::from)
    else {
        return;
    };
    if io::Write::write_all(&mut file, data).is_err() {
        return;
    }
    let Ok(header) = Header::parse(data) else {
        return;
    };
    let size = header.size;
    let Ok(mut metadata) = Metadata::load(&file, header) else {
        return;
    };
    // What an image that is refused would come to is looked at all the same: it may be damaged later.
    let _ = metadata.check(&file);
    let disk = Qcow2Disk::of(Path::new("image"), file, false, metadata, None);
    let mut buffer = [0; 4096];
    let n = buffer.len().min(size as usize);
    let _ = disk.read_at(0, &mut buffer[..n]);
    let _ = disk.write_at(size.saturating_sub(n as u64), &buffer[..n]);
    let _ = disk.discard(0, size.min(1 << 20));
    let _ = disk.flush();
}

#[cfg(test)]
mod tests;
