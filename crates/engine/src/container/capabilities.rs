//! Which capabilities(7) a container has.

use crate::error::{Error, Result};

/// What a container has unless told otherwise: Docker's choice.
pub(crate) const DEFAULT: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// All, by number.
const ALL: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// The set of a container.
///
/// # Errors
/// [`Error::Invalid`] for names that are none.
pub(crate) fn of(privileged: bool, add: &[String], drop: &[String]) -> Result<Vec<&'static str>> {
    let add = named(add, "CapAdd")?;
    let drop = named(drop, "CapDrop")?;
    if privileged {
        return Ok(possible());
    }
    let all_added = add.contains(&"ALL");
    let all_dropped = drop.contains(&"ALL");
    let possible = possible();
    let start: Vec<&'static str> = match (all_added, all_dropped) {
        (true, _) => possible.clone(),
        (false, true) => Vec::new(),
        (false, false) => DEFAULT
            .iter()
            .copied()
            .filter(|name| possible.contains(name))
            .collect(),
    };
    let mut set: Vec<&'static str> = start
        .into_iter()
        .filter(|name| !drop.contains(name))
        .collect();
    for name in add {
        if name == "ALL" || set.contains(&name) {
            continue;
        }
        if !possible.contains(&name) {
            return Err(Error::Invalid(format!(
                "invalid CapAdd: this daemon does not have {name} to give"
            )));
        }
        set.push(name);
    }
    Ok(set)
}

fn named(words: &[String], field: &str) -> Result<Vec<&'static str>> {
    words
        .iter()
        .map(|word| {
            let upper = word.to_ascii_uppercase();
            if upper == "ALL" {
                return Ok("ALL");
            }
            let full = if upper.starts_with("CAP_") {
                upper
            } else {
                format!("CAP_{upper}")
            };
            ALL.iter()
                .find(|name| **name == full)
                .copied()
                .ok_or_else(|| {
                    Error::Invalid(format!("invalid {field}: unknown capability: {word:?}"))
                })
        })
        .collect()
}

/// What this process could give: its own bounding set.
fn possible() -> Vec<&'static str> {
    let bounding = std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("CapBnd:"))?;
            u64::from_str_radix(line.trim(), 16).ok()
        });
    let bounding = bounding.unwrap_or(u64::MAX);
    ALL.iter()
        .enumerate()
        .filter(|(bit, _)| bounding & (1 << bit) != 0)
        .map(|(_, name)| *name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &[&str]) -> Vec<String> {
        list.iter().map(|word| word.to_string()).collect()
    }

    #[test]
    fn names_are_read_with_and_without_prefix() {
        let set = of(false, &words(&["chown"]), &words(&["all"])).unwrap();
        assert_eq!(set, ["CAP_CHOWN"]);
        let set = of(false, &[], &words(&["CAP_MKNOD"])).unwrap();
        assert!(!set.contains(&"CAP_MKNOD") && set.contains(&"CAP_KILL"));
        assert!(of(false, &words(&["CAP_FLY"]), &[]).is_err());
    }
}
