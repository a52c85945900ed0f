//! A further process in a running container.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use oci_spec::runtime::{LinuxSeccomp, Process};

use super::clone::{clone_staged, enter_pid_namespace, leave_pid_namespace};
use super::talk::{Talk, follow};
use super::{Gate, Running, Stdio, Unfinished, set_oom_score};
use crate::bundle;
use crate::cgroup::{self, Cgroup, Hierarchies};
use crate::channel::Channel;
use crate::error::{Context, Error, Result};
use crate::init::{self, Finish};
use crate::namespace;
use crate::process;
use crate::seccomp::{self, Program};
use crate::syscall::{self, Child};

/// A further process in a running container. The caller must be single-threaded.
pub struct Exec<'a> {
    /// The container's id, for messages and keyrings.
    pub id: &'a str,
    /// The pid of the container's init, whose namespaces are joined.
    pub pid: i32,
    pub cgroup: Option<&'a Cgroup>,
    pub process: &'a Process,
    pub seccomp: Option<&'a LinuxSeccomp>,
    pub stdio: Stdio,
    pub preserve_fds: u32,
    pub listen_fds: u32,
    pub no_new_keyring: bool,
    pub rootless: bool,
    /// A cgroup below the container's, by its path there.
    pub sub_cgroup: Option<PathBuf>,
}

/// Runs a process in a container. When this returns, its program runs.
///
/// # Errors
/// As [`Created::start`]; a process begun is ended and reaped.
pub fn exec(request: Exec<'_>) -> Result<Running> {
    bundle::validate_process(request.process)?;
    let seccomp: Option<Rc<Program>> = request.seccomp.map(seccomp::compiled).transpose()?;
    let target = base::pidfd::PidFd::open(request.pid)
        .during(|| format!("open the container's process {}", request.pid))?;
    let flags = namespace::differing(request.pid)?;
    let mut cgroup = request.cgroup.cloned();
    if let (Some(cgroup), Some(below)) = (&mut cgroup, &request.sub_cgroup) {
        descend(cgroup, below)?;
    }
    let tasks = match &cgroup {
        Some(cgroup) => cgroup.task_files()?,
        None => Vec::new(),
    };
    let birthplace = match &cgroup {
        Some(cgroup) => cgroup.birthplace()?,
        None => None,
    };
    let privileged = rustix::process::geteuid().is_root();
    let (ours, theirs) = Channel::pair()?;
    let child = exec_clone(
        &request,
        flags,
        &target,
        birthplace.as_ref().map(AsFd::as_fd),
        privileged,
    )?;
    let Some(Child { pid, pidfd }) = child else {
        drop(ours);
        init::join(init::Join {
            target: target.as_fd(),
            flags,
            staged: joins_by_stage(flags, privileged),
            tasks,
            terminal: match request.stdio {
                Stdio::Terminal { size } => Some(size),
                _ => None,
            },
            stdio: match request.stdio {
                Stdio::Fds(fds) => Some(fds),
                _ => None,
            },
            finish: Finish {
                id: request.id,
                process: request.process,
                seccomp: seccomp.as_deref(),
                channel: theirs,
                gate: Gate::Open,
                preserve_fds: request.preserve_fds,
                listen_fds: request.listen_fds,
                no_new_keyring: request.no_new_keyring,
                make_directory: false,
                set_limits: flags & libc::CLONE_NEWUSER == 0,
                start_hooks: None,
                label: None,
            },
        });
    };
    drop((theirs, tasks));
    let mut unfinished = Unfinished {
        pidfd: Some(pidfd),
        cgroup: None,
    };
    if let Some(adjustment) = request.process.oom_score_adj() {
        set_oom_score(
            &pid.to_string(),
            adjustment,
            request.rootless || flags & libc::CLONE_NEWUSER != 0,
        )?;
    }
    if flags & libc::CLONE_NEWUSER != 0 {
        process::set_limits(
            pid,
            request.process.rlimits().as_deref().unwrap_or_default(),
        )?;
    }
    ours.send(b'm', &[], &[])?;
    let mut terminal = None;
    let listener = seccomp
        .as_ref()
        .and_then(|program| program.listener.as_ref());
    let talk = Talk {
        pid,
        pidfd: unfinished.pidfd.as_ref().map(AsFd::as_fd),
        launch: None,
        listener: listener.map(|(path, metadata)| (path.as_path(), metadata.as_str())),
    };
    follow(&ours, &talk, &mut terminal)?;
    let pidfd = unfinished
        .pidfd
        .take()
        .ok_or_else(|| Error::invalid("no pidfd"))?;
    Ok(Running {
        pid,
        pidfd,
        terminal,
        cgroup: request.cgroup.cloned(),
    })
}

