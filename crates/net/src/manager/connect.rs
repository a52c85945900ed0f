//! Endpoints: a sandbox gets an interface on a network, and loses it.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Component, Path};

use base::Id;

use super::{Held, Manager, State, lock};
use crate::address::{Mac, Subnet};
use crate::endpoint::{Endpoint, EndpointSpec};
use crate::error::{Context, Error, Result};
use crate::namespace::{Sandbox, random_name, within};
use crate::netlink::{LinkChange, Netlink};
use crate::network::{Driver, OPTION_ICC, check_interface_name};
use crate::sysctl;

/// What of a network is needed once the lock is gone.
pub(super) struct Place {
    pub driver: Driver,
    pub mtu: Option<u32>,
    pub isolated: bool,
}

impl Manager {
    /// Gives the sandbox an interface on a network, before its container starts or while it runs.
    ///
    /// # Errors
    /// Unknown networks, taken addresses, a second endpoint on the same network; whatever the kernel refuses. Nothing
    /// is left of a failed call.
    pub fn connect(&self, sandbox: &Sandbox, spec: EndpointSpec) -> Result<Endpoint> {
        self.inside(|| self.connect_here(sandbox, spec))
    }

    fn connect_here(&self, sandbox: &Sandbox, spec: EndpointSpec) -> Result<Endpoint> {
        let sysctls = interface_settings(&spec)?;
        let (mut endpoint, place) = self.reserve(spec)?;
        let result = if place.driver == Driver::Bridge {
            self.attach(sandbox, &mut endpoint, &place, &sysctls)
        } else {
            self.strip(sandbox)
        };
        match result {
            Ok(()) => {
                self.enlist(&endpoint);
                Ok(endpoint)
            }
            Err(error) => {
                self.forget(&endpoint.id);
                self.reap_link(endpoint.host_interface);
                Err(error)
            }
        }
    }

    /// Records what an endpoint finally is, and lets its names be found.
    pub(super) fn enlist(&self, endpoint: &Endpoint) {
        if let Some(held) = lock(&self.state).endpoints.get_mut(&endpoint.id) {
            held.endpoint = endpoint.clone();
        }
        self.services.add_endpoint(endpoint);
    }

    /// Chooses addresses and names, and records the endpoint so that nobody else gets them.
    pub(super) fn reserve(&self, mut spec: EndpointSpec) -> Result<(Endpoint, Place)> {
        if spec.dns.is_empty() {
            spec.dns.clone_from(&self.config.dns);
        }
        let network = self.inspect(&spec.network)?;
        if let Some(name) = &spec.interface {
            check_interface_name(name)?;
        }
        if let Some(mac) = spec.mac.filter(|mac| !mac.is_unicast()) {
            return Err(Error::invalid(format!(
                "{mac} is not an address an interface can have"
            )));
        }
        let mut state = lock(&self.state);
        let held = |s: &State| {
            s.endpoints
                .values()
                .any(|h| h.endpoint.container == spec.container && h.endpoint.network == network.id)
        };
        if held(&state) {
            return Err(Error::AlreadyConnected {
                container: spec.container,
                network: network.name,
            });
        }
        let interface = match (&spec.interface, network.driver) {
            (_, Driver::Host | Driver::None) => String::new(),
            (Some(name), _) => name.clone(),
            (None, _) => next_interface(&state, &spec.container),
        };
        let net = state
            .networks
            .get_mut(&network.id)
            .ok_or_else(|| Error::NoSuchNetwork(spec.network.clone()))?;
        let mut endpoint = Endpoint {
            id: Id::random(),
            network: network.id.clone(),
            network_name: network.name.clone(),
            container: spec.container,
            names: spec.names,
            aliases: spec.aliases,
            interface,
            host_interface: String::new(),
            mac: None,
            v4: None,
            v6: None,
            gateway_v4: None,
            gateway_v6: None,
            gateway_priority: spec.gateway_priority,
            internal: network.internal,
            dns: spec.dns,
            ports: Vec::new(),
        };
        if net.is_bridge() {
            let wishes = [
                (true, spec.v4.map(IpAddr::V4)),
                (false, spec.v6.map(IpAddr::V6)),
            ];
            for (v4, wish) in wishes {
                let claimed = claim(net, v4, wish);
                match claimed {
                    Ok(address) if v4 => endpoint.v4 = address,
                    Ok(address) => endpoint.v6 = address,
                    Err(error) => {
                        free(net, &endpoint);
                        return Err(error);
                    }
                }
            }
            if !network.internal {
                endpoint.gateway_v4 = endpoint.v4.and(network.gateway_v4());
                endpoint.gateway_v6 = endpoint.v6.and(network.gateway_v6());
            }
            endpoint.mac = spec
                .mac
                .or_else(|| Some(endpoint.ipv4().map_or_else(Mac::random, Mac::of_v4)));
        } else if spec.v4.is_some() || spec.v6.is_some() {
            return Err(Error::WrongDriver {
                network: network.name,
                why: "its containers have no address of their own".into(),
            });
        }
        let place = Place {
            driver: network.driver,
            mtu: network.mtu(),
            isolated: !network.flag(OPTION_ICC, true),
        };
        let held = Held {
            endpoint: endpoint.clone(),
            forwards: Vec::new(),
            reservations: Vec::new(),
        };
        state.endpoints.insert(endpoint.id.clone(), held);
        Ok((endpoint, place))
    }

