//! The host and the daemon as a whole: version, info, disk usage.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::Engine;
use crate::container::{ContainerSummary, ListOptions};
use crate::error::{Error, Result};
use crate::filters::Filters;
use crate::image::ImageSummary;
use crate::volume::{Volume, blocking};
use crate::wire::wire;

/// The newest version of the Docker Engine API that is spoken.
pub const API_VERSION: &str = "1.50";
/// The oldest.
pub const MIN_API_VERSION: &str = "1.24";

wire! {
    /// The answer of `GET /version`.
    pub struct Version {
        pub platform: VersionPlatform,
        pub components: Vec<VersionComponent>,
        pub version: String,
        pub api_version: String,
        #[serde(rename = "MinAPIVersion")]
        pub min_api_version: String,
        pub git_commit: String,
        pub go_version: String,
        pub os: String,
        pub arch: String,
        pub kernel_version: String,
        pub build_time: String,
    }

    /// Whose daemon it is.
    pub struct VersionPlatform {
        pub name: String,
    }

    /// One part of the daemon.
    pub struct VersionComponent {
        pub name: String,
        pub version: String,
        pub details: BTreeMap<String, String>,
    }

    /// The answer of `GET /info`.
    pub struct Info {
        #[serde(rename = "ID")]
        pub id: String,
        pub containers: u64,
        pub containers_running: u64,
        pub containers_paused: u64,
        pub containers_stopped: u64,
        pub images: u64,
        pub driver: String,
        pub driver_status: Vec<[String; 2]>,
        pub plugins: Value,
        pub memory_limit: bool,
        pub swap_limit: bool,
        pub cpu_cfs_period: bool,
        pub cpu_cfs_quota: bool,
        #[serde(rename = "CPUShares")]
        pub cpu_shares: bool,
        #[serde(rename = "CPUSet")]
        pub cpu_set: bool,
        pub pids_limit: bool,
        #[serde(rename = "IPv4Forwarding")]
        pub ipv4_forwarding: bool,
        pub debug: bool,
        pub n_fd: u64,
        pub oom_kill_disable: bool,
        pub n_goroutines: u64,
        pub system_time: String,
        pub logging_driver: String,
        pub cgroup_driver: String,
        pub cgroup_version: String,
        pub n_events_listener: u64,
        pub kernel_version: String,
        pub operating_system: String,
        #[serde(rename = "OSVersion")]
        pub os_version: String,
        #[serde(rename = "OSType")]
        pub os_type: String,
        pub architecture: String,
        pub index_server_address: String,
        pub registry_config: Value,
        #[serde(rename = "NCPU")]
        pub ncpu: u64,
        /// Bytes.
        pub mem_total: u64,
        pub generic_resources: Option<Vec<Value>>,
        pub docker_root_dir: String,
        pub http_proxy: String,
        pub https_proxy: String,
        pub no_proxy: String,
        pub name: String,
        pub labels: Vec<String>,
        pub experimental_build: bool,
        pub server_version: String,
        pub runtimes: Value,
        pub default_runtime: String,
        pub swarm: Value,
        pub live_restore_enabled: bool,
        pub isolation: String,
        pub init_binary: String,
        pub containerd_commit: Value,
        pub runc_commit: Value,
        pub init_commit: Value,
        pub security_options: Vec<String>,
        #[serde(rename = "CDISpecDirs")]
        pub cdi_spec_dirs: Vec<String>,
        pub warnings: Vec<String>,
    }

    /// The answer of `GET /system/df`. What was not asked for is `null`.
    pub struct DiskUsage {
        /// Bytes of all layers, each once.
        pub layers_size: u64,
        pub images: Option<Vec<ImageSummary>>,
        pub containers: Option<Vec<ContainerSummary>>,
        pub volumes: Option<Vec<Volume>>,
        pub build_cache: Option<Vec<Value>>,
    }
}

