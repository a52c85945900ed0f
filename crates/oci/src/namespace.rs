//! Namespaces (runtime-spec, config-linux "Namespaces"): which are new, which are joined, and the id mappings.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::Command;

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};
use rustix::fs::{Mode, OFlags};

use crate::error::{Context, Error, Result};
use crate::syscall;

/// CLONE_NEWTIME, which libc has as a `c_int` on some targets only.
pub(crate) const CLONE_NEWTIME: i32 = 0x80;

/// All namespaces a process can have, in the order in which they must be joined: the user namespace first.
pub(crate) const ALL: [(i32, &str); 8] = [
    (libc::CLONE_NEWUSER, "user"),
    (libc::CLONE_NEWPID, "pid"),
    (libc::CLONE_NEWNET, "net"),
    (libc::CLONE_NEWIPC, "ipc"),
    (libc::CLONE_NEWUTS, "uts"),
    (libc::CLONE_NEWCGROUP, "cgroup"),
    (CLONE_NEWTIME, "time"),
    (libc::CLONE_NEWNS, "mnt"),
];

/// The namespaces of one container.
#[derive(Debug, Default)]
pub(crate) struct Namespaces {
    /// `CLONE_NEW*` of those to be made, without cgroup and time, which init makes at its own moment.
    pub new: i32,
    pub new_cgroup: bool,
    pub new_time: bool,
    /// Those to be joined, in joining order.
    pub joined: Vec<(i32, OwnedFd)>,
    pub uid_map: Vec<Range>,
    pub gid_map: Vec<Range>,
}

/// One line of an id mapping (user_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First id inside.
    pub inside: u32,
    /// First id outside.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

impl Namespaces {
    /// Reads the specification's list. `net` replaces what it says about the network.
    pub fn of(spec: &Spec, net: Option<OwnedFd>) -> Result<Namespaces> {
        let mut namespaces = Namespaces::default();
        let linux = spec
            .linux()
            .as_ref()
            .ok_or_else(|| Error::invalid("config.json: linux is missing"))?;
        let mut seen = 0;
        let mut joins: Vec<(i32, OwnedFd)> = Vec::new();
        if let Some(fd) = net {
            seen |= libc::CLONE_NEWNET;
            joins.push((libc::CLONE_NEWNET, fd));
        }
        let replaced = seen;
        for entry in linux.namespaces().iter().flatten() {
            let flag = flag_of(entry.typ());
            if replaced & flag != 0 {
                continue;
            }
            if seen & flag != 0 {
                return Err(Error::invalid(format!(
                    "config.json: linux.namespaces names {:?} twice",
                    entry.typ().to_string()
                )));
            }
            seen |= flag;
            match entry
                .path()
                .as_deref()
                .filter(|path| !path.as_os_str().is_empty())
            {
                Some(path) => {
                    let fd = open_namespace(path)?;
                    joins.push((flag, fd));
                }
                None if flag == libc::CLONE_NEWCGROUP => namespaces.new_cgroup = true,
                None if flag == CLONE_NEWTIME => namespaces.new_time = true,
                None => namespaces.new |= flag,
            }
        }
        joins.sort_by_key(|(flag, _)| ALL.iter().position(|(known, _)| known == flag));
        namespaces.joined = joins;
        if namespaces.new & libc::CLONE_NEWUSER != 0 {
            namespaces.uid_map = ranges(linux.uid_mappings().as_deref());
            namespaces.gid_map = ranges(linux.gid_mappings().as_deref());
            if namespaces.uid_map.is_empty() || namespaces.gid_map.is_empty() {
                return Err(Error::invalid(
                    "config.json: a new user namespace needs linux.uidMappings and linux.gidMappings",
                ));
            }
        } else if linux
            .uid_mappings()
            .as_ref()
            .is_some_and(|map| !map.is_empty())
            && !namespaces.joins(libc::CLONE_NEWUSER)
        {
            return Err(Error::invalid(
                "config.json: linux.uidMappings without a user namespace",
            ));
        }
        if linux
            .time_offsets()
            .as_ref()
            .is_some_and(|offsets| !offsets.is_empty())
            && !namespaces.new_time
        {
            return Err(Error::invalid(
                "config.json: linux.timeOffsets without a new time namespace",
            ));
        }
        Ok(namespaces)
    }