    fn attach(
        &self,
        sandbox: &Sandbox,
        endpoint: &mut Endpoint,
        place: &Place,
        sysctls: &[(String, String)],
    ) -> Result<()> {
        let bridge = self.bring_up(&endpoint.network)?;
        let prepared = lock(&sandbox.veth).take();
        let inside = match prepared {
            Some(veth) => {
                endpoint.host_interface = veth.host_name;
                self.join_bridge(veth.host_index, bridge, place)?;
                "eth0".to_owned()
            }
            None => {
                let name = random_name(&format!("bv{}", self.config.tag));
                let index = {
                    let mut netlink = lock(&self.netlink);
                    netlink
                        .add_veth(&name, &endpoint.interface, sandbox.netns.as_fd())
                        .context(|| format!("making {} in the container", endpoint.interface))?;
                    endpoint.host_interface = name.clone();
                    netlink
                        .link(&name)
                        .context(|| format!("looking for {name}"))?
                };
                let index = index
                    .ok_or_else(|| Error::invalid("the container ended meanwhile"))?
                    .index;
                let _ = sysctl::write(&format!("ipv6/conf/{name}/disable_ipv6"), "1");
                self.join_bridge(index, bridge, place)?;
                endpoint.interface.clone()
            }
        };
        let (gives_v4, gives_v6) = self.gives_gateway(endpoint);
        let what = || format!("setting up {} in the container", endpoint.interface);
        within(sandbox.netns.as_fd(), || {
            let mut netlink = Netlink::open()?;
            let missing =
                || std::io::Error::new(std::io::ErrorKind::NotFound, "the interface is gone");
            let index = netlink.link(&inside)?.ok_or_else(missing)?.index;
            let name = (inside != endpoint.interface).then_some(endpoint.interface.as_str());
            let change = LinkChange {
                name,
                mac: endpoint.mac,
                mtu: place.mtu,
                ..LinkChange::default()
            };
            netlink.set_link(index, &change)?;
            if endpoint.v6.is_some() {
                sysctl::write(
                    &format!("ipv6/conf/{}/disable_ipv6", endpoint.interface),
                    "0",
                )?;
            }
            for (key, value) in sysctls {
                sysctl::write(&key.replace("IFNAME", &endpoint.interface), value)?;
            }
            for address in [endpoint.v4, endpoint.v6].into_iter().flatten() {
                netlink.add_address(index, address)?;
            }
            netlink.set_link(
                index,
                &LinkChange {
                    up: Some(true),
                    ..LinkChange::default()
                },
            )?;
            if let (true, Some(gateway)) = (gives_v4, endpoint.gateway_v4) {
                netlink.replace_default_route(gateway.into(), index)?;
            }
            if let (true, Some(gateway)) = (gives_v6, endpoint.gateway_v6) {
                netlink.replace_default_route(gateway.into(), index)?;
            }
            Ok(())
        })
        .context(what)
    }

    pub(super) fn join_bridge(&self, index: u32, bridge: u32, place: &Place) -> Result<()> {
        let mut netlink = lock(&self.netlink);
        let change = LinkChange {
            master: Some(bridge),
            mtu: place.mtu,
            up: Some(true),
            ..LinkChange::default()
        };
        netlink
            .set_link(index, &change)
            .context(|| "joining the bridge".into())?;
        if place.isolated {
            netlink
                .isolate_port(index)
                .context(|| "isolating the container on its bridge".into())?;
        }
        Ok(())
    }

