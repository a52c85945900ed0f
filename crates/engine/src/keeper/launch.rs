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
pub(super) struct Waiting(oci::Created);

impl Waiting {
    /// Lets it execute its program. A failure has ended and reaped the process.
    pub fn start(self) -> Result<(), Failure> {
        self.0.start().map(drop).map_err(Failure::of)
    }
}

impl Failure {
    fn of(error: oci::Error) -> Failure {
        let kind = base::Classified::kind(&error).into();
        let mut message = error.to_string();
        // A reason that the text does not hold yet.
        if let Some(source) = std::error::Error::source(&error).map(ToString::to_string)
            && !message.contains(&source)
        {
            message = format!("{message}: {source}");
        }
        Failure { kind, message }
    }
}

fn read_spec(directory: &Path) -> Result<oci_spec::runtime::Spec, Failure> {
    let path = directory.join("config.json");
    base::file::read_json(&path)
        .map_err(|error| Failure::system("reading the OCI configuration", error))?
        .ok_or_else(|| Failure::not_found(format!("{} is missing", path.display())))
}

/// Our ends and theirs of the streams a record asks for.
fn streams(record: &StdioRecord) -> Result<(oci::Stdio, Option<Pipes>), Failure> {
    if record.terminal {
        let size = (record.rows > 0 && record.columns > 0).then_some(oci::Size {
            columns: record.columns,
            rows: record.rows,
        });
        return Ok((oci::Stdio::Terminal { size }, None));
    }
    let mut pipes = pipes(record).map_err(|error| Failure::system("making pipes", error))?;
    let theirs = pipes.theirs.take();
    Ok((
        theirs.map_or(oci::Stdio::Inherit, oci::Stdio::Fds),
        Some(pipes),
    ))
}

fn spawned(
    pid: i32,
    pidfd: OwnedFd,
    terminal: Option<OwnedFd>,
    pipes: Option<Pipes>,
) -> Result<Spawned, Failure> {
    let (input, outputs) = match (&terminal, pipes) {
        (Some(terminal), _) => {
            let (output, input) = terminal_streams(terminal)
                .map_err(|error| Failure::system("opening the terminal", error))?;
            (Some(input), [Some(output), None])
        }
        (None, Some(pipes)) => (pipes.input, pipes.outputs),
        (None, None) => (None, [None, None]),
    };
    Ok(Spawned {
        pid,
        pidfd,
        terminal,
        outputs,
        input,
    })
}

/// Makes the init of a container.
pub(super) fn create(
    id: &str,
    directory: &Path,
    launch: &Launch,
    net_ns: Option<OwnedFd>,
) -> Result<(Spawned, Waiting), Failure> {
    let spec = read_spec(directory)?;
    let (stdio, pipes) = streams(&launch.stdio)?;
    let root = launch.root.clone();
    let request = oci::Launch {
        rootfs: oci::Rootfs::Overlay {
            lower: root.lower,
            upper: root.upper,
            work: root.work,
        },
        cgroup: oci::cgroup::CgroupTarget::Path(format!("/{}", launch.cgroup)),
        stdio,
        net_ns,
        rootless: base::userns::is_rootless(),
        ..oci::Launch::new(id, directory, &spec).map_err(Failure::of)?
    };
    let created = oci::create(request).map_err(Failure::of);
    stay_joinable();
    let mut created = created?;
    let pidfd = created
        .pidfd
        .try_clone()
        .map_err(|error| Failure::system("sharing a process descriptor", error))?;
    let spawned = spawned(created.pid, pidfd, created.terminal.take(), pipes)?;
    Ok((spawned, Waiting(created)))
}

/// Starts a process in a container.
pub(super) fn exec(
    container: &str,
    directory: &Path,
    init: ProcessKey,
    cgroup: &str,
    exec: &Exec,
) -> Result<Spawned, Failure> {
    let spec = read_spec(directory)?;
    let seccomp = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.seccomp().as_ref());
    let group = match oci::cgroup::Cgroup::open(&format!("/{cgroup}")) {
        Ok(group) => Some(group),
        // An ordinary user's containers have none.
        Err(_) if base::userns::is_rootless() => None,
        Err(error) => return Err(Failure::of(error)),
    };
    let (stdio, pipes) = streams(&exec.stdio)?;
    let running = oci::exec(oci::Exec {
        id: container,
        pid: init.pid,
        cgroup: group.as_ref(),
        process: &exec.process,
        seccomp,
        stdio,
        preserve_fds: 0,
        listen_fds: 0,
        no_new_keyring: false,
        rootless: base::userns::is_rootless(),
        sub_cgroup: None,
    })
    .map_err(Failure::of);
    stay_joinable();
    let running = running?;
    spawned(running.pid, running.pidfd, running.terminal, pipes)
}

/// The runtime hides this process from its children until they are in their container. The next daemon of an ordinary
/// user joins this one's namespaces, which it may only while it is not hidden.
fn stay_joinable() {
    if base::userns::is_rootless() {
        let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable);
    }
}

/// Whether the kernel has killed something in this cgroup for want of memory.
pub(super) fn oom_killed(cgroup: &str) -> bool {
    let count = |path: String, key: &str| {
        std::fs::read_to_string(path).ok().is_some_and(|text| {
            text.lines()
                .filter_map(|line| line.split_once(' '))
                .any(|(name, value)| name == key && value != "0")
        })
    };
    count(format!("/sys/fs/cgroup/{cgroup}/memory.events"), "oom_kill")
        || count(
            format!("/sys/fs/cgroup/memory/{cgroup}/memory.oom_control"),
            "oom_kill",
        )
}

/// Sets a terminal's size.
pub(super) fn resize(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = rustix::termios::Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

struct Pipes {
    theirs: Option<[OwnedFd; 3]>,
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
        theirs: Some([stdin, stdout, stderr]),
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

/// The side of a terminal that its programs have.
pub(super) fn other_side(terminal: &OwnedFd) -> Option<OwnedFd> {
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    ioctl_tiocgptpeer(terminal, flags).ok()
}

fn not_blocking(fd: OwnedFd) -> io::Result<OwnedFd> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}
