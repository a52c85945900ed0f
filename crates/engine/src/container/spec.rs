//! From a container's record to an OCI runtime spec.

use std::path::Path;

use serde_json::{Value, json};

use crate::container::host_config::HostConfig;
use crate::container::record::Record;
use crate::container::user::User;
use crate::container::{capabilities, limits, seccomp};
use crate::error::{Error, Result};

/// The search path of a container whose image names none.
pub(crate) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const MASKED: [&str; 13] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/sys/devices/system/cpu/cpu0/thermal_throttle",
];
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// The paths hidden unless told otherwise.
pub(crate) fn masked_paths() -> Vec<String> {
    MASKED.iter().map(|path| path.to_string()).collect()
}

/// The paths read-only unless told otherwise.
pub(crate) fn readonly_paths() -> Vec<String> {
    READ_ONLY.iter().map(|path| path.to_string()).collect()
}

/// What the spec needs beside the record.
pub(crate) struct Surroundings<'a> {
    pub user: User,
    /// `STATE/containers/ID`, with `hostname`, `hosts` and `resolv.conf`.
    pub directory: &'a Path,
    pub cgroup: &'a str,
    /// OCI mounts of volumes, binds, tmpfs.
    pub mounts: Vec<Value>,
    /// The pid of the container whose namespaces are joined, by namespace.
    pub pid_of: Option<i32>,
    pub ipc_of: Option<i32>,
    pub network_of: Option<i32>,
    /// Whether it has a network namespace of its own, handed over by descriptor.
    pub own_network: bool,
    pub init_program: Option<&'a Path>,
}

/// How the security options read.
#[derive(Debug, Default)]
pub(crate) struct Security {
    pub no_new_privileges: bool,
    /// `None` is the default profile, `Some(None)` no filter.
    pub seccomp: Option<Option<Value>>,
    pub unmask: bool,
    pub warnings: Vec<String>,
}

/// Reads `--security-opt` (and `--privileged`).
///
/// # Errors
/// [`Error::Invalid`] in dockerd's words.
pub(crate) fn security(host: &HostConfig) -> Result<Security> {
    let mut out = Security::default();
    for option in host.security_opt.iter().flatten() {
        let (key, value) = match option.split_once('=').or_else(|| option.split_once(':')) {
            Some(pair) => pair,
            None => (option.as_str(), ""),
        };
        match key {
            "no-new-privileges" => {
                out.no_new_privileges = match value {
                    "" | "true" => true,
                    "false" => false,
                    _ => {
                        return Err(Error::Invalid(format!(
                            "invalid --security-opt 2: {option:?}"
                        )));
                    }
                }
            }
            "seccomp" => {
                out.seccomp = match value {
                    "unconfined" => Some(None),
                    "" | "builtin" => None,
                    profile => Some(Some(profile_of(profile)?)),
                }
            }
            "systempaths" if value == "unconfined" => out.unmask = true,
            "apparmor" | "label" => {
                if !matches!(value, "unconfined" | "disable") {
                    out.warnings.push(format!(
                        "{option} is not applied: this engine uses no {key}"
                    ));
                }
            }
            _ => {
                return Err(Error::Invalid(format!(
                    "invalid --security-opt 2: {option:?}"
                )));
            }
        }
    }
    if host.privileged {
        out.seccomp = Some(None);
        out.unmask = true;
    }
    Ok(out)
}

/// A profile in Docker's form, made to the OCI form: `includes`, `excludes` and `archMap` are Docker's alone.
fn profile_of(text: &str) -> Result<Value> {
    let wrong = |error: String| Error::Invalid(format!("Decoding seccomp profile failed: {error}"));
    let mut profile: Value =
        serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
    let object = profile
        .as_object_mut()
        .ok_or_else(|| wrong("it is not an object".into()))?;
    if object.contains_key("architectures") && object.contains_key("archMap") {
        return Err(wrong(
            "'architectures' and 'archMap' were specified in the seccomp profile, use either"
                .into(),
        ));
    }
    if let Some(map) = object.remove("archMap") {
        let native = if cfg!(target_arch = "aarch64") {
            "SCMP_ARCH_AARCH64"
        } else {
            "SCMP_ARCH_X86_64"
        };
        let mut list = vec![json!(native)];
        for entry in map.as_array().into_iter().flatten() {
            if entry["architecture"] == native {
                list.extend(
                    entry["subArchitectures"]
                        .as_array()
                        .into_iter()
                        .flatten()
                        .cloned(),
                );
            }
        }
        object.insert("architectures".into(), Value::Array(list));
    }
    resolved(&profile, &[], (0, 0)).map_err(wrong)?;
    Ok(profile)
}

