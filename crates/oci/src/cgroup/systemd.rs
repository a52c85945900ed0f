//! The systemd driver: a transient scope that holds the container's processes (systemd.scope(5)).
//!
//! The manager is asked through `busctl`, which every systemd brings with it. Limits are told to the manager as well as
//! written to the cgroup: it writes what it knows of a unit anew whenever it likes (`daemon-reload`).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;

use super::resources::{swap_v2, weight_of_shares};
use super::{Cgroup, Hierarchies, unified_path_of};
use crate::error::{Context, Error, Result};

/// A unit's property: its name, its D-Bus signature, and its value in the words of busctl(1).
type Property = (&'static str, &'static str, Vec<String>);

/// Starts the scope with `pid` in it and returns its cgroup once the process is there.
pub(super) fn start(
    slice: &str,
    prefix: &str,
    name: &str,
    pid: i32,
    limits: Option<&LinuxResources>,
    hierarchies: &Hierarchies,
) -> Result<Cgroup> {
    if !Path::new("/run/systemd/system").is_dir() {
        return Err(Error::unsupported(
            "--systemd-cgroup: systemd does not run on this host: leave the flag away to use cgroupfs",
        ));
    }
    let unit = unit_name(prefix, name);
    let slice = if slice.is_empty() {
        "system.slice"
    } else {
        slice
    };
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
    let mut properties: Vec<Property> = vec![
        ("Description", "s", words(&[&format!("container {name}")])),
        ("Slice", "s", words(&[slice])),
        ("Delegate", "b", words(&["true"])),
        ("DefaultDependencies", "b", words(&["false"])),
        // Nobody looks at it after its end.
        ("CollectMode", "s", words(&["inactive-or-failed"])),
        ("PIDs", "au", words(&["1", &pid.to_string()])),
    ];
    if limits.is_none_or(|limits| limits.pids().is_none()) {
        // The manager's own default is a share of the host's.
        properties.push(("TasksMax", "t", words(&[&u64::MAX.to_string()])));
    }
    if let Some(limits) = limits {
        properties.extend(of_limits(limits, hierarchies.is_v2())?);
    }
    let before = unified_path_of(pid);
    let mut arguments: Vec<String> = words(&["StartTransientUnit", "ssa(sv)a(sa(sv))", &unit]);
    arguments.push("replace".into());
    add(&mut arguments, properties);
    arguments.push("0".into());
    call(&arguments, || format!("start the scope {unit}"))?;
    // The call returns when the job is queued: it is done when the process has moved.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let now = unified_path_of(pid).filter(|path| path.ends_with(&unit));
        if let Some(path) = now.filter(|path| Some(path) != before.as_ref()) {
            let mut cgroup = Cgroup {
                path: path.clone(),
                unit: Some(unit),
                ..Cgroup::default()
            };
            cgroup.unified = hierarchies
                .unified
                .as_ref()
                .map(|root| root.join(path.trim_start_matches('/')));
            return Ok(cgroup);
        }
        if Instant::now() > deadline {
            return Err(Error::Conflict(format!(
                "systemd did not start the scope {unit} within 10 s: see journalctl -u {unit}"
            )));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Tells the manager new limits.
pub(super) fn update(unit: &str, limits: &LinuxResources, v2: bool) -> Result<()> {
    let properties = of_limits(limits, v2)?;
    if properties.is_empty() {
        return Ok(());
    }
    // For as long as the unit runs, which is all a transient unit has.
    let mut arguments: Vec<String> = ["SetUnitProperties", "sba(sv)", unit, "true"]
        .map(str::to_owned)
        .to_vec();
    add(&mut arguments, properties);
    call(&arguments, || format!("change the limits of {unit}"))
}

/// Waits until systemd has ended a scope whose processes have ended, which it does by itself when it sees them gone, and
/// asks for that where it does not.
pub(super) fn stop(unit: &str, directories: &[&PathBuf]) {
    if !gone(directories, Duration::from_secs(2)) {
        let arguments = ["StopUnit", "ss", unit, "replace"].map(str::to_owned);
        let _ = call(&arguments, || format!("stop {unit}"));
        gone(directories, Duration::from_secs(5));
    }
}

fn gone(directories: &[&PathBuf], patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_micros(200);
    while directories.iter().any(|directory| directory.exists()) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    true
}

/// Calls a method of the manager.
fn call(arguments: &[String], what: impl FnOnce() -> String) -> Result<()> {
    let output = Command::new("busctl")
        .args([
            "--system",
            "--quiet",
            "call",
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
            "org.freedesktop.systemd1.Manager",
        ])
        .args(arguments)
        .output()
        .during(|| "run busctl, to ask systemd (is dbus installed?)".into())?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::unsupported(format!(
        "systemd refused to {}: {}",
        what(),
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}

/// An array of properties as arguments of busctl(1).
fn add(arguments: &mut Vec<String>, properties: Vec<Property>) {
    arguments.push(properties.len().to_string());
    for (name, signature, value) in properties {
        arguments.push(name.into());
        arguments.push(signature.into());
        arguments.extend(value);
    }
}

/// The limits that systemd knows, as systemd.resource-control(5) names them.
fn of_limits(limits: &LinuxResources, v2: bool) -> Result<Vec<Property>> {
    let mut properties: Vec<Property> = Vec::new();
    // Negative is "no limit", which D-Bus writes as the largest number.
    let mut number = |name: &'static str, value: i64| {
        let value = u64::try_from(value).unwrap_or(u64::MAX);
        properties.push((name, "t", vec![value.to_string()]));
    };
    if let Some(memory) = limits.memory() {
        let limit = memory.limit().filter(|limit| *limit != 0);
        if let Some(limit) = limit {
            number(if v2 { "MemoryMax" } else { "MemoryLimit" }, limit);
        }
        if v2 {
            if let Some(swap) = swap_v2(memory.swap().unwrap_or(0), limit.unwrap_or(0))? {
                number("MemorySwapMax", swap);
            }
            if let Some(reservation) = memory.reservation().filter(|value| *value != 0) {
                number("MemoryLow", reservation);
            }
        }
    }
    if let Some(pids) = limits.pids() {
        number("TasksMax", if pids.limit() > 0 { pids.limit() } else { -1 });
    }
    if let Some(cpu) = limits.cpu() {
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            if v2 {
                number("CPUWeight", weight_of_shares(shares) as i64);
            } else {
                number("CPUShares", shares as i64);
            }
        }
        let period = cpu.period().filter(|period| *period != 0);
        if let Some(period) = period {
            number("CPUQuotaPeriodUSec", period as i64);
        }
        if let Some(quota) = cpu.quota().filter(|quota| *quota != 0) {
            let period = period.unwrap_or(100_000) as i64;
            let second = if quota > 0 {
                quota.saturating_mul(1_000_000) / period
            } else {
                -1
            };
            number("CPUQuotaPerSecUSec", second);
        }
        if v2 {
            for (name, set) in [
                ("AllowedCPUs", cpu.cpus()),
                ("AllowedMemoryNodes", cpu.mems()),
            ] {
                let Some(bytes) = set.as_deref().filter(|set| !set.is_empty()).map(mask) else {
                    continue;
                };
                let mut value = vec![bytes.len().to_string()];
                value.extend(bytes.iter().map(u8::to_string));
                properties.push((name, "ay", value));
            }
        }
    }
    if let Some(weight) = limits
        .block_io()
        .as_ref()
        .and_then(|block| block.weight())
        .filter(|weight| *weight != 0)
    {
        let weight = u64::from(weight);
        let (name, weight) = if v2 {
            ("IOWeight", super::resources::io_weight(weight))
        } else {
            ("BlockIOWeight", weight)
        };
        properties.push((name, "t", vec![weight.to_string()]));
    }
    Ok(properties)
}

/// A set as `0-2,5` as bits, the lowest first. What is no set is left to the kernel to refuse.
fn mask(set: &str) -> Vec<u8> {
    /// More than any kernel has.
    const MOST: usize = 1 << 16;
    let mut bytes = Vec::new();
    for part in set.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.trim().parse::<usize>(), last.trim().parse::<usize>())
        else {
            continue;
        };
        for bit in first..=last.min(MOST) {
            if bytes.len() <= bit / 8 {
                bytes.resize(bit / 8 + 1, 0);
            }
            bytes[bit / 8] |= 1 << (bit % 8);
        }
    }
    bytes
}

