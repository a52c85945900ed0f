//! Snapshots: a container's own writable folder over an image's layers. Folders only: who runs the container mounts
//! them, in its own namespace.
//!
//! Overlays must be mounted with `redirect_dir=nofollow,metacopy=off,index=off` (what [`mount_detached`] does), so that
//! an upper folder alone says what was changed.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base::file::{Durability, read_json, write_json};
use rustix::fs::{FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::error::At;
use crate::layer::merged::Stack;
use crate::layer::{pack, tar::TarWriter, tree};
use crate::manifest::Descriptor;
use crate::progress::Cancel;
use crate::store::{Inner, LayerInfo, Lease, State, Store};
use crate::{Digest, Error, ImageId, Result};

/// The folders of one overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layers {
    /// Topmost first, as the mount option `lowerdir` lists them. May be empty (an image without layers).
    pub lower: Vec<PathBuf>,
    pub upper: PathBuf,
    pub work: PathBuf,
    /// Whether the overlay needs `userxattr`, because whoever unpacked it had no privileges.
    pub userxattr: bool,
}

/// What is kept of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// The image it began as; none for an empty one.
    pub image: Option<ImageId>,
    /// Chain ids of its layers, lowest first.
    pub chain: Vec<Digest>,
    pub created: String,
}

/// What a container wrote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of files, each counted once.
    pub bytes: u64,
    pub inodes: u64,
}

/// How a path differs from the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChangeKind {
    Modified = 0,
    Added = 1,
    Deleted = 2,
}

/// One line of `docker diff`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Absolute in the container.
    pub path: String,
    pub kind: ChangeKind,
}

pub(crate) fn load(inner: &Inner, state: &mut State) -> Result<()> {
    let directory = inner.directory.join("snapshots");
    for entry in fs::read_dir(&directory).at(&directory)?.flatten() {
        let record = read_json::<SnapshotRecord>(&entry.path().join("snapshot.json"));
        match (entry.file_name().into_string(), record) {
            (Ok(key), Ok(Some(record))) if !key.starts_with('.') => {
                state.snapshots.insert(key, Arc::new(record));
            }
            // The record is written last and removed first, so without it there is nothing to keep.
            (_, Ok(None)) => tree::remove_all(&entry.path()).at(&entry.path())?,
            (_, Err(error)) => {
                tracing::warn!(path = %entry.path().display(), %error, "unreadable snapshot left alone");
                state.incomplete = true;
            }
            _ => {}
        }
    }
    Ok(())
}

fn check_key(key: &str) -> Result<()> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    if key.is_empty() || key.len() > 128 || key.starts_with('.') || !key.bytes().all(good) {
        return Err(Error::Invalid(format!(
            "{key:?} is no snapshot key: letters, digits, _ . and - are wanted"
        )));
    }
    Ok(())
}

impl Store {
    /// Makes an empty writable folder over the layers of `image`.
    ///
    /// # Errors
    /// [`Error::SnapshotExists`], [`Error::NoSuchImage`].
    pub fn snapshot(&self, key: &str, image: &ImageId) -> Result<Layers> {
        let chain = {
            let state = self.state();
            let stored = state
                .images
                .get(image)
                .ok_or_else(|| Error::NoSuchImage(image.to_string()))?;
            stored.record.layers.iter().map(|l| l.chain_id).collect()
        };
        self.snapshot_of_chain(key, Some(*image), chain)
    }

