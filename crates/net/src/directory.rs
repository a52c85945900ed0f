//! Who has which name and address: what the name service answers from.

use std::collections::HashMap;
use std::net::IpAddr;

use base::Id;

use crate::endpoint::Endpoint;

/// The endpoints by name and by address. A name is found only by who shares a network with its holder.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    entries: HashMap<Id, Entry>,
    by_address: HashMap<IpAddr, Id>,
    by_name: HashMap<(Id, String), Vec<Id>>,
    by_container: HashMap<String, Vec<Id>>,
}

#[derive(Debug)]
struct Entry {
    network: Id,
    container: String,
    /// For PTR answers.
    primary: String,
    names: Vec<String>,
    addresses: Vec<IpAddr>,
    internal: bool,
    servers: Vec<IpAddr>,
}

impl Directory {
    pub(crate) fn add(&mut self, endpoint: &Endpoint) {
        let addresses: Vec<IpAddr> = [endpoint.v4, endpoint.v6]
            .into_iter()
            .flatten()
            .map(|s| s.address())
            .collect();
        if addresses.is_empty() {
            return;
        }
        self.remove(&endpoint.id);
        let network = endpoint.network_name.to_ascii_lowercase();
        let short: String = endpoint.container.chars().take(12).collect();
        let mut names: Vec<String> = Vec::new();
        for name in endpoint
            .names
            .iter()
            .chain(&endpoint.aliases)
            .chain([&short, &endpoint.container])
        {
            let name = name.trim_end_matches('.').to_ascii_lowercase();
            if name.is_empty() {
                continue;
            }
            let qualified = format!("{name}.{network}");
            for name in [name, qualified] {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        for name in &names {
            let key = (endpoint.network.clone(), name.clone());
            self.by_name
                .entry(key)
                .or_default()
                .push(endpoint.id.clone());
        }
        for address in &addresses {
            self.by_address.insert(*address, endpoint.id.clone());
        }
        self.by_container
            .entry(endpoint.container.clone())
            .or_default()
            .push(endpoint.id.clone());
        let first = endpoint
            .names
            .first()
            .map_or(short.as_str(), String::as_str);
        let entry = Entry {
            network: endpoint.network.clone(),
            container: endpoint.container.clone(),
            primary: format!("{}.{}", first.to_ascii_lowercase(), network),
            names,
            addresses,
            internal: endpoint.internal,
            servers: endpoint.dns.clone(),
        };
        self.entries.insert(endpoint.id.clone(), entry);
    }

    pub(crate) fn remove(&mut self, id: &Id) {
        let Some(entry) = self.entries.remove(id) else {
            return;
        };
        for name in entry.names {
            let key = (entry.network.clone(), name);
            if let Some(ids) = self.by_name.get_mut(&key) {
                ids.retain(|i| i != id);
                if ids.is_empty() {
                    self.by_name.remove(&key);
                }
            }
        }
        for address in entry.addresses {
            if self.by_address.get(&address) == Some(id) {
                self.by_address.remove(&address);
            }
        }
        if let Some(ids) = self.by_container.get_mut(&entry.container) {
            ids.retain(|i| i != id);
            if ids.is_empty() {
                self.by_container.remove(&entry.container);
            }
        }
    }

    /// The endpoints of the container that has `asker`.
    fn places(&self, asker: IpAddr) -> impl Iterator<Item = &Entry> {
        let own = self
            .by_address
            .get(&asker)
            .and_then(|id| self.entries.get(id));
        let ids = own.and_then(|entry| self.by_container.get(&entry.container));
        ids.into_iter()
            .flatten()
            .filter_map(|id| self.entries.get(id))
    }

    /// The addresses of `name` (lower case, no final dot) as `asker` may know them; `None` where no such name is known
    /// to it.
    pub(crate) fn find(&self, asker: IpAddr, name: &str) -> Option<Vec<IpAddr>> {
        let mut found: Option<Vec<IpAddr>> = None;
        for place in self.places(asker) {
            let ids = self.by_name.get(&(place.network.clone(), name.to_owned()));
            for entry in ids
                .into_iter()
                .flatten()
                .filter_map(|id| self.entries.get(id))
            {
                found.get_or_insert_default().extend(&entry.addresses);
            }
        }
        found
    }

    /// The name of `address`, if `asker` shares a network with its holder.
    pub(crate) fn name_of(&self, asker: IpAddr, address: IpAddr) -> Option<&str> {
        let entry = self.entries.get(self.by_address.get(&address)?)?;
        self.places(asker)
            .any(|place| place.network == entry.network)
            .then_some(entry.primary.as_str())
    }

    /// Whether `asker` may have names of the outside: it is known and not on internal networks only.
    pub(crate) fn may_ask_outside(&self, asker: IpAddr) -> bool {
        self.places(asker).any(|place| !place.internal)
    }

    /// Whether `asker` is one of ours.
    pub(crate) fn knows(&self, asker: IpAddr) -> bool {
        self.by_address.contains_key(&asker)
    }

    /// The resolvers that `asker` wants instead of the host's.
    pub(crate) fn servers(&self, asker: IpAddr) -> &[IpAddr] {
        let own = self
            .by_address
            .get(&asker)
            .and_then(|id| self.entries.get(id));
        own.map_or(&[], |entry| &entry.servers)
    }

    /// Two containers on one internal network and one on another, for tests and fuzzing.
    pub(crate) fn example() -> Directory {
        let mut directory = Directory::default();
        let networks = [Id::random(), Id::random()];
        let all = [
            ("a", "web", "10.0.0.2/24", 0),
            ("b", "db", "10.0.0.3/24", 0),
            ("c", "far", "10.0.1.1/24", 1),
        ];
        for (letter, name, address, network) in all {
            directory.add(&Endpoint {
                id: Id::random(),
                network: networks[network].clone(),
                network_name: ["inner", "outer"][network].into(),
                container: letter.repeat(64),
                names: vec![name.into()],
                aliases: if name == "web" {
                    vec!["www".into()]
                } else {
                    vec![]
                },
                interface: "eth0".into(),
                host_interface: String::new(),
                mac: None,
                v4: address.parse().ok(),
                v6: None,
                gateway_v4: None,
                gateway_v6: None,
                gateway_priority: 0,
                internal: true,
                dns: Vec::new(),
                ports: Vec::new(),
            });
        }
        directory
    }
}
