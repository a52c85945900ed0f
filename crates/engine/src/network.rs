//! Networks as the daemon's clients see them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use net::{Driver, Ipam, IpamConfig, Network, NetworkSpec, Subnet};

use crate::Engine;
use crate::error::{Error, Result};
use crate::filters::Filters;
use crate::volume::blocking;
use crate::wire::wire;

wire! {
    /// The body of `POST /networks/create`.
    pub struct NetworkCreate {
        pub name: String,
        pub driver: String,
        pub scope: String,
        #[serde(rename = "EnableIPv4")]
        pub enable_ipv4: Option<bool>,
        #[serde(rename = "EnableIPv6")]
        pub enable_ipv6: Option<bool>,
        #[serde(rename = "IPAM")]
        pub ipam: Option<NetworkIpam>,
        pub internal: bool,
        pub attachable: bool,
        pub ingress: bool,
        pub config_only: bool,
        pub config_from: Option<ConfigFrom>,
        pub options: Option<BTreeMap<String, String>>,
        pub labels: Option<BTreeMap<String, String>>,
    }

    /// The answer of `POST /networks/create`.
    pub struct NetworkCreated {
        pub id: String,
        pub warning: String,
    }

    /// A network as `GET /networks/X` shows it.
    pub struct NetworkInspect {
        pub name: String,
        pub id: String,
        pub created: String,
        pub scope: String,
        pub driver: String,
        #[serde(rename = "EnableIPv4")]
        pub enable_ipv4: bool,
        #[serde(rename = "EnableIPv6")]
        pub enable_ipv6: bool,
        #[serde(rename = "IPAM")]
        pub ipam: NetworkIpam,
        pub internal: bool,
        pub attachable: bool,
        pub ingress: bool,
        pub config_from: ConfigFrom,
        pub config_only: bool,
        pub containers: BTreeMap<String, NetworkContainer>,
        pub options: BTreeMap<String, String>,
        pub labels: BTreeMap<String, String>,
    }

    /// How a network's addresses are managed.
    pub struct NetworkIpam {
        pub driver: String,
        pub options: Option<BTreeMap<String, String>>,
        pub config: Vec<NetworkIpamConfig>,
    }

    /// One subnet.
    pub struct NetworkIpamConfig {
        #[serde(skip_serializing_if = "String::is_empty")]
        pub subnet: String,
        #[serde(rename = "IPRange", skip_serializing_if = "String::is_empty")]
        pub ip_range: String,
        #[serde(skip_serializing_if = "String::is_empty")]
        pub gateway: String,
        #[serde(rename = "AuxiliaryAddresses", skip_serializing_if = "BTreeMap::is_empty")]
        pub auxiliary_addresses: BTreeMap<String, String>,
    }

    /// Where a network takes its settings from.
    pub struct ConfigFrom {
        pub network: String,
    }

    /// A container in a network.
    pub struct NetworkContainer {
        pub name: String,
        #[serde(rename = "EndpointID")]
        pub endpoint_id: String,
        pub mac_address: String,
        /// With its prefix length.
        #[serde(rename = "IPv4Address")]
        pub ipv4_address: String,
        #[serde(rename = "IPv6Address")]
        pub ipv6_address: String,
    }

    /// The answer of `POST /networks/prune`.
    pub struct NetworksPruned {
        pub networks_deleted: Option<Vec<String>>,
    }
}

impl Engine {
    /// Whether there can be bridge networks; `network` is the one that needs them.
    ///
    /// # Errors
    /// Where an ordinary user's daemon can have none on this host, with the reason.
    pub(crate) fn need_bridges(&self, network: &str) -> Result<()> {
        let Some(reason) = &self.no_bridges else {
            return Ok(());
        };
        Err(Error::Room {
            message: format!(
                "the network {network:?} cannot be: {reason}"
            ),
            kind: base::Classified::kind(reason),
            fix: Some(
                "see berth doctor; or add --network host or --network none, or run the daemon as root: sudo berth serve"
                    .into(),
            ),
        })
    }

