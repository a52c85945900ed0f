//! Pulling: layers in parallel, each downloaded, hashed, inflated, hashed again and unpacked in one pass.
//!
//! ```text
//! network ─▶ [write partial file, sha256] ─▶ inflate ─┬─▶ sha256
//!  (task)              (thread)              (thread) └─▶ untar
//! ```
//!
//! What a cut left stands in the partial file; the next try, in this pull or a later one, asks for the rest.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use reqwest::{Method, StatusCode};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinSet, spawn_blocking};

use super::client::{ATTEMPTS, chain};
use super::{Client, Credentials, Trust};
use crate::config::ImageConfig;
use crate::digest::Hasher;
use crate::error::At;
use crate::layer::apply::ChunkReader;
use crate::manifest::{Descriptor, Document, Manifest, media};
use crate::progress::{Cancel, Event, Listener};
use crate::store::{NewImage, Staged};
use crate::{Digest, Error, ImageId, Platform, Reference, Result, Store};

/// How to pull.
#[derive(Debug, Clone, Default)]
pub struct PullOptions {
    pub credentials: Option<Credentials>,
    /// This host's where not given.
    pub platform: Option<Platform>,
    pub trust: Trust,
    /// Layers at once; 0 for the default of 4.
    pub parallel: usize,
}

/// What was pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    pub id: ImageId,
    /// Of the manifest or index that the name stands for.
    pub digest: Digest,
    /// Whether the name stood for this very image before.
    pub up_to_date: bool,
}

/// Pulls the image `reference` into the store and names it.
///
/// # Errors
/// [`Error::Registry`], [`Error::Denied`], [`Error::Unreachable`], [`Error::NoSuchPlatform`], and what the unpacker
/// refuses. Nothing is left but downloads that can go on later.
pub async fn pull(
    store: &Store,
    reference: &Reference,
    options: &PullOptions,
    progress: Listener,
    cancel: Cancel,
) -> Result<Pulled> {
    let reference = reference.clone().or_latest();
    let shown = reference
        .tag()
        .map_or_else(|| reference.familiar(), str::to_owned);
    progress.report(Event::about(
        &shown,
        format!("Pulling from {}", reference.path()),
    ));
    let client = Arc::new(
        Client::connect(
            reference.domain(),
            options.credentials.clone(),
            &options.trust,
        )
        .await?,
    );
    let scope = format!("repository:{}:pull", reference.path());
    let which = reference.digest().map_or_else(
        || reference.tag().unwrap_or("latest").to_owned(),
        |d| d.to_string(),
    );
    let (bytes, digest, media_type) =
        manifest(&client, &reference, &which, &scope, reference.digest()).await?;
    let wanted = options.platform.clone().unwrap_or_else(Platform::host);
    let (manifest, manifest_bytes, manifest_type) = match Document::parse(&bytes)? {
        Document::Manifest(manifest) => (manifest, bytes, media_type),
        Document::Index(index) => {
            let chosen = index.select(&wanted).ok_or_else(|| Error::NoSuchPlatform {
                reference: reference.familiar(),
                wanted: wanted.to_string(),
                available: index.platforms(),
            })?;
            let which = chosen.digest.to_string();
            let (bytes, _, kind) =
                self::manifest(&client, &reference, &which, &scope, Some(chosen.digest)).await?;
            match Document::parse(&bytes)? {
                Document::Manifest(manifest) => (manifest, bytes, kind),
                Document::Index(_) => {
                    return Err(Error::malformed("the index", "it points to another index"));
                }
            }
        }
    };
    let config = config(&client, store, &reference, &manifest.config, &scope).await?;
    let parsed = ImageConfig::parse(&config)?;
    let layers = real_layers(&manifest, &parsed)?;
    let lease = Arc::new(store.lease());
    let blobs = fetch_layers(
        store, &client, &reference, &scope, &parsed, &layers, options, &progress, &cancel, &lease,
    )
    .await?;
    cancel.check()?;
    let mut names = vec![reference.with_digest(digest)];
    if let Some(tag) = reference.tag() {
        names.push(reference.with_tag(tag)?);
    }
    let before = store.resolve(&reference.to_string()).ok();
    let store = store.clone();
    let id = spawn_blocking(move || -> Result<ImageId> {
        if blobs == layers {
            let new = NewImage {
                config,
                manifest: manifest_bytes,
                manifest_type,
                blobs,
                parent: None,
            };
            return store.register(new, &names);
        }
        // The same files were here in other blobs: a manifest that names those.
        let rebuilt = Manifest::new(Descriptor::of(media::OCI_CONFIG, &config), blobs.clone());
        let manifest = serde_json::to_vec(&rebuilt)
            .map_err(|e| Error::malformed("a manifest made here", e))?;
        let manifest_type = media::OCI_MANIFEST.to_owned();
        store.register(
            NewImage {
                config,
                manifest,
                manifest_type,
                blobs,
                parent: None,
            },
            &names,
        )
    })
    .await
    .map_err(|e| Error::Invalid(format!("a task failed: {e}")))??;
    drop(lease);
    let up_to_date = before == Some(id);
    progress.report(Event::message(format!("Digest: {digest}")));
    progress.report(Event::message(if up_to_date {
        format!("Status: Image is up to date for {}", reference.familiar())
    } else {
        format!(
            "Status: Downloaded newer image for {}",
            reference.familiar()
        )
    }));
    Ok(Pulled {
        id,
        digest,
        up_to_date,
    })
}

