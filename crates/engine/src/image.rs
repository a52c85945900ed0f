//! Images as the daemon's clients see them: what is stored, where it came from, and who uses it.

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::Arc;

use ::image::registry::{PullOptions, PushOptions, Pushed, Trust};
use ::image::store::{Filter, HistoryLine, Image, InUse, RemoveOptions, Removed};
use ::image::{ImageId, Platform, Reference};

use tokio::io::AsyncRead;

use crate::Engine;
use crate::bridge::{BlockingReader, stream_from};
use crate::container::inspect::GraphDriver;
use crate::container::{ContainerConfig, ListOptions, TarStream};
use crate::error::{Error, Result};
use crate::filters::Filters;
use crate::progress::{Cancel, Progress};
use crate::volume::blocking;
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

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Passwords do not belong into logs.
        f.debug_struct("Credentials")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
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

impl Engine {
    /// How many images there are.
    ///
    /// # Errors
    /// Where the store cannot be read.
    pub async fn image_count(&self) -> Result<u64> {
        let store = self.images().clone();
        blocking(move || Ok(store.list(&Filter::default()).map_err(Error::room)?.len() as u64))
            .await
    }

    /// Bytes of all layers, each once.
    ///
    /// # Errors
    /// Where the store cannot be read.
    pub async fn layers_size(&self) -> Result<u64> {
        let store = self.images().clone();
        blocking(move || Ok(store.layers_size())).await
    }

    /// All images that pass `dangling`, `reference`, `label`, `label!`, `before`, `since`, `until`, newest first.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another filter; unknown images in `before` and `since`.
    pub async fn list_images(
        self: &Arc<Self>,
        all: bool,
        filters: Filters,
        usage: bool,
    ) -> Result<Vec<ImageSummary>> {
        let filter = Filter {
            all,
            ..store_filter(&filters)?
        };
        let used = if usage {
            Some(self.images_in_use().await?)
        } else {
            None
        };
        let store = self.images().clone();
        blocking(move || {
            let images = store.list(&filter).map_err(Error::room)?;
            let summary = |image: &Image| ImageSummary {
                containers: used.as_ref().map_or(-1, |used| {
                    used.get(&image.id.to_string())
                        .map_or(0, |users| users.len() as i64)
                }),
                created: seconds(&image.created),
                id: image.id.to_string(),
                labels: image
                    .config
                    .config
                    .as_ref()
                    .map(|config| config.labels.clone())
                    .filter(|labels| !labels.is_empty()),
                parent_id: image
                    .record
                    .parent
                    .map_or_else(String::new, |parent| parent.to_string()),
                repo_digests: image.repo_digests.clone(),
                repo_tags: image.repo_tags.clone(),
                shared_size: if used.is_some() {
                    store.shared_size(&image.id) as i64
                } else {
                    -1
                },
                size: image.size(),
            };
            Ok(images.iter().map(summary).collect())
        })
        .await
    }

    /// The containers of each image, by its id.
    async fn images_in_use(self: &Arc<Self>) -> Result<HashMap<String, Vec<InUse>>> {
        let options = ListOptions {
            all: true,
            ..ListOptions::default()
        };
        let mut used: HashMap<String, Vec<InUse>> = HashMap::new();
        for container in self.list(options).await? {
            let running = matches!(
                container.state.as_str(),
                "running" | "paused" | "restarting"
            );
            let short = container.id.chars().take(12).collect();
            used.entry(container.image_id).or_default().push(InUse {
                container: short,
                running,
            });
        }
        Ok(used)
    }

    /// Everything about one image, by name, id or an id's beginning.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`].
    pub async fn inspect_image(self: &Arc<Self>, name: &str) -> Result<ImageInspect> {
        let (store, name) = (self.images().clone(), name.to_owned());
        blocking(move || {
            let image = store.inspect(&name).map_err(missing(&name))?;
            let folders = store.layer_folders(&image.id).map_err(Error::room)?;
            show(&image, &folders)
        })
        .await
    }

    /// How it was made.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`].
    pub async fn image_history(self: &Arc<Self>, name: &str) -> Result<Vec<HistoryItem>> {
        let (store, name) = (self.images().clone(), name.to_owned());
        let lines = blocking(move || store.history(&name).map_err(missing(&name))).await?;
        let item = |line: HistoryLine| HistoryItem {
            id: line
                .id
                .map_or_else(|| "<missing>".into(), |id| id.to_string()),
            created: line.created.as_deref().map_or(0, seconds),
            created_by: line.created_by,
            tags: (!line.tags.is_empty()).then_some(line.tags),
            size: line.size,
            comment: line.comment,
        };
        Ok(lines.into_iter().map(item).collect())
    }