    /// Whether this endpoint, of all its container has, gives the default gateway, by family.
    fn gives_gateway(&self, endpoint: &Endpoint) -> (bool, bool) {
        let state = lock(&self.state);
        let (v4, v6) = gateways(&state, &endpoint.container);
        (
            v4.as_ref() == Some(&endpoint.id),
            v6.as_ref() == Some(&endpoint.id),
        )
    }

    /// Takes a container off one network. Without a sandbox (the container does not run) only our side is done.
    ///
    /// # Errors
    /// Where it is not on this network.
    pub fn disconnect(
        &self,
        sandbox: Option<&Sandbox>,
        container: &str,
        network: &str,
    ) -> Result<()> {
        let network = self.inspect(network)?;
        let (id, before) = {
            let state = lock(&self.state);
            let mut all = state.endpoints.values().map(|h| &h.endpoint);
            let found = all.find(|e| e.container == container && e.network == network.id);
            let id = found
                .map(|e| e.id.clone())
                .ok_or_else(|| Error::NotConnected {
                    container: container.to_owned(),
                    network: network.name.clone(),
                })?;
            (id, gateways(&state, container))
        };
        let Some(endpoint) = self.forget(&id) else {
            return Ok(());
        };
        // At once, not by the reaper: the container shall not be seen on it any more.
        if !endpoint.host_interface.is_empty() {
            let name = &endpoint.host_interface;
            lock(&self.netlink)
                .remove_link(name)
                .context(|| format!("removing {name}"))?;
        }
        let Some(sandbox) = sandbox else {
            return Ok(());
        };
        let routes: Vec<(String, IpAddr)> = {
            let state = lock(&self.state);
            let (v4, v6) = gateways(&state, container);
            let get = |id: &Option<Id>| id.as_ref().and_then(|id| state.endpoints.get(id));
            let four = get(&v4).filter(|_| before.0.as_ref() == Some(&id));
            let six = get(&v6).filter(|_| before.1.as_ref() == Some(&id));
            let four = four.and_then(|h| Some((h, h.endpoint.gateway_v4?.into())));
            let six = six.and_then(|h| Some((h, h.endpoint.gateway_v6?.into())));
            let each = four.into_iter().chain(six);
            each.map(|(h, gateway)| (h.endpoint.interface.clone(), gateway))
                .collect()
        };
        if routes.is_empty() {
            return Ok(());
        }
        within(sandbox.netns.as_fd(), || {
            let mut netlink = Netlink::open()?;
            for (interface, gateway) in &routes {
                if let Some(link) = netlink.link(interface)? {
                    netlink.replace_default_route(*gateway, link.index)?;
                }
            }
            Ok(())
        })
        .context(|| "moving the container's default route".into())
    }

    /// Takes a container off all networks: its addresses, names, ports and interfaces are free again. The
    /// interfaces go in the background.
    pub fn release(&self, container: &str) {
        let ids: Vec<Id> = {
            let state = lock(&self.state);
            let own = state
                .endpoints
                .values()
                .filter(|h| h.endpoint.container == container);
            own.map(|h| h.endpoint.id.clone()).collect()
        };
        for id in ids {
            if let Some(endpoint) = self.forget(&id) {
                self.reap_link(endpoint.host_interface);
            }
        }
    }

    /// The addresses of the hosts' side that a container on these endpoints has its name service at, IPv4 first.
    pub fn name_servers(&self, endpoints: &[Endpoint]) -> Vec<IpAddr> {
        let state = lock(&self.state);
        let networks = || {
            endpoints
                .iter()
                .filter_map(|e| state.networks.get(&e.network))
        };
        let v4 = networks()
            .filter_map(|net| net.record.gateway_v4())
            .map(IpAddr::V4);
        let v6 = networks()
            .filter_map(|net| net.record.gateway_v6())
            .map(IpAddr::V6);
        v4.chain(v6).collect()
    }

    /// The endpoints of a container.
    pub fn endpoints_of(&self, container: &str) -> Vec<Endpoint> {
        let state = lock(&self.state);
        let own = state
            .endpoints
            .values()
            .filter(|h| h.endpoint.container == container);
        own.map(|h| h.endpoint.clone()).collect()
    }

    /// Renames a container for the name service.
    pub fn rename(&self, container: &str, names: &[String]) {
        let mut renamed = Vec::new();
        {
            let mut state = lock(&self.state);
            for held in state
                .endpoints
                .values_mut()
                .filter(|h| h.endpoint.container == container)
            {
                held.endpoint.names = names.to_vec();
                renamed.push(held.endpoint.clone());
            }
        }
        for endpoint in renamed {
            self.services.remove_endpoint(&endpoint.id);
            self.services.add_endpoint(&endpoint);
        }
    }

