//! The one clone3(2) that makes a container's process, whatever namespaces it joins on the way.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::channel::Channel;
use crate::error::{Context, Error, Result};
use crate::namespace::Namespaces;
use crate::process;
use crate::syscall::{self, Child};

/// Clones init with its new namespaces. `None` in init.
pub(super) fn clone(
    flags: u64,
    namespaces: &Namespaces,
    staged: bool,
    birthplace: Option<BorrowedFd<'_>>,
) -> Result<Option<Child>> {
    if staged || (namespaces.joined_fd(libc::CLONE_NEWPID).is_some() && base::userns::inside()) {
        return clone_staged(flags, &namespaces.joined, birthplace);
    }
    let own = match namespaces.joined_fd(libc::CLONE_NEWPID) {
        Some(pid_namespace) => Some(enter_pid_namespace(pid_namespace)?),
        None => None,
    };
    // SAFETY: callers of the runtime are single-threaded (see the crate's documentation).
    let child = unsafe { syscall::clone3(flags, birthplace) };
    if let (Some(own), Ok(Some(_)) | Err(_)) = (own, &child) {
        leave_pid_namespace(&own)?;
    }
    child.during(|| explain_clone(flags))
}

fn explain_clone(flags: u64) -> String {
    if flags & libc::CLONE_NEWUSER as u64 != 0 {
        "clone3 with a new user namespace (is /proc/sys/user/max_user_namespaces above 0?)".into()
    } else {
        "clone3 with the container's namespaces (are you root, or is a user namespace asked for?)"
            .into()
    }
}

/// Children of this process are born in that pid namespace until [`leave_pid_namespace`]. The runtime hides its
/// memory and descriptors meanwhile: the container can see its children from their first moment on.
pub(super) fn enter_pid_namespace(namespace: BorrowedFd<'_>) -> Result<OwnedFd> {
    let own = rustix::fs::open(
        "/proc/self/ns/pid",
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .during(|| "open the own pid namespace".into())?;
    syscall::prctl(libc::PR_SET_DUMPABLE, 0, 0).during(|| "prctl".into())?;
    syscall::setns(namespace, libc::CLONE_NEWPID)
        .during(|| "join the container's pid namespace".into())?;
    Ok(own)
}

pub(super) fn leave_pid_namespace(own: &OwnedFd) -> Result<()> {
    syscall::setns(own.as_fd(), libc::CLONE_NEWPID)
        .during(|| "return to the own pid namespace".into())
}

/// As [`clone`], by way of a process that joins the user namespace first, so that the new namespaces belong to it.
/// Init becomes a child of this process all the same (CLONE_PARENT), and its pidfd lands in the descriptor table
/// that the process in between shares with this one (CLONE_FILES).
pub(super) fn clone_staged(
    flags: u64,
    joined: &[(i32, OwnedFd)],
    birthplace: Option<BorrowedFd<'_>>,
) -> Result<Option<Child>> {
    let (ours, theirs) = Channel::pair()?;
    syscall::prctl(libc::PR_SET_DUMPABLE, 0, 0).during(|| "prctl".into())?;
    // SAFETY: callers of the runtime are single-threaded (see the crate's documentation).
    let stage = unsafe { syscall::clone3(libc::CLONE_FILES as u64, birthplace) }
        .during(|| "clone3 of the process that joins the user namespace".into())?;
    let Some(stage) = stage else {
        let joined = joined
            .iter()
            .filter(|(flag, _)| *flag == libc::CLONE_NEWUSER || *flag == libc::CLONE_NEWPID);
        for (flag, fd) in joined {
            if let Err(error) = syscall::setns(fd.as_fd(), *flag)
                .during(|| "join a namespace of another container".into())
            {
                theirs.send_error(&error);
                syscall::exit_now(1);
            }
        }
        // SAFETY: this process has one thread, as its parent had.
        match unsafe { syscall::clone3(flags | libc::CLONE_PARENT as u64, None) }
            .during(|| explain_clone(flags))
        {
            Ok(None) => return Ok(None),
            Ok(Some(child)) => {
                let _ = theirs.send(b'P', &child.pidfd.as_raw_fd().to_le_bytes(), &[]);
                syscall::exit_now(0);
            }
            Err(error) => {
                theirs.send_error(&error);
                syscall::exit_now(1);
            }
        }
    };
    let _ = process::wait(stage.pidfd.as_fd());
    drop(theirs);
    let message = ours.expect(b'P')?;
    let number =
        <[u8; 4]>::try_from(&message.body[..]).map_err(|_| Error::invalid("no pidfd came back"))?;
    // SAFETY: the process in between stored this new descriptor in the table it shared, and has ended.
    let pidfd = unsafe { OwnedFd::from_raw_fd(i32::from_le_bytes(number)) };
    let information = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))
        .during(|| "read the pid of the new process".into())?;
    let pid = information
        .lines()
        .find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
    let pid = pid
        .filter(|pid| *pid > 0)
        .ok_or_else(|| Error::invalid("the new process ended at once"))?;
    Ok(Some(Child { pid, pidfd }))
}
