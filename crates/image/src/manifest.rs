//! Manifests, indexes and platforms (OCI image specification, and Docker's schema 2 which it grew from).

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Digest, Error, Result};

/// The media types that are read and written.
pub mod media {
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
    /// No specification's: Docker's archives may hold such layers, other registries' clients may not read them.
    pub const LAYER_XZ: &str = "application/vnd.oci.image.layer.v1.tar+xz";
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    pub const DOCKER_SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1+json";
    pub const DOCKER_SCHEMA1_SIGNED: &str =
        "application/vnd.docker.distribution.manifest.v1+prettyjws";

    /// What a registry is asked for.
    pub const ACCEPTED: [&str; 4] = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST];
}

/// A pointer to content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// A pointer without annotations.
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Descriptor {
        Descriptor {
            media_type: media_type.to_owned(),
            digest,
            size,
            platform: None,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
        }
    }

    /// A pointer to `bytes`.
    pub fn of(media_type: &str, bytes: &[u8]) -> Descriptor {
        Descriptor::new(media_type, Digest::of(bytes), bytes.len() as u64)
    }
}

/// An operating system and architecture, in Go's words.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    pub os: String,
    pub architecture: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    #[serde(
        rename = "os.version",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub os_version: Option<String>,
}

impl Platform {
    /// Linux on an architecture in Go's words.
    pub fn linux(architecture: &str) -> Platform {
        Platform {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: None,
            os_version: None,
        }
    }

    /// The platform of this program.
    pub fn host() -> Platform {
        Platform::linux(go_architecture(std::env::consts::ARCH))
    }

