//! Limits: what is refused, and how the rest is written in an OCI spec.

use serde_json::{Map, Value, json};

use crate::container::host_config::{Resources, ThrottleDevice};
use crate::error::{Error, Result};

/// The least memory a container can be given, bytes, as dockerd has it.
const LEAST_MEMORY: i64 = 6 << 20;

fn invalid<T>(text: impl Into<String>) -> Result<T> {
    Err(Error::Invalid(text.into()))
}

/// Checks limits in dockerd's words; answers warnings.
///
/// # Errors
/// [`Error::Invalid`] for what contradicts itself, [`Error::Capacity`] for more CPUs than the host has.
pub(crate) fn check(resources: &Resources) -> Result<Vec<String>> {
    let r = resources;
    let mut warnings = Vec::new();
    if r.memory < 0 || (r.memory > 0 && r.memory < LEAST_MEMORY) {
        return invalid("Minimum memory limit allowed is 6MB");
    }
    if r.memory > 0 && r.memory_swap > 0 && r.memory_swap < r.memory {
        return invalid("Minimum memoryswap limit should be larger than memory limit, see usage");
    }
    if r.memory == 0 && r.memory_swap > 0 {
        return invalid(
            "You should always set the Memory limit when using Memoryswap limit, see usage",
        );
    }
    if r.memory_swap < -1 {
        return invalid("Invalid memory-swap: -1 is no limit");
    }
    if let Some(swappiness) = r.memory_swappiness
        && !(-1..=100).contains(&swappiness)
    {
        return invalid(format!(
            "Invalid value: {swappiness}, valid memory swappiness range is 0-100"
        ));
    }
    if r.memory_reservation < 0 || (r.memory_reservation > 0 && r.memory_reservation < LEAST_MEMORY)
    {
        return invalid("Minimum memory reservation allowed is 6MB");
    }
    if r.memory > 0 && r.memory_reservation > 0 && r.memory < r.memory_reservation {
        return invalid(
            "Minimum memory limit can not be less than memory reservation limit, see usage",
        );
    }
    let cpus = std::thread::available_parallelism().map_or(1, usize::from) as i64;
    if r.nano_cpus != 0 {
        if r.cpu_period > 0 || r.cpu_quota > 0 {
            return invalid(
                "Conflicting options: Nano CPUs and CPU Period or Quota cannot both be set",
            );
        }
        if r.nano_cpus < 0 || r.nano_cpus > host_cpus().max(cpus) * 1_000_000_000 {
            return invalid(format!(
                "range of CPUs is from 0.01 to {0}.00, as there are only {0} CPUs available",
                host_cpus().max(cpus)
            ));
        }
    }
    if r.cpu_period != 0 && !(1_000..=1_000_000).contains(&r.cpu_period) {
        return invalid(
            "CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)",
        );
    }
    if r.cpu_quota > 0 && r.cpu_quota < 1_000 {
        return invalid("CPU cfs quota can not be less than 1ms (i.e. 1000)");
    }
    if r.cpu_shares < 0 {
        return invalid(format!(
            "invalid CPU shares ({}): value must be a positive integer",
            r.cpu_shares
        ));
    }
    for (name, set) in [
        ("cpuset-cpus", &r.cpuset_cpus),
        ("cpuset-mems", &r.cpuset_mems),
    ] {
        if !is_set(set) {
            return invalid(format!("Invalid value {set} for {name}"));
        }
    }
    if let Some(highest) = highest(&r.cpuset_cpus)
        && highest >= host_cpus().max(cpus)
    {
        return invalid(format!(
            "Requested CPUs are not available - requested {}, available: 0-{}",
            r.cpuset_cpus,
            host_cpus().max(cpus) - 1
        ));
    }
    if let Some(wanted) = highest(&r.cpuset_mems) {
        let online = std::fs::read_to_string("/sys/devices/system/node/online");
        let available = online.map_or_else(|_| "0".to_owned(), |text| text.trim().to_owned());
        if highest(&available).is_some_and(|last| wanted > last) {
            return invalid(format!(
                "Requested memory nodes are not available - requested {}, available: {available}",
                r.cpuset_mems
            ));
        }
    }
    if r.blkio_weight > 0 && !(10..=1000).contains(&r.blkio_weight) {
        return invalid("Range of blkio weight is from 10 to 1000");
    }
    if r.pids_limit.is_some_and(|limit| limit < -1) {
        return invalid("Invalid pids limit: -1 is no limit");
    }
    if r.oom_kill_disable == Some(true) {
        if r.memory == 0 {
            warnings.push("OOM killer is disabled for the container, but no memory limit is set, this can result in the system running out of resources.".to_owned());
        }
        if is_unified() {
            warnings.push(
                "Your kernel does not support OomKillDisable. OomKillDisable discarded.".to_owned(),
            );
        }
    }
    for limit in r.ulimits.iter().flatten() {
        if rlimit(&limit.name).is_none() {
            return invalid(format!("invalid ulimit type: {}", limit.name));
        }
        if limit.hard != -1 && limit.soft > limit.hard {
            return invalid(format!(
                "ulimit soft limit must be less than or equal to hard limit: {} > {}",
                limit.soft, limit.hard
            ));
        }
    }
    for rule in r.device_cgroup_rules.iter().flatten() {
        device_rule(rule)?;
    }
    if r.device_requests
        .as_ref()
        .is_some_and(|requests| !requests.is_empty())
    {
        return Err(Error::Invalid(
            "could not select device driver: device requests (GPUs) are not served by this engine"
                .into(),
        ));
    }
    Ok(warnings)
}