    /// Gives it another name.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`], and a name that is none.
    pub async fn tag_image(
        self: &Arc<Self>,
        name: &str,
        repository: &str,
        tag: &str,
    ) -> Result<()> {
        let reference = reference(repository, tag)?;
        let (store, owned) = (self.images().clone(), name.to_owned());
        let shown = reference.familiar();
        let id = blocking(move || {
            store.tag(&owned, &reference).map_err(missing(&owned))?;
            store.resolve(&owned).map_err(missing(&owned))
        })
        .await?;
        self.image_event("tag", &id.to_string(), &shown);
        Ok(())
    }

    /// Takes a name off, and deletes the image with its last one. `prune`: untagged parents too.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`]; in use, or named elsewhere, in dockerd's words.
    pub async fn remove_image(
        self: &Arc<Self>,
        name: &str,
        force: bool,
        prune: bool,
    ) -> Result<Vec<ImageDeleted>> {
        let used = self.images_in_use().await?;
        let (store, owned) = (self.images().clone(), name.to_owned());
        let (id, removed) = blocking(move || {
            let options = RemoveOptions {
                force,
                keep_parents: !prune,
            };
            let id = store.resolve(&owned).map_err(missing(&owned))?;
            let in_use = |id: &ImageId| used.get(&id.to_string()).cloned().unwrap_or_default();
            Ok((
                id,
                store
                    .remove(&owned, options, &in_use)
                    .map_err(missing(&owned))?,
            ))
        })
        .await?;
        Ok(self.tell_removed(&id.to_string(), removed))
    }

    /// Removes images without names that nothing uses; with `dangling=false` named ones too.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a filter other than `dangling`, `until`, `label`, `label!`.
    pub async fn prune_images(self: &Arc<Self>, filters: Filters) -> Result<ImagesPruned> {
        filters.only(&["dangling", "until", "label", "label!"])?;
        let filter = store_filter(&filters)?;
        let used = self.images_in_use().await?;
        let store = self.images().clone();
        let pruned = blocking(move || {
            let in_use = |id: &ImageId| used.get(&id.to_string()).cloned().unwrap_or_default();
            store.prune(&filter, &in_use).map_err(Error::room)
        })
        .await?;
        let space = pruned.space;
        let deleted = self.tell_removed("", pruned.removed);
        let reclaimed = BTreeMap::from([("reclaimed".into(), space.to_string())]);
        self.events().publish("image", "prune", "", reclaimed);
        Ok(ImagesPruned {
            images_deleted: (!deleted.is_empty()).then_some(deleted),
            space_reclaimed: space,
        })
    }

    fn tell_removed(&self, id: &str, removed: Vec<Removed>) -> Vec<ImageDeleted> {
        removed
            .into_iter()
            .map(|step| match step {
                Removed::Untagged(name) => {
                    self.image_event("untag", id, &name);
                    ImageDeleted {
                        untagged: name,
                        ..ImageDeleted::default()
                    }
                }
                Removed::Deleted(digest) => {
                    let digest = digest.to_string();
                    self.image_event("delete", &digest, &digest);
                    ImageDeleted {
                        deleted: digest,
                        ..ImageDeleted::default()
                    }
                }
            })
            .collect()
    }

    pub(crate) fn image_event(&self, action: &str, id: &str, name: &str) {
        self.events().publish(
            "image",
            action,
            id,
            BTreeMap::from([("name".into(), name.into())]),
        );
    }

    /// Fetches an image from its registry.
    ///
    /// # Errors
    /// A name or platform that is none; what the registry says.
    pub async fn pull_image(
        self: &Arc<Self>,
        name: &str,
        platform: &str,
        credentials: Credentials,
        progress: Arc<dyn Progress>,
        cancel: Cancel,
    ) -> Result<String> {
        let reference = Reference::parse(name).map_err(Error::room)?.or_latest();
        let options = PullOptions {
            credentials: credentials.given(),
            platform: self::platform(platform)?,
            trust: self.trust(),
            ..PullOptions::default()
        };
        let pulled = ::image::registry::pull(self.images(), &reference, &options, progress, cancel)
            .await
            .map_err(registry_error(&reference))?;
        self.image_event("pull", &reference.familiar(), &reference.familiar());
        Ok(pulled.id.to_string())
    }

