//! The image configuration (OCI image specification, config.md) with what Docker adds to it.
//!
//! Unknown members are kept, so that a configuration that is read and written again loses nothing.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Digest, Error, Result};

/// The largest configuration or manifest that is read, in bytes; registries refuse more than 4 MiB.
pub const MAX_DOCUMENT: u64 = 8 << 20;

/// An image's configuration document. Its sha256 is the image's id.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageConfig {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub author: String,
    #[serde(default)]
    pub architecture: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
    #[serde(default)]
    pub os: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<RunConfig>,
    #[serde(default)]
    pub rootfs: RootFs,
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub history: Vec<History>,
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// How to run it. The names on the wire are Docker's.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RunConfig {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub user: String,
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub exposed_ports: BTreeMap<String, Value>,
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub env: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub volumes: BTreeMap<String, Value>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_timeout: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<Healthcheck>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shell: Option<Vec<String>>,
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub on_build: Vec<String>,
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// A health check; durations in nanoseconds, 0 for the default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Healthcheck {
    /// `["NONE"]`, `["CMD", …]`, `["CMD-SHELL", text]`, or empty: as the base image says.
    #[serde(
        default,
        deserialize_with = "nullable",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub test: Vec<String>,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub interval: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub timeout: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub start_period: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub start_interval: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retries: i64,
}

/// The layers, lowest first, by the digests of their uncompressed tars.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RootFs {
    #[serde(rename = "type", default = "layers_type")]
    pub kind: String,
    #[serde(default, deserialize_with = "nullable")]
    pub diff_ids: Vec<Digest>,
}

impl Default for RootFs {
    fn default() -> RootFs {
        RootFs {
            kind: layers_type(),
            diff_ids: Vec::new(),
        }
    }
}

fn layers_type() -> String {
    "layers".to_owned()
}

/// How one layer (or one change of the configuration) came to be.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub created_by: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub author: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub comment: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub empty_layer: bool,
}

fn is_zero(value: &i64) -> bool {
    *value == 0
}

/// Go writes empty lists and maps as `null`.
fn nullable<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

impl ImageConfig {
    /// Reads a configuration document.
    ///
    /// # Errors
    /// [`Error::Malformed`] where it is not one, or names a root file system that is not made of layers.
    pub fn parse(bytes: &[u8]) -> Result<ImageConfig> {
        let config: ImageConfig = serde_json::from_slice(bytes)
            .map_err(|e| Error::malformed("the image configuration", e))?;
        if config.rootfs.kind != "layers" {
            return Err(Error::malformed(
                "the image configuration",
                format!("rootfs.type is {:?}, not \"layers\"", config.rootfs.kind),
            ));
        }
        if config.rootfs.diff_ids.len() > 500 {
            return Err(Error::LayerLimit(format!(
                "{} layers; overlayfs stacks at most 500",
                config.rootfs.diff_ids.len()
            )));
        }
        Ok(config)
    }

    /// The document as it is stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// How to run it; empty where the image does not say.
    pub fn run(&self) -> RunConfig {
        self.config.clone().unwrap_or_default()
    }

    /// A configuration for this host's operating system and architecture without layers.
    pub fn blank(platform: &crate::Platform) -> ImageConfig {
        ImageConfig {
            architecture: platform.architecture.clone(),
            variant: platform.variant.clone().unwrap_or_default(),
            os: platform.os.clone(),
            ..ImageConfig::default()
        }
    }
}

/// Fuzz entry.
pub fn fuzz_config(data: &[u8]) {
    if let Ok(config) = ImageConfig::parse(data) {
        assert_eq!(ImageConfig::parse(&config.to_bytes()).ok(), Some(config));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_docker_adds_is_kept() {
        let text = r#"{"architecture":"amd64","os":"linux","config":{"Env":["A=b"],"Cmd":null,"Volumes":null,
            "Healthcheck":{"Test":["CMD","x"],"Interval":5},"Shell":["/bin/bash","-c"],"OnBuild":["RUN x"],
            "ArgsEscaped":true},"rootfs":{"type":"layers","diff_ids":null},"history":null,"moby.buildkit":1}"#;
        let config = ImageConfig::parse(text.as_bytes()).unwrap();
        let again = ImageConfig::parse(&config.to_bytes()).unwrap();
        assert_eq!(config, again);
        let run = again.run();
        assert_eq!(run.healthcheck.unwrap().interval, 5);
        assert_eq!(run.shell.unwrap()[0], "/bin/bash");
        assert_eq!(run.on_build, ["RUN x"]);
        assert!(run.other.contains_key("ArgsEscaped") && again.other.contains_key("moby.buildkit"));
    }

    #[test]
    fn a_root_file_system_that_is_not_made_of_layers_is_refused() {
        assert!(ImageConfig::parse(br#"{"rootfs":{"type":"windows","diff_ids":[]}}"#).is_err());
        assert!(ImageConfig::parse(b"[]").is_err());
    }
}