/// What `df` looks at; nothing named is everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UsageKind {
    Containers,
    Images,
    Volumes,
    BuildCache,
}

impl std::str::FromStr for UsageKind {
    type Err = Error;
    fn from_str(text: &str) -> Result<UsageKind> {
        Ok(match text {
            "container" => UsageKind::Containers,
            "image" => UsageKind::Images,
            "volume" => UsageKind::Volumes,
            "build-cache" => UsageKind::BuildCache,
            _ => return Err(Error::Invalid(format!("unknown object type: {text}"))),
        })
    }
}

impl Engine {
    /// Which daemon this is and what it speaks.
    pub fn version(&self) -> Version {
        let version = env!("CARGO_PKG_VERSION");
        let kernel = base::host::kernel_release();
        let details = BTreeMap::from([
            ("ApiVersion".to_owned(), API_VERSION.to_owned()),
            ("MinAPIVersion".to_owned(), MIN_API_VERSION.to_owned()),
            ("Os".to_owned(), "linux".to_owned()),
            ("Arch".to_owned(), go_architecture().to_owned()),
            ("KernelVersion".to_owned(), kernel.clone()),
            ("Experimental".to_owned(), "false".to_owned()),
        ]);
        Version {
            platform: VersionPlatform {
                name: "Berth".into(),
            },
            components: vec![VersionComponent {
                // The name that clients look for.
                name: "Engine".into(),
                version: version.into(),
                details,
            }],
            version: version.into(),
            api_version: API_VERSION.into(),
            min_api_version: MIN_API_VERSION.into(),
            os: "linux".into(),
            arch: go_architecture().into(),
            kernel_version: kernel,
            ..Version::default()
        }
    }

