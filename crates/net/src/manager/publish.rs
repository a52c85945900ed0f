//! Published ports: reserved by a socket of our own, forwarded by the firewall, and by a proxy where it cannot. The ports of
//! an ordinary user's networks are all the gateway's, which is on the host's side.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use base::Id;

use super::{Manager, lock};
use crate::endpoint::{Endpoint, PortMap, Protocol, PublishedPort};
use crate::error::{Context, Error, Result};
use crate::firewall::Forward;
use crate::gateway::Published;
use crate::network::OPTION_HOST_BINDING;
use crate::proxy::{Proxy, bound_port, listen};

/// A port of the host that is ours while this lives.
pub(super) enum Reservation {
    /// Nothing but the rules: a kernel without SCTP sockets may still forward SCTP.
    None,
    Socket {
        _socket: OwnedFd,
    },
    Proxy {
        _proxy: Proxy,
    },
    /// The gateway of an ordinary user's networks has it.
    Gateway {
        _published: Published,
    },
}

impl Manager {
    /// Publishes ports of an endpoint's container on the host, all or none. A wish without an address takes the same
    /// port in both families.
    ///
    /// # Errors
    /// Ports in use (named), addresses that are not the host's, exhausted ranges; what nft refuses.
    pub fn publish(&self, endpoint: &Endpoint, wishes: &[PortMap]) -> Result<Vec<PublishedPort>> {
        if wishes.is_empty() {
            return Ok(Vec::new());
        }
        self.inside(|| self.publish_here(endpoint, wishes))
    }

    fn publish_here(&self, endpoint: &Endpoint, wishes: &[PortMap]) -> Result<Vec<PublishedPort>> {
        let network = self.inspect(endpoint.network.as_str())?;
        if endpoint.v4.is_none() && endpoint.v6.is_none() {
            return Err(Error::WrongDriver {
                network: network.name,
                why: "its containers have no address of their own to forward ports to".into(),
            });
        }
        if network.internal {
            return Err(Error::WrongDriver {
                network: network.name,
                why: "it is internal: nothing from outside reaches it".into(),
            });
        }
        let default = match network.options.get(OPTION_HOST_BINDING) {
            Some(text) => Some(text.parse().map_err(|_| {
                Error::invalid(format!("{OPTION_HOST_BINDING}={text:?} is not an address"))
            })?),
            None => self.config.publish_on,
        };
        let mut made: Vec<(PublishedPort, Reservation)> = Vec::new();
        for wish in wishes {
            let taken = self.reserve_port(endpoint, wish, default, &made)?;
            made.extend(taken);
        }
        let ports: Vec<_> = made.iter().map(|(port, _)| *port).collect();
        self.hold(endpoint, made)?;
        Ok(ports)
    }

    /// Directs reserved ports to the endpoint.
    fn hold(&self, endpoint: &Endpoint, made: Vec<(PublishedPort, Reservation)>) -> Result<()> {
        let ports: Vec<_> = made.iter().map(|(port, _)| *port).collect();
        let forwards: Vec<_> = ports
            .iter()
            .filter_map(|port| forward_of(endpoint, port))
            .collect();
        // Whoever puts the table back meanwhile takes what `state` says for all there is.
        let mut setup = lock(&self.setup);
        if let Err(error) = self.firewall.add_forwards(&forwards) {
            if !setup.table {
                return Err(error);
            }
            self.install_table(&mut setup)?;
            self.firewall.add_forwards(&forwards)?;
        }
        crate::conntrack::forget(&forwards);
        self.allow_return(endpoint);
        let mut state = lock(&self.state);
        let Some(held) = state.endpoints.get_mut(&endpoint.id) else {
            drop(state);
            drop(setup);
            self.withdraw(&forwards);
            return Err(Error::NotConnected {
                container: endpoint.container.clone(),
                network: endpoint.network_name.clone(),
            });
        };
        held.endpoint.ports.extend(&ports);
        held.forwards.extend(forwards);
        held.reservations
            .extend(made.into_iter().map(|(_, reservation)| reservation));
        Ok(())
    }

    /// Where the kernel shows bridged packets to the rules (br_netfilter), a container that calls its own published port is
    /// answered on the port of the bridge it came in by. Not for taps: a machine would see its own IPv6 duplicate detection.
    fn allow_return(&self, endpoint: &Endpoint) {
        let shown = |key| crate::sysctl::read(key).is_ok_and(|value| value == "1");
        let veth = endpoint.host_interface.starts_with("bv");
        if veth
            && (shown("bridge/bridge-nf-call-iptables") || shown("bridge/bridge-nf-call-ip6tables"))
        {
            let mut netlink = lock(&self.netlink);
            let link = netlink.link(&endpoint.host_interface).ok().flatten();
            if let Some(Err(error)) = link.map(|link| netlink.hairpin_port(link.index)) {
                tracing::warn!(%error, "a container may not reach its own published ports");
            }
        }
    }

