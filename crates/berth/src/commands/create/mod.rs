//! `berth run` and `berth create`: the options of a container, in docker's words, as the body of
//! `POST /containers/create`.

mod words;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use crate::failure::Failure;

pub use words::*;

/// When to fetch the image from its registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Pull {
    /// Always, before the container is made.
    Always,
    /// Where it is not stored here.
    #[default]
    Missing,
    /// Never; a missing image is an error.
    Never,
}

/// The options of a container.
#[derive(Debug, Clone, Args)]
pub struct ContainerOptions {
    /// Name of the container; one is made up if not given.
    #[arg(long, help_heading = "General")]
    pub name: Option<String>,
    /// Keep standard input open.
    #[arg(short, long, help_heading = "General")]
    pub interactive: bool,
    /// Give the program a terminal.
    #[arg(short, long, help_heading = "General")]
    pub tty: bool,
    /// Remove the container, and its anonymous volumes, when it ends.
    #[arg(long, help_heading = "General")]
    pub rm: bool,
    /// Run a small init as process 1 that forwards signals and reaps orphans.
    #[arg(long, help_heading = "General")]
    pub init: bool,
    /// When to fetch the image.
    #[arg(
        long,
        value_enum,
        default_value_t,
        value_name = "WHEN",
        help_heading = "General"
    )]
    pub pull: Pull,
    /// Platform of the image, as in linux/arm64.
    #[arg(long, help_heading = "General")]
    pub platform: Option<String>,
    /// The OCI runtime to use instead of Berth's own.
    #[arg(long, help_heading = "General")]
    pub runtime: Option<String>,
    /// Program to run instead of the image's entry point.
    #[arg(long, value_name = "PROGRAM", help_heading = "Process")]
    pub entrypoint: Option<String>,
    /// Environment variable: NAME=VALUE, or NAME to hand on your own.
    #[arg(short, long, value_name = "NAME[=VALUE]", help_heading = "Process")]
    pub env: Vec<String>,
    /// File of environment variables, one a line.
    #[arg(long, value_name = "FILE", help_heading = "Process")]
    pub env_file: Vec<PathBuf>,
    /// Working folder of the program.
    #[arg(short, long, value_name = "DIR", help_heading = "Process")]
    pub workdir: Option<String>,
    /// User and group: NAME, UID, NAME:GROUP or UID:GID.
    #[arg(short, long, help_heading = "Process")]
    pub user: Option<String>,
    /// Further group of the program.
    #[arg(long, value_name = "GROUP", help_heading = "Process")]
    pub group_add: Vec<String>,
    /// Host name inside.
    #[arg(long, help_heading = "Process")]
    pub hostname: Option<String>,
    /// Domain name inside.
    #[arg(long, help_heading = "Process")]
    pub domainname: Option<String>,
    /// Signal that asks the program to stop.
    #[arg(long, value_name = "SIGNAL", help_heading = "Process")]
    pub stop_signal: Option<String>,
    /// Seconds between the stop signal and the kill.
    #[arg(long, value_name = "SECONDS", help_heading = "Process")]
    pub stop_timeout: Option<i64>,
    /// Label: KEY=VALUE.
    #[arg(short, long, value_name = "KEY=VALUE", help_heading = "General")]
    pub label: Vec<String>,
    /// File of labels, one a line.
    #[arg(long, value_name = "FILE", help_heading = "General")]
    pub label_file: Vec<PathBuf>,
    /// Annotation handed to the OCI runtime: KEY=VALUE.
    #[arg(long, value_name = "KEY=VALUE", help_heading = "General")]
    pub annotation: Vec<String>,
    /// What to do when the program ends: no, always, unless-stopped, on-failure[:TRIES].
    #[arg(
        long,
        default_value = "no",
        value_name = "POLICY",
        help_heading = "General"
    )]
    pub restart: String,
    /// Write the container's id to this file.
    #[arg(long, value_name = "FILE", help_heading = "General")]
    pub cidfile: Option<PathBuf>,

    /// Bind or volume: [SOURCE:]TARGET[:ro,z,rslave…].
    #[arg(short, long, value_name = "SPEC", help_heading = "Storage")]
    pub volume: Vec<String>,
    /// Mount: type=bind|volume|tmpfs|image,source=…,target=…[,readonly].
    #[arg(long, value_name = "SPEC", help_heading = "Storage")]
    pub mount: Vec<String>,
    /// Memory file system: TARGET[:OPTIONS].
    #[arg(long, value_name = "TARGET[:OPTIONS]", help_heading = "Storage")]
    pub tmpfs: Vec<String>,
    /// Take the volumes of another container.
    #[arg(long, value_name = "CONTAINER", help_heading = "Storage")]
    pub volumes_from: Vec<String>,
    /// Make the root file system read-only.
    #[arg(long, help_heading = "Storage")]
    pub read_only: bool,
    /// Size of /dev/shm.
    #[arg(long, value_name = "SIZE", help_heading = "Storage")]
    pub shm_size: Option<String>,
    /// Storage option: KEY=VALUE.
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Storage")]
    pub storage_opt: Vec<String>,

    /// Network: a name, bridge, host, none or container:NAME.
    #[arg(long, alias = "net", value_name = "NETWORK", help_heading = "Network")]
    pub network: Option<String>,
    /// Further name of the container on its network.
    #[arg(
        long,
        visible_alias = "net-alias",
        value_name = "NAME",
        help_heading = "Network"
    )]
    pub network_alias: Vec<String>,
    /// Publish a port: [[ADDRESS:]HOST:]PORT[/tcp|udp|sctp].
    #[arg(short, long, value_name = "SPEC", help_heading = "Network")]
    pub publish: Vec<String>,
    /// Publish all ports the image exposes on random host ports.
    #[arg(short = 'P', long, help_heading = "Network")]
    pub publish_all: bool,
    /// Expose a port without publishing it.
    #[arg(long, value_name = "PORT", help_heading = "Network")]
    pub expose: Vec<String>,
    /// IPv4 address on the network.
    #[arg(long, value_name = "ADDRESS", help_heading = "Network")]
    pub ip: Option<String>,
    /// IPv6 address on the network.
    #[arg(long, value_name = "ADDRESS", help_heading = "Network")]
    pub ip6: Option<String>,
    /// Hardware address.
    #[arg(long, value_name = "ADDRESS", help_heading = "Network")]
    pub mac_address: Option<String>,
    /// Name server.
    #[arg(long, value_name = "ADDRESS", help_heading = "Network")]
    pub dns: Vec<String>,
    /// Search domain.
    #[arg(long, value_name = "DOMAIN", help_heading = "Network")]
    pub dns_search: Vec<String>,
    /// Resolver option.
    #[arg(long, value_name = "OPTION", help_heading = "Network")]
    pub dns_option: Vec<String>,
    /// Line of /etc/hosts: NAME:ADDRESS.
    #[arg(long, value_name = "NAME:ADDRESS", help_heading = "Network")]
    pub add_host: Vec<String>,
    /// Reach another container by name: NAME[:ALIAS].
    #[arg(long, value_name = "NAME[:ALIAS]", help_heading = "Network")]
    pub link: Vec<String>,

    /// Memory limit.
    #[arg(short, long, value_name = "SIZE", help_heading = "Resources")]
    pub memory: Option<String>,
    /// Memory and swap together; -1 for no limit of swap.
    #[arg(
        long,
        value_name = "SIZE",
        allow_hyphen_values = true,
        help_heading = "Resources"
    )]
    pub memory_swap: Option<String>,
    /// Memory below which the kernel reclaims last.
    #[arg(long, value_name = "SIZE", help_heading = "Resources")]
    pub memory_reservation: Option<String>,
    /// Swappiness, 0 to 100.
    #[arg(long, value_name = "N", help_heading = "Resources")]
    pub memory_swappiness: Option<i64>,
    /// CPUs as a fraction: 1.5.
    #[arg(long, value_name = "N", help_heading = "Resources")]
    pub cpus: Option<f64>,
    /// Relative weight of CPU time.
    #[arg(short, long, value_name = "WEIGHT", help_heading = "Resources")]
    pub cpu_shares: Option<i64>,
    /// Length of a CPU period in microseconds.
    #[arg(long, value_name = "US", help_heading = "Resources")]
    pub cpu_period: Option<i64>,
    /// CPU time in each period in microseconds.
    #[arg(long, value_name = "US", help_heading = "Resources")]
    pub cpu_quota: Option<i64>,
    /// CPUs to run on: 0-2,4.
    #[arg(long, value_name = "CPUS", help_heading = "Resources")]
    pub cpuset_cpus: Option<String>,
    /// Memory nodes to use.
    #[arg(long, value_name = "NODES", help_heading = "Resources")]
    pub cpuset_mems: Option<String>,
    /// Most processes and threads at once; -1 for no limit.
    #[arg(
        long,
        value_name = "N",
        allow_hyphen_values = true,
        help_heading = "Resources"
    )]
    pub pids_limit: Option<i64>,
    /// Relative weight of block I/O, 10 to 1000.
    #[arg(long, value_name = "WEIGHT", help_heading = "Resources")]
    pub blkio_weight: Option<u16>,
    /// Limit reads of a device: DEVICE:BYTES_PER_SECOND.
    #[arg(long, value_name = "DEVICE:RATE", help_heading = "Resources")]
    pub device_read_bps: Vec<String>,
    /// Limit writes of a device: DEVICE:BYTES_PER_SECOND.
    #[arg(long, value_name = "DEVICE:RATE", help_heading = "Resources")]
    pub device_write_bps: Vec<String>,
    /// Limit reads of a device: DEVICE:OPERATIONS_PER_SECOND.
    #[arg(long, value_name = "DEVICE:RATE", help_heading = "Resources")]
    pub device_read_iops: Vec<String>,
    /// Limit writes of a device: DEVICE:OPERATIONS_PER_SECOND.
    #[arg(long, value_name = "DEVICE:RATE", help_heading = "Resources")]
    pub device_write_iops: Vec<String>,
    /// Limit of the program: NAME=SOFT[:HARD].
    #[arg(long, value_name = "NAME=SOFT[:HARD]", help_heading = "Resources")]
    pub ulimit: Vec<String>,
    /// How readily the kernel kills it when memory runs out, -1000 to 1000.
    #[arg(
        long,
        value_name = "N",
        allow_hyphen_values = true,
        help_heading = "Resources"
    )]
    pub oom_score_adj: Option<i64>,
    /// Never kill it when memory runs out.
    #[arg(long, help_heading = "Resources")]
    pub oom_kill_disable: bool,
    /// Parent control group.
    #[arg(long, value_name = "PATH", help_heading = "Resources")]
    pub cgroup_parent: Option<String>,

    /// Give all capabilities, devices and no confinement.
    #[arg(long, help_heading = "Security")]
    pub privileged: bool,
    /// Add a capability.
    #[arg(long, value_name = "CAPABILITY", help_heading = "Security")]
    pub cap_add: Vec<String>,
    /// Take a capability away.
    #[arg(long, value_name = "CAPABILITY", help_heading = "Security")]
    pub cap_drop: Vec<String>,
    /// Security option: no-new-privileges, seccomp=FILE, seccomp=unconfined …
    #[arg(long, value_name = "OPTION", help_heading = "Security")]
    pub security_opt: Vec<String>,
    /// Device: HOST[:CONTAINER[:rwm]].
    #[arg(long, value_name = "SPEC", help_heading = "Security")]
    pub device: Vec<String>,
    /// Rule for device access: 'c 42:* rmw'.
    #[arg(long, value_name = "RULE", help_heading = "Security")]
    pub device_cgroup_rule: Vec<String>,
    /// Kernel parameter of the namespaces: NAME=VALUE.
    #[arg(long, value_name = "NAME=VALUE", help_heading = "Security")]
    pub sysctl: Vec<String>,
    /// Process namespace: host or container:NAME.
    #[arg(long, value_name = "MODE", help_heading = "Security")]
    pub pid: Option<String>,
    /// IPC namespace: private, shareable, none, host or container:NAME.
    #[arg(long, value_name = "MODE", help_heading = "Security")]
    pub ipc: Option<String>,
    /// Host-name namespace: host.
    #[arg(long, value_name = "MODE", help_heading = "Security")]
    pub uts: Option<String>,
    /// User namespace: host.
    #[arg(long, value_name = "MODE", help_heading = "Security")]
    pub userns: Option<String>,
    /// Control-group namespace: private or host.
    #[arg(long, value_name = "MODE", help_heading = "Security")]
    pub cgroupns: Option<String>,

    /// Command that tells whether the container is well.
    #[arg(long, value_name = "COMMAND", help_heading = "Health")]
    pub health_cmd: Option<String>,
    /// Time between two checks.
    #[arg(long, value_name = "DURATION", help_heading = "Health")]
    pub health_interval: Option<String>,
    /// Time a check may take.
    #[arg(long, value_name = "DURATION", help_heading = "Health")]
    pub health_timeout: Option<String>,
    /// Failed checks in a row that make it unhealthy.
    #[arg(long, value_name = "N", help_heading = "Health")]
    pub health_retries: Option<i64>,
    /// Time to start in which failures do not count.
    #[arg(long, value_name = "DURATION", help_heading = "Health")]
    pub health_start_period: Option<String>,
    /// Time between two checks while starting.
    #[arg(long, value_name = "DURATION", help_heading = "Health")]
    pub health_start_interval: Option<String>,
    /// Do not check, whatever the image says.
    #[arg(long, help_heading = "Health")]
    pub no_healthcheck: bool,

    /// Where the output goes: json-file, local or none.
    #[arg(long, value_name = "DRIVER", help_heading = "Logs")]
    pub log_driver: Option<String>,
    /// Option of the log: max-size=10m, max-file=3.
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Logs")]
    pub log_opt: Vec<String>,

    /// The image.
    #[arg(value_name = "IMAGE")]
    pub image: String,
    /// The program and its arguments; the image's own if not given.
    #[arg(
        value_name = "COMMAND",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub command: Vec<String>,
}

