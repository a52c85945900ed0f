//! What turns the prepared child into the container's program (runtime-spec, config "Process"): credentials,
//! capabilities, limits, labels, the search for the program, and execve(2) itself.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Capabilities, LinuxCapabilities, PosixRlimit, PosixRlimitType, Process};
use rustix::process::{WaitId, WaitIdOptions, waitid};

use crate::error::{Context, Error, Result};
use crate::syscall;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
}

impl Exit {
    /// The code a shell would show: 128 and the signal's number for a killed process.
    pub fn code(self) -> i32 {
        match self {
            Exit::Code(code) => code,
            Exit::Signal(signal) => 128 + signal,
        }
    }
}

/// Waits for a child of this process by its pidfd and reaps it.
///
/// # Errors
/// `ECHILD` where it is no child of this process or has been reaped.
pub fn wait(pidfd: BorrowedFd<'_>) -> io::Result<Exit> {
    loop {
        match waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED) {
            Ok(Some(status)) => return Ok(exit_of(&status)),
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// [`wait`] without waiting: `None` while it runs.
///
/// # Errors
/// As [`wait`].
pub fn try_wait(pidfd: BorrowedFd<'_>) -> io::Result<Option<Exit>> {
    let status = waitid(
        WaitId::PidFd(pidfd),
        WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
    )?;
    Ok(status.map(|status| exit_of(&status)))
}

fn exit_of(status: &rustix::process::WaitIdStatus) -> Exit {
    match status.exit_status() {
        Some(code) => Exit::Code(code),
        None => Exit::Signal(status.terminating_signal().unwrap_or(libc::SIGKILL)),
    }
}

/// The names of all capabilities, by number (capabilities(7)).
pub(crate) const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The capability sets as bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct CapabilitySets {
    pub bounding: u64,
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
    pub ambient: u64,
}

impl CapabilitySets {
    pub fn of(sets: &LinuxCapabilities) -> CapabilitySets {
        let bits = |set: &Option<Capabilities>| {
            set.iter().flatten().fold(0, |bits, capability| {
                let name = capability.to_string();
                CAPABILITIES
                    .iter()
                    .position(|known| *known == name)
                    .map_or(bits, |number| bits | 1 << number)
            })
        };
        CapabilitySets {
            bounding: bits(sets.bounding()),
            effective: bits(sets.effective()),
            permitted: bits(sets.permitted()),
            inheritable: bits(sets.inheritable()),
            ambient: bits(sets.ambient()),
        }
    }
}

/// Becomes the container's user with the container's capabilities. The calling process must be privileged in its
/// user namespace.
pub(crate) fn become_user(process: &Process) -> Result<()> {
    let user = process.user();
    let sets = process.capabilities().as_ref().map(CapabilitySets::of);
    let held = syscall::effective_capabilities().during(|| "capget".into())?;
    let sets = sets.unwrap_or_default();
    for number in 0..64u32 {
        if sets.bounding & 1 << number != 0 {
            continue;
        }
        match syscall::prctl(libc::PR_CAPBSET_DROP, number.into(), 0) {
            Ok(_) => {}
            // Past the last capability of this kernel.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(error) => {
                return Err(error).during(|| "drop a capability from the bounding set".into());
            }
        }
    }
    syscall::prctl(libc::PR_SET_KEEPCAPS, 1, 0)
        .during(|| "keep capabilities over the change of user".into())?;
    let groups = user.additional_gids().as_deref().unwrap_or_default();
    match syscall::set_groups(groups) {
        Ok(()) => {}
        // Given up for this user namespace; the initial one never does (user_namespaces(7)).
        Err(error)
            if error.raw_os_error() == Some(libc::EPERM) && !base::userns::may_set_groups() =>
        {
            if !groups.is_empty() {
                return Err(Error::invalid(
                    "config.json: process.user.additionalGids cannot be set: setgroups(2) is denied in this user namespace",
                ));
            }
        }
        Err(error) => return Err(error).during(|| "setgroups".into()),
    }
    syscall::set_ids(user.uid(), user.gid()).during(|| {
        format!(
            "become user {} and group {} (are both mapped?)",
            user.uid(),
            user.gid()
        )
    })?;
    syscall::prctl(libc::PR_SET_KEEPCAPS, 0, 0).during(|| "prctl".into())?;
    let possible = held & !unknown_capabilities();
    syscall::capset(
        sets.effective & possible,
        sets.permitted & possible,
        sets.inheritable & possible,
    )
    .during(|| "set the capabilities".into())?;
    // Ambient: only what is both permitted and inheritable can be raised; runc warns and goes on as well.
    let _ = syscall::prctl(
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_CLEAR_ALL as u64,
        0,
    );
    let ambient = sets.ambient & sets.permitted & sets.inheritable & possible;
    for number in (0..64u64).filter(|number| ambient & 1 << number != 0) {
        syscall::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_RAISE as u64,
            number,
        )
        .during(|| "raise an ambient capability".into())?;
    }
    Ok(())
}

