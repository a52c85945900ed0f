//! Waiting for a container's process in the foreground: its end by pidfd, signals passed on, the terminal relayed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use crate::error::{Context, Result};
use crate::process::{self, Exit};
use crate::terminal::{self, Size};

/// All signals that can be blocked, as a descriptor (signalfd(2)).
pub(super) struct Signals(OwnedFd);

impl Signals {
    /// Blocks them in this process; the container's process starts with none blocked.
    pub fn block() -> Result<Signals> {
        // SAFETY: the set is initialized by sigfillset before it is read, and the calls write nothing else.
        let fd = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut set);
            // Those a fault of our own raises must not wait.
            for signal in [
                libc::SIGSEGV,
                libc::SIGBUS,
                libc::SIGILL,
                libc::SIGFPE,
                libc::SIGABRT,
                libc::SIGTRAP,
            ] {
                libc::sigdelset(&mut set, signal);
            }
            if libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut()) < 0 {
                -1
            } else {
                libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
            }
        };
        if fd < 0 {
            return Err(io::Error::last_os_error()).during(|| "signalfd".into());
        }
        // SAFETY: the kernel has just made this descriptor and nobody else knows it.
        Ok(Signals(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The numbers of the signals that have come.
    fn taken(&self) -> Vec<i32> {
        const RECORD: usize = 128;
        let mut bytes = [0u8; 8 * RECORD];
        let mut signals = Vec::new();
        while let Ok(length) = rustix::io::read(&self.0, &mut bytes) {
            let whole = bytes[..length].chunks_exact(RECORD);
            signals
                .extend(whole.map(|record| {
                    i32::from_ne_bytes([record[0], record[1], record[2], record[3]])
                }));
            if length < bytes.len() {
                break;
            }
        }
        signals
    }
}

/// The size of this process's own terminal.
pub(super) fn own_size() -> Option<Size> {
    let window = tcgetwinsize(rustix::stdio::stdin()).ok()?;
    Some(Size {
        columns: window.ws_col,
        rows: window.ws_row,
    })
}

/// Our terminal in raw mode; as before when dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Option<Raw> {
        let stdin = rustix::stdio::stdin();
        if !isatty(stdin) {
            return None;
        }
        let before = tcgetattr(stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin, OptionalActions::Now, &raw).ok()?;
        Some(Raw(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &self.0);
    }
}

/// Waits for the process to end. Its end is known by the pidfd alone: no SIGCHLD can be missed.
///
/// # Errors
/// Where the process cannot be waited for.
pub(super) fn wait(
    pidfd: BorrowedFd<'_>,
    master: Option<OwnedFd>,
    signals: Signals,
) -> Result<Exit> {
    let raw = master.as_ref().and_then(|_| Raw::enter());
    let mut relay = master.map(Relay::new);
    loop {
        let mut polled = vec![
            PollFd::new(&pidfd, PollFlags::IN),
            PollFd::new(&signals.0, PollFlags::IN),
        ];
        if let Some(relay) = &relay {
            relay.interests(&mut polled);
        }
        match poll(&mut polled, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).during(|| "poll".into()),
        }
        let ready: Vec<PollFlags> = polled.iter().map(PollFd::revents).collect();
        drop(polled);
        if !ready[1].is_empty() {
            for signal in signals.taken() {
                forward(pidfd, signal, relay.as_ref());
            }
        }
        if let Some(relay) = &mut relay {
            relay.go_on(&ready[2..]);
        }
        if !ready[0].is_empty() {
            if let Some(relay) = &mut relay {
                relay.drain();
            }
            drop(raw);
            return process::wait(pidfd).during(|| "wait for the container's process".into());
        }
    }
}

fn forward(pidfd: BorrowedFd<'_>, signal: i32, relay: Option<&Relay>) {
    match signal {
        libc::SIGCHLD | libc::SIGURG | libc::SIGPIPE => {}
        libc::SIGWINCH => {
            if let (Some(relay), Some(size)) = (relay, own_size()) {
                let _ = terminal::set_size(relay.master.as_fd(), size);
            }
        }
        signal => {
            // SAFETY: no pointer is passed; the pidfd is open.
            unsafe {
                libc::syscall(
                    libc::SYS_pidfd_send_signal,
                    pidfd.as_raw_fd(),
                    signal,
                    0usize,
                    0,
                )
            };
        }
    }
}

/// Bytes between our terminal and the container's.
struct Relay {
    master: OwnedFd,
    input_open: bool,
    output_open: bool,
    pending: Vec<u8>,
}

impl Relay {
    fn new(master: OwnedFd) -> Relay {
        // What the container does not read must not stop its output.
        let _ = rustix::io::ioctl_fionbio(&master, true);
        Relay {
            master,
            input_open: true,
            output_open: true,
            pending: Vec::new(),
        }
    }

    fn interests<'a>(&'a self, polled: &mut Vec<PollFd<'a>>) {
        let mut flags = PollFlags::empty();
        if self.output_open {
            flags |= PollFlags::IN;
        }
        if !self.pending.is_empty() {
            flags |= PollFlags::OUT;
        }
        polled.push(PollFd::new(&self.master, flags));
        if self.input_open && self.pending.is_empty() {
            polled.push(PollFd::from_borrowed_fd(
                rustix::stdio::stdin(),
                PollFlags::IN,
            ));
        }
    }

    fn go_on(&mut self, ready: &[PollFlags]) {
        if ready
            .first()
            .is_some_and(|flags| flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR))
        {
            self.read_output();
        }
        if ready.get(1).is_some_and(|flags| !flags.is_empty()) {
            let mut bytes = [0u8; 8192];
            match rustix::io::read(rustix::stdio::stdin(), &mut bytes) {
                Ok(0) | Err(_) => {
                    self.input_open = false;
                    // The end of a file is, on a terminal, the character for it.
                    self.pending.push(4);
                }
                Ok(length) => self.pending.extend_from_slice(&bytes[..length]),
            }
        }
        if !self.pending.is_empty() {
            match rustix::io::write(&self.master, &self.pending) {
                Ok(length) => {
                    self.pending.drain(..length);
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(_) => self.pending.clear(),
            }
        }
    }

    /// Returns whether there was something.
    fn read_output(&mut self) -> bool {
        let mut bytes = [0u8; 16 * 1024];
        match rustix::io::read(&self.master, &mut bytes) {
            Ok(length) if length > 0 => {
                let mut rest = &bytes[..length];
                while !rest.is_empty() {
                    match rustix::io::write(rustix::stdio::stdout(), rest) {
                        Ok(written) => rest = &rest[written..],
                        Err(rustix::io::Errno::INTR) => {}
                        Err(_) => break,
                    }
                }
                true
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => false,
            // EIO: no process has the terminal open now.
            _ => {
                self.output_open = false;
                false
            }
        }
    }

    /// What was written before the end still comes out.
    fn drain(&mut self) {
        while self.output_open {
            let now = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let mut polled = [PollFd::new(&self.master, PollFlags::IN)];
            if !matches!(poll(&mut polled, Some(&now)), Ok(1..)) {
                return;
            }
            if !self.read_output() {
                return;
            }
        }
    }
}
