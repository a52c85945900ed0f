//! Blobs: files named by the digest of their content, verified while they are written.
//!
//! A blob is written under `ingest/` and renamed once its digest is known to be right, so what is in `blobs/` is
//! whole. A power cut may still tear what was not flushed; `store::settle` finds that out.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::digest::Hasher;
use crate::error::At;
use crate::{Digest, Error, Result};

static SERIAL: AtomicU64 = AtomicU64::new(0);

/// The folder of blobs and of those on their way.
#[derive(Debug)]
pub struct Content {
    blobs: PathBuf,
    ingest: PathBuf,
}

impl Content {
    pub(crate) fn open(directory: &Path) -> Result<Content> {
        let content = Content {
            blobs: directory.join("blobs/sha256"),
            ingest: directory.join("ingest"),
        };
        for path in [&content.blobs, &content.ingest] {
            fs::create_dir_all(path).at(path)?;
        }
        // Downloads that broke off are kept, to go on from there; the rest is litter of a dead process.
        for entry in fs::read_dir(&content.ingest).at(&content.ingest)?.flatten() {
            if entry.path().extension().is_none_or(|e| e != "partial") {
                let _ = crate::layer::tree::remove_all(&entry.path());
            }
        }
        Ok(content)
    }

    /// Where a blob is, if it is.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(digest.hex())
    }

    /// Where a download that may break off is kept.
    pub(crate) fn partial_path(&self, digest: &Digest) -> PathBuf {
        self.ingest.join(format!("{}.partial", digest.hex()))
    }

    /// A name for something on its way, unused by any other.
    pub(crate) fn scratch_path(&self, what: &str) -> PathBuf {
        self.ingest
            .join(format!("{what}-{}", SERIAL.fetch_add(1, Ordering::Relaxed)))
    }

    /// Whether the blob is there.
    pub fn has(&self, digest: &Digest) -> bool {
        self.path(digest).exists()
    }

    /// The size of a blob.
    pub fn size(&self, digest: &Digest) -> Option<u64> {
        fs::metadata(self.path(digest)).ok().map(|m| m.len())
    }

    /// Opens a blob.
    ///
    /// # Errors
    /// [`Error::NoSuchBlob`].
    pub fn reader(&self, digest: &Digest) -> Result<File> {
        File::open(self.path(digest)).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::NoSuchBlob(*digest),
            _ => Error::Io {
                what: self.path(digest).display().to_string(),
                source: error,
            },
        })
    }

    /// Reads a small blob (a manifest or a configuration) whole.
    ///
    /// # Errors
    /// [`Error::Malformed`] where it is larger than such documents may be.
    pub fn read(&self, digest: &Digest) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let path = self.path(digest);
        self.reader(digest)?
            .take(crate::config::MAX_DOCUMENT + 1)
            .read_to_end(&mut bytes)
            .at(&path)?;
        if bytes.len() as u64 > crate::config::MAX_DOCUMENT {
            return Err(Error::malformed(
                digest.to_string(),
                "too large for a manifest or configuration",
            ));
        }
        Ok(bytes)
    }

    /// Stores a small blob.
    pub fn put(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        if self.size(&digest) == Some(bytes.len() as u64) {
            return Ok(digest);
        }
        let path = self.path(&digest);
        base::file::write_atomic(&path, bytes, base::file::Durability::Host).at(&path)?;
        Ok(digest)
    }

    /// Begins a blob.
    pub fn writer(&self) -> Result<BlobWriter<'_>> {
        let path = self.scratch_path("blob");
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .at(&path)?;
        Ok(BlobWriter {
            content: self,
            path,
            file: BufWriter::with_capacity(256 << 10, file),
            hasher: Hasher::default(),
            bytes: 0,
            kept: false,
        })
    }

    /// Moves a verified file into its place.
    pub(crate) fn adopt(&self, path: &Path, digest: &Digest) -> Result<()> {
        let target = self.path(digest);
        fs::rename(path, &target).at(&target)
    }

    pub(crate) fn remove(&self, digest: &Digest) -> Result<u64> {
        let path = self.path(digest);
        let size = self.size(digest).unwrap_or(0);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            other => other.at(&path).map(|()| size),
        }
    }

    /// Everything that is there.
    pub fn list(&self) -> Result<Vec<Digest>> {
        Ok(fs::read_dir(&self.blobs)
            .at(&self.blobs)?
            .flatten()
            .filter_map(|entry| Digest::from_hex(entry.file_name().to_str()?).ok())
            .collect())
    }

    pub(crate) fn remove_partials(&self, keep: impl Fn(&Digest) -> bool) -> u64 {
        let mut freed = 0;
        for entry in fs::read_dir(&self.ingest).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let digest = name
                .to_str()
                .and_then(|n| n.strip_suffix(".partial"))
                .map(Digest::from_hex);
            if let Some(Ok(digest)) = digest
                && !keep(&digest)
            {
                freed += entry.metadata().map_or(0, |m| m.len());
                let _ = fs::remove_file(entry.path());
            }
        }
        freed
    }

    /// Reads a blob again and says whether it still is what its name says.
    pub(crate) fn is_whole(&self, digest: &Digest) -> bool {
        let Ok(mut file) = self.reader(digest) else {
            return false;
        };
        let mut hasher = Hasher::default();
        let mut buffer = vec![0; 256 << 10];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return hasher.finish() == *digest,
                Ok(read) => hasher.update(&buffer[..read]),
                Err(_) => return false,
            }
        }
    }
}

/// A blob being written. Dropped before [`BlobWriter::commit`], it leaves nothing.
pub struct BlobWriter<'a> {
    content: &'a Content,
    path: PathBuf,
    file: BufWriter<File>,
    hasher: Hasher,
    bytes: u64,
    kept: bool,
}

impl BlobWriter<'_> {
    /// Puts the blob in its place if it is what was promised; returns its digest and size. The lease holds it from
    /// before it is seen.
    ///
    /// # Errors
    /// [`Error::DigestMismatch`]; then nothing is kept.
    pub fn commit(
        mut self,
        expected: Option<Digest>,
        lease: &super::Lease,
    ) -> Result<(Digest, u64)> {
        self.file.flush().at(&self.path)?;
        let actual = std::mem::take(&mut self.hasher).finish();
        if let Some(expected) = expected
            && expected != actual
        {
            return Err(Error::DigestMismatch {
                what: "blob".to_owned(),
                expected,
                actual,
            });
        }
        lease.hold(actual);
        self.content.adopt(&self.path, &actual)?;
        self.kept = true;
        Ok((actual, self.bytes))
    }
}

impl Write for BlobWriter<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.file.write(buffer)?;
        self.hasher.update(&buffer[..written]);
        self.bytes += written as u64;
        Ok(written)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for BlobWriter<'_> {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.path);
        }
    }
}
