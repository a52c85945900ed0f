//! Networks: made, found, removed, brought up.

use std::fs;
use std::net::IpAddr;

use base::Id;
use base::file::{Durability, read_json, write_json};

use super::{Manager, Net, Setup, lock, rules_of};
use crate::address::{Mac, Subnet, address_of};
use crate::endpoint::Endpoint;
use crate::error::{Context, Error, Result};
use crate::ipam::{SubnetPool, choose};
use crate::neighbour;
use crate::netlink::LinkChange;
use crate::network::{
    Driver, IpamConfig, Network, NetworkSpec, OPTION_BRIDGE_NAME, OPTION_DEFAULT,
    check_interface_name, check_name,
};
use crate::sysctl;

impl Manager {
    pub(super) fn load_networks(&self) -> Result<()> {
        let entries = fs::read_dir(&self.directory).context(|| "listing network records".into())?;
        for entry in entries {
            let path = entry.context(|| "listing network records".into())?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match read_json::<Network>(&path) {
                Ok(Some(record)) => {
                    lock(&self.state)
                        .networks
                        .insert(record.id.clone(), Net::new(record));
                }
                Ok(None) => {}
                // One bad record must not keep the daemon from all others.
                Err(error) => {
                    tracing::error!(%error, "a network record is unreadable and was left out")
                }
            }
        }
        for (name, driver) in [
            ("bridge", Driver::Bridge),
            ("host", Driver::Host),
            ("none", Driver::None),
        ] {
            if lock(&self.state)
                .networks
                .values()
                .any(|net| net.record.name == name)
            {
                continue;
            }
            let mut spec = NetworkSpec {
                driver,
                ..NetworkSpec::bridge(name)
            };
            if driver == Driver::Bridge {
                spec.options
                    .insert(OPTION_BRIDGE_NAME.into(), self.config.bridge.clone());
                spec.options.insert(OPTION_DEFAULT.into(), "true".into());
                if let Some(subnet) = self.config.bridge_subnet {
                    let own =
                        (subnet.address() != subnet.network().address()).then(|| subnet.address());
                    spec.ipam.config = vec![IpamConfig {
                        subnet: Some(subnet.network()),
                        gateway: own,
                        ..IpamConfig::default()
                    }];
                }
            }
            self.record_network(spec)?;
        }
        Ok(())
    }

    /// Makes a network and brings it up.
    ///
    /// # Errors
    /// Bad or taken names, subnets that overlap the host's routes or other networks, exhausted pools.
    pub fn create_network(&self, spec: NetworkSpec) -> Result<Network> {
        check_name(&spec.name)?;
        if spec.driver != Driver::Bridge {
            return Err(Error::WrongDriver {
                network: spec.name,
                why: "there is only one network of the host and null drivers".into(),
            });
        }
        self.inside(|| self.create_here(spec))
    }

    fn create_here(&self, spec: NetworkSpec) -> Result<Network> {
        let record = self.record_network(spec)?;
        if let Err(error) = self.bring_up(&record.id) {
            let _ = self.remove_network(record.id.as_str());
            return Err(error);
        }
        Ok(record)
    }

    fn record_network(&self, spec: NetworkSpec) -> Result<Network> {
        if !matches!(spec.ipam.driver.as_str(), "" | "default") {
            return Err(Error::invalid(format!(
                "there is no IPAM driver {:?}",
                spec.ipam.driver
            )));
        }
        // The setup lock keeps two calls from choosing the same subnet.
        let _setup = lock(&self.setup);
        let id = Id::random();
        let mut record = Network {
            name: spec.name,
            created: base::time::now_rfc3339(),
            driver: spec.driver,
            ipv4: spec.ipv4,
            ipv6: spec.ipv6,
            ipam: spec.ipam,
            internal: spec.internal,
            attachable: spec.attachable,
            options: spec.options,
            labels: spec.labels,
            bridge: String::new(),
            owns_bridge: true,
            id,
        };
        let others: Vec<(String, Vec<Subnet>)> = {
            let state = lock(&self.state);
            if state
                .networks
                .values()
                .any(|net| net.record.name == record.name)
            {
                return Err(Error::NetworkExists(record.name));
            }
            let subnets = |n: &Network| n.ipam.config.iter().filter_map(|c| c.subnet).collect();
            state
                .networks
                .values()
                .map(|net| (net.record.name.clone(), subnets(&net.record)))
                .collect()
        };
        if record.driver == Driver::Bridge {
            self.name_bridge(&mut record)?;
            self.complete_ipam(&mut record, &others)?;
        }
        self.save(&record)?;
        lock(&self.state)
            .networks
            .insert(record.id.clone(), Net::new(record.clone()));
        Ok(record)
    }

