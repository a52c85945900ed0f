//! The one way into the room.

mod connect;
mod guard;
mod machine;
mod networks;
mod publish;
mod restore;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use base::Id;

use crate::address::Subnet;
use crate::endpoint::Endpoint;
use crate::error::{Context, Error, Result};
use crate::firewall::{Firewall, Forward, NetworkRules};
use crate::gateway::Gateway;
use crate::ipam::{Addresses, SubnetPool, default_pools};
use crate::namespace::{self, Pool, Sandbox};
use crate::neighbour::{self, Finding};
use crate::netlink::Netlink;
use crate::network::{Driver, Network, OPTION_MASQUERADE};
use crate::services::Services;
use crate::sysctl::Settings;

/// How a daemon's networks are set up.
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// One to five lower-case letters and digits, unique to this daemon on this host: it is in the names of interfaces
    /// and of the nftables table. [`NetConfig::new`] derives it from the state folder.
    pub tag: String,
    /// Where the records are.
    pub state_dir: PathBuf,
    /// The name of the default network's interface.
    pub bridge: String,
    /// The default network's subnet with the host's own address in it; chosen from the pools where absent.
    pub bridge_subnet: Option<Subnet>,
    /// Where subnets are chosen from.
    pub pools: Vec<SubnetPool>,
    /// The address ports are published on where none is given; absent: all addresses of both families.
    pub publish_on: Option<IpAddr>,
    /// Name servers asked for containers that name none; the host's own where empty.
    pub dns: Vec<IpAddr>,
    /// How many namespaces are kept ready.
    pub sandboxes: usize,
    /// An ordinary user's networks are in the namespace of this; absent: in the caller's.
    pub gateway: Option<Arc<Gateway>>,
}

impl NetConfig {
    /// The defaults for the daemon whose state is in `state_dir`.
    pub fn new(state_dir: &Path) -> NetConfig {
        let tag = tag_of(state_dir);
        NetConfig {
            bridge: format!("berth-{tag}"),
            tag,
            state_dir: state_dir.to_owned(),
            bridge_subnet: None,
            pools: default_pools(),
            publish_on: None,
            dns: Vec::new(),
            sandboxes: 6,
            gateway: None,
        }
    }
}

/// Five characters that follow from the path (FNV-1a, 64 bits).
fn tag_of(path: &Path) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in path.as_os_str().as_encoded_bytes() {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    (0..5)
        .map(|_| {
            let digit = (hash % 36) as u32;
            hash /= 36;
            char::from_digit(digit, 36).expect("below 36")
        })
        .collect()
}

/// The networks of one daemon.
///
/// Lock order: `setup`, then `state`, then `netlink`. `state` is never held over a call to nft or into a namespace.
pub struct Manager {
    config: NetConfig,
    directory: PathBuf,
    firewall: Firewall,
    pool: Pool,
    /// Held while bridges and the table come and go.
    setup: Mutex<Setup>,
    state: Mutex<State>,
    netlink: Mutex<Netlink>,
    /// The host's tables, where the networks are in another namespace.
    host: Option<Mutex<Netlink>>,
    services: Services,
    reaper: Option<mpsc::Sender<Reap>>,
    reaper_thread: Option<thread::JoinHandle<()>>,
    /// Interfaces with our tag that a former daemon left.
    leftovers: Mutex<Vec<String>>,
    /// Ends the thread that watches our table.
    guard: Mutex<Option<Arc<OwnedFd>>>,
}

struct Setup {
    settings: Settings,
    table: bool,
}

#[derive(Default)]
struct State {
    networks: BTreeMap<Id, Net>,
    endpoints: HashMap<Id, Held>,
}

struct Net {
    record: Network,
    pools: Vec<Addresses>,
    /// The bridge's index, once it is up in this life of the daemon.
    bridge: Option<u32>,
    /// To the name service, where it could not have port 53.
    redirects: Vec<Forward>,
}

struct Held {
    endpoint: Endpoint,
    forwards: Vec<Forward>,
    reservations: Vec<publish::Reservation>,
}