    /// Sends an image to its registry; without a tag all images of the repository. Answers what was sent.
    ///
    /// # Errors
    /// [`Error::NotFound`] where nothing has the name; what the registry says.
    pub async fn push_image(
        self: &Arc<Self>,
        name: &str,
        tag: &str,
        credentials: Credentials,
        progress: Arc<dyn Progress>,
        cancel: Cancel,
    ) -> Result<Vec<Pushed>> {
        let repository = Reference::parse(name).map_err(Error::room)?;
        let mut references = Vec::new();
        if !tag.is_empty() {
            references.push(repository.with_tag(tag).map_err(Error::room)?);
        } else if repository.tag().is_some() {
            references.push(repository.clone());
        } else {
            let store = self.images().clone();
            let all = blocking(move || store.list(&Filter::default()).map_err(Error::room)).await?;
            let names = all.iter().flat_map(|image| &image.repo_tags);
            let named = names.filter_map(|name| Reference::parse(name).ok());
            references.extend(named.filter(|found| found.repository() == repository.repository()));
        }
        let options = PushOptions {
            credentials: credentials.given(),
            trust: self.trust(),
            ..PushOptions::default()
        };
        let mut sent = Vec::new();
        let unknown = || {
            Error::NotFound(format!(
                "An image does not exist locally with the tag: {}",
                repository.familiar_repository()
            ))
        };
        for reference in &references {
            let push = ::image::registry::push(
                self.images(),
                reference,
                &options,
                progress.clone(),
                cancel.clone(),
            );
            let pushed = push.await.map_err(|error| match error {
                ::image::Error::NoSuchImage(_) => unknown(),
                error => registry_error(reference)(error),
            })?;
            self.image_event("push", &reference.familiar(), &reference.familiar());
            sent.push(pushed);
        }
        if sent.is_empty() {
            return Err(unknown());
        }
        Ok(sent)
    }

    fn trust(&self) -> Trust {
        self.config().registries.clone()
    }

    /// Reads images of an archive, Docker's or OCI's; answers their names (or ids).
    ///
    /// # Errors
    /// An archive that is broken or hostile.
    pub async fn load_images(
        self: &Arc<Self>,
        archive: ArchiveReader,
        platform: &str,
        progress: Arc<dyn Progress>,
        cancel: Cancel,
    ) -> Result<Vec<String>> {
        let platform = self::platform(platform)?;
        let archive = BlockingReader::new(archive);
        let store = self.images().clone();
        let loaded = blocking(move || {
            store
                .load(archive, platform.as_ref(), &*progress, &cancel)
                .map_err(Error::room)
        })
        .await?;
        let mut names = Vec::new();
        for image in loaded {
            let id = image.id.to_string();
            self.image_event("load", &id, image.names.first().unwrap_or(&id));
            match image.names.is_empty() {
                true => names.push(id),
                false => names.extend(image.names),
            }
        }
        Ok(names)
    }

    /// An archive of images, which both Docker and OCI tools read.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`].
    pub async fn save_images(
        self: &Arc<Self>,
        names: Vec<String>,
        platform: &str,
    ) -> Result<TarStream> {
        let platform = self::platform(platform)?;
        let (store, asked) = (self.images().clone(), names.clone());
        // Asked before anything is sent, so that an unknown name is an error and not half an archive.
        let ids = blocking(move || {
            let resolve = |name: &String| store.resolve(name).map_err(missing(name));
            asked.iter().map(resolve).collect::<Result<Vec<ImageId>>>()
        })
        .await?;
        for (id, name) in ids.iter().zip(&names) {
            self.image_event("save", &id.to_string(), name);
        }
        let store = self.images().clone();
        let stream = stream_from(move |writer| {
            store
                .save(&names, platform.as_ref(), writer)
                .map_err(std::io::Error::other)
        });
        Ok(Box::pin(stream))
    }