pub(super) async fn manifest(
    client: &Client,
    reference: &Reference,
    which: &str,
    scope: &str,
    expected: Option<Digest>,
) -> Result<(Vec<u8>, Digest, String)> {
    let path = format!("/v2/{}/manifests/{which}", reference.path());
    let response = client
        .send(Method::GET, &path, scope, |mut request| {
            for kind in media::ACCEPTED {
                request = request.header("accept", kind);
            }
            request
        })
        .await?;
    if response.status() == StatusCode::NOT_FOUND {
        return Err(Error::NotFound {
            what: format!("manifest for {}", reference.familiar()),
            why: "manifest unknown".to_owned(),
        });
    }
    let response = client
        .expect(
            response,
            &format!("the manifest of {}", reference.familiar()),
        )
        .await?;
    let kind = response
        .headers()
        .get("content-type")
        .and_then(|v| v.to_str().ok())
        .unwrap_or(media::OCI_MANIFEST);
    let kind = kind.split(';').next().unwrap_or(kind).trim().to_owned();
    let said = response
        .headers()
        .get("docker-content-digest")
        .and_then(|v| v.to_str().ok()?.parse::<Digest>().ok());
    let bytes = client.document(response, "the manifest").await?;
    let digest = Digest::of(&bytes);
    if let Some(expected) = expected.or(said)
        && expected != digest
    {
        return Err(Error::DigestMismatch {
            what: "the manifest".to_owned(),
            expected,
            actual: digest,
        });
    }
    Ok((bytes, digest, kind))
}

async fn config(
    client: &Client,
    store: &Store,
    reference: &Reference,
    descriptor: &Descriptor,
    scope: &str,
) -> Result<Vec<u8>> {
    if let Ok(bytes) = store.content().read(&descriptor.digest) {
        return Ok(bytes);
    }
    let path = format!("/v2/{}/blobs/{}", reference.path(), descriptor.digest);
    let response = client.send(Method::GET, &path, scope, |r| r).await?;
    let response = client.expect(response, "the image configuration").await?;
    let bytes = client.document(response, "the image configuration").await?;
    let actual = Digest::of(&bytes);
    if actual != descriptor.digest {
        let what = "the image configuration".to_owned();
        return Err(Error::DigestMismatch {
            what,
            expected: descriptor.digest,
            actual,
        });
    }
    Ok(bytes)
}