/// A profile with the rules that apply to a container with these capabilities on this machine and kernel, as
/// `setupSeccomp` of moby's profiles/seccomp picks them.
fn resolved(
    profile: &Value,
    set: &[&str],
    kernel: (u32, u32),
) -> std::result::Result<Value, String> {
    let mut profile = profile.clone();
    if let Some(rules) = profile.get_mut("syscalls").and_then(Value::as_array_mut) {
        rules.retain(|rule| applies(rule, set, kernel));
        for rule in rules {
            if let Some(rule) = rule.as_object_mut() {
                if let Some(name) = rule.remove("name") {
                    rule.insert("names".into(), json!([name]));
                }
                for key in ["comment", "includes", "excludes"] {
                    rule.remove(key);
                }
                if rule.get("args").is_some_and(Value::is_null) {
                    rule.remove("args");
                }
            }
        }
    }
    serde_json::from_value::<oci_spec::runtime::LinuxSeccomp>(profile.clone())
        .map_err(|error| error.to_string())?;
    Ok(profile)
}

fn applies(rule: &Value, set: &[&str], kernel: (u32, u32)) -> bool {
    // Go's word for the machine, as profiles write it.
    let machine = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let list = |part: &str, key: &str| -> Vec<String> {
        let words = rule[part][key].as_array().into_iter().flatten();
        words
            .filter_map(|word| word.as_str().map(str::to_owned))
            .collect()
    };
    let new_enough = |part: &str| {
        let text = rule[part]["minKernel"].as_str()?;
        let mut numbers = text
            .split('.')
            .map(|number| number.parse::<u32>().unwrap_or(u32::MAX));
        Some(kernel >= (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)))
    };
    let has = |capability: &String| set.contains(&capability.as_str());
    let here = |machines: &[String]| machines.iter().any(|name| name == machine);
    let included = list("includes", "arches");
    !here(&list("excludes", "arches"))
        && !list("excludes", "caps").iter().any(has)
        && new_enough("excludes") != Some(true)
        && (included.is_empty() || here(&included))
        && list("includes", "caps").iter().all(has)
        && new_enough("includes") != Some(false)
}

/// The environment: the search path, the host name, the terminal, then what was configured.
pub(crate) fn environment(record: &Record, user: &User) -> Vec<String> {
    let configured = &record.config.env;
    let has = |name: &str| {
        configured
            .iter()
            .any(|entry| entry.split('=').next() == Some(name))
    };
    let mut env = Vec::with_capacity(configured.len() + 4);
    if !has("PATH") {
        env.push(format!("PATH={DEFAULT_PATH}"));
    }
    if !has("HOSTNAME") {
        env.push(format!("HOSTNAME={}", record.config.hostname));
    }
    if record.config.tty && !has("TERM") {
        env.push("TERM=xterm".into());
    }
    env.extend(
        configured
            .iter()
            .filter(|entry| entry.contains('='))
            .cloned(),
    );
    if !has("HOME") {
        env.push(format!("HOME={}", user.home));
    }
    env
}

