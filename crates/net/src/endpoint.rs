//! A container's or machine's place on a network.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use base::Id;
use serde::{Deserialize, Serialize};

use crate::address::{Mac, Subnet};
use crate::error::{Error, Result};

/// What a new endpoint shall be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndpointSpec {
    /// Name, id or an id's beginning.
    pub network: String,
    /// The id of the container or machine.
    pub container: String,
    /// Its names, answered by the name service: container name first, then the host name.
    pub names: Vec<String>,
    /// Further names on this network only.
    pub aliases: Vec<String>,
    /// A fixed address, else the next free one.
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
    /// A fixed MAC address, else one that follows from the IPv4 address.
    pub mac: Option<Mac>,
    /// Of several networks the highest priority gives the default gateway; then the first by name.
    pub gateway_priority: i32,
    /// The name of the interface inside, else the next free `ethN`.
    pub interface: Option<String>,
    /// Settings of the interface inside, `IFNAME` standing for its name: `net.ipv4.conf.IFNAME.log_martians`.
    pub sysctls: BTreeMap<String, String>,
    /// Resolvers the name service asks for this container instead of the host's.
    pub dns: Vec<IpAddr>,
}

/// A container's place on a network, as it is. Serializable, so that the engine records it and gives it back to
/// [`crate::Manager::restore`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    pub id: Id,
    pub network: Id,
    pub network_name: String,
    pub container: String,
    pub names: Vec<String>,
    pub aliases: Vec<String>,
    /// The interface inside; empty for `host` and `none`.
    pub interface: String,
    /// Its other end on the bridge: a veth or a tap.
    pub host_interface: String,
    pub mac: Option<Mac>,
    /// The address with the subnet's prefix length.
    pub v4: Option<Subnet>,
    pub v6: Option<Subnet>,
    /// Absent on internal networks.
    pub gateway_v4: Option<Ipv4Addr>,
    pub gateway_v6: Option<Ipv6Addr>,
    pub gateway_priority: i32,
    #[serde(default)]
    pub internal: bool,
    #[serde(default)]
    pub dns: Vec<IpAddr>,
    #[serde(default)]
    pub ports: Vec<PublishedPort>,
}

impl Endpoint {
    /// The IPv4 address alone.
    pub fn ipv4(&self) -> Option<Ipv4Addr> {
        match self.v4?.address() {
            IpAddr::V4(v4) => Some(v4),
            IpAddr::V6(_) => None,
        }
    }

    /// The IPv6 address alone.
    pub fn ipv6(&self) -> Option<Ipv6Addr> {
        match self.v6?.address() {
            IpAddr::V6(v6) => Some(v6),
            IpAddr::V4(_) => None,
        }
    }
}

/// A transport protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// `tcp`, `udp` or `sctp`.
    pub const fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        }
    }

    /// By name, in any case; empty is TCP.
    pub fn from_name(name: &str) -> Result<Protocol> {
        match name.to_ascii_lowercase().as_str() {
            "" | "tcp" => Ok(Protocol::Tcp),
            "udp" => Ok(Protocol::Udp),
            "sctp" => Ok(Protocol::Sctp),
            _ => Err(Error::invalid(format!(
                "unknown protocol {name:?}: tcp, udp and sctp are known"
            ))),
        }
    }
}

/// A wish: one port of the container on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMap {
    pub container_port: u16,
    pub protocol: Protocol,
    /// Absent: all addresses of both families (or what the network or the daemon says).
    pub host_ip: Option<IpAddr>,
    /// First and last port to choose from; absent: any free port.
    pub host_ports: Option<(u16, u16)>,
}

/// A port of the host that leads to a container. A wish without an address gives one per family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PublishedPort {
    pub host_ip: IpAddr,
    pub host_port: u16,
    pub container_port: u16,
    pub protocol: Protocol,
}
