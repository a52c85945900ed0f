//! The system calls that neither the standard library nor rustix wraps, each as one safe function.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libc::{c_int, c_long, c_ulong};

/// `mount_setattr(2)` attributes.
pub mod attr {
    pub const RDONLY: u64 = 0x1;
    pub const NOSUID: u64 = 0x2;
    pub const NODEV: u64 = 0x4;
    pub const NOEXEC: u64 = 0x8;
    /// The access time field: a value, not bits.
    pub const ATIME: u64 = 0x70;
    pub const NOATIME: u64 = 0x10;
    pub const STRICTATIME: u64 = 0x20;
    pub const NODIRATIME: u64 = 0x80;
    pub const IDMAP: u64 = 0x0010_0000;
    pub const NOSYMFOLLOW: u64 = 0x0020_0000;
}

/// `openat2(2)` resolution flags.
pub mod resolve {
    pub const NO_XDEV: u64 = 0x01;
    pub const NO_MAGICLINKS: u64 = 0x02;
    pub const NO_SYMLINKS: u64 = 0x04;
    pub const BENEATH: u64 = 0x08;
    pub const IN_ROOT: u64 = 0x10;
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
#[derive(Default, Clone, Copy)]
pub struct MountAttr {
    pub attr_set: u64,
    pub attr_clr: u64,
    pub propagation: u64,
    pub userns_fd: u64,
}

fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn owned(result: c_long) -> io::Result<OwnedFd> {
    let fd = check(result)? as RawFd;
    // SAFETY: the kernel has just made this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The path as a C string.
///
/// # Errors
/// `InvalidInput` where it holds a NUL byte.
pub fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the path holds a NUL byte"))
}

/// openat2(2). `flags` are `O_*`; `O_CLOEXEC` is added.
pub fn openat2(
    directory: BorrowedFd<'_>,
    path: &Path,
    flags: c_int,
    mode: u32,
    resolve: u64,
) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let how = [(flags | libc::O_CLOEXEC) as u64, u64::from(mode), resolve];
    loop {
        // SAFETY: the path is NUL-terminated and `how` has the three fields of struct open_how (24 bytes).
        let result = unsafe {
            libc::syscall(
                libc::SYS_openat2,
                directory.as_raw_fd(),
                path.as_ptr(),
                how.as_ptr(),
                24usize,
            )
        };
        match owned(result) {
            // A rename raced with the resolution of `..`: the kernel asks to try again.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => continue,
            other => return other,
        }
    }
}

/// mount_setattr(2) on the mount `fd` is the root of (or, with `recursive`, on the whole tree).
pub fn mount_setattr(
    fd: BorrowedFd<'_>,
    recursive: bool,
    attributes: &MountAttr,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the empty path is static, `attributes` is a whole struct mount_attr of 32 bytes.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            attributes,
            32usize,
        )
    })
    .map(drop)
}

/// mount_setattr(2) by path.
pub fn mount_setattr_path(path: &CStr, recursive: bool, attributes: &MountAttr) -> io::Result<()> {
    let flags = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is NUL-terminated, `attributes` is a whole struct mount_attr of 32 bytes.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            attributes,
            32usize,
        )
    })
    .map(drop)
}

/// open_tree(2) with OPEN_TREE_CLONE: a detached copy of the mount at `path`.
pub fn clone_tree(directory: BorrowedFd<'_>, path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    const OPEN_TREE_CLONE: u32 = 1;
    let mut flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as u32;
    if path.as_os_str().is_empty() {
        flags |= libc::AT_EMPTY_PATH as u32;
    }
    if recursive {
        flags |= libc::AT_RECURSIVE as u32;
    }
    let path = c_path(path)?;
    // SAFETY: the path is NUL-terminated.
    owned(unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            directory.as_raw_fd(),
            path.as_ptr(),
            flags,
        )
    })
}

/// move_mount(2) from one descriptor to another.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    const F_EMPTY_PATH: u32 = 0x4;
    const T_EMPTY_PATH: u32 = 0x40;
    // SAFETY: both paths are static empty strings.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            F_EMPTY_PATH | T_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// What clone3(2) gives the parent.
pub struct Child {
    pub pid: i32,
    pub pidfd: OwnedFd,
}

