//! Scheduler, I/O priority, memory policy, CPU affinity, personality (runtime-spec 1.2 and 1.3, config-linux).

use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxMemoryPolicy, LinuxPersonality, LinuxPersonalityDomain,
    LinuxSchedulerFlag, LinuxSchedulerPolicy, MemoryPolicyFlagType, MemoryPolicyModeType,
    Scheduler,
};

use crate::error::{Context, Error, Result};
use crate::syscall::{self, SchedulerAttributes};

pub(crate) fn set_io_priority(priority: &LinuxIOPriority) -> Result<()> {
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let level = u16::try_from(priority.priority())
        .ok()
        .filter(|level| *level < 8)
        .ok_or_else(|| {
            Error::invalid(format!(
                "config.json: process.ioPriority.priority {} is not from 0 to 7",
                priority.priority()
            ))
        })?;
    syscall::set_io_priority(class, level).during(|| "set the I/O priority".into())
}

pub(crate) fn set_scheduler(scheduler: &Scheduler) -> Result<()> {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flags = scheduler.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSchedulerFlag::SchedResetOnFork => 0x01,
                LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
                LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
                LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
                LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
                LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
                LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
            }
    });
    syscall::set_scheduler(SchedulerAttributes {
        size: 0,
        policy,
        flags,
        nice: scheduler.nice().unwrap_or(0),
        priority: scheduler.priority().unwrap_or(0).max(0) as u32,
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
    })
    .during(|| "set the scheduler".into())
}

pub(crate) fn set_memory_policy(policy: &LinuxMemoryPolicy) -> Result<()> {
    let mut mode = match policy.mode() {
        MemoryPolicyModeType::MpolDefault => 0,
        MemoryPolicyModeType::MpolPreferred => 1,
        MemoryPolicyModeType::MpolBind => 2,
        MemoryPolicyModeType::MpolInterleave => 3,
        MemoryPolicyModeType::MpolLocal => 4,
        MemoryPolicyModeType::MpolPreferredMany => 5,
        MemoryPolicyModeType::MpolWeightedInterleave => 6,
    };
    for flag in policy.flags().iter().flatten() {
        mode |= match flag {
            MemoryPolicyFlagType::MpolFNumaBalancing => 1 << 13,
            MemoryPolicyFlagType::MpolFRelativeNodes => 1 << 14,
            MemoryPolicyFlagType::MpolFStaticNodes => 1 << 15,
        };
    }
    let mask = match policy.nodes().as_deref().filter(|nodes| !nodes.is_empty()) {
        Some(nodes) => parse_list(nodes).ok_or_else(|| {
            Error::invalid(format!(
                "config.json: linux.memoryPolicy.nodes {nodes:?} is no list such as 0-1,3"
            ))
        })?,
        None => Vec::new(),
    };
    syscall::set_memory_policy(mode, &mask).during(|| "set the memory policy".into())
}

/// Binds this process to the CPUs of a list such as `0-3,7`.
pub(crate) fn set_affinity(list: &str) -> Result<()> {
    let mask = parse_list(list).ok_or_else(|| {
        Error::invalid(format!(
            "config.json: process.execCPUAffinity {list:?} is no list such as 0-3,7"
        ))
    })?;
    syscall::set_affinity(&mask).during(|| format!("bind the process to the CPUs {list}"))
}

pub(crate) fn set_personality(personality: &LinuxPersonality) -> Result<()> {
    if personality
        .flags()
        .as_ref()
        .is_some_and(|flags| !flags.is_empty())
    {
        return Err(Error::unsupported(
            "config.json: linux.personality.flags are not defined by the specification yet",
        ));
    }
    let persona = match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    };
    syscall::set_personality(persona).during(|| "set the personality".into())
}

/// The bits of a list of numbers and ranges (cpuset(7), "List format"); `None` where it is none.
pub(crate) fn parse_list(list: &str) -> Option<Vec<u64>> {
    const MOST: usize = 8192;
    let mut mask = Vec::new();
    for part in list
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= MOST {
            return None;
        }
        if mask.len() <= last / 64 {
            mask.resize(last / 64 + 1, 0u64);
        }
        (first..=last).for_each(|bit| mask[bit / 64] |= 1 << (bit % 64));
    }
    (!mask.is_empty()).then_some(mask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lists_of_cpus_become_masks() {
        assert_eq!(parse_list("0-2,4"), Some(vec![0b10111]));
        assert_eq!(parse_list("64"), Some(vec![0, 1]));
        assert_eq!(parse_list("3-1"), None);
        assert_eq!(parse_list("99999999999"), None);
        assert_eq!(parse_list(""), None);
    }

    proptest! {
        #[test]
        fn no_list_panics(list in "[0-9,\\- ]{0,20}") {
            let _ = parse_list(&list);
        }
    }
}
