//! state, kill, delete, ps, list, pause, resume.

use std::collections::HashMap;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use base::pidfd::PidFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use super::{Context, ListFormat};
use crate::error::{Context as _, Error, Result};
use crate::hook::{self, HookState};
use crate::state::{self, Record, Status};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown<'a> {
    oci_version: &'a str,
    id: &'a str,
    pid: i32,
    status: Status,
    bundle: &'a Path,
    rootfs: &'a Path,
    created: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<HashMap<String, String>>,
    owner: &'a str,
}

fn shown<'a>(
    record: &'a Record,
    status: Status,
    annotations: Option<HashMap<String, String>>,
) -> Shown<'a> {
    Shown {
        oci_version: &record.oci_version,
        id: &record.id,
        pid: if status == Status::Stopped {
            0
        } else {
            record.pid
        },
        status,
        bundle: &record.bundle,
        rootfs: &record.rootfs,
        created: &record.created,
        annotations,
        owner: &record.owner,
    }
}

/// Writes to stdout; a reader that has gone is no failure.
pub(super) fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

pub(super) fn print_json(value: &impl Serialize) -> Result<()> {
    let text =
        serde_json::to_string_pretty(value).map_err(|error| Error::invalid(error.to_string()))?;
    print(&format!("{text}\n"));
    Ok(())
}

pub(super) fn state(context: &Context, id: &str) -> Result<u8> {
    let record = context.store.read(id)?;
    let annotations = context.store.config(id)?.annotations().clone();
    print_json(&shown(&record, context.store.status(&record), annotations))?;
    Ok(0)
}

/// A signal by name, with or without SIG, or by number.
fn signal_number(text: &str) -> Result<i32> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
        "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
        "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    let unknown = || Error::invalid(format!("unknown signal {text:?}"));
    if let Ok(number) = text.parse::<i32>() {
        return if (0..=64).contains(&number) {
            Ok(number)
        } else {
            Err(unknown())
        };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(index) = NAMES.iter().position(|known| *known == name) {
        return Ok(index as i32 + 1);
    }
    match name {
        "RTMIN" => return Ok(34),
        "RTMAX" => return Ok(64),
        "IOT" => return Ok(6),
        "POLL" => return Ok(29),
        _ => {}
    }
    let real_time = name
        .strip_prefix("RTMIN+")
        .and_then(|rest| rest.parse::<i32>().ok())
        .map(|rest| 34 + rest);
    let real_time = real_time.or(name
        .strip_prefix("RTMAX-")
        .and_then(|rest| rest.parse::<i32>().ok())
        .map(|rest| 64 - rest));
    real_time
        .filter(|number| (34..=64).contains(number))
        .ok_or_else(unknown)
}

pub(super) fn kill(context: &Context, id: &str, signal: &str, all: bool) -> Result<u8> {
    let record = context.store.read(id)?;
    let signal = signal_number(signal)?;
    let process = state::open(&record).during(|| format!("open process {}", record.pid))?;
    if (all || (signal == libc::SIGKILL && process.is_none()))
        && let Some(cgroup) = &record.cgroup
    {
        if signal == libc::SIGKILL {
            cgroup.kill()?;
        } else {
            for pid in cgroup.processes()? {
                if let Ok(process) = PidFd::open(pid) {
                    let _ = process.signal(signal);
                }
            }
        }
        if all {
            return Ok(0);
        }
    }
    let Some(process) = process else {
        return Err(Error::Conflict("container not running".into()));
    };
    process
        .signal(signal)
        .during(|| format!("signal process {}", record.pid))?;
    // A frozen process takes even SIGKILL only once it goes on (on v1).
    if signal == libc::SIGKILL
        && context.store.status(&record) == Status::Paused
        && let Some(mut cgroup) = record.cgroup
    {
        cgroup.thaw()?;
    }
    Ok(0)
}

pub(super) fn delete(context: &Context, id: &str, force: bool) -> Result<u8> {
    let record = match context.store.read(id) {
        Ok(record) => record,
        Err(Error::NotFound(_)) if force => {
            // What a crash left of a container whose record was never written.
            context.store.remove(id)?;
            return Ok(0);
        }
        Err(error) => return Err(error),
    };
    let status = context.store.status(&record);
    if !force && !matches!(status, Status::Stopped | Status::Created) {
        return Err(Error::Conflict(format!(
            "cannot delete container {id} that is not stopped: {}",
            status.name()
        )));
    }
    if let Some(process) = state::open(&record).during(|| format!("open process {}", record.pid))? {
        let _ = process.signal(libc::SIGKILL);
        if let Some(cgroup) = record
            .cgroup
            .clone()
            .as_mut()
            .filter(|cgroup| cgroup.is_frozen())
        {
            cgroup.thaw()?;
        }
        wait_gone(&process)?;
    }
    if let Some(cgroup) = &record.cgroup {
        cgroup.kill()?;
        cgroup.remove()?;
    }
    let spec = context.store.config(id)?;
    context.store.remove(id)?;
    let state = HookState::new(&spec, id, &record.bundle, "stopped", None);
    if let Err(error) = hook::run_all(
        "poststop",
        spec.hooks()
            .as_ref()
            .and_then(|hooks| hooks.poststop().as_deref()),
        &state,
    ) {
        // The container has gone all the same: runtime-spec, "Lifecycle", step 13.
        eprintln!("berth oci: {error}");
    }
    Ok(0)
}