/// An OCI process.
#[allow(clippy::too_many_arguments)]
pub(crate) fn process(
    arguments: &[String],
    environment: Vec<String>,
    directory: &str,
    user: &User,
    terminal: bool,
    size: [u16; 2],
    capabilities: &[&str],
    no_new_privileges: bool,
) -> Value {
    // A user other than root keeps what it may gain by a set-user-id program, but starts with none.
    let own: &[&str] = if user.uid == 0 { capabilities } else { &[] };
    let groups: &[u32] = if base::userns::may_set_groups() {
        &user.groups
    } else {
        &[]
    };
    let mut process = json!({
        "terminal": terminal,
        "user": { "uid": user.uid, "gid": user.gid, "additionalGids": groups },
        "args": arguments,
        "env": environment,
        "cwd": directory,
        "capabilities": { "bounding": capabilities, "effective": own, "permitted": own },
        "noNewPrivileges": no_new_privileges,
    });
    if terminal && size != [0, 0] {
        process["consoleSize"] = json!({ "height": size[0], "width": size[1] });
    }
    process
}

/// Gives a process the container's own limits of a process: an exec'd one has them too.
pub(crate) fn bound(process: &mut Value, host: &HostConfig) {
    process["oomScoreAdj"] = json!(host.oom_score_adj);
    let rlimits = limits::rlimits(&host.resources);
    if !rlimits.is_empty() {
        process["rlimits"] = json!(rlimits);
    }
}

/// The whole spec.
///
/// # Errors
/// [`Error::Invalid`] for options that do not exist or contradict each other.
pub(crate) fn build(record: &Record, around: Surroundings<'_>) -> Result<Value> {
    let host = &record.host;
    let words = |words: &Option<crate::Words>| words.clone().unwrap_or_default().0;
    let set = capabilities::of(
        host.privileged,
        &words(&host.cap_add),
        &words(&host.cap_drop),
    )?;
    let security = security(host)?;
    let mut arguments = record.arguments();
    let mut mounts = base_mounts(host, around.own_network || around.network_of.is_some());
    if let Some(program) = around.init_program {
        arguments.splice(0..0, ["/sbin/docker-init".to_owned(), "--".into()]);
        mounts.push(
            json!({ "destination": "/sbin/docker-init", "type": "bind", "source": program,
            "options": ["bind", "ro", "rprivate"] }),
        );
    }
    let mut process = process(
        &arguments,
        environment(record, &around.user),
        if record.config.working_dir.is_empty() {
            "/"
        } else {
            &record.config.working_dir
        },
        &around.user,
        record.config.tty,
        host.console_size,
        &set,
        security.no_new_privileges,
    );
    bound(&mut process, host);
    let taken: Vec<&Value> = around
        .mounts
        .iter()
        .map(|mount| &mount["destination"])
        .collect();
    mounts.retain(|mount| !taken.contains(&&mount["destination"]));
    for file in ["resolv.conf", "hostname", "hosts"] {
        let destination = format!("/etc/{file}");
        let source = around.directory.join(file);
        if !taken.contains(&&json!(destination)) && source.exists() {
            let access = if host.readonly_rootfs { "ro" } else { "rw" };
            mounts.push(
                json!({ "destination": destination, "type": "bind", "source": source,
                "options": ["rbind", "rprivate", access] }),
            );
        }
    }
    mounts.extend(around.mounts);
    let mut linux = linux(record, &security, &set, around.cgroup)?;
    linux["namespaces"] = namespaces(
        record,
        around.pid_of,
        around.ipc_of,
        around.network_of,
        around.own_network,
    );
    let mut spec = json!({
        "ociVersion": "1.2.0",
        "process": process,
        "root": { "path": "rootfs", "readonly": host.readonly_rootfs },
        "mounts": mounts,
        "linux": linux,
    });
    if host.uts_mode != "host" {
        spec["hostname"] = json!(record.config.hostname);
        if !record.config.domainname.is_empty() {
            spec["domainname"] = json!(record.config.domainname);
        }
    }
    if !host.annotations.is_empty() {
        spec["annotations"] = json!(host.annotations);
    }
    Ok(spec)
}