fn unit_name(prefix: &str, name: &str) -> String {
    if name.ends_with(".slice") || name.ends_with(".scope") {
        return name.to_owned();
    }
    if prefix.is_empty() {
        format!("{name}.scope")
    } else {
        format!("{prefix}-{name}.scope")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_is_named_by_prefix_and_name() {
        assert_eq!(unit_name("libpod", "abc"), "libpod-abc.scope");
        assert_eq!(unit_name("", "abc"), "abc.scope");
    }

    #[test]
    fn limits_are_properties_of_the_unit() {
        let limits: LinuxResources = serde_json::from_str(
            r#"{"memory":{"limit":1000,"swap":1500},"pids":{"limit":-1},
                "cpu":{"shares":1024,"quota":50000,"period":200000,"cpus":"0-1,9"},"blockIO":{"weight":10}}"#,
        )
        .unwrap();
        let mut arguments = Vec::new();
        add(&mut arguments, of_limits(&limits, true).unwrap());
        assert_eq!(
            arguments.join(" "),
            format!(
                "8 MemoryMax t 1000 MemorySwapMax t 500 TasksMax t {} CPUWeight t 39 CPUQuotaPeriodUSec t 200000 \
                 CPUQuotaPerSecUSec t 250000 AllowedCPUs ay 2 3 2 IOWeight t 1",
                u64::MAX
            )
        );
        let mut arguments = Vec::new();
        add(&mut arguments, of_limits(&limits, false).unwrap());
        assert!(arguments.join(" ").starts_with("6 MemoryLimit t 1000 "));
    }

    #[test]
    fn a_set_is_a_mask() {
        assert_eq!(mask("0"), [1]);
        assert_eq!(mask("3,8-10"), [8, 7]);
        assert!(mask("x").is_empty());
        assert!(mask("0-99999999999").len() <= 8193);
    }
}