    fn save(&self, record: &Network) -> Result<()> {
        let path = self.directory.join(format!("{}.json", record.id));
        write_json(&path, record, Durability::Host)
            .context(|| format!("writing {}", path.display()))
    }

    fn name_bridge(&self, record: &mut Network) -> Result<()> {
        record.bridge = match record.options.get(OPTION_BRIDGE_NAME) {
            Some(name) => {
                check_interface_name(name)?;
                let taken = lock(&self.state)
                    .networks
                    .values()
                    .any(|net| net.record.bridge == *name);
                if taken {
                    return Err(Error::invalid(format!(
                        "another network has the bridge {name}"
                    )));
                }
                let there = lock(&self.netlink)
                    .link(name)
                    .context(|| format!("looking for {name}"))?;
                record.owns_bridge = there.is_none() || *name == self.config.bridge;
                name.clone()
            }
            None => format!("br-{}{}", self.config.tag, &record.id.as_str()[..6]),
        };
        Ok(())
    }

    /// Fills in subnets and gateways and checks them against the host and the other networks.
    fn complete_ipam(&self, record: &mut Network, others: &[(String, Vec<Subnet>)]) -> Result<()> {
        let routes = {
            let mut netlink = lock(&self.netlink);
            let own = netlink
                .link(&record.bridge)
                .context(|| "listing interfaces".into())?
                .map(|l| l.index);
            let mut routes = netlink.routes().context(|| "listing routes".into())?;
            routes.retain(|r| r.destination.prefix() > 0 && (own.is_none() || r.interface != own));
            routes
        };
        let configs = &mut record.ipam.config;
        for config in configs.iter_mut() {
            let Some(asked) = config.subnet else {
                if config.gateway.is_some() || config.ip_range.is_some() {
                    return Err(Error::invalid("a gateway or an IP range needs a subnet"));
                }
                continue;
            };
            let subnet = asked.network();
            config.subnet = Some(subnet);
            let longest = if subnet.is_v4() { 30 } else { 126 };
            if subnet.prefix() > longest {
                return Err(Error::invalid(format!(
                    "subnet {subnet} has no room for containers"
                )));
            }
            let multicast = subnet.address().is_multicast() || subnet.address().is_loopback();
            if multicast || subnet.prefix() == 0 || subnet.address().is_unspecified() {
                return Err(Error::invalid(format!("subnet {subnet} is not for hosts")));
            }
            if let Some(range) = config.ip_range
                && !subnet.covers(range)
            {
                return Err(Error::invalid(format!(
                    "IP range {range} is not in subnet {subnet}"
                )));
            }
            for address in config.gateway.iter().chain(config.auxiliary.values()) {
                if !subnet.contains(*address) {
                    return Err(Error::invalid(format!(
                        "address {address} is not in subnet {subnet}"
                    )));
                }
            }
            for (name, subnets) in others {
                if subnets.iter().any(|s| s.overlaps(subnet)) {
                    return Err(Error::Overlap {
                        asked: subnet,
                        other: format!("network {name}"),
                    });
                }
            }
            // A wide route to somewhere else may be cut into; what is on the link or inside may not.
            let clash = routes.iter().find(|r| {
                r.destination.overlaps(subnet) && (!r.has_gateway || subnet.covers(r.destination))
            });
            if let Some(route) = clash {
                let other = format!("the host's route to {}", route.destination);
                return Err(Error::Overlap {
                    asked: subnet,
                    other,
                });
            }
        }
        for index in 1..configs.len() {
            let (before, this) = configs.split_at(index);
            if let Some(subnet) = this[0].subnet
                && before
                    .iter()
                    .filter_map(|c| c.subnet)
                    .any(|s| s.overlaps(subnet))
            {
                return Err(Error::Overlap {
                    asked: subnet,
                    other: "another subnet of this network".into(),
                });
            }
        }
        configs.retain(|c| c.subnet.is_some());
        record.ipv6 |= configs.iter().any(|c| c.subnet.is_some_and(|s| !s.is_v4()));
        let mut taken: Vec<Subnet> = routes.iter().map(|r| r.destination).collect();
        taken.extend(
            others
                .iter()
                .flat_map(|(_, subnets)| subnets.iter().copied()),
        );
        // What the host reaches, containers shall reach through it.
        let mut better = taken.clone();
        if let Some(host) = &self.host {
            let routes = lock(host).routes();
            let routes = routes.context(|| "listing the host's routes".into())?;
            let routes = routes.iter().map(|route| route.destination);
            better.extend(routes.filter(|destination| destination.prefix() > 0));
        }
        for (v4, wanted) in [(true, record.ipv4), (false, record.ipv6)] {
            if wanted
                && !configs
                    .iter()
                    .any(|c| c.subnet.is_some_and(|s| s.is_v4() == v4))
            {
                let own;
                let pools = if v4 || self.config.pools.iter().any(|p| !p.base.is_v4()) {
                    &self.config.pools[..]
                } else {
                    own = [self.unique_local_pool()];
                    &own[..]
                };
                let subnet = choose(pools, v4, &better).or_else(|_| choose(pools, v4, &taken))?;
                let subnet = Some(subnet);
                configs.push(IpamConfig {
                    subnet,
                    ..IpamConfig::default()
                });
            }
        }
        for config in configs.iter_mut() {
            let Some(subnet) = config.subnet else {
                continue;
            };
            if config.gateway.is_none() {
                let mut first = subnet.first_number() + 1;
                while config
                    .auxiliary
                    .values()
                    .any(|a| *a == address_of(first, subnet.is_v4()))
                {
                    first += 1;
                }
                config.gateway = Some(address_of(first, subnet.is_v4()));
            }
        }
        Ok(())
    }