fn linux(record: &Record, security: &Security, set: &[&str], cgroup: &str) -> Result<Value> {
    let host = &record.host;
    let mut resources = limits::oci(&host.resources)?;
    let (devices, rules) = devices(host)?;
    resources.insert("devices".into(), json!(rules));
    let mut linux = json!({
        "cgroupsPath": format!("/{cgroup}"),
        "resources": resources,
        "devices": devices,
    });
    if !host.sysctls.is_empty() {
        linux["sysctl"] = json!(host.sysctls);
    }
    if !security.unmask {
        linux["maskedPaths"] = json!(host.masked_paths.clone().unwrap_or_else(masked_paths));
        linux["readonlyPaths"] = json!(host.readonly_paths.clone().unwrap_or_else(readonly_paths));
    }
    match &security.seccomp {
        Some(None) => {}
        Some(Some(profile)) => {
            linux["seccomp"] =
                resolved(profile, set, base::host::kernel_version()).map_err(Error::Invalid)?;
        }
        None => linux["seccomp"] = seccomp::default_profile(set),
    }
    // Mounts that a bind shares with the host must reach it through the container's root.
    let shared = record
        .mounts
        .iter()
        .any(|mount| mount.point.propagation.ends_with("shared"));
    let slave = record
        .mounts
        .iter()
        .any(|mount| mount.point.propagation.ends_with("slave"));
    if shared || slave {
        linux["rootfsPropagation"] = json!(if shared { "shared" } else { "slave" });
    }
    Ok(linux)
}

fn namespaces(
    record: &Record,
    pid_of: Option<i32>,
    ipc_of: Option<i32>,
    network_of: Option<i32>,
    own_network: bool,
) -> Value {
    let host = &record.host;
    let mut list = vec![json!({ "type": "mount" })];
    let mut add = |kind: &str, file: &str, joined: Option<i32>, host_mode: bool| match joined {
        Some(pid) => list.push(json!({ "type": kind, "path": format!("/proc/{pid}/ns/{file}") })),
        None if !host_mode => list.push(json!({ "type": kind })),
        None => {}
    };
    add("pid", "pid", pid_of, host.pid_mode == "host");
    add("ipc", "ipc", ipc_of, host.ipc_mode == "host");
    add("uts", "uts", None, host.uts_mode == "host");
    add("cgroup", "cgroup", None, host.cgroupns_mode == "host");
    add("network", "net", network_of, !own_network);
    Value::Array(list)
}

fn base_mounts(host: &HostConfig, own_sysfs: bool) -> Vec<Value> {
    let system = if host.privileged { "rw" } else { "ro" };
    let mut terminals = vec![
        "nosuid",
        "noexec",
        "newinstance",
        "ptmxmode=0666",
        "mode=0620",
    ];
    // The group `tty`, where it can own anything.
    if base::userns::maps_group(5) {
        terminals.push("gid=5");
    }
    let mut mounts = vec![
        json!({ "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] }),
        json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] }),
        json!({ "destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": terminals }),
        // Without a network namespace of one's own sysfs cannot be mounted anew; the runtime binds the host's.
        if own_sysfs {
            json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", system] })
        } else {
            json!({ "destination": "/sys", "type": "bind", "source": "/sys",
                "options": ["rbind", "rprivate", "nosuid", "noexec", "nodev", system] })
        },
    ];
    if own_sysfs {
        mounts.push(
            json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": [system, "nosuid", "noexec", "nodev"] }),
        );
    }
    if host.ipc_mode == "host" {
        mounts.push(json!({ "destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind", "rw"] }));
        // Not every host has it mounted.
        if Path::new("/dev/mqueue").is_dir() {
            mounts.push(json!({ "destination": "/dev/mqueue", "type": "bind", "source": "/dev/mqueue", "options": ["rbind", "rw"] }));
        }
    } else {
        mounts.push(
            json!({ "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
            "options": ["nosuid", "noexec", "nodev"] }),
        );
        if host.ipc_mode != "none" {
            mounts.push(json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", format!("size={}", host.shm_size.max(0))] }));
        }
    }
    mounts
}