    /// Takes rules away; where nft finds them gone, the table is put back as it shall be.
    pub(super) fn withdraw(&self, forwards: &[Forward]) {
        if forwards.is_empty() {
            return;
        }
        let withdrawn = self.inside(|| {
            self.withdraw_here(forwards);
            Ok(())
        });
        if let Err(error) = withdrawn {
            tracing::error!(%error, "the rules of published ports could not be removed");
        }
    }

    fn withdraw_here(&self, forwards: &[Forward]) {
        let removed = self.firewall.remove_forwards(forwards);
        crate::conntrack::forget(forwards);
        if removed.is_ok() {
            return;
        }
        let mut setup = lock(&self.setup);
        if setup.table
            && let Err(error) = self.install_table(&mut setup)
        {
            tracing::error!(%error, "the rules of published ports could not be removed");
        }
    }

    fn reserve_port(
        &self,
        endpoint: &Endpoint,
        wish: &PortMap,
        default: Option<IpAddr>,
        made: &[(PublishedPort, Reservation)],
    ) -> Result<Vec<(PublishedPort, Reservation)>> {
        if wish.container_port == 0 {
            return Err(Error::invalid("port 0 cannot be published"));
        }
        let asked = wish.host_ip.or(default);
        let addresses: &[IpAddr] = match &asked {
            Some(address) => std::slice::from_ref(address),
            None => &[
                IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            ],
        };
        let (first, last) = wish.host_ports.unwrap_or((0, 0));
        if first > last {
            return Err(Error::invalid(format!(
                "port range {first}-{last} ends before it begins"
            )));
        }
        // A random port is chosen by the kernel and may be taken in the other family: some tries.
        let tries: Vec<u16> = if first == 0 {
            vec![0; 32]
        } else {
            (first..=last).collect()
        };
        let mut failure = None;
        'port: for port in tries {
            let mut taken: Vec<(PublishedPort, Reservation)> = Vec::new();
            let mut port = port;
            for address in addresses {
                match self.reserve_one(endpoint, wish, *address, port, made) {
                    Ok((published, reservation)) => {
                        port = published.host_port;
                        taken.push((published, reservation));
                    }
                    // A host without IPv6 publishes in IPv4 only.
                    Err(Error::NotOurAddress { .. }) if asked.is_none() && address.is_ipv6() => {}
                    Err(error @ Error::PortInUse { .. }) => {
                        failure = Some(error);
                        continue 'port;
                    }
                    Err(error) => return Err(error),
                }
            }
            return Ok(taken);
        }
        match failure {
            Some(error) if first == last && first != 0 => Err(error),
            _ => Err(Error::RangeExhausted {
                first,
                last,
                protocol: wish.protocol.name(),
            }),
        }
    }

    fn reserve_one(
        &self,
        endpoint: &Endpoint,
        wish: &PortMap,
        address: IpAddr,
        port: u16,
        made: &[(PublishedPort, Reservation)],
    ) -> Result<(PublishedPort, Reservation)> {
        let same = |p: &PublishedPort| {
            p.protocol == wish.protocol
                && p.host_port == port
                && p.host_ip.is_ipv4() == address.is_ipv4()
                && (p.host_ip == address || p.host_ip.is_unspecified() || address.is_unspecified())
        };
        let in_use = |by: String| Error::PortInUse {
            address,
            port,
            protocol: wish.protocol.name(),
            by,
        };
        if made.iter().any(|(p, _)| same(p)) {
            return Err(in_use(" by the same container".into()));
        }
        let holder = {
            let state = lock(&self.state);
            let all = state.endpoints.values().map(|h| &h.endpoint);
            all.filter(|e| e.ports.iter().any(same))
                .map(|e| e.names.first().unwrap_or(&e.container).clone())
                .next()
        };
        if let Some(holder) = holder {
            return Err(in_use(format!(" by container {holder}")));
        }
        let (port, reservation) = match self.take_port(
            endpoint,
            address,
            port,
            (wish.container_port, wish.protocol),
        ) {
            Ok(taken) => taken,
            Err(error) => match error.raw_os_error() {
                Some(libc::EADDRINUSE) => return Err(in_use(String::new())),
                Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT) => {
                    return Err(Error::NotOurAddress { address });
                }
                Some(libc::EACCES) if port != 0 => return Err(Error::LowPort { port }),
                // A kernel without SCTP sockets may still forward SCTP.
                Some(libc::EPROTONOSUPPORT | libc::ESOCKTNOSUPPORT)
                    if wish.protocol == Protocol::Sctp
                        && port != 0
                        && self.config.gateway.is_none() =>
                {
                    (port, Reservation::None)
                }
                _ => {
                    return Err(error).context(|| {
                        format!("reserving {address}:{port}/{}", wish.protocol.name())
                    });
                }
            },
        };
        let published = PublishedPort {
            host_ip: address,
            host_port: port,
            container_port: wish.container_port,
            protocol: wish.protocol,
        };
        Ok((published, reservation))
    }

    /// Takes a port of the host, or any where it is 0. It comes with a proxy: in TCP for whatever the rules do not catch
    /// (::1, the other family, a table flushed by someone), in UDP for IPv6 only; for an ordinary user's networks always.
    fn take_port(
        &self,
        endpoint: &Endpoint,
        address: IpAddr,
        port: u16,
        (container_port, protocol): (u16, Protocol),
    ) -> io::Result<(u16, Reservation)> {
        let same_family = match address {
            IpAddr::V4(_) => endpoint
                .ipv4()
                .map(IpAddr::V4)
                .or(endpoint.ipv6().map(IpAddr::V6)),
            IpAddr::V6(_) => endpoint
                .ipv6()
                .map(IpAddr::V6)
                .or(endpoint.ipv4().map(IpAddr::V4)),
        };
        let target = same_family.map(|ip| SocketAddr::new(ip, container_port));
        let address = SocketAddr::new(address, port);
        if let (Some(gateway), Some(target)) = (&self.config.gateway, target) {
            let (port, published) = gateway.publish(protocol, address, target)?;
            let reservation = Reservation::Gateway {
                _published: published,
            };
            return Ok((port, reservation));
        }
        let socket = listen(address, protocol)?;
        let port = bound_port(&socket)?;
        let wanted = protocol == Protocol::Tcp || (protocol == Protocol::Udp && address.is_ipv6());
        let Some(target) = target.filter(|_| wanted) else {
            return Ok((port, Reservation::Socket { _socket: socket }));
        };
        match self.services.proxy(socket, protocol, target) {
            Ok(proxy) => Ok((port, Reservation::Proxy { _proxy: proxy })),
            Err(error) => {
                tracing::warn!(%error, port, "no proxy for a published port");
                Ok((port, Reservation::None))
            }
        }
    }

    /// Takes the published ports of an endpoint back, and leaves it connected.
    pub fn unpublish(&self, endpoint: &Id) {
        let forwards = match lock(&self.state).endpoints.get_mut(endpoint) {
            Some(held) => std::mem::take(&mut held.forwards),
            None => return,
        };
        self.withdraw(&forwards);
        let reservations = lock(&self.state).endpoints.get_mut(endpoint).map(|held| {
            held.endpoint.ports.clear();
            std::mem::take(&mut held.reservations)
        });
        drop(reservations);
    }

    /// Reserves again what a container that outlived a daemon has published. A port lost meanwhile is only warned of:
    /// the rules go before whoever took it.
    pub(super) fn reserve_again(&self, endpoint: &Endpoint) -> (Vec<Forward>, Vec<Reservation>) {
        let forwards = endpoint
            .ports
            .iter()
            .filter_map(|port| forward_of(endpoint, port))
            .collect();
        let reservations = endpoint.ports.iter().filter_map(|port| {
            let inside = (port.container_port, port.protocol);
            self.take_port(endpoint, port.host_ip, port.host_port, inside)
                .inspect_err(|error| tracing::warn!(%error, port = port.host_port, "a published port is held by another program"))
                .map(|(_, reservation)| reservation)
                .ok()
        });
        (forwards, reservations.collect())
    }
}

fn forward_of(endpoint: &Endpoint, port: &PublishedPort) -> Option<Forward> {
    let to = match port.host_ip {
        IpAddr::V4(_) => IpAddr::V4(endpoint.ipv4()?),
        // No packet can be routed from ::1; the proxy serves it.
        IpAddr::V6(ip) if ip.is_loopback() => return None,
        IpAddr::V6(_) => IpAddr::V6(endpoint.ipv6()?),
    };
    Some(Forward { port: *port, to })
}
