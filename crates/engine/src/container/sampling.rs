//! Live statistics of a container.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;

use crate::Engine;
use crate::container::cgroup;
use crate::container::create::blocking;
use crate::container::record::{Container, Record};
use crate::container::stats::{
    BlkioEntry, BlkioStats, CpuStats, CpuUsage, MemoryStats, NetworkStats, PidsStats, Stats,
    ThrottlingData,
};
use crate::error::Result;

impl Engine {
    /// Samples once a second; one sample where not `stream` (two readings apart, so that percentages can be
    /// computed, unless `one_shot`). Ends with the container's end or removal; a stopped one gives zeros.
    pub async fn stats(
        self: &Arc<Self>,
        container: &str,
        stream: bool,
        one_shot: bool,
    ) -> Result<BoxStream<'static, Result<Stats>>> {
        let container = self.inventory.find(container)?;
        let engine = self.clone();
        let mut ends = container.milestones.subscribe();
        let before = ends.borrow_and_update().exits;
        let first = engine.sample(&container, None).await?;
        if !stream {
            if one_shot || !container.phase().lives() {
                return Ok(futures_util::stream::iter([Ok(first)]).boxed());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
            let second = engine.sample(&container, Some(&first)).await;
            return Ok(futures_util::stream::iter([second]).boxed());
        }
        let state = (engine, container, ends, first, true);
        let samples = futures_util::stream::unfold(Some(state), move |state| async move {
            let (engine, container, mut ends, last, begins) = state?;
            if begins {
                // Clients show the first at once; it has no percentages yet.
                let next = (engine, container, ends, last.clone(), false);
                return Some((Ok(last), Some(next)));
            }
            let over = tokio::time::timeout(
                Duration::from_secs(1),
                ends.wait_for(|now| now.removed || now.exits != before),
            )
            .await
            .is_ok();
            match engine.sample(&container, Some(&last)).await {
                Ok(sample) if over => Some((Ok(sample), None)),
                Ok(sample) => {
                    let next = (engine, container, ends, sample.clone(), false);
                    Some((Ok(sample), Some(next)))
                }
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(samples.boxed())
    }

    async fn sample(
        self: &Arc<Self>,
        container: &Arc<Container>,
        last: Option<&Stats>,
    ) -> Result<Stats> {
        let record = container.record().clone();
        let group = self.cgroup_of(&record);
        let mut sample = blocking(move || Ok(read(&record, &group))).await?;
        if let Some(last) = last {
            sample.preread = last.read.clone();
            sample.precpu_stats = last.cpu_stats.clone();
        }
        Ok(sample)
    }
}

fn read(record: &Record, group: &str) -> Stats {
    let mut out = Stats {
        name: format!("/{}", record.name),
        id: record.id.clone(),
        read: base::time::now_rfc3339(),
        preread: base::time::ZERO.into(),
        ..Default::default()
    };
    let (true, Some(process)) = (record.phase.lives(), record.process) else {
        out.read = base::time::ZERO.into();
        return out;
    };
    // It may end while it is looked at: zeros then, as of a stopped one.
    let Ok(used) = cgroup::stats(group) else {
        return out;
    };
    let percpu = Some(used.cpu.usage.percpu).filter(|list| !list.is_empty());
    out.cpu_stats = CpuStats {
        cpu_usage: CpuUsage {
            total_usage: used.cpu.usage.total,
            percpu_usage: percpu,
            usage_in_kernelmode: used.cpu.usage.kernel,
            usage_in_usermode: used.cpu.usage.user,
        },
        system_cpu_usage: system_cpu(),
        online_cpus: std::thread::available_parallelism()
            .ok()
            .map(|cpus| cpus.get() as u32),
        throttling_data: ThrottlingData {
            periods: used.cpu.throttling.periods,
            throttled_periods: used.cpu.throttling.throttled_periods,
            throttled_time: used.cpu.throttling.throttled_time,
        },
    };
    let total = base::host::memory();
    let limit = used.memory.usage.limit;
    out.memory_stats = MemoryStats {
        usage: Some(used.memory.usage.usage),
        max_usage: Some(used.memory.usage.max).filter(|max| *max > 0),
        stats: used.memory.raw,
        failcnt: Some(used.memory.usage.failcnt).filter(|count| *count > 0),
        limit: Some(if limit == 0 || limit > total {
            total
        } else {
            limit
        }),
    };
    out.pids_stats = PidsStats {
        current: Some(used.pids.current),
        limit: Some(used.pids.limit).filter(|limit| *limit != 0 && *limit != u64::MAX),
    };
    let entries = |list: Vec<oci::cgroup::BlkioEntry>| {
        Some(
            list.into_iter()
                .map(|entry| BlkioEntry {
                    major: entry.major,
                    minor: entry.minor,
                    op: entry.op,
                    value: entry.value,
                })
                .collect(),
        )
    };
    out.blkio_stats = BlkioStats {
        io_service_bytes_recursive: entries(used.blkio.io_service_bytes_recursive),
        io_serviced_recursive: entries(used.blkio.io_serviced_recursive),
        ..Default::default()
    };
    if record.host.network_mode != "host" && record.host.network_mode != "none" {
        let text =
            std::fs::read_to_string(format!("/proc/{}/net/dev", process.pid)).unwrap_or_default();
        out.networks = Some(interfaces(&text));
    }
    out
}

/// All CPUs' time since boot, nanoseconds: what percentages are of.
fn system_cpu() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: u64 = line
        .split_ascii_whitespace()
        .take(8)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    Some(ticks * 10_000_000)
}

/// Reads `/proc/PID/net/dev`, but for the loopback interface.
fn interfaces(text: &str) -> BTreeMap<String, NetworkStats> {
    text.lines()
        .filter_map(|line| {
            let (name, counts) = line.split_once(':')?;
            let name = name.trim();
            let counts: Vec<u64> = counts
                .split_ascii_whitespace()
                .filter_map(|count| count.parse().ok())
                .collect();
            let [
                rx_bytes,
                rx_packets,
                rx_errors,
                rx_dropped,
                _,
                _,
                _,
                _,
                tx_bytes,
                tx_packets,
                tx_errors,
                tx_dropped,
                ..,
            ] = counts[..]
            else {
                return None;
            };
            (name != "lo").then(|| {
                (
                    name.to_owned(),
                    NetworkStats {
                        rx_bytes,
                        rx_packets,
                        rx_errors,
                        rx_dropped,
                        tx_bytes,
                        tx_packets,
                        tx_errors,
                        tx_dropped,
                    },
                )
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::interfaces;

    #[test]
    fn interfaces_are_read_but_for_the_loopback() {
        let text = "Inter-|   Receive\n face |bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 0 0 0 0 0 0 30 4 0 5 0 0 0 0\n";
        let all = interfaces(text);
        assert_eq!(all.len(), 1);
        assert_eq!(
            (
                all["eth0"].rx_bytes,
                all["eth0"].tx_bytes,
                all["eth0"].tx_dropped
            ),
            (10, 30, 5)
        );
    }
}
