//! The store: blobs, unpacked layers, images, their names, and snapshots, in one folder.
//!
//! ```text
//! DIR/lock                     held by the one process that uses the folder
//!     blobs/sha256/HEX         compressed layers, configurations, manifests
//!     ingest/                  what is on its way; HEX.partial: downloads that broke off
//!     layers/N/{layer.json,fs} unpacked layers; numbers keep overlayfs' mount options short
//!     images/HEX.json          one record per image, named by its id
//!     references.json          name → image id
//!     snapshots/KEY/{snapshot.json,upper,work}
//!     build-cache.json         see `build`
//! ```
//!
//! Lock order: `Inner::state` is the only lock held while files change hands; it is never held during hashing,
//! unpacking, removal of trees or network traffic.

mod content;
mod layers;
mod query;
mod removal;
mod settle;

pub use content::{BlobWriter, Content};
pub(crate) use layers::copy_description;
pub use layers::{LayerInfo, Staged};
pub(crate) use query::wildcard;
pub use query::{Filter, HistoryLine, Image};
pub use removal::{InUse, Pruned, RemoveOptions, Removed};

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use base::file::{Durability, read_json, sweep_temporaries, write_json};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::config::ImageConfig;
use crate::error::At;
use crate::manifest::{Descriptor, Document};
use crate::snapshot::SnapshotRecord;
use crate::{Digest, Error, ImageId, Reference, Result};

/// An image store. Clones share it; every method may be called from any thread, and blocks.
#[derive(Debug, Clone)]
pub struct Store(pub(crate) Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) directory: PathBuf,
    pub(crate) content: Content,
    pub(crate) state: Mutex<State>,
    /// Digests somebody is fetching or unpacking; others wait for them.
    busy: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
    pub(crate) limits: crate::layer::Limits,
    settling: AtomicBool,
    _lock: File,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) images: BTreeMap<ImageId, Arc<Stored>>,
    /// Canonical names, with a tag or with a digest.
    pub(crate) references: BTreeMap<String, ImageId>,
    pub(crate) layers: HashMap<Digest, Arc<LayerInfo>>,
    pub(crate) next_layer: u64,
    pub(crate) snapshots: BTreeMap<String, Arc<SnapshotRecord>>,
    leases: HashMap<u64, HashSet<Digest>>,
    next_lease: u64,
    /// Blobs and layers that were not flushed to the disk yet.
    pub(crate) fresh: HashSet<Digest>,
    /// A record could not be read: what it refers to is unknown, so nothing is collected.
    pub(crate) incomplete: bool,
}

/// A layer of an image: the blob it came from and what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRef {
    pub blob: Descriptor,
    pub diff_id: Digest,
    pub chain_id: Digest,
}

/// What is kept of an image besides its configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    pub manifest: Descriptor,
    pub layers: Vec<LayerRef>,
    /// Bytes of the unpacked layers.
    pub size: u64,
    /// The image it was built on, if it was built here.
    #[serde(default)]
    pub parent: Option<ImageId>,
    /// RFC 3339; when it came into this store.
    pub added: String,
    #[serde(default)]
    pub last_tagged: Option<String>,
}

#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) record: ImageRecord,
    pub(crate) config: Arc<ImageConfig>,
}

/// An image to be registered; its blobs and layers are in the store already.
#[derive(Debug, Clone)]
pub struct NewImage {
    /// The configuration document, byte for byte.
    pub config: Vec<u8>,
    /// The manifest document, byte for byte, and its media type.
    pub manifest: Vec<u8>,
    pub manifest_type: String,
    /// The blob of each layer, lowest first.
    pub blobs: Vec<Descriptor>,
    pub parent: Option<ImageId>,
}

