//! The daemon of an ordinary user: it makes itself root of a user namespace of its own (user_namespaces(7)), in which it
//! may mount and own files of many ids, and starts anew there.
//!
//! ```text
//! berth serve (user)  ── unshare(user, mount) ──▶  newuidmap, newgidmap from outside  ──▶  exec berth serve (root inside)
//!        │
//!        └── where a keeper or gateway of an earlier daemon lives: setns(its namespaces)  ▶  exec
//! ```
//!
//! The daemon's own network stays the host's, for its pulls and pushes; its bridges are in a namespace of their own
//! ([`net::gateway`]). Limits need a cgroup handed to the user.

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base::paths::Paths;
use base::pidfd::ProcessKey;
use base::userns::{ROOTLESS, owner, subordinate_range};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces};
use tracing::{info, warn};

use crate::failure::Failure;

/// The processes that keep the namespaces, for the next daemon.
fn note_path(paths: &Paths) -> PathBuf {
    paths.run.join("rootless.json")
}

/// Notes who keeps the namespaces after this daemon: the containers' keeper, the networks' gateway.
pub fn note(paths: &Paths, keepers: &[i32]) {
    if owner().is_none() {
        return;
    }
    let keys: Vec<ProcessKey> = keepers
        .iter()
        .filter_map(|pid| ProcessKey::of(*pid).ok())
        .collect();
    let noted = base::file::write_json(&note_path(paths), &keys, base::file::Durability::Process);
    if let Err(error) = noted {
        warn!(%error, "a daemon after this one will not find its containers");
    }
}

/// Makes this process root of a user namespace; returns only where it is root already. Must be called before there is a
/// second thread.
///
/// # Errors
/// Where the kernel or the host's settings allow no user namespaces.
pub fn enter(paths: &Paths) -> Result<(), Failure> {
    let uid = rustix::process::geteuid();
    if uid.is_root() {
        return Ok(());
    }
    let uid = uid.as_raw();
    fs::create_dir_all(&paths.run)
        .map_err(|e| Failure::io(format!("cannot make {}", paths.run.display()), &e))?;
    if !join(&note_path(paths)) {
        make(uid)?;
    }
    let error = Command::new("/proc/self/exe")
        .arg0("berth")
        .args(std::env::args_os().skip(1))
        .env(ROOTLESS, uid.to_string())
        .exec();
    Err(Failure::io("cannot start anew in a user namespace", &error))
}

/// Joins the namespaces of a process that still lives. Its user may: it made them.
fn join(note: &Path) -> bool {
    let Ok(Some(keys)) = base::file::read_json::<Vec<ProcessKey>>(note) else {
        return false;
    };
    let both = ThreadNameSpaceType::USER | ThreadNameSpaceType::MOUNT;
    keys.into_iter().any(|key| match key.open() {
        Ok(Some(process)) => move_into_thread_name_spaces(process.as_fd(), both).is_ok(),
        _ => false,
    })
}

fn make(uid: u32) -> Result<(), Failure> {
    let gid = rustix::process::getegid().as_raw();
    let name = user_name(uid);
    let range = |file: &str| {
        fs::read_to_string(file)
            .ok()
            .and_then(|text| subordinate_range(&text, &name, uid))
    };
    let ranges = range("/etc/subuid").zip(range("/etc/subgid"));
    // The helpers are set-user-id programs, which must be started outside: this one waits until the namespace is there.
    let helper = ranges
        .filter(|_| base::host::program("newuidmap").is_some())
        .map(|((uids, uid_count), (gids, gid_count))| {
            let pid = std::process::id();
            Command::new("sh")
                .arg("-c")
                .arg(format!(
                    "read go && newuidmap {pid} 0 {uid} 1 1 {uids} {uid_count} && newgidmap {pid} 0 {gid} 1 1 {gids} {gid_count}"
                ))
                .stdin(Stdio::piped())
                .spawn()
        })
        .transpose()
        .map_err(|e| Failure::io("cannot start newuidmap", &e))?;
    // SAFETY: this process has one thread, which is about to execute itself anew; no descriptor changes its meaning.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNS) }.map_err(
        |errno| {
            Failure::new(
                base::Kind::Unsupported,
                format!("this host gives ordinary users no user namespaces: {errno}"),
            )
            .with_fix("sudo sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000, or run the daemon as root: sudo berth serve")
        },
    )?;
    if let Some(mut helper) = helper {
        let told = helper.stdin.take().map(|mut input| input.write_all(b"\n"));
        let status = helper
            .wait()
            .map_err(|e| Failure::io("cannot wait for newuidmap", &e))?;
        if status.success() && told.is_some_and(|told| told.is_ok()) {
            info!(user = uid, "root of a user namespace with subordinate ids");
            return Ok(());
        }
        return Err(Failure::new(
            base::Kind::Permission,
            format!("newuidmap or newgidmap refuses the ranges of /etc/subuid and /etc/subgid ({status})"),
        )
        .with_fix(format!(
            "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}"
        )));
    }
    warn!(
        user = uid,
        "no subordinate ids: containers see one user only, and images with others cannot be unpacked (apt-get install uidmap; sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name})"
    );
    let write = |file: &str, text: String| {
        fs::write(format!("/proc/self/{file}"), text)
            .map_err(|e| Failure::io(format!("cannot write /proc/self/{file}"), &e))
    };
    write("setgroups", "deny".into())?;
    write("uid_map", format!("0 {uid} 1"))?;
    write("gid_map", format!("0 {gid} 1"))
}

/// The cgroup of the user's own service manager, below the root of the v2 tree, where this process is in it and the user may
/// make cgroups there (systemd.resource-control(5), `Delegate=`). From a login's session there is no way into it: nobody
/// but root may move a process out of there.
pub fn delegated_cgroup(user: u32) -> Option<String> {
    let root = Path::new("/sys/fs/cgroup");
    if !root.join("cgroup.controllers").exists() {
        return None;
    }
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let parent = manager_of(&own, user)?;
    let may = ["cgroup.procs", "cgroup.subtree_control"]
        .iter()
        .all(|file| {
            let path = root.join(&parent).join(file);
            rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok()
        });
    may.then_some(parent)
}

/// `user.slice/user-UID.slice/user@UID.service` in the text of /proc/PID/cgroup.
fn manager_of(cgroups: &str, user: u32) -> Option<String> {
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let name = format!("user@{user}.service");
    let mut parts = Vec::new();
    for part in path.split('/') {
        parts.push(part);
        if part == name {
            return Some(parts.join("/"));
        }
    }
    None
}

fn user_name(uid: u32) -> String {
    fs::read_to_string("/etc/passwd")
        .ok()
        .and_then(|text| {
            text.lines().find_map(|line| {
                let mut fields = line.split(':');
                let name = fields.next()?;
                (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
            })
        })
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_manager_is_found_above_its_services() {
        let own = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/berth.service\n";
        assert_eq!(
            manager_of(own, 1000).as_deref(),
            Some("user.slice/user-1000.slice/user@1000.service")
        );
        assert_eq!(manager_of(own, 1001), None);
        assert_eq!(
            manager_of("0::/user.slice/user-1000.slice/session-3.scope\n", 1000),
            None
        );
    }
}
