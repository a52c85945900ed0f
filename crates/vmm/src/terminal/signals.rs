//! Signals of this process as something to wait on: a handler may do next to nothing, so it writes into a pipe.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::pipe::{PipeFlags, pipe_with};

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// The terminal has another size.
    Window,
    /// This process shall end.
    End,
}

const TAKEN: [libc::c_int; 4] = [libc::SIGWINCH, libc::SIGTERM, libc::SIGHUP, libc::SIGINT];

/// Both ends, made once: a handler may be running when they would be closed.
static PIPE: OnceLock<(OwnedFd, OwnedFd)> = OnceLock::new();
/// The end that the handler writes to.
static WRITE_END: AtomicI32 = AtomicI32::new(-1);

extern "C" fn note(signal: libc::c_int) {
    let byte = signal as u8;
    // SAFETY: write(2) is async-signal-safe, and reads one byte of this stack frame; errno is put back, since the
    // interrupted code may be about to read it.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(
            WRITE_END.load(Ordering::Relaxed),
            (&raw const byte).cast(),
            1,
        );
        *libc::__errno_location() = errno;
    }
}

fn set(signal: libc::c_int, handler: libc::sighandler_t) {
    // SAFETY: a zeroed sigaction is a valid one; the handler is either `note`, which is async-signal-safe, or the default.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut());
    }
}

/// The signals while they are taken; the default is back when this is dropped.
pub struct Signals(&'static OwnedFd);

impl Signals {
    /// # Errors
    /// Where the host gives no pipe.
    pub fn take() -> std::io::Result<Signals> {
        if PIPE.get().is_none() {
            let _ = PIPE.set(pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?);
        }
        let (read, write) = PIPE.get().ok_or(std::io::ErrorKind::Other)?;
        WRITE_END.store(write.as_raw_fd(), Ordering::Relaxed);
        let handler: extern "C" fn(libc::c_int) = note;
        for signal in TAKEN {
            set(signal, handler as *const () as libc::sighandler_t);
        }
        Ok(Signals(read))
    }

    /// What has come since the last time.
    pub fn arrived(&self) -> Vec<Signal> {
        let mut bytes = [0u8; 64];
        let count = rustix::io::read(self.0, &mut bytes).unwrap_or(0);
        bytes[..count]
            .iter()
            .map(|byte| match i32::from(*byte) {
                libc::SIGWINCH => Signal::Window,
                _ => Signal::End,
            })
            .collect()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        TAKEN
            .into_iter()
            .for_each(|signal| set(signal, libc::SIG_DFL));
    }
}