fn host_cpus() -> i64 {
    std::fs::read_to_string("/sys/devices/system/cpu/online")
        .ok()
        .and_then(|text| highest(text.trim()))
        .unwrap_or(0)
        + 1
}

fn is_set(text: &str) -> bool {
    text.is_empty()
        || text.split(',').all(|part| {
            let number = |text: &str| text.parse::<u32>().ok();
            match part.split_once('-') {
                Some((first, last)) => {
                    matches!((number(first), number(last)), (Some(a), Some(b)) if a <= b)
                }
                None => number(part).is_some(),
            }
        })
}

fn highest(text: &str) -> Option<i64> {
    text.split([',', '-'])
        .filter_map(|part| part.parse().ok())
        .max()
}

fn rlimit(name: &str) -> Option<String> {
    const NAMES: [&str; 15] = [
        "core",
        "cpu",
        "data",
        "fsize",
        "locks",
        "memlock",
        "msgqueue",
        "nice",
        "nofile",
        "nproc",
        "rss",
        "rtprio",
        "rttime",
        "sigpending",
        "stack",
    ];
    NAMES
        .contains(&name)
        .then(|| format!("RLIMIT_{}", name.to_ascii_uppercase()))
}

/// The `rlimits` of an OCI process.
pub(crate) fn rlimits(resources: &Resources) -> Vec<Value> {
    let bound = |value: i64| u64::try_from(value).unwrap_or(u64::MAX);
    let ulimits = resources.ulimits.iter().flatten();
    ulimits
        .filter_map(|limit| {
            Some(json!({ "type": rlimit(&limit.name)?, "hard": bound(limit.hard), "soft": bound(limit.soft) }))
        })
        .collect()
}