const fn unknown_capabilities() -> u64 {
    !((1 << CAPABILITIES.len()) - 1)
}

/// Sets the resource limits of process `pid` (0: this one).
pub(crate) fn set_limits(pid: i32, limits: &[PosixRlimit]) -> Result<()> {
    for (index, limit) in limits.iter().enumerate() {
        if limits[..index]
            .iter()
            .any(|other| other.typ() == limit.typ())
        {
            return Err(Error::invalid(format!(
                "config.json: process.rlimits has {} twice",
                limit.typ()
            )));
        }
        let (name, number) = resource(limit.typ());
        syscall::set_rlimit(pid, number, limit.soft(), limit.hard()).during(|| {
            format!(
                "set {name} to {} (hard {}): raising a hard limit needs CAP_SYS_RESOURCE in the initial user namespace",
                limit.soft(),
                limit.hard()
            )
        })?;
    }
    Ok(())
}

fn resource(kind: PosixRlimitType) -> (&'static str, u32) {
    use PosixRlimitType as T;
    match kind {
        T::RlimitCpu => ("RLIMIT_CPU", 0),
        T::RlimitFsize => ("RLIMIT_FSIZE", 1),
        T::RlimitData => ("RLIMIT_DATA", 2),
        T::RlimitStack => ("RLIMIT_STACK", 3),
        T::RlimitCore => ("RLIMIT_CORE", 4),
        T::RlimitRss => ("RLIMIT_RSS", 5),
        T::RlimitNproc => ("RLIMIT_NPROC", 6),
        T::RlimitNofile => ("RLIMIT_NOFILE", 7),
        T::RlimitMemlock => ("RLIMIT_MEMLOCK", 8),
        T::RlimitAs => ("RLIMIT_AS", 9),
        T::RlimitLocks => ("RLIMIT_LOCKS", 10),
        T::RlimitSigpending => ("RLIMIT_SIGPENDING", 11),
        T::RlimitMsgqueue => ("RLIMIT_MSGQUEUE", 12),
        T::RlimitNice => ("RLIMIT_NICE", 13),
        T::RlimitRtprio => ("RLIMIT_RTPRIO", 14),
        T::RlimitRttime => ("RLIMIT_RTTIME", 15),
    }
}

/// A label of a Linux security module to be taken at execve: the open file and the text for it.
pub(crate) type Label = (OwnedFd, String);

