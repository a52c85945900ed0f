//! update, events, features, spec.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Args;
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use super::Context;
use super::commands::{print, print_json};
use crate::error::{Context as _, Error, Result};
use crate::process::CAPABILITIES;
use crate::state::Status;

#[derive(Debug, Args)]
pub struct UpdateArgs {
    /// A file with linux.resources as JSON, or - for stdin
    #[arg(short, long)]
    pub resources: Option<PathBuf>,
    #[arg(long)]
    pub blkio_weight: Option<u16>,
    #[arg(long)]
    pub cpu_period: Option<u64>,
    #[arg(long, allow_hyphen_values = true)]
    pub cpu_quota: Option<i64>,
    #[arg(long)]
    pub cpu_burst: Option<u64>,
    #[arg(long)]
    pub cpu_share: Option<u64>,
    #[arg(long)]
    pub cpu_rt_period: Option<u64>,
    #[arg(long)]
    pub cpu_rt_runtime: Option<i64>,
    #[arg(long)]
    pub cpu_idle: Option<i64>,
    #[arg(long)]
    pub cpuset_cpus: Option<String>,
    #[arg(long)]
    pub cpuset_mems: Option<String>,
    /// Bytes, with k, m or g
    #[arg(long, allow_hyphen_values = true)]
    pub memory: Option<String>,
    #[arg(long, allow_hyphen_values = true)]
    pub memory_reservation: Option<String>,
    /// Memory and swap together
    #[arg(long, allow_hyphen_values = true)]
    pub memory_swap: Option<String>,
    #[arg(long, allow_hyphen_values = true)]
    pub pids_limit: Option<i64>,
    pub id: String,
}

pub(super) fn update(context: &Context, arguments: &UpdateArgs) -> Result<u8> {
    let mut record = context.store.read(&arguments.id)?;
    if context.store.status(&record) == Status::Stopped {
        return Err(Error::Conflict("cannot update a stopped container".into()));
    }
    let limits = limits(arguments)?;
    let Some(cgroup) = &mut record.cgroup else {
        return Err(Error::unsupported(
            "this container has no cgroup whose limits could be changed",
        ));
    };
    let before = cgroup.clone();
    cgroup.apply(&limits)?;
    if *cgroup != before {
        context.store.update(&record)?;
    }
    Ok(0)
}

fn limits(arguments: &UpdateArgs) -> Result<LinuxResources> {
    if let Some(path) = &arguments.resources {
        let bytes = if path == Path::new("-") {
            let mut bytes = Vec::new();
            std::io::stdin()
                .take(1 << 20)
                .read_to_end(&mut bytes)
                .during(|| "read stdin".into())?;
            bytes
        } else {
            fs::read(path).during(|| format!("read {}", path.display()))?
        };
        return serde_json::from_slice(&bytes).map_err(|source| Error::Json {
            path: path.clone(),
            source,
        });
    }
    let size = |text: &Option<String>| -> Result<Option<Value>> {
        text.as_deref()
            .map(|text| match text {
                "-1" => Ok(json!(-1)),
                text => base::units::parse_size(text)
                    .map(|bytes| json!(bytes))
                    .map_err(|error| Error::invalid(error.to_string())),
            })
            .transpose()
    };
    let group = |entries: Vec<(&str, Option<Value>)>| -> Map<String, Value> {
        entries
            .into_iter()
            .filter_map(|(key, value)| Some((key.to_owned(), value?)))
            .collect()
    };
    let memory = group(vec![
        ("limit", size(&arguments.memory)?),
        ("reservation", size(&arguments.memory_reservation)?),
        ("swap", size(&arguments.memory_swap)?),
    ]);
    let cpu = group(vec![
        ("period", arguments.cpu_period.map(|v| json!(v))),
        ("quota", arguments.cpu_quota.map(|v| json!(v))),
        ("burst", arguments.cpu_burst.map(|v| json!(v))),
        ("shares", arguments.cpu_share.map(|v| json!(v))),
        ("realtimePeriod", arguments.cpu_rt_period.map(|v| json!(v))),
        (
            "realtimeRuntime",
            arguments.cpu_rt_runtime.map(|v| json!(v)),
        ),
        ("idle", arguments.cpu_idle.map(|v| json!(v))),
        ("cpus", arguments.cpuset_cpus.as_ref().map(|v| json!(v))),
        ("mems", arguments.cpuset_mems.as_ref().map(|v| json!(v))),
    ]);
    let mut all = Map::new();
    if !memory.is_empty() {
        all.insert("memory".into(), memory.into());
    }
    if !cpu.is_empty() {
        all.insert("cpu".into(), cpu.into());
    }
    if let Some(limit) = arguments.pids_limit {
        all.insert("pids".into(), json!({ "limit": limit }));
    }
    if let Some(weight) = arguments.blkio_weight {
        all.insert("blockIO".into(), json!({ "weight": weight }));
    }
    serde_json::from_value(all.into()).map_err(|error| Error::invalid(error.to_string()))
}

