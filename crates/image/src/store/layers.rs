//! Unpacked layers, one folder per chain id.
//!
//! A layer is keyed by its chain, not by its own digest alone, because a tar may lack entries for folders it puts
//! files in: their owner and mode come from the layers beneath.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base::file::{Durability, read_json, write_json};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::{Inner, Lease, State, Store};
use crate::error::At;
use crate::layer::apply::{Applied, apply};
use crate::layer::merged::Stack;
use crate::layer::{compression, tree, unpack};
use crate::manifest::{Descriptor, media};
use crate::progress::Cancel;
use crate::{Digest, Error, Result};

/// An unpacked layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerInfo {
    pub chain_id: Digest,
    pub diff_id: Digest,
    pub parent: Option<Digest>,
    /// Bytes of its files.
    pub size: u64,
    /// It hides everything beneath it. overlayfs takes no such mark at a layer's root, so the chain is cut here.
    #[serde(default)]
    pub hides_beneath: bool,
    #[serde(skip)]
    pub(crate) number: u64,
}

impl LayerInfo {
    /// The folder overlayfs stacks.
    pub fn folder(&self, store: &Path) -> PathBuf {
        store
            .join("layers")
            .join(self.number.to_string())
            .join("fs")
    }
}

pub(super) fn load(inner: &Inner, state: &mut State, suspects: &[Digest]) -> Result<()> {
    let directory = inner.directory.join("layers");
    for entry in fs::read_dir(&directory).at(&directory)?.flatten() {
        let number = entry
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<u64>().ok());
        let record = number.and_then(|number| {
            let mut info = read_json::<LayerInfo>(&entry.path().join("layer.json")).ok()??;
            info.number = number;
            Some(info)
        });
        match record {
            Some(info) if !suspects.contains(&info.chain_id) => {
                state.next_layer = state.next_layer.max(info.number + 1);
                state.layers.insert(info.chain_id, Arc::new(info));
            }
            _ => {
                if let Err(error) = tree::remove_all(&entry.path()) {
                    tracing::warn!(path = %entry.path().display(), %error, "a half-made layer could not be removed");
                }
            }
        }
    }
    Ok(())
}

impl State {
    /// The folders of a chain given topmost first, as overlayfs' `lowerdir` lists them.
    pub(crate) fn folders<'a>(
        &self,
        store: &Path,
        chain: impl IntoIterator<Item = &'a Digest>,
    ) -> Result<Vec<PathBuf>> {
        let mut folders = Vec::new();
        for id in chain {
            let info = self.layers.get(id).ok_or(Error::NoSuchBlob(*id))?;
            folders.push(info.folder(store));
            if info.hides_beneath {
                break;
            }
        }
        Ok(folders)
    }
}

/// A layer that was unpacked but has no place in a chain yet.
pub struct Staged {
    scratch: tree::Scratch,
    pub applied: Applied,
}

impl Store {
    /// The layer with this chain id, if it is unpacked.
    pub fn layer(&self, chain: &Digest) -> Option<Arc<LayerInfo>> {
        self.state().layers.get(chain).cloned()
    }

    /// Unpacks a layer from its bytes, compressed or not. `lowest`: it is the first of its chain.
    ///
    /// # Errors
    /// What [`apply`] refuses, and [`Error::DigestMismatch`] where the content is not `expected`. Nothing is left.
    pub fn stage<R: Read + Send>(
        &self,
        source: R,
        lowest: bool,
        expected: Option<Digest>,
        cancel: &Cancel,
    ) -> Result<Staged> {
        let path = self.0.content.scratch_path("layer");
        let scratch = tree::Scratch::create(path.clone()).at(&path)?;
        let root = path.join("fs");
        fs::create_dir(&root).at(&root)?;
        rustix::fs::chmod(&root, Mode::from_raw_mode(0o755)).at(&root)?;
        let applied = apply(source, &root, lowest, self.0.limits, cancel)?;
        if let Some(expected) = expected
            && expected != applied.diff_id
        {
            return Err(Error::DigestMismatch {
                what: "an uncompressed layer".to_owned(),
                expected,
                actual: applied.diff_id,
            });
        }
        Ok(Staged { scratch, applied })
    }

    /// Puts an unpacked layer on top of the chain `parent`. Where that layer is there already, the new one is dropped.
    pub fn place(
        &self,
        staged: Staged,
        parent: Option<Digest>,
        lease: &Lease,
    ) -> Result<Arc<LayerInfo>> {
        let diff_id = staged.applied.diff_id;
        let chain_id = Digest::chain(parent, diff_id);
        lease.hold(chain_id);
        if let Some(existing) = self.layer(&chain_id) {
            return Ok(existing);
        }
        if let Some(parent) = parent {
            let stack = Stack::open(&self.chain_folders(parent)?).at(&self.0.directory)?;
            inherit(&staged, &stack)?;
        }
        let mut info = LayerInfo {
            chain_id,
            diff_id,
            parent,
            size: staged.applied.unpacked.size,
            hides_beneath: staged.applied.unpacked.hides_beneath,
            number: 0,
        };
        let record = staged.scratch.path().join("layer.json");
        write_json(&record, &info, Durability::Process).at(&record)?;
        let mut state = self.state();
        if let Some(existing) = state.layers.get(&chain_id) {
            return Ok(existing.clone());
        }
        info.number = state.next_layer;
        let target = self
            .0
            .directory
            .join("layers")
            .join(info.number.to_string());
        staged.scratch.keep_as(&target).at(&target)?;
        state.next_layer += 1;
        let info = Arc::new(info);
        state.layers.insert(chain_id, info.clone());
        state.fresh.insert(chain_id);
        Ok(info)
    }