/// Opens the file through which the security label is set, while /proc still is the host's.
///
/// # Errors
/// [`Error::Unsupported`] where a label is asked for and the host has no such module.
pub(crate) fn open_label(process: &Process) -> Result<Option<Label>> {
    let profile = process
        .apparmor_profile()
        .as_deref()
        .filter(|name| !name.is_empty());
    let label = process
        .selinux_label()
        .as_deref()
        .filter(|name| !name.is_empty());
    let (path, text, what) = match (profile, label) {
        (None, None) => return Ok(None),
        (Some(profile), _) => {
            let enabled = std::fs::read("/sys/module/apparmor/parameters/enabled")
                .is_ok_and(|text| text.starts_with(b"Y"));
            if !enabled {
                if profile == "unconfined" {
                    return Ok(None);
                }
                return Err(Error::unsupported(format!(
                    "the AppArmor profile {profile:?} is asked for, but AppArmor is not enabled on this host: remove process.apparmorProfile"
                )));
            }
            let own = Path::new("/proc/self/attr/apparmor/exec");
            let path = if own.exists() {
                own
            } else {
                Path::new("/proc/self/attr/exec")
            };
            (path, format!("exec {profile}"), "AppArmor profile")
        }
        (None, Some(label)) => {
            if !Path::new("/sys/fs/selinux/enforce").exists() {
                return Err(Error::unsupported(format!(
                    "the SELinux label {label:?} is asked for, but SELinux is not enabled on this host: remove process.selinuxLabel"
                )));
            }
            (
                Path::new("/proc/self/attr/exec"),
                label.to_owned(),
                "SELinux label",
            )
        }
    };
    let fd = rustix::fs::open(
        path,
        rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .during(|| format!("open {} for the {what}", path.display()))?;
    Ok(Some((fd, text)))
}

/// The environment of the program, with HOME where the specification gives none.
pub(crate) fn environment(process: &Process, listen_fds: u32) -> Result<Vec<CString>> {
    let given = process.env().as_deref().unwrap_or_default();
    let mut all = Vec::with_capacity(given.len() + 3);
    let mut home = false;
    for variable in given {
        if variable.starts_with("HOME=") && variable.len() > 5 {
            home = true;
        }
        all.push(text(variable, "process.env")?);
    }
    if !home {
        all.retain(|variable| !variable.as_bytes().starts_with(b"HOME="));
        let passwd = passwd();
        let home = home_of(&passwd, process.user().uid()).unwrap_or("/");
        all.push(text(&format!("HOME={home}"), "HOME")?);
    }
    if listen_fds > 0 {
        all.push(text(&format!("LISTEN_FDS={listen_fds}"), "LISTEN_FDS")?);
        all.push(text("LISTEN_PID=1", "LISTEN_PID")?);
    }
    Ok(all)
}

/// The container's own: the image says what lies there, so it may be a pipe, or without end.
fn passwd() -> String {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open("/etc/passwd");
    let mut text = String::new();
    if let Ok(file) = file
        && file.metadata().is_ok_and(|about| about.is_file())
    {
        let _ = file.take(1 << 20).read_to_string(&mut text);
    }
    text
}

fn home_of(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let found = fields.next()?.parse() == Ok(uid);
        let home = fields.nth(2)?;
        (found && !home.is_empty()).then_some(home)
    })
}

fn text(value: &str, field: &str) -> Result<CString> {
    CString::new(value)
        .map_err(|_| Error::invalid(format!("config.json: {field} holds a NUL byte")))
}

/// The program's arguments.
pub(crate) fn arguments(process: &Process) -> Result<Vec<CString>> {
    let arguments = process.args().as_deref().unwrap_or_default();
    if arguments.is_empty() || arguments[0].is_empty() {
        return Err(Error::invalid(
            "config.json: process.args must name a program",
        ));
    }
    arguments
        .iter()
        .map(|argument| text(argument, "process.args"))
        .collect()
}

/// Finds the program as execvp(3) would, with the errors (and their words) of runc.
pub(crate) fn find_program(name: &CStr, environment: &[CString]) -> Result<CString> {
    let shown = String::from_utf8_lossy(name.to_bytes()).into_owned();
    let fail = |reason: &str, status| {
        Err(Error::Executable {
            name: shown.clone(),
            reason: reason.to_owned(),
            status,
        })
    };
    let as_path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    if name.to_bytes().contains(&b'/') {
        return match executable(&as_path(name.to_bytes())) {
            Ok(()) => Ok(name.to_owned()),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => fail(
                &format!("stat {shown}: permission denied").replace("stat ", ""),
                126,
            ),
            Err(error) if error.raw_os_error() == Some(libc::EISDIR) => {
                fail("is a directory: permission denied", 126)
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOTDIR) => {
                fail(&format!("stat {shown}: not a directory"), 126)
            }
            Err(_) => fail(&format!("stat {shown}: no such file or directory"), 127),
        };
    }
    let path = environment
        .iter()
        .find_map(|variable| variable.as_bytes().strip_prefix(b"PATH="));
    let mut denied = false;
    for directory in path
        .unwrap_or(b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .split(|b| *b == b':')
    {
        let candidate = as_path(if directory.is_empty() {
            b"."
        } else {
            directory
        })
        .join(as_path(name.to_bytes()));
        match executable(&candidate) {
            Ok(()) => return syscall::c_path(&candidate).during(|| "the program's path".into()),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => denied = true,
            Err(_) => {}
        }
    }
    if denied {
        fail("permission denied", 126)
    } else {
        fail("executable file not found in $PATH", 127)
    }
}

fn executable(path: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(path)?;
    if metadata.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(io::Error::from_raw_os_error(libc::EACCES));
    }
    Ok(())
}

