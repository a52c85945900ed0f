//! Bundles: `config.json` read once, and checked before anything is made.

use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use crate::cgroup::{CgroupTarget, rdt};
use crate::error::{Context, Error, Result};
use crate::{mount, netdevice, process, seccomp};

/// A bundle's configuration with the bytes it came from.
pub struct Bundle {
    pub directory: PathBuf,
    pub spec: Spec,
    /// `config.json` as it was, kept in the container's state.
    pub raw: Vec<u8>,
}

/// Reads and checks the bundle in `directory`.
///
/// # Errors
/// [`Error::Json`] with the place where the JSON is broken, [`Error::Invalid`] naming the field that cannot be.
pub fn load(directory: &Path) -> Result<Bundle> {
    let directory =
        fs::canonicalize(directory).during(|| format!("the bundle {}", directory.display()))?;
    let path = directory.join("config.json");
    let raw = fs::read(&path).during(|| format!("read {}", path.display()))?;
    let spec = parse(&raw, &path)?;
    validate(&spec)?;
    Ok(Bundle {
        directory,
        spec,
        raw,
    })
}

/// Parses a configuration; `path` is for the error alone.
///
/// # Errors
/// [`Error::Json`].
pub fn parse(raw: &[u8], path: &Path) -> Result<Spec> {
    serde_json::from_slice(raw).map_err(|source| Error::Json {
        path: path.to_owned(),
        source,
    })
}

/// Entry of the fuzz target: any bytes are a configuration or an error, and so is each part of it that is read before
/// anything is made.
pub fn fuzz_config(data: &[u8]) {
    let Ok(spec) = parse(data, Path::new("config.json")) else {
        return;
    };
    let _ = validate(&spec);
    let _ = root(&spec, Path::new("/bundle"));
    for mount in spec.mounts().iter().flatten() {
        let _ = mount::parse_options(mount);
        let _ = mount::idmap_ranges(mount, (&[], &[]));
        let _ = mount::bind_source(mount, Path::new("/bundle"));
    }
    for systemd in [false, true] {
        let _ = CgroupTarget::of(&spec, "id", systemd);
    }
    if let Some(process) = spec.process() {
        let _ = process::arguments(process);
        let _ = process::environment(process, 1);
    }
    let profile = spec.linux().as_ref().and_then(|it| it.seccomp().as_ref());
    if let Some(profile) = profile {
        let _ = seccomp::compile(profile);
    }
}

/// The container's root directory.
///
/// # Errors
/// [`Error::Invalid`] where `root` is missing.
pub fn root(spec: &Spec, directory: &Path) -> Result<PathBuf> {
    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| Error::invalid("config.json: root is missing"))?;
    if root.path().as_os_str().is_empty() {
        return Err(Error::invalid("config.json: root.path is empty"));
    }
    Ok(directory.join(root.path()))
}