    /// Makes an image of an archive of a file system; answers its id.
    ///
    /// # Errors
    /// A name, platform or change that is none; an archive that is broken or hostile.
    pub async fn import_image(
        self: &Arc<Self>,
        archive: ArchiveReader,
        options: ImportOptions,
        cancel: Cancel,
    ) -> Result<String> {
        let named = match options.repository.as_str() {
            "" => None,
            repository => Some(reference(repository, &options.tag)?),
        };
        let platform = platform(&options.platform)?;
        if let Some(other) = platform.as_ref().filter(|platform| platform.os != "linux") {
            return Err(Error::Invalid(format!(
                "operating system is not supported: {}: linux is",
                other.os
            )));
        }
        let shown = named.as_ref().map(Reference::familiar);
        let options = ::image::ImportOptions {
            reference: named,
            message: options.message,
            changes: options.changes,
            platform,
        };
        let archive = BlockingReader::new(archive);
        let store = self.images().clone();
        let id = blocking(move || {
            store
                .import(archive, &options, &cancel)
                .map_err(Error::room)
        })
        .await?
        .to_string();
        if let Some(name) = &shown {
            self.image_event("tag", &id, name);
        }
        self.image_event("import", &id, shown.as_deref().unwrap_or(&id));
        Ok(id)
    }

    /// Makes an image from a distribution's package archive; answers its id.
    ///
    /// # Errors
    /// Options that are none, a missing program (with the command that installs it), the tool's own last words.
    pub async fn bootstrap_image(
        self: &Arc<Self>,
        options: ::image::BootstrapOptions,
        progress: Arc<dyn Progress>,
        cancel: Cancel,
    ) -> Result<String> {
        let store = self.images().clone();
        let (id, names) = blocking(move || {
            let names = options.references().map_err(Error::room)?;
            let id =
                ::image::bootstrap(&store, &options, &*progress, &cancel).map_err(Error::room)?;
            Ok((id.to_string(), names))
        })
        .await?;
        for name in names {
            self.image_event("import", &id, &name.familiar());
        }
        Ok(id)
    }

    /// What a registry has under a name: `{"Descriptor": …, "Platforms": […]}`.
    pub async fn distribution(
        self: &Arc<Self>,
        name: &str,
        credentials: Credentials,
    ) -> Result<serde_json::Value> {
        let reference = Reference::parse(name).map_err(Error::room)?;
        let found = ::image::registry::describe(&reference, credentials.given(), &self.trust())
            .await
            .map_err(Error::room)?;
        let platforms: Vec<serde_json::Value> = found
            .platforms
            .iter()
            .map(|platform| serde_json::to_value(platform).unwrap_or_default())
            .collect();
        Ok(serde_json::json!({
            "Descriptor": {
                "mediaType": found.descriptor.media_type,
                "digest": found.descriptor.digest.to_string(),
                "size": found.descriptor.size,
            },
            "Platforms": platforms,
        }))
    }

    /// The file at `url` as an archive going in.
    ///
    /// # Errors
    /// What is no address of a file, or cannot be reached.
    pub async fn fetch(&self, url: &str) -> Result<ArchiveReader> {
        let fetched = ::image::fetch::fetch(url).await.map_err(Error::room)?;
        Ok(Box::pin(tokio_util::io::StreamReader::new(fetched.body)))
    }

    /// Tries credentials at a registry; answers the token to keep in place of the password, or the empty text.
    ///
    /// # Errors
    /// [`Error::Unauthorized`] where it refuses them.
    pub async fn authenticate(
        self: &Arc<Self>,
        server: &str,
        credentials: Credentials,
    ) -> Result<String> {
        // What the docker command line calls Docker Hub.
        let server = match server {
            "" | "https://index.docker.io/v1/" => "docker.io",
            server => server,
        };
        let credentials = credentials.given().unwrap_or_default();
        ::image::registry::login(server, &credentials, &self.trust())
            .await
            .map_err(|error| match error {
                ::image::Error::Denied { .. } => Error::Unauthorized(error.to_string()),
                error => Error::room(error),
            })?;
        Ok(String::new())
    }
}

impl Credentials {
    fn given(self) -> Option<::image::registry::Credentials> {
        let all = [&self.username, &self.identity_token, &self.registry_token];
        if all.into_iter().all(|text| text.is_empty()) {
            return None;
        }
        Some(::image::registry::Credentials {
            username: self.username,
            password: self.password,
            identitytoken: self.identity_token,
            registrytoken: self.registry_token,
            ..Default::default()
        })
    }
}