/// clone3(2) as fork does it, with a pidfd. Returns `None` in the child.
///
/// `cgroup`: the directory of a v2 cgroup to be born in. `exit_signal` is SIGCHLD unless CLONE_PARENT is among
/// the flags.
///
/// # Safety
/// The process must have no other thread: the child goes on with a copy of this thread alone, and locks held by
/// others would stay locked in it for ever.
pub unsafe fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Option<Child>> {
    let mut pidfd: RawFd = -1;
    let mut flags = flags | libc::CLONE_PIDFD as u64;
    if cgroup.is_some() {
        flags |= 0x2_0000_0000; // CLONE_INTO_CGROUP
    }
    let exit_signal = if flags & libc::CLONE_PARENT as u64 != 0 {
        0
    } else {
        libc::SIGCHLD as u64
    };
    let arguments: [u64; 11] = [
        flags,
        &raw mut pidfd as u64,
        0,
        0,
        exit_signal,
        0,
        0,
        0,
        0,
        0,
        cgroup.map_or(0, |fd| fd.as_raw_fd() as u64),
    ];
    // SAFETY: `arguments` is a whole struct clone_args (version 2, 88 bytes); without a stack the child runs on a
    // copy of this one, as after fork. The caller vouches that there is one thread.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), 88usize) })?;
    if pid == 0 {
        return Ok(None);
    }
    // SAFETY: CLONE_PIDFD has stored a new descriptor here.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Some(Child {
        pid: pid as i32,
        pidfd,
    }))
}

/// setns(2): `flags` is one CLONE_NEW* for a namespace descriptor, or several for a pidfd.
pub fn setns(fd: BorrowedFd<'_>, flags: c_int) -> io::Result<()> {
    // SAFETY: no pointer is passed.
    check(unsafe { libc::setns(fd.as_raw_fd(), flags) }.into()).map(drop)
}

/// unshare(2), never with CLONE_FILES.
pub fn unshare(flags: c_int) -> io::Result<()> {
    // SAFETY: no pointer is passed; without CLONE_FILES no descriptor changes its meaning.
    check(unsafe { libc::unshare(flags & !libc::CLONE_FILES) }.into()).map(drop)
}

/// Marks every descriptor from `first` on close-on-exec.
pub fn cloexec_from(first: u32) -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: u32 = 4;
    // SAFETY: no pointer is passed, and no descriptor is closed before an exec.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, CLOSE_RANGE_CLOEXEC) })
        .map(drop)
}

/// dup2(2) onto a number; the copy is not close-on-exec.
///
/// # Safety
/// Nothing in this process may own the descriptor `number`.
pub unsafe fn dup_onto(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    if fd.as_raw_fd() == number {
        // SAFETY: no pointer is passed.
        return check(unsafe { libc::fcntl(number, libc::F_SETFD, 0) }.into()).map(drop);
    }
    // SAFETY: the caller vouches for `number`.
    check(unsafe { libc::dup2(fd.as_raw_fd(), number) }.into()).map(drop)
}

/// prctl(2) with plain numbers.
pub fn prctl(option: c_int, a: c_ulong, b: c_ulong) -> io::Result<c_int> {
    let zero: c_ulong = 0;
    // SAFETY: callers pass only options whose arguments are numbers.
    let result = unsafe { libc::prctl(option, a, b, zero, zero) };
    check(result.into()).map(|value| value as c_int)
}

/// seccomp(2), SECCOMP_SET_MODE_FILTER. Returns the listener where NEW_LISTENER is among the flags.
pub fn seccomp(flags: c_ulong, program: &[libc::sock_filter]) -> io::Result<Option<OwnedFd>> {
    let header = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: `header` describes `program`, which the kernel only reads.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const header,
        )
    };
    if flags & libc::SECCOMP_FILTER_FLAG_NEW_LISTENER != 0 {
        owned(result).map(Some)
    } else {
        check(result).map(|_| None)
    }
}

/// The calling thread's credentials: real, effective and saved ids alike.
pub fn set_ids(uid: u32, gid: u32) -> io::Result<()> {
    // The raw calls: glibc's would signal threads that do not exist in a cloned child.
    // SAFETY: no pointer is passed.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: no pointer is passed.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) }).map(drop)
}

/// setgroups(2).
pub fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the slice lives through the call and its length is passed.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) }).map(drop)
}

/// capset(2), version 3.
pub fn capset(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let header: [u32; 2] = [0x2008_0522, 0];
    let low = |set: u64| set as u32;
    let high = |set: u64| (set >> 32) as u32;
    let data = [
        low(effective),
        low(permitted),
        low(inheritable),
        high(effective),
        high(permitted),
        high(inheritable),
    ];
    // SAFETY: header and data have the layout of version 3 (two structs of three u32).
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }).map(drop)
}

/// The calling thread's effective capabilities.
pub fn effective_capabilities() -> io::Result<u64> {
    let header: [u32; 2] = [0x2008_0522, 0];
    let mut data = [0u32; 6];
    // SAFETY: header and data have the layout of version 3 (two structs of three u32).
    check(unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), data.as_mut_ptr()) })?;
    Ok(u64::from(data[0]) | u64::from(data[3]) << 32)
}

/// A new session keyring by this name, so that the container does not see the host's keys. Returns its serial.
pub fn join_session_keyring(name: &CStr) -> io::Result<i32> {
    const KEYCTL_JOIN_SESSION_KEYRING: c_long = 1;
    // SAFETY: the name is NUL-terminated.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) })
        .map(|id| id as i32)
}