/// What can be told wrong from the configuration alone.
///
/// # Errors
/// [`Error::Invalid`] naming the field.
pub fn validate(spec: &Spec) -> Result<()> {
    let version = spec.version();
    if !version.is_empty() && !version.starts_with("1.") {
        return Err(Error::invalid(format!(
            "config.json: ociVersion {version:?} is not supported: 1.x is"
        )));
    }
    let linux = spec
        .linux()
        .as_ref()
        .ok_or_else(|| Error::invalid("config.json: linux is missing"))?;
    let names: Vec<LinuxNamespaceType> = linux
        .namespaces()
        .iter()
        .flatten()
        .map(|entry| entry.typ())
        .collect();
    let has = |kind: LinuxNamespaceType| names.contains(&kind);
    if !has(LinuxNamespaceType::Mount) {
        return Err(Error::invalid(
            "config.json: linux.namespaces must hold a mount namespace",
        ));
    }
    let own_uts = has(LinuxNamespaceType::Uts);
    if !own_uts
        && spec
            .hostname()
            .as_ref()
            .is_some_and(|name| !name.is_empty())
    {
        return Err(Error::invalid(
            "config.json: hostname is set without a uts namespace",
        ));
    }
    if !own_uts
        && spec
            .domainname()
            .as_ref()
            .is_some_and(|name| !name.is_empty())
    {
        return Err(Error::invalid(
            "config.json: domainname is set without a uts namespace",
        ));
    }
    for mount in spec.mounts().iter().flatten() {
        let destination = mount.destination();
        if destination.as_os_str().is_empty() || destination == Path::new("/") {
            return Err(Error::invalid(
                "config.json: a mount's destination must be a path below /",
            ));
        }
    }
    for (name, _) in linux.sysctl().iter().flatten() {
        let allowed = sysctl_namespace(name).is_some_and(|kind| match kind {
            LinuxNamespaceType::Uts => own_uts && name != "kernel.hostname",
            kind => has(kind),
        });
        if !allowed {
            return Err(Error::invalid(format!(
                "config.json: sysctl {name:?} is not of a namespace of this container: it would change the host"
            )));
        }
    }
    for path in linux
        .masked_paths()
        .iter()
        .chain(linux.readonly_paths())
        .flatten()
    {
        if !path.starts_with('/') {
            return Err(Error::invalid(format!(
                "config.json: masked or read-only path {path:?} is not absolute"
            )));
        }
    }
    if let Some(config) = linux.intel_rdt() {
        rdt::validate(config)?;
    }
    if let Some(devices) = linux.net_devices().as_ref().filter(|map| !map.is_empty()) {
        if !has(LinuxNamespaceType::Network) {
            return Err(Error::invalid(
                "config.json: linux.netDevices without a network namespace to move them into",
            ));
        }
        netdevice::validate(devices)?;
    }
    if let Some(process) = spec.process() {
        validate_process(process)?;
    }
    Ok(())
}

/// As [`validate`], for a process alone.
///
/// # Errors
/// [`Error::Invalid`] naming the field.
pub fn validate_process(process: &Process) -> Result<()> {
    if !process.cwd().is_absolute() {
        return Err(Error::invalid(format!(
            "config.json: process.cwd {:?} is not an absolute path",
            process.cwd().display()
        )));
    }
    if process.args().as_ref().is_none_or(|args| args.is_empty()) {
        return Err(Error::invalid(
            "config.json: process.args must not be empty",
        ));
    }
    Ok(())
}

