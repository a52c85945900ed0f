//! The systemd driver: a transient scope that holds the container's processes (systemd.scope(5)).
//!
//! The manager is asked through `busctl`, which every systemd brings with it.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::{Cgroup, Hierarchies, unified_path_of};
use crate::error::{Context, Error, Result};

/// Starts the scope with `pid` in it and returns its cgroup once the process is there.
pub(super) fn start(slice: &str, prefix: &str, name: &str, pid: i32) -> Result<Cgroup> {
    if !Path::new("/run/systemd/system").is_dir() {
        return Err(Error::unsupported(
            "--systemd-cgroup: systemd does not run on this host: leave the flag away to use cgroupfs",
        ));
    }
    let hierarchies = Hierarchies::of_host()?;
    let unit = unit_name(prefix, name);
    let slice = if slice.is_empty() {
        "system.slice"
    } else {
        slice
    };
    let before = unified_path_of(pid);
    let output = Command::new("busctl")
        .args([
            "--system",
            "--quiet",
            "call",
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
        ])
        .args([
            "org.freedesktop.systemd1.Manager",
            "StartTransientUnit",
            "ssa(sv)a(sa(sv))",
            &unit,
            "replace",
            "5",
        ])
        .args(["Description", "s", &format!("container {name}")])
        .args(["Slice", "s", slice])
        .args(["Delegate", "b", "true"])
        .args(["DefaultDependencies", "b", "false"])
        .args(["PIDs", "au", "1", &pid.to_string(), "0"])
        .output()
        .during(|| "run busctl, to ask systemd for a scope".into())?;
    if !output.status.success() {
        return Err(Error::unsupported(format!(
            "systemd refused the scope {unit}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
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

/// Lets systemd forget a scope whose processes have ended.
pub(super) fn stop(unit: &str) {
    // A scope ends by itself when it is empty: this only clears a failed one.
    let _ = Command::new("busctl")
        .args([
            "--system",
            "--quiet",
            "call",
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
        ])
        .args([
            "org.freedesktop.systemd1.Manager",
            "ResetFailedUnit",
            "s",
            unit,
        ])
        .output();
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
}
