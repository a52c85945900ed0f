//! Kernels that were unpacked before, kept in the user's cache folder: unpacking takes longer than all the rest of a start.
//!
//! An entry is named after the kernel file as it is: device, inode, size and times. It is written whole or not at all,
//! and readable by its user alone, who could as well change the kernel itself.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use base::file::{Durability, write_atomic};

use super::{BootError, Kernel, Protocol};

/// Older entries make way.
const KEPT: usize = 6;

fn folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let cache = set("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(set("HOME")?).join(".cache")))?;
    cache.is_absolute().then(|| cache.join("berth/kernels"))
}

fn name_of(kernel: &Path) -> io::Result<String> {
    let about = fs::metadata(kernel)?;
    Ok(format!(
        "{:x}-{:x}-{:x}-{:x}-{:x}",
        about.dev(),
        about.ino(),
        about.len(),
        about.mtime_nsec() as i128 + i128::from(about.mtime()) * 1_000_000_000,
        about.ctime_nsec() as i128 + i128::from(about.ctime()) * 1_000_000_000,
    ))
}

/// Whether a folder is ours alone: others could put a kernel there.
fn is_ours(folder: &Path) -> bool {
    fs::metadata(folder).is_ok_and(|about| {
        about.uid() == rustix::process::geteuid().as_raw() && about.mode() & 0o022 == 0
    })
}

/// [`Kernel::open`], by way of the cache where there is one.
///
/// # Errors
/// As [`Kernel::open`]; a cache that cannot be used is none.
pub fn open(path: &Path, protocol: Protocol) -> Result<Kernel, BootError> {
    let entry = folder().and_then(|folder| {
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder);
        made.ok()?;
        is_ours(&folder).then_some(())?;
        Some(folder.join(name_of(path).ok()?))
    });
    let (Some(entry), false) = (entry, protocol == Protocol::BzImage) else {
        return Kernel::open(path, protocol);
    };
    if entry.is_file()
        && let Ok(kernel) = Kernel::open_unpacked(path, &entry)
    {
        return Ok(kernel);
    }
    let kernel = Kernel::open(path, protocol)?;
    if let Some(plain) = kernel.unpacked() {
        // The guest does not wait for this: what is lost in a crash is unpacked again.
        let _ = write_atomic(&entry, plain, Durability::Process);
        make_way(&entry);
    }
    Ok(kernel)
}

fn make_way(newest: &Path) {
    let Some(folder) = newest.parent() else {
        return;
    };
    let mut entries: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .filter(|(_, path)| path != newest)
        .collect();
    entries.sort();
    let excess = (entries.len() + 1).saturating_sub(KEPT);
    for (_, path) in entries.into_iter().take(excess) {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_kernel_has_another_entry() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kernel");
        fs::write(&path, "one").unwrap();
        let first = name_of(&path).unwrap();
        assert_eq!(first, name_of(&path).unwrap());
        fs::write(&path, "three").unwrap();
        assert_ne!(first, name_of(&path).unwrap());
    }

    #[test]
    fn the_oldest_entries_make_way() {
        let directory = tempfile::tempdir().unwrap();
        for number in 0..KEPT + 3 {
            let path = directory.path().join(number.to_string());
            fs::write(&path, "x").unwrap();
            let then =
                std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(number as u64);
            fs::File::open(&path).unwrap().set_modified(then).unwrap();
        }
        let newest = directory.path().join((KEPT + 2).to_string());
        make_way(&newest);
        assert!(newest.exists() && !directory.path().join("0").exists());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), KEPT);
    }
}