    /// The networks that pass `name`, `id`, `driver`, `label`, `label!`, `scope`, `type`, `dangling`, by name.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another filter or a bad value.
    pub async fn list_networks(self: &Arc<Self>, filters: Filters) -> Result<Vec<NetworkInspect>> {
        filters.only(&[
            "name", "id", "driver", "label", "label!", "scope", "type", "dangling",
        ])?;
        if let Some(kind) = filters
            .get("type")
            .iter()
            .find(|kind| !matches!(kind.as_str(), "custom" | "builtin"))
        {
            return Err(Error::Invalid(format!("invalid filter: 'type'='{kind}'")));
        }
        let dangling = filters.boolean("dangling")?;
        let engine = self.clone();
        blocking(move || {
            let mut found = Vec::new();
            for network in engine.networks().list() {
                let id = network.id.as_str();
                let kind = if network.is_predefined() {
                    "builtin"
                } else {
                    "custom"
                };
                let fits = filters.any("name", |part| network.name.contains(part))
                    && filters.any("id", |part| id.contains(part))
                    && filters.exact("driver", driver_name(network.driver))
                    && filters.exact("scope", "local")
                    && filters.exact("type", kind)
                    && filters.labels("label", &network.labels)
                    && filters.not_labels("label!", &network.labels);
                if !fits {
                    continue;
                }
                let shown = show(&engine, &network);
                let is_dangling = kind == "custom" && shown.containers.is_empty();
                if dangling.is_none_or(|wanted| wanted == is_dangling) {
                    found.push(shown);
                }
            }
            Ok(found)
        })
        .await
    }

    /// One network, by name, id or an id's beginning, with its containers.
    ///
    /// # Errors
    /// [`Error::Room`] of kind `NotFound`.
    pub async fn inspect_network(self: &Arc<Self>, name: &str) -> Result<NetworkInspect> {
        let (engine, name) = (self.clone(), name.to_owned());
        blocking(move || {
            let network = engine.networks().inspect(&name).map_err(Error::room)?;
            Ok(show(&engine, &network))
        })
        .await
    }

    /// Makes a network.
    ///
    /// # Errors
    /// Bad names, drivers, subnets; a name that is taken; pools that are exhausted.
    pub async fn create_network(self: &Arc<Self>, wanted: NetworkCreate) -> Result<NetworkCreated> {
        self.need_bridges(&wanted.name)?;
        let spec = spec(wanted)?;
        let engine = self.clone();
        let network =
            blocking(move || engine.networks().create_network(spec).map_err(Error::room)).await?;
        self.network_event(
            "create",
            network.id.as_str(),
            &network.name,
            driver_name(network.driver),
            None,
        );
        Ok(NetworkCreated {
            id: network.id.to_string(),
            warning: String::new(),
        })
    }

    /// Removes a network that no container is on.
    ///
    /// # Errors
    /// Unknown, predefined, or in use.
    pub async fn remove_network(self: &Arc<Self>, name: &str) -> Result<()> {
        let (engine, name) = (self.clone(), name.to_owned());
        let network =
            blocking(move || engine.networks().remove_network(&name).map_err(Error::room)).await?;
        self.network_event(
            "destroy",
            network.id.as_str(),
            &network.name,
            driver_name(network.driver),
            None,
        );
        Ok(())
    }

    /// Removes the networks that no container is on. Filters `until`, `label`, `label!`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another filter.
    pub async fn prune_networks(self: &Arc<Self>, filters: Filters) -> Result<NetworksPruned> {
        filters.only(&["until", "label", "label!"])?;
        let until = until(&filters)?;
        // Containers that do not run have no endpoint, and still mean to come back.
        let options = crate::container::ListOptions {
            all: true,
            ..Default::default()
        };
        let wanted: BTreeSet<String> = self
            .list(options)
            .await?
            .into_iter()
            .flat_map(|container| container.network_settings.networks.into_keys())
            .collect();
        let engine = self.clone();
        let gone = blocking(move || {
            Ok(engine.networks().prune(|network| {
                let young = until.is_some_and(|until| {
                    network
                        .created
                        .parse::<jiff::Timestamp>()
                        .is_ok_and(|created| created >= until)
                });
                young
                    || wanted.contains(&network.name)
                    || !filters.labels("label", &network.labels)
                    || !filters.not_labels("label!", &network.labels)
            }))
        })
        .await?;
        for network in &gone {
            self.network_event(
                "destroy",
                network.id.as_str(),
                &network.name,
                driver_name(network.driver),
                None,
            );
        }
        self.events().publish(
            "network",
            "prune",
            "",
            BTreeMap::from([("reclaimed".into(), "0".into())]),
        );
        let names: Vec<String> = gone.into_iter().map(|network| network.name).collect();
        Ok(NetworksPruned {
            networks_deleted: (!names.is_empty()).then_some(names),
        })
    }