    /// The daemon and its host.
    ///
    /// # Errors
    /// Where containers or images cannot be listed.
    pub async fn info(self: &Arc<Self>) -> Result<Info> {
        let containers = self
            .list(ListOptions {
                all: true,
                ..ListOptions::default()
            })
            .await?;
        let count = |states: &[&str]| {
            containers
                .iter()
                .filter(|c| states.contains(&c.state.as_str()))
                .count() as u64
        };
        let running = count(&["running", "restarting"]);
        let paused = count(&["paused"]);
        let images = self.image_count().await?;
        let engine = self.clone();
        let id = blocking(move || engine.daemon_id()).await?;
        let uname = rustix::system::uname();
        let text = |value: &std::ffi::CStr| value.to_string_lossy().into_owned();
        let os = os_release();
        let cgroup = Cgroups::of_this_host();
        let proxy = |name: &str| {
            let value = std::env::var(name).or_else(|_| std::env::var(name.to_lowercase()));
            without_password(&value.unwrap_or_default())
        };
        let mut warnings = Vec::new();
        for (there, what) in [
            (cgroup.memory, "No memory limit support"),
            (cgroup.cpu, "No cpu cfs quota support"),
            (cgroup.pids, "No pids limit support"),
        ] {
            if !there {
                warnings.push(format!("WARNING: {what}"));
            }
        }
        let forwarding = flag_of("/proc/sys/net/ipv4/ip_forward");
        if !forwarding {
            warnings.push("WARNING: IPv4 forwarding is disabled".into());
        }
        let mut security = vec!["name=seccomp,profile=builtin".to_owned()];
        if self.config.rootless {
            security.push("name=rootless".into());
        }
        security.push("name=cgroupns".into());
        Ok(Info {
            id,
            containers: containers.len() as u64,
            containers_running: running,
            containers_paused: paused,
            containers_stopped: containers.len() as u64 - running - paused,
            images,
            driver: "overlay2".into(),
            driver_status: vec![
                [
                    "Backing Filesystem".into(),
                    file_system_of(&self.config().paths.state),
                ],
                ["Supports d_type".into(), "true".into()],
                ["Native Overlay Diff".into(), "true".into()],
            ],
            plugins: json!({
                "Volume": ["local"],
                "Network": ["bridge", "host", "null"],
                "Authorization": null,
                "Log": ["json-file", "local", "none"],
            }),
            memory_limit: cgroup.memory,
            swap_limit: cgroup.swap,
            cpu_cfs_period: cgroup.cpu,
            cpu_cfs_quota: cgroup.cpu,
            cpu_shares: cgroup.cpu,
            cpu_set: cgroup.cpuset,
            pids_limit: cgroup.pids,
            ipv4_forwarding: forwarding,
            n_fd: fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64),
            oom_kill_disable: cgroup.version == 1 && cgroup.memory,
            // dockerd counts goroutines; the nearest thing here are threads.
            n_goroutines: fs::read_dir("/proc/self/task")
                .map_or(0, |entries| entries.count() as u64),
            system_time: base::time::now_rfc3339(),
            logging_driver: self.config().log.kind.clone(),
            cgroup_driver: "cgroupfs".into(),
            cgroup_version: cgroup.version.to_string(),
            kernel_version: text(uname.release()),
            operating_system: os
                .get("PRETTY_NAME")
                .cloned()
                .unwrap_or_else(|| "Linux".into()),
            os_version: os.get("VERSION_ID").cloned().unwrap_or_default(),
            os_type: "linux".into(),
            architecture: text(uname.machine()),
            index_server_address: "https://index.docker.io/v1/".into(),
            registry_config: json!({
                "AllowNondistributableArtifactsCIDRs": null,
                "AllowNondistributableArtifactsHostnames": null,
                "InsecureRegistryCIDRs": ["::1/128", "127.0.0.0/8"],
                "IndexConfigs": {
                    "docker.io": {"Mirrors": [], "Name": "docker.io", "Official": true, "Secure": true},
                },
                "Mirrors": null,
            }),
            ncpu: std::thread::available_parallelism().map_or(1, |n| n.get() as u64),
            mem_total: memory_total(),
            docker_root_dir: self.config().paths.state.display().to_string(),
            http_proxy: proxy("HTTP_PROXY"),
            https_proxy: proxy("HTTPS_PROXY"),
            no_proxy: proxy("NO_PROXY"),
            name: text(uname.nodename()),
            server_version: env!("CARGO_PKG_VERSION").into(),
            runtimes: json!({"berth": {"path": "berth oci"}}),
            default_runtime: "berth".into(),
            swarm: json!({
                "NodeID": "", "NodeAddr": "", "LocalNodeState": "inactive", "ControlAvailable": false,
                "Error": "", "RemoteManagers": null,
            }),
            live_restore_enabled: true,
            init_binary: "berth".into(),
            containerd_commit: json!({"ID": ""}),
            runc_commit: json!({"ID": ""}),
            init_commit: json!({"ID": ""}),
            security_options: security,
            warnings,
            ..Info::default()
        })
    }

    /// An id that stays with the state folder.
    fn daemon_id(&self) -> Result<String> {
        let path = self.config().paths.state.join("daemon-id");
        if let Ok(text) = fs::read_to_string(&path)
            && !text.trim().is_empty()
        {
            return Ok(text.trim().to_owned());
        }
        let random = base::Id::random();
        let hex = random.as_str();
        let id = format!(
            "{}-{}-4{}-a{}-{}",
            &hex[..8],
            &hex[8..12],
            &hex[13..16],
            &hex[17..20],
            &hex[20..32]
        );
        base::file::write_atomic(&path, id.as_bytes(), base::file::Durability::Host)
            .map_err(Error::io(format!("writing {}", path.display())))?;
        Ok(id)
    }

    /// What everything takes on disk.
    ///
    /// # Errors
    /// Where one of the kinds cannot be listed.
    pub async fn disk_usage(self: &Arc<Self>, kinds: &[UsageKind]) -> Result<DiskUsage> {
        let wanted = |kind| kinds.is_empty() || kinds.contains(&kind);
        let mut usage = DiskUsage::default();
        if wanted(UsageKind::Containers) {
            let options = ListOptions {
                all: true,
                size: true,
                ..ListOptions::default()
            };
            usage.containers = Some(self.list(options).await?);
        }
        if wanted(UsageKind::Images) {
            usage.images = Some(self.list_images(false, Filters::default(), true).await?);
            usage.layers_size = self.layers_size().await?;
        }
        if wanted(UsageKind::Volumes) {
            let volumes = self.volumes().clone();
            usage.volumes =
                Some(blocking(move || volumes.list_with_usage(&Filters::default())).await?);
        }
        if wanted(UsageKind::BuildCache) {
            usage.build_cache = Some(Vec::new());
        }
        Ok(usage)
    }
}