/// Lets all of the container's user search the keyring (runc gives the owner's permissions to "user").
pub fn allow_keyring_search(keyring: i32) -> io::Result<()> {
    const KEYCTL_DESCRIBE: c_long = 6;
    const KEYCTL_SETPERM: c_long = 5;
    let mut text = [0u8; 256];
    // SAFETY: the buffer's length is passed.
    let length = check(unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_DESCRIBE,
            keyring,
            text.as_mut_ptr(),
            text.len(),
        )
    })?;
    let described =
        String::from_utf8_lossy(&text[..(length as usize).min(text.len())]).into_owned();
    let permission = described
        .split(';')
        .nth(3)
        .and_then(|field| u32::from_str_radix(field.trim(), 16).ok());
    let Some(permission) = permission else {
        return Ok(());
    };
    // SAFETY: no pointer is passed.
    check(unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_SETPERM,
            keyring,
            permission | 0x0008_0000,
        )
    })
    .map(drop)
}

/// ioprio_set(2) for this process.
pub fn set_io_priority(class: u16, level: u16) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: c_int = 1;
    let value = c_int::from(class) << 13 | c_int::from(level);
    // SAFETY: no pointer is passed.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) }).map(drop)
}

/// `struct sched_attr` of sched_setattr(2), first version.
#[repr(C)]
#[derive(Default)]
pub struct SchedulerAttributes {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

/// sched_setattr(2) for this process.
pub fn set_scheduler(mut attributes: SchedulerAttributes) -> io::Result<()> {
    attributes.size = size_of::<SchedulerAttributes>() as u32;
    // SAFETY: `attributes` is whole and says its own size.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) }).map(drop)
}

/// sched_setaffinity(2) for this process; the mask has one bit per CPU.
pub fn set_affinity(mask: &[u64]) -> io::Result<()> {
    // SAFETY: the slice lives through the call and its length in bytes is passed.
    check(unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            0,
            mask.len() * 8,
            mask.as_ptr(),
        )
    })
    .map(drop)
}

/// set_mempolicy(2); the mask has one bit per node.
pub fn set_memory_policy(mode: c_int, mask: &[u64]) -> io::Result<()> {
    // The kernel reads `maxnode - 1` bits.
    let bits = if mask.is_empty() {
        0
    } else {
        mask.len() * 64 + 1
    };
    let pointer = if mask.is_empty() {
        std::ptr::null()
    } else {
        mask.as_ptr()
    };
    // SAFETY: the slice holds the bits announced.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, pointer, bits) }).map(drop)
}

/// personality(2).
pub fn set_personality(persona: c_ulong) -> io::Result<()> {
    // SAFETY: no pointer is passed.
    check(unsafe { libc::personality(persona) }.into()).map(drop)
}

/// prlimit(2) for `pid`, 0 for this process.
pub fn set_rlimit(pid: i32, resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = [soft, hard];
    // SAFETY: `limit` is a struct rlimit64.
    check(unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            pid,
            resource,
            limit.as_ptr(),
            std::ptr::null::<u64>(),
        )
    })
    .map(drop)
}

/// setdomainname(2) and sethostname(2).
pub fn set_names(host: Option<&str>, domain: Option<&str>) -> io::Result<()> {
    if let Some(name) = host {
        // SAFETY: pointer and length are those of the text.
        check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }.into())?;
    }
    if let Some(name) = domain {
        // SAFETY: pointer and length are those of the text.
        check(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }.into())?;
    }
    Ok(())
}

/// execve(2) with an optional descriptor to execute instead of a path. Returns only on failure.
pub fn exec(path: &CStr, arguments: &[CString], environment: &[CString]) -> io::Error {
    let (argv, envp) = (pointers(arguments), pointers(environment));
    // SAFETY: both arrays end with a null pointer and point to NUL-terminated strings that outlive the call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}

/// execveat(2) of the file behind `fd`. Returns only on failure.
pub fn exec_fd(fd: BorrowedFd<'_>, arguments: &[CString], environment: &[CString]) -> io::Error {
    let (argv, envp) = (pointers(arguments), pointers(environment));
    // SAFETY: both arrays end with a null pointer and point to NUL-terminated strings that outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            fd.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}

fn pointers(texts: &[CString]) -> Vec<*const libc::c_char> {
    texts
        .iter()
        .map(|text| text.as_ptr())
        .chain([std::ptr::null()])
        .collect()
}

/// Ends this process at once, running nothing of the parent's exit handlers.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(status) }
}

/// Only SIGPIPE has another action in a Rust process, and only the runtime's own blocked signals need lifting.
pub fn reset_known_signals() {
    // SAFETY: the set is initialized before it is read; SIG_DFL is no handler of ours.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut empty: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut empty);
        libc::sigprocmask(libc::SIG_SETMASK, &empty, std::ptr::null_mut());
    }
}

/// Whether the file system behind `fd` is of this type (statfs(2) `f_type`).
pub fn is_filesystem(fd: impl AsFd, magic: i64) -> io::Result<bool> {
    Ok(rustix::fs::fstatfs(fd)?.f_type as i64 == magic)
}