/// Which namespace a kernel parameter belongs to.
fn sysctl_namespace(name: &str) -> Option<LinuxNamespaceType> {
    const IPC: [&str; 9] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
        "kernel.auto_msgmni",
    ];
    let dotted = name.replace('/', ".");
    if dotted.contains("..") {
        return None;
    }
    if IPC.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.") {
        return Some(LinuxNamespaceType::Ipc);
    }
    if dotted.starts_with("net.") {
        return Some(LinuxNamespaceType::Network);
    }
    matches!(dotted.as_str(), "kernel.domainname" | "kernel.hostname")
        .then_some(LinuxNamespaceType::Uts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn check(json: &str) -> String {
        match validate(&parse(json.as_bytes(), Path::new("config.json")).unwrap()) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_parameter_of_the_host_is_refused() {
        let with = |name: &str| {
            check(&format!(
                r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{{"type":"mount"}},{{"type":"ipc"}}],"sysctl":{{"{name}":"1"}}}}}}"#
            ))
        };
        assert_eq!(with("kernel.shmmax"), "");
        assert!(with("kernel.panic").contains("would change the host"));
        assert!(with("net.ipv4.ip_forward").contains("would change the host"));
        assert!(with("kernel.shm/../panic").contains("would change the host"));
    }

    #[test]
    fn errors_name_the_field() {
        assert!(check(r#"{"ociVersion":"2.0.0"}"#).contains("ociVersion"));
        assert!(check(r#"{"ociVersion":"1.0.0"}"#).contains("linux is missing"));
        let hostname =
            r#"{"ociVersion":"1.0.0","hostname":"x","linux":{"namespaces":[{"type":"mount"}]}}"#;
        assert!(check(hostname).contains("uts"));
        let cwd = r#"{"ociVersion":"1.0.0","process":{"user":{"uid":0,"gid":0},"cwd":"x","args":["a"]},"linux":{"namespaces":[{"type":"mount"}]}}"#;
        assert!(check(cwd).contains("cwd"));
    }

    /// A configuration with something of everything.
    fn rich() -> Value {
        json!({
            "ociVersion": "1.2.0", "hostname": "h",
            "process": {"user": {"uid": 1, "gid": 2, "additionalGids": [3]}, "cwd": "/", "args": ["a", "b"], "env": ["PATH=/bin", "X"],
                "capabilities": {"bounding": ["CAP_KILL"]}, "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2}],
                "scheduler": {"policy": "SCHED_BATCH", "nice": 1}, "oomScoreAdj": 5, "consoleSize": {"height": 1, "width": 2}},
            "root": {"path": "rootfs", "readonly": true},
            "mounts": [{"destination": "/a", "type": "bind", "source": "b", "options": ["rbind", "rro", "size=1"],
                "uidMappings": [{"containerID": 0, "hostID": 1, "size": 2}]}],
            "hooks": {"poststop": [{"path": "/x", "args": ["x"], "timeout": 1}]},
            "annotations": {"a": "b"},
            "linux": {"namespaces": [{"type": "mount"}, {"type": "network"}, {"type": "uts", "path": "/x"}], "cgroupsPath": "a:b:c",
                "sysctl": {"net.a.b": "1"}, "netDevices": {"eth9": {"name": "eth%d"}}, "maskedPaths": ["/m"],
                "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 2, "fileMode": 438}],
                "resources": {"memory": {"limit": 1}, "devices": [{"allow": false, "access": "rwm"}]},
                "memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0-1"}, "timeOffsets": {"monotonic": {"secs": 1}},
                "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64"],
                    "syscalls": [{"names": ["read", "clone"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_MASKED_EQ"}]}]}}
        })
    }

    /// Replaces the `at`th value of a tree, counted in order.
    fn replace(tree: &mut Value, at: &mut usize, with: &Value) {
        if *at == 0 {
            *tree = with.clone();
        }
        *at = at.wrapping_sub(1);
        match tree {
            Value::Array(list) => list.iter_mut().for_each(|item| replace(item, at, with)),
            Value::Object(map) => map.values_mut().for_each(|item| replace(item, at, with)),
            _ => {}
        }
    }

    #[test]
    fn the_rich_configuration_is_read_whole() {
        let spec = parse(rich().to_string().as_bytes(), Path::new("config.json")).unwrap();
        let _ = validate(&spec);
        assert!(
            seccomp::compile(spec.linux().as_ref().unwrap().seccomp().as_ref().unwrap()).is_ok()
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn no_field_panics(places in proptest::collection::vec((0usize..140, prop_oneof![
            any::<i64>().prop_map(Value::from), any::<u64>().prop_map(Value::from), any::<f64>().prop_map(Value::from),
            ".{0,12}".prop_map(Value::from), "[/.:%a0-9-]{0,20}".prop_map(Value::from), Just(Value::Null), Just(json!([])), Just(json!({})),
            any::<bool>().prop_map(Value::from), Just(json!([""])), Just(json!({"": ""})), Just(json!(u32::MAX)),
        ]), 1..4)) {
            let mut tree = rich();
            for (mut at, with) in places {
                replace(&mut tree, &mut at, &with);
            }
            fuzz_config(tree.to_string().as_bytes());
        }

        #[test]
        fn no_bytes_panic(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            fuzz_config(&data);
        }
    }
}
