//! What a machine process takes from itself before a guest runs: the host's networks, names and mounts, its
//! capabilities, every file but its own, and the system calls it has no use for.
//!
//! The order matters: namespaces need capabilities; landlock and seccomp need `no_new_privs`; threads inherit all
//! of it, so this runs while there is one thread.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus,
    path_beneath_rules,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, set_capabilities, unshare_unsafe,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

/// Confines this process. What it could not take away comes back as sentences for people; the guest still runs,
/// as it does under peers on such hosts.
#[must_use]
pub fn enter(readable: &[&Path], writable: &[&Path]) -> Vec<String> {
    let mut weaknesses = Vec::new();
    let mut step = |what: &str, result: Result<(), String>| {
        if let Err(why) = result {
            weaknesses.push(format!("the machine's process keeps {what}: {why}"));
        }
    };
    let flags =
        UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWNS;
    // SAFETY: this is the only thread, and it shares no file system state with another process.
    let unshared = unsafe { unshare_unsafe(flags) };
    step("the host's namespaces", unshared.map_err(|e| e.to_string()));
    step(
        "its capabilities",
        drop_capabilities().map_err(|e| e.to_string()),
    );
    step(
        "sight of the host's files",
        restrict_files(readable, writable),
    );
    step("system calls it does not need", restrict_calls());
    weaknesses
}

fn drop_capabilities() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    for number in 0..64 {
        // SAFETY: PR_CAPBSET_DROP takes a number and touches no memory.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) } != 0 {
            break;
        }
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none)?;
    Ok(())
}

fn restrict_files(readable: &[&Path], writable: &[&Path]) -> Result<(), String> {
    let abi = ABI::V3;
    let all = AccessFs::from_all(abi);
    let read = AccessFs::from_read(abi) & !AccessFs::Execute;
    // The host's CPU is looked at through /proc and /sys, its virtualization used through /dev/kvm.
    let looked_at = [Path::new("/proc"), Path::new("/sys/devices/system/cpu")];
    let devices = [Path::new("/dev/kvm"), Path::new("/dev/urandom")];
    let status = (|| {
        Ruleset::default()
            .handle_access(all)?
            .create()?
            .add_rules(path_beneath_rules(looked_at.iter().chain(readable), read))?
            .add_rules(path_beneath_rules(
                devices.iter().chain(writable),
                all & !AccessFs::Execute,
            ))?
            .restrict_self()
    })()
    .map_err(|error: landlock::RulesetError| error.to_string())?;
    if status.ruleset == RulesetStatus::NotEnforced {
        return Err("this kernel has no landlock".into());
    }
    Ok(())
}

/// What the run loop, the devices, the standard library and glibc's threads use.
const CALLS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_brk,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_ioctl,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_socketpair,
    libc::SYS_openat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fchmod,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_prctl,
    libc::SYS_arch_prctl,
    libc::SYS_getrandom,
    libc::SYS_memfd_create,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_tgkill,
    libc::SYS_tkill,
    libc::SYS_membarrier,
    libc::SYS_restart_syscall,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_prlimit64,
    // Answered with ENOSYS by the filter beneath this one, whose answer counts only where this one allows.
    libc::SYS_clone3,
];

fn restrict_calls() -> Result<(), String> {
    let arch: TargetArch = std::env::consts::ARCH
        .try_into()
        .map_err(|e| format!("{e:?}"))?;
    let install = |rules: BTreeMap<i64, Vec<seccompiler::SeccompRule>>, otherwise, matching| {
        let filter =
            SeccompFilter::new(rules, otherwise, matching, arch).map_err(|e| e.to_string())?;
        let program: BpfProgram = filter
            .try_into()
            .map_err(|e: seccompiler::BackendError| e.to_string())?;
        apply_filter(&program).map_err(|e| e.to_string())
    };
    // clone3 hides its flags in memory: glibc falls back to clone, whose flags can be seen.
    let no_clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    install(
        no_clone3,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;
    let mut rules: BTreeMap<i64, Vec<seccompiler::SeccompRule>> =
        CALLS.iter().map(|call| (*call, Vec::new())).collect();
    // Threads, never processes.
    let thread = seccompiler::SeccompCondition::new(
        0,
        seccompiler::SeccompCmpArgLen::Qword,
        seccompiler::SeccompCmpOp::MaskedEq(libc::CLONE_THREAD as u64),
        libc::CLONE_THREAD as u64,
    )
    .and_then(|condition| seccompiler::SeccompRule::new(vec![condition]))
    .map_err(|e| e.to_string())?;
    rules.insert(libc::SYS_clone, vec![thread]);
    install(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
    )
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Runs `test` of this file in a process of its own, since a jail cannot be left.
    fn alone(test: &str) -> bool {
        if std::env::var_os("BERTH_JAIL_TEST").is_some() {
            return true;
        }
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env("BERTH_JAIL_TEST", "1")
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        false
    }

    #[test]
    fn a_jailed_process_reaches_its_own_files_and_nothing_else() {
        if !alone("process::jail::tests::a_jailed_process_reaches_its_own_files_and_nothing_else") {
            return;
        }
        let own = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        let secret = other.path().join("secret");
        std::fs::write(&secret, "x").unwrap();
        let weaknesses = std::thread::spawn({
            let (own, secret) = (own.path().to_owned(), secret.clone());
            move || {
                let weaknesses = enter(&[], &[&own]);
                if weaknesses.iter().any(|w| w.contains("files")) {
                    eprintln!("SKIPPED: {weaknesses:?}");
                    return weaknesses;
                }
                std::fs::write(own.join("mine"), "y").unwrap();
                assert!(std::fs::read(&secret).is_err());
                assert!(std::fs::File::open("/etc/passwd").is_err());
                assert!(std::os::unix::net::UnixStream::connect("/run/x").is_err());
                assert!(Command::new("/bin/true").status().is_err());
                assert!(std::thread::spawn(|| 7).join().is_ok());
                weaknesses
            }
        })
        .join()
        .unwrap();
        assert!(
            !weaknesses.iter().any(|w| w.contains("system calls")),
            "{weaknesses:?}"
        );
    }
}