    /// [`Store::snapshot`] over a chain of layers, lowest first, that need not be an image's.
    pub(crate) fn snapshot_of_chain(
        &self,
        key: &str,
        image: Option<ImageId>,
        chain: Vec<Digest>,
    ) -> Result<Layers> {
        check_key(key)?;
        let folder = self.snapshot_folder(key);
        let record = SnapshotRecord {
            image,
            chain,
            created: base::time::now_rfc3339(),
        };
        let lower = {
            let mut state = self.state();
            if state.snapshots.contains_key(key) {
                return Err(Error::SnapshotExists(key.to_owned()));
            }
            let lower = state.folders(&self.0.directory, record.chain.iter().rev())?;
            // From here on the collector leaves the layers alone.
            state
                .snapshots
                .insert(key.to_owned(), Arc::new(record.clone()));
            lower
        };
        let made = (|| {
            match fs::create_dir(&folder) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    tree::remove_all(&folder).at(&folder)?;
                    fs::create_dir(&folder).at(&folder)?;
                }
                other => other.at(&folder)?,
            }
            let layers = layers_in(&folder, lower);
            fs::create_dir(&layers.upper).at(&layers.upper)?;
            fs::create_dir(&layers.work).at(&layers.work)?;
            let upper = tree::open_root(&layers.upper).at(&layers.upper)?;
            // What the container sees as / has the upper folder's owner and mode.
            match layers.lower.first() {
                Some(top) => {
                    let top_fd = tree::open_root(top).at(top)?;
                    crate::store::copy_description(&top_fd, &upper).at(top)?;
                }
                None => rustix::fs::fchmod(&upper, Mode::from_raw_mode(0o755)).at(&layers.upper)?,
            }
            let path = folder.join("snapshot.json");
            // After a power cut a folder without it would be taken for one that was never finished.
            write_json(&path, &record, Durability::Host).at(&path)?;
            let all = self.0.directory.join("snapshots");
            fs::File::open(&all)
                .and_then(|all| all.sync_all())
                .at(&all)?;
            Ok(layers)
        })();
        if made.is_err() {
            self.state().snapshots.remove(key);
            let _ = tree::remove_all(&folder);
        }
        made
    }

    fn snapshot_folder(&self, key: &str) -> PathBuf {
        self.0.directory.join("snapshots").join(key)
    }

    fn snapshot_record(&self, key: &str) -> Result<Arc<SnapshotRecord>> {
        self.state()
            .snapshots
            .get(key)
            .cloned()
            .ok_or_else(|| Error::NoSuchSnapshot(key.to_owned()))
    }

    /// The folders of an existing snapshot.
    ///
    /// # Errors
    /// [`Error::NoSuchSnapshot`].
    pub fn snapshot_layers(&self, key: &str) -> Result<Layers> {
        let record = self.snapshot_record(key)?;
        let state = self.state();
        let lower = state.folders(&self.0.directory, record.chain.iter().rev())?;
        Ok(layers_in(&self.snapshot_folder(key), lower))
    }

    /// All snapshots' keys with the image each began as.
    pub fn snapshots(&self) -> Vec<(String, Option<ImageId>)> {
        self.state()
            .snapshots
            .iter()
            .map(|(key, record)| (key.clone(), record.image))
            .collect()
    }

    /// Removes a snapshot; one that is not there is success. Nothing may have it mounted any more.
    pub fn remove_snapshot(&self, key: &str) -> Result<()> {
        check_key(key)?;
        let folder = self.snapshot_folder(key);
        let record = folder.join("snapshot.json");
        match fs::remove_file(&record) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).at(&record),
            _ => {}
        }
        // Out of the way first: a new one by this key need not wait for the old one's files to go.
        let aside = self.0.content.scratch_path("removing");
        match fs::rename(&folder, &aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).at(&folder),
            _ => {}
        }
        self.state().snapshots.remove(key);
        tree::remove_all(&aside).at(&aside)
    }

    /// What the container wrote.
    ///
    /// # Errors
    /// [`Error::NoSuchSnapshot`].
    pub fn snapshot_usage(&self, key: &str) -> Result<Usage> {
        self.snapshot_record(key)?;
        let upper = self.snapshot_folder(key).join("upper");
        usage(&upper).at(&upper)
    }

    /// How the container's files differ from its image's, sorted by path.
    ///
    /// # Errors
    /// [`Error::NoSuchSnapshot`].
    pub fn snapshot_changes(&self, key: &str) -> Result<Vec<Change>> {
        let layers = self.snapshot_layers(key)?;
        let stack = Stack::open(&layers.lower).at(&self.0.directory)?;
        changes(&layers.upper, &stack).at(&layers.upper)
    }

    /// Makes a layer of what the container wrote, on top of the snapshot's chain.
    pub(crate) fn layer_from_snapshot(
        &self,
        key: &str,
        lease: &Lease,
        cancel: &Cancel,
    ) -> Result<(Arc<LayerInfo>, Descriptor)> {
        let record = self.snapshot_record(key)?;
        let upper_path = self.snapshot_folder(key).join("upper");
        let upper = tree::open_root(&upper_path).at(&upper_path)?;
        let (reader, writer) = io::pipe().doing(|| "a pipe".to_owned())?;
        let _ = rustix::pipe::fcntl_setpipe_size(&writer, 1 << 20);
        std::thread::scope(|scope| {
            let packing = scope.spawn(move || -> io::Result<()> {
                let mut tar = TarWriter::new(io::BufWriter::with_capacity(256 << 10, writer));
                pack::pack(upper.as_fd(), &mut tar, pack::Marks::Translate)?;
                tar.finish().map(drop)
            });
            let made = self.layer_from_tar(reader, record.chain.last().copied(), lease, cancel);
            match packing.join() {
                Ok(Ok(())) => made,
                // A broken pipe only repeats what the reader reports.
                Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe && made.is_err() => {
                    made
                }
                Ok(Err(error)) => Err(error).at(&upper_path),
                Err(_) => Err(Error::DamagedLayer("the packing thread failed".to_owned())),
            }
        })
    }
}