/// Whether a process in between joins the user namespace, which alone gives the right to join the others.
fn joins_by_stage(flags: i32, privileged: bool) -> bool {
    !privileged && flags & libc::CLONE_NEWUSER != 0
}

fn exec_clone(
    request: &Exec<'_>,
    flags: i32,
    target: &base::pidfd::PidFd,
    birthplace: Option<BorrowedFd<'_>>,
    privileged: bool,
) -> Result<Option<Child>> {
    let user = joins_by_stage(flags, privileged);
    // Only the host's root comes back out of a pid namespace to the host's.
    let one_way = flags & libc::CLONE_NEWPID != 0 && base::userns::inside();
    if user || one_way {
        let open = |name: &str| {
            rustix::fs::open(
                format!("/proc/{}/ns/{name}", request.pid),
                rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )
            .during(|| format!("open the {name} namespace of process {}", request.pid))
        };
        let mut joined = Vec::new();
        if user {
            joined.push((libc::CLONE_NEWUSER, open("user")?));
        }
        if flags & libc::CLONE_NEWPID != 0 {
            joined.push((libc::CLONE_NEWPID, open("pid")?));
        }
        return clone_staged(0, &joined, birthplace);
    }
    let own = if flags & libc::CLONE_NEWPID != 0 {
        Some(enter_pid_namespace(target.as_fd())?)
    } else {
        None
    };
    let child = clone_here(request.pid, birthplace);
    // However it went: what is cloned next belongs here.
    if let (Some(own), Ok(Some(_)) | Err(_)) = (own, &child) {
        leave_pid_namespace(&own)?;
    }
    child
}

fn clone_here(init: i32, birthplace: Option<BorrowedFd<'_>>) -> Result<Option<Child>> {
    let failed = || "clone3 into the container".into();
    // SAFETY: callers of the runtime are single-threaded (see the crate's documentation).
    match unsafe { syscall::clone3(0, birthplace) } {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            // The container has handed controllers down (systemd does): only its leaves take processes. Its init is in
            // one.
            let leaf = cgroup::unified_path_of(init).zip(Hierarchies::of_host()?.unified);
            let Some((path, root)) = leaf else {
                return Err(error).during(failed);
            };
            let leaf = Cgroup {
                unified: Some(root.join(path.trim_start_matches('/'))),
                ..Cgroup::default()
            };
            let place = leaf.birthplace()?;
            // SAFETY: as above.
            unsafe { syscall::clone3(0, place.as_ref().map(AsFd::as_fd)) }.during(failed)
        }
        other => other.during(failed),
    }
}

fn descend(cgroup: &mut Cgroup, below: &Path) -> Result<()> {
    if below.components().any(|part| {
        !matches!(
            part,
            std::path::Component::Normal(_) | std::path::Component::RootDir
        )
    }) {
        return Err(Error::invalid(format!(
            "--cgroup {}: it must name a cgroup below the container's",
            below.display()
        )));
    }
    let below = below.strip_prefix("/").unwrap_or(below);
    for directory in cgroup.v1.values_mut().chain(&mut cgroup.unified) {
        directory.push(below);
    }
    Ok(())
}
