//! The network room: networks and their addresses, the network namespaces of containers, published ports, names.
//!
//! [`Manager`] is the way in. Its calls block for a few milliseconds and may be made from any thread. What the kernel
//! holds (bridges, veths, rules) is derived from two things only: the network records on disk, and the endpoints the
//! caller says are alive ([`Manager::restore`]). Everything else that carries this daemon's tag is swept.

mod address;
mod conntrack;
mod dhcp;
mod dhcp6;
mod directory;
mod dns;
mod endpoint;
mod error;
mod firewall;
pub mod gateway;
mod ipam;
mod manager;
mod namespace;
mod neighbour;
mod netlink;
mod network;
mod proxy;
mod resolv;
mod services;
mod sysctl;
mod tap;
pub mod user;

pub use address::{InvalidAddress, Mac, Subnet};
pub use dhcp::fuzz_dhcp;
pub use dhcp6::fuzz_dhcp6;
pub use dns::fuzz_dns;
pub use endpoint::{Endpoint, EndpointSpec, PortMap, Protocol, PublishedPort};
pub use error::{Error, Result};
pub use ipam::{SubnetPool, default_pools};
pub use manager::{Manager, NetConfig};
pub use namespace::Sandbox;
pub use neighbour::Finding;
pub use netlink::fuzz_netlink;
pub use network::{
    Driver, Ipam, IpamConfig, Network, NetworkSpec, OPTION_BRIDGE_NAME, OPTION_DEFAULT,
    OPTION_HOST_BINDING, OPTION_ICC, OPTION_MASQUERADE, OPTION_MTU,
};
pub use resolv::{ResolvOptions, hosts_file, resolv_conf};
pub use tap::{Tap, TapOptions};

#[cfg(test)]
mod tests;