enum Reap {
    Link(String),
    Barrier(mpsc::Sender<()>),
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Manager {
    /// Opens the records and begins to make namespaces ahead. Bridges and rules are made when first needed, or by
    /// [`Manager::restore`], which a daemon calls once next.
    ///
    /// # Errors
    /// Where the records cannot be read or the kernel's tables cannot be opened.
    pub fn open(config: NetConfig) -> Result<Manager> {
        let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        if !(1..=5).contains(&config.tag.len()) || !config.tag.bytes().all(good) {
            return Err(Error::invalid(format!(
                "invalid tag {:?}: one to five lower-case letters and digits",
                config.tag
            )));
        }
        crate::network::check_interface_name(&config.bridge)?;
        // Asks the host's resolvers, so its thread is not in the networks' namespace.
        let services = Services::start()?;
        let Some(gateway) = config.gateway.clone() else {
            return Manager::open_here(config, services, None);
        };
        let host = Netlink::open().context(|| "opening rtnetlink".into())?;
        gateway.inside(|| Manager::open_here(config, services, Some(host)))
    }

    fn open_here(config: NetConfig, services: Services, host: Option<Netlink>) -> Result<Manager> {
        let directory = config.state_dir.join("networks");
        fs::create_dir_all(&directory).context(|| format!("making {}", directory.display()))?;
        base::file::sweep_temporaries(&directory)
            .context(|| "sweeping half-written records".into())?;
        let mut netlink = Netlink::open().context(|| "opening rtnetlink".into())?;
        let links = netlink.links().context(|| "listing interfaces".into())?;
        let ours = [
            format!("bv{}", config.tag),
            format!("bt{}", config.tag),
            format!("br-{}", config.tag),
        ];
        let leftovers = links.into_iter().map(|link| link.name);
        let leftovers = leftovers
            .filter(|name| ours.iter().any(|p| name.starts_with(p.as_str())))
            .collect();
        let settings = Settings::open(&config.state_dir)?;
        let (reaper, work) = mpsc::channel();
        let own = Netlink::open().context(|| "opening rtnetlink".into())?;
        let reaper_thread = thread::Builder::new()
            .name("berth-net-reap".into())
            .stack_size(128 * 1024)
            .spawn(move || reap(own, &work))
            .context(|| "starting a thread".into())?;
        let pool = Pool::open(format!("bv{}", config.tag), config.sandboxes)?;
        let manager = Manager {
            firewall: Firewall::new(&config.tag),
            directory,
            pool,
            setup: Mutex::new(Setup {
                settings,
                table: false,
            }),
            state: Mutex::default(),
            netlink: Mutex::new(netlink),
            host: host.map(Mutex::new),
            services,
            reaper: Some(reaper),
            reaper_thread: Some(reaper_thread),
            leftovers: Mutex::new(leftovers),
            guard: Mutex::default(),
            config,
        };
        manager.load_networks()?;
        Ok(manager)
    }

    /// Runs `work` in the namespace where the networks are: their sockets, settings and rules are those of the thread.
    fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        match &self.config.gateway {
            Some(gateway) => gateway.inside(work),
            None => work(),
        }
    }

    /// A namespace for a new container, from those made ahead.
    ///
    /// # Errors
    /// Where the kernel makes none: missing rights, or too many.
    pub fn sandbox(&self) -> Result<Sandbox> {
        self.pool.take()
    }

    /// A namespace with nothing but the loopback interface, for the network `none`.
    ///
    /// # Errors
    /// As [`Manager::sandbox`].
    pub fn bare_sandbox(&self) -> Result<Sandbox> {
        namespace::alone().map_err(Error::Namespace)
    }

    /// Removes the interface that was made ahead, where it was not used.
    fn strip(&self, sandbox: &Sandbox) -> Result<()> {
        let Some(veth) = lock(&sandbox.veth).take() else {
            return Ok(());
        };
        let name = veth.host_name;
        lock(&self.netlink)
            .remove_link(&name)
            .context(|| format!("removing {name}"))
    }

    /// The gateway of an ordinary user's networks.
    pub fn gateway(&self) -> Option<&Arc<Gateway>> {
        self.config.gateway.as_ref()
    }

    /// Waits until as many namespaces are ready as configured.
    pub fn wait_ready(&self) {
        self.pool.wait_full();
    }

    /// Waits until the interfaces released so far are gone.
    pub fn settle(&self) {
        let (done, wait) = mpsc::channel();
        if let Some(reaper) = &self.reaper
            && reaper.send(Reap::Barrier(done)).is_ok()
        {
            let _ = wait.recv();
        }
    }

    fn reap_link(&self, name: String) {
        if let (false, Some(reaper)) = (name.is_empty(), &self.reaper) {
            let _ = reaper.send(Reap::Link(name));
        }
    }

    /// Removes from the host all this daemon made: bridges, interfaces, rules; puts settings back. Records stay, and
    /// containers lose their networks.
    ///
    /// # Errors
    /// The first failure; the rest is removed nevertheless.
    pub fn cleanup(&self) -> Result<()> {
        self.inside(|| self.cleanup_here())
    }

