//! Images as the daemon's clients see them: what is stored, where it came from, and who uses it.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use tokio::io::AsyncRead;

use crate::Engine;
use crate::container::inspect::GraphDriver;
use crate::container::{ContainerConfig, TarStream};
use crate::error::{Error, Result};
use crate::filters::Filters;
use crate::progress::{Cancel, Progress};
use crate::wire::wire;

wire! {
    /// One row of `GET /images/json`.
    pub struct ImageSummary {
        /// Containers made from it; -1 where not counted.
        pub containers: i64,
        /// Seconds since 1970.
        pub created: i64,
        pub id: String,
        pub labels: Option<BTreeMap<String, String>>,
        pub parent_id: String,
        pub repo_digests: Vec<String>,
        pub repo_tags: Vec<String>,
        /// Bytes of layers that other images have too; -1 where not computed.
        pub shared_size: i64,
        /// Bytes of all layers, unpacked.
        pub size: u64,
    }

    /// The answer of `GET /images/X/json`.
    pub struct ImageInspect {
        pub id: String,
        pub repo_tags: Vec<String>,
        pub repo_digests: Vec<String>,
        pub parent: String,
        pub comment: String,
        pub created: String,
        pub docker_version: String,
        pub author: String,
        pub config: ContainerConfig,
        pub architecture: String,
        #[serde(skip_serializing_if = "String::is_empty")]
        pub variant: String,
        pub os: String,
        #[serde(skip_serializing_if = "String::is_empty")]
        pub os_version: String,
        /// Bytes of all layers, unpacked.
        pub size: u64,
        pub graph_driver: GraphDriver,
        #[serde(rename = "RootFS")]
        pub root_fs: RootFs,
        pub metadata: ImageMetadata,
    }

    /// The layers of an image, lowest first, by the digest of the uncompressed archive.
    pub struct RootFs {
        #[serde(rename = "Type")]
        pub kind: String,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        pub layers: Vec<String>,
    }

    /// What this host knows of an image beside its content.
    pub struct ImageMetadata {
        pub last_tag_time: String,
    }

    /// One row of `GET /images/X/history`, newest first.
    pub struct HistoryItem {
        pub id: String,
        /// Seconds since 1970.
        pub created: i64,
        pub created_by: String,
        pub tags: Option<Vec<String>>,
        pub size: u64,
        pub comment: String,
    }

    /// One step of a removal: a name taken off, or content deleted.
    pub struct ImageDeleted {
        #[serde(skip_serializing_if = "String::is_empty")]
        pub untagged: String,
        #[serde(skip_serializing_if = "String::is_empty")]
        pub deleted: String,
    }

    /// The answer of `POST /images/prune`.
    pub struct ImagesPruned {
        pub images_deleted: Option<Vec<ImageDeleted>>,
        /// Bytes.
        pub space_reclaimed: u64,
    }
}

/// Who asks a registry.
#[derive(Clone, Default)]
pub struct Credentials {
    pub username: String,
    pub password: String,
    /// An OAuth refresh token in place of a password.
    pub identity_token: String,
    /// A bearer token, sent as it is.
    pub registry_token: String,
}

/// An archive going in.
pub type ArchiveReader = Pin<Box<dyn AsyncRead + Send>>;

/// How an archive of a file system becomes an image.
#[derive(Debug, Clone, Default)]
pub struct ImportOptions {
    pub repository: String,
    pub tag: String,
    pub message: String,
    /// `os/arch[/variant]`; empty is this host's.
    pub platform: String,
    /// Dockerfile instructions over an empty configuration.
    pub changes: Vec<String>,
}

fn absent<T>() -> Result<T> {
    Err(Error::Unsupported(
        "the image store is not in this build".into(),
    ))
}

impl Engine {
    /// How many images there are.
    pub async fn image_count(&self) -> Result<u64> {
        Ok(0)
    }

    /// Bytes of all layers, each once.
    pub async fn layers_size(&self) -> Result<u64> {
        Ok(0)
    }

    /// All images that pass `dangling`, `reference`, `label`, `label!`, `before`, `since`, `until`, newest first.
    pub async fn list_images(
        self: &Arc<Self>,
        all: bool,
        filters: Filters,
        shared_size: bool,
    ) -> Result<Vec<ImageSummary>> {
        let _ = (all, filters, shared_size);
        Ok(Vec::new())
    }

    /// Everything about one image, by name, id or an id's beginning.
    pub async fn inspect_image(self: &Arc<Self>, name: &str) -> Result<ImageInspect> {
        let _ = name;
        absent()
    }

    /// How it was made.
    pub async fn image_history(self: &Arc<Self>, name: &str) -> Result<Vec<HistoryItem>> {
        let _ = name;
        absent()
    }

    /// Gives it another name.
    pub async fn tag_image(
        self: &Arc<Self>,
        name: &str,
        repository: &str,
        tag: &str,
    ) -> Result<()> {
        let _ = (name, repository, tag);
        absent()
    }

    /// Takes a name off, and deletes the image with its last one.
    pub async fn remove_image(
        self: &Arc<Self>,
        name: &str,
        force: bool,
        prune: bool,
    ) -> Result<Vec<ImageDeleted>> {
        let _ = (name, force, prune);
        absent()
    }

    /// Removes images without names that nothing uses; with `dangling=false` named ones too.
    pub async fn prune_images(self: &Arc<Self>, filters: Filters) -> Result<ImagesPruned> {
        let _ = filters;
        absent()
    }

    /// Fetches an image from its registry.
    pub async fn pull_image(
        self: &Arc<Self>,
        name: &str,
        platform: &str,
        credentials: Credentials,
        progress: Arc<dyn Progress>,
        cancel: Cancel,
    ) -> Result<()> {
        let _ = (name, platform, credentials, progress, cancel);
        absent()
    }

    /// Sends an image to its registry.
    pub async fn push_image(
        self: &Arc<Self>,
        name: &str,
        tag: &str,
        credentials: Credentials,
        progress: Arc<dyn Progress>,
        cancel: Cancel,
    ) -> Result<()> {
        let _ = (name, tag, credentials, progress, cancel);
        absent()
    }

    /// Reads images of an archive, Docker's or OCI's; answers their names (or ids).
    pub async fn load_images(
        self: &Arc<Self>,
        archive: ArchiveReader,
        progress: Arc<dyn Progress>,
        cancel: Cancel,
    ) -> Result<Vec<String>> {
        let _ = (archive, progress, cancel);
        absent()
    }

    /// An archive of images.
    pub async fn save_images(self: &Arc<Self>, names: Vec<String>) -> Result<TarStream> {
        let _ = names;
        absent()
    }

    /// Makes an image of an archive of a file system; answers its id.
    pub async fn import_image(
        self: &Arc<Self>,
        archive: ArchiveReader,
        options: ImportOptions,
        progress: Arc<dyn Progress>,
        cancel: Cancel,
    ) -> Result<String> {
        let _ = (archive, options, progress, cancel);
        absent()
    }

    /// What a registry has under a name: `{"Descriptor": …, "Platforms": […]}`.
    pub async fn distribution(
        self: &Arc<Self>,
        name: &str,
        credentials: Credentials,
    ) -> Result<serde_json::Value> {
        let _ = (name, credentials);
        absent()
    }

    /// Tries credentials at a registry; answers the token to keep in place of the password, or the empty text.
    pub async fn authenticate(
        self: &Arc<Self>,
        server: &str,
        credentials: Credentials,
    ) -> Result<String> {
        let _ = (server, credentials);
        absent()
    }
}
