//! Pushing: blobs the registry lacks, in parallel, mounted from a neighbour repository where it has them there.

use std::io::{Seek, SeekFrom};
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::{Method, Response, StatusCode};
use tokio::io::AsyncReadExt;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::io::ReaderStream;

use super::client::{ATTEMPTS, escape};
use super::{Client, Credentials, Trust};
use crate::error::At;
use crate::manifest::{Descriptor, Document};
use crate::progress::{Cancel, Event, Listener};
use crate::{Digest, Error, Reference, Result, Store};

/// Larger blobs are sent in pieces of this size, so that a cut costs no more than one.
const CHUNK: u64 = 64 << 20;

/// How to push.
#[derive(Debug, Clone, Default)]
pub struct PushOptions {
    pub credentials: Option<Credentials>,
    pub trust: Trust,
    /// Blobs at once; 0 for the default of 4.
    pub parallel: usize,
    /// Bytes of the pieces that larger blobs are sent in; 0 for the default of 64 MiB.
    pub chunk: u64,
}

/// What was pushed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    pub tag: String,
    /// Of the manifest.
    pub digest: Digest,
    /// Bytes of the manifest.
    pub size: u64,
}

/// Pushes the image named `reference` to the registry the name says.
///
/// # Errors
/// [`Error::NoSuchImage`], [`Error::Registry`], [`Error::Denied`], [`Error::Unreachable`].
pub async fn push(
    store: &Store,
    reference: &Reference,
    options: &PushOptions,
    progress: Listener,
    cancel: Cancel,
) -> Result<Pushed> {
    let reference = reference.clone().or_latest();
    let image = store.inspect(&reference.to_string())?;
    let repository = format!("{}/{}", reference.domain(), reference.path());
    progress.report(Event::message(format!(
        "The push refers to repository [{repository}]"
    )));
    let client = Arc::new(
        Client::connect(
            reference.domain(),
            options.credentials.clone(),
            &options.trust,
        )
        .await?,
    );
    let manifest_bytes = store.content().read(&image.record.manifest.digest)?;
    let Document::Manifest(manifest) = Document::parse(&manifest_bytes)? else {
        return Err(Error::malformed("the stored manifest", "it is an index"));
    };
    let slots = Arc::new(Semaphore::new(if options.parallel == 0 {
        4
    } else {
        options.parallel
    }));
    let mut tasks = JoinSet::new();
    for blob in manifest.layers.iter().chain([&manifest.config]) {
        let quiet = blob.digest == manifest.config.digest;
        if !quiet {
            progress.report(Event::about(blob.digest.short(), "Preparing"));
        }
        let upload = Upload {
            store: store.clone(),
            client: client.clone(),
            repository: reference.path().to_owned(),
            neighbours: store.neighbours(&reference, &blob.digest),
            blob: blob.clone(),
            chunk: if options.chunk == 0 {
                CHUNK
            } else {
                options.chunk
            },
            progress: if quiet {
                Arc::new(crate::Silent)
            } else {
                progress.clone()
            },
            cancel: cancel.clone(),
        };
        let slots = slots.clone();
        tasks.spawn(async move {
            let _slot = slots.acquire_owned().await;
            upload.run().await
        });
    }
    while let Some(joined) = tasks.join_next().await {
        joined.map_err(|e| Error::Invalid(format!("an upload task failed: {e}")))??;
    }
    let tag = reference
        .tag()
        .map_or_else(|| image.record.manifest.digest.to_string(), str::to_owned);
    let path = format!("/v2/{}/manifests/{tag}", reference.path());
    let kind = image.record.manifest.media_type.clone();
    let scope = scope(reference.path());
    let response = client
        .send(Method::PUT, &path, &scope, |r| {
            r.header("content-type", &kind).body(manifest_bytes.clone())
        })
        .await?;
    client.expect(response, "the manifest").await?;
    let digest = image.record.manifest.digest;
    let size = manifest_bytes.len() as u64;
    store.name_by_digest(&image.id, &reference.with_digest(digest))?;
    progress.report(Event::message(format!(
        "{tag}: digest: {digest} size: {size}"
    )));
    Ok(Pushed { tag, digest, size })
}

fn scope(repository: &str) -> String {
    format!("repository:{repository}:pull,push")
}

struct Upload {
    store: Store,
    client: Arc<Client>,
    repository: String,
    /// Repositories of the same registry that may have the blob.
    neighbours: Vec<String>,
    blob: Descriptor,
    chunk: u64,
    progress: Listener,
    cancel: Cancel,
}

