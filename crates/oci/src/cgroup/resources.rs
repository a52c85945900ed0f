//! Limits (config-linux "Control groups") in the words of v1 and of v2.

use std::fs;
use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use super::{Cgroup, read};
use crate::error::{Context, Error, Result};

/// Whether a limit needs this v1 controller.
pub(super) fn needs_v1(limits: &LinuxResources, controller: &str) -> bool {
    match controller {
        "memory" => limits.memory().is_some(),
        "cpu" => limits.cpu().is_some(),
        "cpuset" => limits
            .cpu()
            .as_ref()
            .is_some_and(|cpu| given(cpu.cpus()) || given(cpu.mems())),
        "pids" => limits.pids().is_some(),
        "blkio" => limits.block_io().is_some(),
        "hugetlb" => limits
            .hugepage_limits()
            .as_ref()
            .is_some_and(|list| !list.is_empty()),
        "net_cls" => limits
            .network()
            .as_ref()
            .is_some_and(|network| network.class_id().is_some()),
        "net_prio" => limits
            .network()
            .as_ref()
            .is_some_and(|n| n.priorities().as_ref().is_some_and(|list| !list.is_empty())),
        "rdma" => limits.rdma().as_ref().is_some_and(|map| !map.is_empty()),
        "devices" => limits.devices().is_some(),
        _ => false,
    }
}

fn given(text: &Option<String>) -> bool {
    text.as_ref().is_some_and(|text| !text.is_empty())
}

pub(super) fn apply(cgroup: &Cgroup, limits: &LinuxResources) -> Result<()> {
    if cgroup.v1.is_empty() {
        if let Some(directory) = &cgroup.unified {
            apply_v2(directory, limits)?;
        }
    } else {
        apply_v1(cgroup, limits)?;
    }
    if let Some(unified) = limits.unified() {
        let Some(directory) = &cgroup.unified else {
            return Err(Error::unsupported(
                "linux.resources.unified needs the cgroup v2 tree, which this host has not mounted",
            ));
        };
        let mut entries: Vec<_> = unified.iter().collect();
        entries.sort_unstable();
        for (name, value) in entries {
            if name.contains('/') || name.starts_with('.') || !name.contains('.') {
                return Err(Error::invalid(format!(
                    "linux.resources.unified: {name:?} is not the name of a cgroup file"
                )));
            }
            for line in value.lines() {
                set(directory, name, line)?;
            }
        }
    }
    Ok(())
}

fn set(directory: &Path, file: &str, value: impl AsRef<str>) -> Result<()> {
    let (path, value) = (directory.join(file), value.as_ref());
    // Not fs::write, which would create and truncate.
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| std::io::Write::write_all(&mut file, value.as_bytes()))
        .during(|| format!("write {value:?} to {}", path.display()))
}

fn set_number(directory: &Path, file: &str, value: i64) -> Result<()> {
    set(directory, file, value.to_string())
}

fn controller<'a>(cgroup: &'a Cgroup, name: &str) -> Result<&'a Path> {
    cgroup.v1.get(name).map(AsRef::as_ref).ok_or_else(|| {
        Error::unsupported(format!("a limit of the cgroup controller {name:?} is asked for, which this host has not mounted"))
    })
}

fn apply_v1(cgroup: &Cgroup, limits: &LinuxResources) -> Result<()> {
    if let Some(memory) = limits.memory() {
        memory_v1(cgroup, memory)?;
    }
    if let Some(cpu) = limits.cpu() {
        cpu_v1(cgroup, cpu)?;
    }
    if let Some(pids) = limits.pids() {
        set(
            controller(cgroup, "pids")?,
            "pids.max",
            pids_limit(pids.limit()),
        )?;
    }
    if let Some(block) = limits.block_io() {
        block_v1(controller(cgroup, "blkio")?, block)?;
    }
    for huge in limits.hugepage_limits().iter().flatten() {
        let directory = controller(cgroup, "hugetlb")?;
        set_number(
            directory,
            &format!("hugetlb.{}.limit_in_bytes", page_size(huge.page_size())?),
            huge.limit(),
        )?;
    }
    if let Some(network) = limits.network() {
        if let Some(class) = network.class_id().filter(|class| *class != 0) {
            set(
                controller(cgroup, "net_cls")?,
                "net_cls.classid",
                class.to_string(),
            )?;
        }
        for priority in network.priorities().iter().flatten() {
            let line = format!("{} {}", priority.name(), priority.priority());
            set(controller(cgroup, "net_prio")?, "net_prio.ifpriomap", line)?;
        }
    }
    for (device, limit) in limits.rdma().iter().flatten() {
        set(
            controller(cgroup, "rdma")?,
            "rdma.max",
            rdma_line(device, limit.hca_handles(), limit.hca_objects()),
        )?;
    }
    Ok(())
}