/// Whether this host has one cgroup tree (v2) only.
pub(crate) fn is_unified() -> bool {
    std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// One line of the devices cgroup, `c 1:3 rwm`, as the OCI spec writes it.
pub(crate) fn device_rule(rule: &str) -> Result<Value> {
    let wrong = || Error::Invalid(format!("invalid device cgroup rule format: '{rule}'"));
    let mut words = rule.split_ascii_whitespace();
    let (Some(kind), Some(numbers), Some(access), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(wrong());
    };
    if !matches!(kind, "a" | "b" | "c")
        || access.is_empty()
        || !access.bytes().all(|b| b"rwm".contains(&b))
    {
        return Err(wrong());
    }
    let (major, minor) = numbers.split_once(':').ok_or_else(wrong)?;
    let mut value = json!({ "allow": true, "type": kind, "access": access });
    for (key, number) in [("major", major), ("minor", minor)] {
        if number != "*" {
            value[key] = json!(number.parse::<u32>().map_err(|_| wrong())?);
        }
    }
    Ok(value)
}

/// The `linux.resources` of an OCI spec, without devices. What is 0 is left out.
///
/// # Errors
/// [`Error::Invalid`] for a device that is none.
pub(crate) fn oci(resources: &Resources) -> Result<Map<String, Value>> {
    let r = resources;
    let mut out = Map::new();
    let mut memory = Map::new();
    if r.memory > 0 {
        memory.insert("limit".into(), json!(r.memory));
        // As dockerd: twice the memory where nothing is said.
        let swap = if r.memory_swap == 0 {
            r.memory.saturating_mul(2)
        } else {
            r.memory_swap
        };
        memory.insert("swap".into(), json!(swap));
    }
    if r.memory_reservation > 0 {
        memory.insert("reservation".into(), json!(r.memory_reservation));
    }
    if let Some(swappiness) = r.memory_swappiness.filter(|s| *s >= 0)
        && !is_unified()
    {
        memory.insert("swappiness".into(), json!(swappiness));
    }
    if r.oom_kill_disable == Some(true) && !is_unified() {
        memory.insert("disableOOMKiller".into(), json!(true));
    }
    put(&mut out, "memory", memory);
    let mut cpu = Map::new();
    let (mut period, mut quota) = (r.cpu_period, r.cpu_quota);
    if r.nano_cpus > 0 {
        period = 100_000;
        quota = r.nano_cpus * period / 1_000_000_000;
    }
    for (key, value) in [
        ("shares", r.cpu_shares),
        ("period", period),
        ("quota", quota),
        ("realtimePeriod", r.cpu_realtime_period),
        ("realtimeRuntime", r.cpu_realtime_runtime),
    ] {
        if value > 0 || (key == "quota" && value == -1) {
            cpu.insert(key.into(), json!(value));
        }
    }
    for (key, value) in [("cpus", &r.cpuset_cpus), ("mems", &r.cpuset_mems)] {
        if !value.is_empty() {
            cpu.insert(key.into(), json!(value));
        }
    }
    put(&mut out, "cpu", cpu);
    if let Some(limit) = r.pids_limit.filter(|limit| *limit > 0) {
        out.insert("pids".into(), json!({ "limit": limit }));
    }
    let mut block = Map::new();
    if r.blkio_weight > 0 {
        block.insert("weight".into(), json!(r.blkio_weight));
    }
    let mut weights = Vec::new();
    for device in r.blkio_weight_device.iter().flatten() {
        let (major, minor) = device_numbers(&device.path)?;
        weights.push(json!({ "major": major, "minor": minor, "weight": device.weight }));
    }
    if !weights.is_empty() {
        block.insert("weightDevice".into(), json!(weights));
    }
    let throttles: [(&str, &Option<Vec<ThrottleDevice>>); 4] = [
        ("throttleReadBpsDevice", &r.blkio_device_read_bps),
        ("throttleWriteBpsDevice", &r.blkio_device_write_bps),
        ("throttleReadIOPSDevice", &r.blkio_device_read_iops),
        ("throttleWriteIOPSDevice", &r.blkio_device_write_iops),
    ];
    for (key, devices) in throttles {
        let mut list = Vec::new();
        for device in devices.iter().flatten() {
            let (major, minor) = device_numbers(&device.path)?;
            list.push(json!({ "major": major, "minor": minor, "rate": device.rate }));
        }
        if !list.is_empty() {
            block.insert(key.into(), json!(list));
        }
    }
    put(&mut out, "blockIO", block);
    Ok(out)
}

fn put(out: &mut Map<String, Value>, key: &str, value: Map<String, Value>) {
    if !value.is_empty() {
        out.insert(key.into(), Value::Object(value));
    }
}

fn device_numbers(path: &str) -> Result<(u32, u32)> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let metadata =
        std::fs::metadata(path).map_err(|error| Error::Invalid(format!("{path}: {error}")))?;
    if !metadata.file_type().is_block_device() {
        return invalid(format!("{path} is not a block device"));
    }
    Ok((
        rustix::fs::major(metadata.rdev()),
        rustix::fs::minor(metadata.rdev()),
    ))
}

