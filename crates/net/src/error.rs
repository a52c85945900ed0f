//! What can go wrong in the network room.

use std::io;
use std::net::IpAddr;

use base::{Classified, Kind};

use crate::address::{InvalidAddress, Subnet};

/// A failure of the network room: what, why, and through [`Classified::fix`] what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Docker's words, which its clients look for.
    #[error("network {0} not found")]
    NoSuchNetwork(String),
    #[error("network with name {0} already exists")]
    NetworkExists(String),
    #[error("network {name} has active endpoints: {users}")]
    NetworkInUse { name: String, users: String },
    #[error("{0} is a pre-defined network and cannot be removed")]
    Predefined(String),
    #[error("network {network} cannot do this: {why}")]
    WrongDriver { network: String, why: String },
    #[error("{0}")]
    Invalid(String),
    #[error(transparent)]
    Address(#[from] InvalidAddress),
    #[error("subnet {asked} overlaps {other}")]
    Overlap { asked: Subnet, other: String },
    #[error("no free subnet is left in the address pools")]
    PoolsExhausted,
    #[error("no free address is left in {0}")]
    SubnetFull(Subnet),
    #[error("address {0} is already in use on this network")]
    AddressInUse(IpAddr),
    #[error("container {container} is already connected to network {network}")]
    AlreadyConnected { container: String, network: String },
    #[error("container {container} is not connected to network {network}")]
    NotConnected { container: String, network: String },
    #[error("port {address}:{port}/{protocol} is already in use{by}")]
    PortInUse {
        address: IpAddr,
        port: u16,
        protocol: &'static str,
        by: String,
    },
    #[error("cannot publish on {address}: it is not an address of this host")]
    NotOurAddress { address: IpAddr },
    #[error("port {port} is below those that an ordinary user may publish")]
    LowPort { port: u16 },
    #[error("no port of the range {first}-{last}/{protocol} is free")]
    RangeExhausted {
        first: u16,
        last: u16,
        protocol: &'static str,
    },
    #[error("the nft program is missing")]
    NoNft,
    #[error("nft refused the rules: {0}")]
    Nft(String),
    #[error("network namespaces cannot be made: {0}")]
    Namespace(#[source] io::Error),
    #[error("this host lets an ordinary user's daemon have no networks: {0}")]
    Gateway(#[source] io::Error),
    #[error("{what}: {source}")]
    Os { what: String, source: io::Error },
}

/// Results of the network room.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn invalid(text: impl Into<String>) -> Error {
        Error::Invalid(text.into())
    }
}

/// The lowest port an ordinary user may listen at (ip-sysctl, `ip_unprivileged_port_start`).
fn lowest_port() -> u16 {
    let set = crate::sysctl::read("ipv4/ip_unprivileged_port_start");
    set.ok().and_then(|text| text.parse().ok()).unwrap_or(1024)
}

/// Names what was tried when the operating system refuses.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Os {
            what: what(),
            source,
        })
    }
}

impl<T> Context<T> for std::result::Result<T, rustix::io::Errno> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Os {
            what: what(),
            source: source.into(),
        })
    }
}

impl Classified for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::NoSuchNetwork(_) => Kind::NotFound,
            Error::NetworkExists(_)
            | Error::NetworkInUse { .. }
            | Error::AddressInUse(_)
            | Error::AlreadyConnected { .. }
            | Error::NotConnected { .. }
            | Error::PortInUse { .. } => Kind::Conflict,
            Error::Predefined(_) | Error::WrongDriver { .. } | Error::LowPort { .. } => {
                Kind::Permission
            }
            Error::Gateway(_) => Kind::Unsupported,
            Error::Invalid(_)
            | Error::Address(_)
            | Error::Overlap { .. }
            | Error::NotOurAddress { .. } => Kind::Invalid,
            Error::PoolsExhausted | Error::SubnetFull(_) | Error::RangeExhausted { .. } => {
                Kind::Capacity
            }
            Error::NoNft => Kind::Unsupported,
            Error::Nft(_) => Kind::Internal,
            Error::Namespace(source) | Error::Os { source, .. } => base::error::kind_of_io(source),
        }
    }

    fn fix(&self) -> Option<String> {
        let text = match self {
            Error::NoNft => "apt-get install nftables".to_owned(),
            Error::NetworkInUse { name, .. } => {
                format!("berth network disconnect {name} CONTAINER, then remove the network")
            }
            Error::PoolsExhausted => {
                "berth network prune, or give a subnet: berth network create --subnet 10.123.0.0/24 NAME".to_owned()
            }
            Error::Overlap { .. } => "choose another subnet, or leave it out to have one chosen".to_owned(),
            Error::PortInUse { port, .. } => {
                format!("see who has it with: ss -lntup 'sport = :{port}', or publish on another port")
            }
            Error::LowPort { port } => format!(
                "publish a port from {} on, or: sudo sysctl -w net.ipv4.ip_unprivileged_port_start={port}",
                lowest_port()
            ),
            Error::Gateway(_) => {
                "see berth doctor; without networks there are --network host and --network none".to_owned()
            }
            Error::NotOurAddress { .. } => "see the host's addresses with: ip -brief address".to_owned(),
            Error::Namespace(source) if source.raw_os_error() == Some(libc::EPERM) => {
                "run the daemon as root, or use the user-mode network".to_owned()
            }
            _ => return None,
        };
        Some(text)
    }
}