fn layers_in(folder: &Path, lower: Vec<PathBuf>) -> Layers {
    Layers {
        lower,
        upper: folder.join("upper"),
        work: folder.join("work"),
        userxattr: crate::layer::uses_user_xattrs(),
    }
}

pub(crate) fn usage(root: &Path) -> io::Result<Usage> {
    let root = tree::open_root(root)?;
    let mut seen = std::collections::HashSet::new();
    let mut usage = Usage::default();
    let mut pending: Vec<Vec<u8>> = vec![Vec::new()];
    while let Some(path) = pending.pop() {
        // A running container changes it under our eyes.
        let Ok(directory) = tree::open_in(
            &root,
            &path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW,
        ) else {
            continue;
        };
        for name in tree::names(&directory)? {
            let Some(stat) = tree::stat_at(&directory, name.as_bytes())? else {
                continue;
            };
            usage.inodes += 1;
            match tree::file_type(&stat) {
                FileType::Directory => pending.push(pack::join(&path, name.as_bytes())),
                FileType::RegularFile
                    if stat.st_nlink == 1 || seen.insert((stat.st_dev, stat.st_ino)) =>
                {
                    usage.bytes += stat.st_size.max(0) as u64;
                }
                _ => {}
            }
        }
    }
    Ok(usage)
}

fn changes(upper: &Path, lower: &Stack) -> io::Result<Vec<Change>> {
    let root = tree::open_root(upper)?;
    let mut found = Vec::new();
    let mut pending: Vec<Vec<u8>> = vec![Vec::new()];
    let mut note = |path: &[u8], kind| {
        let path = format!("/{}", String::from_utf8_lossy(path));
        found.push(Change { path, kind });
    };
    while let Some(path) = pending.pop() {
        let Ok(directory) = tree::open_in(
            &root,
            &path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW,
        ) else {
            continue;
        };
        let names = tree::names(&directory)?;
        if tree::is_opaque(directory.as_fd()) {
            for name in lower.names(&path)? {
                if !names.contains(&name) {
                    note(&pack::join(&path, name.as_bytes()), ChangeKind::Deleted);
                }
            }
        }
        for name in names {
            let Some(stat) = tree::stat_at(&directory, name.as_bytes())? else {
                continue;
            };
            let own = pack::join(&path, name.as_bytes());
            let beneath = lower.find(&own)?;
            if tree::is_whiteout(&stat) {
                if beneath.is_some() {
                    note(&own, ChangeKind::Deleted);
                }
                continue;
            }
            note(
                &own,
                if beneath.is_some() {
                    ChangeKind::Modified
                } else {
                    ChangeKind::Added
                },
            );
            if tree::file_type(&stat) == FileType::Directory {
                pending.push(own);
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Mounts an overlay that is attached nowhere: it lives as long as the descriptor, and no crash leaves it behind.
/// Nothing else may have the same upper folder mounted for writing. `writable: false` leaves the upper folder
/// readable only.
///
/// # Errors
/// [`Error::Io`]: without privileges (`CAP_SYS_ADMIN` in this mount namespace) overlays cannot be mounted.
pub fn mount_detached(layers: &Layers, writable: bool) -> Result<OwnedFd> {
    use rustix::mount::MountAttrFlags;
    let empty = layers.upper.with_file_name("empty");
    if layers.lower.is_empty() {
        // overlayfs wants something beneath.
        match fs::create_dir(&empty) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).at(&empty);
            }
            _ => {}
        }
    }
    let mut overlay = base::overlay::Overlay {
        lower: layers.lower.iter().map(PathBuf::as_path).collect(),
        writable: Some((&layers.upper, &layers.work)),
        tried: base::overlay::PLAIN.to_vec(),
        ..Default::default()
    };
    if overlay.lower.is_empty() {
        overlay.lower.push(&empty);
    }
    if layers.userxattr {
        overlay.options.push("userxattr");
    }
    let attributes = if writable {
        MountAttrFlags::empty()
    } else {
        MountAttrFlags::MOUNT_ATTR_RDONLY
    };
    overlay
        .mount(attributes)
        .doing(|| "mounting an overlay".to_owned())
}

/// Writes a merged file system, as [`mount_detached`] gives it, as a tar (`docker export`).
///
/// # Errors
/// Those of reading and of `sink`.
pub fn export(root: impl AsFd, sink: impl io::Write) -> Result<()> {
    let mut tar = TarWriter::new(io::BufWriter::with_capacity(256 << 10, sink));
    pack::pack(root.as_fd(), &mut tar, pack::Marks::Ignore)
        .and_then(|()| tar.finish().map(drop))
        .doing(|| "exporting a file system".to_owned())
}
