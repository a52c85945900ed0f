//! `berth run` and `berth create`: the options of a container, in docker's words, as the body of
//! `POST /containers/create`.

use std::path::PathBuf;

use base::units::{parse_duration, parse_size};
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use crate::failure::Failure;

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
    /// Mount: type=bind|volume|tmpfs,source=…,target=…[,readonly].
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

fn wrong(option: &str, value: &str, wanted: &str) -> Failure {
    Failure::invalid(format!("--{option} {value:?}: {wanted} is wanted"))
}

fn size(option: &str, value: &Option<String>) -> Result<Option<i64>, Failure> {
    value
        .as_deref()
        .map(|text| {
            if text == "-1" {
                return Ok(-1);
            }
            parse_size(text)
                .map(|n| n as i64)
                .map_err(|e| Failure::invalid(format!("--{option}: {e}")))
        })
        .transpose()
}

fn pairs(option: &str, values: &[String]) -> Result<Map<String, Value>, Failure> {
    values
        .iter()
        .map(|value| {
            let (key, value) = value.split_once('=').unwrap_or((value, ""));
            if key.is_empty() {
                Err(wrong(option, value, "KEY=VALUE"))
            } else {
                Ok((key.to_owned(), json!(value)))
            }
        })
        .collect()
}

/// The lines of an environment or label file: no comments, no blanks.
fn lines_of(path: &PathBuf) -> Result<Vec<String>, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::io(format!("cannot read {}", path.display()), &e))?;
    Ok(text
        .lines()
        .map(str::trim_start)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect())
}

/// `NAME=VALUE`; a bare `NAME` takes this process's own value and vanishes where there is none.
pub fn environment(files: &[PathBuf], variables: &[String]) -> Result<Vec<String>, Failure> {
    let mut all = Vec::new();
    for file in files {
        all.extend(lines_of(file)?);
    }
    all.extend(variables.iter().cloned());
    let mut out = Vec::new();
    for variable in all {
        if variable.starts_with('=') || variable.is_empty() {
            return Err(wrong("env", &variable, "NAME=VALUE"));
        }
        if variable.contains('=') {
            out.push(variable);
        } else if let Ok(value) = std::env::var(&variable) {
            out.push(format!("{variable}={value}"));
        }
    }
    Ok(out)
}

/// One published port as docker writes it: container port with protocol, host address, host port.
pub type Published = (String, String, String);

pub fn port_range(option: &str, text: &str) -> Result<(u16, u16), Failure> {
    let bad = || wrong(option, text, "a port or a range, as in 8080 or 8000-8010,");
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    let (low, high) = (
        low.parse::<u16>().map_err(|_| bad())?,
        high.parse::<u16>().map_err(|_| bad())?,
    );
    if low == 0 || low > high {
        Err(bad())
    } else {
        Ok((low, high))
    }
}

/// `[[ADDRESS:]HOST:]PORT[/PROTOCOL]`, with ranges, as docker reads it.
pub fn published(spec: &str) -> Result<Vec<Published>, Failure> {
    let (rest, protocol) = spec.split_once('/').unwrap_or((spec, "tcp"));
    if !["tcp", "udp", "sctp"].contains(&protocol) {
        return Err(wrong("publish", spec, "protocol tcp, udp or sctp"));
    }
    let (front, container) = rest.rsplit_once(':').unwrap_or(("", rest));
    let (address, host) = match front.rsplit_once(':') {
        _ if front.starts_with('[') && front.ends_with(']') => (front, ""),
        Some((address, host)) => (address, host),
        None if front.contains('.') => (front, ""),
        None => ("", front),
    };
    let address = address.trim_start_matches('[').trim_end_matches(']');
    if !address.is_empty() && address.parse::<std::net::IpAddr>().is_err() {
        return Err(wrong("publish", spec, "an IP address before the ports"));
    }
    let (low, high) = port_range("publish", container)?;
    let hosts = if host.is_empty() {
        None
    } else {
        Some(port_range("publish", host)?)
    };
    if let Some((first, last)) = hosts
        && last - first != high - low
    {
        if low == high {
            return Ok(vec![(
                format!("{low}/{protocol}"),
                address.to_owned(),
                host.to_owned(),
            )]);
        }
        return Err(wrong(
            "publish",
            spec,
            "as many host ports as container ports",
        ));
    }
    Ok((low..=high)
        .map(|port| {
            let host = hosts.map_or(String::new(), |(first, _)| {
                (first + (port - low)).to_string()
            });
            (format!("{port}/{protocol}"), address.to_owned(), host)
        })
        .collect())
}

