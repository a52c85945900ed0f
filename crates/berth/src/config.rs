//! The one configuration file, `berth.toml`. Every key is documented in `docs/configuration.md`, and the
//! test below holds the two together.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::failure::Failure;

/// What the file may say. All keys may be left out.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// Where the daemon keeps everything.
    pub state_dir: Option<PathBuf>,
    /// The daemon's own socket.
    pub socket: Option<PathBuf>,
    /// The Docker Engine API socket.
    pub docker_socket: Option<PathBuf>,
    /// Group that may use the sockets.
    pub group: Option<String>,
    pub log: Log,
    pub containers: Containers,
    pub machines: Machines,
    pub network: Network,
    pub registries: Registries,
}

/// The daemon's own log.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Log {
    /// error, warn, info, debug, trace, or a filter such as `info,net=debug`.
    pub level: Option<String>,
    /// text or json.
    pub format: Option<LogFormat>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Defaults of containers.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Containers {
    /// Log driver: json-file, local or none.
    pub log_driver: Option<String>,
    /// Its options, as in max-size = "10m".
    pub log_options: BTreeMap<String, String>,
    /// Whether containers get a small init unless they say otherwise.
    pub init: Option<bool>,
    /// Seconds between the stop signal and the kill.
    pub stop_timeout: Option<u64>,
    /// Size of /dev/shm, as in "64m".
    pub shm_size: Option<String>,
    /// Parent control group.
    pub cgroup_parent: Option<String>,
}

/// Defaults of machines.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Machines {
    /// Seconds that guests have to power off when the host goes down.
    pub stop_timeout: Option<u64>,
}

/// Defaults of networks.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Network {
    /// Subnet of the default network, as in "172.17.0.0/16".
    pub default_subnet: Option<String>,
    /// Name servers of containers instead of the host's.
    pub dns: Vec<String>,
}

/// How registries are reached.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Registries {
    /// Registries spoken to over plain HTTP, as in "registry.test:5000"; loopback always is.
    pub insecure: Vec<String>,
    /// PEM files of authorities that vouch for registries, besides the system's.
    pub authorities: Vec<PathBuf>,
}

impl Config {
    /// Reads the file; a missing one is empty unless it was named by the user.
    ///
    /// # Errors
    /// With the place and the known keys where it cannot be understood.
    pub fn load(path: &Path, required: bool) -> Result<Config, Failure> {
        match std::fs::read_to_string(path) {
            Ok(text) => Config::parse(&text).map_err(|error| {
                Failure::invalid(format!("{} cannot be understood: {error}", path.display()))
                    .with_fix("every key is described in docs/configuration.md")
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => {
                Ok(Config::default())
            }
            Err(error) => Err(Failure::io(
                format!("cannot read {}", path.display()),
                &error,
            )),
        }
    }

    fn parse(text: &str) -> Result<Config, toml::de::Error> {
        toml::from_str(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_unknown_key_is_named() {
        let error = Config::parse("sokcet = \"/x\"").unwrap_err().to_string();
        assert!(
            error.contains("sokcet") && error.contains("docker-socket"),
            "{error}"
        );
    }

    #[test]
    fn the_documented_file_is_read_and_names_every_key() {
        let page = include_str!("../../../docs/configuration.md");
        let start = page.find("```toml\n").unwrap() + 8;
        let text = &page[start..start + page[start..].find("```").unwrap()];
        let config = Config::parse(text).unwrap();
        assert!(
            config.state_dir.is_some() && config.socket.is_some() && config.docker_socket.is_some()
        );
        assert!(
            config.group.is_some() && config.log.level.is_some() && config.log.format.is_some()
        );
        let containers = &config.containers;
        assert!(containers.log_driver.is_some() && !containers.log_options.is_empty());
        assert!(containers.init.is_some() && containers.stop_timeout.is_some());
        assert!(containers.shm_size.is_some() && containers.cgroup_parent.is_some());
        assert!(config.machines.stop_timeout.is_some());
        assert!(config.network.default_subnet.is_some() && !config.network.dns.is_empty());
        assert!(!config.registries.insecure.is_empty());
        assert!(!config.registries.authorities.is_empty());
    }

    proptest! {
        #[test]
        fn no_file_panics(text in "[a-z\\[\\]=\"\n .-]{0,200}") {
            let _ = Config::parse(&text);
        }
    }
}
