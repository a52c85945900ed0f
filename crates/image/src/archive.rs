//! Archives of images, in and out (`docker save`, `docker load`): an OCI image layout in a tar (OCI image
//! specification, image-layout.md) that also holds Docker's `manifest.json`, so that every tool reads it. Read are
//! these, plain OCI layouts, and what older Docker versions wrote.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufReader, BufWriter, Read, Write};

use serde::{Deserialize, Serialize};

use crate::config::{ImageConfig, MAX_DOCUMENT};
use crate::error::At;
use crate::layer::compression::{self, Compression};
use crate::layer::tar::{Entry, EntryKind, TarReader, TarWriter};
use crate::layer::tree;
use crate::layer::unpack::{damaged, lossy};
use crate::manifest::{Descriptor, Document, Index, Manifest, media};
use crate::progress::{Cancel, Event, Progress};
use crate::store::{Lease, NewImage};
use crate::{Digest, Error, ImageId, Platform, Reference, Result, Store};

const NAME: &str = "io.containerd.image.name";
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// One image of `manifest.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// An image that came out of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    pub id: ImageId,
    /// The names it got, as Docker shows them; empty: it has none.
    pub names: Vec<String>,
}

impl Store {
    /// Writes images, by name or id, into one archive. Those given by name keep their names.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`], [`Error::NoSuchPlatform`], and those of `sink`.
    pub fn save(
        &self,
        names: &[String],
        platform: Option<&Platform>,
        sink: impl Write,
    ) -> Result<()> {
        let lease = self.lease();
        let mut docker: Vec<(ImageId, DockerImage)> = Vec::new();
        let mut manifests: Vec<Descriptor> = Vec::new();
        let mut blobs: BTreeMap<Digest, u64> = BTreeMap::new();
        let path = |digest: &Digest| format!("blobs/sha256/{}", digest.hex());
        for name in names {
            let image = self.inspect(name)?;
            if let Some(wanted) = platform
                && wanted.accepts(&image.platform).is_none()
            {
                return Err(Error::NoSuchPlatform {
                    reference: name.clone(),
                    wanted: wanted.to_string(),
                    available: image.platform.to_string(),
                });
            }
            // An id saves the image without names, as docker does.
            let by_name = Reference::parse(name).map(Reference::or_latest).ok();
            let tag =
                by_name.filter(|r| r.tag().is_some() && image.repo_tags.contains(&r.familiar()));
            let record = &image.record;
            for digest in [image.id, record.manifest.digest]
                .into_iter()
                .chain(record.layers.iter().map(|l| l.blob.digest))
            {
                lease.hold(digest);
                blobs.insert(
                    digest,
                    self.content()
                        .size(&digest)
                        .ok_or(Error::NoSuchBlob(digest))?,
                );
            }
            let mut descriptor = Descriptor {
                platform: Some(image.platform.clone()),
                ..record.manifest.clone()
            };
            if let Some(tag) = &tag {
                descriptor
                    .annotations
                    .insert(NAME.to_owned(), tag.to_string());
                descriptor.annotations.insert(
                    REF_NAME.to_owned(),
                    tag.tag().unwrap_or_default().to_owned(),
                );
            }
            manifests.push(descriptor);
            let shown = tag.map(|t| t.familiar());
            match docker.iter_mut().find(|(id, _)| *id == image.id) {
                Some((_, known)) => known.repo_tags.get_or_insert_default().extend(shown),
                None => docker.push((
                    image.id,
                    DockerImage {
                        config: path(&image.id),
                        repo_tags: shown.map(|name| vec![name]),
                        layers: record.layers.iter().map(|l| path(&l.blob.digest)).collect(),
                    },
                )),
            }
        }
        let mut tar = TarWriter::new(BufWriter::with_capacity(256 << 10, sink));
        let doing = || "writing the archive".to_owned();
        for folder in ["blobs", "blobs/sha256"] {
            tar.entry(&Entry::new(EntryKind::Directory, folder, 0o755))
                .doing(doing)?;
        }
        for (digest, size) in blobs {
            let entry = Entry {
                size,
                ..Entry::new(EntryKind::File, path(&digest), 0o444)
            };
            tar.entry(&entry).doing(doing)?;
            std::io::copy(&mut self.content().reader(&digest)?, &mut tar).doing(doing)?;
        }
        let index = Index {
            schema_version: 2,
            media_type: Some(media::OCI_INDEX.to_owned()),
            manifests,
            annotations: BTreeMap::new(),
        };
        let images: Vec<DockerImage> = docker.into_iter().map(|(_, image)| image).collect();
        let json = |e: serde_json::Error| Error::malformed("the archive's index", e);
        tar.file(
            "index.json",
            0o444,
            &serde_json::to_vec(&index).map_err(json)?,
        )
        .doing(doing)?;
        tar.file(
            "manifest.json",
            0o444,
            &serde_json::to_vec(&images).map_err(json)?,
        )
        .doing(doing)?;
        tar.file("oci-layout", 0o444, br#"{"imageLayoutVersion":"1.0.0"}"#)
            .doing(doing)?;
        tar.finish().doing(doing)?.flush().doing(doing)
    }

    /// Reads all images of an archive, compressed or not. Of images for several platforms the wanted one is taken.
    ///
    /// # Errors
    /// [`Error::Malformed`], [`Error::DigestMismatch`], and what the unpacker refuses. Nothing is left of an archive
    /// that is refused, but images it held before the broken one stay.
    pub fn load(
        &self,
        source: impl Read + Send,
        platform: Option<&Platform>,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Vec<Loaded>> {
        let lease = self.lease();
        let result = self.load_held(source, platform, progress, cancel, &lease);
        drop(lease);
        // What no image refers to: all of a refused archive, or attestations and the like.
        self.gc()?;
        result
    }

    fn load_held(
        &self,
        source: impl Read + Send,
        platform: Option<&Platform>,
        progress: &dyn Progress,
        cancel: &Cancel,
        lease: &Lease,
    ) -> Result<Vec<Loaded>> {
        let archive = self.read_archive(source, cancel, lease)?;
        let plans = if archive.files.contains_key("manifest.json") {
            archive.docker_images(self)?
        } else if archive.files.contains_key("index.json") {
            archive.oci_images(self, platform)?
        } else {
            return Err(Error::malformed(
                "the archive",
                "it has neither manifest.json nor index.json, so it is no image archive (a plain file system is taken by import)",
            ));
        };
        let mut loaded = Vec::new();
        for plan in plans {
            cancel.check()?;
            let one = self.load_one(plan, progress, cancel, lease)?;
            match &one.names[..] {
                [] => progress.report(Event::message(format!("Loaded image ID: {}", one.id))),
                names => {
                    for name in names {
                        progress.report(Event::message(format!("Loaded image: {name}")));
                    }
                }
            }
            loaded.push(one);
        }
        if loaded.is_empty() {
            Err(Error::malformed("the archive", "it holds no image"))
        } else {
            Ok(loaded)
        }
    }

    fn read_archive(
        &self,
        source: impl Read + Send,
        cancel: &Cancel,
        lease: &Lease,
    ) -> Result<Archive> {
        let (_, reader) = compression::reader(BufReader::with_capacity(256 << 10, source))?;
        let mut tar = TarReader::new(reader);
        let mut archive = Archive::default();
        while let Some(entry) = tar.next_entry().map_err(damaged)? {
            cancel.check()?;
            let hostile = |why: &str| Error::HostileEntry {
                entry: lossy(&entry.path),
                why: why.to_owned(),
            };
            let path = tree::clean(&entry.path)
                .ok_or_else(|| hostile("its name holds \"..\" or a NUL byte"))?;
            let path = String::from_utf8(path).map_err(|_| hostile("its name is not UTF-8"))?;
            if archive.files.len() + archive.links.len() > 100_000 {
                return Err(Error::LayerLimit(
                    "the archive holds more than 100000 files".to_owned(),
                ));
            }
            match entry.kind {
                EntryKind::File if entry.sparse.is_none() => {
                    let expected = path
                        .strip_prefix("blobs/sha256/")
                        .map(Digest::from_hex)
                        .transpose()?;
                    let (digest, size) = self.put_stream(&mut tar, expected, lease)?;
                    archive.files.insert(path, (digest, size));
                }
                EntryKind::Symlink | EntryKind::HardLink => {
                    let target = String::from_utf8_lossy(&entry.link).into_owned();
                    let target = if entry.kind == EntryKind::Symlink {
                        resolve_link(&path, &target)
                            .ok_or_else(|| hostile("a link out of the archive"))?
                    } else {
                        target
                    };
                    archive.links.insert(path, target);
                }
                EntryKind::Directory => {}
                _ => return Err(hostile("neither a file nor a folder")),
            }
        }
        tar.drain().map_err(damaged)?;
        Ok(archive)
    }

    fn load_one(
        &self,
        plan: Plan,
        progress: &dyn Progress,
        cancel: &Cancel,
        lease: &Lease,
    ) -> Result<Loaded> {
        let config = self.content().read(&plan.config)?;
        let parsed = ImageConfig::parse(&config)?;
        let diffs = &parsed.rootfs.diff_ids;
        if diffs.len() != plan.layers.len() {
            return Err(Error::malformed(
                "the archive",
                "an image's configuration and its list of layers are of different lengths",
            ));
        }
        let chains = Digest::chains(diffs);
        for chain in &chains {
            lease.hold(*chain);
        }
        // Unpacked a few at a time, placed from the lowest up.
        let mut blobs = Vec::with_capacity(diffs.len());
        let mut parent = None;
        let numbers: Vec<usize> = (0..diffs.len()).collect();
        for group in numbers.chunks(3) {
            let staged: Vec<Result<_>> = std::thread::scope(|scope| {
                let threads: Vec<_> = group
                    .iter()
                    .map(|&i| {
                        let (digest, diff, here) =
                            (plan.layers[i].0, diffs[i], self.layer(&chains[i]).is_some());
                        scope.spawn(move || {
                            if here {
                                return Ok(None);
                            }
                            self.stage(self.content().reader(&digest)?, i == 0, Some(diff), cancel)
                                .map(Some)
                        })
                    })
                    .collect();
                threads
                    .into_iter()
                    .map(|t| {
                        t.join().unwrap_or_else(|_| {
                            Err(Error::DamagedLayer("a thread failed".to_owned()))
                        })
                    })
                    .collect()
            });
            for (&i, staged) in group.iter().zip(staged) {
                let (digest, size) = plan.layers[i];
                if let Some(staged) = staged? {
                    self.place(staged, parent, lease)?;
                }
                progress.report(Event::counted(
                    diffs[i].short(),
                    "Loading layer",
                    size,
                    size,
                ));
                blobs.push(Descriptor::new(self.layer_type(&digest)?, digest, size));
                parent = Some(chains[i]);
            }
        }
        let (manifest, manifest_type) = match plan.manifest {
            Some((bytes, kind, layers)) => {
                blobs = layers;
                (bytes, kind)
            }
            None => {
                let made = Manifest::new(Descriptor::of(media::OCI_CONFIG, &config), blobs.clone());
                let bytes = serde_json::to_vec(&made)
                    .map_err(|e| Error::malformed("a manifest made here", e))?;
                (bytes, media::OCI_MANIFEST.to_owned())
            }
        };
        let new = NewImage {
            config,
            manifest,
            manifest_type,
            blobs,
            parent: None,
        };
        let id = self.register(new, &plan.names)?;
        Ok(Loaded {
            id,
            names: plan.names.iter().map(Reference::familiar).collect(),
        })
    }

    fn layer_type(&self, digest: &Digest) -> Result<&'static str> {
        let mut head = Vec::new();
        let path = self.content().path(digest);
        self.content()
            .reader(digest)?
            .take(6)
            .read_to_end(&mut head)
            .at(&path)?;
        Ok(match compression::detect(&head)? {
            Compression::None => media::OCI_LAYER,
            Compression::Gzip => media::OCI_LAYER_GZIP,
            Compression::Zstd => media::OCI_LAYER_ZSTD,
            Compression::Xz => media::LAYER_XZ,
        })
    }
}

/// Fuzz entry: any bytes as an archive of images, into a store of its own.
pub fn fuzz_archive(data: &[u8]) {
    static STORE: std::sync::OnceLock<Option<Store>> = std::sync::OnceLock::new();
    let path = std::env::temp_dir().join(format!("berth-fuzz-archive-{}", std::process::id()));
    let Some(store) = STORE.get_or_init(|| Store::open(&path).ok()) else {
        return;
    };
    let loaded = store.load(data, None, &crate::Silent, &Cancel::default());
    for image in loaded.into_iter().flatten() {
        let forced = crate::RemoveOptions {
            force: true,
            ..crate::RemoveOptions::default()
        };
        let _ = store.remove(&image.id.to_string(), forced, &|_| Vec::new());
    }
}

/// Where a link in an archive leads.
fn resolve_link(path: &str, target: &str) -> Option<String> {
    let folder = match path.rsplit_once('/') {
        Some((folder, _)) if !target.starts_with('/') => folder,
        _ => "",
    };
    let inside = tree::normal_inside(format!("{folder}/{target}").as_bytes())?;
    String::from_utf8(inside).ok()
}

/// The files of an archive, all in the store as blobs.
#[derive(Default)]
struct Archive {
    files: HashMap<String, (Digest, u64)>,
    links: HashMap<String, String>,
}

/// What to load.
struct Plan {
    config: Digest,
    layers: Vec<(Digest, u64)>,
    names: Vec<Reference>,
    /// The manifest, its type and its layers, where the archive has it.
    manifest: Option<(Vec<u8>, String, Vec<Descriptor>)>,
}

impl Archive {
    fn file(&self, path: &str) -> Result<(Digest, u64)> {
        let mut path = path.trim_start_matches("./");
        for _ in 0..8 {
            if let Some(found) = self.files.get(path) {
                return Ok(*found);
            }
            match self.links.get(path) {
                Some(target) => path = target,
                None => break,
            }
        }
        Err(Error::malformed(
            "the archive",
            format!("{path:?} is named in it and not there"),
        ))
    }

