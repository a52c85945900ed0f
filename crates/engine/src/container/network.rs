//! A container's networks: what it asks for, and what it gets while it runs.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use base::Classified;
use base::file::Durability;

use crate::Engine;
use crate::container::config::ContainerConfig;
use crate::container::create::blocking;
use crate::container::host_config::{HostConfig, PortBinding};
use crate::container::inspect::Port;
use crate::container::inventory::Inventory;
use crate::container::networking::{EndpointSettings, NetworkSettings, NetworkingConfig};
use crate::container::record::{Container, Record};
use crate::container::start::detached;
use crate::error::{Error, Result};

/// Refuses what is asked for of a container's own network where it uses another's, and a name for the host's.
///
/// # Errors
/// [`Error::Invalid`] in dockerd's words.
pub(crate) fn check_conflicts(config: &ContainerConfig, host: &HostConfig) -> Result<()> {
    let conflict = |what: &str| Err(Error::Invalid(format!("conflicting options: {what}")));
    if host.uts_mode == "host" && !config.hostname.is_empty() {
        return conflict("hostname and the UTS mode");
    }
    if !host.network_mode.starts_with("container:") {
        return Ok(());
    }
    let exposed = config.exposed_ports.as_ref();
    match () {
        _ if !config.hostname.is_empty() => conflict("hostname and the network mode"),
        _ if !host.dns.is_empty() => conflict("dns and the network mode"),
        _ if host.extra_hosts.as_ref().is_some_and(|h| !h.is_empty()) => {
            conflict("custom host-to-IP mapping and the network mode")
        }
        _ if !config.mac_address.is_empty() => conflict("mac-address and the network mode"),
        _ if !host.port_bindings.is_empty() || host.publish_all_ports => {
            conflict("port publishing and the container type network mode")
        }
        _ if exposed.is_some_and(|ports| !ports.is_empty()) => {
            conflict("port exposing and the container type network mode")
        }
        _ => Ok(()),
    }
}

/// The networks of a new container by name; makes the network mode whole.
///
/// # Errors
/// Where a network or the other container is not there, and where options contradict the mode.
pub(crate) fn wanted(
    manager: &net::Manager,
    config: &ContainerConfig,
    host: &mut HostConfig,
    networking: NetworkingConfig,
    inventory: &Inventory,
) -> Result<BTreeMap<String, EndpointSettings>> {
    if matches!(host.network_mode.as_str(), "" | "default") {
        host.network_mode = "bridge".into();
    }
    if config.network_disabled {
        host.network_mode = "none".into();
    }
    ports_wanted(config, host)?;
    if let Some(other) = host.network_mode.strip_prefix("container:") {
        let other = inventory.find(other)?;
        host.network_mode = format!("container:{}", other.id);
        if !networking.endpoints_config.is_empty() {
            return Err(Error::Invalid(
                "conflicting options: a container's network and own networks".into(),
            ));
        }
        return Ok(BTreeMap::new());
    }
    if host.network_mode == "host" && host.links.as_ref().is_some_and(|links| !links.is_empty()) {
        return Err(Error::Invalid(
            "conflicting options: host type networking can't be used with links. This would result in undefined behavior".into(),
        ));
    }
    let mut networks = BTreeMap::new();
    for (name, settings) in networking.endpoints_config {
        let name = if name == "default" {
            "bridge".to_owned()
        } else {
            name
        };
        let network = manager.inspect(&name).map_err(Error::room)?;
        let mut settings = settings.unwrap_or_default();
        check(&settings)?;
        settings.network_id = network.id.to_string();
        networks.insert(network.name, settings);
    }
    let main = manager
        .inspect(&host.network_mode)
        .map_err(|error| match error.kind() {
            base::Kind::NotFound => {
                Error::NotFound(format!("network {} not found", host.network_mode))
            }
            _ => Error::room(error),
        })?;
    let settings = networks
        .entry(main.name.clone())
        .or_insert_with(EndpointSettings::default);
    settings.network_id = main.id.to_string();
    if settings.mac_address.is_empty() {
        settings.mac_address = config.mac_address.clone();
    }
    Ok(networks)
}