impl ContainerOptions {
    fn health(&self) -> Result<Value, Failure> {
        if self.no_healthcheck {
            return Ok(json!({"Test": ["NONE"]}));
        }
        let mut health = json!({});
        if let Some(command) = &self.health_cmd {
            health["Test"] = json!(["CMD-SHELL", command]);
        }
        for (key, option, value) in [
            ("Interval", "health-interval", &self.health_interval),
            ("Timeout", "health-timeout", &self.health_timeout),
            (
                "StartPeriod",
                "health-start-period",
                &self.health_start_period,
            ),
            (
                "StartInterval",
                "health-start-interval",
                &self.health_start_interval,
            ),
        ] {
            if let Some(nanos) = nanoseconds(option, value)? {
                health[key] = json!(nanos);
            }
        }
        if let Some(retries) = self.health_retries {
            health["Retries"] = json!(retries);
        }
        Ok(if health.as_object().is_some_and(Map::is_empty) {
            Value::Null
        } else {
            health
        })
    }

    /// Docker reads a seccomp profile on the client's side; so do we.
    fn security(&self) -> Result<Vec<String>, Failure> {
        self.security_opt
            .iter()
            .map(|option| {
                let profile = option
                    .strip_prefix("seccomp=")
                    .or_else(|| option.strip_prefix("seccomp:"));
                match profile {
                    Some(path) if path != "unconfined" && path != "builtin" => {
                        let text = std::fs::read_to_string(path).map_err(|e| {
                            Failure::io(format!("cannot read the seccomp profile {path}"), &e)
                        })?;
                        let value: Value = serde_json::from_str(&text).map_err(|e| {
                            Failure::invalid(format!("{path} is no seccomp profile: {e}"))
                        })?;
                        Ok(format!("seccomp={value}"))
                    }
                    _ => Ok(option.clone()),
                }
            })
            .collect()
    }

