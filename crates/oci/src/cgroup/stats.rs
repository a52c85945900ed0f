//! What a container uses, read from its cgroup, in the shape of `runc events --stats`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Cgroup, field};
use crate::error::{Error, Result};

/// Everything the controllers count. Times are nanoseconds, sizes bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    pub cpu: CpuStats,
    pub memory: MemoryStats,
    pub pids: PidsStats,
    pub blkio: BlkioStats,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuStats {
    pub usage: CpuUsage,
    pub throttling: Throttling,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuUsage {
    pub total: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub percpu: Vec<u64>,
    pub kernel: u64,
    pub user: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Throttling {
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled_time: u64,
}

/// One counter of memory; `limit` is `u64::MAX` where there is none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryEntry {
    pub limit: u64,
    pub usage: u64,
    pub max: u64,
    pub failcnt: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStats {
    pub cache: u64,
    pub usage: MemoryEntry,
    pub swap: MemoryEntry,
    /// `memory.stat` as the kernel names its fields.
    pub raw: BTreeMap<String, u64>,
    /// How often the kernel killed a process of it for want of memory.
    #[serde(rename = "oomKills")]
    pub oom_kills: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PidsStats {
    pub current: u64,
    /// 0 where there is none.
    pub limit: u64,
}

/// One counter of one block device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkioEntry {
    pub major: u64,
    pub minor: u64,
    pub op: String,
    pub value: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BlkioStats {
    pub io_service_bytes_recursive: Vec<BlkioEntry>,
    pub io_serviced_recursive: Vec<BlkioEntry>,
}

pub(super) fn read(cgroup: &Cgroup) -> Result<Stats> {
    let any = cgroup
        .v1
        .get("memory")
        .or(cgroup.unified.as_ref())
        .or_else(|| cgroup.v1.values().next());
    if !any.is_some_and(|directory| directory.is_dir()) {
        return Err(Error::NotFound(format!("cgroup {}", cgroup.path)));
    }
    if cgroup.v1.is_empty() {
        Ok(cgroup.unified.as_deref().map(read_v2).unwrap_or_default())
    } else {
        Ok(read_v1(cgroup))
    }
}

fn text(directory: &Path, file: &str) -> String {
    fs::read_to_string(directory.join(file)).unwrap_or_default()
}

fn number(directory: &Path, file: &str) -> u64 {
    match text(directory, file).trim() {
        "max" => u64::MAX,
        digits => digits.parse().unwrap_or(0),
    }
}

fn fields(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

fn read_v1(cgroup: &Cgroup) -> Stats {
    /// USER_HZ, which x86 and arm64 both fix at 100 per second.
    const TICK: u64 = 10_000_000;
    let mut stats = Stats::default();
    if let Some(directory) = cgroup.v1.get("cpuacct") {
        stats.cpu.usage.total = number(directory, "cpuacct.usage");
        stats.cpu.usage.percpu = text(directory, "cpuacct.usage_percpu")
            .split_ascii_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect();
        let split = text(directory, "cpuacct.stat");
        stats.cpu.usage.user = field(&split, "user").unwrap_or(0) * TICK;
        stats.cpu.usage.kernel = field(&split, "system").unwrap_or(0) * TICK;
    }
    if let Some(directory) = cgroup.v1.get("cpu") {
        let throttled = text(directory, "cpu.stat");
        stats.cpu.throttling = Throttling {
            periods: field(&throttled, "nr_periods").unwrap_or(0),
            throttled_periods: field(&throttled, "nr_throttled").unwrap_or(0),
            throttled_time: field(&throttled, "throttled_time").unwrap_or(0),
        };
    }
    if let Some(directory) = cgroup.v1.get("memory") {
        let entry = |prefix: &str| MemoryEntry {
            // The kernel's "none" is the largest number of whole pages.
            limit: Some(number(directory, &format!("{prefix}.limit_in_bytes")))
                .map(|limit| {
                    if limit >= i64::MAX as u64 - 65536 {
                        u64::MAX
                    } else {
                        limit
                    }
                })
                .unwrap_or(0),
            usage: number(directory, &format!("{prefix}.usage_in_bytes")),
            max: number(directory, &format!("{prefix}.max_usage_in_bytes")),
            failcnt: number(directory, &format!("{prefix}.failcnt")),
        };
        stats.memory.usage = entry("memory");
        stats.memory.swap = entry("memory.memsw");
        stats.memory.raw = fields(&text(directory, "memory.stat"));
        stats.memory.cache = stats.memory.raw.get("cache").copied().unwrap_or(0);
        stats.memory.oom_kills =
            field(&text(directory, "memory.oom_control"), "oom_kill").unwrap_or(0);
    }
    if let Some(directory) = cgroup.v1.get("pids") {
        stats.pids = pids(directory);
    }
    if let Some(directory) = cgroup.v1.get("blkio") {
        let entries = |file: &str| {
            let recursive = text(directory, &format!("{file}_recursive"));
            let plain = if recursive.is_empty() {
                text(directory, file)
            } else {
                recursive
            };
            plain.lines().filter_map(blkio_line).collect()
        };
        stats.blkio.io_service_bytes_recursive = entries("blkio.throttle.io_service_bytes");
        stats.blkio.io_serviced_recursive = entries("blkio.throttle.io_serviced");
    }
    stats
}

/// `8:0 Read 4096`.
fn blkio_line(line: &str) -> Option<BlkioEntry> {
    let mut words = line.split_ascii_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    Some(BlkioEntry {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        op: words.next()?.to_owned(),
        value: words.next()?.parse().ok()?,
    })
}

fn pids(directory: &Path) -> PidsStats {
    let limit = number(directory, "pids.max");
    PidsStats {
        current: number(directory, "pids.current"),
        limit: if limit == u64::MAX { 0 } else { limit },
    }
}

fn read_v2(directory: &Path) -> Stats {
    let mut stats = Stats::default();
    let cpu = text(directory, "cpu.stat");
    let micro = |key: &str| field(&cpu, key).unwrap_or(0).saturating_mul(1000);
    stats.cpu.usage = CpuUsage {
        total: micro("usage_usec"),
        percpu: Vec::new(),
        kernel: micro("system_usec"),
        user: micro("user_usec"),
    };
    stats.cpu.throttling = Throttling {
        periods: field(&cpu, "nr_periods").unwrap_or(0),
        throttled_periods: field(&cpu, "nr_throttled").unwrap_or(0),
        throttled_time: micro("throttled_usec"),
    };
    let events = text(directory, "memory.events");
    stats.memory.usage = MemoryEntry {
        limit: number(directory, "memory.max"),
        usage: number(directory, "memory.current"),
        max: number(directory, "memory.peak"),
        failcnt: field(&events, "max").unwrap_or(0),
    };
    stats.memory.swap = MemoryEntry {
        limit: number(directory, "memory.swap.max"),
        usage: number(directory, "memory.swap.current"),
        ..MemoryEntry::default()
    };
    stats.memory.raw = fields(&text(directory, "memory.stat"));
    stats.memory.cache = stats.memory.raw.get("file").copied().unwrap_or(0);
    stats.memory.oom_kills = field(&events, "oom_kill").unwrap_or(0);
    stats.pids = pids(directory);
    for line in text(directory, "io.stat").lines() {
        let Some((device, counters)) = line.split_once(' ') else {
            continue;
        };
        let Some((major, minor)) = device.split_once(':') else {
            continue;
        };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else {
            continue;
        };
        for (key, value) in counters.split(' ').filter_map(|pair| pair.split_once('=')) {
            let Ok(value) = value.parse() else { continue };
            let (list, op) = match key {
                "rbytes" => (&mut stats.blkio.io_service_bytes_recursive, "Read"),
                "wbytes" => (&mut stats.blkio.io_service_bytes_recursive, "Write"),
                "rios" => (&mut stats.blkio.io_serviced_recursive, "Read"),
                "wios" => (&mut stats.blkio.io_serviced_recursive, "Write"),
                _ => continue,
            };
            list.push(BlkioEntry {
                major,
                minor,
                op: op.into(),
                value,
            });
        }
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_of_blkio_is_read() {
        let entry = blkio_line("8:16 Write 4096").unwrap();
        assert_eq!(
            (entry.major, entry.minor, entry.op.as_str(), entry.value),
            (8, 16, "Write", 4096)
        );
        assert!(blkio_line("Total 12").is_none());
    }

    #[test]
    fn v2_files_become_the_same_numbers() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        write("cpu.stat", "usage_usec 5\nuser_usec 3\nsystem_usec 2\n");
        write("memory.current", "4096\n");
        write("memory.max", "max\n");
        write("memory.events", "low 0\nmax 2\noom_kill 1\n");
        write("pids.current", "3\n");
        write("pids.max", "max\n");
        write(
            "io.stat",
            "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n",
        );
        let stats = read_v2(directory.path());
        assert_eq!(stats.cpu.usage.total, 5000);
        assert_eq!(
            (stats.memory.usage.usage, stats.memory.usage.limit),
            (4096, u64::MAX)
        );
        assert_eq!((stats.memory.usage.failcnt, stats.memory.oom_kills), (2, 1));
        assert_eq!((stats.pids.current, stats.pids.limit), (3, 0));
        assert_eq!(stats.blkio.io_service_bytes_recursive.len(), 2);
    }

    proptest! {
        #[test]
        fn no_line_panics(line in ".{0,40}") {
            let _ = blkio_line(&line);
            let _ = fields(&line);
        }
    }
}
