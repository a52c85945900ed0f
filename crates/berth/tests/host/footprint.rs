//! What a daemon's containers have on this host, counted, so that what is left behind shows.

use std::collections::BTreeMap;
use std::path::Path;

use super::Host;

/// A number from the environment.
pub fn number(name: &str, default: usize) -> usize {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}
/// What a daemon's containers have on this host, counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footprint {
    pub processes: usize,
    pub mounts: usize,
    pub cgroups: usize,
    pub interfaces: usize,
    pub rules: usize,
    pub files: BTreeMap<String, usize>,
    pub descriptors: [usize; 2],
}

/// Entries of a folder and of all below it.
pub fn files_below(folder: &Path) -> usize {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => 1 + files_below(&entry.path()),
            _ => 1,
        })
        .sum()
}

pub fn keeper_pid(host: &Host) -> u32 {
    super::keeper_of(&host.state()).expect("a keeper runs")
}

/// Every process that descends from `pid`, itself not counted.
fn descendants(pid: u32) -> usize {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    children
        .unwrap_or_default()
        .split_whitespace()
        .map(|child| 1 + child.parse().map_or(0, descendants))
        .sum()
}

fn cgroups(folder: &Path, parent: &str, depth: usize) -> usize {
    if depth == 0 {
        return 0;
    }
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| {
            if entry.file_name().to_string_lossy() == parent {
                files_below_folders(&entry.path())
            } else {
                cgroups(&entry.path(), parent, depth - 1)
            }
        })
        .sum()
}

fn files_below_folders(folder: &Path) -> usize {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| 1 + files_below_folders(&entry.path()))
        .sum()
}

/// The folder in the cgroup trees that this daemon's containers are in.
pub fn cgroup_parent(host: &Host) -> String {
    let id = host.ok(&["run", "-d", "busybox", "sleep", "60"]);
    let pid = host.ok(&["inspect", "--format", "json", &id]);
    let json: serde_json::Value = serde_json::from_str(&pid).unwrap();
    let pid = json[0]["State"]["Pid"].as_u64().unwrap();
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let parent = text
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2)?.strip_suffix(&id))
        .map(|path| path.trim_matches('/').to_owned())
        .next()
        .expect("the container has a cgroup of its own");
    host.ok(&["rm", "-f", &id]);
    parent.rsplit('/').next().unwrap().to_owned()
}

impl Footprint {
    pub fn of(host: &Host, parent: &str) -> Footprint {
        let keeper = keeper_pid(host);
        let lines = |args: &[&str], part: &str| {
            let output = host.in_network(args);
            String::from_utf8_lossy(&output.stdout)
                .lines()
                .filter(|line| line.contains(part))
                .count()
        };
        let mounts = |pid: u32| {
            std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))
                .unwrap_or_default()
                .lines()
                .count()
        };
        let descriptors =
            |pid: u32| std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        let state = host.state();
        let files = ["containers", "volumes", "images", "run", "networks"]
            .iter()
            .map(|name| ((*name).to_owned(), files_below(&state.join(name))))
            .collect();
        Footprint {
            processes: descendants(keeper),
            mounts: mounts(host.daemon_pid()) + mounts(keeper),
            cgroups: cgroups(Path::new("/sys/fs/cgroup"), parent, 3),
            interfaces: lines(&["ip", "-o", "link"], ": "),
            rules: lines(&["nft", "list", "ruleset"], ""),
            files,
            descriptors: [descriptors(host.daemon_pid()), descriptors(keeper)],
        }
    }

    /// Whether nothing is left of what was not in `before`. Pools (namespaces made ahead, connections, threads'
    /// descriptors) may hold a few more or less.
    pub fn is_no_more_than(&self, before: &Footprint) -> bool {
        self.processes <= before.processes
            && self.mounts <= before.mounts
            && self.cgroups <= before.cgroups
            && self.rules <= before.rules
            && self.files == before.files
            && self.interfaces <= before.interfaces + 16
            && self.descriptors[0] <= before.descriptors[0] + 40
            && self.descriptors[1] <= before.descriptors[1] + 2
    }
}

/// Bytes of anonymous memory of a process.
pub fn memory(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find(|l| l.starts_with("Anonymous:")).unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 1024
}
