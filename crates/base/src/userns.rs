//! Whether this process is root of the host, or only of a user namespace (user_namespaces(7)).

use std::sync::OnceLock;

/// The variable by which a daemon of an ordinary user knows, after it made itself root of a namespace, whose it is.
pub const ROOTLESS: &str = "BERTH_ROOTLESS";

/// Whether ids are mapped: root here is somebody else outside, may make no device nodes, and set no trusted attributes.
pub fn inside() -> bool {
    static INSIDE: OnceLock<bool> = OnceLock::new();
    *INSIDE.get_or_init(|| {
        std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !is_identity(&map))
    })
}

/// Whether this is the process of somebody who is not the host's root.
pub fn is_rootless() -> bool {
    !rustix::process::geteuid().is_root() || inside()
}

/// Whether a group's number means anything here: a file system cannot be given to one that is not mapped.
pub fn maps_group(gid: u32) -> bool {
    std::fs::read_to_string("/proc/self/gid_map").map_or(true, |map| mapped(&map, gid))
}

/// Whether further groups can be set: not by an ordinary user without subordinate ids.
pub fn may_set_groups() -> bool {
    std::fs::read_to_string("/proc/self/setgroups").map_or(true, |text| text.trim() != "deny")
}

fn mapped(map: &str, id: u32) -> bool {
    map.lines().any(|line| {
        let numbers: Vec<u64> = line
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        matches!(numbers[..], [first, _, count] if (first..first + count).contains(&u64::from(id)))
    })
}

/// The user whose daemon this is, where it is that of an ordinary one.
pub fn owner() -> Option<u32> {
    std::env::var(ROOTLESS).ok()?.parse().ok()
}

/// Whether a mapping is that of the first namespace: all ids to themselves.
fn is_identity(map: &str) -> bool {
    let words: Vec<&str> = map.split_whitespace().collect();
    words == ["0", "0", "4294967295"]
}

/// The first range of subordinate ids of a user in the text of `/etc/subuid` or `/etc/subgid` (subuid(5)): first, count.
pub fn subordinate_range(text: &str, name: &str, uid: u32) -> Option<(u32, u32)> {
    let number = uid.to_string();
    text.lines().find_map(|line| {
        let mut fields = line.trim().split(':');
        let owner = fields.next()?;
        let (first, count) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        ((owner == name && !name.is_empty()) || owner == number).then_some((first, count))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_told_apart() {
        assert!(is_identity("         0          0 4294967295\n"));
        assert!(!is_identity("0 1000 1\n1 100000 65536\n"));
        assert!(mapped("0 1000 1\n1 100000 65536\n", 5) && mapped("0 0 4294967295", 5));
        assert!(!mapped("0 1000 1\n", 5) && !mapped("nonsense", 0));
    }

    #[test]
    fn ranges_are_found_by_name_and_by_number() {
        let text = "other:1:2\nme:100000:65536\n1007:200000:5\nbroken\n";
        assert_eq!(subordinate_range(text, "me", 1000), Some((100_000, 65_536)));
        assert_eq!(subordinate_range(text, "x", 1007), Some((200_000, 5)));
        assert_eq!(subordinate_range(text, "", 9), None);
    }
}