    fn document(&self, store: &Store, path: &str) -> Result<Vec<u8>> {
        let (digest, size) = self.file(path)?;
        if size > MAX_DOCUMENT {
            return Err(Error::malformed(path, "it is too large"));
        }
        store.content().read(&digest)
    }

    fn has(&self, descriptor: &Descriptor) -> Result<(Digest, u64)> {
        self.file(&format!("blobs/sha256/{}", descriptor.digest.hex()))
    }

    fn docker_images(&self, store: &Store) -> Result<Vec<Plan>> {
        let images: Vec<DockerImage> =
            serde_json::from_slice(&self.document(store, "manifest.json")?)
                .map_err(|e| Error::malformed("manifest.json", e))?;
        // The OCI half, if there is one, has the manifests with their own digests.
        let manifests = self.manifests(store).unwrap_or_default();
        let mut plans = Vec::new();
        for image in images {
            let (config, _) = self.file(&image.config)?;
            let layers = image
                .layers
                .iter()
                .map(|path| self.file(path))
                .collect::<Result<Vec<_>>>()?;
            let names = image
                .repo_tags
                .unwrap_or_default()
                .iter()
                .map(|name| Reference::parse(name).map(Reference::or_latest))
                .collect::<Result<Vec<_>>>()?;
            let manifest = manifests
                .iter()
                .find(|(m, ..)| {
                    m.config.digest == config
                        && m.layers
                            .iter()
                            .map(|l| l.digest)
                            .eq(layers.iter().map(|(digest, _)| *digest))
                })
                .map(|(m, bytes, kind)| (bytes.clone(), kind.clone(), m.layers.clone()));
            plans.push(Plan {
                config,
                layers,
                names,
                manifest,
            });
        }
        Ok(plans)
    }