/// The manifest's layers, one for each diff of the configuration.
fn real_layers(manifest: &Manifest, config: &ImageConfig) -> Result<Vec<Descriptor>> {
    if manifest.layers.len() != config.rootfs.diff_ids.len() {
        return Err(Error::malformed(
            "the manifest",
            "it is not one of a container image: its layers are not those of its configuration",
        ));
    }
    Ok(manifest.layers.clone())
}

enum Fetched {
    /// The chain is in the store, with this blob.
    Here(Descriptor),
    Staged(Box<Staged>, Descriptor),
}

#[allow(clippy::too_many_arguments)]
async fn fetch_layers(
    store: &Store,
    client: &Arc<Client>,
    reference: &Reference,
    scope: &str,
    config: &ImageConfig,
    layers: &[Descriptor],
    options: &PullOptions,
    progress: &Listener,
    cancel: &Cancel,
    lease: &Arc<crate::store::Lease>,
) -> Result<Vec<Descriptor>> {
    let chains = Digest::chains(&config.rootfs.diff_ids);
    let slots = Arc::new(Semaphore::new(if options.parallel == 0 {
        4
    } else {
        options.parallel
    }));
    let mut tasks = JoinSet::new();
    for (i, blob) in layers.iter().enumerate() {
        lease.hold(blob.digest);
        lease.hold(chains[i]);
        progress.report(Event::about(blob.digest.short(), "Pulling fs layer"));
        let fetch = Fetch {
            store: store.clone(),
            client: client.clone(),
            path: format!("/v2/{}/blobs/{}", reference.path(), blob.digest),
            scope: scope.to_owned(),
            blob: blob.clone(),
            diff_id: config.rootfs.diff_ids[i],
            chain_id: chains[i],
            lowest: i == 0,
            progress: progress.clone(),
            cancel: cancel.clone(),
        };
        let slots = slots.clone();
        tasks.spawn(async move {
            let _slot = slots.acquire_owned().await;
            (i, fetch.run().await)
        });
    }
    // Layers are placed from the lowest up, as soon as all beneath are.
    let mut waiting: Vec<Option<Fetched>> = layers.iter().map(|_| None).collect();
    let mut blobs = Vec::with_capacity(layers.len());
    while let Some(joined) = tasks.join_next().await {
        let (i, fetched) =
            joined.map_err(|e| Error::Invalid(format!("a download task failed: {e}")))?;
        // Returning drops the set, which ends the other downloads.
        waiting[i] = Some(fetched?);
        while let Some(fetched) = waiting.get_mut(blobs.len()).and_then(Option::take) {
            let place = blobs.len();
            let id = layers[place].digest.short();
            let blob = match fetched {
                Fetched::Here(blob) => {
                    progress.report(Event::about(&id, "Already exists"));
                    blob
                }
                Fetched::Staged(staged, blob) => {
                    let parent = place.checked_sub(1).map(|below| chains[below]);
                    let (store, lease) = (store.clone(), lease.clone());
                    spawn_blocking(move || store.place(*staged, parent, &lease).map(drop))
                        .await
                        .map_err(|e| Error::Invalid(format!("a task failed: {e}")))??;
                    progress.report(Event::about(&id, "Pull complete"));
                    blob
                }
            };
            blobs.push(blob);
        }
    }
    Ok(blobs)
}

struct Fetch {
    store: Store,
    client: Arc<Client>,
    path: String,
    scope: String,
    blob: Descriptor,
    diff_id: Digest,
    chain_id: Digest,
    lowest: bool,
    progress: Listener,
    cancel: Cancel,
}