/// The devices to make, and the rules of the devices cgroup.
fn devices(host: &HostConfig) -> Result<(Vec<Value>, Vec<Value>)> {
    let mut devices = Vec::new();
    if host.privileged {
        for (inside, path) in host_devices() {
            if let Ok(device) = device(&path, &inside) {
                devices.push(device);
            }
        }
        return Ok((devices, vec![json!({ "allow": true, "access": "rwm" })]));
    }
    let mut rules = vec![json!({ "allow": false, "access": "rwm" })];
    for (kind, major, minor, access) in [
        ("c", Some(1), Some(5), "rwm"),
        ("c", Some(1), Some(3), "rwm"),
        ("c", Some(1), Some(9), "rwm"),
        ("c", Some(1), Some(8), "rwm"),
        ("c", Some(1), Some(7), "rwm"),
        ("c", Some(5), Some(0), "rwm"),
        ("c", Some(5), Some(1), "rwm"),
        ("c", Some(5), Some(2), "rwm"),
        ("c", Some(136), None, "rwm"),
        ("b", None, None, "m"),
        ("c", None, None, "m"),
    ] {
        let mut rule = json!({ "allow": true, "type": kind, "access": access });
        if let Some(major) = major {
            rule["major"] = json!(major);
        }
        if let Some(minor) = minor {
            rule["minor"] = json!(minor);
        }
        rules.push(rule);
    }
    for mapping in host.resources.devices.iter().flatten() {
        let inside = if mapping.path_in_container.is_empty() {
            &mapping.path_on_host
        } else {
            &mapping.path_in_container
        };
        let access = if mapping.cgroup_permissions.is_empty() {
            "rwm"
        } else {
            &mapping.cgroup_permissions
        };
        if !access.bytes().all(|byte| b"rwm".contains(&byte)) {
            return Err(Error::Invalid(format!("invalid device mode: {access}")));
        }
        let path = Path::new(&mapping.path_on_host);
        let mut found: Vec<(String, std::path::PathBuf)> = Vec::new();
        if path.is_dir() {
            for entry in std::fs::read_dir(path)
                .map_err(Error::io(mapping.path_on_host.clone()))?
                .flatten()
            {
                found.push((
                    format!("{inside}/{}", entry.file_name().to_string_lossy()),
                    entry.path(),
                ));
            }
        } else {
            found.push((inside.clone(), path.to_owned()));
        }
        let folder = path.is_dir();
        for (inside, path) in found {
            match device(&path, &inside) {
                Ok(device) => {
                    rules.push(
                        json!({ "allow": true, "type": device["type"], "major": device["major"],
                        "minor": device["minor"], "access": access }),
                    );
                    devices.push(device);
                }
                Err(_) if folder => {}
                Err(error) => return Err(error),
            }
        }
    }
    for rule in host.resources.device_cgroup_rules.iter().flatten() {
        rules.push(limits::device_rule(rule)?);
    }
    Ok((devices, rules))
}

fn device(path: &Path, inside: &str) -> Result<Value> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let shown = path.display();
    let metadata = std::fs::metadata(path).map_err(|error| {
        Error::Invalid(format!(
            "error gathering device information while adding custom device \"{shown}\": {error}"
        ))
    })?;
    let kind = match metadata.file_type() {
        kind if kind.is_char_device() => "c",
        kind if kind.is_block_device() => "b",
        _ => {
            return Err(Error::Invalid(format!(
                "error gathering device information while adding custom device \"{shown}\": not a device node"
            )));
        }
    };
    Ok(json!({
        "path": inside, "type": kind,
        "major": rustix::fs::major(metadata.rdev()), "minor": rustix::fs::minor(metadata.rdev()),
        "fileMode": metadata.mode() & 0o7777, "uid": metadata.uid(), "gid": metadata.gid(),
    }))
}

