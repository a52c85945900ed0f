//! Processes that the daemon starts and that outlive it. Each listens on a seqpacket socket in the run folder, which it gets
//! as descriptor 0, and writes to a log beside it.

use std::ffi::CStr;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with, sockopt};

/// Starts the companion `name` with `command` (a program and its first arguments). The socket is made here, so that a
/// connection waits instead of failing.
///
/// # Errors
/// Where the socket cannot be made, or the program does not say that it goes on ([`detach`]).
pub fn start(name: &str, run: &Path, socket: &Path, command: &[PathBuf]) -> io::Result<()> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let listener = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(socket)?)?;
    std::fs::set_permissions(socket, Permissions::from_mode(0o600))?;
    rustix::net::listen(&listener, 4)?;
    let journal = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(run.join(format!("{name}.log")))?;
    let missing = || {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("no {name} is configured"),
        )
    };
    let (program, arguments) = command.split_first().ok_or_else(missing)?;
    let status = Command::new(program)
        .args(arguments)
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .stdin(Stdio::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::from(journal))
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("the {name} ended with {status}")))
    }
}

/// In the companion: moves the listening socket from descriptor 0, and puts `/dev/null` there.
///
/// # Errors
/// Where a person started it, who gives no socket.
pub fn take_listener(name: &str) -> io::Result<OwnedFd> {
    let stdin = io::stdin();
    if !matches!(sockopt::socket_acceptconn(stdin.as_fd()), Ok(true)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("descriptor 0 is no listening socket; the daemon starts the {name} itself"),
        ));
    }
    let listener = rustix::io::fcntl_dupfd_cloexec(stdin.as_fd(), 3)?;
    rustix::stdio::dup2_stdin(&File::open("/dev/null")?)?;
    Ok(listener)
}

/// In the companion: goes on in a child with a session of its own, called `name` by ps(1), which may open as many files as is
/// allowed. False in the process that was started, which is to end now, so that the daemon has nothing to reap.
///
/// # Errors
/// Where there can be no further process.
///
/// # Safety
/// The calling process has one thread.
pub unsafe fn detach(name: &CStr) -> io::Result<bool> {
    // SAFETY: with one thread the child may do anything its parent may.
    match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        0 => {}
        _ => return Ok(false),
    }
    let _ = rustix::process::setsid();
    rustix::process::chdir("/")?;
    let _ = rustix::thread::set_name(name);
    raise_descriptor_limit();
    Ok(true)
}

fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let most = Rlimit {
        current: maximum,
        maximum,
    };
    let _ = setrlimit(Resource::Nofile, most);
}
