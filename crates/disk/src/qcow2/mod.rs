//! qcow2 images (QEMU: docs/interop/qcow2.txt), versions 2 and 3: read, write, backing files, growing, discard,
//! compressed clusters (read), internal snapshots (kept, not made).
//!
//! Locks: data moves under the read half of `metadata`, so that no cluster is freed under it; whatever changes
//! a table holds the write half. The backing image is locked after, never before.

mod header;
mod metadata;

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::{FallocateFlags, fallocate};

pub use header::{Backing, Compression, Header, MAGIC, fuzz_header};
use metadata::{COMPRESSED, COPIED, Metadata, OFFSET, ZERO};

use crate::{Disk, DiskError};

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
    file: File,
    read_only: bool,
    size: u64,
    metadata: RwLock<Metadata>,
    backing: Option<Box<dyn Disk>>,
}

/// Options of a new image.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Bytes of the disk; taken from the backing image where 0.
    pub size: u64,
    /// 2 to this bytes are allocated at a time: 9 to 21.
    pub cluster_bits: u32,
    pub backing: Option<Backing>,
}

impl Default for CreateOptions {
    fn default() -> CreateOptions {
        CreateOptions {
            size: 0,
            cluster_bits: 16,
            backing: None,
        }
    }
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
        let size = header.size;
        let metadata = Metadata::load(&file, header).map_err(failed)?;
        Ok(Qcow2Disk {
            file,
            read_only,
            size,
            metadata: RwLock::new(metadata),
            backing: below,
        })
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

    /// Makes an empty image; the file must not exist.
    ///
    /// # Errors
    /// Where the file cannot be made; nothing is left then.
    pub fn create(path: &Path, options: &CreateOptions) -> Result<(), DiskError> {
        let failed = |source| DiskError::Open {
            path: path.to_owned(),
            source,
        };
        let unusable = |reason: &str| DiskError::Unusable {
            path: path.to_owned(),
            reason: reason.into(),
        };
        let mut size = options.size;
        if let Some(below) = &options.backing {
            let below = Qcow2Disk::open_backing(path, below, 0)?;
            if size == 0 {
                size = below.len();
            }
        }
        let bits = options.cluster_bits;
        if !(9..=21).contains(&bits) {
            return Err(unusable(
                "its clusters would have a size that is not allowed: 2^9 to 2^21 bytes are",
            ));
        }
        let cluster = 1u64 << bits;
        let size = size.next_multiple_of(512);
        let l1_entries = size.div_ceil(cluster * (cluster / 8)).max(1);
        if size == 0 || l1_entries * 8 > 32 << 20 {
            return Err(unusable(
                "its size is impossible; choose larger clusters for a larger disk",
            ));
        }
        if options
            .backing
            .as_ref()
            .is_some_and(|b| b.file.len() > 1023.min(cluster as usize - 160))
        {
            return Err(unusable("the name of the image below it is too long"));
        }
        // Header, reference counts' table, one block of them, first-level table.
        let l1_clusters = (l1_entries * 8).div_ceil(cluster);
        let table_clusters = (size.div_ceil(cluster * cluster * 4) * 2 * 8)
            .div_ceil(cluster)
            .clamp(1, (8 << 20) / cluster);
        let used = 1 + table_clusters + 1 + l1_clusters;
        if used > cluster * 8 / 16 {
            return Err(unusable("its clusters are too small for its size"));
        }
        let header = Header {
            version: 3,
            cluster_bits: bits,
            size,
            backing: options.backing.clone(),
            l1_entries: l1_entries as u32,
            l1_offset: (2 + table_clusters) * cluster,
            refcount_table_offset: cluster,
            refcount_table_clusters: table_clusters as u32,
            refcount_order: 4,
            snapshots: 0,
            autoclear: 0,
            compression: Compression::Deflate,
            dirty: false,
            corrupt: false,
        };
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(failed)?;
        let written = (|| {
            let block = (1 + table_clusters) * cluster;
            file.set_len(used * cluster)?;
            file.write_all_at(&block.to_be_bytes(), cluster)?;
            let counts: Vec<u8> = (0..used).flat_map(|_| 1u16.to_be_bytes()).collect();
            file.write_all_at(&counts, block)?;
            file.write_all_at(&header.write(), 0)?;
            file.sync_all()
        })();
        written.map_err(|source| {
            let _ = std::fs::remove_file(path);
            failed(source)
        })
    }