    /// Tells the listeners what became of a network.
    pub(crate) fn network_event(
        &self,
        action: &str,
        id: &str,
        name: &str,
        kind: &str,
        container: Option<&str>,
    ) {
        let mut attributes = BTreeMap::from([
            ("name".to_owned(), name.to_owned()),
            ("type".to_owned(), kind.to_owned()),
        ]);
        if let Some(container) = container {
            attributes.insert("container".into(), container.into());
        }
        self.events().publish("network", action, id, attributes);
    }
}

/// The filter `until` of a prune.
pub(crate) fn until(filters: &Filters) -> Result<Option<jiff::Timestamp>> {
    match filters.get("until") {
        [] => Ok(None),
        [text] => base::time::parse_moment(text)
            .map(Some)
            .map_err(|error| Error::Invalid(error.to_string())),
        _ => Err(Error::Invalid(
            "more than one until filter specified".into(),
        )),
    }
}

fn driver_name(driver: Driver) -> &'static str {
    match driver {
        Driver::Bridge => "bridge",
        Driver::Host => "host",
        Driver::None => "null",
    }
}

fn show(engine: &Engine, network: &Network) -> NetworkInspect {
    let text = |value: Option<String>| value.unwrap_or_default();
    let containers = engine
        .networks()
        .endpoints(&network.id)
        .into_iter()
        .map(|endpoint| {
            let shown = NetworkContainer {
                name: endpoint.names.first().cloned().unwrap_or_default(),
                endpoint_id: endpoint.id.to_string(),
                mac_address: text(endpoint.mac.map(|mac| mac.to_string())),
                ipv4_address: text(endpoint.v4.map(|address| address.to_string())),
                ipv6_address: text(endpoint.v6.map(|address| address.to_string())),
            };
            (endpoint.container, shown)
        });
    let config = network.ipam.config.iter().map(|config| NetworkIpamConfig {
        subnet: text(config.subnet.map(|subnet| subnet.to_string())),
        ip_range: text(config.ip_range.map(|range| range.to_string())),
        gateway: text(config.gateway.map(|gateway| gateway.to_string())),
        auxiliary_addresses: config
            .auxiliary
            .iter()
            .map(|(k, v)| (k.clone(), v.to_string()))
            .collect(),
    });
    NetworkInspect {
        name: network.name.clone(),
        id: network.id.to_string(),
        created: network.created.clone(),
        scope: "local".into(),
        driver: driver_name(network.driver).into(),
        enable_ipv4: network.ipv4,
        enable_ipv6: network.ipv6,
        ipam: NetworkIpam {
            driver: network.ipam.driver.clone(),
            options: network.ipam.options.clone(),
            config: config.collect(),
        },
        internal: network.internal,
        attachable: network.attachable,
        containers: containers.collect(),
        options: network.options.clone(),
        labels: network.labels.clone(),
        ..NetworkInspect::default()
    }
}

