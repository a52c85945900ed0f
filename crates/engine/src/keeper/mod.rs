//! The keeper: the small process that is the parent of all container processes and outlives the daemon.
//!
//! One thread, one epoll loop. It may fork at any time, because nothing else runs in it; it holds terminals and
//! pipes, writes logs and exit records, and passes bytes between containers and attached clients. All else is the
//! daemon's.

pub(crate) mod client;
mod launch;
pub mod log;
mod process;
pub mod protocol;
mod shared_memory;
mod streams;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

/// Runs the keeper until no daemon is connected and no container lives: `berth keeper`, with the listening
/// socket as descriptor 0. Call it before anything else runs in the process.
///
/// It answers twice: the process it was started as ends at once, so that its parent has nothing to reap.
pub fn main(args: impl IntoIterator<Item = String>) -> ExitCode {
    if let Some(other) = args.into_iter().next() {
        eprintln!("berth keeper: {other:?} is not understood; the daemon starts the keeper itself");
        return ExitCode::from(base::Kind::Invalid.exit_code());
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("berth keeper: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let listener = take_listener()?;
    // SAFETY: this process has one thread, so the child may do anything its parent may.
    match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        0 => {}
        _ => return Ok(()),
    }
    let _ = rustix::process::setsid();
    rustix::process::chdir("/")?;
    // Containers must not die of what is sent to the daemon's group. Handlers, not SIG_IGN: an ignored signal would
    // stay ignored in every container.
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler does nothing, which is safe at any point.
        unsafe {
            libc::signal(
                signal,
                disregard as extern "C" fn(libc::c_int) as libc::sighandler_t,
            )
        };
    }
    rename();
    process::raise_descriptor_limit();
    // The last to be killed when memory runs out; containers set their own value.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    process::Keeper::new(listener)?.run()
}

extern "C" fn disregard(_: libc::c_int) {}

/// Moves the listening socket from descriptor 0, and puts `/dev/null` there.
fn take_listener() -> io::Result<OwnedFd> {
    let stdin = io::stdin();
    match rustix::net::sockopt::socket_acceptconn(stdin.as_fd()) {
        Ok(true) => {}
        _ => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "descriptor 0 is no listening socket; the daemon starts the keeper itself",
            ));
        }
    }
    let listener = rustix::io::fcntl_dupfd_cloexec(stdin.as_fd(), 3)?;
    let null = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(listener)
}

/// Shown by ps(1), which else says `exe`.
fn rename() {
    let _ = rustix::thread::set_name(c"berth-keeper");
}