impl Upload {
    async fn run(self) -> Result<()> {
        let id = self.blob.digest.short();
        let scope = scope(&self.repository);
        let path = format!("/v2/{}/blobs/{}", self.repository, self.blob.digest);
        let head = self.client.send(Method::HEAD, &path, &scope, |r| r).await?;
        if head.status().is_success() {
            self.progress
                .report(Event::about(&id, "Layer already exists"));
            return Ok(());
        }
        let mut last = None;
        let mut pause = Duration::from_millis(200);
        for _ in 0..ATTEMPTS {
            self.cancel.check()?;
            match self.upload(&id, &scope).await {
                Err(
                    error @ (Error::Unreachable { .. }
                    | Error::Registry {
                        status: 416 | 500..,
                        ..
                    }),
                ) => {
                    self.progress.report(Event::about(&id, "Retrying"));
                    last = Some(error);
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                other => return other,
            }
        }
        Err(last.unwrap_or(Error::Cancelled))
    }

    async fn upload(&self, id: &str, scope: &str) -> Result<()> {
        let begin = format!("/v2/{}/blobs/uploads/", self.repository);
        for neighbour in self.neighbours.iter().take(3) {
            let mount = format!(
                "{begin}?mount={}&from={}",
                escape(&self.blob.digest.to_string()),
                escape(neighbour)
            );
            // The neighbour must be readable too.
            let both = format!("{scope} repository:{neighbour}:pull");
            let response = match self
                .client
                .send(Method::POST, &mount, &both, |r| {
                    r.header("content-length", 0)
                })
                .await
            {
                Err(Error::Denied { .. }) => continue,
                other => other?,
            };
            if response.status() == StatusCode::CREATED {
                self.progress
                    .report(Event::about(id, format!("Mounted from {neighbour}")));
                return Ok(());
            }
            if response.status() == StatusCode::ACCEPTED {
                let location = location(&self.client, &response)?;
                return self.send(id, scope, location).await;
            }
        }
        let response = self
            .client
            .send(Method::POST, &begin, scope, |r| {
                r.header("content-length", 0)
            })
            .await?;
        let response = self.client.expect(response, "an upload").await?;
        let location = location(&self.client, &response)?;
        self.send(id, scope, location).await
    }

    async fn send(&self, id: &str, scope: &str, mut location: String) -> Result<()> {
        let path = self.store.content().path(&self.blob.digest);
        let size = tokio::fs::metadata(&path).await.at(&path)?.len();
        let mut offset = 0;
        // All but the last piece; a small blob has only that, and goes with the PUT.
        while size - offset > self.chunk {
            self.cancel.check()?;
            let end = offset + self.chunk;
            let response = self
                .once(
                    Method::PATCH,
                    &location,
                    scope,
                    || self.body(id, offset, self.chunk, size),
                    self.chunk,
                    Some(format!("{offset}-{}", end - 1)),
                )
                .await?;
            let response = self.client.expect(response, "an upload").await?;
            location = self::location(&self.client, &response)?;
            offset = end;
        }
        let separator = if location.contains('?') { '&' } else { '?' };
        let target = format!(
            "{location}{separator}digest={}",
            escape(&self.blob.digest.to_string())
        );
        let body = || self.body(id, offset, size - offset, size);
        let range = (offset > 0).then(|| format!("{offset}-{}", size.saturating_sub(1)));
        let response = self
            .once(Method::PUT, &target, scope, body, size - offset, range)
            .await?;
        self.client.expect(response, &format!("layer {id}")).await?;
        self.progress.report(Event::about(id, "Pushed"));
        Ok(())
    }

    async fn once(
        &self,
        method: Method,
        path: &str,
        scope: &str,
        body: impl Fn() -> std::io::Result<reqwest::Body>,
        length: u64,
        range: Option<String>,
    ) -> Result<Response> {
        let http = self.client.for_uploads()?;
        self.client
            .send_once(http, method, path, scope, |mut request| {
                request = request
                    .header("content-type", "application/octet-stream")
                    .header("content-length", length)
                    .timeout(Duration::from_secs(3600));
                if let Some(range) = &range {
                    request = request.header("content-range", range);
                }
                // A file that cannot be read breaks the request off.
                request.body(body().unwrap_or_else(|error| {
                    let broken = futures_util::stream::iter([Err::<bytes::Bytes, _>(error)]);
                    reqwest::Body::wrap_stream(broken)
                }))
            })
            .await
    }

    fn body(
        &self,
        id: &str,
        offset: u64,
        length: u64,
        size: u64,
    ) -> std::io::Result<reqwest::Body> {
        let mut file = std::fs::File::open(self.store.content().path(&self.blob.digest))?;
        file.seek(SeekFrom::Start(offset))?;
        let file = tokio::fs::File::from_std(file);
        let stream = ReaderStream::with_capacity(file.take(length), 128 << 10);
        let (progress, id) = (self.progress.clone(), id.to_owned());
        let (mut sent, mut reported) = (offset, Instant::now());
        let counted = futures_util::StreamExt::inspect(stream, move |chunk| {
            if let Ok(chunk) = chunk {
                sent += chunk.len() as u64;
                if reported.elapsed() > Duration::from_millis(100) {
                    reported = Instant::now();
                    progress.report(Event::counted(&id, "Pushing", sent, size));
                }
            }
        });
        Ok(reqwest::Body::wrap_stream(counted))
    }
}

fn location(client: &Client, response: &Response) -> Result<String> {
    response
        .headers()
        .get("location")
        .and_then(|v| v.to_str().ok())
        .map(|text| client.address(text))
        .ok_or_else(|| Error::malformed("the registry's answer to an upload", "it has no Location"))
}