/// The device nodes under `/dev`, but for those a container has its own of.
fn host_devices() -> Vec<(String, std::path::PathBuf)> {
    let mut found = Vec::new();
    let mut pending = vec![std::path::PathBuf::from("/dev")];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(&directory)
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = entry.path();
            let name = entry.file_name();
            let own = matches!(
                name.to_str().unwrap_or(""),
                "pts"
                    | "shm"
                    | "fd"
                    | "mqueue"
                    | ".lxc"
                    | ".lxd-mounts"
                    | ".udev"
                    | "console"
                    | "ptmx"
                    | "null"
                    | "zero"
                    | "full"
                    | "tty"
                    | "random"
                    | "urandom"
            );
            let Ok(kind) = entry.file_type() else {
                continue;
            };
            if own || kind.is_symlink() {
                continue;
            }
            if kind.is_dir() {
                pending.push(path);
            } else {
                found.push((path.to_string_lossy().into_owned(), path));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::config::ContainerConfig;

    fn record() -> Record {
        Record {
            config: ContainerConfig {
                cmd: Some(vec!["true".to_owned()].into()),
                hostname: "h".into(),
                ..Default::default()
            },
            host: HostConfig {
                shm_size: 64 << 20,
                ..Default::default()
            },
            ..Default::default()
        }
    }

    fn around(directory: &Path) -> Surroundings<'_> {
        Surroundings {
            user: User {
                home: "/root".into(),
                ..Default::default()
            },
            directory,
            cgroup: "berth/x",
            mounts: Vec::new(),
            pid_of: None,
            ipc_of: None,
            network_of: None,
            own_network: true,
            init_program: None,
        }
    }

    #[test]
    fn a_spec_is_what_the_specification_wants() {
        let directory = tempfile::tempdir().unwrap();
        let mut plain = record();
        plain.host.resources.memory = 64 << 20;
        for privileged in [false, true] {
            plain.host.privileged = privileged;
            let spec = build(&plain, around(directory.path())).unwrap();
            serde_json::from_value::<oci_spec::runtime::Spec>(spec.clone()).unwrap();
            assert_eq!(spec["linux"]["seccomp"].is_null(), privileged);
            assert_eq!(spec["linux"]["maskedPaths"].is_null(), privileged);
        }
    }

    #[test]
    fn another_user_starts_without_capabilities() {
        let directory = tempfile::tempdir().unwrap();
        let around = Surroundings {
            user: User {
                uid: 1000,
                ..Default::default()
            },
            ..around(directory.path())
        };
        let spec = build(&record(), around).unwrap();
        assert_eq!(spec["process"]["capabilities"]["effective"], json!([]));
        assert!(
            !spec["process"]["capabilities"]["bounding"]
                .as_array()
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn dockers_seccomp_profiles_are_read() {
        let profile = r#"{"defaultAction":"SCMP_ACT_ERRNO","archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86"]}],
            "syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","args":null,"comment":"","includes":{},"excludes":{}}]}"#;
        let host = HostConfig {
            security_opt: Some(vec![format!("seccomp={profile}")]),
            ..Default::default()
        };
        let read = security(&host).unwrap().seccomp.unwrap().unwrap();
        assert_eq!(read["syscalls"][0]["names"][0], "read");
        let host = HostConfig {
            security_opt: Some(vec!["seccomp={".into()]),
            ..Default::default()
        };
        assert!(security(&host).is_err());
    }

    #[test]
    fn rules_of_a_profile_apply_by_capability_machine_and_kernel() {
        let profile: Value = serde_json::from_str(
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
            {"names":["mount"],"action":"SCMP_ACT_ERRNO","excludes":{"caps":["CAP_SYS_ADMIN"]}},
            {"names":["bpf"],"action":"SCMP_ACT_ERRNO","includes":{"caps":["CAP_BPF"]}},
            {"names":["ptrace"],"action":"SCMP_ACT_ERRNO","includes":{"minKernel":"99.1"}},
            {"names":["clone3"],"action":"SCMP_ACT_ERRNO","includes":{"minKernel":"4.8"}},
            {"names":["s390_runtime_instr"],"action":"SCMP_ACT_ERRNO","includes":{"arches":["s390x"]}}]}"#,
        )
        .unwrap();
        let names = |set: &[&str]| -> Vec<String> {
            let picked = resolved(&profile, set, (6, 1)).unwrap();
            let rules = picked["syscalls"].as_array().unwrap();
            rules
                .iter()
                .map(|rule| rule["names"][0].as_str().unwrap().to_owned())
                .collect()
        };
        assert_eq!(names(&[]), ["mount", "clone3"]);
        assert_eq!(names(&["CAP_SYS_ADMIN", "CAP_BPF"]), ["bpf", "clone3"]);
    }
}