/// `type=…,source=…,target=…`, comma-separated, as docker reads it.
fn mount(spec: &str) -> Result<Value, Failure> {
    let mut mount = json!({"Type": "volume"});
    for field in spec.split(',') {
        let (key, value) = field
            .split_once('=')
            .map_or((field, None), |(k, v)| (k, Some(v)));
        let flag = || match value {
            None | Some("true" | "1") => Ok(true),
            Some("false" | "0") => Ok(false),
            Some(other) => Err(wrong("mount", other, "true or false")),
        };
        let need = || value.ok_or_else(|| wrong("mount", field, "KEY=VALUE"));
        match key {
            "type" => mount["Type"] = json!(need()?),
            "source" | "src" => {
                let text = need()?;
                mount["Source"] = json!(text);
            }
            "target" | "dst" | "destination" => mount["Target"] = json!(need()?),
            "readonly" | "ro" => mount["ReadOnly"] = json!(flag()?),
            "consistency" => mount["Consistency"] = json!(need()?),
            "bind-propagation" => mount["BindOptions"]["Propagation"] = json!(need()?),
            "bind-nonrecursive" => mount["BindOptions"]["NonRecursive"] = json!(flag()?),
            "bind-create-src" => mount["BindOptions"]["CreateMountpoint"] = json!(flag()?),
            "volume-nocopy" => mount["VolumeOptions"]["NoCopy"] = json!(flag()?),
            "volume-driver" => mount["VolumeOptions"]["DriverConfig"]["Name"] = json!(need()?),
            "volume-subpath" => mount["VolumeOptions"]["Subpath"] = json!(need()?),
            "tmpfs-size" => {
                let bytes =
                    parse_size(need()?).map_err(|e| Failure::invalid(format!("--mount: {e}")))?;
                mount["TmpfsOptions"]["SizeBytes"] = json!(bytes);
            }
            "tmpfs-mode" => {
                let mode = u32::from_str_radix(need()?, 8)
                    .map_err(|_| wrong("mount", field, "an octal mode"))?;
                mount["TmpfsOptions"]["Mode"] = json!(mode);
            }
            _ => {
                return Err(wrong(
                    "mount",
                    field,
                    "type, source, target, readonly, bind-…, volume-… or tmpfs-…",
                ));
            }
        }
    }
    if mount["Target"].is_null() {
        return Err(wrong("mount", spec, "target=PATH"));
    }
    Ok(mount)
}

/// Makes a relative bind source absolute: the daemon has another working folder.
fn bind(spec: &str) -> Result<String, Failure> {
    if spec.starts_with('.') || spec.starts_with('~') {
        let (source, rest) = spec
            .split_once(':')
            .ok_or_else(|| wrong("volume", spec, "SOURCE:TARGET"))?;
        let absolute = std::path::absolute(source)
            .map_err(|e| Failure::io(format!("cannot resolve {source}"), &e))?;
        return Ok(format!("{}:{rest}", absolute.display()));
    }
    Ok(spec.to_owned())
}

fn device(spec: &str) -> Value {
    let mut parts = spec.splitn(3, ':');
    let host = parts.next().unwrap_or_default();
    let (mut inside, mut access) = (host, "rwm");
    if let Some(second) = parts.next() {
        if second.starts_with('/') {
            inside = second;
            access = parts.next().unwrap_or("rwm");
        } else {
            access = second;
        }
    }
    json!({"PathOnHost": host, "PathInContainer": inside, "CgroupPermissions": access})
}