    /// Drops the record of an endpoint with its ports and addresses; the interface is the caller's.
    pub(super) fn forget(&self, id: &Id) -> Option<Endpoint> {
        self.services.remove_endpoint(id);
        let (forwards, reservations) = {
            let mut state = lock(&self.state);
            let held = state.endpoints.get_mut(id)?;
            let reservations = std::mem::take(&mut held.reservations);
            (std::mem::take(&mut held.forwards), reservations)
        };
        // The rules go before the address is free, so that no port ever leads to the next holder.
        self.withdraw(&forwards);
        drop(reservations);
        let mut state = lock(&self.state);
        let held = state.endpoints.remove(id)?;
        if let Some(net) = state.networks.get_mut(&held.endpoint.network) {
            free(net, &held.endpoint);
        }
        Some(held.endpoint)
    }
}

/// Which endpoints of a container give its default gateways: the highest priority, then the first name.
fn gateways(state: &State, container: &str) -> (Option<Id>, Option<Id>) {
    let own = || {
        state
            .endpoints
            .values()
            .map(|h| &h.endpoint)
            .filter(|e| e.container == container)
    };
    let rank = |e: &&Endpoint| {
        (
            std::cmp::Reverse(e.gateway_priority),
            e.network_name.clone(),
        )
    };
    let best = |has: fn(&Endpoint) -> bool| {
        own()
            .filter(|e| has(e))
            .min_by_key(rank)
            .map(|e| e.id.clone())
    };
    (
        best(|e| e.gateway_v4.is_some()),
        best(|e| e.gateway_v6.is_some()),
    )
}

fn next_interface(state: &State, container: &str) -> String {
    let own = state.endpoints.values().map(|h| &h.endpoint);
    let taken: Vec<_> = own
        .filter(|e| e.container == container)
        .map(|e| e.interface.as_str())
        .collect();
    (0..)
        .map(|n| format!("eth{n}"))
        .find(|name| !taken.contains(&name.as_str()))
        .expect("numbers do not end")
}

/// Takes the wished or the next address of one family; `None` where the network does not have the family.
fn claim(net: &mut super::Net, v4: bool, wish: Option<IpAddr>) -> Result<Option<Subnet>> {
    let name = net.record.name.clone();
    let mut pools: Vec<_> = net
        .pools
        .iter_mut()
        .filter(|p| p.subnet().is_v4() == v4)
        .collect();
    if pools.is_empty() {
        return match wish {
            None => Ok(None),
            Some(address) => Err(Error::invalid(format!(
                "network {name} has no subnet for {address}"
            ))),
        };
    }
    if let Some(address) = wish {
        let Some(pool) = pools.iter_mut().find(|p| p.subnet().contains(address)) else {
            return Err(Error::invalid(format!(
                "address {address} is in no subnet of network {name}"
            )));
        };
        pool.claim(address)?;
        return Ok(Subnet::new(address, pool.subnet().prefix()));
    }
    let mut last = None;
    for pool in pools {
        match pool.next() {
            Ok(address) => return Ok(Subnet::new(address, pool.subnet().prefix())),
            Err(error) => last = Some(error),
        }
    }
    last.map_or(Ok(None), Err)
}

fn free(net: &mut super::Net, endpoint: &Endpoint) {
    for address in [endpoint.v4, endpoint.v6].into_iter().flatten() {
        if let Some(pool) = net
            .pools
            .iter_mut()
            .find(|p| p.subnet().contains(address.address()))
        {
            pool.free(address.address());
        }
    }
}

/// The settings as paths below `/proc/sys/net` that can only be ones of the interface.
fn interface_settings(spec: &EndpointSpec) -> Result<Vec<(String, String)>> {
    let each = spec.sysctls.iter().map(|(key, value)| {
        let invalid = || {
            Error::invalid(format!(
                "invalid interface setting {key:?}: it looks like net.ipv4.conf.IFNAME.NAME"
            ))
        };
        let path = key
            .strip_prefix("net.")
            .ok_or_else(invalid)?
            .replace('.', "/");
        let plain = Path::new(&path)
            .components()
            .all(|c| matches!(c, Component::Normal(_)));
        if plain && path.split('/').any(|part| part == "IFNAME") {
            Ok((path, value.clone()))
        } else {
            Err(invalid())
        }
    });
    each.collect()
}