    fn cleanup_here(&self) -> Result<()> {
        self.pool.close();
        self.settle();
        let mut setup = lock(&self.setup);
        let mut first = Ok(());
        let mut keep = |result: Result<()>| {
            if first.is_ok() {
                first = result;
            }
        };
        let (bridges, ends) = {
            let mut state = lock(&self.state);
            let ends: Vec<_> = state
                .endpoints
                .drain()
                .map(|(_, held)| held.endpoint.host_interface)
                .collect();
            let bridges: Vec<_> = state
                .networks
                .values_mut()
                .filter_map(|net| {
                    net.bridge
                        .take()
                        .and(net.record.owns_bridge.then(|| net.record.bridge.clone()))
                })
                .collect();
            (bridges, ends)
        };
        for bridge in &bridges {
            let _ = neighbour::pass_docker(&self.config.tag, bridge, false);
        }
        {
            let mut netlink = lock(&self.netlink);
            for name in ends.iter().chain(&bridges).filter(|name| !name.is_empty()) {
                keep(
                    netlink
                        .remove_link(name)
                        .context(|| format!("removing {name}")),
                );
            }
        }
        if setup.table || self.table_marker().exists() {
            keep(self.firewall.remove());
            let _ = fs::remove_file(self.table_marker());
            setup.table = false;
        }
        setup.settings.restore();
        first
    }

    /// What on this host keeps the networks from working, each with the command that helps.
    pub fn findings(&self) -> Vec<Finding> {
        let bridges: Vec<_> = self
            .list()
            .into_iter()
            .map(|n| n.bridge)
            .filter(|b| !b.is_empty())
            .collect();
        let found = self.inside(|| Ok(neighbour::findings(&bridges)));
        found.unwrap_or_default()
    }

    fn table_marker(&self) -> PathBuf {
        self.config.state_dir.join("nftables.made")
    }

    /// The rules of all networks that are up, and where the published ports lead.
    fn install_table(&self, setup: &mut Setup) -> Result<()> {
        let (networks, forwards) = {
            let state = lock(&self.state);
            let up = state.networks.values().filter(|net| net.bridge.is_some());
            let networks: Vec<_> = up.map(|net| rules_of(&net.record)).collect();
            let published = state
                .endpoints
                .values()
                .flat_map(|h| h.forwards.iter().copied());
            let redirects = state
                .networks
                .values()
                .flat_map(|net| net.redirects.iter().copied());
            let forwards: Vec<_> = published.chain(redirects).collect();
            (networks, forwards)
        };
        // Before the table, so that a crash in between is remembered.
        fs::write(self.table_marker(), b"").context(|| "writing the table's marker".into())?;
        self.firewall.install(&networks, &forwards)?;
        setup.table = true;
        Ok(())
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if let Some(stop) = lock(&self.guard).take() {
            let _ = rustix::io::write(&*stop, &1u64.to_ne_bytes());
        }
        self.reaper = None;
        if let Some(reaper) = self.reaper_thread.take() {
            let _ = reaper.join();
        }
    }
}

fn rules_of(network: &Network) -> NetworkRules {
    NetworkRules {
        bridge: network.bridge.clone(),
        subnets: network
            .ipam
            .config
            .iter()
            .filter_map(|c| c.subnet)
            .collect(),
        internal: network.internal,
        masquerade: network.flag(OPTION_MASQUERADE, true),
    }
}

impl Net {
    fn new(record: Network) -> Net {
        let mut pools = Vec::new();
        for config in &record.ipam.config {
            let Some(subnet) = config.subnet else {
                continue;
            };
            let mut addresses = Addresses::new(subnet.network(), config.ip_range);
            for taken in config.gateway.iter().chain(config.auxiliary.values()) {
                if let Err(error) = addresses.claim(*taken) {
                    tracing::warn!(network = record.name, address = %taken, %error, "unusable reserved address");
                }
            }
            pools.push(addresses);
        }
        Net {
            record,
            pools,
            bridge: None,
            redirects: Vec::new(),
        }
    }

    fn is_bridge(&self) -> bool {
        self.record.driver == Driver::Bridge
    }
}

/// Removes interfaces in the background: the kernel waits for all CPUs at each.
fn reap(mut netlink: Netlink, work: &mpsc::Receiver<Reap>) {
    while let Ok(item) = work.recv() {
        match item {
            Reap::Link(name) => {
                if let Err(error) = netlink.remove_link(&name) {
                    tracing::warn!(name, %error, "an interface could not be removed");
                }
            }
            Reap::Barrier(done) => drop(done),
        }
    }
}