    fn manifests(&self, store: &Store) -> Result<Vec<(Manifest, Vec<u8>, String)>> {
        let Document::Index(index) = Document::parse(&self.document(store, "index.json")?)? else {
            return Ok(Vec::new());
        };
        let mut found = Vec::new();
        for descriptor in &index.manifests {
            let Ok((digest, _)) = self.has(descriptor) else {
                continue;
            };
            let bytes = store.content().read(&digest)?;
            if let Ok(Document::Manifest(manifest)) = Document::parse(&bytes) {
                found.push((manifest, bytes, descriptor.media_type.clone()));
            }
        }
        Ok(found)
    }

    fn oci_images(&self, store: &Store, platform: Option<&Platform>) -> Result<Vec<Plan>> {
        let bytes = self.document(store, "index.json")?;
        let Document::Index(index) = Document::parse(&bytes)? else {
            return Err(Error::malformed("index.json", "it is not an index"));
        };
        let wanted = platform.cloned().unwrap_or_else(Platform::host);
        let mut plans = Vec::new();
        for top in &index.manifests {
            let names: Vec<Reference> = [NAME, REF_NAME]
                .iter()
                .filter_map(|key| top.annotations.get(*key))
                // A bare tag is the name of nothing.
                .find(|name| name.contains(['/', ':']))
                .map(|name| Reference::parse(name).map(Reference::or_latest))
                .transpose()?
                .into_iter()
                .collect();
            let (digest, _) = self.has(top)?;
            let mut bytes = store.content().read(&digest)?;
            let mut kind = top.media_type.clone();
            let mut document = Document::parse(&bytes)?;
            if let Document::Index(inner) = &document {
                let chosen = inner.select(&wanted).ok_or_else(|| Error::NoSuchPlatform {
                    reference: names
                        .first()
                        .map_or("the archive".to_owned(), Reference::familiar),
                    wanted: wanted.to_string(),
                    available: inner.platforms(),
                })?;
                bytes = store.content().read(&self.has(chosen)?.0)?;
                kind.clone_from(&chosen.media_type);
                document = Document::parse(&bytes)?;
            }
            let Document::Manifest(manifest) = document else {
                return Err(Error::malformed(
                    "the archive",
                    "an index points to another index",
                ));
            };
            let (config, _) = self.has(&manifest.config)?;
            let layers = manifest
                .layers
                .iter()
                .map(|l| self.has(l))
                .collect::<Result<Vec<_>>>()?;
            plans.push(Plan {
                config,
                layers,
                names,
                manifest: Some((bytes, kind, manifest.layers)),
            });
        }
        Ok(plans)
    }
}
