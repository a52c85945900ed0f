//! The processes of a container, and holding them: by its cgroup, or where it has none (an ordinary user's without a
//! delegated cgroup), by its pid namespace and with signals.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::container::cgroup;
use crate::container::record::Record;
use crate::error::{Error, Result};

/// Its pids.
///
/// # Errors
/// Where neither says.
pub(crate) fn of(record: &Record, group: &str) -> Result<Vec<i32>> {
    match (cgroup::processes(group), record.process) {
        (Err(error), Some(init)) if base::Classified::kind(&error) == base::Kind::NotFound => {
            Ok(by_namespace(init.pid))
        }
        (result, _) => result,
    }
}

/// Stops or continues all of them.
///
/// Without a cgroup they get SIGSTOP and SIGCONT, which their parents in the container can see.
///
/// # Errors
/// Where that does not come to an end.
pub(crate) fn hold(record: &Record, group: &str, held: bool) -> Result<()> {
    match (cgroup::freeze(group, held), record.process) {
        (Err(error), Some(init)) if base::Classified::kind(&error) == base::Kind::NotFound => {
            by_signal(init.pid, held)
        }
        (result, _) => result,
    }
}

fn by_signal(init: i32, held: bool) -> Result<()> {
    let signal = if held {
        rustix::process::Signal::STOP
    } else {
        rustix::process::Signal::CONT
    };
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        // Those that were made meanwhile are found by looking again.
        let waiting: Vec<i32> = by_namespace(init)
            .into_iter()
            .filter(|pid| match status(*pid).map(|(state, _)| state) {
                None | Some('Z' | 'X') => false,
                Some(state) => matches!(state, 'T' | 't') != held,
            })
            .collect();
        if waiting.is_empty() {
            return Ok(());
        }
        send(waiting, signal);
        if Instant::now() > end {
            if held {
                // Not half of it.
                send(by_namespace(init), rustix::process::Signal::CONT);
            }
            return Err(Error::Runtime {
                message:
                    "a process of the container hangs in the kernel and does not take the signal"
                        .into(),
                kind: base::Kind::Internal,
            });
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn send(pids: Vec<i32>, signal: rustix::process::Signal) {
    for pid in pids.into_iter().filter_map(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// The processes of `init`'s pid namespace; where that is this one's own, those that descend from it.
fn by_namespace(init: i32) -> Vec<i32> {
    let namespace =
        |pid: &str| -> Option<PathBuf> { std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok() };
    let Some(wanted) = namespace(&init.to_string()) else {
        return Vec::new();
    };
    let all = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let mut pids: Vec<i32> = if namespace("self").as_ref() == Some(&wanted) {
        let parents: HashMap<i32, i32> =
            all.filter_map(|pid| Some((pid, status(pid)?.1))).collect();
        let mut found = HashSet::from([init]);
        loop {
            let more: Vec<i32> = parents
                .iter()
                .filter(|(pid, parent)| found.contains(parent) && !found.contains(pid))
                .map(|(pid, _)| *pid)
                .collect();
            if more.is_empty() {
                break found.into_iter().collect();
            }
            found.extend(more);
        }
    } else {
        all.filter(|pid| namespace(&pid.to_string()).as_ref() == Some(&wanted))
            .collect()
    };
    pids.sort_unstable();
    pids
}

/// State and parent of a process (proc_pid_stat(5)).
fn status(pid: i32) -> Option<(char, i32)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text[text.rfind(')')? + 1..].split_ascii_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_cgroup_processes_are_found_and_held_by_what_they_descend_from() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "sleep 600 & sleep 600; true"])
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        let end = Instant::now() + Duration::from_secs(30);
        while by_namespace(pid).len() < 3 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        let found = by_namespace(pid);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found.contains(&pid) && !found.contains(&(std::process::id() as i32)));
        by_signal(pid, true).unwrap();
        assert!(found.iter().all(|pid| status(*pid).unwrap().0 == 'T'));
        by_signal(pid, false).unwrap();
        assert!(found.iter().all(|pid| status(*pid).unwrap().0 != 'T'));
        for pid in found {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        child.wait().unwrap();
    }
}