impl Fetch {
    async fn run(self) -> Result<Fetched> {
        // Whoever pulls the same layer at the same time waits here and then finds it.
        let lock = self.store.busy(&self.blob.digest);
        let _alone = lock.lock().await;
        if self.store.layer(&self.chain_id).is_some() {
            if self.store.content().has(&self.blob.digest) {
                return Ok(Fetched::Here(self.blob));
            }
            if let Some(blob) = self.store.blob_of(&self.diff_id) {
                return Ok(Fetched::Here(blob));
            }
        }
        if self.store.content().has(&self.blob.digest) {
            let (store, digest, diff, lowest, cancel) = (
                self.store.clone(),
                self.blob.digest,
                self.diff_id,
                self.lowest,
                self.cancel.clone(),
            );
            self.progress
                .report(Event::about(self.blob.digest.short(), "Extracting"));
            let staged = spawn_blocking(move || {
                store.stage(
                    store.content().reader(&digest)?,
                    lowest,
                    Some(diff),
                    &cancel,
                )
            })
            .await
            .map_err(|e| Error::Invalid(format!("an unpacking task failed: {e}")))??;
            return Ok(Fetched::Staged(Box::new(staged), self.blob));
        }
        let (chunks, incoming) = mpsc::channel::<Bytes>(32);
        let (to_stage, compressed) = ChunkReader::channel();
        let partial = self.store.content().partial_path(&self.blob.digest);
        let offset = std::fs::metadata(&partial).map_or(0, |m| m.len());
        let offset = if offset > self.blob.size { 0 } else { offset };
        let writer = {
            let (store, blob) = (self.store.clone(), self.blob.clone());
            spawn_blocking(move || write_blob(&store, &blob, offset, incoming, &to_stage))
        };
        let stager = {
            let (store, diff, lowest, cancel) = (
                self.store.clone(),
                self.diff_id,
                self.lowest,
                self.cancel.clone(),
            );
            spawn_blocking(move || store.stage(compressed, lowest, Some(diff), &cancel))
        };
        let downloaded = self.download(offset, chunks).await;
        let failed =
            |e: tokio::task::JoinError| Error::Invalid(format!("an unpacking task failed: {e}"));
        let id = self.blob.digest.short();
        if downloaded.is_ok() {
            self.progress
                .report(Event::about(&id, "Verifying Checksum"));
        }
        let written = writer.await.map_err(failed)?;
        if written.is_ok() {
            self.progress.report(Event::about(&id, "Download complete"));
            self.progress.report(Event::counted(
                &id,
                "Extracting",
                self.blob.size,
                self.blob.size,
            ));
        }
        let staged = stager.await.map_err(failed)?;
        // The first cause in the order of the stream: the network, the blob's digest, the unpacking.
        match (downloaded, written, staged) {
            (Ok(()), Ok(()), Ok(staged)) => Ok(Fetched::Staged(Box::new(staged), self.blob)),
            (Err(error), ..) => Err(error),
            (_, Err(error @ (Error::DigestMismatch { .. } | Error::Io { .. })), _) => Err(error),
            (_, _, Err(error)) | (_, Err(error), _) => {
                let _ = std::fs::remove_file(&partial);
                Err(error)
            }
        }
    }