fn check(settings: &EndpointSettings) -> Result<()> {
    let ipam = settings.ipam_config.clone().unwrap_or_default();
    for address in [&ipam.ipv4_address, &ipam.ipv6_address] {
        if !address.is_empty() && address.parse::<IpAddr>().is_err() {
            return Err(Error::Invalid(format!(
                "invalid endpoint settings: {address:?} is not an address"
            )));
        }
    }
    if !settings.mac_address.is_empty() {
        settings.mac_address.parse::<net::Mac>().map_err(|_| {
            Error::Invalid(format!("invalid MAC address: {}", settings.mac_address))
        })?;
    }
    Ok(())
}

/// The ports to publish.
///
/// # Errors
/// [`Error::Invalid`] for what is no port.
pub(crate) fn ports_wanted(
    config: &ContainerConfig,
    host: &HostConfig,
) -> Result<Vec<net::PortMap>> {
    let wrong = |text: &str| Error::Invalid(format!("invalid port specification: {text:?}"));
    let parse = |text: &str| -> Result<(u16, net::Protocol)> {
        let (port, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let port = port
            .parse::<u16>()
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(|| wrong(text))?;
        Ok((
            port,
            net::Protocol::from_name(protocol).map_err(Error::room)?,
        ))
    };
    let mut maps = Vec::new();
    for (key, bindings) in &host.port_bindings {
        let (container_port, protocol) = parse(key)?;
        let any = [PortBinding::default()];
        let bindings = bindings
            .as_deref()
            .filter(|list| !list.is_empty())
            .unwrap_or(&any);
        for binding in bindings {
            let host_ip = match binding.host_ip.as_str() {
                "" => None,
                text => Some(
                    text.parse::<IpAddr>()
                        .map_err(|_| Error::Invalid(format!("invalid IP address: {text}")))?,
                ),
            };
            let host_ports = match binding.host_port.as_str() {
                "" | "0" => None,
                text => {
                    let (first, last) = text.split_once('-').unwrap_or((text, text));
                    match (first.parse::<u16>(), last.parse::<u16>()) {
                        (Ok(first), Ok(last)) if first > 0 && first <= last => Some((first, last)),
                        _ => {
                            return Err(Error::Invalid(format!(
                                "invalid port specification: {text:?}"
                            )));
                        }
                    }
                }
            };
            maps.push(net::PortMap {
                container_port,
                protocol,
                host_ip,
                host_ports,
            });
        }
    }
    if host.publish_all_ports {
        for key in config.exposed_ports.iter().flat_map(|set| set.iter()) {
            let (container_port, protocol) = parse(key)?;
            if !maps
                .iter()
                .any(|map| map.container_port == container_port && map.protocol == protocol)
            {
                maps.push(net::PortMap {
                    container_port,
                    protocol,
                    host_ip: None,
                    host_ports: None,
                });
            }
        }
    }
    Ok(maps)
}

fn spec_of(record: &Record, network: &str, settings: &EndpointSettings) -> net::EndpointSpec {
    let ipam = settings.ipam_config.clone().unwrap_or_default();
    let mut aliases = settings.aliases.clone().unwrap_or_default();
    aliases.push(record.id[..12].to_owned());
    aliases.dedup();
    net::EndpointSpec {
        network: network.to_owned(),
        container: record.id.clone(),
        names: vec![record.name.clone(), record.config.hostname.clone()],
        aliases,
        v4: ipam.ipv4_address.parse().ok(),
        v6: ipam.ipv6_address.parse().ok(),
        mac: settings.mac_address.parse().ok(),
        gateway_priority: settings.gw_priority as i32,
        dns: record
            .host
            .dns
            .iter()
            .filter_map(|server| server.parse().ok())
            .collect(),
        ..Default::default()
    }
}

/// Connects a container about to start, and publishes its ports. Blocking. On failure all is taken back.
pub(crate) fn connect_all(
    manager: &net::Manager,
    record: &Record,
    sandbox: &net::Sandbox,
) -> Result<Vec<net::Endpoint>> {
    let result = (|| {
        let mut endpoints = Vec::new();
        // The network of `--network` first: it is eth0.
        let mut names: Vec<&String> = record.networks.keys().collect();
        names.sort_by_key(|name| **name != record.host.network_mode);
        for name in names {
            let endpoint = manager
                .connect(sandbox, spec_of(record, name, &record.networks[name]))
                .map_err(Error::room)?;
            endpoints.push(endpoint);
        }
        let maps = ports_wanted(&record.config, &record.host)?;
        let gateway = endpoints
            .iter_mut()
            .find(|endpoint| endpoint.v4.is_some() && !endpoint.internal);
        if let (false, Some(endpoint)) = (maps.is_empty(), gateway) {
            endpoint.ports = manager.publish(endpoint, &maps).map_err(Error::room)?;
        }
        Ok(endpoints)
    })();
    if result.is_err() {
        manager.release(&record.id);
    }
    result
}

/// Writes what an endpoint got into the settings shown.
pub(crate) fn show(settings: &mut EndpointSettings, endpoint: &net::Endpoint) {
    settings.network_id = endpoint.network.to_string();
    settings.endpoint_id = endpoint.id.to_string();
    settings.ip_address = endpoint.ipv4().map_or_else(String::new, |a| a.to_string());
    settings.ip_prefix_len = endpoint.v4.map_or(0, |subnet| subnet.prefix());
    settings.gateway = endpoint
        .gateway_v4
        .map_or_else(String::new, |a| a.to_string());
    settings.global_ipv6_address = endpoint.ipv6().map_or_else(String::new, |a| a.to_string());
    settings.global_ipv6_prefix_len = endpoint.v6.map_or(0, |subnet| subnet.prefix());
    settings.ipv6_gateway = endpoint
        .gateway_v6
        .map_or_else(String::new, |a| a.to_string());
    if let Some(mac) = endpoint.mac {
        settings.mac_address = mac.to_string();
    }
    let mut names = endpoint.names.clone();
    names.extend(endpoint.aliases.iter().cloned());
    names.dedup();
    settings.dns_names = Some(names);
}

/// Writes what all endpoints of a container got into its record.
pub(crate) fn show_all(record: &mut Record, endpoints: &[net::Endpoint]) {
    for endpoint in endpoints {
        if let Some(settings) = record.networks.get_mut(&endpoint.network_name) {
            show(settings, endpoint);
        }
    }
    record.endpoints = endpoints.to_vec();
}

/// Takes back what [`show`] wrote, but for what was asked.
pub(crate) fn hide(settings: &mut EndpointSettings) {
    *settings = EndpointSettings {
        ipam_config: settings.ipam_config.clone(),
        links: settings.links.clone(),
        aliases: settings.aliases.clone(),
        driver_opts: settings.driver_opts.clone(),
        gw_priority: settings.gw_priority,
        network_id: settings.network_id.clone(),
        ..Default::default()
    };
}

/// The network part of inspect.
pub(crate) fn settings(record: &Record) -> NetworkSettings {
    let mut out = NetworkSettings {
        networks: record.networks.clone(),
        ..Default::default()
    };
    if let Some(bridge) = record.networks.get("bridge") {
        out.endpoint_id = bridge.endpoint_id.clone();
        out.gateway = bridge.gateway.clone();
        out.ip_address = bridge.ip_address.clone();
        out.ip_prefix_len = bridge.ip_prefix_len;
        out.mac_address = bridge.mac_address.clone();
        out.global_ipv6_address = bridge.global_ipv6_address.clone();
        out.global_ipv6_prefix_len = bridge.global_ipv6_prefix_len;
        out.ipv6_gateway = bridge.ipv6_gateway.clone();
    }
    if record.phase.lives() {
        out.sandbox_id = record.id.clone();
        out.sandbox_key = record
            .process
            .map_or_else(String::new, |key| format!("/proc/{}/ns/net", key.pid));
        for port in record
            .config
            .exposed_ports
            .iter()
            .flat_map(|set| set.iter())
        {
            out.ports.insert(
                if port.contains('/') {
                    port.clone()
                } else {
                    format!("{port}/tcp")
                },
                None,
            );
        }
        for port in record.endpoints.iter().flat_map(|endpoint| &endpoint.ports) {
            let key = format!("{}/{}", port.container_port, port.protocol.name());
            out.ports
                .entry(key)
                .or_default()
                .get_or_insert_default()
                .push(PortBinding {
                    host_ip: port.host_ip.to_string(),
                    host_port: port.host_port.to_string(),
                });
        }
    }
    out
}

/// The ports of a row of `ps`.
pub(crate) fn ports(record: &Record) -> Vec<Port> {
    let mut list: Vec<Port> = Vec::new();
    if !record.phase.lives() {
        return list;
    }
    for port in record.endpoints.iter().flat_map(|endpoint| &endpoint.ports) {
        list.push(Port {
            ip: port.host_ip.to_string(),
            private_port: port.container_port,
            public_port: Some(port.host_port),
            protocol: port.protocol.name().into(),
        });
    }
    for text in record
        .config
        .exposed_ports
        .iter()
        .flat_map(|set| set.iter())
    {
        let (port, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let Ok(private_port) = port.parse() else {
            continue;
        };
        if !list
            .iter()
            .any(|known| known.private_port == private_port && known.protocol == protocol)
        {
            list.push(Port {
                private_port,
                protocol: protocol.into(),
                ..Default::default()
            });
        }
    }
    list
}

/// Writes `hosts`, `hostname` and `resolv.conf`, in place: they are mounted already.
pub(crate) fn write_files(
    container: &Container,
    endpoints: &[net::Endpoint],
    manager: &net::Manager,
    linked: &[(String, String)],
) -> Result<()> {
    write_hosts(container, endpoints, manager, linked)?;
    let record = container.record().clone();
    let own = &record.host;
    let gateways = manager.name_servers(endpoints);
    let asked = net::ResolvOptions {
        servers: own
            .dns
            .iter()
            .filter_map(|server| server.parse().ok())
            .collect(),
        search: own.dns_search.clone(),
        options: own.dns_options.clone(),
    };
    let host_text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    write_file(
        container,
        "hostname",
        &format!("{}\n", record.config.hostname),
    )?;
    write_file(
        container,
        "resolv.conf",
        &net::resolv_conf(endpoints, &gateways, &host_text, &asked),
    )
}

fn write_file(container: &Container, name: &str, text: &str) -> Result<()> {
    let path = container.directory.join(name);
    std::fs::write(&path, text).map_err(Error::io(format!("writing {}", path.display())))
}

/// Writes `hosts`, with the names and addresses that links add.
pub(crate) fn write_hosts(
    container: &Container,
    endpoints: &[net::Endpoint],
    manager: &net::Manager,
    linked: &[(String, String)],
) -> Result<()> {
    let record = container.record().clone();
    let own = &record.host;
    let gateways = manager.name_servers(endpoints);
    let (name, domain) = match record.config.domainname.as_str() {
        // A full name is known by its first part too.
        "" => match record.config.hostname.split_once('.') {
            Some((name, domain)) => (name, Some(domain)),
            None => (record.config.hostname.as_str(), None),
        },
        domain => (record.config.hostname.as_str(), Some(domain)),
    };
    let extra: Vec<(String, String)> = own
        .extra_hosts
        .iter()
        .flatten()
        .filter_map(|host| host.split_once([':', '=']))
        .map(|(name, address)| (name.to_owned(), address.trim_matches(['[', ']']).to_owned()))
        .chain(linked.iter().cloned())
        .collect();
    let mut hosts = net::hosts_file(endpoints, name, domain, &extra, &gateways);
    if own.network_mode == "host" {
        // The host's own names hold on its network.
        hosts.push_str(&std::fs::read_to_string("/etc/hosts").unwrap_or_default());
    }
    write_file(container, "hosts", &hosts)
}

impl Engine {
    /// Connects a container to a network, now where it runs.
    ///
    /// # Errors
    /// [`Error::Forbidden`] where it is connected already, [`Error::Conflict`] where it has no network of its own.
    pub async fn connect_network(
        self: &Arc<Self>,
        network: &str,
        container: &str,
        endpoint: EndpointSettings,
    ) -> Result<()> {
        let container = self.inventory.find(container)?;
        let (engine, network) = (self.clone(), network.to_owned());
        detached(async move { engine.connect_whole(&network, &container, endpoint).await }).await
    }

    async fn connect_whole(
        self: &Arc<Self>,
        network: &str,
        container: &Arc<Container>,
        endpoint: EndpointSettings,
    ) -> Result<()> {
        let _operation = container.operation.lock().await;
        // Its end waits: it takes away what was connected until then.
        let _turn = container.turn.lock().await;
        check(&endpoint)?;
        let network = self.networks.inspect(network).map_err(Error::room)?;
        let record = container.record().clone();
        if record.shares_network().is_some() {
            return Err(Error::Conflict(
                "container sharing network namespace with another container or host cannot be connected to any other network".into(),
            ));
        }
        if record.host.network_mode == "host" || network.name == "host" {
            return Err(Error::Conflict(
                "container cannot be connected to host network: it is the host's own".into(),
            ));
        }
        if network.name == "none" && !record.networks.is_empty() {
            return Err(Error::Forbidden(
                "container cannot be connected to multiple networks with one of the networks in private (none) mode".into(),
            ));
        }
        if record.networks.contains_key(&network.name) {
            return Err(Error::Forbidden(format!(
                "endpoint with name {} already exists in network {}",
                record.name, network.name
            )));
        }
        let mut settings = endpoint;
        settings.network_id = network.id.to_string();
        let mut made = None;
        if let (true, Some(process)) = (record.phase.lives(), record.process) {
            let (engine, spec) = (self.clone(), spec_of(&record, &network.name, &settings));
            let endpoint = blocking(move || {
                let sandbox = net::Sandbox::of_process(process.pid).map_err(Error::room)?;
                engine.networks.connect(&sandbox, spec).map_err(Error::room)
            })
            .await?;
            show(&mut settings, &endpoint);
            made = Some(endpoint);
        }
        container.change(Durability::Process, |record| {
            record.networks.remove("none");
            record.networks.insert(network.name.clone(), settings);
            record.endpoints.extend(made);
        })?;
        self.tell_network("connect", &network, container);
        Ok(())
    }

    /// Takes a container off a network.
    ///
    /// # Errors
    /// [`Error::NotFound`] where it is not on it.
    pub async fn disconnect_network(
        self: &Arc<Self>,
        network: &str,
        container: &str,
        force: bool,
    ) -> Result<()> {
        let network = self.networks.inspect(network).map_err(Error::room)?;
        let container = match self.inventory.find(container) {
            Ok(container) => container,
            Err(_) if force => return Ok(()),
            Err(error) => return Err(error),
        };
        let engine = self.clone();
        detached(async move { engine.disconnect_whole(&network, &container).await }).await
    }

    async fn disconnect_whole(
        self: &Arc<Self>,
        network: &net::Network,
        container: &Arc<Container>,
    ) -> Result<()> {
        let _operation = container.operation.lock().await;
        let record = container.record().clone();
        if record.host.network_mode == "host" && network.name == "host" {
            return Err(Error::Conflict(
                "container cannot be disconnected from host network".into(),
            ));
        }
        if !record.networks.contains_key(&network.name) {
            return Err(Error::NotFound(format!(
                "container {} is not connected to network {}",
                container.id, network.name
            )));
        }
        if let (true, Some(process)) = (record.phase.lives(), record.process) {
            let (engine, id, name) = (self.clone(), container.id.clone(), network.name.clone());
            blocking(move || {
                let sandbox = net::Sandbox::of_process(process.pid).map_err(Error::room)?;
                engine
                    .networks
                    .disconnect(Some(&sandbox), &id, &name)
                    .map_err(Error::room)
            })
            .await?;
        }
        container.change(Durability::Process, |record| {
            record.networks.remove(&network.name);
            record
                .endpoints
                .retain(|endpoint| endpoint.network != network.id);
        })?;
        self.tell_network("disconnect", network, container);
        Ok(())
    }

    pub(crate) fn tell_network(&self, action: &str, network: &net::Network, container: &Container) {
        let kind = match network.driver {
            net::Driver::Bridge => "bridge",
            net::Driver::Host => "host",
            net::Driver::None => "null",
        };
        let attributes = BTreeMap::from([
            ("container".to_owned(), container.id.clone()),
            ("name".to_owned(), network.name.clone()),
            ("type".to_owned(), kind.to_owned()),
        ]);
        self.events
            .publish("network", action, network.id.as_str(), attributes);
    }
}