    pub fn is_new(&self, flag: i32) -> bool {
        self.new & flag != 0
    }

    pub fn joins(&self, flag: i32) -> bool {
        self.joined.iter().any(|(joined, _)| *joined == flag)
    }

    /// New or joined: not the host's (or the caller's).
    pub fn has(&self, flag: i32) -> bool {
        self.is_new(flag) || self.joins(flag)
    }

    pub fn joined_fd(&self, flag: i32) -> Option<BorrowedFd<'_>> {
        self.joined
            .iter()
            .find(|(joined, _)| *joined == flag)
            .map(|(_, fd)| fd.as_fd())
    }
}

fn flag_of(kind: LinuxNamespaceType) -> i32 {
    match kind {
        LinuxNamespaceType::Mount => libc::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
        LinuxNamespaceType::User => libc::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
        LinuxNamespaceType::Network => libc::CLONE_NEWNET,
        LinuxNamespaceType::Time => CLONE_NEWTIME,
    }
}

fn open_namespace(path: &Path) -> Result<OwnedFd> {
    let fd = rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )
    .during(|| format!("open the namespace {}", path.display()))?;
    const NSFS_MAGIC: i64 = 0x6e73_6673;
    if !syscall::is_filesystem(&fd, NSFS_MAGIC).during(|| format!("statfs {}", path.display()))? {
        return Err(Error::invalid(format!(
            "{} is not a namespace",
            path.display()
        )));
    }
    Ok(fd)
}

/// The specification's mappings as plain ranges.
pub(crate) fn ranges(mappings: Option<&[LinuxIdMapping]>) -> Vec<Range> {
    mappings
        .unwrap_or_default()
        .iter()
        .map(|map| Range {
            inside: map.container_id(),
            outside: map.host_id(),
            count: map.size(),
        })
        .collect()
}

/// The outside id of `inside`, where it is mapped.
pub(crate) fn outside(map: &[Range], inside: u32) -> Option<u32> {
    map.iter().find_map(|range| {
        let offset = inside.checked_sub(range.inside)?;
        (offset < range.count)
            .then(|| range.outside.checked_add(offset))
            .flatten()
    })
}

fn lines(map: &[Range]) -> String {
    map.iter()
        .map(|range| format!("{} {} {}\n", range.inside, range.outside, range.count))
        .collect()
}

/// Writes the id mappings of the process `pid`, which is in a new user namespace and waits.
///
/// Without privileges over the outside ids, `newuidmap` and `newgidmap` (the shadow package) do it.
pub(crate) fn write_mappings(pid: i32, uid_map: &[Range], gid_map: &[Range]) -> Result<()> {
    write_mapping(pid, "uid_map", "newuidmap", uid_map)?;
    match write_proc(pid, "gid_map", &lines(gid_map)) {
        Ok(()) => return Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
        Err(error) => return Err(error).during(|| format!("write /proc/{pid}/gid_map")),
    }
    // Unprivileged: a single own gid is allowed once setgroups(2) is given up (user_namespaces(7)).
    if gid_map.len() == 1
        && gid_map[0].count == 1
        && gid_map[0].outside == rustix::process::getegid().as_raw()
    {
        write_proc(pid, "setgroups", "deny").during(|| format!("write /proc/{pid}/setgroups"))?;
        return write_proc(pid, "gid_map", &lines(gid_map))
            .during(|| format!("write /proc/{pid}/gid_map"));
    }
    run_mapper("newgidmap", pid, gid_map)
}

fn write_mapping(pid: i32, file: &str, helper: &str, map: &[Range]) -> Result<()> {
    match write_proc(pid, file, &lines(map)) {
        Ok(()) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => run_mapper(helper, pid, map),
        Err(error) => Err(error).during(|| format!("write /proc/{pid}/{file}")),
    }
}

