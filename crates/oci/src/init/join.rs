//! A process that joins a running container.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::finish::Finish;
use super::take_fds;
use crate::cgroup;
use crate::error::{Context, Result};
use crate::process;
use crate::scheduling;
use crate::syscall;
use crate::terminal::{self, Size};

/// All a process that joins a container needs.
pub(crate) struct Join<'a> {
    pub target: BorrowedFd<'a>,
    pub flags: i32,
    /// The user namespace has been joined on the way here.
    pub staged: bool,
    pub tasks: Vec<OwnedFd>,
    /// `Some` where it gets a terminal of the container.
    pub terminal: Option<Option<Size>>,
    pub stdio: Option<[OwnedFd; 3]>,
    pub finish: Finish<'a>,
}

/// Joins the container and executes the program.
pub(crate) fn join(mut join: Join<'_>) -> ! {
    match join.set_up() {
        Ok(()) => join.finish.run(),
        Err(error) => {
            join.finish.channel.send_error(&error);
            syscall::exit_now(1);
        }
    }
}

impl Join<'_> {
    fn set_up(&mut self) -> Result<()> {
        syscall::prctl(libc::PR_SET_DUMPABLE, 0, 0).during(|| "prctl".into())?;
        syscall::reset_known_signals();
        self.finish.channel.expect(b'm')?;
        let affinity = self.finish.process.exec_cpu_affinity().as_ref();
        if let Some(list) = affinity.and_then(|affinity| affinity.initial().as_deref()) {
            scheduling::set_affinity(list)?;
        }
        cgroup::join(&self.tasks)?;
        self.tasks.clear();
        if let Some(list) = affinity.and_then(|affinity| affinity.cpu_affinity_final().as_deref()) {
            scheduling::set_affinity(list)?;
        }
        // The label's file is opened while /proc still is the host's.
        self.finish.label = process::open_label(self.finish.process)?;
        let rest = self.flags & !libc::CLONE_NEWPID;
        let rest = if self.staged {
            rest & !libc::CLONE_NEWUSER
        } else {
            rest
        };
        if rest != 0 {
            syscall::setns(self.target, rest)
                .during(|| "join the container's namespaces".into())?;
        }
        if self.flags & libc::CLONE_NEWUSER != 0 {
            let _ = syscall::set_groups(&[]);
            // Where root is not mapped, the capabilities that came with the join still do.
            let _ = syscall::set_ids(0, 0);
        }
        let _ = rustix::process::setsid();
        rustix::process::umask(Mode::empty());
        if let Some(size) = self.terminal {
            let root = rustix::fs::open(
                "/",
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .during(|| "open the container's root".into())?;
            let pty = terminal::open(root.as_fd(), size, self.finish.process.user().uid())?;
            self.finish.channel.send(b'T', &[], &[pty.master.as_fd()])?;
            terminal::take(pty.slave.as_fd())?;
        }
        if let Some(fds) = &self.stdio {
            take_fds(fds)?;
        }
        Ok(())
    }
}