    /// The body of `POST /containers/create`. `attach` is whether the caller will attach to the output.
    pub fn body(&self, attach: bool) -> Result<Value, Failure> {
        let mut labels = Vec::new();
        for file in &self.label_file {
            labels.extend(lines_of(file)?);
        }
        labels.extend(self.label.iter().cloned());
        let mut ports = Map::new();
        let mut bindings: Map<String, Value> = Map::new();
        for spec in &self.expose {
            let (range, protocol) = spec.split_once('/').unwrap_or((spec, "tcp"));
            let (low, high) = port_range("expose", range)?;
            for port in low..=high {
                ports.insert(format!("{port}/{protocol}"), json!({}));
            }
        }
        for spec in &self.publish {
            for (port, address, host) in published(spec)? {
                ports.insert(port.clone(), json!({}));
                let list = bindings.entry(port).or_insert_with(|| json!([]));
                if let Some(list) = list.as_array_mut() {
                    list.push(json!({"HostIp": address, "HostPort": host}));
                }
            }
        }
        let mut anonymous = Map::new();
        let mut binds = Vec::new();
        for spec in &self.volume {
            if spec.contains(':') {
                binds.push(bind(spec)?);
            } else {
                anonymous.insert(spec.clone(), json!({}));
            }
        }
        let tmpfs: Map<String, Value> = self
            .tmpfs
            .iter()
            .map(|spec| {
                let (target, options) = spec.split_once(':').unwrap_or((spec, ""));
                (target.to_owned(), json!(options))
            })
            .collect();
        let rates = |option: &str, specs: &[String], bytes: bool| -> Result<Vec<Value>, Failure> {
            specs.iter().map(|spec| rate(option, spec, bytes)).collect()
        };
        let network = self.network.clone().unwrap_or_else(|| "default".into());
        let mut host = json!({
            "Binds": binds,
            "Mounts": self.mount.iter().map(|m| mount(m)).collect::<Result<Vec<_>, _>>()?,
            "Tmpfs": tmpfs,
            "VolumesFrom": self.volumes_from,
            "ReadonlyRootfs": self.read_only,
            "NetworkMode": network,
            "PortBindings": bindings,
            "PublishAllPorts": self.publish_all,
            "Dns": self.dns,
            "DnsSearch": self.dns_search,
            "DnsOptions": self.dns_option,
            "ExtraHosts": self.add_host,
            "Links": self.link,
            "AutoRemove": self.rm,
            "RestartPolicy": restart_policy(&self.restart)?,
            "Privileged": self.privileged,
            "CapAdd": self.cap_add,
            "CapDrop": self.cap_drop,
            "SecurityOpt": self.security()?,
            "GroupAdd": self.group_add,
            "Devices": self.device.iter().map(|d| device(d)).collect::<Vec<_>>(),
            "DeviceCgroupRules": self.device_cgroup_rule,
            "Sysctls": pairs("sysctl", &self.sysctl)?,
            "PidMode": self.pid.clone().unwrap_or_default(),
            "IpcMode": self.ipc.clone().unwrap_or_default(),
            "UTSMode": self.uts.clone().unwrap_or_default(),
            "UsernsMode": self.userns.clone().unwrap_or_default(),
            "CgroupnsMode": self.cgroupns.clone().unwrap_or_default(),
            "CgroupParent": self.cgroup_parent.clone().unwrap_or_default(),
            "Ulimits": self.ulimit.iter().map(|u| ulimit(u)).collect::<Result<Vec<_>, _>>()?,
            "BlkioDeviceReadBps": rates("device-read-bps", &self.device_read_bps, true)?,
            "BlkioDeviceWriteBps": rates("device-write-bps", &self.device_write_bps, true)?,
            "BlkioDeviceReadIOps": rates("device-read-iops", &self.device_read_iops, false)?,
            "BlkioDeviceWriteIOps": rates("device-write-iops", &self.device_write_iops, false)?,
            "Annotations": pairs("annotation", &self.annotation)?,
            "StorageOpt": pairs("storage-opt", &self.storage_opt)?,
            "LogConfig": {"Type": self.log_driver.clone().unwrap_or_default(), "Config": pairs("log-opt", &self.log_opt)?},
        });
        let optional = [
            ("Memory", size("memory", &self.memory)?),
            ("MemorySwap", size("memory-swap", &self.memory_swap)?),
            (
                "MemoryReservation",
                size("memory-reservation", &self.memory_reservation)?,
            ),
            ("MemorySwappiness", self.memory_swappiness),
            ("ShmSize", size("shm-size", &self.shm_size)?),
            ("CpuShares", self.cpu_shares),
            ("CpuPeriod", self.cpu_period),
            ("CpuQuota", self.cpu_quota),
            ("PidsLimit", self.pids_limit),
            ("BlkioWeight", self.blkio_weight.map(i64::from)),
            ("OomScoreAdj", self.oom_score_adj),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                host[key] = json!(value);
            }
        }
        if let Some(cpus) = self.cpus {
            if !(cpus.is_finite() && cpus > 0.0) {
                return Err(wrong("cpus", &cpus.to_string(), "a number above 0"));
            }
            host["NanoCpus"] = json!((cpus * 1e9) as i64);
        }
        if self.oom_kill_disable {
            host["OomKillDisable"] = json!(true);
        }
        if self.init {
            host["Init"] = json!(true);
        }
        for (key, value) in [
            ("CpusetCpus", &self.cpuset_cpus),
            ("CpusetMems", &self.cpuset_mems),
            ("Runtime", &self.runtime),
        ] {
            if let Some(value) = value {
                host[key] = json!(value);
            }
        }
        let mut body = json!({
            "Hostname": self.hostname.clone().unwrap_or_default(),
            "Domainname": self.domainname.clone().unwrap_or_default(),
            "User": self.user.clone().unwrap_or_default(),
            "AttachStdin": attach && self.interactive,
            "AttachStdout": attach,
            "AttachStderr": attach,
            "Tty": self.tty,
            "OpenStdin": self.interactive,
            "StdinOnce": attach && self.interactive,
            "Env": environment(&self.env_file, &self.env)?,
            "Image": self.image,
            "WorkingDir": self.workdir.clone().unwrap_or_default(),
            "Labels": pairs("label", &labels)?,
            "ExposedPorts": ports,
            "Volumes": anonymous,
            "HostConfig": host,
        });
        if !self.command.is_empty() {
            body["Cmd"] = json!(self.command);
        }
        match self.entrypoint.as_deref() {
            Some("") => body["Entrypoint"] = json!([""]),
            Some(program) => body["Entrypoint"] = json!([program]),
            None => {}
        }
        if let Some(signal) = &self.stop_signal {
            body["StopSignal"] = json!(signal);
        }
        if let Some(seconds) = self.stop_timeout {
            body["StopTimeout"] = json!(seconds);
        }
        let health = self.health()?;
        if !health.is_null() {
            body["Healthcheck"] = health;
        }
        let wants_endpoint = !self.network_alias.is_empty()
            || self.ip.is_some()
            || self.ip6.is_some()
            || self.mac_address.is_some();
        if self.network.is_some() || wants_endpoint {
            let mut endpoint = json!({"Aliases": self.network_alias});
            if self.ip.is_some() || self.ip6.is_some() {
                endpoint["IPAMConfig"] = json!({
                    "IPv4Address": self.ip.clone().unwrap_or_default(),
                    "IPv6Address": self.ip6.clone().unwrap_or_default(),
                });
            }
            if let Some(mac) = &self.mac_address {
                endpoint["MacAddress"] = json!(mac);
            }
            body["NetworkingConfig"] = json!({"EndpointsConfig": {network: endpoint}});
        }
        Ok(body)
    }
}
