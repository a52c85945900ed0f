//! What runs beside the kernel: names, leases, proxies, on one thread.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;

use base::Id;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use crate::directory::Directory;
use crate::endpoint::{Endpoint, Protocol};
use crate::error::{Context, Result};
use crate::firewall::Firewall;
use crate::network::Network;
use crate::proxy::{self, Proxy};

pub(crate) struct Services {
    runtime: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
    directory: Arc<RwLock<Directory>>,
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

    pub(crate) fn add_network(&self, _network: &Network, _firewall: &Firewall) {}

    pub(crate) fn remove_network(&self, _network: &Id) {}

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