fn spec(wanted: NetworkCreate) -> Result<NetworkSpec> {
    if wanted.config_only
        || wanted
            .config_from
            .is_some_and(|from| !from.network.is_empty())
    {
        return Err(Error::Unsupported(
            "configuration-only networks belong to swarm, which Berth has not".into(),
        ));
    }
    if wanted.ingress || matches!(wanted.scope.as_str(), "swarm" | "global") {
        return Err(Error::Unsupported(
            "networks of a swarm are not supported: use the scope local".into(),
        ));
    }
    if !matches!(
        wanted.driver.as_str(),
        "" | "default" | "bridge" | "host" | "null" | "none"
    ) {
        // dockerd's words, with its 404.
        return Err(Error::NotFound(format!(
            "could not find plugin {} in v1 plugin registry: plugin not found",
            wanted.driver
        )));
    }
    let driver = Driver::from_name(&wanted.driver).map_err(Error::room)?;
    if driver != Driver::Bridge {
        return Err(Error::Forbidden(format!(
            "only one instance of {:?} network is allowed",
            driver_name(driver)
        )));
    }
    let ipam = wanted.ipam.unwrap_or_default();
    if !matches!(ipam.driver.as_str(), "" | "default") {
        return Err(Error::NotFound(format!(
            "could not find an IPAM driver {:?}",
            ipam.driver
        )));
    }
    let config = ipam.config.into_iter().map(|config| {
        Ok(IpamConfig {
            subnet: subnet(&config.subnet, "subnet")?,
            ip_range: subnet(&config.ip_range, "IP range")?,
            gateway: address(&config.gateway)?,
            auxiliary: config
                .auxiliary_addresses
                .into_iter()
                .filter_map(|(name, text)| {
                    address(&text).transpose().map(|found| Ok((name, found?)))
                })
                .collect::<Result<_>>()?,
        })
    });
    Ok(NetworkSpec {
        driver,
        internal: wanted.internal,
        attachable: wanted.attachable,
        ipv4: wanted.enable_ipv4.unwrap_or(true),
        ipv6: wanted.enable_ipv6.unwrap_or(false),
        ipam: Ipam {
            driver: "default".into(),
            options: ipam.options,
            config: config.collect::<Result<_>>()?,
        },
        options: wanted.options.unwrap_or_default(),
        labels: wanted.labels.unwrap_or_default(),
        ..NetworkSpec::bridge(wanted.name)
    })
}

fn subnet(text: &str, what: &str) -> Result<Option<Subnet>> {
    if text.is_empty() {
        return Ok(None);
    }
    let wrong =
        |error: net::InvalidAddress| Error::Invalid(format!("invalid {what} {text}: {error}"));
    text.parse().map(Some).map_err(wrong)
}

fn address(text: &str) -> Result<Option<IpAddr>> {
    if text.is_empty() {
        return Ok(None);
    }
    // Some clients write the gateway with a prefix length.
    let bare = text.split('/').next().unwrap_or_default();
    bare.parse()
        .map(Some)
        .map_err(|_| Error::Invalid(format!("invalid address {text}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_composed_network_is_understood_and_others_refused() {
        let wanted: NetworkCreate = serde_json::from_str(
            r#"{"Name":"app_default","Driver":null,"Options":null,"IPAM":{"Driver":"default","Config":
            [{"Subnet":"10.9.0.0/24","Gateway":"10.9.0.1","IPRange":null,"AuxiliaryAddresses":{"a":"10.9.0.7"}}]},
            "CheckDuplicate":true,"Labels":{"com.docker.compose.project":"app"},"EnableIPv6":null}"#,
        )
        .unwrap();
        let spec = spec(wanted.clone()).unwrap();
        assert_eq!(spec.name, "app_default");
        assert!(spec.ipv4 && !spec.ipv6);
        assert_eq!(
            spec.ipam.config[0].subnet.unwrap().to_string(),
            "10.9.0.0/24"
        );
        assert_eq!(spec.ipam.config[0].auxiliary["a"].to_string(), "10.9.0.7");
        for (driver, kind) in [
            ("overlay", base::Kind::NotFound),
            ("host", base::Kind::Permission),
        ] {
            let refused = super::spec(NetworkCreate {
                driver: driver.into(),
                ..wanted.clone()
            })
            .unwrap_err();
            assert_eq!(base::Classified::kind(&refused), kind);
        }
        let mut bad = wanted;
        bad.ipam.as_mut().unwrap().config[0].subnet = "10.9.0.0/99".into();
        assert!(super::spec(bad).is_err());
    }
}
