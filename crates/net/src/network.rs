//! What a network is: Docker's notions in Docker's wire names, one record per network on disk.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use base::Id;
use serde::{Deserialize, Serialize};

use crate::address::Subnet;
use crate::error::{Error, Result};

/// Option: the name of the bridge interface.
pub const OPTION_BRIDGE_NAME: &str = "com.docker.network.bridge.name";
/// Option: `false` keeps the containers of the network from each other.
pub const OPTION_ICC: &str = "com.docker.network.bridge.enable_icc";
/// Option: `false` leaves addresses of outgoing packets as they are.
pub const OPTION_MASQUERADE: &str = "com.docker.network.bridge.enable_ip_masquerade";
/// Option: the host address ports are published on where none is given.
pub const OPTION_HOST_BINDING: &str = "com.docker.network.bridge.host_binding_ipv4";
/// Option: the MTU of the bridge and of the interfaces on it, in bytes.
pub const OPTION_MTU: &str = "com.docker.network.driver.mtu";
/// Option of the network made at the first start.
pub const OPTION_DEFAULT: &str = "com.docker.network.bridge.default_bridge";

/// Who moves the packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// A Linux bridge of ours with NAT to the outside.
    Bridge,
    /// The host's own namespace.
    Host,
    /// Only the loopback interface. Docker calls the driver `null`.
    #[serde(rename = "null")]
    None,
}

impl Driver {
    /// The driver by Docker's name; an empty name is `bridge`.
    pub fn from_name(name: &str) -> Result<Driver> {
        match name {
            "" | "default" | "bridge" => Ok(Driver::Bridge),
            "host" => Ok(Driver::Host),
            "null" | "none" => Ok(Driver::None),
            other => Err(Error::invalid(format!(
                "there is no network driver {other:?}: bridge, host and null are known"
            ))),
        }
    }
}

/// One subnet of a network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct IpamConfig {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet: Option<Subnet>,
    /// Where addresses are handed out from; the whole subnet where absent.
    #[serde(rename = "IPRange", skip_serializing_if = "Option::is_none")]
    pub ip_range: Option<Subnet>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Addresses by name that belong to others.
    #[serde(
        rename = "AuxiliaryAddresses",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub auxiliary: BTreeMap<String, IpAddr>,
}

/// How addresses are managed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Ipam {
    pub driver: String,
    pub options: Option<BTreeMap<String, String>>,
    pub config: Vec<IpamConfig>,
}

impl Default for Ipam {
    fn default() -> Ipam {
        Ipam {
            driver: "default".into(),
            options: None,
            config: Vec::new(),
        }
    }
}

/// What a new network shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkSpec {
    pub name: String,
    pub driver: Driver,
    pub internal: bool,
    pub attachable: bool,
    pub ipv4: bool,
    pub ipv6: bool,
    pub ipam: Ipam,
    pub options: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
}

impl NetworkSpec {
    /// A bridge network with IPv4 and an address pool chosen for it.
    pub fn bridge(name: impl Into<String>) -> NetworkSpec {
        NetworkSpec {
            name: name.into(),
            driver: Driver::Bridge,
            internal: false,
            attachable: false,
            ipv4: true,
            ipv6: false,
            ipam: Ipam::default(),
            options: BTreeMap::new(),
            labels: BTreeMap::new(),
        }
    }
}

/// A network as it is recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Network {
    pub name: String,
    pub id: Id,
    /// RFC 3339.
    pub created: String,
    pub driver: Driver,
    #[serde(rename = "EnableIPv4", default = "yes")]
    pub ipv4: bool,
    #[serde(rename = "EnableIPv6", default)]
    pub ipv6: bool,
    #[serde(rename = "IPAM", default)]
    pub ipam: Ipam,
    #[serde(default)]
    pub internal: bool,
    #[serde(default)]
    pub attachable: bool,
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The bridge interface; empty for `host` and `none`.
    #[serde(rename = "BerthBridge", default)]
    pub bridge: String,
    /// Whether we made the bridge interface, and so remove it.
    #[serde(rename = "BerthOwnsBridge", default = "yes")]
    pub owns_bridge: bool,
}

fn yes() -> bool {
    true
}

impl Network {
    /// Whether it is one of `bridge`, `host`, `none`, which are always there.
    pub fn is_predefined(&self) -> bool {
        matches!(self.name.as_str(), "bridge" | "host" | "none")
    }

    /// Whether names of containers are answered in Docker's way (all but the default bridge there; we
    /// answer on that one too).
    pub fn is_default_bridge(&self) -> bool {
        self.name == "bridge"
    }

    /// The subnets of one family that are complete with a gateway.
    pub fn subnets(&self, v4: bool) -> impl Iterator<Item = (Subnet, Option<IpAddr>)> + '_ {
        let of_family = move |c: &IpamConfig| {
            c.subnet
                .filter(|s| s.is_v4() == v4)
                .map(|subnet| (subnet, c.gateway))
        };
        self.ipam.config.iter().filter_map(of_family)
    }

    /// The first IPv4 gateway, which is the bridge's own address.
    pub fn gateway_v4(&self) -> Option<Ipv4Addr> {
        self.subnets(true).find_map(|(_, gateway)| match gateway {
            Some(IpAddr::V4(v4)) => Some(v4),
            _ => None,
        })
    }

    /// The first IPv6 gateway, which is the bridge's own address.
    pub fn gateway_v6(&self) -> Option<Ipv6Addr> {
        self.subnets(false).find_map(|(_, gateway)| match gateway {
            Some(IpAddr::V6(v6)) => Some(v6),
            _ => None,
        })
    }

    /// A boolean option, with Docker's spellings.
    pub fn flag(&self, option: &str, default: bool) -> bool {
        match self.options.get(option).map(String::as_str) {
            Some("false" | "0" | "f" | "F" | "False" | "FALSE") => false,
            Some("true" | "1" | "t" | "T" | "True" | "TRUE") => true,
            _ => default,
        }
    }

    /// The MTU given by option, in bytes.
    pub fn mtu(&self) -> Option<u32> {
        self.options.get(OPTION_MTU)?.parse().ok()
    }
}

/// Docker's rule for names of networks.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
    if first && name.len() <= 255 && bytes.all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
    {
        Ok(())
    } else {
        Err(Error::invalid(format!(
            "invalid network name {:?}: a letter or digit, then letters, digits, _ . and -",
            name.chars().take(80).collect::<String>()
        )))
    }
}

/// The kernel's rule for interface names (15 bytes), without what nft or a shell could misread.
pub(crate) fn check_interface_name(name: &str) -> Result<()> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
    if (1..=15).contains(&name.len())
        && name.bytes().all(good)
        && !matches!(name, "." | ".." | "all" | "default")
    {
        Ok(())
    } else {
        Err(Error::invalid(format!(
            "invalid interface name {:?}: 1 to 15 letters, digits, _ . and -",
            name.chars().take(40).collect::<String>()
        )))
    }
}