    /// A /48 of unique local addresses (RFC 4193) that follows from the tag, so that it stays the same.
    fn unique_local_pool(&self) -> SubnetPool {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        for byte in self.config.tag.bytes().chain(*b"berth") {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        let h = hash.to_be_bytes();
        let mut octets = [0u8; 16];
        octets[..6].copy_from_slice(&[0xfd, h[0], h[1], h[2], h[3], h[4]]);
        SubnetPool {
            base: Subnet::new(IpAddr::from(octets), 48).expect("48 is short"),
            size: 64,
        }
    }

    /// The networks, by name.
    pub fn list(&self) -> Vec<Network> {
        let mut all: Vec<_> = lock(&self.state)
            .networks
            .values()
            .map(|net| net.record.clone())
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// A network by name, id, or an id's beginning that only one has.
    ///
    /// # Errors
    /// Where there is none, or more than one.
    pub fn inspect(&self, name: &str) -> Result<Network> {
        let state = lock(&self.state);
        let all = || state.networks.values().map(|net| &net.record);
        if let Some(found) = all()
            .find(|n| n.name == name)
            .or_else(|| all().find(|n| n.id.as_str() == name))
        {
            return Ok(found.clone());
        }
        let mut beginning = all().filter(|n| !name.is_empty() && n.id.as_str().starts_with(name));
        match (beginning.next(), beginning.next()) {
            (Some(found), None) => Ok(found.clone()),
            (Some(_), Some(_)) => Err(Error::invalid(format!("network id {name} is ambiguous"))),
            _ => Err(Error::NoSuchNetwork(name.to_owned())),
        }
    }

    /// Who is on a network.
    pub fn endpoints(&self, network: &Id) -> Vec<Endpoint> {
        let state = lock(&self.state);
        let on = state
            .endpoints
            .values()
            .filter(|h| h.endpoint.network == *network);
        on.map(|held| held.endpoint.clone()).collect()
    }

    /// Removes a network nobody is on.
    ///
    /// # Errors
    /// Where it is unknown, predefined, or in use.
    pub fn remove_network(&self, name: &str) -> Result<Network> {
        self.inside(|| self.remove_here(name))
    }

    fn remove_here(&self, name: &str) -> Result<Network> {
        let record = self.inspect(name)?;
        if record.is_predefined() {
            return Err(Error::Predefined(record.name));
        }
        let mut setup = lock(&self.setup);
        let (was_up, redirects) = {
            let mut state = lock(&self.state);
            let users: Vec<_> = state
                .endpoints
                .values()
                .filter(|h| h.endpoint.network == record.id)
                .map(|h| {
                    h.endpoint
                        .names
                        .first()
                        .unwrap_or(&h.endpoint.container)
                        .clone()
                })
                .collect();
            if !users.is_empty() {
                return Err(Error::NetworkInUse {
                    name: record.name,
                    users: users.join(", "),
                });
            }
            // From here on nobody can connect; the record on disk stays until the kernel's part is gone.
            let net = state.networks.remove(&record.id);
            net.map_or((false, Vec::new()), |net| {
                (net.bridge.is_some(), net.redirects)
            })
        };
        if was_up {
            let _ = self.firewall.remove_forwards(&redirects);
            self.take_down(&mut setup, &record)?;
        }
        let path = self.directory.join(format!("{}.json", record.id));
        fs::remove_file(&path).context(|| format!("removing {}", path.display()))?;
        Ok(record)
    }

    fn take_down(&self, setup: &mut Setup, record: &Network) -> Result<()> {
        self.services.remove_network(&record.id);
        let _ = neighbour::pass_docker(&self.config.tag, &record.bridge, false);
        if setup.table && self.firewall.remove_network(&rules_of(record)).is_err() {
            // Someone changed the table: put it back as it shall be, without this network.
            self.install_table(setup)?;
        }
        if record.owns_bridge {
            lock(&self.netlink)
                .remove_link(&record.bridge)
                .context(|| format!("removing {}", record.bridge))?;
        }
        Ok(())
    }

    /// Removes the networks nobody is on that `keep` does not name.
    pub fn prune(&self, keep: impl Fn(&Network) -> bool) -> Vec<Network> {
        let unused = self
            .list()
            .into_iter()
            .filter(|n| !n.is_predefined() && !keep(n));
        unused
            .filter_map(|network| self.remove_network(network.id.as_str()).ok())
            .collect()
    }

    /// Makes the bridge and its rules, once; returns the bridge's index.
    pub(super) fn bring_up(&self, id: &Id) -> Result<u32> {
        let find = || {
            let state = lock(&self.state);
            let net = state
                .networks
                .get(id)
                .ok_or_else(|| Error::NoSuchNetwork(id.to_string()))?;
            Ok::<_, Error>((net.bridge, net.record.clone()))
        };
        if let (Some(index), _) = find()? {
            return Ok(index);
        }
        let mut setup = lock(&self.setup);
        let (None, record) = find()? else {
            return self.bring_up_done(id);
        };
        let index = self.make_bridge(&mut setup, &record)?;
        if let Some(net) = lock(&self.state).networks.get_mut(id) {
            net.bridge = Some(index);
        }
        let ruled = if setup.table {
            self.firewall
                .add_network(&rules_of(&record))
                .or_else(|_| self.install_table(&mut setup))
        } else {
            self.install_table(&mut setup)
        };
        if let Err(error) = ruled {
            // Without rules there is no isolation: the bridge must not be used.
            if let Some(net) = lock(&self.state).networks.get_mut(id) {
                net.bridge = None;
            }
            if record.owns_bridge {
                let _ = lock(&self.netlink).remove_link(&record.bridge);
            }
            return Err(error);
        }
        if let Err(error) = neighbour::pass_docker(&self.config.tag, &record.bridge, true) {
            tracing::warn!(%error, "Docker's firewall rules may block our networks");
        }
        let redirects = self.services.add_network(&record);
        if let Err(error) = self.firewall.add_forwards(&redirects) {
            tracing::error!(network = record.name, %error, "the name service is not reached on port 53");
        }
        if let Some(net) = lock(&self.state).networks.get_mut(id) {
            net.redirects = redirects;
        }
        Ok(index)
    }

    fn bring_up_done(&self, id: &Id) -> Result<u32> {
        let state = lock(&self.state);
        let up = state.networks.get(id).and_then(|net| net.bridge);
        up.ok_or_else(|| Error::NoSuchNetwork(id.to_string()))
    }

    fn make_bridge(&self, setup: &mut Setup, record: &Network) -> Result<u32> {
        let name = &record.bridge;
        let mut netlink = lock(&self.netlink);
        if netlink
            .link(name)
            .context(|| format!("looking for {name}"))?
            .is_none()
        {
            let mac = record.gateway_v4().map_or_else(Mac::random, Mac::of_v4);
            netlink
                .add_bridge(name, mac, record.mtu())
                .context(|| format!("making the bridge {name}"))?;
        }
        let link = netlink
            .link(name)
            .context(|| format!("looking for {name}"))?;
        let index = link
            .ok_or_else(|| Error::invalid(format!("the bridge {name} is gone")))?
            .index;
        drop(netlink);
        let six = record.ipv6;
        let settings = [
            ("ipv4", "route_localnet", "1"),
            ("ipv6", "disable_ipv6", if six { "0" } else { "1" }),
            ("ipv6", "accept_dad", "0"),
            ("ipv6", "accept_ra", "0"),
        ];
        for (family, key, value) in settings {
            if family == "ipv6" && !record.owns_bridge {
                continue;
            }
            match sysctl::write(&format!("{family}/conf/{name}/{key}"), value) {
                Err(error) if family == "ipv6" && !six => {
                    tracing::debug!(%error, key, "no IPv6 settings")
                }
                result => result.context(|| format!("setting {key} of {name}"))?,
            }
        }
        let mut netlink = lock(&self.netlink);
        for config in &record.ipam.config {
            if let (Some(subnet), Some(gateway)) = (config.subnet, config.gateway) {
                let own =
                    Subnet::new(gateway, subnet.prefix()).expect("the gateway is in the subnet");
                netlink
                    .add_address(index, own)
                    .context(|| format!("giving {own} to {name}"))?;
            }
        }
        netlink
            .set_link(
                index,
                &LinkChange {
                    up: Some(true),
                    ..LinkChange::default()
                },
            )
            .context(|| format!("bringing up {name}"))?;
        drop(netlink);
        if !record.internal {
            for (v4, wanted) in [(true, record.ipv4), (false, six)] {
                if wanted {
                    setup.settings.forward(v4)?;
                }
            }
        }
        Ok(index)
    }
}