/// Takes over what an update says; zeros stay as they were.
///
/// # Errors
/// [`Error::Conflict`] where CPUs and period would both stand.
pub(crate) fn merge(old: &Resources, new: &Resources) -> Result<Resources> {
    let mut out = old.clone();
    if new.nano_cpus > 0 && (old.cpu_period > 0 || old.cpu_quota > 0) {
        return Err(Error::Conflict(
            "Conflicting options: Nano CPUs cannot be updated as CPU Period or Quota has already been set".into(),
        ));
    }
    if (new.cpu_period > 0 || new.cpu_quota > 0) && old.nano_cpus > 0 {
        return Err(Error::Conflict(
            "Conflicting options: CPU Period or Quota cannot be updated as NanoCPUs has already been set".into(),
        ));
    }
    macro_rules! take {
        ($($field:ident),*) => { $( replace(&mut out.$field, &new.$field); )* };
    }
    take!(
        cpu_shares,
        memory,
        nano_cpus,
        blkio_weight,
        cpu_period,
        cpu_quota,
        cpu_realtime_period,
        cpu_realtime_runtime,
        cpuset_cpus,
        cpuset_mems,
        memory_reservation,
        memory_swap,
        memory_swappiness,
        pids_limit
    );
    if new.memory > 0 && new.memory_swap == 0 && old.memory_swap > 0 && new.memory > old.memory_swap
    {
        return Err(Error::Conflict(
            "Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time".into(),
        ));
    }
    Ok(out)
}

fn replace<T: Default + PartialEq + Clone>(old: &mut T, new: &T) {
    if *new != T::default() {
        *old = new.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::host_config::Ulimit;

    #[test]
    fn contradictions_are_refused_in_dockerds_words() {
        let says = |resources: Resources, part: &str| {
            let text = check(&resources).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        };
        says(
            Resources {
                memory: 1 << 20,
                ..Default::default()
            },
            "Minimum memory limit",
        );
        says(
            Resources {
                memory: 64 << 20,
                memory_swap: 32 << 20,
                ..Default::default()
            },
            "memoryswap",
        );
        says(
            Resources {
                nano_cpus: 1 << 60,
                ..Default::default()
            },
            "range of CPUs",
        );
        says(
            Resources {
                cpuset_cpus: "0-x".into(),
                ..Default::default()
            },
            "cpuset-cpus",
        );
        let ulimits = Some(vec![Ulimit {
            name: "nofile".into(),
            hard: 1,
            soft: 2,
        }]);
        says(
            Resources {
                ulimits,
                ..Default::default()
            },
            "ulimit soft limit",
        );
        says(
            Resources {
                device_cgroup_rules: Some(vec!["c 1".into()]),
                ..Default::default()
            },
            "device cgroup rule",
        );
    }

    #[test]
    fn half_a_cpu_is_a_quota() {
        let map = oci(&Resources {
            nano_cpus: 500_000_000,
            memory: 64 << 20,
            ..Default::default()
        })
        .unwrap();
        assert_eq!(map["cpu"]["quota"], 50_000);
        assert_eq!(map["memory"]["swap"], 128 << 20);
        let typed: std::result::Result<oci_spec::runtime::LinuxResources, _> =
            serde_json::from_value(Value::Object(map));
        assert!(typed.is_ok());
    }
}