fn write_proc(pid: i32, file: &str, text: &str) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .open(format!("/proc/{pid}/{file}"))?
        .write_all(text.as_bytes())
}

fn run_mapper(helper: &str, pid: i32, map: &[Range]) -> Result<()> {
    let mut command = Command::new(helper);
    command.arg(pid.to_string());
    for range in map {
        command.args([
            range.inside.to_string(),
            range.outside.to_string(),
            range.count.to_string(),
        ]);
    }
    let output = command
        .output()
        .during(|| format!("run {helper} (Debian: apt install uidmap)"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{helper} refused the id mapping ({}): see /etc/subuid and /etc/subgid",
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}

/// A user namespace with these mappings and no process in it, for an id-mapped mount (mount_setattr(2)).
pub(crate) fn mapping_namespace(uid_map: &[Range], gid_map: &[Range]) -> Result<OwnedFd> {
    let (ours, theirs) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).during(|| "pipe".into())?;
    // SAFETY: callers of the runtime are single-threaded; the child only reads a pipe and exits.
    let child = unsafe { syscall::clone3(libc::CLONE_NEWUSER as u64, None) };
    let child = match child.during(|| "make a user namespace for an id-mapped mount".into())? {
        Some(child) => child,
        None => {
            drop(theirs);
            let mut byte = [0u8; 1];
            let _ = rustix::io::read(&ours, &mut byte);
            syscall::exit_now(0);
        }
    };
    let made = write_mappings(child.pid, uid_map, gid_map).and_then(|()| {
        rustix::fs::open(
            format!("/proc/{}/ns/user", child.pid),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .during(|| "open the user namespace of an id-mapped mount".into())
    });
    drop(theirs);
    let _ = crate::process::wait(child.pidfd.as_fd());
    made
}

/// The namespaces of the process `pid` that are not this process's own, as `CLONE_NEW*` flags.
pub(crate) fn differing(pid: i32) -> Result<i32> {
    let mut flags = 0;
    for (flag, name) in ALL {
        let theirs = match rustix::fs::stat(format!("/proc/{pid}/ns/{name}")) {
            Ok(stat) => stat,
            // A kernel without this kind of namespace, or, with no other readable, no such process.
            Err(rustix::io::Errno::NOENT) if flag == CLONE_NEWTIME => continue,
            Err(errno) => {
                return Err(errno)
                    .during(|| format!("look at the {name} namespace of process {pid}"));
            }
        };
        let ours = rustix::fs::stat(format!("/proc/self/ns/{name}"))
            .during(|| format!("look at the own {name} namespace"))?;
        if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino) {
            flags |= flag;
        }
    }
    Ok(flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_translated_by_the_range_that_holds_them() {
        let map = [
            Range {
                inside: 0,
                outside: 1000,
                count: 1,
            },
            Range {
                inside: 1,
                outside: 100_000,
                count: 65535,
            },
        ];
        assert_eq!(outside(&map, 0), Some(1000));
        assert_eq!(outside(&map, 2), Some(100_001));
        assert_eq!(outside(&map, 65536), None);
        let edge = [Range {
            inside: 0,
            outside: u32::MAX,
            count: 2,
        }];
        assert_eq!(outside(&edge, 1), None);
    }

    #[test]
    fn a_namespace_named_twice_is_refused() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.2.0","linux":{"namespaces":[{"type":"pid"},{"type":"pid"}]}}"#,
        )
        .unwrap();
        assert!(
            Namespaces::of(&spec, None)
                .unwrap_err()
                .to_string()
                .contains("twice")
        );
    }

    #[test]
    fn a_file_is_not_a_namespace() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.2.0","linux":{"namespaces":[{"type":"network","path":"/etc/passwd"}]}}"#,
        )
        .unwrap();
        assert!(
            Namespaces::of(&spec, None)
                .unwrap_err()
                .to_string()
                .contains("not a namespace")
        );
    }
}