fn memory_v1(cgroup: &Cgroup, memory: &LinuxMemory) -> Result<()> {
    let wanted = |value: Option<i64>| value.filter(|value| *value != 0);
    let (limit, swap) = (wanted(memory.limit()), wanted(memory.swap()));
    if limit.is_none()
        && swap.is_none()
        && memory.reservation().is_none()
        && memory.swappiness().is_none()
        && memory.disable_oom_killer() != Some(true)
        && memory.kernel_tcp().is_none()
    {
        return Ok(());
    }
    let directory = controller(cgroup, "memory")?;
    if let Some(limit) =
        limit.filter(|limit| *limit > 0 && memory.check_before_update() == Some(true))
    {
        let usage: i64 = read(&directory.join("memory.usage_in_bytes"))?
            .trim()
            .parse()
            .unwrap_or(0);
        if usage > limit {
            return Err(Error::Conflict(format!(
                "memory limit {limit} is below the current usage of {usage} bytes"
            )));
        }
    }
    // memory <= memory+swap must hold at every step, so the order depends on which way they go.
    let memsw = "memory.memsw.limit_in_bytes";
    match (limit, swap) {
        (Some(limit), Some(swap)) => {
            let current: i64 = read(&directory.join("memory.limit_in_bytes"))?
                .trim()
                .parse()
                .unwrap_or(i64::MAX);
            let swap_first = swap == -1 || (limit != -1 && current < swap);
            if swap_first {
                set_swap_v1(directory, memsw, swap)?;
                set_number(directory, "memory.limit_in_bytes", limit)?;
            } else {
                set_number(directory, "memory.limit_in_bytes", limit)?;
                set_swap_v1(directory, memsw, swap)?;
            }
        }
        (Some(limit), None) => {
            if limit == -1 {
                // Unlimited memory under a limited sum cannot be: both go. Without swap accounting there is one.
                let _ = set_number(directory, memsw, -1);
            }
            set_number(directory, "memory.limit_in_bytes", limit)?;
        }
        (None, Some(swap)) => set_swap_v1(directory, memsw, swap)?,
        (None, None) => {}
    }
    if let Some(reservation) = wanted(memory.reservation()) {
        set_number(directory, "memory.soft_limit_in_bytes", reservation)?;
    }
    if let Some(tcp) = wanted(memory.kernel_tcp()) {
        set_number(directory, "memory.kmem.tcp.limit_in_bytes", tcp)?;
    }
    if let Some(swappiness) = memory.swappiness().filter(|value| *value as i64 != -1) {
        if swappiness > 100 {
            return Err(Error::invalid(format!(
                "linux.resources.memory.swappiness {swappiness} is not from 0 to 100"
            )));
        }
        set(directory, "memory.swappiness", swappiness.to_string())?;
    }
    if memory.disable_oom_killer() == Some(true) {
        set(directory, "memory.oom_control", "1")?;
    }
    Ok(())
}

/// A kernel without swap accounting lacks the file; a limit equal to "no swap" is then what already holds.
fn set_swap_v1(directory: &Path, file: &str, value: i64) -> Result<()> {
    if !directory.join(file).exists() {
        return Ok(());
    }
    set_number(directory, file, value)
}

