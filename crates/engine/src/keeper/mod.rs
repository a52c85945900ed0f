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
    let listener = base::companion::take_listener("keeper")?;
    // SAFETY: this process has one thread.
    if !unsafe { base::companion::detach(c"berth-keeper") }? {
        return Ok(());
    }
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
    // The last to be killed when memory runs out; containers set their own value.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    process::Keeper::new(listener)?.run()
}

extern "C" fn disregard(_: libc::c_int) {}
