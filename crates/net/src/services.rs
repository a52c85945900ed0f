//! What runs beside the kernel: names, leases, proxies, on one thread.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread;

use base::Id;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use crate::address::Mac;
use crate::dhcp;
use crate::dhcp6;
use crate::directory::Directory;
use crate::dns;
use crate::endpoint::{Endpoint, Protocol};
use crate::error::{Context, Result};
use crate::firewall::{Forward, dns_forwards};
use crate::network::Network;
use crate::proxy::{self, Proxy};

pub(crate) struct Services {
    runtime: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
    directory: Arc<RwLock<Directory>>,
    dhcp: Mutex<HashMap<Id, dhcp::Server>>,
    dhcp6: Mutex<HashMap<Id, dhcp6::Server>>,
    /// Which lease is an endpoint's.
    leased: Mutex<HashMap<Id, (Id, Mac)>>,
    names: Mutex<HashMap<Id, Vec<dns::Server>>>,
}

impl Services {
    /// Starts the thread. Its sockets are those of the caller's network namespace.
    pub(crate) fn start() -> Result<Services> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .context(|| "starting the name service".into())?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = thread::Builder::new()
            .name("berth-net".into())
            .spawn(move || {
                let _ = runtime.block_on(stopped);
                runtime.shutdown_background();
            })
            .context(|| "starting the name service".into())?;
        Ok(Services {
            runtime: handle,
            stop: Some(stop),
            thread: Some(thread),
            directory: Arc::default(),
            names: Mutex::default(),
            dhcp: Mutex::default(),
            dhcp6: Mutex::default(),
            leased: Mutex::default(),
        })
    }

    pub(crate) fn proxy(
        &self,
        socket: OwnedFd,
        protocol: Protocol,
        target: SocketAddr,
    ) -> io::Result<Proxy> {
        proxy::start(&self.runtime, socket, protocol, target)
    }

    /// Starts the name service on the network's gateways. Gives what must be forwarded to reach it on port 53.
    pub(crate) fn add_network(&self, network: &Network) -> Vec<Forward> {
        let mut servers = Vec::new();
        let mut forwards = Vec::new();
        for gateway in network.ipam.config.iter().filter_map(|c| c.gateway) {
            match dns::Server::start(&self.runtime, Arc::clone(&self.directory), gateway) {
                Ok(server) => {
                    if server.port != 53 {
                        forwards.extend(dns_forwards(gateway, server.port));
                    }
                    servers.push(server);
                }
                // Containers without names are better than none.
                Err(error) => {
                    tracing::error!(network = network.name, %gateway, %error, "no name service")
                }
            }
        }
        self.names
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(network.id.clone(), servers);
        forwards
    }

    pub(crate) fn remove_network(&self, network: &Id) {
        self.names
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(network);
        self.dhcp
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(network);
        self.dhcp6
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(network);
    }

    /// Answers a machine's DHCP requests from now on, in both families.
    pub(crate) fn add_lease(&self, network: &Network, endpoint: &Endpoint) -> io::Result<()> {
        if let Some(mac) = endpoint.mac {
            let mut leased = self.leased.lock().unwrap_or_else(PoisonError::into_inner);
            leased.insert(endpoint.id.clone(), (network.id.clone(), mac));
        }
        self.add_lease_v6(network, endpoint)?;
        let (Some(mac), Some(address), Some(own)) =
            (endpoint.mac, endpoint.v4, network.gateway_v4())
        else {
            return Ok(());
        };
        let mut servers = self.dhcp.lock().unwrap_or_else(PoisonError::into_inner);
        if !servers.contains_key(&network.id) {
            let server = dhcp::Server::start(&self.runtime, &network.bridge, own)?;
            servers.insert(network.id.clone(), server);
        }
        let lease = dhcp::Lease {
            address,
            router: endpoint.gateway_v4,
            hostname: endpoint.names.first().cloned().unwrap_or_default(),
            mtu: network.mtu().and_then(|mtu| mtu.try_into().ok()),
        };
        if let Some(server) = servers.get(&network.id) {
            server
                .leases
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(mac, lease);
        }
        Ok(())
    }

    fn add_lease_v6(&self, network: &Network, endpoint: &Endpoint) -> io::Result<()> {
        let (Some(mac), Some(address), Some(own)) =
            (endpoint.mac, endpoint.v6, network.gateway_v6())
        else {
            return Ok(());
        };
        let mut servers = self.dhcp6.lock().unwrap_or_else(PoisonError::into_inner);
        if !servers.contains_key(&network.id) {
            let server = dhcp6::Server::start(&self.runtime, &network.bridge, own)?;
            servers.insert(network.id.clone(), server);
        }
        let lease = dhcp6::Lease {
            address,
            router: endpoint.gateway_v6.is_some(),
            mtu: network.mtu(),
        };
        if let Some(server) = servers.get(&network.id) {
            server
                .leases
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(mac, lease);
        }
        Ok(())
    }

    pub(crate) fn add_endpoint(&self, endpoint: &Endpoint) {
        self.directory
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .add(endpoint);
    }

    pub(crate) fn remove_endpoint(&self, endpoint: &Id) {
        self.directory
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(endpoint);
        let leased = self
            .leased
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(endpoint);
        let Some((network, mac)) = leased else { return };
        let servers = self.dhcp.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = servers.get(&network) {
            let mut leases = server
                .leases
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            leases.remove(&mac);
        }
        let servers = self.dhcp6.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(server) = servers.get(&network) {
            let mut leases = server
                .leases
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            leases.remove(&mac);
        }
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
