//! `--ipc container:X`: the other container's `/dev/shm`, which is a mount in that container's namespace alone.
//!
//! A mount can be copied only from within the namespace it is in (open_tree(2)), and put only into the one the caller is
//! in (move_mount(2)). A child of the keeper, which has one thread and so may fork, goes to the one and then the other.
//! The container's init waits meanwhile, so nothing can change its paths.

use std::fs::File;
use std::io;

use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const PLACE: &str = "/dev/shm";

/// Puts `donor`'s `/dev/shm` over that of `joiner`, both by pid.
///
/// # Errors
/// Where either has ended, or has no such mount.
pub(super) fn share(donor: i32, joiner: i32) -> io::Result<()> {
    let namespace = |pid: i32| File::open(format!("/proc/{pid}/ns/mnt"));
    let (from, to) = (namespace(donor)?, namespace(joiner)?);
    // SAFETY: the keeper has one thread, so the child finds every lock free; it ends without returning.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let code = match carry(&from, &to) {
                Ok(()) => 0,
                Err(error) => error.raw_os_error(),
            };
            // SAFETY: ends this process at once; nothing of the keeper's is flushed or dropped twice.
            unsafe { libc::_exit(code) }
        }
        child => wait(child),
    }
}

fn carry(from: &File, to: &File) -> rustix::io::Result<()> {
    use std::os::fd::AsFd;
    move_into_link_name_space(from.as_fd(), Some(LinkNameSpaceType::Mount))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let memory = open_tree(rustix::fs::CWD, PLACE, flags)?;
    move_into_link_name_space(to.as_fd(), Some(LinkNameSpaceType::Mount))?;
    move_mount(
        &memory,
        "",
        rustix::fs::CWD,
        PLACE,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
}

fn wait(child: i32) -> io::Result<()> {
    let child = rustix::process::Pid::from_raw(child).ok_or(io::ErrorKind::InvalidInput)?;
    loop {
        match rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty()) {
            Ok(Some((_, status))) => {
                return match status.exit_status() {
                    Some(0) => Ok(()),
                    Some(code) => Err(io::Error::from_raw_os_error(code)),
                    None => Err(io::Error::other(
                        "the child that carries a mount was killed",
                    )),
                };
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
