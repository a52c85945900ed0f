//! Legacy links (`--link`): another container's name and address in `/etc/hosts` and, on the default bridge, its ports
//! and environment in variables, as dockerd's `daemon/links` gives them.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::Engine;
use crate::container::host_config::HostConfig;
use crate::container::inventory::Inventory;
use crate::container::record::{Container, Record};
use crate::container::{network, networking};
use crate::error::{Error, Result};

/// A link of a container on the default bridge.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Link {
    /// The id of the container it leads to.
    pub to: String,
    pub alias: String,
}

/// Reads `name`, `name:alias`, and what inspect shows, `/name:/own/alias`.
///
/// # Errors
/// [`Error::Invalid`] for anything else.
pub(crate) fn parse(text: &str) -> Result<(&str, &str)> {
    let wrong = || Error::Invalid(format!("bad format for links: {text}"));
    let (name, alias) = match text.split_once(':') {
        Some((name, alias)) => (name, alias.rsplit('/').next().unwrap_or(alias)),
        None => (text, text.trim_start_matches('/')),
    };
    let name = name.strip_prefix('/').unwrap_or(name);
    let plain = |word: &str| {
        !word.is_empty()
            && word
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
    };
    if plain(name) && plain(alias) {
        Ok((name, alias))
    } else {
        Err(wrong())
    }
}

/// The links of a new container. Those of user-defined networks stay with the network's settings.
///
/// # Errors
/// Where one is malformed or leads to a container that is not there, and where the network has no room for links.
pub(crate) fn wanted(host: &HostConfig, inventory: &Inventory) -> Result<Vec<Link>> {
    let asked = host.links.as_deref().unwrap_or_default();
    if asked.is_empty() {
        return Ok(Vec::new());
    }
    if host.network_mode.starts_with("container:") {
        return Err(Error::Invalid(
            "conflicting options: container type network can't be used with links. This would result in undefined behavior".into(),
        ));
    }
    let mut links: Vec<Link> = Vec::new();
    for text in asked {
        let (name, alias) = parse(text)?;
        let other = inventory.find(name).map_err(|error| match error {
            Error::NoSuchContainer(_) => {
                Error::NotFound(format!("could not get container for {name}: {error}"))
            }
            other => other,
        })?;
        if other.record().host.network_mode == "host" {
            return Err(Error::Invalid(
                "conflicting options: host type networking can't be used with links. This would result in undefined behavior".into(),
            ));
        }
        links.retain(|link| link.alias != alias);
        links.push(Link {
            to: other.id.clone(),
            alias: alias.into(),
        });
    }
    if host.network_mode == "bridge" {
        Ok(links)
    } else {
        Ok(Vec::new())
    }
}

fn address_in(record: &Record, network: &str) -> Option<String> {
    let settings = record.networks.get(network)?;
    let address = [&settings.ip_address, &settings.global_ipv6_address];
    address
        .into_iter()
        .find(|address| !address.is_empty())
        .cloned()
}

impl Engine {
    /// The lines that links add to a container's `/etc/hosts`: name and address.
    pub(crate) fn linked_hosts(&self, record: &Record) -> Vec<(String, String)> {
        let mut lines = Vec::new();
        for link in &record.links {
            let Some(other) = self.inventory.get(&link.to) else {
                continue;
            };
            let other = other.record();
            if let (true, Some(address)) = (other.phase.lives(), address_in(&other, "bridge")) {
                let mut names = vec![link.alias.clone(), other.config.hostname.clone()];
                if other.name != link.alias {
                    names.push(other.name.clone());
                }
                lines.extend(names.into_iter().map(|name| (name, address.clone())));
            }
        }
        for (network, settings) in &record.networks {
            for text in settings.links.iter().flatten() {
                let Ok((name, alias)) = parse(text) else {
                    continue;
                };
                let Ok(other) = self.inventory.find(name) else {
                    continue;
                };
                let other = other.record();
                if let (true, Some(address)) = (other.phase.lives(), address_in(&other, network)) {
                    lines.push((alias.to_owned(), address));
                }
            }
        }
        lines
    }

    /// The variables that links add to a container's environment.
    ///
    /// # Errors
    /// [`Error::Conflict`] where a linked container does not run.
    pub(crate) fn linked_environment(&self, record: &Record) -> Result<Vec<String>> {
        let mut variables = Vec::new();
        for link in &record.links {
            let other = self
                .inventory
                .get(&link.to)
                .ok_or_else(|| Error::NoSuchContainer(link.to.clone()))?;
            let other = other.record();
            let address = match address_in(&other, "bridge") {
                Some(address) if other.phase.lives() => address,
                _ => {
                    return Err(Error::Conflict(format!(
                        "Cannot link to a non running container: /{} AS /{}/{}",
                        other.name, record.name, link.alias
                    )));
                }
            };
            variables.extend(environment(&record.name, &link.alias, &address, &other));
        }
        Ok(variables)
    }

    /// Writes the hosts files of the containers that are linked to one that has (or had) an address.
    pub(crate) fn refresh_links_to(&self, target: &Container) {
        let name = target.name();
        for container in self.inventory.all() {
            let leads_here = |record: &Record| {
                record.links.iter().any(|link| link.to == target.id)
                    || record
                        .networks
                        .values()
                        .flat_map(|settings: &networking::EndpointSettings| settings.links.iter())
                        .flatten()
                        .filter_map(|text| parse(text).ok())
                        .any(|(to, _)| to == name || target.id.starts_with(to))
            };
            // Copied only where it is wanted: this looks at all containers at each start.
            let record = {
                let record = container.record();
                if container.id == target.id || !record.phase.lives() || !leads_here(&record) {
                    continue;
                }
                record.clone()
            };
            let linked = self.linked_hosts(&record);
            let written =
                network::write_hosts(&container, &record.endpoints, &self.networks, &linked);
            if let Err(error) = written {
                tracing::warn!(container = container.id, %error, "the hosts file of a linked container is not up to date");
            }
        }
    }