    /// Downloads from `offset` on, through cuts. Ends early without an error where nobody takes the chunks any more.
    async fn download(&self, mut offset: u64, chunks: mpsc::Sender<Bytes>) -> Result<()> {
        let id = self.blob.digest.short();
        let size = self.blob.size;
        let mut reported = Instant::now();
        let (mut attempt, mut pause) = (0, Duration::from_millis(200));
        while offset < size {
            self.cancel.check()?;
            let begin = offset;
            let why = match self
                .download_once(&mut offset, &chunks, &mut reported, &id)
                .await
            {
                Ok(true) => return Ok(()),
                Ok(false) if offset >= size => break,
                Ok(false) => "the connection was cut".to_owned(),
                Err(Error::Unreachable { why, .. }) => why,
                Err(error) => return Err(error),
            };
            attempt = if offset > begin { 0 } else { attempt + 1 };
            if attempt >= ATTEMPTS {
                return Err(Error::Unreachable {
                    registry: self.client.domain().to_owned(),
                    why,
                });
            }
            self.progress
                .report(Event::about(&id, format!("Retrying: {why}")));
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
        Ok(())
    }

    /// One request. `Ok(true)`: nobody listens any more.
    async fn download_once(
        &self,
        offset: &mut u64,
        chunks: &mpsc::Sender<Bytes>,
        reported: &mut Instant,
        id: &str,
    ) -> Result<bool> {
        let from = *offset;
        let response = self
            .client
            .send(Method::GET, &self.path, &self.scope, |request| {
                if from > 0 {
                    request.header("range", format!("bytes={from}-"))
                } else {
                    request
                }
            })
            .await?;
        let response = self.client.expect(response, &format!("layer {id}")).await?;
        // Not every server knows ranges; what is here already is then skipped.
        let mut skip = if response.status() == StatusCode::PARTIAL_CONTENT {
            0
        } else {
            from
        };
        let mut stream = response.bytes_stream();
        while let Some(chunk) = stream.next().await {
            self.cancel.check()?;
            let mut chunk = match chunk {
                Ok(chunk) => chunk,
                Err(error) => {
                    let registry = self.client.domain().to_owned();
                    return Err(Error::Unreachable {
                        registry,
                        why: chain(&error),
                    });
                }
            };
            let cut = skip.min(chunk.len() as u64);
            skip -= cut;
            let _ = chunk.split_to(cut as usize);
            if chunk.is_empty() {
                continue;
            }
            if *offset + chunk.len() as u64 > self.blob.size {
                let _ = std::fs::remove_file(self.store.content().partial_path(&self.blob.digest));
                return Err(Error::SizeMismatch {
                    what: format!("layer {id}"),
                    expected: self.blob.size,
                    actual: *offset + chunk.len() as u64,
                });
            }
            *offset += chunk.len() as u64;
            if chunks.send(chunk).await.is_err() {
                return Ok(true);
            }
            if reported.elapsed() > Duration::from_millis(100) {
                *reported = Instant::now();
                self.progress
                    .report(Event::counted(id, "Downloading", *offset, self.blob.size));
            }
        }
        Ok(false)
    }
}

/// Writes and hashes what comes, passes it on, and in the end makes a blob of it.
fn write_blob(
    store: &Store,
    blob: &Descriptor,
    resume: u64,
    mut incoming: mpsc::Receiver<Bytes>,
    to_stage: &SyncSender<io::Result<Bytes>>,
) -> Result<()> {
    let path = store.content().partial_path(&blob.digest);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(resume == 0)
        .open(&path)
        .at(&path)?;
    let mut hasher = Hasher::default();
    let mut left = resume;
    let mut heard = true;
    while left > 0 {
        let mut buffer = vec![0; left.min(256 << 10) as usize];
        file.read_exact(&mut buffer).at(&path)?;
        left -= buffer.len() as u64;
        hasher.update(&buffer);
        heard = heard && to_stage.send(Ok(Bytes::from(buffer))).is_ok();
    }
    // Chunks come as the network cuts them, some 16 KiB each.
    let mut file = io::BufWriter::with_capacity(1 << 20, file);
    let mut size = resume;
    while let Some(chunk) = incoming.blocking_recv() {
        file.write_all(&chunk).at(&path)?;
        hasher.update(&chunk);
        size += chunk.len() as u64;
        if to_stage.send(Ok(chunk)).is_err() {
            // The unpacker gave up; it says why.
            return Err(Error::DamagedLayer("it could not be unpacked".to_owned()));
        }
    }
    if size < blob.size {
        let _ = to_stage.send(Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the download broke off",
        )));
        return Err(Error::SizeMismatch {
            what: format!("layer {}", blob.digest.short()),
            expected: blob.size,
            actual: size,
        });
    }
    file.flush().at(&path)?;
    let actual = hasher.finish();
    if actual != blob.digest {
        let _ = std::fs::remove_file(&path);
        let _ = to_stage.send(Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the blob is not what was promised",
        )));
        return Err(Error::DigestMismatch {
            what: format!("layer {}", blob.digest.short()),
            expected: blob.digest,
            actual,
        });
    }
    store.adopt_blob(&path, &blob.digest)
}