fn cpu_v1(cgroup: &Cgroup, cpu: &LinuxCpu) -> Result<()> {
    if given(cpu.cpus()) || given(cpu.mems()) {
        let directory = controller(cgroup, "cpuset")?;
        if let Some(cpus) = cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
            set(directory, "cpuset.cpus", cpus)?;
        }
        if let Some(mems) = cpu.mems().as_ref().filter(|mems| !mems.is_empty()) {
            set(directory, "cpuset.mems", mems)?;
        }
    }
    let directory = controller(cgroup, "cpu")?;
    if let Some(idle) = cpu.idle() {
        set_number(directory, "cpu.idle", idle)?;
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        set(directory, "cpu.shares", shares.to_string())?;
    }
    if let Some(period) = cpu.period().filter(|period| *period != 0) {
        // A period shorter than the quota still set is refused: then the quota goes first.
        if set(directory, "cpu.cfs_period_us", period.to_string()).is_err() {
            if let Some(quota) = cpu.quota() {
                set_number(directory, "cpu.cfs_quota_us", quota)?;
            }
            set(directory, "cpu.cfs_period_us", period.to_string())?;
        }
    }
    if let Some(quota) = cpu.quota().filter(|quota| *quota != 0) {
        set_number(directory, "cpu.cfs_quota_us", quota)?;
    }
    if let Some(burst) = cpu.burst() {
        set(directory, "cpu.cfs_burst_us", burst.to_string())?;
    }
    if let Some(period) = cpu.realtime_period().filter(|period| *period != 0) {
        set(directory, "cpu.rt_period_us", period.to_string())?;
    }
    if let Some(runtime) = cpu.realtime_runtime().filter(|runtime| *runtime != 0) {
        set_number(directory, "cpu.rt_runtime_us", runtime)?;
    }
    Ok(())
}

fn block_v1(directory: &Path, block: &LinuxBlockIo) -> Result<()> {
    if let Some(weight) = block.weight().filter(|weight| *weight != 0) {
        let plain = directory.join("blkio.weight");
        let file = if plain.exists() {
            "blkio.weight"
        } else {
            "blkio.bfq.weight"
        };
        set(directory, file, weight.to_string())?;
    }
    if let Some(weight) = block.leaf_weight().filter(|weight| *weight != 0) {
        set(directory, "blkio.leaf_weight", weight.to_string())?;
    }
    for device in block.weight_device().iter().flatten() {
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            let plain = directory.join("blkio.weight_device");
            let file = if plain.exists() {
                "blkio.weight_device"
            } else {
                "blkio.bfq.weight_device"
            };
            set(
                directory,
                file,
                format!("{}:{} {weight}", device.major(), device.minor()),
            )?;
        }
        if let Some(weight) = device.leaf_weight().filter(|weight| *weight != 0) {
            set(
                directory,
                "blkio.leaf_weight_device",
                format!("{}:{} {weight}", device.major(), device.minor()),
            )?;
        }
    }
    let throttles = [
        (
            "blkio.throttle.read_bps_device",
            block.throttle_read_bps_device(),
        ),
        (
            "blkio.throttle.write_bps_device",
            block.throttle_write_bps_device(),
        ),
        (
            "blkio.throttle.read_iops_device",
            block.throttle_read_iops_device(),
        ),
        (
            "blkio.throttle.write_iops_device",
            block.throttle_write_iops_device(),
        ),
    ];
    for (file, devices) in throttles {
        for device in devices.iter().flatten() {
            set(
                directory,
                file,
                format!("{}:{} {}", device.major(), device.minor(), device.rate()),
            )?;
        }
    }
    Ok(())
}

