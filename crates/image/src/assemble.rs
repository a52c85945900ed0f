//! New images from what is in the store: a container's changes (`commit`), a plain tar (`import`), or layers.

use std::io::{BufReader, Read};

use crate::config::{History, ImageConfig, RunConfig};
use crate::layer::compression;
use crate::manifest::{Descriptor, Manifest, media};
use crate::progress::Cancel;
use crate::store::{NewImage, Store};
use crate::{Digest, Error, ImageId, Platform, Reference, Result};

/// How to commit a container.
#[derive(Debug, Clone, Default)]
pub struct CommitOptions {
    /// The new image's name.
    pub reference: Option<Reference>,
    pub author: String,
    pub comment: String,
    /// How to run it; without, as the image the snapshot began as.
    pub config: Option<RunConfig>,
    /// Dockerfile instructions (`CMD ["x"]`) applied to the configuration.
    pub changes: Vec<String>,
    /// The command the container ran, for the history.
    pub created_by: String,
}

/// How to import a plain tar.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    pub reference: Option<Reference>,
    pub message: String,
    /// Dockerfile instructions applied to the configuration.
    pub changes: Vec<String>,
    /// This host's where not given.
    pub platform: Option<Platform>,
}

impl Store {
    /// Makes an image of `config`, whose layers are in the store with these blobs, lowest first.
    ///
    /// # Errors
    /// Those of [`Store::register`].
    pub fn assemble(
        &self,
        config: &ImageConfig,
        blobs: Vec<Descriptor>,
        parent: Option<ImageId>,
        references: &[Reference],
    ) -> Result<ImageId> {
        let config = config.to_bytes();
        let manifest = Manifest::new(Descriptor::of(media::OCI_CONFIG, &config), blobs.clone());
        let manifest = serde_json::to_vec(&manifest)
            .map_err(|e| Error::malformed("a manifest made here", e))?;
        self.register(
            NewImage {
                config,
                manifest,
                manifest_type: media::OCI_MANIFEST.to_owned(),
                blobs,
                parent,
            },
            references,
        )
    }

    /// Makes an image of a snapshot: its image's layers, and one with what was changed.
    ///
    /// # Errors
    /// [`Error::NoSuchSnapshot`]; [`Error::Dockerfile`] for changes that are no instructions.
    pub fn commit(&self, key: &str, options: &CommitOptions) -> Result<ImageId> {
        let lease = self.lease();
        let base = self.snapshot_image(key)?;
        let (mut config, mut blobs) = match &base {
            Some(image) => (
                ImageConfig::clone(&image.config),
                image
                    .record
                    .layers
                    .iter()
                    .map(|l| l.blob.clone())
                    .collect::<Vec<_>>(),
            ),
            None => (ImageConfig::blank(&Platform::host()), Vec::new()),
        };
        let (layer, blob) = self.layer_from_snapshot(key, &lease, &Cancel::default())?;
        let mut run = options.config.clone().unwrap_or_else(|| config.run());
        crate::build::apply_changes(&mut run, &options.changes)?;
        config.config = Some(run);
        let now = base::time::now_rfc3339_nano();
        config.created = Some(now.clone());
        config.author.clone_from(&options.author);
        config.rootfs.diff_ids.push(layer.diff_id);
        config.history.push(History {
            created: Some(now),
            created_by: options.created_by.clone(),
            author: options.author.clone(),
            comment: options.comment.clone(),
            empty_layer: false,
        });
        blobs.push(blob);
        let references: Vec<Reference> = options
            .reference
            .iter()
            .cloned()
            .map(Reference::or_latest)
            .collect();
        self.assemble(&config, blobs, base.map(|image| image.id), &references)
    }

    fn snapshot_image(&self, key: &str) -> Result<Option<crate::Image>> {
        let found = self.snapshots().into_iter().find(|(k, _)| k == key);
        match found {
            None => Err(Error::NoSuchSnapshot(key.to_owned())),
            Some((_, None)) => Ok(None),
            Some((_, Some(id))) => self.inspect(&id.to_string()).map(Some).map_err(|_| {
                Error::Conflict(format!(
                    "the image {} the container was made of is gone",
                    id.short()
                ))
            }),
        }
    }

    /// Makes an image with one layer of a plain tar, compressed or not (`docker import`).
    ///
    /// # Errors
    /// What the unpacker refuses; nothing is left.
    pub fn import<R: Read + Send>(
        &self,
        tar: R,
        options: &ImportOptions,
        cancel: &Cancel,
    ) -> Result<ImageId> {
        let mut config =
            ImageConfig::blank(&options.platform.clone().unwrap_or_else(Platform::host));
        let mut run = RunConfig::default();
        crate::build::apply_changes(&mut run, &options.changes)?;
        config.config = Some(run);
        let now = base::time::now_rfc3339_nano();
        config.created = Some(now.clone());
        let comment = if options.message.is_empty() {
            "Imported from -".to_owned()
        } else {
            options.message.clone()
        };
        let history = History {
            created: Some(now),
            comment,
            ..History::default()
        };
        self.single_layer(
            tar,
            config,
            history,
            &options.reference.iter().cloned().collect::<Vec<_>>(),
            cancel,
        )
    }

    /// Makes an image with one layer of a tar.
    pub(crate) fn single_layer<R: Read + Send>(
        &self,
        tar: R,
        mut config: ImageConfig,
        history: History,
        references: &[Reference],
        cancel: &Cancel,
    ) -> Result<ImageId> {
        let lease = self.lease();
        let (_, reader) = compression::reader(BufReader::with_capacity(256 << 10, tar))?;
        let (layer, blob) = self.layer_from_tar(reader, None, &lease, cancel)?;
        config.rootfs.diff_ids = vec![layer.diff_id];
        config.history = vec![history];
        let references: Vec<Reference> = references
            .iter()
            .cloned()
            .map(Reference::or_latest)
            .collect();
        self.assemble(&config, vec![blob], None, &references)
    }

    /// The chain id on top of an image's layers; none for an image without layers.
    pub fn top_chain(&self, id: &ImageId) -> Result<Option<Digest>> {
        let state = self.state();
        let stored = state
            .images
            .get(id)
            .ok_or_else(|| Error::NoSuchImage(id.to_string()))?;
        Ok(stored.record.layers.last().map(|l| l.chain_id))
    }
}