    /// Reads `linux/arm64/v8`, `linux/amd64`, `arm64`, or the kernel's names (`x86_64`, `aarch64`).
    ///
    /// # Errors
    /// [`Error::Invalid`] where it is none.
    pub fn parse(text: &str) -> Result<Platform> {
        let parts: Vec<&str> = text.split('/').collect();
        let word = |p: &&str| {
            !p.is_empty()
                && p.bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        if !parts.iter().all(word) {
            return Err(Error::Invalid(format!(
                "{text:?} is not a platform: write linux/amd64 or linux/arm64/v8"
            )));
        }
        let platform = |os: &str, architecture: &str, variant: Option<&str>| Platform {
            os: os.to_ascii_lowercase(),
            architecture: go_architecture(&architecture.to_ascii_lowercase()).to_owned(),
            variant: variant.map(|v| v.to_ascii_lowercase()),
            os_version: None,
        };
        match parts[..] {
            ["linux"] => Ok(Platform::host()),
            [architecture] if is_architecture(architecture) => {
                Ok(platform("linux", architecture, None))
            }
            [other] => Err(Error::Invalid(format!(
                "{other:?}: unknown operating system or architecture: write linux/amd64 or linux/arm64/v8"
            ))),
            [os, architecture] => Ok(platform(os, architecture, None)),
            [os, architecture, variant] => Ok(platform(os, architecture, Some(variant))),
            _ => Err(Error::Invalid(format!(
                "{text:?} is not a platform: write linux/amd64 or linux/arm64/v8"
            ))),
        }
    }

    /// How well an image for `other` serves here: none where it does not, else the less the better.
    pub fn accepts(&self, other: &Platform) -> Option<u32> {
        if self.os != other.os || self.architecture != go_architecture(&other.architecture) {
            return None;
        }
        let level = |p: &Platform, default: u32| match p.variant.as_deref() {
            None | Some("") => Some(default),
            Some(v) => v.strip_prefix('v')?.parse().ok(),
        };
        // Without a word, arm64 means v8, arm means v7, and amd64 means v1 (platforms in containerd).
        let default = match self.architecture.as_str() {
            "arm64" => 8,
            "arm" => 7,
            _ => 1,
        };
        let (wanted, offered) = (level(self, default)?, level(other, default)?);
        // An older variant runs on a newer processor, not the reverse.
        wanted.checked_sub(offered)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// Go's word for an architecture, from Linux's, Rust's, Debian's or Go's.
pub fn go_architecture(name: &str) -> &str {
    match name {
        "x86_64" | "x86-64" => "amd64",
        "aarch64" => "arm64",
        "armhf" | "armv7l" | "armel" => "arm",
        "i386" | "i686" | "x86" => "386",
        "powerpc64le" | "ppc64el" => "ppc64le",
        "mips64el" => "mips64le",
        other => other,
    }
}

/// Whether Go, the kernel, Debian or Rust calls an architecture so.
pub(crate) fn is_architecture(name: &str) -> bool {
    const KNOWN: [&str; 13] = [
        "386", "amd64", "arm", "arm64", "loong64", "mips", "mips64", "mips64le", "mipsle", "ppc64",
        "ppc64le", "riscv64", "s390x",
    ];
    KNOWN.contains(&go_architecture(&name.to_ascii_lowercase()))
}

/// An image manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    pub schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// A list of manifests, one per platform.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    pub schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    pub manifests: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// Either of the two.
#[allow(clippy::large_enum_variant)] // made once per pull
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    Manifest(Manifest),
    Index(Index),
}

impl Document {
    /// Reads a manifest or an index. A document that could be read as both is refused (CVE-2021-41190).
    ///
    /// # Errors
    /// [`Error::Malformed`], or [`Error::Unsupported`] for Docker's schema 1.
    pub fn parse(bytes: &[u8]) -> Result<Document> {
        let wrong = |why: String| Error::malformed("the manifest", why);
        let value: serde_json::Value =
            serde_json::from_slice(bytes).map_err(|e| wrong(e.to_string()))?;
        let has = |key: &str| value.get(key).is_some();
        if value.get("schemaVersion").and_then(|v| v.as_u64()) == Some(1) || has("fsLayers") {
            return Err(Error::Unsupported(
                "the registry offers this image only as Docker schema 1, which is long deprecated: push it again with a current tool"
                    .to_owned(),
            ));
        }
        let document = match (has("manifests"), has("layers") || has("config")) {
            (true, true) => return Err(wrong("it is a manifest and an index at once".to_owned())),
            (true, false) => {
                let index: Index =
                    serde_json::from_value(value).map_err(|e| wrong(e.to_string()))?;
                if let Some(kind) = &index.media_type
                    && ![media::OCI_INDEX, media::DOCKER_LIST].contains(&kind.as_str())
                {
                    return Err(wrong(format!("an index of media type {kind}")));
                }
                Document::Index(index)
            }
            _ => {
                let manifest: Manifest =
                    serde_json::from_value(value).map_err(|e| wrong(e.to_string()))?;
                if let Some(kind) = &manifest.media_type
                    && ![media::OCI_MANIFEST, media::DOCKER_MANIFEST].contains(&kind.as_str())
                {
                    return Err(wrong(format!("a manifest of media type {kind}")));
                }
                Document::Manifest(manifest)
            }
        };
        match &document {
            Document::Manifest(m) if m.schema_version != 2 => {
                Err(wrong(format!("schema version {}", m.schema_version)))
            }
            Document::Index(i) if i.schema_version != 2 => {
                Err(wrong(format!("schema version {}", i.schema_version)))
            }
            _ => Ok(document),
        }
    }
}

impl Index {
    /// The manifest that serves `wanted` best.
    pub fn select(&self, wanted: &Platform) -> Option<&Descriptor> {
        self.manifests
            .iter()
            .filter_map(|d| Some((wanted.accepts(d.platform.as_ref()?)?, d)))
            .min_by_key(|(rank, _)| *rank)
            .map(|(_, d)| d)
            .or_else(|| match &self.manifests[..] {
                // One manifest that does not say what it is for: its configuration will.
                [only] if only.platform.is_none() => Some(only),
                _ => None,
            })
    }

    /// The platforms it has, for messages.
    pub fn platforms(&self) -> String {
        let known: Vec<String> = self
            .manifests
            .iter()
            .filter_map(|d| d.platform.as_ref())
            .filter(|p| p.os != "unknown")
            .map(Platform::to_string)
            .collect();
        if known.is_empty() {
            "none that it names".to_owned()
        } else {
            known.join(", ")
        }
    }
}

impl Manifest {
    /// An OCI manifest.
    pub fn new(config: Descriptor, layers: Vec<Descriptor>) -> Manifest {
        Manifest {
            schema_version: 2,
            media_type: Some(media::OCI_MANIFEST.to_owned()),
            config,
            layers,
            annotations: BTreeMap::new(),
        }
    }

    /// The media type to send it with.
    pub fn media_type(&self) -> &str {
        self.media_type.as_deref().unwrap_or(media::OCI_MANIFEST)
    }
}

/// Fuzz entry.
pub fn fuzz_manifest(data: &[u8]) {
    match Document::parse(data) {
        Ok(Document::Index(index)) => {
            let _ = index.select(&Platform::host());
            let _ = index.platforms();
        }
        Ok(Document::Manifest(manifest)) => {
            let bytes = serde_json::to_vec(&manifest).unwrap_or_default();
            assert_eq!(
                Document::parse(&bytes).ok(),
                Some(Document::Manifest(manifest))
            );
        }
        Err(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn index(platforms: &[&str]) -> Index {
        let manifests = platforms
            .iter()
            .map(|p| Descriptor {
                platform: Some(Platform::parse(p).unwrap()),
                ..Descriptor::of(media::OCI_MANIFEST, p.as_bytes())
            })
            .collect();
        Index {
            schema_version: 2,
            media_type: None,
            manifests,
            annotations: BTreeMap::new(),
        }
    }

    fn chosen(index: &Index, wanted: &str) -> Option<String> {
        index
            .select(&Platform::parse(wanted).unwrap())
            .map(|d| d.platform.as_ref().unwrap().to_string())
    }

    #[test]
    fn the_nearest_variant_that_runs_is_chosen() {
        let list = index(&[
            "linux/arm/v5",
            "linux/arm/v7",
            "linux/arm64/v8",
            "linux/amd64",
            "windows/amd64",
        ]);
        assert_eq!(
            chosen(&list, "linux/arm/v6").as_deref(),
            Some("linux/arm/v5")
        );
        assert_eq!(chosen(&list, "linux/arm").as_deref(), Some("linux/arm/v7"));
        assert_eq!(chosen(&list, "aarch64").as_deref(), Some("linux/arm64/v8"));
        assert_eq!(chosen(&list, "x86_64").as_deref(), Some("linux/amd64"));
        assert_eq!(chosen(&list, "linux/s390x"), None);
    }

    #[test]
    fn a_document_that_is_two_things_is_refused() {
        let both = br#"{"schemaVersion":2,"manifests":[],"layers":[],"config":{}}"#;
        assert!(Document::parse(both).is_err());
        assert!(matches!(
            Document::parse(br#"{"schemaVersion":1,"fsLayers":[]}"#),
            Err(Error::Unsupported(_))
        ));
        let liar = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","manifests":[]}"#;
        assert!(Document::parse(liar).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(text in r#"[\{\}\[\]":,a-z0-9]{0,80}"#) {
            fuzz_manifest(text.as_bytes());
            crate::config::fuzz_config(text.as_bytes());
            let _ = Platform::parse(&text);
        }
    }
}
