//! A process that cannot be mistaken for another: by pidfd, and by pid with its start time.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A pid and the tick it started at (field 22 of `/proc/PID/stat`, proc(5)), which together are
/// unique until the next boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessKey {
    pub pid: i32,
    pub start_ticks: u64,
}

impl ProcessKey {
    /// The key of a living process.
    ///
    /// # Errors
    /// `NotFound` where there is none by this pid.
    pub fn of(pid: i32) -> io::Result<ProcessKey> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        parse_start_ticks(&stat)
            .map(|start_ticks| ProcessKey { pid, start_ticks })
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable /proc/PID/stat"))
    }

    /// Opens the process, if it still is the one this key was taken of.
    pub fn open(self) -> io::Result<Option<PidFd>> {
        let fd = match PidFd::open(self.pid) {
            Ok(fd) => fd,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // Compared after the open: the pidfd pins the pid, so it is the same one or never was.
        match ProcessKey::of(self.pid) {
            Ok(now) if now == self => Ok(Some(fd)),
            Ok(_) => Ok(None),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

fn parse_start_ticks(stat: &str) -> Option<u64> {
    // The command name is in parentheses and may hold any byte, parentheses too.
    let after_name = &stat[stat.rfind(')')? + 1..];
    after_name.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// A process by file descriptor (pidfd_open(2)).
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens a living process.
    pub fn open(pid: i32) -> io::Result<PidFd> {
        let pid = Pid::from_raw(pid)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "pid 0 is no process"))?;
        Ok(PidFd(pidfd_open(pid, PidfdFlags::empty())?))
    }

    /// Takes over a pidfd, as clone3 with CLONE_PIDFD gives it.
    pub fn from_owned(fd: OwnedFd) -> PidFd {
        PidFd(fd)
    }

    /// Sends `signal` by number.
    ///
    /// # Errors
    /// `ESRCH` where the process has ended.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        match Signal::from_named_raw(signal) {
            Some(named) => Ok(pidfd_send_signal(&self.0, named)?),
            None => {
                use std::os::fd::AsRawFd;
                // SAFETY: the descriptor is open for the length of the call and no pointer is passed.
                let result = unsafe {
                    libc::syscall(
                        libc::SYS_pidfd_send_signal,
                        self.0.as_raw_fd(),
                        signal,
                        0usize,
                        0,
                    )
                };
                if result == 0 {
                    Ok(())
                } else {
                    Err(io::Error::last_os_error())
                }
            }
        }
    }
}

impl From<PidFd> for OwnedFd {
    fn from(process: PidFd) -> OwnedFd {
        process.0
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 12345 1 1";
        assert_eq!(parse_start_ticks(stat), Some(12345));
    }

    #[test]
    fn a_reused_pid_is_not_opened() {
        let own = ProcessKey::of(std::process::id() as i32).unwrap();
        assert!(own.open().unwrap().is_some());
        let other = ProcessKey {
            start_ticks: own.start_ticks + 1,
            ..own
        };
        assert!(other.open().unwrap().is_none());
    }
}