fn apply_v2(directory: &Path, limits: &LinuxResources) -> Result<()> {
    if let Some(memory) = limits.memory() {
        memory_v2(directory, memory)?;
    }
    if let Some(cpu) = limits.cpu() {
        cpu_v2(directory, cpu)?;
    }
    if let Some(pids) = limits.pids() {
        set(directory, "pids.max", pids_limit(pids.limit()))?;
    }
    if let Some(block) = limits.block_io() {
        block_v2(directory, block)?;
    }
    for huge in limits.hugepage_limits().iter().flatten() {
        let size = page_size(huge.page_size())?;
        set(
            directory,
            &format!("hugetlb.{size}.max"),
            huge.limit().to_string(),
        )?;
        let reserved = format!("hugetlb.{size}.rsvd.max");
        if directory.join(&reserved).exists() {
            set(directory, &reserved, huge.limit().to_string())?;
        }
    }
    for (device, limit) in limits.rdma().iter().flatten() {
        set(
            directory,
            "rdma.max",
            rdma_line(device, limit.hca_handles(), limit.hca_objects()),
        )?;
    }
    Ok(())
}

fn memory_v2(directory: &Path, memory: &LinuxMemory) -> Result<()> {
    let word = |value: i64| {
        if value < 0 {
            "max".to_owned()
        } else {
            value.to_string()
        }
    };
    let limit = memory.limit().filter(|limit| *limit != 0);
    if let Some(limit) =
        limit.filter(|limit| *limit > 0 && memory.check_before_update() == Some(true))
    {
        let usage: i64 = read(&directory.join("memory.current"))?
            .trim()
            .parse()
            .unwrap_or(0);
        if usage > limit {
            return Err(Error::Conflict(format!(
                "memory limit {limit} is below the current usage of {usage} bytes"
            )));
        }
    }
    if let Some(swap) = swap_v2(memory.swap().unwrap_or(0), limit.unwrap_or(0))? {
        // Without swap accounting the file is missing, and "no more than nothing" holds anyway.
        if directory.join("memory.swap.max").exists() || swap > 0 {
            set(directory, "memory.swap.max", word(swap))?;
        }
    }
    if let Some(limit) = limit {
        set(directory, "memory.max", word(limit))?;
    }
    if let Some(reservation) = memory.reservation().filter(|value| *value != 0) {
        set(directory, "memory.low", word(reservation))?;
    }
    Ok(())
}

/// v2 counts swap alone, the specification memory and swap together.
pub(super) fn swap_v2(sum: i64, memory: i64) -> Result<Option<i64>> {
    match (sum, memory) {
        (0, _) => Ok(None),
        (-1, _) => Ok(Some(-1)),
        (_, -1 | 0) => Err(Error::invalid(
            "linux.resources.memory.swap needs linux.resources.memory.limit with it",
        )),
        (sum, memory) if sum < memory => Err(Error::invalid(format!(
            "linux.resources.memory.swap {sum} (memory and swap) is below the memory limit {memory}"
        ))),
        (sum, memory) => Ok(Some(sum - memory)),
    }
}

/// v1 shares (2 to 262144, 1024 is normal) as v2 weight (1 to 10000, 100 is normal).
pub(super) fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn cpu_v2(directory: &Path, cpu: &LinuxCpu) -> Result<()> {
    if let Some(idle) = cpu.idle() {
        set_number(directory, "cpu.idle", idle)?;
    }
    // An idle cgroup has no weight of its own.
    if let Some(shares) = cpu
        .shares()
        .filter(|shares| *shares != 0 && cpu.idle() != Some(1))
    {
        set(
            directory,
            "cpu.weight",
            weight_of_shares(shares).to_string(),
        )?;
    }
    let (quota, period) = (
        cpu.quota().filter(|quota| *quota != 0),
        cpu.period().filter(|period| *period != 0),
    );
    if quota.is_some() || period.is_some() {
        let quota = quota
            .filter(|quota| *quota > 0)
            .map_or_else(|| "max".to_owned(), |quota| quota.to_string());
        set(
            directory,
            "cpu.max",
            period.map_or(quota.clone(), |period| format!("{quota} {period}")),
        )?;
    }
    if let Some(burst) = cpu.burst() {
        set(directory, "cpu.max.burst", burst.to_string())?;
    }
    if cpu.realtime_period().is_some_and(|value| value != 0)
        || cpu.realtime_runtime().is_some_and(|value| value != 0)
    {
        return Err(Error::unsupported(
            "realtime CPU limits do not exist in cgroup v2: remove linux.resources.cpu.realtimeRuntime",
        ));
    }
    if let Some(cpus) = cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
        set(directory, "cpuset.cpus", cpus)?;
    }
    if let Some(mems) = cpu.mems().as_ref().filter(|mems| !mems.is_empty()) {
        set(directory, "cpuset.mems", mems)?;
    }
    Ok(())
}