    /// The folders of a chain, topmost first.
    pub(crate) fn chain_folders(&self, top: Digest) -> Result<Vec<PathBuf>> {
        let state = self.state();
        let mut chain = Vec::new();
        let mut next = Some(top);
        while let Some(id) = next {
            chain.push(id);
            next = state.layers.get(&id).ok_or(Error::NoSuchBlob(id))?.parent;
        }
        state.folders(&self.0.directory, &chain)
    }

    /// Makes a layer on top of `parent` from an uncompressed tar: hashed, compressed into a blob and unpacked in one
    /// pass.
    pub fn layer_from_tar<R: Read + Send>(
        &self,
        tar: R,
        parent: Option<Digest>,
        lease: &Lease,
        cancel: &Cancel,
    ) -> Result<(Arc<LayerInfo>, Descriptor)> {
        let blob = self.0.content.writer()?;
        let (to_blob, from_tee) = std::sync::mpsc::sync_channel::<bytes::Bytes>(8);
        let (staged, blob) = std::thread::scope(|scope| {
            let compressing = scope.spawn(move || -> io::Result<_> {
                let mut sink = compression::gzip(blob);
                for chunk in from_tee {
                    sink.write_all(&chunk)?;
                }
                sink.finish()
            });
            let tee = Tee {
                source: tar,
                copy: to_blob,
            };
            let staged = self.stage(tee, parent.is_none(), None, cancel);
            (staged, compressing.join())
        });
        let staged = staged?;
        let blob =
            blob.map_err(|_| Error::DamagedLayer("the compressing thread failed".to_owned()))?;
        let blob = blob.doing(|| "writing a layer's blob".to_owned())?;
        // The inflater would have undone a compression that the diff must not have.
        if staged.applied.compression != compression::Compression::None {
            return Err(Error::Invalid(
                "an uncompressed tar is wanted here".to_owned(),
            ));
        }
        let (digest, size) = blob.commit(None, lease)?;
        let mut state = self.state();
        state.fresh.insert(digest);
        drop(state);
        let info = self.place(staged, parent, lease)?;
        Ok((info, Descriptor::new(media::OCI_LAYER_GZIP, digest, size)))
    }

    /// Stores a stream as a blob without unpacking it.
    pub fn put_stream(
        &self,
        mut source: impl Read,
        expected: Option<Digest>,
        lease: &Lease,
    ) -> Result<(Digest, u64)> {
        let mut blob = self.0.content.writer()?;
        let mut buffer = vec![0; 256 << 10];
        let mut until_check = 0usize;
        loop {
            if until_check == 0 {
                until_check = 256;
                let directory = fs::File::open(&self.0.directory).at(&self.0.directory)?;
                if tree::free_bytes(&directory).is_ok_and(|free| free < self.0.limits.keep_free) {
                    return Err(Error::NoRoom(
                        "the disk of the image store is nearly full".to_owned(),
                    ));
                }
            }
            until_check -= 1;
            let read = source
                .read(&mut buffer)
                .doing(|| "reading a blob".to_owned())?;
            if read == 0 {
                break;
            }
            blob.write_all(&buffer[..read])
                .doing(|| "writing a blob".to_owned())?;
        }
        let (digest, size) = blob.commit(expected, lease)?;
        self.state().fresh.insert(digest);
        Ok((digest, size))
    }
}

/// Passes a stream on and keeps a copy going another way.
struct Tee<R> {
    source: R,
    copy: std::sync::mpsc::SyncSender<bytes::Bytes>,
}

impl<R: Read> Read for Tee<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        if read > 0
            && self
                .copy
                .send(bytes::Bytes::copy_from_slice(&buffer[..read]))
                .is_err()
        {
            return Err(io::Error::other("the blob could not be written"));
        }
        Ok(read)
    }
}

/// Gives the folders the tar did not describe the owner, mode and attributes they have beneath.
fn inherit(staged: &Staged, stack: &Stack) -> Result<()> {
    let root_path = staged.scratch.path().join("fs");
    let root = tree::open_root(&root_path).at(&root_path)?;
    // The lowest folders come last: giving a folder its mode must not change its parent's time.
    for path in staged.applied.unpacked.implied.iter().rev() {
        let at = || format!("layer folder {:?}", unpack::lossy(path));
        let Some(found) = stack.find(path).doing(at)? else {
            continue;
        };
        if tree::file_type(&found.stat) != rustix::fs::FileType::Directory {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        let Ok(target) = tree::open_in(&root, path, flags) else {
            continue;
        };
        let source = rustix::fs::openat(
            &found.parent,
            &*found.name,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .doing(at)?;
        copy_description(&source, &target).doing(at)?;
    }
    Ok(())
}

/// Copies owner, mode, times and attributes, but not overlayfs' own, from one folder to another.
pub(crate) fn copy_description(source: impl AsFd, target: impl AsFd) -> io::Result<()> {
    let (source, target) = (source.as_fd(), target.as_fd());
    let stat = rustix::fs::fstat(source)?;
    if rustix::process::geteuid().is_root() {
        rustix::fs::fchown(
            target,
            Some(rustix::fs::Uid::from_raw(stat.st_uid)),
            Some(rustix::fs::Gid::from_raw(stat.st_gid)),
        )?;
    }
    rustix::fs::fchmod(target, Mode::from_raw_mode(stat.st_mode))?;
    for (name, value) in tree::attributes(&tree::proc_path(source))? {
        if !crate::layer::is_overlay_attribute(&name) && !name.starts_with(b"security.") {
            let _ = unpack::set_attribute(target, &name, &value);
        }
    }
    rustix::fs::futimens(
        target,
        &unpack::times((stat.st_mtime, stat.st_mtime_nsec as u32)),
    )?;
    Ok(())
}
