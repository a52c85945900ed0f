//! The one inventory of this host's containers, images, networks and volumes.
//!
//! Imperative and local: it works with no cluster and no network. Its types are serde types in Docker's wire
//! names, one set, stored and spoken, so that the faces above have nothing to translate.

pub mod bridge;
pub mod build;
pub mod config;
pub mod container;
pub mod context;
pub mod error;
pub mod events;
pub mod exec;
pub mod filters;
pub mod image;
pub mod keeper;
pub mod machine;
pub mod network;
pub mod system;
pub mod volume;
pub(crate) mod wire;

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex};

pub use ::image::progress;
pub use config::EngineConfig;
pub use error::{Error, Result};
pub use events::{Event, Events};
pub use filters::Filters;
pub use volume::Volumes;
pub use wire::{KeySet, Words};

/// The engine of one daemon. All methods may be called from any task at any time.
pub struct Engine {
    config: EngineConfig,
    events: Events,
    images: ::image::Store,
    networks: Arc<net::Manager>,
    /// Why this daemon has no bridges.
    no_bridges: Option<net::Error>,
    volumes: Arc<Volumes>,
    inventory: container::inventory::Inventory,
    execs: Mutex<HashMap<String, Arc<exec::Exec>>>,
    keeper: tokio::sync::Mutex<Option<Arc<keeper::client::Keeper>>>,
    /// Whether ends of containers and machines are the host's.
    host_stops: std::sync::atomic::AtomicBool,
    /// Held as long as this lives: one daemon per state folder.
    _lock: File,
}

/// Makes the folders and takes their lock, which the kernel lets go of however this process ends.
fn take_folders(paths: &base::paths::Paths) -> Result<File> {
    use std::os::unix::fs::DirBuilderExt;
    for path in [
        &paths.state.join("containers"),
        &paths.run.join("containers"),
    ] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(path)
            .map_err(Error::io(format!("cannot make {}", path.display())))?;
    }
    let path = paths.state.join("lock");
    let file = File::create(&path).map_err(Error::io(format!("cannot make {}", path.display())))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(Error::Room {
            message: format!("another daemon uses {}", paths.state.display()),
            kind: base::Kind::Conflict,
            fix: Some(
                "end it with `berth system stop`, or choose another folder with --state-dir".into(),
            ),
        }),
        Err(std::fs::TryLockError::Error(error)) => {
            Err(Error::io(format!("cannot lock {}", path.display()))(error))
        }
    }
}

impl Engine {
    /// Opens the state folder, reconnects to (or starts) the keeper, finds the containers again,
    /// removes what a killed daemon left half-made, and starts what its restart policy wants running.
    ///
    /// # Errors
    /// Where the folders cannot be made, another daemon has them, or the keeper cannot be started.
    pub async fn open(config: EngineConfig) -> Result<Arc<Engine>> {
        let paths = config.paths.clone();
        let mut network_config = config.networks.clone();
        let gateway_command = config.gateway_command.clone();
        let rootless = config.rootless;
        let (lock, volumes, images, networks, no_bridges) =
            container::create::blocking(move || {
                let lock = take_folders(&paths)?;
                let mut no_bridges = None;
                if rootless {
                    match net::gateway::Gateway::open(&paths.run, &gateway_command) {
                        Ok(gateway) => network_config.gateway = Some(gateway),
                        Err(error) => {
                            tracing::warn!("{error}: containers have the networks host and none");
                            // Nothing can be made ahead in the host's namespace, which is not ours.
                            network_config.sandboxes = 0;
                            no_bridges = Some(error);
                        }
                    }
                }
                let volumes = Volumes::open(&paths.state.join("volumes"))?;
                let images =
                    ::image::Store::open(&paths.state.join("images")).map_err(Error::room)?;
                let networks = net::Manager::open(network_config).map_err(Error::room)?;
                Ok((lock, volumes, images, networks, no_bridges))
            })
            .await?;
        let engine = Arc::new(Engine {
            images,
            networks: Arc::new(networks),
            no_bridges,
            config,
            volumes: Arc::new(volumes),
            events: Events::default(),
            inventory: Default::default(),
            execs: Default::default(),
            keeper: Default::default(),
            host_stops: Default::default(),
            _lock: lock,
        });
        engine.sweep_secrets();
        engine.reopen().await?;
        // Rules that another program flushes come back. Without that networks work, until it happens.
        if engine.no_bridges.is_none()
            && let Err(error) = engine.networks.guard_rules()
        {
            tracing::warn!(%error, "firewall rules that others remove will not be put back");
        }
        Ok(engine)
    }

    /// At the end of a daemon: where nothing runs any more, its networks leave the host. True if they did.
    ///
    /// # Errors
    /// What could not be removed.
    pub async fn leave_host(self: &Arc<Self>) -> Result<bool> {
        let running = self.list(container::ListOptions::default()).await?;
        if !running.is_empty() || machine::any_alive(&self.config.paths.state) {
            return Ok(false);
        }
        let networks = self.networks.clone();
        container::create::blocking(move || networks.cleanup().map_err(Error::room)).await?;
        // The empty parents of the containers' cgroups; rmdir refuses what is still in use.
        let root = std::path::Path::new("/sys/fs/cgroup");
        let parent = self.config.cgroup_parent.trim_matches('/');
        if !parent.is_empty() && !parent.contains("..") {
            let hierarchies = std::fs::read_dir(root).into_iter().flatten().flatten();
            for folder in hierarchies
                .map(|entry| entry.path())
                .chain([root.to_owned()])
            {
                let _ = std::fs::remove_dir(folder.join(parent));
            }
        }
        Ok(true)
    }

    /// What it was opened with.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// The images of this host.
    pub fn images(&self) -> &::image::Store {
        &self.images
    }

    /// The networks of this host.
    pub fn networks(&self) -> &Arc<net::Manager> {
        &self.networks
    }

    /// The volumes of this host.
    pub fn volumes(&self) -> &Arc<Volumes> {
        &self.volumes
    }

    /// The event stream; faces publish what they do to images, networks and volumes here.
    pub fn events(&self) -> &Events {
        &self.events
    }
}