    /// Makes the disk larger. The image must not be in use.
    ///
    /// # Errors
    /// Where `size` is smaller than the disk: what is cut off would be lost.
    pub fn grow(path: &Path, size: u64) -> Result<(), DiskError> {
        let disk = Qcow2Disk::open(path, false, BackingFiles::Allowed)?;
        let size = size.next_multiple_of(512);
        if size < disk.size {
            return Err(DiskError::Unusable {
                path: path.to_owned(),
                reason: format!("it has {} bytes; a disk cannot be made smaller", disk.size),
            });
        }
        let mut metadata = disk.write_lock();
        metadata
            .grow(&disk.file, size)
            .map_err(|source| disk.failed("growing", 0, 0, source))
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
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
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

    /// A compressed cluster: bits below 62 - (cluster_bits - 8) are its host offset, those above its sectors - 1.
    fn decompress(&self, header: &Header, entry: u64) -> io::Result<Vec<u8>> {
        let size_bits = header.cluster_bits - 8;
        let offset_bits = 62 - size_bits;
        let host = entry & ((1 << offset_bits) - 1) & 0x00ff_ffff_ffff_ffff;
        let sectors = (entry & !(COMPRESSED | COPIED)) >> offset_bits;
        let len = ((sectors + 1) * 512 - host % 512) as usize;
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
        if entry & COMPRESSED != 0 {
            let offset_bits = 62 - (metadata.header.cluster_bits - 8);
            let host = entry & ((1 << offset_bits) - 1) & 0x00ff_ffff_ffff_ffff;
            let len = (((entry & !(COMPRESSED | COPIED)) >> offset_bits) + 1) * 512 - host % 512;
            let first = host / metadata.cluster();
            let last = (host + len - 1) / metadata.cluster();
            metadata.free(first * metadata.cluster(), last - first + 1);
        } else if entry & OFFSET != 0 {
            metadata.free(entry & OFFSET, 1);
        }
    }

    /// Writes within one cluster that has to be allocated or un-shared first.
    fn write_new(&self, metadata: &mut Metadata, offset: u64, data: &[u8]) -> io::Result<()> {
        let cluster = metadata.cluster();
        let start = offset - offset % cluster;
        let entry = metadata.entry(&self.file, start)?;
        if in_place(entry) {
            let host = entry & OFFSET;
            return self.file.write_all_at(data, host + offset % cluster);
        }
        let mut whole;
        let bytes = if data.len() as u64 == cluster {
            data
        } else {
            whole = vec![0; cluster as usize];
            let there = (self.size - start).min(cluster) as usize;
            self.read_part(metadata, entry, start, &mut whole[..there])?;
            let at = (offset % cluster) as usize;
            whole[at..at + data.len()].copy_from_slice(data);
            &whole[..]
        };
        // A zero cluster may keep its place, unless it is shared.
        let keeps_place = entry & COMPRESSED == 0 && entry & COPIED != 0 && entry & OFFSET != 0;
        let host = if keeps_place {
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
        written?;
        if metadata.wants_flush() {
            metadata.flush(&self.file)?;
        }
        Ok(())
    }

    /// Makes whole clusters read as zeros (or, for `discard` without an image below, as nothing).
    fn clear(&self, metadata: &mut Metadata, offset: u64, keep: bool) -> io::Result<()> {
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
            let zeros = vec![0; metadata.cluster().min(self.size - offset) as usize];
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
            if at == start && (next == start + cluster || next == self.size) {
                let mut metadata = self.write_lock();
                whole(&mut metadata, start)
                    .map_err(|source| self.failed(what, offset, len, source))?;
                if metadata.wants_flush() {
                    metadata
                        .flush(&self.file)
                        .map_err(|source| self.failed(what, offset, len, source))?;
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
        self.size
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
                Some(entry) if in_place(entry) => {
                    let host = entry & OFFSET;
                    self.file
                        .write_all_at(part, host + here % cluster)
                        .map_err(failed)?;
                }
                _ => {
                    drop(metadata);
                    self.write_new(&mut self.write_lock(), here, part)
                        .map_err(failed)?;
                }
            }
            at += n;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        self.write_lock()
            .flush(&self.file)
            .map_err(|source| self.failed("flushing", 0, self.size, source))
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
    let Ok(metadata) = Metadata::load(&file, header) else {
        return;
    };
    let disk = Qcow2Disk {
        file,
        read_only: false,
        size,
        metadata: RwLock::new(metadata),
        backing: None,
    };
    let mut buffer = [0; 4096];
    let n = buffer.len().min(size as usize);
    let _ = disk.read_at(0, &mut buffer[..n]);
    let _ = disk.write_at(size.saturating_sub(n as u64), &buffer[..n]);
    let _ = disk.discard(0, size.min(1 << 20));
    let _ = disk.flush();
}

#[cfg(test)]
mod tests;
