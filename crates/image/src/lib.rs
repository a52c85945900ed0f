//! Images: content, layers, snapshots, archives, registries, bootstrap from a distribution's archive, and builds.
//!
//! An image is an OCI image, whatever it runs as. [`Store`] keeps images; everything else brings them in, sends them
//! out, or makes folders of them for a container's overlay.

pub mod archive;
pub mod assemble;
pub mod bootstrap;
pub mod build;
pub mod config;
pub mod copy;
pub mod digest;
pub mod error;
pub mod fetch;
pub mod layer;
pub mod manifest;
pub mod progress;
pub mod reference;
pub mod registry;
pub mod snapshot;
pub mod store;

pub use archive::Loaded;
pub use assemble::{CommitOptions, ImportOptions};
pub use bootstrap::{BootstrapOptions, bootstrap};
pub use build::{BuildOptions, Context, Output, RunStep, StepRunner, build};
pub use config::{Healthcheck, History, ImageConfig, RunConfig};
pub use digest::Digest;
pub use error::{Error, Result};
pub use manifest::Platform;
pub use progress::{Cancel, Event, Listener, Progress, Silent};
pub use reference::Reference;
pub use registry::{Credentials, PullOptions, Pulled, PushOptions, Pushed, pull, push};
pub use snapshot::{Change, ChangeKind, Layers, Usage, export, mount_detached};
pub use store::{Filter, HistoryLine, Image, InUse, Pruned, RemoveOptions, Removed, Store};

/// An image's id: the digest of its configuration.
pub type ImageId = Digest;

/// What the keys of builds' snapshots begin with; one that was left by a build that is no more can go.
pub const BUILD_SNAPSHOT: &str = "build-";