fn wait_gone(process: &PidFd) -> Result<()> {
    let limit = Timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };
    loop {
        match poll(
            &mut [PollFd::new(&process.as_fd(), PollFlags::IN)],
            Some(&limit),
        ) {
            Ok(0) => {
                return Err(Error::Conflict(
                    "the container's process did not end within 10 s of being killed".into(),
                ));
            }
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).during(|| "poll".into()),
        }
    }
}

pub(super) fn ps(
    context: &Context,
    id: &str,
    format: ListFormat,
    options: &[String],
) -> Result<u8> {
    let record = context.store.read(id)?;
    let pids = match &record.cgroup {
        Some(cgroup) => cgroup.processes()?,
        None => vec![record.pid],
    };
    if format == ListFormat::Json {
        let text =
            serde_json::to_string(&pids).map_err(|error| Error::invalid(error.to_string()))?;
        print(&format!("{text}\n"));
        return Ok(0);
    }
    let options = if options.is_empty() {
        vec!["-ef".to_owned()]
    } else {
        options.to_vec()
    };
    let output = Command::new("ps")
        .args(&options)
        .output()
        .during(|| "run ps".into())?;
    if !output.status.success() {
        return Err(Error::invalid(format!(
            "ps: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header
        .split_ascii_whitespace()
        .position(|title| title == "PID")
        .ok_or_else(|| Error::invalid("ps: its output has no column PID"))?;
    print(&format!("{header}\n"));
    for line in lines {
        let pid = line
            .split_ascii_whitespace()
            .nth(column)
            .and_then(|word| word.parse::<i32>().ok());
        if pid.is_some_and(|pid| pids.contains(&pid)) {
            print(&format!("{line}\n"));
        }
    }
    Ok(0)
}

pub(super) fn list(context: &Context, format: ListFormat, quiet: bool) -> Result<u8> {
    let mut records = Vec::new();
    for id in context.store.ids()? {
        match context.store.read(&id) {
            Ok(record) => records.push(record),
            // Deleted meanwhile.
            Err(Error::NotFound(_)) => {}
            Err(error) => eprintln!("berth oci: {error}"),
        }
    }
    if quiet {
        records
            .iter()
            .for_each(|record| print(&format!("{}\n", record.id)));
        return Ok(0);
    }
    if format == ListFormat::Json {
        let all: Vec<Shown> = records
            .iter()
            .map(|record| shown(record, context.store.status(record), None))
            .collect();
        print_json(&all)?;
        return Ok(0);
    }
    let rows: Vec<[String; 6]> = records
        .iter()
        .map(|record| {
            let status = context.store.status(record);
            let pid = if status == Status::Stopped {
                0
            } else {
                record.pid
            };
            [
                record.id.clone(),
                pid.to_string(),
                status.name().into(),
                record.bundle.display().to_string(),
                record.created.clone(),
                record.owner.clone(),
            ]
        })
        .collect();
    let titles = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let width = |column: usize| {
        rows.iter()
            .chain([&titles])
            .map(|row| row[column].len())
            .max()
            .unwrap_or(0)
            + 2
    };
    let widths: Vec<usize> = (0..6).map(width).collect();
    for row in [&titles].into_iter().chain(&rows) {
        let line: String = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        print(&format!("{}\n", line.trim_end()));
    }
    Ok(0)
}

pub(super) fn pause(context: &Context, id: &str) -> Result<u8> {
    let mut record = context.store.read(id)?;
    let status = context.store.status(&record);
    if !matches!(status, Status::Running | Status::Created) {
        return Err(Error::Conflict(format!(
            "container not running: {}",
            status.name()
        )));
    }
    match &mut record.cgroup {
        Some(cgroup) => cgroup.freeze()?,
        None => {
            return Err(Error::unsupported(
                "this container has no cgroup that could be frozen",
            ));
        }
    }
    Ok(0)
}

pub(super) fn resume(context: &Context, id: &str) -> Result<u8> {
    let mut record = context.store.read(id)?;
    if context.store.status(&record) != Status::Paused {
        return Err(Error::Conflict("container not paused".into()));
    }
    if let Some(cgroup) = &mut record.cgroup {
        cgroup.thaw()?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_known_by_name_and_number() {
        assert_eq!(signal_number("SIGTERM").unwrap(), 15);
        assert_eq!(signal_number("kill").unwrap(), 9);
        assert_eq!(signal_number("37").unwrap(), 37);
        assert_eq!(signal_number("RTMIN+3").unwrap(), 37);
        assert!(signal_number("NOPE").is_err());
        assert!(signal_number("65").is_err());
    }
}