/// A registry's refusals, in dockerd's words where it denies that the image is there.
fn registry_error(reference: &Reference) -> impl FnOnce(::image::Error) -> Error {
    let name = reference.familiar_repository();
    move |error| match error {
        ::image::Error::Denied { .. } => Error::NotFound(format!(
            "pull access denied for {name}, repository does not exist or may require 'docker login': {error}"
        )),
        ::image::Error::Registry { status: 404, .. } => {
            Error::NotFound(format!("manifest for {name} not found: {error}"))
        }
        error => Error::room(error),
    }
}

/// Docker's words for an image that is not there.
fn missing(name: &str) -> impl FnOnce(::image::Error) -> Error {
    let name = name.to_owned();
    move |error| match error {
        ::image::Error::NoSuchImage(_) => Error::NoSuchImage(match Reference::parse(&name) {
            Ok(reference) => reference.or_latest().familiar(),
            Err(_) => name,
        }),
        other => Error::room(other),
    }
}

/// A repository with its tag; `latest` where neither names one.
fn reference(repository: &str, tag: &str) -> Result<Reference> {
    let reference = Reference::parse(repository).map_err(Error::room)?;
    match tag {
        "" => Ok(reference.or_latest()),
        tag => reference.with_tag(tag).map_err(Error::room),
    }
}

/// `os/arch[/variant]`; empty is not given.
pub(crate) fn platform(text: &str) -> Result<Option<Platform>> {
    match text {
        "" => Ok(None),
        text => Platform::parse(text).map(Some).map_err(Error::room),
    }
}

fn seconds(time: &str) -> i64 {
    match time.parse::<jiff::Timestamp>() {
        Ok(time) if time.as_second() > 0 => time.as_second(),
        _ => 0,
    }
}

fn store_filter(filters: &Filters) -> Result<Filter> {
    filters.only(&[
        "dangling",
        "label",
        "label!",
        "before",
        "since",
        "reference",
        "until",
    ])?;
    let one = |name: &str| match filters.get(name) {
        [] => Ok(None),
        [value] => Ok(Some(value.clone())),
        _ => Err(Error::Invalid(format!(
            "invalid filter '{name}': one value is wanted"
        ))),
    };
    Ok(Filter {
        all: false,
        dangling: filters.boolean("dangling")?,
        labels: filters.get("label").to_vec(),
        without_labels: filters.get("label!").to_vec(),
        references: filters.get("reference").to_vec(),
        before: one("before")?,
        since: one("since")?,
        until: crate::network::until(filters)?,
    })
}

fn show(image: &Image, folders: &[std::path::PathBuf]) -> Result<ImageInspect> {
    // The two are the same document in Docker's names; what only an image has is dropped on the way.
    let config = serde_json::to_value(image.config.run())
        .and_then(serde_json::from_value::<ContainerConfig>)
        .map_err(|error| Error::Invalid(format!("the configuration of {}: {error}", image.id)))?;
    let mut data = BTreeMap::new();
    if let Some((top, below)) = folders.split_first() {
        data.insert("UpperDir".to_owned(), top.display().to_string());
        let below: Vec<String> = below
            .iter()
            .map(|folder| folder.display().to_string())
            .collect();
        if !below.is_empty() {
            data.insert("LowerDir".to_owned(), below.join(":"));
        }
    }
    Ok(ImageInspect {
        id: image.id.to_string(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        parent: image
            .record
            .parent
            .map_or_else(String::new, |parent| parent.to_string()),
        comment: image
            .config
            .history
            .last()
            .map_or_else(String::new, |step| step.comment.clone()),
        created: image.created.clone(),
        docker_version: String::new(),
        author: image.config.author.clone(),
        config,
        architecture: image.config.architecture.clone(),
        variant: image.config.variant.clone(),
        os: image.config.os.clone(),
        os_version: String::new(),
        size: image.size(),
        graph_driver: GraphDriver {
            name: "overlay2".into(),
            data,
        },
        root_fs: RootFs {
            kind: "layers".into(),
            layers: image
                .config
                .rootfs
                .diff_ids
                .iter()
                .map(ToString::to_string)
                .collect(),
        },
        metadata: ImageMetadata {
            last_tag_time: image
                .record
                .last_tagged
                .clone()
                .unwrap_or_else(|| base::time::ZERO.into()),
        },
    })
}