fn rate(option: &str, spec: &str, bytes: bool) -> Result<Value, Failure> {
    let bad = || wrong(option, spec, "DEVICE:RATE");
    let (path, rate) = spec.rsplit_once(':').ok_or_else(bad)?;
    let rate = if bytes {
        parse_size(rate).map_err(|_| bad())?
    } else {
        rate.parse().map_err(|_| bad())?
    };
    Ok(json!({"Path": path, "Rate": rate}))
}

fn ulimit(spec: &str) -> Result<Value, Failure> {
    let bad = || wrong("ulimit", spec, "NAME=SOFT[:HARD]");
    let (name, limits) = spec.split_once('=').ok_or_else(bad)?;
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let number = |text: &str| {
        if text == "unlimited" {
            Ok(-1)
        } else {
            text.parse::<i64>().map_err(|_| bad())
        }
    };
    Ok(json!({"Name": name, "Soft": number(soft)?, "Hard": number(hard)?}))
}

fn nanoseconds(option: &str, value: &Option<String>) -> Result<Option<u64>, Failure> {
    value
        .as_deref()
        .map(|text| {
            parse_duration(text)
                .map(|d| d.as_nanos() as u64)
                .map_err(|e| Failure::invalid(format!("--{option}: {e}")))
        })
        .transpose()
}

fn restart_policy(text: &str) -> Result<Value, Failure> {
    let (name, tries) = text.split_once(':').unwrap_or((text, "0"));
    let tries: i64 = tries
        .parse()
        .map_err(|_| wrong("restart", text, "on-failure:TRIES"))?;
    if !["", "no", "always", "unless-stopped", "on-failure"].contains(&name)
        || (tries != 0 && name != "on-failure")
    {
        return Err(wrong(
            "restart",
            text,
            "no, always, unless-stopped or on-failure[:TRIES]",
        ));
    }
    Ok(json!({"Name": name, "MaximumRetryCount": tries}))
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn port(p: &str, a: &str, h: &str) -> Published {
        (p.into(), a.into(), h.into())
    }

    #[test]
    fn ports_are_read_as_docker_reads_them() {
        assert_eq!(published("80").unwrap(), [port("80/tcp", "", "")]);
        assert_eq!(published("8080:80").unwrap(), [port("80/tcp", "", "8080")]);
        assert_eq!(
            published("127.0.0.1:8080:80/udp").unwrap(),
            [port("80/udp", "127.0.0.1", "8080")]
        );
        assert_eq!(
            published("127.0.0.1::80").unwrap(),
            [port("80/tcp", "127.0.0.1", "")]
        );
        assert_eq!(
            published("[::1]:8080:80").unwrap(),
            [port("80/tcp", "::1", "8080")]
        );
        assert_eq!(
            published("7000-7001:80-81").unwrap(),
            [port("80/tcp", "", "7000"), port("81/tcp", "", "7001")]
        );
        assert_eq!(
            published("7000-7005:80").unwrap(),
            [port("80/tcp", "", "7000-7005")]
        );
        for bad in ["", "x", "80/icmp", "70000:80", "1-3:5-9", "host:1:2"] {
            assert!(published(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_mount_needs_a_target() {
        assert!(mount("type=bind,source=/a").is_err());
        let read_only = mount("type=bind,src=/a,dst=/b,ro").unwrap();
        assert_eq!(read_only["ReadOnly"], true);
        assert!(mount("type=bind,dst=/b,colour=red").is_err());
    }

    #[test]
    fn a_device_has_three_parts() {
        assert_eq!(device("/dev/fuse:rw")["CgroupPermissions"], "rw");
        assert_eq!(device("/dev/fuse:/dev/x:r")["PathInContainer"], "/dev/x");
    }

    proptest! {
        #[test]
        fn no_option_text_panics(text in ".{0,40}") {
            let _ = published(&text);
            let _ = mount(&text);
            let _ = ulimit(&text);
            let _ = rate("x", &text, true);
            let _ = restart_policy(&text);
            let _ = device(&text);
        }
    }
}
