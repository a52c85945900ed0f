//! What an engine is opened with.

use std::path::PathBuf;
use std::time::Duration;

use base::paths::Paths;

use crate::container::LogConfig;

/// The settings of one engine. Two engines with different state folders share nothing.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    pub paths: Paths,
    /// Logs of containers that ask for nothing.
    pub log: LogConfig,
    /// Whether containers get a tiny init as pid 1 unless they say otherwise.
    pub init: bool,
    /// How long `stop` waits unless the container or the caller says otherwise.
    pub stop_timeout: Duration,
    /// How long machines have to power off when the host goes down.
    pub machine_stop_timeout: Duration,
    /// `/dev/shm` unless the container says otherwise, bytes.
    pub shm_size: u64,
    /// Registries that may be spoken to without TLS (this machine's own always may), and further authorities.
    pub registries: image::registry::Trust,
    /// How networks are set up.
    pub networks: net::NetConfig,
    /// The parent of the containers' cgroups; must differ between daemons of one host.
    pub cgroup_parent: String,
    /// The daemon of an ordinary user, root of a user namespace only: its networks are in a namespace of their own.
    pub rootless: bool,
    /// Whether containers can have cgroups, and so limits: an ordinary user's need one that is handed to that user.
    pub cgroups: bool,
    /// The program and first arguments that run [`crate::keeper::main`]; the options follow.
    pub keeper_command: Vec<PathBuf>,
    /// The program and first arguments that run [`net::gateway::main`], which an ordinary user's networks need.
    pub gateway_command: Vec<PathBuf>,
}

impl EngineConfig {
    /// The defaults for these folders.
    pub fn new(paths: Paths) -> EngineConfig {
        EngineConfig {
            cgroup_parent: default_cgroup_parent(&paths),
            networks: net::NetConfig::new(&paths.state),
            paths,
            log: LogConfig {
                kind: "json-file".into(),
                config: Default::default(),
            },
            init: false,
            stop_timeout: Duration::from_secs(10),
            machine_stop_timeout: Duration::from_secs(90),
            shm_size: 64 << 20,
            registries: Default::default(),
            rootless: false,
            cgroups: true,
            keeper_command: vec!["/proc/self/exe".into(), "keeper".into()],
            gateway_command: vec!["/proc/self/exe".into(), "gateway".into()],
        }
    }
}

/// `berth` for the system's daemon, `berth-HASH` for one with another state folder.
fn default_cgroup_parent(paths: &Paths) -> String {
    if paths.state == std::path::Path::new("/var/lib/berth") {
        return "berth".into();
    }
    // FNV-1a: stable between runs, which the standard hasher does not promise.
    let bytes = paths.state.as_os_str().as_encoded_bytes();
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("berth-{:08x}", (hash ^ (hash >> 32)) as u32)
}
