//! The one inventory of this host's containers, images, networks and volumes.
//!
//! Imperative and local: it works with no cluster and no network. Its types are serde types in Docker's wire
//! names, one set, stored and spoken, so that the faces above have nothing to translate.

pub mod bridge;
pub mod config;
pub mod container;
pub mod error;
pub mod events;
pub mod exec;
pub mod filters;
pub mod image;
pub mod keeper;
pub mod network;
pub mod system;
pub mod volume;
pub(crate) mod wire;

use std::sync::Arc;

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
    volumes: Arc<Volumes>,
}

impl Engine {
    /// Opens the state folder, reconnects to (or starts) the keeper, finds the containers again,
    /// removes what a killed daemon left half-made, and starts what its restart policy wants running.
    ///
    /// # Errors
    /// Where the folders cannot be made or the keeper cannot be started.
    pub async fn open(config: EngineConfig) -> Result<Arc<Engine>> {
        std::fs::create_dir_all(&config.paths.state).map_err(Error::io(format!(
            "cannot make {}",
            config.paths.state.display()
        )))?;
        let volumes = Volumes::open(&config.paths.state.join("volumes"))?;
        let images =
            ::image::Store::open(&config.paths.state.join("images")).map_err(Error::room)?;
        let networks =
            net::Manager::open(net::NetConfig::new(&config.paths.state)).map_err(Error::room)?;
        networks.restore(&[]).map_err(Error::room)?;
        Ok(Arc::new(Engine {
            images,
            networks: Arc::new(networks),
            config,
            volumes: Arc::new(volumes),
            events: Events::default(),
        }))
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
