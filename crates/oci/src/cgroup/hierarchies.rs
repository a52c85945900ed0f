//! Which cgroup file systems this host has mounted.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};

const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// The hierarchies mounted on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hierarchies {
    /// The v2 tree.
    pub unified: Option<PathBuf>,
    /// v1: the controllers of each (or `name=…`), and its mount.
    pub v1: Vec<(Vec<String>, PathBuf)>,
}

impl Hierarchies {
    /// Looks at `/sys/fs/cgroup`, and where that is no v2 tree at the mount table.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where no cgroup file system is mounted.
    pub fn of_host() -> Result<Hierarchies> {
        let root = Path::new("/sys/fs/cgroup");
        if rustix::fs::statfs(root).is_ok_and(|stat| stat.f_type == CGROUP2_SUPER_MAGIC) {
            return Ok(Hierarchies {
                unified: Some(root.to_owned()),
                v1: Vec::new(),
            });
        }
        let table = fs::read_to_string("/proc/self/mountinfo")
            .during(|| "read /proc/self/mountinfo".into())?;
        let found = parse_mountinfo(&table);
        if found.unified.is_none() && found.v1.is_empty() {
            return Err(Error::unsupported(
                "no cgroup file system is mounted at /sys/fs/cgroup: mount -t cgroup2 cgroup2 /sys/fs/cgroup",
            ));
        }
        Ok(found)
    }

    /// Whether limits are v2's.
    pub fn is_v2(&self) -> bool {
        self.v1.is_empty()
    }
}

/// Reads the cgroup mounts of proc_pid_mountinfo(5).
pub(super) fn parse_mountinfo(table: &str) -> Hierarchies {
    let mut found = Hierarchies::default();
    for line in table.lines() {
        let Some((mount, filesystem)) = line.split_once(" - ") else {
            continue;
        };
        let Some(path) = mount.split(' ').nth(4) else {
            continue;
        };
        if !path.starts_with("/sys/fs/cgroup") {
            continue;
        }
        let mut fields = filesystem.split(' ');
        match fields.next() {
            Some("cgroup2") if found.unified.is_none() => found.unified = Some(path.into()),
            Some("cgroup") => {
                let options = fields.nth(1).unwrap_or_default();
                let controllers: Vec<String> = options
                    .split(',')
                    .filter(|option| option.starts_with("name=") || KNOWN_V1.contains(option))
                    .map(str::to_owned)
                    .collect();
                if !controllers.is_empty()
                    && !found.v1.iter().any(|(known, _)| *known == controllers)
                {
                    found.v1.push((controllers, path.into()));
                }
            }
            _ => {}
        }
    }
    found
}

const KNOWN_V1: [&str; 14] = [
    "cpu",
    "cpuacct",
    "cpuset",
    "memory",
    "devices",
    "freezer",
    "net_cls",
    "net_prio",
    "blkio",
    "perf_event",
    "hugetlb",
    "pids",
    "rdma",
    "misc",
];
