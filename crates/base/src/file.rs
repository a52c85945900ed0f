//! Files that hold either the old or the new content, whenever the machine stops.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Serialize, de::DeserializeOwned};

static COUNTER: AtomicU64 = AtomicU64::new(0);

/// How much a write must survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The death of this process: the rename is atomic, nothing is flushed.
    Process,
    /// A power cut: the data and the directory are flushed.
    Host,
}

/// Replaces `path` by a file with `bytes` and mode `0600`, atomically.
///
/// # Errors
/// Whatever the file system says; the old content then stands and no temporary file is left.
pub fn write_atomic(path: &Path, bytes: &[u8], durability: Durability) -> io::Result<()> {
    let directory = path.parent().ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, "the path has no parent folder")
    })?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let serial = COUNTER.fetch_add(1, Ordering::Relaxed);
    let temporary = directory.join(format!(".{name}.{}.{serial}.tmp", std::process::id()));
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        if durability == Durability::Host {
            file.sync_all()?;
        }
        fs::rename(&temporary, path)?;
        if durability == Durability::Host {
            File::open(directory)?.sync_all()?;
        }
        Ok(())
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// [`write_atomic`] of the JSON form of `value`.
pub fn write_json<T: Serialize>(path: &Path, value: &T, durability: Durability) -> io::Result<()> {
    write_atomic(path, &serde_json::to_vec(value)?, durability)
}

/// Reads a JSON record; `None` where the file does not exist.
///
/// # Errors
/// `InvalidData` with the path and the place in it where the JSON is broken.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{}: {error}", path.display()),
        )
    })
}

/// Removes what [`write_atomic`] of a process that died in the middle left in `directory`.
pub fn sweep_temporaries(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') && name.ends_with(".tmp") && entry.file_type()?.is_file() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_content_and_no_litter() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record.json");
        write_json(&path, &1u32, Durability::Host).unwrap();
        let blocked = directory.path().join("missing").join("record.json");
        assert!(write_json(&blocked, &2u32, Durability::Process).is_err());
        assert_eq!(read_json::<u32>(&path).unwrap(), Some(1));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn temporaries_of_a_dead_process_are_swept() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(".a.1.2.tmp"), b"half").unwrap();
        fs::write(directory.path().join("a"), b"whole").unwrap();
        sweep_temporaries(directory.path()).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
