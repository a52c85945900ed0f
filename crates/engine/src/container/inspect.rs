//! What is shown of a container: `inspect`, `ps`, and the answers of the smaller calls.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::container::config::ContainerConfig;
use crate::container::host_config::HostConfig;
use crate::container::networking::{EndpointSettings, NetworkSettings};
use crate::wire::wire;

wire! {
    /// The answer of `GET /containers/X/json`.
    pub struct ContainerInspect {
        pub id: String,
        pub created: String,
        pub path: String,
        pub args: Vec<String>,
        pub state: ContainerState,
        pub image: String,
        pub resolv_conf_path: String,
        pub hostname_path: String,
        pub hosts_path: String,
        pub log_path: String,
        /// With its leading slash.
        pub name: String,
        pub restart_count: u32,
        pub driver: String,
        pub platform: String,
        pub mount_label: String,
        pub process_label: String,
        pub app_armor_profile: String,
        #[serde(rename = "ExecIDs")]
        pub exec_ids: Option<Vec<String>>,
        pub host_config: HostConfig,
        pub graph_driver: GraphDriver,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub size_rw: Option<i64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub size_root_fs: Option<i64>,
        pub mounts: Vec<MountPoint>,
        pub config: ContainerConfig,
        pub network_settings: NetworkSettings,
    }

    /// Where the layers of a container are.
    pub struct GraphDriver {
        pub name: String,
        pub data: BTreeMap<String, String>,
    }

    /// A container's state as clients see it.
    pub struct ContainerState {
        /// `created`, `running`, `paused`, `restarting`, `removing`, `exited`, `dead`.
        pub status: String,
        pub running: bool,
        pub paused: bool,
        pub restarting: bool,
        #[serde(rename = "OOMKilled")]
        pub oom_killed: bool,
        pub dead: bool,
        pub pid: i32,
        pub exit_code: i32,
        pub error: String,
        pub started_at: String,
        pub finished_at: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub health: Option<Health>,
    }

    /// The state of a health check.
    pub struct Health {
        /// `starting`, `healthy`, `unhealthy`.
        pub status: String,
        pub failing_streak: i64,
        /// The last five.
        pub log: Vec<HealthResult>,
    }

    /// One run of a health check.
    pub struct HealthResult {
        pub start: String,
        pub end: String,
        pub exit_code: i32,
        /// At most 4096 bytes.
        pub output: String,
    }

    /// A mount as it stands.
    pub struct MountPoint {
        #[serde(rename = "Type")]
        pub kind: String,
        #[serde(skip_serializing_if = "String::is_empty")]
        pub name: String,
        pub source: String,
        pub destination: String,
        #[serde(skip_serializing_if = "String::is_empty")]
        pub driver: String,
        pub mode: String,
        #[serde(rename = "RW")]
        pub rw: bool,
        pub propagation: String,
    }

    /// One row of `GET /containers/json`.
    pub struct ContainerSummary {
        pub id: String,
        pub names: Vec<String>,
        pub image: String,
        #[serde(rename = "ImageID")]
        pub image_id: String,
        pub command: String,
        /// Seconds since 1970.
        pub created: i64,
        pub ports: Vec<Port>,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub size_rw: Option<i64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub size_root_fs: Option<i64>,
        pub labels: BTreeMap<String, String>,
        pub state: String,
        /// `Up 5 minutes (healthy)`
        pub status: String,
        pub host_config: SummaryHostConfig,
        pub network_settings: SummaryNetworkSettings,
        pub mounts: Vec<MountPoint>,
    }

    /// The host part of a row.
    pub struct SummaryHostConfig {
        pub network_mode: String,
        #[serde(skip_serializing_if = "BTreeMap::is_empty")]
        pub annotations: BTreeMap<String, String>,
    }

    /// The network part of a row.
    pub struct SummaryNetworkSettings {
        pub networks: BTreeMap<String, EndpointSettings>,
    }

    /// A port in a row.
    pub struct Port {
        #[serde(rename = "IP", skip_serializing_if = "String::is_empty")]
        pub ip: String,
        pub private_port: u16,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub public_port: Option<u16>,
        #[serde(rename = "Type")]
        pub protocol: String,
    }

    /// The answer of `POST /containers/create`.
    pub struct Created {
        pub id: String,
        pub warnings: Vec<String>,
    }

    /// The answer of `POST /containers/X/update`.
    pub struct Updated {
        pub warnings: Vec<String>,
    }

    /// The answer of `POST /containers/X/wait`.
    pub struct WaitResult {
        pub status_code: i64,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub error: Option<WaitError>,
    }

    /// Why a wait ended without an exit.
    pub struct WaitError {
        pub message: String,
    }

    /// The answer of `GET /containers/X/top`.
    pub struct Top {
        pub titles: Vec<String>,
        pub processes: Vec<Vec<String>>,
    }

    /// The answer of `POST /containers/prune`.
    pub struct PruneReport {
        pub containers_deleted: Vec<String>,
        pub space_reclaimed: u64,
    }
}

/// One row of `GET /containers/X/changes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Change {
    pub path: String,
    /// 0 modified, 1 added, 2 deleted.
    pub kind: u8,
}

/// The content of the header `X-Docker-Container-Path-Stat`, before base64.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PathStat {
    pub name: String,
    pub size: i64,
    /// Go's `fs.FileMode` bits.
    pub mode: u32,
    pub mtime: String,
    #[serde(rename = "linkTarget")]
    pub link_target: String,
}
