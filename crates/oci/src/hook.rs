//! Hooks (runtime-spec, config "POSIX-platform Hooks"): programs run at six points of a container's life, with
//! its state on stdin.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Hook, Spec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use crate::error::{Context, Error, Result};

/// The state a hook reads from its stdin (runtime-spec, "State").
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct HookState<'a> {
    pub oci_version: &'a str,
    pub id: &'a str,
    pub status: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    pub bundle: &'a Path,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub annotations: Option<&'a std::collections::HashMap<String, String>>,
}

impl<'a> HookState<'a> {
    pub fn new(
        spec: &'a Spec,
        id: &'a str,
        bundle: &'a Path,
        status: &'a str,
        pid: Option<i32>,
    ) -> HookState<'a> {
        HookState {
            oci_version: crate::OCI_VERSION,
            id,
            status,
            pid,
            bundle,
            annotations: spec.annotations().as_ref(),
        }
    }
}

/// Runs the hooks one after the other; the first failure ends it.
pub(crate) fn run_all(kind: &str, hooks: Option<&[Hook]>, state: &HookState<'_>) -> Result<()> {
    let hooks = hooks.unwrap_or_default();
    if hooks.is_empty() {
        return Ok(());
    }
    let state = serde_json::to_vec(state).map_err(|error| Error::invalid(error.to_string()))?;
    for (index, hook) in hooks.iter().enumerate() {
        run(hook, &state).map_err(|error| match error {
            Error::System { what, source } => Error::System {
                what: format!("error running {kind} hook #{index}: {what}"),
                source,
            },
            other => Error::invalid(format!("error running {kind} hook #{index}: {other}")),
        })?;
    }
    Ok(())
}

fn run(hook: &Hook, state: &[u8]) -> Result<()> {
    let path = hook.path();
    if !path.is_absolute() {
        return Err(Error::invalid(format!(
            "the hook's path {} is not absolute",
            path.display()
        )));
    }
    let mut command = Command::new(path);
    if let Some((name, rest)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(rest);
    }
    command.env_clear();
    for variable in hook.env().iter().flatten() {
        if let Some((name, value)) = variable.split_once('=') {
            command.env(name, value);
        }
    }
    // Files in memory, not pipes: a hook that reads nothing or writes much blocks neither itself nor us.
    let scratch = || -> std::io::Result<File> {
        Ok(rustix::fs::memfd_create("hook", rustix::fs::MemfdFlags::CLOEXEC)?.into())
    };
    let mut stdin = scratch().during(|| "memfd_create".into())?;
    stdin
        .write_all(state)
        .and_then(|()| stdin.rewind())
        .during(|| "write the state for a hook".into())?;
    let mut stderr = scratch().during(|| "memfd_create".into())?;
    let sink = stderr.try_clone().during(|| "dup".into())?;
    command.stdin(stdin).stdout(Stdio::null()).stderr(sink);
    let mut child = command
        .spawn()
        .during(|| format!("start {}", path.display()))?;
    drop(command);
    let deadline = hook
        .timeout()
        .filter(|seconds| *seconds > 0)
        .map(|seconds| Instant::now() + Duration::from_secs(seconds as u64));
    let mut said = Vec::new();
    if let Some(deadline) = deadline {
        let pidfd = base::pidfd::PidFd::open(child.id() as i32)
            .during(|| format!("watch {}", path.display()))?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
            match poll(&mut polled, Some(&timeout)) {
                Ok(0) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(Error::invalid(format!(
                        "{} did not end within {:?} seconds",
                        path.display(),
                        hook.timeout().unwrap_or(0)
                    )));
                }
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno).during(|| "poll".into()),
            }
        }
    }
    let status = child
        .wait()
        .during(|| format!("wait for {}", path.display()))?;
    if status.success() {
        return Ok(());
    }
    let _ = stderr.rewind();
    let _ = stderr.take(2048).read_to_end(&mut said);
    Err(Error::invalid(format!(
        "{} ended with {status}, stderr: {}",
        path.display(),
        String::from_utf8_lossy(&said).trim()
    )))
}
