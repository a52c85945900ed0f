//! What a container gets of this host: Docker's `HostConfig`.

use std::collections::BTreeMap;

use crate::wire::{Words, wire};

wire! {
    /// The part of a container's definition that depends on the host.
    pub struct HostConfig {
        /// `source:/target[:ro,z,rprivate…]`
        pub binds: Option<Vec<String>>,
        #[serde(rename = "ContainerIDFile")]
        pub container_id_file: String,
        pub log_config: LogConfig,
        /// `default`, `bridge`, `host`, `none`, `container:X`, or a network's name.
        pub network_mode: String,
        pub port_bindings: BTreeMap<String, Option<Vec<PortBinding>>>,
        pub restart_policy: RestartPolicy,
        pub auto_remove: bool,
        pub volume_driver: String,
        pub volumes_from: Option<Vec<String>>,
        /// Rows, columns.
        pub console_size: [u16; 2],
        #[serde(skip_serializing_if = "BTreeMap::is_empty")]
        pub annotations: BTreeMap<String, String>,
        pub cap_add: Option<Words>,
        pub cap_drop: Option<Words>,
        /// `host`, `private` or empty (the host's default).
        pub cgroupns_mode: String,
        pub dns: Vec<String>,
        pub dns_options: Vec<String>,
        pub dns_search: Vec<String>,
        pub extra_hosts: Option<Vec<String>>,
        pub group_add: Option<Vec<String>>,
        /// `private`, `shareable`, `host`, `none`, `container:X` or empty.
        pub ipc_mode: String,
        pub cgroup: String,
        pub links: Option<Vec<String>>,
        pub oom_score_adj: i64,
        /// Empty, `host` or `container:X`.
        pub pid_mode: String,
        pub privileged: bool,
        pub publish_all_ports: bool,
        pub readonly_rootfs: bool,
        pub security_opt: Option<Vec<String>>,
        #[serde(skip_serializing_if = "BTreeMap::is_empty")]
        pub storage_opt: BTreeMap<String, String>,
        #[serde(skip_serializing_if = "BTreeMap::is_empty")]
        pub tmpfs: BTreeMap<String, String>,
        #[serde(rename = "UTSMode")]
        pub uts_mode: String,
        pub userns_mode: String,
        /// Bytes of `/dev/shm`; 0 is 64 MiB.
        pub shm_size: i64,
        #[serde(skip_serializing_if = "BTreeMap::is_empty")]
        pub sysctls: BTreeMap<String, String>,
        pub runtime: String,
        pub isolation: String,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        pub mounts: Vec<Mount>,
        /// `None` takes the default paths, `[]` none.
        pub masked_paths: Option<Vec<String>>,
        pub readonly_paths: Option<Vec<String>>,
        /// Whether a tiny init is pid 1; `None` is the daemon's default.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub init: Option<bool>,
    } flatten {
        pub resources: Resources,
    }

    /// Limits. 0 (or `None`) is "no limit" everywhere.
    pub struct Resources {
        pub cpu_shares: i64,
        /// Bytes.
        pub memory: i64,
        /// Billionths of a CPU.
        pub nano_cpus: i64,
        pub cgroup_parent: String,
        /// 10 to 1000.
        pub blkio_weight: u16,
        pub blkio_weight_device: Option<Vec<WeightDevice>>,
        pub blkio_device_read_bps: Option<Vec<ThrottleDevice>>,
        pub blkio_device_write_bps: Option<Vec<ThrottleDevice>>,
        #[serde(rename = "BlkioDeviceReadIOps")]
        pub blkio_device_read_iops: Option<Vec<ThrottleDevice>>,
        #[serde(rename = "BlkioDeviceWriteIOps")]
        pub blkio_device_write_iops: Option<Vec<ThrottleDevice>>,
        /// Microseconds.
        pub cpu_period: i64,
        /// Microseconds per period.
        pub cpu_quota: i64,
        pub cpu_realtime_period: i64,
        pub cpu_realtime_runtime: i64,
        pub cpuset_cpus: String,
        pub cpuset_mems: String,
        pub devices: Option<Vec<DeviceMapping>>,
        pub device_cgroup_rules: Option<Vec<String>>,
        pub device_requests: Option<Vec<serde_json::Value>>,
        pub memory_reservation: i64,
        /// Memory and swap together, bytes; -1 is no limit of swap.
        pub memory_swap: i64,
        /// 0 to 100; `None` or -1 is the kernel's.
        pub memory_swappiness: Option<i64>,
        pub oom_kill_disable: Option<bool>,
        /// `None`, 0 and -1 are no limit.
        pub pids_limit: Option<i64>,
        pub ulimits: Option<Vec<Ulimit>>,
        pub cpu_count: i64,
        pub cpu_percent: i64,
        #[serde(rename = "IOMaximumIOps")]
        pub io_maximum_iops: u64,
        #[serde(rename = "IOMaximumBandwidth")]
        pub io_maximum_bandwidth: u64,
    }

    /// The body of `POST /containers/X/update`.
    pub struct UpdateConfig {
        #[serde(skip_serializing_if = "Option::is_none")]
        pub restart_policy: Option<RestartPolicy>,
    } flatten {
        pub resources: Resources,
    }

    /// How log lines are kept.
    pub struct LogConfig {
        /// `json-file`, `local` (kept as json-file), `none`, or empty for the default.
        #[serde(rename = "Type")]
        pub kind: String,
        /// `max-size`, `max-file`, `labels`, `env`, `tag`.
        pub config: BTreeMap<String, String>,
    }

    /// One published address of a port.
    pub struct PortBinding {
        /// Empty is every address.
        pub host_ip: String,
        /// `""` (any), `8080` or `8000-8010`.
        pub host_port: String,
    }

    /// What to do when a container ends.
    pub struct RestartPolicy {
        /// `no` or empty, `always`, `unless-stopped`, `on-failure`.
        pub name: String,
        pub maximum_retry_count: i64,
    }

    /// A weight of one block device.
    pub struct WeightDevice {
        pub path: String,
        pub weight: u16,
    }

    /// A rate of one block device: bytes or operations per second.
    pub struct ThrottleDevice {
        pub path: String,
        pub rate: u64,
    }

    /// A device of the host shown in the container.
    pub struct DeviceMapping {
        pub path_on_host: String,
        pub path_in_container: String,
        /// Of `r`, `w`, `m`.
        pub cgroup_permissions: String,
    }

    /// One `setrlimit(2)`.
    pub struct Ulimit {
        /// `nofile`, without `RLIMIT_`.
        pub name: String,
        pub hard: i64,
        pub soft: i64,
    }

    /// A mount asked for by `--mount`.
    pub struct Mount {
        /// `bind`, `volume`, `tmpfs`, `image`.
        #[serde(rename = "Type")]
        pub kind: String,
        #[serde(skip_serializing_if = "String::is_empty")]
        pub source: String,
        pub target: String,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        pub read_only: bool,
        #[serde(skip_serializing_if = "String::is_empty")]
        pub consistency: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub bind_options: Option<BindOptions>,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub volume_options: Option<VolumeOptions>,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub tmpfs_options: Option<TmpfsOptions>,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub image_options: Option<ImageOptions>,
    }

    /// Of an image mount.
    pub struct ImageOptions {
        #[serde(skip_serializing_if = "String::is_empty")]
        pub subpath: String,
    }

    /// Of a bind mount.
    pub struct BindOptions {
        #[serde(skip_serializing_if = "String::is_empty")]
        pub propagation: String,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        pub non_recursive: bool,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        pub create_mountpoint: bool,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        pub read_only_non_recursive: bool,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        pub read_only_force_recursive: bool,
    }

    /// Of a volume mount.
    pub struct VolumeOptions {
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        pub no_copy: bool,
        #[serde(skip_serializing_if = "BTreeMap::is_empty")]
        pub labels: BTreeMap<String, String>,
        #[serde(skip_serializing_if = "String::is_empty")]
        pub subpath: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        pub driver_config: Option<DriverConfig>,
    }

    /// A volume driver with its options.
    pub struct DriverConfig {
        pub name: String,
        pub options: BTreeMap<String, String>,
    }

    /// Of a tmpfs mount.
    pub struct TmpfsOptions {
        #[serde(skip_serializing_if = "crate::container::config::is_zero")]
        pub size_bytes: i64,
        /// Permission bits, as a decimal number.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub mode: Option<u32>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        pub options: Vec<Vec<String>>,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_lie_flat_in_the_host_config_as_docker_writes_them() {
        let text = r#"{"Memory":1048576,"NanoCpus":null,"Ulimits":[{"Name":"nofile","Hard":9,"Soft":8}],
            "PortBindings":{"80/tcp":[{"HostPort":"8080"}],"81/tcp":null},"CapAdd":"NET_ADMIN","Unheard":1,
            "Mounts":[{"Type":"tmpfs","Target":"/x","TmpfsOptions":{"SizeBytes":4096}}],"ConsoleSize":[24,80]}"#;
        let host: HostConfig = serde_json::from_str(text).unwrap();
        assert_eq!(host.resources.memory, 1 << 20);
        assert_eq!(host.cap_add.as_ref().unwrap().0, ["NET_ADMIN"]);
        let json = serde_json::to_value(&host).unwrap();
        assert_eq!(json["Memory"], 1 << 20);
        assert_eq!(json["UTSMode"], "");
        assert_eq!(serde_json::from_value::<HostConfig>(json).unwrap(), host);
    }
}