/// The architecture of this host in Go's words, as images name it.
pub fn go_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

/// A proxy's address is shown without its password, as dockerd does.
fn without_password(url: &str) -> String {
    match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if scheme + 3 <= at => {
            format!("{}xxxxx:xxxxx{}", &url[..scheme + 3], &url[at..])
        }
        _ => url.to_owned(),
    }
}

fn os_release() -> BTreeMap<String, String> {
    let text = fs::read_to_string("/etc/os-release")
        .or_else(|_| fs::read_to_string("/usr/lib/os-release"))
        .unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.trim_matches(['"', '\'']).to_owned()))
        .collect()
}

fn memory_total() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn flag_of(path: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text.trim() == "1")
}

fn file_system_of(path: &Path) -> String {
    // statfs(2): the numbers of linux/magic.h.
    match rustix::fs::statfs(path).map(|status| status.f_type as u64) {
        Ok(0xEF53) => "extfs".into(),
        Ok(0x5846_5342) => "xfs".into(),
        Ok(0x9123_683E) => "btrfs".into(),
        Ok(0x0102_1994) => "tmpfs".into(),
        Ok(0x794C_7630) => "overlayfs".into(),
        Ok(0x2FC1_2FC1) => "zfs".into(),
        Ok(0xF2F5_2010) => "f2fs".into(),
        Ok(other) => format!("<unknown {other:#x}>"),
        Err(error) => format!("<unknown: {error}>"),
    }
}

/// Which limits this host can set.
struct Cgroups {
    version: u8,
    memory: bool,
    swap: bool,
    cpu: bool,
    cpuset: bool,
    pids: bool,
}

impl Cgroups {
    fn of_this_host() -> Cgroups {
        let root = Path::new("/sys/fs/cgroup");
        if let Ok(controllers) = fs::read_to_string(root.join("cgroup.controllers")) {
            let has = |name: &str| controllers.split_ascii_whitespace().any(|c| c == name);
            return Cgroups {
                version: 2,
                memory: has("memory"),
                swap: has("memory"),
                cpu: has("cpu"),
                cpuset: has("cpuset"),
                pids: has("pids"),
            };
        }
        let has = |name: &str| root.join(name).is_dir();
        Cgroups {
            version: 1,
            memory: has("memory"),
            swap: root.join("memory/memory.memsw.limit_in_bytes").exists(),
            cpu: has("cpu") || has("cpu,cpuacct"),
            cpuset: has("cpuset"),
            pids: has("pids"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxys_password_is_not_shown() {
        assert_eq!(without_password("http://u:p@h:1"), "http://xxxxx:xxxxx@h:1");
        assert_eq!(without_password("http://h:1"), "http://h:1");
        assert_eq!(without_password("@"), "@");
    }

    #[test]
    fn this_host_has_memory_and_a_system() {
        assert!(memory_total() > 1 << 20);
        assert!(!file_system_of(Path::new("/")).is_empty());
        assert!("image".parse::<UsageKind>().is_ok() && "x".parse::<UsageKind>().is_err());
    }
}