    /// Removes a link by its name, `/CONTAINER/ALIAS`.
    ///
    /// # Errors
    /// [`Error::NotFound`] where there is none.
    pub(crate) fn remove_link(&self, name: &str) -> Result<()> {
        let none = || Error::NotFound(format!("No such link: {name}"));
        let (own, alias) = name
            .trim_start_matches('/')
            .split_once('/')
            .ok_or_else(none)?;
        let container = self.inventory.find(own).map_err(|_| none())?;
        if !container
            .record()
            .links
            .iter()
            .any(|link| link.alias == alias)
        {
            return Err(none());
        }
        container.change(base::file::Durability::Process, |record| {
            record.links.retain(|link| link.alias != alias);
        })?;
        let record = container.record().clone();
        if record.phase.lives() {
            let linked = self.linked_hosts(&record);
            network::write_hosts(&container, &record.endpoints, &self.networks, &linked)?;
        }
        Ok(())
    }

    /// By id of a container, the names by which links of others lead to it, `/own/alias`.
    pub(crate) fn links_by_target(&self) -> HashMap<String, Vec<String>> {
        let mut names: HashMap<String, Vec<String>> = HashMap::new();
        for other in self.inventory.all() {
            let other = other.record();
            for link in &other.links {
                let name = format!("/{}/{}", other.name, link.alias);
                names.entry(link.to.clone()).or_default().push(name);
            }
        }
        names
    }

    /// The links of a container as inspect shows them: `/other:/own/alias`.
    pub(crate) fn shown_links(&self, record: &Record) -> Option<Vec<String>> {
        if record.links.is_empty() {
            return record.host.links.clone().filter(|links| {
                // Those that are gone are not shown.
                !links.is_empty() && record.host.network_mode != "bridge"
            });
        }
        let links = record.links.iter().map(|link| {
            let other = self
                .inventory
                .get(&link.to)
                .map_or_else(|| link.to.clone(), |other| other.name());
            format!("/{other}:/{}/{}", record.name, link.alias)
        });
        Some(links.collect())
    }
}

/// The variables of one link, named after its alias.
fn environment(own: &str, alias: &str, address: &str, other: &Record) -> Vec<String> {
    let prefix = alias.replace('-', "_").to_uppercase();
    let mut ports: Vec<(u16, &str)> = other
        .config
        .exposed_ports
        .iter()
        .flat_map(|set| set.iter())
        .filter_map(|text| {
            let (port, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
            Some((port.parse().ok()?, protocol))
        })
        .collect();
    ports.sort_by_key(|(port, protocol)| (*port, *protocol != "tcp"));
    let mut variables = Vec::new();
    if let Some((port, protocol)) = ports.first() {
        variables.push(format!("{prefix}_PORT={protocol}://{address}:{port}"));
    }
    for (port, protocol) in ports {
        let upper = protocol.to_uppercase();
        let name = format!("{prefix}_PORT_{port}_{upper}");
        variables.push(format!("{name}={protocol}://{address}:{port}"));
        variables.push(format!("{name}_ADDR={address}"));
        variables.push(format!("{name}_PORT={port}"));
        variables.push(format!("{name}_PROTO={protocol}"));
    }
    variables.push(format!("{prefix}_NAME=/{own}/{alias}"));
    for entry in &other.config.env {
        if let Some((name, value)) = entry.split_once('=')
            && !matches!(name, "HOME" | "PATH")
        {
            variables.push(format!("{prefix}_ENV_{name}={value}"));
        }
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn links_are_read_in_all_their_forms() {
        assert_eq!(parse("db").unwrap(), ("db", "db"));
        assert_eq!(parse("db:data").unwrap(), ("db", "data"));
        assert_eq!(parse("/db:/web/data").unwrap(), ("db", "data"));
        for wrong in ["", ":", "db:", ":a", "a b", "a:b:c", "db:x y"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_link_tells_ports_and_environment() {
        let mut other = Record::default();
        other.config.env = vec!["PATH=/bin".into(), "PASSWORD=x".into()];
        other.config.exposed_ports =
            Some(serde_json::from_str(r#"{"5432/tcp":{},"53/udp":{}}"#).unwrap());
        let variables = environment("web", "my-db", "172.17.0.5", &other);
        for wanted in [
            "MY_DB_PORT=udp://172.17.0.5:53",
            "MY_DB_PORT_5432_TCP=tcp://172.17.0.5:5432",
            "MY_DB_PORT_5432_TCP_ADDR=172.17.0.5",
            "MY_DB_PORT_53_UDP_PROTO=udp",
            "MY_DB_NAME=/web/my-db",
            "MY_DB_ENV_PASSWORD=x",
        ] {
            assert!(variables.iter().any(|v| v == wanted), "{variables:?}");
        }
        assert!(!variables.iter().any(|v| v.contains("PATH")));
    }

    proptest! {
        #[test]
        fn no_link_puts_a_second_word_into_a_hosts_file(text in ".{0,30}") {
            if let Ok((name, alias)) = parse(&text) {
                prop_assert!(!name.contains(char::is_whitespace) && !alias.contains(char::is_whitespace));
            }
        }
    }
}