/// What execve(2) refused, in runc's words.
pub(crate) fn exec_error(program: &CStr, error: &io::Error) -> Error {
    let (reason, status) = match error.raw_os_error() {
        Some(libc::ENOENT) => ("no such file or directory".to_owned(), 127),
        Some(libc::EACCES) => ("permission denied".to_owned(), 126),
        Some(libc::ENOEXEC) => ("exec format error".to_owned(), 126),
        _ => (error.to_string(), 126),
    };
    Error::Executable {
        name: program.to_string_lossy().into_owned(),
        reason,
        status,
    }
}

/// Enters the working directory, made where the image lacks it and `make` says so, and proves that it is inside
/// (CVE-2024-21626).
pub(crate) fn enter_directory(path: &Path, make: bool) -> Result<()> {
    let directory = if path.as_os_str().is_empty() {
        Path::new("/")
    } else {
        path
    };
    let enter = || -> io::Result<()> {
        match std::env::set_current_dir(directory) {
            Err(error) if make && error.kind() == io::ErrorKind::NotFound => {
                std::fs::create_dir_all(directory)?;
                std::env::set_current_dir(directory)
            }
            other => other,
        }
    };
    enter().during(|| {
        format!(
            "chdir to cwd ({:?}) set in config.json failed",
            directory.display().to_string()
        )
    })?;
    let current = rustix::process::getcwd(Vec::new()).during(|| "getcwd".into())?;
    if !current.as_bytes().starts_with(b"/") {
        return Err(Error::invalid(
            "current working directory is outside of container mount namespace root -- possible container breakout detected",
        ));
    }
    Ok(())
}

/// Hands the standard descriptors to the container's user, so that a program can reopen /dev/stdout.
pub(crate) fn own_stdio(uid: u32) {
    for number in 0..3 {
        // SAFETY: the standard descriptors stay open for the length of this loop.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let Ok(stat) = rustix::fs::fstat(fd) else {
            continue;
        };
        if stat.st_uid == uid || stat.st_rdev == rustix::fs::makedev(1, 3) {
            continue;
        }
        // Refused for what is not ours to give (a read-only file system, an unmapped id): then it stays as it is.
        let _ = rustix::fs::fchown(fd.as_fd(), Some(rustix::fs::Uid::from_raw(uid)), None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_home_of_a_user_is_read_from_its_passwd_line() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/var/www:/bin/sh\n";
        assert_eq!(home_of(passwd, 33), Some("/var/www"));
        assert_eq!(home_of(passwd, 7), None);
    }

    #[test]
    fn a_missing_program_is_reported_in_the_words_engines_match() {
        let error = find_program(c"no-such-program", &[c"PATH=/nowhere".to_owned()]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "exec: \"no-such-program\": executable file not found in $PATH"
        );
        assert_eq!(error.exit_status(), 127);
        let error = find_program(c"/etc/passwd", &[]).unwrap_err();
        assert_eq!(error.exit_status(), 126);
        assert!(error.to_string().contains("permission denied"));
        assert!(
            find_program(c"/no/such", &[])
                .unwrap_err()
                .to_string()
                .contains("no such file or directory")
        );
    }

    #[test]
    fn capabilities_become_the_kernels_bits() {
        let sets: LinuxCapabilities = serde_json::from_str(
            r#"{"bounding":["CAP_CHOWN","CAP_SYS_ADMIN","CAP_CHECKPOINT_RESTORE"]}"#,
        )
        .unwrap();
        assert_eq!(CapabilitySets::of(&sets).bounding, 1 | 1 << 21 | 1 << 40);
    }
}
