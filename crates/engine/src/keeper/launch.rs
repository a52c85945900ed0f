//! Making processes: standard streams here, everything else by the runtime.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use base::pidfd::ProcessKey;
use rustix::pipe::{PipeFlags, pipe_with};

use crate::keeper::protocol::{Exec, FailureKind, Launch, StdioRecord};

/// Why a process could not be made.
#[derive(Debug)]
pub(super) struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

/// A new process with our ends of its streams.
pub(super) struct Spawned {
    pub pid: i32,
    pub pidfd: OwnedFd,
    pub terminal: Option<OwnedFd>,
    /// Stdout (or the terminal) and stderr, not blocking.
    pub outputs: [Option<OwnedFd>; 2],
    pub input: Option<OwnedFd>,
}

/// An init that waits to be started.
pub(super) struct Waiting(());

impl Waiting {
    pub fn start(self) -> Result<(), Failure> {
        Ok(())
    }
}

/// Makes the init of a container.
pub(super) fn create(
    _id: &str,
    _directory: &Path,
    launch: &Launch,
    _net_ns: Option<OwnedFd>,
) -> Result<(Spawned, Waiting), Failure> {
    let _ = pipes(&launch.stdio);
    Err(Failure { kind: FailureKind::Unsupported, message: "no runtime in this build".into() })
}

/// Starts a process in a container.
pub(super) fn exec(
    _container: &str,
    _directory: &Path,
    _init: ProcessKey,
    _cgroup: &str,
    exec: &Exec,
) -> Result<Spawned, Failure> {
    let _ = pipes(&exec.stdio);
    Err(Failure { kind: FailureKind::Unsupported, message: "no runtime in this build".into() })
}

/// Whether the kernel has killed something in this cgroup for want of memory.
pub(super) fn oom_killed(cgroup: &str) -> bool {
    let count = |path: String, key: &str| {
        std::fs::read_to_string(path).ok().is_some_and(|text| {
            text.lines().filter_map(|line| line.split_once(' ')).any(|(name, value)| name == key && value != "0")
        })
    };
    count(format!("/sys/fs/cgroup/{cgroup}/memory.events"), "oom_kill")
        || count(format!("/sys/fs/cgroup/memory/{cgroup}/memory.oom_control"), "oom_kill")
}

/// Sets a terminal's size.
pub(super) fn resize(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

struct Pipes {
    theirs: [OwnedFd; 3],
    input: Option<OwnedFd>,
    outputs: [Option<OwnedFd>; 2],
}

fn pipes(stdio: &StdioRecord) -> io::Result<Pipes> {
    let (stdin, input) = if stdio.stdin {
        let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
        (theirs, Some(not_blocking(ours)?))
    } else {
        (std::fs::File::open("/dev/null")?.into(), None)
    };
    let (out, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (err, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok(Pipes {
        theirs: [stdin, stdout, stderr],
        input,
        outputs: [Some(not_blocking(out)?), Some(not_blocking(err)?)],
    })
}

/// The streams of a terminal's main side: its own descriptor, one to read, one to write (an epoll set takes each once).
fn terminal_streams(terminal: &OwnedFd) -> io::Result<(OwnedFd, OwnedFd)> {
    rustix::io::ioctl_fionbio(terminal, true)?;
    let output = rustix::io::fcntl_dupfd_cloexec(terminal.as_fd(), 3)?;
    let input = rustix::io::fcntl_dupfd_cloexec(terminal.as_fd(), 3)?;
    Ok((output, input))
}

fn not_blocking(fd: OwnedFd) -> io::Result<OwnedFd> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}
