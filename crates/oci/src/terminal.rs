//! The container's terminal: a pty of the container's own devpts, and /dev/console, both by descriptor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Gid, Mode, OFlags, Uid};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::error::{Context, Result};
use crate::syscall::{self, resolve};

const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;

/// Columns and rows of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub columns: u16,
    pub rows: u16,
}

/// A pty pair.
pub(crate) struct Pty {
    pub master: OwnedFd,
    pub slave: OwnedFd,
}

/// Opens a new pty of the devpts at `/dev/pts` of `root`.
pub(crate) fn open(root: BorrowedFd<'_>, size: Option<Size>, owner: u32) -> Result<Pty> {
    let open = || -> io::Result<Pty> {
        let master = syscall::openat2(
            root,
            Path::new("dev/pts/ptmx"),
            libc::O_RDWR | libc::O_NOCTTY,
            0,
            resolve::IN_ROOT | resolve::NO_SYMLINKS,
        )?;
        // A file by that name that is not the pty multiplexer would be the image's trick.
        let stat = rustix::fs::fstat(&master)?;
        if !syscall::is_filesystem(&master, DEVPTS_SUPER_MAGIC)?
            || stat.st_rdev != rustix::fs::makedev(5, 2)
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it is not the pty multiplexer",
            ));
        }
        rustix::pty::unlockpt(&master)?;
        if let Some(size) = size {
            set_size(master.as_fd(), size)?;
        }
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
        if owner != 0 {
            rustix::fs::fchown(&slave, Some(Uid::from_raw(owner)), None::<Gid>)?;
        }
        Ok(Pty { master, slave })
    };
    open().during(|| {
        "open a terminal in the container (/dev/pts/ptmx; is a devpts mounted at /dev/pts?)".into()
    })
}

/// Sets the size that programs on the terminal see.
pub fn set_size(terminal: BorrowedFd<'_>, size: Size) -> io::Result<()> {
    let window = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(terminal, window)?)
}

/// Binds the terminal over /dev/console.
pub(crate) fn bind_console(root: BorrowedFd<'_>, slave: BorrowedFd<'_>) -> Result<()> {
    let bind = || -> io::Result<()> {
        let dev = syscall::openat2(
            root,
            Path::new("dev"),
            libc::O_PATH | libc::O_DIRECTORY,
            0,
            resolve::IN_ROOT | resolve::NO_MAGICLINKS,
        )?;
        let made = rustix::fs::openat(
            &dev,
            "console",
            OFlags::CREATE | OFlags::NOFOLLOW | OFlags::EXCL | OFlags::CLOEXEC | OFlags::WRONLY,
            Mode::from_raw_mode(0o600),
        );
        match made {
            Ok(_) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        let target = rustix::fs::openat(
            &dev,
            "console",
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&target)?.st_mode);
        if kind != FileType::RegularFile && kind != FileType::CharacterDevice {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it is neither a file nor a device",
            ));
        }
        let tree = syscall::clone_tree(slave, Path::new(""), false)?;
        syscall::attach(tree.as_fd(), target.as_fd())
    };
    bind().during(|| "bind the terminal over /dev/console".into())
}

/// Makes the terminal the controlling one of this process's session, which it leads, and stdin, stdout and stderr.
pub(crate) fn take(slave: BorrowedFd<'_>) -> Result<()> {
    rustix::process::ioctl_tiocsctty(slave)
        .during(|| "make the terminal the controlling one".into())?;
    for number in 0..3 {
        // SAFETY: the three standard descriptors are owned by nobody in a Rust process.
        unsafe { syscall::dup_onto(slave, number) }
            .during(|| "give the terminal to the process".into())?;
    }
    debug_assert!(slave.as_raw_fd() > 2);
    Ok(())
}