pub(super) fn events(context: &Context, id: &str, interval: &str, once: bool) -> Result<u8> {
    let pause =
        base::units::parse_duration(interval).map_err(|error| Error::invalid(error.to_string()))?;
    if pause.is_zero() {
        return Err(Error::invalid("--interval must be longer than 0"));
    }
    let record = context.store.read(id)?;
    loop {
        if context.store.status(&record) == Status::Stopped {
            return if once {
                Err(Error::Conflict("container not running".into()))
            } else {
                Ok(0)
            };
        }
        let Some(cgroup) = &record.cgroup else {
            return Err(Error::unsupported(
                "this container has no cgroup to be measured by",
            ));
        };
        let line = json!({"type": "stats", "id": id, "data": cgroup.stats()?});
        print(&format!("{line}\n"));
        if once {
            return Ok(0);
        }
        std::thread::sleep(pause);
    }
}

/// features.md of runtime-spec.
pub(super) fn features() -> Result<u8> {
    let capabilities: Vec<String> = CAPABILITIES
        .iter()
        .map(|name| format!("CAP_{name}"))
        .collect();
    print_json(&json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": crate::OCI_VERSION,
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "idmap", "iversion", "lazytime",
            "loud", "mand", "noatime", "nodev", "nodiratime", "noexec", "noiversion", "nolazytime", "nomand",
            "norelatime", "nostrictatime", "nosuid", "nosymfollow", "private", "ratime", "rbind", "rdev", "rdiratime",
            "relatime", "remount", "rexec", "ridmap", "rnoatime", "rnodev", "rnodiratime", "rnoexec", "rnosuid",
            "rnosymfollow", "ro", "rprivate", "rrelatime", "rro", "rrw", "rshared", "rslave", "rstrictatime", "rsuid",
            "rsymfollow", "runbindable", "rw", "shared", "silent", "slave", "strictatime", "suid", "symfollow", "sync",
            "tmpcopyup", "unbindable"
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": capabilities,
            "cgroup": {"v1": true, "v2": true, "systemd": true, "systemdUser": false, "rdma": true},
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD",
                    "SCMP_ACT_LOG", "SCMP_ACT_NOTIFY", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP"
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ",
                    "SCMP_CMP_NE"
                ],
                "archs": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM", "SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
                "knownFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC",
                    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"
                ],
                "supportedFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC",
                    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"
                ]
            },
            "apparmor": {"enabled": true},
            "selinux": {"enabled": true},
            "intelRdt": {"enabled": true, "schemata": true, "monitoring": true},
            "mountExtensions": {"idmap": {"enabled": true}},
            "netDevices": {"enabled": true},
            "memoryPolicy": {
                "modes": [
                    "MPOL_DEFAULT", "MPOL_BIND", "MPOL_INTERLEAVE", "MPOL_WEIGHTED_INTERLEAVE", "MPOL_PREFERRED",
                    "MPOL_PREFERRED_MANY", "MPOL_LOCAL"
                ],
                "flags": ["MPOL_F_NUMA_BALANCING", "MPOL_F_RELATIVE_NODES", "MPOL_F_STATIC_NODES"]
            }
        },
        "annotations": {"org.berth.version": env!("CARGO_PKG_VERSION")}
    }))?;
    Ok(0)
}

pub(super) fn spec(bundle: Option<&Path>, rootless: bool) -> Result<u8> {
    let path = bundle.unwrap_or(Path::new(".")).join("config.json");
    let text = serde_json::to_vec_pretty(&template(rootless))
        .map_err(|error| Error::invalid(error.to_string()))?;
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .during(|| format!("make {} (remove it first if it exists)", path.display()))?;
    std::io::Write::write_all(&mut file, &text).during(|| format!("write {}", path.display()))?;
    Ok(0)
}

/// A configuration that runs a shell, as `runc spec` writes it.
fn template(rootless: bool) -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": source, "options": options});
    let pts: &[&str] = if rootless {
        &[
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
        ]
    } else {
        &[
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
            "gid=5",
        ]
    };
    let sys = if rootless {
        mount(
            "/sys",
            "none",
            "/sys",
            &["rbind", "nosuid", "noexec", "nodev", "ro"],
        )
    } else {
        mount(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", "ro"],
        )
    };
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &[]),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount("/dev/pts", "devpts", "devpts", pts),
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
        mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        ),
        sys,
    ];
    let mut kinds = vec!["pid", "ipc", "uts", "mount"];
    if rootless {
        kinds.push("user");
    } else {
        kinds.push("network");
        mounts.push(mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        ));
    }
    kinds.push("cgroup");
    let namespaces: Vec<Value> = kinds.iter().map(|kind| json!({ "type": kind })).collect();
    let mut linux = json!({
        "namespaces": namespaces,
        "maskedPaths": [
            "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
            "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"
        ],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
    });
    if rootless {
        let map = |id: u32| json!([{"containerID": 0, "hostID": id, "size": 1}]);
        linux["uidMappings"] = map(rustix::process::geteuid().as_raw());
        linux["gidMappings"] = map(rustix::process::getegid().as_raw());
    } else {
        linux["resources"] = json!({"devices": [{"allow": false, "access": "rwm"}]});
    }
    json!({
        "ociVersion": crate::OCI_VERSION,
        "process": {
            "terminal": true,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "berth",
        "mounts": mounts,
        "linux": linux
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_is_a_valid_configuration() {
        for rootless in [false, true] {
            let spec = serde_json::from_value(template(rootless)).unwrap();
            crate::bundle::validate(&spec).unwrap();
        }
    }
}