impl Store {
    /// Opens the store in `directory`, making it where there is none, and removes what a dead process left half-done.
    ///
    /// # Errors
    /// [`Error::Conflict`] where another process has it open.
    pub fn open(directory: &Path) -> Result<Store> {
        for sub in ["layers", "images", "snapshots"] {
            let path = directory.join(sub);
            fs::create_dir_all(&path).at(&path)?;
        }
        // Layers hold setuid programs and devices: nobody else may walk in.
        rustix::fs::chmod(directory, rustix::fs::Mode::RWXU).at(directory)?;
        let lock_path = directory.join("lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .at(&lock_path)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Error::Conflict(format!(
                "the image store {} is in use by another process",
                directory.display()
            ))
        })?;
        let content = Content::open(directory)?;
        for sub in ["", "images", "blobs/sha256"] {
            let path = directory.join(sub);
            sweep_temporaries(&path).at(&path)?;
        }
        let store = Store(Arc::new(Inner {
            directory: directory.to_owned(),
            content,
            state: Mutex::default(),
            busy: Mutex::default(),
            limits: crate::layer::Limits::default(),
            settling: AtomicBool::new(false),
            _lock: lock,
        }));
        store.read_records()?;
        Ok(store)
    }

    fn read_records(&self) -> Result<()> {
        let suspects = settle::suspects(&self.0)?;
        let mut state = self.state();
        layers::load(&self.0, &mut state, &suspects)?;
        crate::snapshot::load(&self.0, &mut state)?;
        let directory = self.0.directory.join("images");
        for entry in fs::read_dir(&directory).at(&directory)?.flatten() {
            let name = entry.file_name();
            let Some(Ok(id)) = name
                .to_str()
                .and_then(|n| n.strip_suffix(".json"))
                .map(Digest::from_hex)
            else {
                continue;
            };
            let loaded = read_json::<ImageRecord>(&entry.path())
                .at(&entry.path())
                .and_then(|record| Ok((record, ImageConfig::parse(&self.0.content.read(&id)?)?)));
            match loaded {
                Ok((Some(record), config)) => {
                    state.images.insert(
                        id,
                        Arc::new(Stored {
                            record,
                            config: Arc::new(config),
                        }),
                    );
                }
                Ok((None, _)) => {}
                Err(error) => {
                    tracing::warn!(%id, %error, "an image record is unreadable and left out");
                    state.incomplete = true;
                }
            }
        }
        let path = self.0.directory.join("references.json");
        let references: BTreeMap<String, ImageId> = read_json(&path).at(&path)?.unwrap_or_default();
        state.references = references
            .into_iter()
            .filter(|(_, id)| state.images.contains_key(id))
            .collect();
        drop(state);
        settle::repair(self, &suspects)?;
        self.gc()?;
        Ok(())
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.state()
    }

    /// The folder of the store.
    pub fn directory(&self) -> &Path {
        &self.0.directory
    }

    /// The blobs.
    pub fn content(&self) -> &Content {
        &self.0.content
    }

    /// Keeps what it is told of from being collected until it is dropped.
    pub fn lease(&self) -> Lease {
        let mut state = self.state();
        state.next_lease += 1;
        let id = state.next_lease;
        state.leases.insert(id, HashSet::new());
        Lease {
            store: self.clone(),
            id,
        }
    }

    /// The lock of those who want to make the same blob or layer, so that one does and the others find it.
    pub(crate) fn busy(&self, digest: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut busy = self.0.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = busy.get(digest).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        busy.insert(*digest, Arc::downgrade(&lock));
        lock
    }

    /// Records an image whose layers and blobs are in the store, and names it.
    ///
    /// # Errors
    /// [`Error::Malformed`] where manifest and configuration do not fit each other, [`Error::NoSuchBlob`] where a
    /// part is missing.
    pub fn register(&self, new: NewImage, references: &[Reference]) -> Result<ImageId> {
        let config = ImageConfig::parse(&new.config)?;
        let wrong = |why: &str| Error::malformed("the image", why);
        let diffs = &config.rootfs.diff_ids;
        if diffs.len() != new.blobs.len() {
            return Err(wrong(
                "its configuration and its manifest name different numbers of layers",
            ));
        }
        match Document::parse(&new.manifest)? {
            Document::Manifest(manifest) if manifest.config.digest == Digest::of(&new.config) => {}
            _ => return Err(wrong("the manifest is not one of this configuration")),
        }
        // Until the record is made, nothing else refers to these two.
        let lease = self.lease();
        lease.hold(Digest::of(&new.config));
        lease.hold(Digest::of(&new.manifest));
        let id = self.0.content.put(&new.config)?;
        let manifest_digest = self.0.content.put(&new.manifest)?;
        let manifest = Descriptor::new(
            &new.manifest_type,
            manifest_digest,
            new.manifest.len() as u64,
        );
        let chains = Digest::chains(diffs);
        let mut state = self.state();
        let mut size = 0;
        let mut layers = Vec::new();
        for ((blob, diff_id), chain_id) in new.blobs.into_iter().zip(diffs).zip(chains) {
            let layer = state
                .layers
                .get(&chain_id)
                .ok_or_else(|| wrong("one of its layers was not unpacked"))?;
            if !self.0.content.has(&blob.digest) {
                return Err(Error::NoSuchBlob(blob.digest));
            }
            size += layer.size;
            layers.push(LayerRef {
                blob,
                diff_id: *diff_id,
                chain_id,
            });
        }
        let now = base::time::now_rfc3339();
        if !state.images.contains_key(&id) {
            let record = ImageRecord {
                manifest,
                layers,
                size,
                parent: new.parent,
                added: now,
                last_tagged: None,
            };
            settle::note(&self.0, &mut state, &record, &id)?;
            let path = self.record_path(&id);
            write_json(&path, &record, Durability::Host).at(&path)?;
            state.images.insert(
                id,
                Arc::new(Stored {
                    record,
                    config: Arc::new(config),
                }),
            );
        }
        if !references.is_empty() {
            let mut changed = state.references.clone();
            for reference in references {
                changed.insert(reference.to_string(), id);
            }
            self.write_references(&mut state, changed)?;
        }
        drop(state);
        settle::later(self);
        Ok(id)
    }

    pub(crate) fn record_path(&self, id: &ImageId) -> PathBuf {
        self.0
            .directory
            .join("images")
            .join(format!("{}.json", id.hex()))
    }

    pub(crate) fn write_references(
        &self,
        state: &mut State,
        changed: BTreeMap<String, ImageId>,
    ) -> Result<()> {
        let path = self.0.directory.join("references.json");
        write_json(&path, &changed, Durability::Host).at(&path)?;
        state.references = changed;
        Ok(())
    }

    /// Gives the image `name` another name.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`]; [`Error::Invalid`] where the new name has a digest.
    pub fn tag(&self, name: &str, reference: &Reference) -> Result<()> {
        if reference.digest().is_some() {
            return Err(Error::Invalid(
                "refusing to create a tag with a digest reference".to_owned(),
            ));
        }
        let id = self.resolve(name)?;
        let mut state = self.state();
        if !state.images.contains_key(&id) {
            return Err(Error::NoSuchImage(name.to_owned()));
        }
        let mut changed = state.references.clone();
        changed.insert(reference.clone().or_latest().to_string(), id);
        self.write_references(&mut state, changed)?;
        self.touch(&mut state, &id)
    }

    fn touch(&self, state: &mut State, id: &ImageId) -> Result<()> {
        let Some(stored) = state.images.get(id) else {
            return Ok(());
        };
        let record = ImageRecord {
            last_tagged: Some(base::time::now_rfc3339()),
            ..stored.record.clone()
        };
        let path = self.record_path(id);
        write_json(&path, &record, Durability::Host).at(&path)?;
        let config = stored.config.clone();
        state
            .images
            .insert(*id, Arc::new(Stored { record, config }));
        Ok(())
    }

    /// Moves a verified download into its place.
    pub(crate) fn adopt_blob(&self, path: &Path, digest: &Digest) -> Result<()> {
        self.0.content.adopt(path, digest)?;
        self.state().fresh.insert(*digest);
        Ok(())
    }

    /// A blob in the store that holds the layer `diff`.
    pub(crate) fn blob_of(&self, diff: &Digest) -> Option<Descriptor> {
        let state = self.state();
        state
            .images
            .values()
            .flat_map(|stored| &stored.record.layers)
            .find(|layer| layer.diff_id == *diff && self.0.content.has(&layer.blob.digest))
            .map(|layer| layer.blob.clone())
    }

    /// Other repositories of the same registry whose images hold `blob`.
    pub(crate) fn neighbours(&self, reference: &Reference, blob: &Digest) -> Vec<String> {
        let state = self.state();
        let mut found: Vec<String> = state
            .references
            .iter()
            // A name by digest says that the registry has it.
            .filter(|(name, _)| name.contains('@'))
            .filter_map(|(name, id)| Some((Reference::parse(name).ok()?, state.images.get(id)?)))
            .filter(|(other, stored)| {
                other.domain() == reference.domain()
                    && other.path() != reference.path()
                    && stored.record.layers.iter().any(|l| l.blob.digest == *blob)
            })
            .map(|(other, _)| other.path().to_owned())
            .collect();
        found.dedup();
        found
    }

    /// Notes that a registry knows the image by this digest.
    pub(crate) fn name_by_digest(&self, id: &ImageId, reference: &Reference) -> Result<()> {
        let mut state = self.state();
        let mut changed = state.references.clone();
        changed.insert(reference.to_string(), *id);
        self.write_references(&mut state, changed)
    }

    /// The folders of an image's layers, topmost first, as overlayfs' `lowerdir` lists them.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`].
    pub fn layer_folders(&self, id: &ImageId) -> Result<Vec<PathBuf>> {
        let state = self.state();
        let stored = state
            .images
            .get(id)
            .ok_or_else(|| Error::NoSuchImage(id.to_string()))?;
        let chain = stored.record.layers.iter().rev().map(|l| &l.chain_id);
        state.folders(&self.0.directory, chain)
    }
}

impl Inner {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    pub(crate) fn leased(&self, digest: &Digest) -> bool {
        self.leases.values().any(|held| held.contains(digest))
    }
}

/// Holds content that nothing refers to yet. Dropped, it lets it go.
#[derive(Debug)]
pub struct Lease {
    store: Store,
    id: u64,
}

impl Lease {
    /// Holds the blob, layer (by chain id) or image `digest`, whether it is there yet or not. A held image may lose its
    /// names, but is not deleted.
    pub fn hold(&self, digest: Digest) {
        if let Some(held) = self.store.state().leases.get_mut(&self.id) {
            held.insert(digest);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.store.state().leases.remove(&self.id);
    }
}