/// blkio's 10 to 1000 as io's 1 to 10000.
pub(super) fn io_weight(weight: u64) -> u64 {
    1 + (weight.max(10) - 10) * 9999 / 990
}

fn block_v2(directory: &Path, block: &LinuxBlockIo) -> Result<()> {
    if let Some(weight) = block.weight().filter(|weight| *weight != 0) {
        if directory.join("io.bfq.weight").exists() {
            set(directory, "io.bfq.weight", weight.to_string())?;
        } else {
            set(
                directory,
                "io.weight",
                format!("default {}", io_weight(weight.into())),
            )?;
        }
    }
    for device in block.weight_device().iter().flatten() {
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            set(
                directory,
                "io.bfq.weight",
                format!("{}:{} {weight}", device.major(), device.minor()),
            )?;
        }
    }
    let throttles: [(&str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        ("rbps", block.throttle_read_bps_device()),
        ("wbps", block.throttle_write_bps_device()),
        ("riops", block.throttle_read_iops_device()),
        ("wiops", block.throttle_write_iops_device()),
    ];
    for (key, devices) in throttles {
        for device in devices.iter().flatten() {
            let rate = if device.rate() == 0 {
                "max".to_owned()
            } else {
                device.rate().to_string()
            };
            set(
                directory,
                "io.max",
                format!("{}:{} {key}={rate}", device.major(), device.minor()),
            )?;
        }
    }
    Ok(())
}

fn pids_limit(limit: i64) -> String {
    if limit > 0 {
        limit.to_string()
    } else {
        "max".to_owned()
    }
}

fn page_size(size: &str) -> Result<&str> {
    if !size.is_empty() && size.chars().all(|c| c.is_ascii_alphanumeric()) {
        return Ok(size);
    }
    Err(Error::invalid(format!(
        "linux.resources.hugepageLimits: {size:?} is no page size such as 2MB"
    )))
}

fn rdma_line(device: &str, handles: Option<u32>, objects: Option<u32>) -> String {
    let word =
        |value: Option<u32>| value.map_or_else(|| "max".to_owned(), |value| value.to_string());
    format!(
        "{device} hca_handle={} hca_object={}",
        word(handles),
        word(objects)
    )
}

/// A new v1 cpuset is empty, and nothing can join it: every level takes over what its parent has.
pub(super) fn inherit_cpuset(root: &Path, directory: &Path) -> Result<()> {
    let below = directory.strip_prefix(root).unwrap_or(Path::new(""));
    let mut at = root.to_owned();
    for part in below.components() {
        let parent = at.clone();
        at.push(part);
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if read(&at.join(file))?.trim().is_empty() {
                set(&at, file, read(&parent.join(file))?.trim())?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_weights_meet_at_their_ends() {
        assert_eq!(weight_of_shares(2), 1);
        assert_eq!(weight_of_shares(262_144), 10_000);
        assert_eq!(weight_of_shares(0), 1);
        assert_eq!(weight_of_shares(1024), 39);
    }

    #[test]
    fn swap_is_what_exceeds_memory() {
        assert_eq!(swap_v2(200, 100).unwrap(), Some(100));
        assert_eq!(swap_v2(-1, 100).unwrap(), Some(-1));
        assert_eq!(swap_v2(0, 100).unwrap(), None);
        assert!(swap_v2(50, 100).is_err());
        assert!(swap_v2(50, 0).is_err());
    }

    #[test]
    fn a_page_size_is_no_path() {
        assert!(page_size("2MB").is_ok());
        assert!(page_size("../x").is_err());
    }
}
