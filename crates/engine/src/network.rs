//! Networks as the daemon's clients see them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::Engine;
use crate::error::{Error, Result};
use crate::filters::Filters;
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

fn absent<T>() -> Result<T> {
    Err(Error::Unsupported("networks are not in this build".into()))
}

impl Engine {
    /// The networks that pass `name`, `id`, `driver`, `label`, `label!`, `scope`, `type`, `dangling`.
    pub async fn list_networks(self: &Arc<Self>, filters: Filters) -> Result<Vec<NetworkInspect>> {
        let _ = filters;
        Ok(Vec::new())
    }

    /// One network, by name, id or an id's beginning, with its containers.
    pub async fn inspect_network(self: &Arc<Self>, name: &str) -> Result<NetworkInspect> {
        let _ = name;
        absent()
    }

    /// Makes a network.
    pub async fn create_network(self: &Arc<Self>, wanted: NetworkCreate) -> Result<NetworkCreated> {
        let _ = wanted;
        absent()
    }

    /// Removes a network that no container is on.
    pub async fn remove_network(self: &Arc<Self>, name: &str) -> Result<()> {
        let _ = name;
        absent()
    }

    /// Removes the networks that no container is on.
    pub async fn prune_networks(self: &Arc<Self>, filters: Filters) -> Result<NetworksPruned> {
        let _ = filters;
        absent()
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
